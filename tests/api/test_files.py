"""/v1/files over the real application."""

import json
import tempfile
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from shared.db import transaction
from shared.models import TERMINAL, Job, JobStatus
from shared.settings import Settings
from tests.conftest import chat_row, jsonl, upload

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def stored(settings: Settings) -> list[Path]:
    return [path for path in settings.storage_root.rglob("*") if path.is_file()]


def test_a_file_comes_back_as_it_was_sent(client: TestClient) -> None:
    content = jsonl([chat_row("grüße", "schön")])
    file = upload(client, content)
    assert file["status"] == "processed"
    assert file["bytes"] == len(content)
    assert file["anneal"]["format"] == "messages" and file["anneal"]["rows"] == 1
    assert client.get(f"/v1/files/{file['id']}").json() == file
    assert client.get(f"/v1/files/{file['id']}/content").content == content


@pytest.mark.parametrize(
    ("row", "format_name"),
    [
        (chat_row(), "messages"),
        ({"prompt": "a", "completion": "b"}, "prompt"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
    ],
)
def test_every_format_is_taken_as_jsonl_and_as_an_array(client: TestClient, row: object, format_name: str) -> None:
    for content in (jsonl([row, row]), json.dumps([row, row]).encode(), b"\xef\xbb\xbf" + jsonl([row, row])):
        anneal = upload(client, content)["anneal"]
        assert (anneal["format"], anneal["rows"]) == (format_name, 2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"[]", "empty"),
        (b"hello", "Line 1: not JSON"),
        (b"[1, 2", "not a JSON array"),
        (b"[" * 100_000, "not a JSON array"),
        (b"3\n", "Line 1: a row must be a JSON object, this one is a number"),
        (jsonl([chat_row(), {"text": "x"}]), "Line 2: found the keys 'text'"),
        (jsonl([{"messages": [{"role": "user", "content": "a"}]}]), "Line 1: no assistant message"),
        (jsonl([{"messages": [*chat_row()["messages"], {"role": "user", "content": "b"}]}]), "must be the assistant's"),
        (jsonl([{"messages": "x"}]), "`messages` must be a non-empty array"),
        (jsonl([{"messages": [{"role": "robot", "content": "a"}]}]), "role is 'robot'"),
        (jsonl([{"messages": [{"role": "user", "content": 3}]}]), "content must be a string, it is a number"),
        (jsonl([{"prompt": "a", "completion": ""}]), "`completion` is empty"),
        (jsonl([chat_row(), {"prompt": "a", "completion": "b"}]), "Line 2: this row is in the"),
        (b'{"prompt": "\\ud800", "completion": "b"}\n', "lone surrogate"),
        (b'{"prompt": "a\\u0000", "completion": "b"}\n', "NUL"),
        (b'{"prompt": NaN, "completion": "b"}\n', "NaN is not JSON"),
        (b'{"prompt": "\xff", "completion": "b"}\n', "Line 1: not JSON"),
    ],
)
def test_a_bad_file_is_refused_with_its_line_and_leaves_nothing(
    client: TestClient, settings: Settings, content: bytes, said: str
) -> None:
    answer = client.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert said in error["message"]
    assert error["type"] == "invalid_request_error" and error["param"] == "file"
    assert client.get("/v1/files").json()["data"] == []
    assert stored(settings) == []


