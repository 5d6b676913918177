"""/v1/files with its bytes in S3 (a real server on loopback)."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import httpx
import pytest
from fastapi.testclient import TestClient
from moto.server import ThreadedMotoServer

from api.app import create_app
from shared.settings import Settings, get_settings
from shared.storage.keys import PART_BYTES
from tests.conftest import chat_row, jsonl, upload
from worker import tasks


@pytest.fixture
def s3_settings(settings: Settings, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The service's settings, with an object store for storage."""
    monkeypatch.setenv("ANNEAL_STORAGE_URL", f"s3://{bucket}/anneal")
    get_settings.cache_clear()
    return get_settings()


@pytest.fixture
def s3_client(s3_settings: Settings) -> Iterator[TestClient]:
    application = create_app(s3_settings)
    with TestClient(application, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


def keys(bucket: str) -> list[str]:
    found = boto3.client("s3").list_objects_v2(Bucket=bucket).get("Contents", ())
    return sorted(key["Key"] for key in found)


def test_a_file_is_uploaded_read_back_and_deleted(s3_client: TestClient, bucket: str, s3_settings: Settings) -> None:
    content = jsonl([chat_row("grüße", "schön")])
    answer = s3_client.post("/v1/files", files={"file": ("täg.jsonl", content)}, data={"purpose": "fine-tune"})
    file = answer.json()
    assert (file["status"], file["bytes"], file["anneal"]["rows"]) == ("processed", len(content), 1)
    assert keys(bucket) == [f"anneal/files/{file['id']}"]
    read = s3_client.get(f"/v1/files/{file['id']}/content")
    assert read.content == content
    assert read.headers["content-length"] == str(len(content))
    assert read.headers["content-disposition"] == "attachment; filename*=utf-8''t%C3%A4g.jsonl"
    assert s3_client.delete(f"/v1/files/{file['id']}").json()["deleted"] is True
    assert keys(bucket) == []
    assert s3_client.get(f"/v1/files/{file['id']}/content").status_code == 404
    assert not list(Path(s3_settings.run_dir / "cache").glob("files*"))


def test_a_bad_file_is_refused_and_leaves_nothing(s3_client: TestClient, bucket: str) -> None:
    answer = s3_client.post("/v1/files", files={"file": ("a.jsonl", b"hello")}, data={"purpose": "fine-tune"})
    assert answer.status_code == 400
    assert keys(bucket) == []


def test_a_file_comes_in_parts(s3_client: TestClient, bucket: str) -> None:
    content = jsonl([chat_row("x" * 1000)] * 100)
    body = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": len(content), "mime_type": "text/jsonl"}
    upload_id = s3_client.post("/v1/uploads", json=body).json()["id"]
    parts = [
        s3_client.post(f"/v1/uploads/{upload_id}/parts", files={"data": piece}).json()["id"]
        for piece in (content[:40_000], content[40_000:])
    ]
    assert keys(bucket) == sorted(f"anneal/files/{part}" for part in parts)
    missing = boto3.client("s3").get_object(Bucket=bucket, Key=f"anneal/files/{parts[0]}")["Body"].read()
    boto3.client("s3").delete_object(Bucket=bucket, Key=f"anneal/files/{parts[0]}")
    refused = s3_client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": parts})
    assert refused.status_code == 400 and parts[0] in refused.json()["error"]["message"]
    boto3.client("s3").put_object(Bucket=bucket, Key=f"anneal/files/{parts[0]}", Body=missing)
    done = s3_client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": parts}).json()
    assert done["file"]["anneal"]["rows"] == 100
    assert keys(bucket) == [f"anneal/files/{done['file']['id']}"]
    assert s3_client.get(f"/v1/files/{done['file']['id']}/content").content == content


def test_a_large_file_is_checked_by_the_worker(s3_client: TestClient, s3_settings: Settings) -> None:
    file = upload(s3_client, jsonl([chat_row("x" * 1000)] * 9000))
    assert file["bytes"] > PART_BYTES
    tasks.validate_files()
    settled = s3_client.get(f"/v1/files/{file['id']}").json()
    assert (settled["status"], settled["anneal"]["rows"]) == ("processed", 9000)


def test_bytes_that_changed_in_the_bucket_are_never_served_whole(s3_client: TestClient, bucket: str) -> None:
    content = jsonl([chat_row()])
    file = upload(s3_client, content)
    boto3.client("s3").put_object(
        Bucket=bucket, Key=f"anneal/files/{file['id']}", Body=content.replace(b"hello", b"hullo")
    )
    try:
        received = s3_client.get(f"/v1/files/{file['id']}/content").content
    except httpx.HTTPError:
        received = b""
    assert len(received) < len(content)


def test_bytes_that_are_missing_are_told(s3_client: TestClient, bucket: str) -> None:
    file = upload(s3_client)
    boto3.client("s3").delete_object(Bucket=bucket, Key=f"anneal/files/{file['id']}")
    answer = s3_client.get(f"/v1/files/{file['id']}/content")
    assert answer.status_code == 404
    assert "missing from storage" in answer.json()["error"]["message"]


def test_a_store_out_of_reach_is_a_503_and_no_row_is_written(
    s3_settings: Settings, s3_server: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose row is deleted meanwhile is gone for good; its bytes are left to the sweep."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)  # shares its buckets with the other one
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    with TestClient(create_app(s3_settings), base_url="http://localhost") as client:
        file = upload(client)
        server.stop()
        answers = [
            client.post("/v1/files", files={"file": ("a.jsonl", jsonl([chat_row()]))}, data={"purpose": "fine-tune"}),
            client.get(f"/v1/files/{file['id']}/content"),
        ]
        for answer in answers:
            assert answer.status_code == 503, answer.text
            assert answer.headers["retry-after"] == "5"
            assert answer.json()["error"]["code"] == "storage_unavailable"
        assert [row["id"] for row in client.get("/v1/files").json()["data"]] == [file["id"]]
        assert client.delete(f"/v1/files/{file['id']}").status_code == 200
        assert client.get("/v1/files").json()["data"] == []
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert keys(bucket) == [f"anneal/files/{file['id']}"]
