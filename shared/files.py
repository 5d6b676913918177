"""Files: every change of a file's row.

    create (small) ─ checked before the answer ─► processed
    create (large) ─► uploaded ─ worker batch ─► processed | error

The transaction that settles a file moves the jobs that wait for it on. An invalid small file is refused with its
line number and leaves no row.

From `expires_at` on, by the database's clock, nobody sees a file any more, and no new job may use it. The sweep removes
the row, and then the bytes, once no live job or batch needs it: what runs keeps its data.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from sqlalchemy import ColumnElement, CompoundSelect, or_, select, union, update
from sqlalchemy import delete as delete_rows
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from shared import answers, storage, training_data, waiting
from shared.db import UNAVAILABLE, clock, has_passed, now, reading, transaction
from shared.errors import Conflict, NotFound, Unavailable
from shared.models import BATCH_LIVE, LIVE, Batch, File, FileStatus, Job, UploadPart
from shared.settings import Settings

UPLOAD_PURPOSES = ("fine-tune", "batch", "evals", "user_data")
RESULTS_PURPOSE = "fine-tune-results"
BATCH_OUTPUT_PURPOSE = "batch_output"
MIN_EXPIRY_S = 3600
MAX_EXPIRY_S = 30 * 24 * 3600
BATCH_EXPIRY_S = MAX_EXPIRY_S
"""Of a file with purpose `batch`, unless its sender says otherwise: as OpenAI has it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of a file's content when its row is written; `uploaded` means that `worker batch` looks later."""

    status: FileStatus
    format: str | None = None
    rows: int | None = None


def inspect(settings: Settings, file_id: str, purpose: str, stored: storage.Stored) -> Finding:
    """Look at bytes in storage that get a row next: at once if they are few, or not for training.

    Raises:
        InvalidRow: they are empty, or can't be trained on.
    """
    if stored.bytes == 0:
        raise training_data.InvalidRow("the file is empty")
    if purpose != "fine-tune":
        return Finding(FileStatus.PROCESSED)
    if stored.bytes > settings.inline_validation_bytes:
        return Finding(FileStatus.UPLOADED)
    summary = training_data.validate(storage.local_file(settings, file_id, sha256=stored.sha256))
    return Finding(FileStatus.PROCESSED, summary.format, summary.rows)


def create(
    session: Session,
    *,
    file_id: str,
    project_id: str,
    filename: str,
    purpose: str,
    size_bytes: int,
    sha256: str,
    status: FileStatus,
    format: str | None = None,
    rows: int | None = None,
    expires_after_s: int | None = None,
) -> File:
    """Add the row of bytes that are already whole in storage."""
    if expires_after_s is None and purpose == "batch":
        expires_after_s = BATCH_EXPIRY_S
    created_at = clock(session)
    row = File(
        id=file_id,
        project_id=project_id,
        filename=filename,
        purpose=purpose,
        bytes=size_bytes,
        sha256=sha256,
        status=status,
        format=format,
        rows=rows,
        created_at=created_at,
        expires_at=None if expires_after_s is None else created_at + expires_after_s,
    )
    session.add(row)
    session.flush()
    return row


def get(session: Session, project_id: str, file_id: str, *, param: str | None = None) -> File:
    """The project's file.

    Raises:
        NotFound: there is none of this id in the project, or it has expired.
    """
    row = session.get(File, file_id)
    if row is None or row.project_id != project_id or has_passed(session, row.expires_at):
        raise _unknown(file_id, param)
    return row


def _unknown(file_id: str, param: str | None = None) -> NotFound:
    return NotFound(f"there is no file {file_id[:100]!r}; GET /v1/files lists yours", param=param)


def visible() -> ColumnElement[bool]:
    """Of a query: files that have not expired."""
    return or_(File.expires_at.is_(None), File.expires_at > now())


def delete(session: Session, project_id: str, file_id: str) -> None:
    """Remove the row; the caller removes the bytes after the commit.

    Raises:
        Conflict: a job or a batch that has not ended needs it.
    """
    get(session, project_id, file_id)
    # A job or batch being created with it holds a shared lock.
    row = session.get(File, file_id, with_for_update=True)
    if row is None:
        raise _unknown(file_id)  # another deletion, or the sweep, was faster
    user = session.scalar(
        select(Job.id)
        .where(
            Job.project_id == project_id,
            (Job.training_file == file_id) | (Job.validation_file == file_id),
            Job.status.in_(LIVE),
        )
        .limit(1)
    )
    if user is not None:
        raise Conflict(f"file {file_id} is needed by job {user}, which has not ended; cancel the job first")
    batch = session.scalar(
        select(Batch.id).where(Batch.input_file_id == file_id, Batch.status.in_(BATCH_LIVE)).limit(1)
    )
    if batch is not None:
        raise Conflict(f"file {file_id} is needed by batch {batch}, which has not ended; cancel the batch first")
    session.delete(row)


