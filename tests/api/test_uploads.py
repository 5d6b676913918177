"""/v1/uploads: files that come in parts, through the SDK where it can ask for it."""

import hashlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from sqlalchemy import func, select, update

from api import uploads as routes
from shared import files, storage, uploads
from shared.db import now, reading, transaction
from shared.files import Finding
from shared.models import File, FileStatus, Upload, UploadPart
from shared.settings import Settings
from shared.uploads import LIFETIME_S, MAX_PART_BYTES
from tests.conftest import chat_row, jsonl
from worker import tasks

CONTENT = jsonl([chat_row(f"question {number}") for number in range(30)])


@pytest.fixture
def sdk(server: str) -> OpenAI:
    return OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def begin(client: TestClient, size: int = len(CONTENT), **more: Any) -> str:
    body = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": size, "mime_type": "text/jsonl", **more}
    answer = client.post("/v1/uploads", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def add(client: TestClient, upload_id: str, content: bytes) -> str:
    answer = client.post(f"/v1/uploads/{upload_id}/parts", files={"data": content})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def add_all(client: TestClient, upload_id: str, content: bytes = CONTENT, size: int = 700) -> list[str]:
    return [add(client, upload_id, content[start : start + size]) for start in range(0, len(content), size)]


def complete(client: TestClient, upload_id: str, part_ids: list[str], **more: Any) -> Any:
    return client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": part_ids, **more})


def refused(answer: Any, status_code: int = 400) -> Any:
    assert answer.status_code == status_code, answer.text
    return answer.json()["error"]


def stored_files(settings: Settings) -> set[str]:
    return {file_id for file_id, _ in storage.list_files(settings)}


def count(model: type[File] | type[UploadPart]) -> int:
    with reading() as session:
        return session.scalar(select(func.count()).select_from(model)) or 0


def test_the_sdk_uploads_a_file_in_chunks(sdk: OpenAI, tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(CONTENT)
    md5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
    upload = sdk.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=500, md5=md5
    )
    assert (upload.status, upload.object, upload.bytes) == ("completed", "upload", len(CONTENT))
    assert upload.id.startswith("upload_") and upload.expires_at == upload.created_at + LIFETIME_S
    assert upload.file is not None
    assert (upload.file.status, upload.file.filename, upload.file.bytes) == ("processed", "train.jsonl", len(CONTENT))
    assert sdk.files.content(upload.file.id).read() == CONTENT
    assert sdk.files.retrieve(upload.file.id) == upload.file
    assert stored_files(settings) == {upload.file.id}, "the parts are gone"
    in_memory = sdk.uploads.upload_file_chunked(
        file=CONTENT, filename="b.jsonl", bytes=len(CONTENT), mime_type="text/jsonl", purpose="fine-tune", part_size=999
    )
    assert in_memory.file is not None and sdk.files.content(in_memory.file.id).read() == CONTENT


def test_parts_come_side_by_side_and_are_put_in_the_order_of_the_completion(sdk: OpenAI) -> None:
    upload = sdk.uploads.create(
        bytes=len(CONTENT),
        filename="a.jsonl",
        mime_type="text/jsonl",
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert (upload.status, upload.file) == ("pending", None)
    pieces = [CONTENT[start : start + 300] for start in range(0, len(CONTENT), 300)]
    order = list(range(len(pieces)))
    random.Random(4).shuffle(order)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda index: sdk.uploads.parts.create(upload.id, data=pieces[index]), order))
    assert {(part.object, part.upload_id) for part in parts} == {("upload.part", upload.id)}
    assert all(part.id.startswith("part_") for part in parts)
    part_of = dict(zip(order, parts, strict=True))
    done = sdk.uploads.complete(upload.id, part_ids=[part_of[index].id for index in range(len(pieces))])
    assert done.file is not None and sdk.files.content(done.file.id).read() == CONTENT
    assert done.file.expires_at == done.file.created_at + 7200


