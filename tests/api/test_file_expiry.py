"""Files that expire: what clients see from then on, and what the sweep does about it."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from sqlalchemy import select, update

from shared import storage
from shared.db import now, transaction
from shared.models import File, Job
from shared.settings import Settings
from tests.conftest import chat_row, jsonl, upload

HOUR_S = 3600
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def send(client: TestClient, **fields: str) -> Any:
    data = {"purpose": "fine-tune", **{f"expires_after[{name}]": value for name, value in fields.items()}}
    return client.post("/v1/files", files={"file": ("a.jsonl", jsonl([chat_row()]))}, data=data)


def let_expire(file_id: str) -> None:
    with transaction() as session:
        session.execute(update(File).where(File.id == file_id).values(expires_at=now() - 1))


def test_the_sdk_says_when_a_file_expires_and_is_told(server: str) -> None:
    sdk = OpenAI(base_url=f"{server}/v1", api_key="none")
    content = ("a.jsonl", jsonl([chat_row()]))
    file = sdk.files.create(
        file=content, purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": HOUR_S}
    )
    assert file.expires_at == file.created_at + HOUR_S
    assert sdk.files.retrieve(file.id).expires_at == file.expires_at
    assert sdk.files.create(file=content, purpose="fine-tune").expires_at is None
    of_batch = sdk.files.create(file=content, purpose="batch")
    assert of_batch.expires_at == of_batch.created_at + 30 * 24 * HOUR_S, "as OpenAI has it"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"anchor": "created_at", "seconds": "3599"}, "expires_after[seconds]"),
        ({"anchor": "created_at", "seconds": "2592001"}, "expires_after[seconds]"),
        ({"anchor": "created_at", "seconds": "soon"}, "expires_after[seconds]"),
        ({"anchor": "last_active_at", "seconds": "3600"}, "expires_after[anchor]"),
        ({"anchor": "created_at"}, "expires_after[seconds]"),
        ({"seconds": "3600"}, "expires_after[anchor]"),
    ],
)
def test_an_expiry_that_openai_would_not_take_is_refused(
    client: TestClient, settings: Settings, fields: dict[str, str], param: str
) -> None:
    answer = send(client, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert list(storage.list_files(settings)) == []


def test_an_expired_file_is_not_there_for_anybody(client: TestClient) -> None:
    stays = upload(client)["id"]
    gone = send(client, anchor="created_at", seconds="3600").json()["id"]
    assert client.get(f"/v1/files/{gone}").status_code == 200
    let_expire(gone)
    for answer in (
        client.get(f"/v1/files/{gone}"),
        client.get(f"/v1/files/{gone}/content"),
        client.delete(f"/v1/files/{gone}"),
    ):
        assert answer.status_code == 404
    assert [file["id"] for file in client.get("/v1/files").json()["data"]] == [stays]
    assert client.get("/v1/files", params={"after": gone}).status_code == 400
    for key in ("training_file", "validation_file"):
        body = {"model": MODEL, "training_file": stays, key: gone}
        answer = client.post("/v1/fine_tuning/jobs", json=body)
        assert answer.status_code == 404
        assert answer.json()["error"]["param"] == key
    with transaction() as session:
        assert session.scalars(select(Job)).all() == []
