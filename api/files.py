"""/v1/files: uploads, listing, content, deletion."""

import logging
from collections.abc import Iterator
from typing import Annotated, BinaryIO, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Form, Request, UploadFile
from fastapi.responses import FileResponse, Response, StreamingResponse
from sqlalchemy import select

from api.deps import Caller, OutboxDep, SettingsDep
from api.idempotency import OnceDep
from api.paging import After, Limit, page
from shared import answers, files, storage, training_data
from shared.db import UNAVAILABLE, reading, transaction
from shared.errors import BadRequest, NotFound
from shared.ids import new_id
from shared.models import File, FileStatus
from shared.schemas import Deleted, FileObject, Page
from shared.text import is_storable

log = logging.getLogger(__name__)
router = APIRouter(prefix="/files", tags=["files"])

MAX_FILENAME_CHARACTERS = 255
CONTENT_TYPE = "application/octet-stream"


async def _only_known_fields(request: Request) -> None:
    """A field that does nothing yet, such as `expires_after`, is refused: ignored, it would be a broken promise."""
    unknown = sorted(set(await request.form()) - {"file", "purpose"})
    if unknown:
        raise BadRequest(f"unknown field {unknown[0][:100]!r}; send `file` and `purpose`", param=unknown[0][:100])


@router.post("")
def create_file(
    file: UploadFile,
    purpose: Annotated[str, Form()],
    caller: Caller,
    settings: SettingsDep,
    outbox: OutboxDep,
    once: OnceDep,
    _: Annotated[None, Depends(_only_known_fields)],
) -> FileObject:
    """Store a file. One for training is checked: a small one before the answer, a large one by `worker batch`."""
    if purpose not in files.UPLOAD_PURPOSES:
        raise BadRequest(
            f"purpose={purpose[:100]!r} must be one of {', '.join(files.UPLOAD_PURPOSES)}", param="purpose"
        )
    filename = file.filename or "upload"
    if not is_storable(filename):
        raise BadRequest(f"the file name {filename[:100]!a} can't be stored; rename the file", param="file")
    if len(filename) > MAX_FILENAME_CHARACTERS:
        raise BadRequest(
            f"the file name has {len(filename)} characters; at most {MAX_FILENAME_CHARACTERS} are allowed", param="file"
        )
    file_id = new_id("file")
    stored = storage.save_file(settings, file_id, _chunks(file.file), max_bytes=settings.max_upload_bytes)
    try:
        once.same_content(filename, purpose, stored.sha256)
        status, summary = FileStatus.PROCESSED, None
        if stored.bytes == 0:
            raise training_data.InvalidRow("the file is empty")
        if purpose == "fine-tune":
            if stored.bytes <= settings.inline_validation_bytes:
                summary = training_data.validate(storage.local_file(settings, file_id, sha256=stored.sha256))
            else:
                status = FileStatus.UPLOADED
        with transaction() as session:
            row = files.create(
                session,
                file_id=file_id,
                project_id=caller.project_id,
                filename=filename,
                purpose=purpose,
                size_bytes=stored.bytes,
                sha256=stored.sha256,
                status=status,
                format=summary.format if summary else None,
                rows=summary.rows if summary else None,
            )
            answer = once.keep(session, file_id, FileObject.of(row))
    except UNAVAILABLE:
        raise  # the commit may yet take effect; if it does not, the sweep finds the bytes
    except BaseException:
        files.discard_bytes(settings, file_id)
        raise
    if status == FileStatus.UPLOADED:
        outbox.files_wait()
    return answer


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(storage.COPY_CHUNK_BYTES):
        yield chunk


@router.get("")
def list_files(
    caller: Caller,
    purpose: str | None = None,
    limit: Limit = 100,
    after: After = None,
    order: Literal["asc", "desc"] = "desc",
) -> Page[FileObject]:
    query = select(File).where(File.project_id == caller.project_id)
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    with reading() as session:
        rows, more = page(session, query, File, after=after, limit=limit, ascending=order == "asc")
    data = [FileObject.of(row) for row in rows]
    return Page.of(data, more, [row.id for row in data])


@router.get("/{file_id}")
def retrieve_file(file_id: str, caller: Caller) -> FileObject:
    with reading() as session:
        return FileObject.of(files.get(session, caller.project_id, file_id))


@router.get("/{file_id}/content", response_class=StreamingResponse)
def file_content(file_id: str, caller: Caller, settings: SettingsDep) -> Response:
    """The bytes as they were sent, in constant memory. From an object store, never all of them if one is wrong."""
    with reading() as session:
        row = files.get(session, caller.project_id, file_id)
    try:
        path = storage.file_on_disk(settings, row.id)
        if path is not None:
            return FileResponse(path, media_type=CONTENT_TYPE, filename=row.filename)
        chunks = storage.open_file(settings, row.id, sha256=row.sha256)
    except FileNotFoundError as error:
        log.error("file %s has a row and no bytes", row.id)
        message = f"the bytes of file {row.id} are missing from storage; delete it and upload it again"
        raise NotFound(message) from error
    headers = {
        "content-length": str(row.bytes),
        "content-disposition": f"attachment; filename*=utf-8''{quote(row.filename, safe='')}",
    }
    return StreamingResponse(chunks, media_type=CONTENT_TYPE, headers=headers)


@router.delete("/{file_id}")
def delete_file(file_id: str, caller: Caller, settings: SettingsDep) -> Deleted:
    with transaction() as session:
        files.delete(session, caller.project_id, file_id)
        answers.forget_creation(session, file_id)
    try:
        storage.delete_file(settings, file_id)
    except storage.StorageUnavailable as error:
        log.warning("the bytes of file %s are left to the sweep: %s", file_id, error)  # its row is gone for good
    return Deleted(id=file_id, object="file")
