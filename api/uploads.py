"""/v1/uploads: files that come in parts, in any order and side by side."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence

from fastapi import APIRouter, Depends, UploadFile

from api.deps import Caller, OutboxDep, SettingsDep
from api.idempotency import OnceDep
from api.multipart import chunks, only
from shared import answers, files, storage, uploads
from shared.db import reading, transaction
from shared.errors import BadRequest, TooLarge
from shared.ids import new_id
from shared.models import FileStatus, Upload, UploadPart
from shared.settings import Settings
from shared.upload_schemas import UploadComplete, UploadCreate, UploadObject, UploadPartObject

log = logging.getLogger(__name__)
router = APIRouter(prefix="/uploads", tags=["uploads"])


@router.post("")
def create_upload(request: UploadCreate, caller: Caller, settings: SettingsDep, once: OnceDep) -> UploadObject:
    """Begin an upload. It has an hour to be completed."""
    if request.bytes > settings.max_large_upload_bytes:
        raise BadRequest(
            f"bytes={request.bytes} is more than the {settings.max_large_upload_bytes} that a file may have; split "
            "it, or raise ANNEAL_MAX_LARGE_UPLOAD_BYTES",
            param="bytes",
        )
    with transaction() as session:
        row = uploads.create(session, caller.project_id, request)
        return once.keep(session, row.id, UploadObject.of(row))


@router.post("/{upload_id}/parts", dependencies=[Depends(only("data"))])
def create_part(
    upload_id: str, data: UploadFile, caller: Caller, settings: SettingsDep, once: OnceDep
) -> UploadPartObject:
    """Add a part of at most 64 MiB. Their order is decided by the completion."""
    if not data.size:
        raise BadRequest("the part is empty; send at least one byte", param="data")
    if data.size > uploads.MAX_PART_BYTES:
        raise TooLarge(
            f"the part has {data.size} bytes; at most {uploads.MAX_PART_BYTES} are allowed, so send more and smaller "
            "parts",
            param="data",
        )
    with reading() as session:
        uploads.get_pending(session, caller.project_id, upload_id)  # before its bytes are written
    part_id = new_id("part", "_")
    with files.row_follows(settings, part_id):
        stored = storage.save_file(settings, part_id, chunks(data.file), max_bytes=uploads.MAX_PART_BYTES)
        once.same_content(stored.sha256)
        with transaction() as session:
            row = uploads.add_part(session, caller.project_id, upload_id, part_id, stored)
            answers.forget_creation(session, upload_id)
            # Not remembered for retries without a key: parts may well be alike, and one too many does no harm.
            return once.keep(session, None, UploadPartObject.of(row))


@router.post("/{upload_id}/complete")
def complete_upload(
    upload_id: str, request: UploadComplete, caller: Caller, settings: SettingsDep, outbox: OutboxDep, once: OnceDep
) -> UploadObject:
    """Make a file of the named parts, which is checked as one that is sent to /v1/files.

    What is refused (a part that is missing, another size or md5, a small training file that can't be trained on) leaves
    the upload pending: send what is wrong again and complete it then. The same completion sent again is answered alike.
    """
    with reading() as session:
        before = uploads.completed_by(session, caller.project_id, upload_id, request)
        if before is not None:
            return UploadObject.of(*before)
        upload = uploads.get_pending(session, caller.project_id, upload_id)
        parts = uploads.chosen_parts(session, upload, request.part_ids)
    try:
        answer, status, gone = _make_file(settings, upload, parts, request, once)
    except (uploads.NotPending, uploads.PartMissing):
        with reading() as session:  # somebody was faster: the same request, or another
            before = uploads.completed_by(session, caller.project_id, upload_id, request)
        if before is None:
            raise
        return UploadObject.of(*before)
    _remove_bytes(settings, gone)
    if status == FileStatus.UPLOADED:
        outbox.files_wait()
    return answer


def _make_file(
    settings: Settings, upload: Upload, parts: Sequence[UploadPart], request: UploadComplete, once: OnceDep
) -> tuple[UploadObject, FileStatus, list[str]]:
    """Store the parts as one file, and complete the upload with it. Returns the answer, what is known of the file, and
    the ids of the parts that are gone."""
    file_id = new_id("file")
    with files.row_follows(settings, file_id):
        content = _content(settings, parts, request.md5)
        stored = storage.save_file(settings, file_id, content, max_bytes=upload.bytes)
        if stored.bytes != upload.bytes:
            raise storage.DamagedFile(f"the parts of upload {upload.id} are damaged in storage; send them again")
        found = files.inspect(settings, file_id, upload.purpose, stored)
        with transaction() as session:
            row, file, gone = uploads.complete(session, upload.id, request, file_id, stored, found)
            answers.forget_creation(session, upload.id)
            answer = once.keep(session, None, UploadObject.of(row, file))
    return answer, found.status, gone


def _content(settings: Settings, parts: Sequence[UploadPart], md5: str | None) -> Iterator[bytes]:
    """The parts' bytes in order, in constant memory.

    Raises:
        BadRequest: after the last one, if they don't hash to `md5`.
        PartMissing: a part is not in storage.
        DamagedFile: a part is not what was sent.
    """
    digest = hashlib.md5(usedforsecurity=False)
    for part in parts:
        own = hashlib.sha256()
        try:
            for chunk in storage.open_file(settings, part.id, sha256=part.sha256):
                digest.update(chunk)
                own.update(chunk)
                yield chunk
        except FileNotFoundError as error:  # also in the middle: a completion that was faster removes its parts
            message = f"the bytes of part {part.id} are missing from storage; send that part again"
            raise uploads.PartMissing(message, param="part_ids") from error
        if own.hexdigest() != part.sha256:
            raise storage.DamagedFile(f"part {part.id} is damaged in storage; send that part again")
    if md5 is not None and digest.hexdigest() != md5.lower():
        raise BadRequest(
            f"md5={md5!r} is not that of the parts in this order, which is {digest.hexdigest()}; check their order, or "
            "send the one that is wrong again",
            param="md5",
            code="md5_mismatch",
        )


@router.post("/{upload_id}/cancel")
def cancel_upload(upload_id: str, caller: Caller, settings: SettingsDep, once: OnceDep) -> UploadObject:
    """Drop an upload and its parts."""
    with transaction() as session:
        row, gone = uploads.cancel(session, caller.project_id, upload_id)
        answers.forget_creation(session, upload_id)
        answer = once.keep(session, None, UploadObject.of(row))
    _remove_bytes(settings, gone)
    return answer


def _remove_bytes(settings: Settings, part_ids: Iterable[str]) -> None:
    """Remove bytes whose rows are gone. What can't be removed now is garbage, which the sweep collects."""
    try:
        for part_id in part_ids:
            storage.delete_file(settings, part_id)
    except (OSError, storage.StorageUnavailable) as error:
        log.warning("the bytes of some parts are left to the sweep: %s", error)
