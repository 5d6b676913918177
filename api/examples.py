"""Examples of requests and answers for /openapi.json. A test holds each of them against its schema."""

from typing import Any

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TUNED = "ft:smollm2-135m-instruct:default:support:kJ3pQ9xA"
JOB_ID = "ftjob-kJ3pQ9xA7mWvB2nD5sTcYf8L"
FILE_ID = "file-Zt4hN8bXcQ1wE6rVyU2mKpA9"
UPLOAD_ID = "upload_V7sD2kLpX9qWmN4bTfHc6RyA"
PART_IDS = ["part_B5nMx8QwZr3TkYvLp1DsHj7G", "part_Xc2VfR9tGy6HnJ4mKl8PqW3z"]
CREATED = 1767225600
SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

FILE: dict[str, Any] = {
    "id": FILE_ID,
    "object": "file",
    "bytes": 120394,
    "created_at": CREATED,
    "filename": "train.jsonl",
    "purpose": "fine-tune",
    "status": "processed",
    "status_details": None,
    "expires_at": None,
    "anneal": {
        "format": "chat",
        "rows": 250,
        "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    },
}
UPLOAD: dict[str, Any] = {
    "id": UPLOAD_ID,
    "object": "upload",
    "bytes": 120394,
    "created_at": CREATED,
    "expires_at": CREATED + 3600,
    "filename": "train.jsonl",
    "purpose": "fine-tune",
    "status": "pending",
    "file": None,
    "anneal": {"mime_type": "application/jsonl"},
}
AUTO = {"batch_size": "auto", "learning_rate_multiplier": "auto", "n_epochs": 3}
JOB: dict[str, Any] = {
    "id": JOB_ID,
    "object": "fine_tuning.job",
    "created_at": CREATED,
    "error": None,
    "fine_tuned_model": None,
    "finished_at": None,
    "hyperparameters": AUTO,
    "model": MODEL,
    "organization_id": "default",
    "result_files": [],
    "seed": 3407,
    "status": "queued",
    "trained_tokens": None,
    "training_file": FILE_ID,
    "validation_file": None,
    "estimated_finish": None,
    "integrations": [],
    "metadata": {"team": "support"},
    "method": {"type": "supervised", "supervised": {"hyperparameters": AUTO}},
    "anneal": {
        "training": {"learning_rate": "auto", "max_seq_length": 2048},
        "current_step": None,
        "total_steps": None,
    },
}
RUNNING = {**JOB, "status": "running", "estimated_finish": CREATED + 900}
CHECKPOINT: dict[str, Any] = {
    "id": "ftckpt-M4xT8cVbN2qWs6RfYh1KjP9d",
    "object": "fine_tuning.job.checkpoint",
    "created_at": CREATED + 300,
    "fine_tuned_model_checkpoint": f"{TUNED}:ckpt-step-40",
    "fine_tuning_job_id": JOB_ID,
    "step_number": 40,
    "metrics": {"step": 40, "train_loss": 1.61, "full_valid_loss": 1.72},
}
EVENT: dict[str, Any] = {
    "id": "ftevent-Q8wErT5yUiOpA3sDfGhJ7kLz",
    "object": "fine_tuning.job.event",
    "created_at": CREATED,
    "level": "info",
    "message": f"Created fine-tuning job: {JOB_ID}",
    "type": "message",
    "data": {},
}
BASE_MODEL: dict[str, Any] = {
    "id": MODEL,
    "object": "model",
    "created": 0,
    "owned_by": "HuggingFaceTB",
    "anneal": {"kind": "base", "base_model": MODEL, "fine_tuning_job_id": None, "source": None},
}
TUNED_MODEL: dict[str, Any] = {
    "id": TUNED,
    "object": "model",
    "created": CREATED + 900,
    "owned_by": "default",
    "anneal": {"kind": "tuned", "base_model": MODEL, "fine_tuning_job_id": JOB_ID, "source": "hub"},
}
COMPLETION: dict[str, Any] = {
    "id": "chatcmpl-L2kJhGfDsA9pOiUyTrEwQ4mN",
    "object": "chat.completion",
    "created": CREATED + 1000,
    "model": TUNED,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Under Settings, then Security.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 21, "completion_tokens": 7, "total_tokens": 28},
}
TEXT_COMPLETION: dict[str, Any] = {
    "id": "cmpl-P4oIuYtReWqLkJhGfDsAmNbV",
    "object": "text_completion",
    "created": CREATED + 1000,
    "model": TUNED,
    "choices": [{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9},
}
BATCH: dict[str, Any] = {
    "id": "batch_H5tRfVbGnY6uJmKiLoP0zXcA",
    "object": "batch",
    "endpoint": "/v1/chat/completions",
    "model": None,
    "errors": None,
    "input_file_id": FILE_ID,
    "completion_window": "24h",
    "status": "validating",
    "output_file_id": None,
    "error_file_id": None,
    "created_at": CREATED,
    "in_progress_at": None,
    "expires_at": CREATED + 86400,
    "finalizing_at": None,
    "completed_at": None,
    "failed_at": None,
    "expired_at": None,
    "cancelling_at": None,
    "cancelled_at": None,
    "request_counts": {"total": 0, "completed": 0, "failed": 0},
    "usage": {
        "input_tokens": 0,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 0,
    },
    "metadata": {"team": "support"},
}
RUNNING_BATCH = {
    **BATCH,
    "status": "in_progress",
    "model": TUNED,
    "in_progress_at": CREATED + 2,
    "request_counts": {"total": 250, "completed": 41, "failed": 0},
    "usage": {**BATCH["usage"], "input_tokens": 861, "output_tokens": 287, "total_tokens": 1148},
}


def _page(*items: dict[str, Any]) -> dict[str, Any]:
    return {
        "object": "list",
        "data": list(items),
        "has_more": False,
        "first_id": items[0]["id"],
        "last_id": items[-1]["id"],
    }


EXAMPLES: dict[str, tuple[Any, Any]] = {
    "create_file": ({"purpose": "fine-tune", "file": "(the bytes of train.jsonl)"}, FILE),
    "list_files": (None, _page(FILE)),
    "retrieve_file": (None, FILE),
    "delete_file": (None, {"id": FILE_ID, "object": "file", "deleted": True}),
    "create_upload": (
        {"filename": "train.jsonl", "purpose": "fine-tune", "bytes": 120394, "mime_type": "application/jsonl"},
        UPLOAD,
    ),
    "create_part": (
        {"data": "(up to 64 MiB of the file)"},
        {
            "id": PART_IDS[0],
            "object": "upload.part",
            "created_at": CREATED + 5,
            "upload_id": UPLOAD_ID,
            "anneal": {"bytes": 60197, "sha256": SHA256},
        },
    ),
    "complete_upload": ({"part_ids": PART_IDS}, {**UPLOAD, "status": "completed", "file": FILE}),
    "cancel_upload": (None, {**UPLOAD, "status": "cancelled"}),
    "create_job": (
        {
            "model": MODEL,
            "training_file": FILE_ID,
            "suffix": "support",
            "metadata": {"team": "support"},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
            "training": {"max_seq_length": 2048},
        },
        JOB,
    ),
    "list_jobs": (None, _page(JOB)),
    "retrieve_job": (None, RUNNING),
    "cancel_job": (None, {**JOB, "status": "cancelled", "finished_at": CREATED + 60}),
    "pause_job": (None, {**JOB, "status": "paused"}),
    "resume_job": (None, JOB),
    "list_checkpoints": (None, _page(CHECKPOINT)),
    "job_metrics": (
        None,
        {"object": "list", "data": [{"step": 1, "loss": 2.31}, {"step": 2, "loss": 2.18}], "has_more": False},
    ),
    "list_events": (None, _page(EVENT)),
    "create_batch": (
        {
            "input_file_id": FILE_ID,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
            "metadata": {"team": "support"},
        },
        BATCH,
    ),
    "list_batches": (None, _page(RUNNING_BATCH)),
    "retrieve_batch": (None, RUNNING_BATCH),
    "cancel_batch": (None, {**RUNNING_BATCH, "status": "cancelling", "cancelling_at": CREATED + 60}),
    "list_models": (None, {"object": "list", "data": [BASE_MODEL, TUNED_MODEL]}),
    "retrieve_model": (None, TUNED_MODEL),
    "delete_model": (None, {"id": TUNED, "object": "model", "deleted": True}),
    "create_chat_completion": (
        {"model": TUNED, "messages": [{"role": "user", "content": "Where do I change my password?"}]},
        COMPLETION,
    ),
    "create_completion": (
        {"model": TUNED, "prompt": "The capital of France is", "max_tokens": 3, "temperature": 0},
        TEXT_COMPLETION,
    ),
    "live": (None, {"status": "ok"}),
    "ready": (None, {"status": "ok", "checks": {"database": "ok", "redis": "ok"}}),
}
"""By operation: (request, answer); None where there is none, or none in JSON."""


def _error(kind: str, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": param, "code": code}


_INVALID = "invalid_request_error"
ERROR_EXAMPLES: dict[int, tuple[str, dict[str, Any]]] = {
    400: (
        "The request can't be understood or met.",
        _error(
            _INVALID, "invalid_value", "limit='0' is not valid: Input should be greater than or equal to 1", "limit"
        ),
    ),
    401: (
        "No API key, or a wrong one.",
        _error(
            "authentication_error", "invalid_api_key", "the API key is not valid here; use the value of ANNEAL_API_KEY"
        ),
    ),
    403: (
        "It may not be done: to what is the operator's, or from another host without a key.",
        _error(
            "permission_error",
            "permission_denied",
            "without ANNEAL_API_KEY only localhost is served, not Host 'example.com'",
        ),
    ),
    404: (
        "Something that was named is not there.",
        _error(_INVALID, "not_found", "there is no file 'file-x'; GET /v1/files lists yours"),
    ),
    409: (
        "The present state does not allow it.",
        _error(_INVALID, "conflict", f"job {JOB_ID} has already ended (succeeded); it can't be cancelled"),
    ),
    413: (
        "The body is too large.",
        _error(_INVALID, "file_too_large", "the request body has more than 8388608 bytes, the most allowed here"),
    ),
    429: (
        "Too much at once.",
        _error("rate_limit_error", "rate_limit_exceeded", "256 requests are waiting already; try again shortly"),
    ),
    500: (
        "A fault of the service.",
        _error("server_error", "internal_error", "an internal error; the server's log has it under req_4711"),
    ),
    503: (
        "Something the service needs is away; try again.",
        _error("server_error", "service_unavailable", "the database is out of reach; try again shortly"),
    ),
    507: (
        "The storage is full.",
        _error("server_error", "storage_full", "the storage is full; delete files or checkpoints, or enlarge it"),
    ),
}
