"""/v1/files: uploads in one request, listing, content, deletion. Those in parts are `api.uploads`."""

import logging
from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Form, UploadFile
from fastapi.responses import FileResponse, Response, StreamingResponse
from sqlalchemy import select

from api.answer_schemas import BYTES
from api.deps import Caller, OutboxDep, SettingsDep
from api.idempotency import OnceDep
from api.multipart import chunks, only
from api.paging import After, FilesLimit, page
from shared import answers, files, storage
from shared.db import reading, transaction
from shared.errors import BadRequest, NotFound
from shared.ids import new_id
from shared.models import File, FileStatus
from shared.schemas import Deleted, FileObject, Page
from shared.text import is_storable
from shared.upload_schemas import MAX_FILENAME_CHARACTERS

log = logging.getLogger(__name__)
router = APIRouter(prefix="/files", tags=["files"])

CONTENT_TYPE = "application/octet-stream"
ANCHOR = "expires_after[anchor]"
SECONDS = "expires_after[seconds]"
"""OpenAI's clients send the one nested object of this form as two fields."""


@router.post("", dependencies=[Depends(only("file", "purpose", ANCHOR, SECONDS))])
def create_file(
    file: UploadFile,
    purpose: Annotated[str, Form()],
    caller: Caller,
    settings: SettingsDep,
    outbox: OutboxDep,
    once: OnceDep,
    anchor: Annotated[Literal["created_at"] | None, Form(alias=ANCHOR)] = None,
    seconds: Annotated[int | None, Form(alias=SECONDS, ge=files.MIN_EXPIRY_S, le=files.MAX_EXPIRY_S)] = None,
) -> FileObject:
    """Store a file. One for training is checked: a small one before the answer, a large one by `worker batch`.

    It expires `seconds` after it was created if `expires_after` says so, and one with purpose `batch` after 30 days.
    """
    if purpose not in files.UPLOAD_PURPOSES:
        raise BadRequest(
            f"purpose={purpose[:100]!r} must be one of {', '.join(files.UPLOAD_PURPOSES)}", param="purpose"
        )
    if (anchor is None) != (seconds is None):
        missing = ANCHOR if anchor is None else SECONDS
        raise BadRequest(f"{missing} is required beside the other half of expires_after", param=missing)
    filename = _checked_name(file.filename or "upload")
    file_id = new_id("file")
    with files.row_follows(settings, file_id):
        stored = storage.save_file(settings, file_id, chunks(file.file), max_bytes=settings.max_upload_bytes)
        once.same_content(purpose, filename, str(seconds), stored.sha256)
        found = files.inspect(settings, file_id, purpose, stored)
        with transaction() as session:
            row = files.create(
                session,
                file_id=file_id,
                project_id=caller.project_id,
                filename=filename,
                purpose=purpose,
                size_bytes=stored.bytes,
                sha256=stored.sha256,
                status=found.status,
                format=found.format,
                rows=found.rows,
                expires_after_s=seconds,
            )
            answer = once.keep(session, file_id, FileObject.of(row))
    if found.status == FileStatus.UPLOADED:
        outbox.files_wait()
    return answer


def _checked_name(filename: str) -> str:
    if not is_storable(filename):
        raise BadRequest(f"the file name {filename[:100]!a} can't be stored; rename the file", param="file")
    if len(filename) > MAX_FILENAME_CHARACTERS:
        raise BadRequest(
            f"the file name has {len(filename)} characters; at most {MAX_FILENAME_CHARACTERS} are allowed", param="file"
        )
    return filename


@router.get("")
def list_files(
    caller: Caller,
    purpose: str | None = None,
    limit: FilesLimit = 10_000,
    after: After = None,
    order: Literal["asc", "desc"] = "desc",
) -> Page[FileObject]:
    """The project's files, newest first unless `order` says otherwise."""
    query = select(File).where(File.project_id == caller.project_id, files.visible())
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    with reading() as session:
        rows, more = page(session, query, File, after=after, limit=limit, ascending=order == "asc")
    data = [FileObject.of(row) for row in rows]
    return Page.of(data, more, [row.id for row in data])


@router.get("/{file_id}")
def retrieve_file(file_id: str, caller: Caller) -> FileObject:
    """A file as it is now."""
    with reading() as session:
        return FileObject.of(files.get(session, caller.project_id, file_id))


@router.get("/{file_id}/content", response_class=StreamingResponse, responses={200: {"content": BYTES}})
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
    """Remove a file for good. Refused while a job that has not ended needs it."""
    with transaction() as session:
        files.delete(session, caller.project_id, file_id)
        answers.forget_creation(session, file_id)
    try:
        storage.delete_file(settings, file_id)
    except storage.StorageUnavailable as error:
        log.warning("the bytes of file %s are left to the sweep: %s", file_id, error)  # its row is gone for good
    return Deleted(id=file_id, object="file")