def test_a_file_past_the_limit_is_refused_and_leaves_nothing(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = settings.model_copy(update={"max_upload_bytes": 1000})
    client.app.state.settings = small  # type: ignore[attr-defined]
    answer = client.post("/v1/files", files={"file": ("a.jsonl", b"x" * 1001)}, data={"purpose": "fine-tune"})
    assert answer.status_code == 413
    assert "1000 bytes" in answer.json()["error"]["message"]
    assert stored(settings) == []


@pytest.mark.parametrize(
    ("data", "param"), [({"purpose": "dance"}, "purpose"), ({}, "purpose"), ({"purpose": "assistants"}, "purpose")]
)
def test_a_wrong_purpose_is_named(client: TestClient, data: dict[str, str], param: str) -> None:
    answer = client.post("/v1/files", files={"file": ("a.jsonl", jsonl([chat_row()]))}, data=data)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_field_that_does_nothing_is_refused_and_not_ignored(client: TestClient, settings: Settings) -> None:
    data = {"purpose": "fine-tune", "expires_after[anchors]": "created_at"}
    answer = client.post("/v1/files", files={"file": ("a.jsonl", jsonl([chat_row()]))}, data=data)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "expires_after[anchors]"
    twice = [("file", ("a.jsonl", jsonl([chat_row()]))), ("file", ("b.jsonl", jsonl([chat_row()])))]
    answer = client.post("/v1/files", files=twice, data={"purpose": "fine-tune"})
    assert answer.status_code == 400
    assert "sent twice" in answer.json()["error"]["message"]
    assert stored(settings) == []


def test_a_file_name_is_data_and_never_a_path(client: TestClient, settings: Settings) -> None:
    answer = client.post(
        "/v1/files", files={"file": ("../../../etc/passwd", jsonl([chat_row()]))}, data={"purpose": "fine-tune"}
    )
    assert answer.status_code == 200
    assert [path.name for path in stored(settings)] == [answer.json()["id"]]


def test_files_are_listed_newest_first_and_paged_without_gaps(client: TestClient) -> None:
    ids = [upload(client)["id"] for _ in range(5)]
    first = client.get("/v1/files", params={"limit": 3}).json()
    second = client.get("/v1/files", params={"limit": 3, "after": first["last_id"]}).json()
    assert [file["id"] for file in first["data"] + second["data"]] == ids[::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)
    oldest = client.get("/v1/files", params={"order": "asc"}).json()
    assert [file["id"] for file in oldest["data"]] == ids
    gone = client.delete(f"/v1/files/{ids[0]}").json()["id"]
    for after in ("file-nope", gone):
        answer = client.get("/v1/files", params={"after": after})
        assert answer.status_code == 400
        assert after in answer.json()["error"]["message"] and answer.json()["error"]["param"] == "after"


def test_a_list_of_files_takes_openais_bounds_and_purposes(client: TestClient) -> None:
    upload(client, b"x", purpose="user_data")
    wanted = upload(client)["id"]
    listed = client.get("/v1/files", params={"limit": 10_000, "purpose": "fine-tune"}).json()
    assert [file["id"] for file in listed["data"]] == [wanted]
    for limit in (0, 10_001):
        assert client.get("/v1/files", params={"limit": limit}).status_code == 400


def test_the_default_page_holds_more_than_a_hundred_files(client: TestClient) -> None:
    for _ in range(101):
        upload(client, b"x", purpose="user_data")
    listed = client.get("/v1/files").json()
    assert (len(listed["data"]), listed["has_more"]) == (101, False)


def test_files_that_come_and_go_while_paging_hide_none_and_repeat_none(client: TestClient) -> None:
    ids = [upload(client, b"x", purpose="user_data")["id"] for _ in range(6)]
    first = client.get("/v1/files", params={"limit": 2}).json()
    upload(client, b"x", purpose="user_data")
    client.delete(f"/v1/files/{ids[5]}")
    rest = client.get("/v1/files", params={"limit": 100, "after": first["last_id"]}).json()
    assert [file["id"] for file in first["data"] + rest["data"]] == ids[::-1]


def test_a_deleted_file_is_gone_with_its_bytes(client: TestClient, settings: Settings) -> None:
    file = upload(client)
    assert client.delete(f"/v1/files/{file['id']}").json() == {"id": file["id"], "object": "file", "deleted": True}
    assert stored(settings) == []
    for answer in (
        client.get(f"/v1/files/{file['id']}"),
        client.get(f"/v1/files/{file['id']}/content"),
        client.delete(f"/v1/files/{file['id']}"),
    ):
        assert answer.status_code == 404


@pytest.mark.parametrize("status", [status for status in JobStatus if status not in TERMINAL])
def test_a_file_that_a_live_job_needs_can_not_be_deleted(client: TestClient, status: JobStatus) -> None:
    file = upload(client)
    job = client.post("/v1/fine_tuning/jobs", json={"model": MODEL, "training_file": file["id"]}).json()
    with transaction() as session:
        session.execute(update(Job).values(status=status))
    refused = client.delete(f"/v1/files/{file['id']}")
    assert refused.status_code == 409
    assert refused.headers["x-should-retry"] == "false"
    assert job["id"] in refused.json()["error"]["message"]
    with transaction() as session:
        session.execute(update(Job).values(status=JobStatus.CANCELLED))
    assert client.delete(f"/v1/files/{file['id']}").status_code == 200


def test_a_body_that_can_not_be_spooled_is_no_fault_of_the_client(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(settings.data / "nowhere"))
    answer = client.post("/v1/files", files={"file": ("a", bytes(2**21))}, data={"purpose": "user_data"})
    assert answer.status_code == 500
    assert "could not be received" in answer.json()["error"]["message"]
