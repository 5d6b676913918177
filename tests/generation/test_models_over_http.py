"""What the rest of the API promises about generation: a deleted model finishes its answers, which are as described."""

import shutil
from pathlib import Path

import httpx
import openai

from shared.db import transaction
from shared.models import Model
from shared.settings import Settings
from tests.api.openapi import Document
from tests.conftest import chat_row, jsonl
from tests.generation.conftest import RunningGenerator, user

NAME = "ft:slow:default:x:12345678"


def make_tuned_model(server: str, settings: Settings, weights: Path) -> Path:
    """A tuned model with these weights, of a job that has ended. Returns its folder in storage."""
    with httpx.Client(base_url=server) as client:
        form = {"files": {"file": ("a.jsonl", jsonl([chat_row()]))}, "data": {"purpose": "fine-tune"}}
        file_id = client.post("/v1/files", **form).json()["id"]
        body = {"model": "acme/slow", "training_file": file_id}
        job_id = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
        client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    location = f"checkpoints/{job_id}/1/5"
    shutil.copytree(weights, settings.storage_root / location)
    with transaction() as session:
        session.add(
            Model(
                id=NAME,
                project_id="default",
                kind="tuned",
                job_id=job_id,
                base_model="acme/slow",
                location=location,
                owned_by="default",
                created_at=0,
            )
        )
    return settings.storage_root / location


def test_a_model_that_is_deleted_while_it_answers_answers_to_the_end(
    generator: RunningGenerator, sdk: openai.OpenAI, server: str, settings: Settings, tiny_models: Path
) -> None:
    folder = make_tuned_model(server, settings, tiny_models / "acme" / "slow")
    stream = sdk.chat.completions.create(
        model=NAME,
        messages=user("hi"),
        max_tokens=300,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    first = next(stream)
    assert first.model == NAME
    assert sdk.models.delete(NAME).deleted and not folder.exists()
    *_, last = stream
    assert last.usage.completion_tokens == 300
    try:
        sdk.chat.completions.create(model=NAME, messages=user("hi"))
    except openai.NotFoundError as error:
        assert error.code == "model_not_found"
    else:
        raise AssertionError("a deleted model answered")


def test_answers_are_as_described(generator: RunningGenerator, server: str) -> None:
    with httpx.Client(base_url=server, timeout=60) as client:
        document = Document(client.get("/openapi.json").json())
        for stream in (False, True):
            body = {"model": "acme/tiny", "messages": user("hi"), "max_tokens": 5, "stream": stream}
            assert document.check(client.post("/v1/chat/completions", json=body)).status_code == 200
            text = {"model": "acme/tiny", "prompt": ["hi", "you"], "max_tokens": 5, "stream": stream, "logprobs": 1}
            assert document.check(client.post("/v1/completions", json=text)).status_code == 200
