"""What goes over the wire for files and uploads: requests, and OpenAI's `upload` and `upload.part`."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, StrictInt, StrictStr

from shared.files import MAX_EXPIRY_S, MIN_EXPIRY_S
from shared.models import File, Upload, UploadPart, UploadStatus
from shared.schemas import FileObject, Request

MAX_FILENAME_CHARACTERS = 255
MAX_PARTS = 100_000

Purpose = Literal["fine-tune", "batch", "evals", "user_data"]


class ExpiresAfter(Request):
    """When a file expires: `seconds`, 3600 (an hour) to 2592000 (30 days), after it was created."""

    anchor: Literal["created_at"]
    seconds: Annotated[StrictInt, Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)]


class UploadCreate(Request):
    """POST /v1/uploads."""

    filename: Annotated[StrictStr, Field(min_length=1, max_length=MAX_FILENAME_CHARACTERS)]
    purpose: Purpose
    bytes: Annotated[StrictInt, Field(ge=1)]
    """Of the whole file. The parts must amount to it."""
    mime_type: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    """Kept and shown; nothing depends on it."""
    expires_after: ExpiresAfter | None = None
    """Of the file. It counts from the completion, when the file is created."""


class UploadComplete(Request):
    """POST /v1/uploads/{id}/complete."""

    part_ids: Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_PARTS)]
    """In the order of the file's content; parts that are not named are dropped."""
    md5: Annotated[StrictStr, Field(pattern=r"^[0-9A-Fa-f]{32}$")] | None = None
    """Of the whole content, in hexadecimal; checked if sent."""


class UploadObject(BaseModel):
    """OpenAI's `upload`."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: UploadStatus
    file: FileObject | None = None
    """Once it is completed."""
    anneal: dict[str, Any]

    @classmethod
    def of(cls, row: Upload, file: File | None = None) -> Self:
        return cls(
            id=row.id,
            bytes=row.bytes,
            created_at=int(row.created_at),
            expires_at=int(row.expires_at),
            filename=row.filename,
            purpose=row.purpose,
            status=row.status,
            file=None if file is None else FileObject.of(file),
            anneal={"mime_type": row.mime_type},
        )


class UploadPartObject(BaseModel):
    """OpenAI's `upload.part`."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str
    anneal: dict[str, Any]

    @classmethod
    def of(cls, row: UploadPart) -> Self:
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            upload_id=row.upload_id,
            anneal={"bytes": row.bytes, "sha256": row.sha256},
        )
