"""Batches and their input files, for tests."""

from typing import Any

from shared import batches
from shared.batch_schemas import BatchCreate
from shared.db import reading, transaction
from shared.models import Batch
from shared.settings import Settings
from tests.conftest import jsonl
from tests.rows import stored_file

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def chat_line(text: str, custom_id: str | None = None, **body: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": custom_id or text, "method": "POST", "url": CHAT, "body": body}


def completion_line(prompt: Any, custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": prompt, **body}
    return {"custom_id": custom_id, "method": "POST", "url": COMPLETIONS, "body": body}


def make_batch(settings: Settings, lines: list[Any] | bytes, endpoint: str = CHAT, **choices: Any) -> str:
    """A batch over a file of these lines. Returns its id."""
    content = lines if isinstance(lines, bytes) else jsonl(lines)
    file_id = stored_file(settings, content, purpose="batch", filename="requests.jsonl")
    body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h", **choices}
    with transaction() as session:
        return batches.create(session, "default", BatchCreate.model_validate(body)).id


def batch_of(batch_id: str) -> Batch:
    with reading() as session:
        return session.get_one(Batch, batch_id)