def test_a_large_training_file_is_checked_after_the_completion(sdk: OpenAI, settings: Settings) -> None:
    content = jsonl([chat_row("x" * 1000)] * (settings.inline_validation_bytes // 1000))
    upload = sdk.uploads.upload_file_chunked(
        file=content, filename="a.jsonl", bytes=len(content), mime_type="text/jsonl", purpose="fine-tune"
    )
    assert upload.file is not None and upload.file.status == "uploaded"
    worker = threading.Timer(0.3, tasks.validate_files)
    worker.start()
    assert sdk.files.wait_for_processing(upload.file.id, poll_interval=0.05).status == "processed"
    worker.join()


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"bytes": 0}, "bytes"),
        ({"bytes": 8 * 2**30 + 1}, "bytes"),
        ({"bytes": "7"}, "bytes"),
        ({"purpose": "dance"}, "purpose"),
        ({"filename": ""}, "filename"),
        ({"filename": "a" * 256}, "filename"),
        ({"mime_type": None}, "mime_type"),
        ({"expires_after": {"anchor": "created_at", "seconds": 60}}, "expires_after.seconds"),
        ({"expires_after": {"seconds": 3600}}, "expires_after.anchor"),
        ({"parts": 3}, "parts"),
    ],
)
def test_an_upload_that_can_not_be_is_refused_at_its_creation(
    client: TestClient, wrong: dict[str, Any], param: str
) -> None:
    body = {"filename": "a", "purpose": "fine-tune", "bytes": 8 * 2**30, "mime_type": "text/jsonl"}
    assert client.post("/v1/uploads", json=body).status_code == 200, "8 GiB are allowed"
    assert refused(client.post("/v1/uploads", json={**body, **wrong}))["param"] == param


def test_a_part_has_a_byte_and_at_most_64_mib(client: TestClient, settings: Settings) -> None:
    upload_id = begin(client)
    assert refused(client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b""}))["param"] == "data"
    too_large = client.post(f"/v1/uploads/{upload_id}/parts", files={"data": bytes(MAX_PART_BYTES + 1)})
    assert str(MAX_PART_BYTES + 1) in refused(too_large, 413)["message"]
    unknown = client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"x"}, data={"index": "1"})
    assert refused(unknown)["param"] == "index"
    assert stored_files(settings) == set()
    whole = client.post(f"/v1/uploads/{upload_id}/parts", files={"data": bytes(MAX_PART_BYTES)})
    assert whole.status_code == 200, "the SDK's parts have exactly that"


def test_a_wrong_completion_says_why_and_can_be_mended(client: TestClient, settings: Settings) -> None:
    upload_id, other = begin(client), begin(client)
    part_ids = add_all(client, upload_id)
    foreign = add(client, other, b"x")
    for wrong, said in (
        ([*part_ids[:-1], foreign], foreign),
        ([*part_ids, "part_nope"], "part_nope"),
        ([*part_ids, part_ids[0]], part_ids[0]),
        ([], "part_ids"),
        (part_ids[:-1], str(len(CONTENT))),
    ):
        error = refused(complete(client, upload_id, wrong))
        assert said in error["message"] and error["param"] == "part_ids"
    assert str(700 * (len(part_ids) - 1)) in refused(complete(client, upload_id, part_ids[:-1]))["message"]
    md5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
    assert refused(complete(client, upload_id, part_ids[::-1], md5=md5))["code"] == "md5_mismatch"
    assert refused(complete(client, upload_id, part_ids, md5="no"))["param"] == "md5"
    assert len(stored_files(settings)) == len(part_ids) + 1, "no half-made file stays"
    assert count(File) == 0
    answer = complete(client, upload_id, part_ids, md5=md5.upper())
    assert answer.status_code == 200, answer.text
    assert stored_files(settings) == {answer.json()["file"]["id"], foreign}


def test_a_small_training_file_that_is_invalid_is_refused_and_can_be_mended(
    client: TestClient, settings: Settings
) -> None:
    broken = CONTENT[:-9] + b"}}}}}}}}\n"
    upload_id = begin(client)
    part_ids = add_all(client, upload_id, broken)
    error = refused(complete(client, upload_id, part_ids))
    assert error["code"] == "invalid_file_format" and "Line 30" in error["message"]
    assert stored_files(settings) == set(part_ids)
    mended = add(client, upload_id, CONTENT[700 * (len(part_ids) - 1) :])
    assert complete(client, upload_id, [*part_ids[:-1], mended]).json()["status"] == "completed"


