"""What goes over the wire for batches: the request, and OpenAI's `batch`."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, StrictStr

from shared.models import Batch, BatchStatus
from shared.schemas import Metadata, Request
from shared.upload_schemas import ExpiresAfter

BatchEndpoint = Literal["/v1/chat/completions", "/v1/completions"]
TIMES = tuple(f"{status}_at" for status in BatchStatus if status != BatchStatus.VALIDATING)
"""When each status was reached."""


class BatchCreate(Request):
    """POST /v1/batches."""

    input_file_id: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    """Of a file with purpose `batch`: JSONL, each line `{"custom_id", "method": "POST", "url", "body"}`."""
    endpoint: BatchEndpoint
    """Of every line."""
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
    """Of the output and the error file, counted from when they are written."""


class BatchError(BaseModel):
    code: str | None
    line: int | None
    message: str | None
    param: str | None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchRequestCounts(BaseModel):
    total: int
    completed: int
    failed: int


class InputTokensDetails(BaseModel):
    cached_tokens: int = 0


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails = Field(default_factory=InputTokensDetails)
    output_tokens: int
    output_tokens_details: OutputTokensDetails = Field(default_factory=OutputTokensDetails)
    total_tokens: int


class BatchObject(BaseModel):
    """OpenAI's `batch`."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchRequestCounts
    usage: BatchUsage
    metadata: dict[str, Any] | None

    @classmethod
    def of(cls, row: Batch) -> Self:
        return cls(
            id=row.id,
            endpoint=row.endpoint,
            model=row.model,
            errors=None if row.errors is None else BatchErrors(data=[BatchError(**error) for error in row.errors]),
            input_file_id=row.input_file_id,
            completion_window=row.completion_window,
            status=row.status,
            output_file_id=row.output_file_id,
            error_file_id=row.error_file_id,
            created_at=int(row.created_at),
            expires_at=int(row.expires_at),
            request_counts=BatchRequestCounts(total=row.total, completed=row.completed, failed=row.failed),
            usage=BatchUsage(
                input_tokens=row.input_tokens,
                output_tokens=row.output_tokens,
                total_tokens=row.input_tokens + row.output_tokens,
            ),
            metadata=row.batch_metadata,
            **{name: None if getattr(row, name) is None else int(getattr(row, name)) for name in TIMES},
        )