def find_expired(session: Session, limit: int) -> list[str]:
    """Ids of files to `remove_expired`, oldest first."""
    removable = _removable(clock(session))
    return list(session.scalars(select(File.id).where(*removable).order_by(File.expires_at).limit(limit)))


def remove_expired(session: Session, file_ids: Collection[str]) -> list[str]:
    """Remove the rows of those that have expired and that nothing live needs; the caller removes the bytes after the
    commit. Returns their ids. Files that another sweep is about to remove are left to it."""
    # Locked first, and looked at in a second statement: a job that is being created holds a shared lock on its files,
    # and only a statement that begins after its commit sees it.
    locked = session.scalars(select(File.id).where(File.id.in_(file_ids)).with_for_update(skip_locked=True)).all()
    removable = _removable(clock(session))
    return list(session.scalars(delete_rows(File).where(File.id.in_(locked), *removable).returning(File.id)))


def _removable(at: float) -> tuple[ColumnElement[bool], ...]:
    """At an instant, and not `now()`: PostgreSQL uses no index for a comparison with a clock that goes on."""
    needed: CompoundSelect[tuple[str | None]] = union(
        select(Job.training_file).where(Job.status.in_(LIVE)),
        select(Job.validation_file).where(Job.status.in_(LIVE), Job.validation_file.is_not(None)),
        select(Batch.input_file_id).where(Batch.status.in_(BATCH_LIVE)),
    )
    return File.expires_at <= at, File.id.not_in(needed)


@contextmanager
def row_follows(settings: Settings, object_id: str) -> Iterator[None]:
    """Around storing the bytes of a file or a part and committing its row: neither stays without the other.

    If the block raises, the bytes go, unless nobody knows whether it committed: then the sweep decides.

    Raises:
        Unavailable: this process stood still for so long before its commit that the bytes were taken for garbage.
    """
    try:
        yield
    except UNAVAILABLE:
        raise  # the commit may yet take effect; if it does not, the sweep finds the bytes
    except BaseException:
        discard_bytes(settings, object_id)
        raise
    with suppress(storage.StorageUnavailable):  # nothing can be said, and all but certainly they are there
        if not storage.has_file(settings, object_id):
            with transaction() as session:
                for model in (File, UploadPart):
                    session.execute(delete_rows(model).where(model.id == object_id))
                answers.forget_lost(session, object_id)
            raise Unavailable("storing the bytes took so long that they are gone again; send them once more")


def discard_bytes(settings: Settings, file_id: str) -> None:
    """Remove bytes of a file or a part whose row could not be written, unless the row is there after all.

    A commit whose confirmation was lost has taken effect; then, and while the database can't be asked, bytes stay.
    """
    try:
        with reading() as session:
            known = any(session.get(model, file_id) is not None for model in (File, UploadPart))
    except SQLAlchemyError:
        return
    if not known:
        with suppress(storage.StorageUnavailable):  # then it is garbage, which the sweep collects
            storage.delete_file(settings, file_id)


def next_unchecked(session: Session, besides: Collection[str] = ()) -> File | None:
    """The oldest file that waits for `worker batch`, other than these."""
    waiting = select(File).where(File.status == FileStatus.UPLOADED, File.id.not_in(besides))
    return session.scalar(waiting.order_by(File.created_at, File.id).limit(1))


def settle_valid(session: Session, file_id: str, format: str, rows: int) -> None:
    """uploaded → processed. Nothing happens if somebody settled it first."""
    if _settle(session, file_id, status=FileStatus.PROCESSED, format=format, rows=rows):
        waiting.file_settled(session, file_id, None)


def settle_invalid(session: Session, file_id: str, reason: str) -> None:
    """uploaded → error, and the jobs that waited for it fail."""
    if _settle(session, file_id, status=FileStatus.ERROR, status_details=reason[:2000]):
        waiting.file_settled(session, file_id, reason)


def _settle(session: Session, file_id: str, **values: object) -> bool:
    settled = session.scalar(
        update(File).where(File.id == file_id, File.status == FileStatus.UPLOADED).values(**values).returning(File.id)
    )
    return settled is not None