def test_the_same_completion_is_answered_alike_and_another_is_refused(client: TestClient) -> None:
    upload_id = begin(client)
    part_ids = add_all(client, upload_id)
    first = complete(client, upload_id, part_ids).json()
    assert complete(client, upload_id, part_ids).json() == first
    for other in (part_ids[::-1], part_ids[:-1]):
        assert refused(complete(client, upload_id, other))["code"] == "upload_not_pending"
    assert first["file"]["id"] in refused(client.post(f"/v1/uploads/{upload_id}/cancel"))["message"]
    assert count(File) == 1
    client.delete(f"/v1/files/{first['file']['id']}")
    assert "gone" in refused(complete(client, upload_id, part_ids))["message"]


def test_of_completions_at_once_one_wins_and_all_are_told_of_it(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_id = begin(client)
    part_ids = add_all(client, upload_id)
    content = routes._content
    together = threading.Barrier(4)

    def wait_for_each_other(*args: Any) -> Any:
        together.wait()
        return content(*args)

    monkeypatch.setattr(routes, "_content", wait_for_each_other)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: complete(client, upload_id, part_ids), range(4)))
    assert [answer.status_code for answer in answers] == [200] * 4, [answer.text for answer in answers]
    ids = {answer.json()["file"]["id"] for answer in answers}
    assert len(ids) == 1 and stored_files(settings) == ids
    assert (count(File), count(UploadPart)) == (1, 0)


@pytest.mark.parametrize(("module", "step"), [(routes, "_content"), (files, "inspect")])
def test_a_completion_loses_against_a_cancel_that_comes_meanwhile(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch, module: Any, step: str
) -> None:
    """Before its parts are read, and when all that is left is the transaction."""
    upload_id = begin(client)
    part_ids = add_all(client, upload_id)
    go_on = getattr(module, step)

    def cancel_first(*args: Any) -> Any:
        assert client.post(f"/v1/uploads/{upload_id}/cancel").status_code == 200
        return go_on(*args)

    monkeypatch.setattr(module, step, cancel_first)
    error = refused(complete(client, upload_id, part_ids))
    assert error["code"] == "upload_not_pending" and "cancelled" in error["message"]
    assert (count(File), stored_files(settings)) == (0, set())


def test_a_cancelled_upload_has_no_parts_and_takes_none(client: TestClient, settings: Settings) -> None:
    upload_id = begin(client)
    part_ids = add_all(client, upload_id)
    for _ in range(2):  # a client that lost the answer asks again
        answer = client.post(f"/v1/uploads/{upload_id}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert (count(UploadPart), stored_files(settings)) == (0, set())
    refused(client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"x"}))
    refused(complete(client, upload_id, part_ids))
    assert stored_files(settings) == set()


def test_an_upload_counts_as_expired_before_the_sweep_comes(client: TestClient, settings: Settings) -> None:
    upload_id = begin(client)
    part_ids = add_all(client, upload_id)
    with transaction() as session:
        session.execute(update(Upload).values(expires_at=now() - 1))
    for answer in (
        client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"x"}),
        complete(client, upload_id, part_ids),
        client.post(f"/v1/uploads/{upload_id}/cancel"),
    ):
        error = refused(answer)
        assert error["code"] == "upload_not_pending" and "expired" in error["message"]
    assert stored_files(settings) == set(part_ids), "the sweep's to remove"


def test_a_part_that_arrives_while_its_upload_ends_leaves_nothing(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_id = begin(client)
    save_file = storage.save_file

    def cancel_meanwhile(*args: Any, **more: Any) -> storage.Stored:
        stored = save_file(*args, **more)
        assert client.post(f"/v1/uploads/{upload_id}/cancel").status_code == 200
        return stored

    monkeypatch.setattr(storage, "save_file", cancel_meanwhile)
    refused(client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"x"}))
    assert (count(UploadPart), stored_files(settings)) == (0, set())


def test_an_upload_nobody_knows_is_a_404(sdk: OpenAI, settings: Settings, client: TestClient) -> None:
    for ask in (
        lambda: sdk.uploads.parts.create("upload_nope", data=b"x"),
        lambda: sdk.uploads.complete("upload_nope", part_ids=["part_nope"]),
        lambda: sdk.uploads.cancel("upload_nope"),
    ):
        with pytest.raises(openai.NotFoundError, match="no upload 'upload_nope'"):
            ask()
    foreign = begin(client)
    with transaction() as session:
        session.execute(update(Upload).values(project_id="another"))
    assert client.post(f"/v1/uploads/{foreign}/parts", files={"data": b"x"}).status_code == 404
    assert complete(client, foreign, ["part_nope"]).status_code == 404
    assert client.post(f"/v1/uploads/{foreign}/cancel").status_code == 404
    assert stored_files(settings) == set()


