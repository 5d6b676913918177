"""Uploads: files that come in parts. Every change of an upload's row, and of its parts'.

    create ─► pending ─ complete ─────► completed    its parts have become a file
                 ├───── cancel ───────► cancelled
                 └───── an hour ──────► expired      by the sweep; until it comes, everybody acts as if it had

Terminal states absorb, and have no parts: the transaction that leaves `pending` removes their rows, and the caller
their bytes after the commit. A part is added under a shared lock on its upload, so that none arrives after that.
Every move is one UPDATE guarded by `pending`: of two completions, or a completion and a cancel, one wins.
"""

import hashlib
import json
from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.orm import Session

from shared import files, storage
from shared.db import clock, has_passed, now
from shared.errors import BadRequest, NotFound
from shared.ids import new_id
from shared.models import File, Upload, UploadPart, UploadStatus
from shared.upload_schemas import UploadComplete, UploadCreate

LIFETIME_S = 3600
MAX_PART_BYTES = 64 * 2**20
MAX_PARTS = 10_000
SPARE = 2
"""Parts sent again may bring an upload to so many times its size, and one part more."""


class NotPending(BadRequest):
    """The upload has ended, and nothing can be done with it any more."""

    code = "upload_not_pending"


class PartMissing(BadRequest):
    """A part that was named is not one of this upload's."""

    code = "part_not_found"


def create(session: Session, project_id: str, request: UploadCreate) -> Upload:
    """Begin an upload; nothing is reserved for it."""
    created_at = clock(session)
    row = Upload(
        id=new_id("upload", "_"),
        project_id=project_id,
        filename=request.filename,
        purpose=request.purpose,
        bytes=request.bytes,
        mime_type=request.mime_type,
        status=UploadStatus.PENDING,
        created_at=created_at,
        expires_at=created_at + LIFETIME_S,
        file_expires_after_s=request.expires_after and request.expires_after.seconds,
    )
    session.add(row)
    session.flush()
    return row


def get_pending(session: Session, project_id: str, upload_id: str, *, hold: bool = False) -> Upload:
    """The project's upload, which parts can be added to.

    Args:
        hold: keep it pending until the end of the transaction.

    Raises:
        NotFound: there is none of this id in the project.
        NotPending: it has ended.
    """
    row = session.get(Upload, upload_id, with_for_update={"read": True} if hold else None)
    if row is None or row.project_id != project_id:
        raise _unknown(upload_id)
    if row.status != UploadStatus.PENDING or has_passed(session, row.expires_at):
        raise _ended(row)
    return row


def add_part(session: Session, project_id: str, upload_id: str, part_id: str, stored: storage.Stored) -> UploadPart:
    """Add the row of bytes that are already whole in storage.

    Raises:
        NotFound, NotPending: as `get_pending`.
        BadRequest: with the parts there already it would be far more than was announced.
    """
    upload = get_pending(session, project_id, upload_id, hold=True)
    known = select(func.count(), func.coalesce(func.sum(UploadPart.bytes), 0)).where(UploadPart.upload_id == upload_id)
    count, total = session.execute(known).one()
    if count >= MAX_PARTS or total + stored.bytes > SPARE * upload.bytes + MAX_PART_BYTES:
        raise BadRequest(
            f"upload {upload_id} of {upload.bytes} bytes has {count} parts of {total} bytes already; complete it with "
            "those, or cancel it and begin again",
            param="data",
            code="too_many_parts",
        )
    row = UploadPart(
        id=part_id,
        upload_id=upload_id,
        project_id=project_id,
        bytes=stored.bytes,
        sha256=stored.sha256,
        created_at=clock(session),
    )
    session.add(row)
    session.flush()
    return row


def chosen_parts(session: Session, upload: Upload, part_ids: Sequence[str]) -> list[UploadPart]:
    """The named parts, in that order.

    Raises:
        PartMissing: one is not a part of this upload.
        BadRequest: one is named twice, or together they have another size than was announced.
    """
    known = {row.id: row for row in session.scalars(select(UploadPart).where(UploadPart.upload_id == upload.id)).all()}
    seen: set[str] = set()
    for part_id in part_ids:
        if part_id not in known:
            raise PartMissing(
                f"{part_id[:100]!r} is not a part of upload {upload.id}; name the ids that adding its parts answered",
                param="part_ids",
            )
        if part_id in seen:
            raise BadRequest(f"part {part_id} is named twice; name each part once", param="part_ids")
        seen.add(part_id)
    chosen = [known[part_id] for part_id in part_ids]
    total = sum(part.bytes for part in chosen)
    if total != upload.bytes:
        raise BadRequest(
            f"the {len(chosen)} parts have {total} bytes, but {upload.bytes} were announced for upload {upload.id}; "
            "name all of its parts, or create an upload of the right size",
            param="part_ids",
            code="upload_size_mismatch",
        )
    return chosen