def test_a_part_whose_bytes_are_lost_is_named(client: TestClient, settings: Settings) -> None:
    upload_id = begin(client)
    part_ids = add_all(client, upload_id)
    storage.delete_file(settings, part_ids[1])
    error = refused(complete(client, upload_id, part_ids))
    assert part_ids[1] in error["message"] and error["code"] == "part_not_found"
    again = add(client, upload_id, CONTENT[700:1400])
    assert complete(client, upload_id, [part_ids[0], again, *part_ids[2:]]).status_code == 200


@pytest.mark.parametrize("kind", ["file", "part", "completion"])
def test_bytes_that_were_collected_before_the_commit_leave_no_row(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As if the process had stood still for an hour between the two."""
    upload_id = begin(client)
    part_ids = add_all(client, upload_id)
    save_file = storage.save_file

    def and_lose_them(settings: Settings, file_id: str, *args: Any, **more: Any) -> storage.Stored:
        stored = save_file(settings, file_id, *args, **more)
        storage.delete_file(settings, file_id)
        return stored

    monkeypatch.setattr(storage, "save_file", and_lose_them)
    monkeypatch.setattr("shared.files.inspect", lambda *_: Finding(FileStatus.PROCESSED))
    if kind == "file":
        answer = client.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "user_data"})
    elif kind == "part":
        answer = client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"x"})
    else:
        answer = complete(client, upload_id, part_ids)
    assert "once more" in refused(answer, 503)["message"]
    assert count(File) == 0
    with reading() as session:
        rows = set(session.scalars(select(UploadPart.id)))
    assert rows <= stored_files(settings)


def test_a_file_made_of_parts_can_be_trained_on(client: TestClient) -> None:
    upload_id = begin(client)
    file_id = complete(client, upload_id, add_all(client, upload_id)).json()["file"]["id"]
    body = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "training_file": file_id}
    assert client.post("/v1/fine_tuning/jobs", json=body).status_code == 200
    assert client.delete(f"/v1/files/{file_id}").status_code == 409


def test_a_key_makes_a_creation_and_a_part_happen_once(client: TestClient, settings: Settings) -> None:
    body = {"filename": "a", "purpose": "user_data", "bytes": 1, "mime_type": "text/plain"}
    key = {"Idempotency-Key": "the-first"}
    upload_id = client.post("/v1/uploads", json=body, headers=key).json()["id"]
    assert client.post("/v1/uploads", json=body, headers=key).json()["id"] == upload_id
    parts = {
        client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"x"}, headers=key).json()["id"] for _ in range(2)
    }
    assert len(parts) == 1 and stored_files(settings) == parts
    files = {
        client.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "user_data"}, headers=key).json()["id"]
        for _ in range(2)
    }
    assert len(files) == 1 and stored_files(settings) == parts | files


def test_an_upload_takes_no_more_than_its_size_again(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_PART_BYTES", 100)
    upload_id = begin(client, size=200)
    parts = [add(client, upload_id, b"x" * 100) for _ in range(5)]
    answer = client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"x"})
    assert "5 parts of 500 bytes" in refused(answer)["message"]
    monkeypatch.setattr(uploads, "MAX_PART_BYTES", 10**6)
    monkeypatch.setattr(uploads, "MAX_PARTS", 5)
    assert refused(client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"x"}))["code"] == "too_many_parts"
    assert complete(client, upload_id, parts[:2]).status_code == 400, "x is no training data, but their size is right"


def test_a_part_that_is_damaged_in_storage_makes_no_file(client: TestClient, settings: Settings) -> None:
    upload_id = begin(client)
    part_id = add(client, upload_id, CONTENT)
    (settings.storage_root / "files" / part_id).write_bytes(CONTENT.replace(b"question 7", b"question 8"))
    answer = complete(client, upload_id, [part_id])
    assert part_id in refused(answer, 500)["message"]
    assert stored_files(settings) == {part_id}