def complete(
    session: Session,
    upload_id: str,
    request: UploadComplete,
    file_id: str,
    stored: storage.Stored,
    found: files.Finding,
) -> tuple[Upload, File, list[str]]:
    """pending → completed, with the file that the parts became, whose bytes are already whole in storage.

    An upload that expires while its parts are put together, and isn't swept yet, is completed all the same.
    Returns the ids of all parts: they are gone, and the caller removes their bytes after the commit.

    Raises:
        NotPending: somebody else ended it first.
    """
    row = _move(
        session,
        upload_id,
        UploadStatus.COMPLETED,
        file_id=file_id,
        completion_sha256=_fingerprint(request),
    )
    if row is None:
        raise _ended(session.get_one(Upload, upload_id))
    file = files.create(
        session,
        file_id=file_id,
        project_id=row.project_id,
        filename=row.filename,
        purpose=row.purpose,
        size_bytes=stored.bytes,
        sha256=stored.sha256,
        status=found.status,
        format=found.format,
        rows=found.rows,
        expires_after_s=row.file_expires_after_s,
    )
    return row, file, _remove_parts(session, [upload_id])


def completed_by(
    session: Session, project_id: str, upload_id: str, request: UploadComplete
) -> tuple[Upload, File] | None:
    """What the same request achieved before: a client that lost the answer gets it again. None if it is pending.

    Raises:
        NotFound: there is no such upload.
        NotPending: it was completed with other parts, or its file is gone; or it was cancelled, or has expired.
    """
    row = session.get(Upload, upload_id)
    if row is None or row.project_id != project_id:
        raise _unknown(upload_id)
    if row.status == UploadStatus.COMPLETED and row.file_id is not None:
        if row.completion_sha256 != _fingerprint(request):
            raise NotPending(
                f"upload {upload_id} was completed already, with other part ids or another md5, and became file "
                f"{row.file_id}; create a new upload",
                param="upload_id",
            )
        try:
            return row, files.get(session, project_id, row.file_id)
        except NotFound as error:
            raise NotPending(
                f"upload {upload_id} was completed, and its file {row.file_id} is gone since; create a new upload",
                param="upload_id",
            ) from error
    get_pending(session, project_id, upload_id)
    return None


def cancel(session: Session, project_id: str, upload_id: str) -> tuple[Upload, list[str]]:
    """pending → cancelled; a cancelled one stays so. Returns, beside it, the ids of its parts: they are gone, and the
    caller removes their bytes after the commit.

    Raises:
        NotFound: there is no such upload.
        NotPending: it was completed, or has expired.
    """
    row = _move(session, upload_id, UploadStatus.CANCELLED, Upload.project_id == project_id, Upload.expires_at > now())
    if row is not None:
        return row, _remove_parts(session, [upload_id])
    row = session.get(Upload, upload_id)
    if row is None or row.project_id != project_id:
        raise _unknown(upload_id)
    if row.status != UploadStatus.CANCELLED:
        raise _ended(row)
    return row, []


def find_overdue(session: Session, limit: int) -> list[str]:
    """Ids of uploads to `expire`, oldest first."""
    return list(
        session.scalars(
            select(Upload.id)
            .where(Upload.status == UploadStatus.PENDING, Upload.expires_at <= now())
            .order_by(Upload.expires_at)
            .limit(limit)
        )
    )


def expire(session: Session, upload_ids: Collection[str]) -> list[str]:
    """pending → expired, of those whose time has passed. Returns the ids of their parts: they are gone, and the caller
    removes their bytes after the commit. Uploads that somebody is about to move are left to them."""
    mine = session.scalars(select(Upload.id).where(Upload.id.in_(upload_ids)).with_for_update(skip_locked=True)).all()
    expired = session.scalars(
        update(Upload)
        .where(Upload.id.in_(mine), Upload.status == UploadStatus.PENDING, Upload.expires_at <= now())
        .values(status=UploadStatus.EXPIRED)
        .returning(Upload.id)
    ).all()
    return _remove_parts(session, expired)


def _move(
    session: Session, upload_id: str, to: UploadStatus, *also: ColumnElement[bool], **values: object
) -> Upload | None:
    """Out of pending, in one UPDATE; None if it isn't pending, or not what `also` demands."""
    return session.scalar(
        update(Upload)
        .where(Upload.id == upload_id, Upload.status == UploadStatus.PENDING, *also)
        .values(status=to, **values)
        .returning(Upload)
    )


def _remove_parts(session: Session, upload_ids: Sequence[str]) -> list[str]:
    gone = delete(UploadPart).where(UploadPart.upload_id.in_(upload_ids)).returning(UploadPart.id)
    return list(session.scalars(gone))


def _fingerprint(request: UploadComplete) -> str:
    what = [request.part_ids, request.md5 and request.md5.lower()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _unknown(upload_id: str) -> NotFound:
    return NotFound(f"there is no upload {upload_id[:100]!r}; POST /v1/uploads creates one")


def _ended(row: Upload) -> NotPending:
    how = {
        UploadStatus.COMPLETED: f"was completed and became file {row.file_id}",
        UploadStatus.CANCELLED: "was cancelled",
    }.get(row.status, f"has expired, {LIFETIME_S} seconds after it was created")
    return NotPending(f"upload {row.id} {how}; create a new upload", param="upload_id")
