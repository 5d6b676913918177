"""What every answer has, and who is let in."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.engine import make_url

from api.app import create_app
from api.envelope import MAX_JSON_BODY_BYTES
from shared import db
from shared.settings import Settings, get_settings
from tests.conftest import upload

KEY = "sk-test-ünïcode"
JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def locked(settings: Settings) -> Iterator[TestClient]:
    """The API with a key."""
    app = create_app(settings.model_copy(update={"api_key": KEY}))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


def is_openai_error(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")
    assert int(answer.headers["openai-processing-ms"]) >= 0
    return dict(error)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Basic " + "x", b"Bearer " + b"sk-test-unicode", b"Bearer \xff"]
)
def test_a_wrong_key_is_a_401_on_every_route(locked: TestClient, header: str | bytes | None) -> None:
    headers = {} if header is None else {"authorization": header}
    routes = [route for route in _routes(locked) if route[1].startswith("/v1/")]
    assert len(routes) >= 14
    for method, path in routes:
        answer = locked.request(method, path, headers=headers, content=b"{not json")
        assert is_openai_error(answer, 401)["code"] == "invalid_api_key", (method, path)


def _routes(client: TestClient) -> list[tuple[str, str]]:
    """Every (method, path) the application serves, parameters filled in, read from its own schema."""
    paths = client.get("/openapi.json").json()["paths"]
    return [(method.upper(), path.replace("{", "").replace("}", "")) for path in paths for method in paths[path]]


def test_a_body_is_not_read_before_the_key_is_right(locked: TestClient) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 1
            yield b"x" * 2**20

    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert locked.post("/v1/files", content=body(), headers=headers).status_code == 401
    assert locked.post("/v1/fine_tuning/jobs", content=body(), headers=headers).status_code == 401


def test_only_uploads_may_be_large(client: TestClient) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(MAX_JSON_BODY_BYTES // 2**20 + 1):
            yield b"x" * 2**20

    headers = {"content-type": "multipart/form-data; boundary=x"}
    is_openai_error(client.post("/v1/fine_tuning/jobs", content=body(), headers=headers), 413)


def test_the_right_key_opens_and_health_needs_none(locked: TestClient) -> None:
    assert locked.get("/v1/models", headers={"authorization": b"Bearer " + KEY.encode()}).status_code == 200
    assert locked.get("/health/live").status_code == 200
    assert locked.get("/health/ready").json()["checks"] == {"database": "ok", "redis": "ok"}


def test_without_a_key_a_foreign_host_name_is_refused(client: TestClient) -> None:
    error = is_openai_error(client.get("/v1/models", headers={"host": "evil.example"}), 403)
    assert "evil.example" in error["message"]
    assert client.get("/v1/models", headers={"host": "localhost:8000"}).status_code == 200
    assert client.get("/v1/models", headers={"host": "[::1]:8000"}).status_code == 200
    assert client.get("/v1/models", headers={"host": "["}).status_code == 403


def test_without_a_key_a_foreign_page_is_refused(client: TestClient, settings: Settings) -> None:
    for origin in ("https://evil.example", "null", "http://localhost.evil.example"):
        files = {"file": ("a.jsonl", b"{}")}
        answer = client.post("/v1/files", files=files, data={"purpose": "user_data"}, headers={"origin": origin})
        assert answer.status_code == 403, origin
    assert not (settings.storage_root / "files").exists()
    assert client.get("/v1/models", headers={"origin": "http://localhost:3000"}).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/models/a%00b", "/v1/files/a%00b", "/v1/files?after=%00", "/v1/files?purpose=%00"]
)
def test_a_nul_in_a_url_is_refused(client: TestClient, path: str) -> None:
    assert "NUL" in is_openai_error(client.get(f"/v1/{path}"), 400)["message"]


def test_every_answer_has_openais_headers(client: TestClient) -> None:
    for path in (
        "/v1/models",
        "/v1/models/ft:nope",
        "/v1/nothing",
        "/nothing",
        "/health/live",
        "/openapi.json",
        "/docs",
    ):
        headers = client.get(path).headers
        assert headers["x-request-id"].startswith("req_") and int(headers["openai-processing-ms"]) >= 0
        assert headers["openai-version"] == "2020-10-01" and headers["openai-organization"] == "default"
    assert "x-should-retry" not in client.get("/v1/models/ft:nope").headers


def test_a_clients_own_request_id_is_in_the_log(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="api.envelope")
    answer = client.get("/v1/nothing", headers={"x-client-request-id": "mine-4711"})
    (line,) = [record.getMessage() for record in caplog.records]
    assert "mine-4711" in line and answer.headers["x-request-id"] in line and "404" in line


def test_unknown_routes_are_told_what_exists(client: TestClient) -> None:
    for method, path in (("POST", "/v1/responses"), ("POST", "/v1/embeddings"), ("GET", "/v1/assistants/x")):
        error = is_openai_error(client.request(method, path, json={}), 404)
        assert error["code"] == "unknown_url" and f"{method} {path}" in error["message"]
        for exists in ("/v1/chat/completions", "/v1/files,", "/v1/fine_tuning/jobs", "/v1/models"):
            assert exists in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/files", "GET, POST"),
        ("PATCH", "/v1/files/file-x", "DELETE, GET"),
        ("POST", "/v1/files/file-x/content", "GET"),
        ("DELETE", "/v1/fine_tuning/jobs/ftjob-x/cancel", "POST"),
        ("PUT", "/v1/models/owner/name", "DELETE, GET"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(client: TestClient, method: str, path: str, allowed: str) -> None:
    answer = client.request(method, path)
    error = is_openai_error(answer, 405)
    assert error["code"] == "method_not_allowed" and answer.headers["allow"] == allowed


@pytest.mark.parametrize(
    ("path", "content", "content_type", "said"),
    [
        (JOBS, b'{"model": "m"}', "text/plain", "application/json"),
        (JOBS, b'{"model": "m"}', None, "application/json"),
        (JOBS, b"model=m", "application/x-www-form-urlencoded", "application/json"),
        ("/v1/files", b'{"purpose": "fine-tune"}', "application/json", "multipart/form-data"),
        (JOBS, b"{nope", "application/json", "not JSON"),
        (JOBS, b"", "application/json", "body is required"),
        (JOBS, b'{"model": "\xff"}', "application/json", "not UTF-8"),
        (JOBS, b"[" * 100_000, "application/json", "body"),
        (JOBS, b"[1]", "application/json", "body"),
        (JOBS, b'{"\\ud800": 1}', "application/json", "surrogate"),
        (JOBS, b'{"model": "a\\u0000"}', "application/json", "NUL"),
        (JOBS, b'{"seed": ' + b"9" * 5000 + b"}", "application/json", "body"),
        ("/v1/files", b"--x\r\nnope", "multipart/form-data; boundary=x", "required"),
        ("/v1/files", b"--x", "multipart/form-data", "boundary"),
    ],
)
def test_a_body_that_can_not_be_read_is_a_400_that_says_why(
    client: TestClient, path: str, content: bytes, content_type: str | None, said: str
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    error = is_openai_error(client.post(path, content=content, headers=headers), 400)
    assert said in error["message"] and error["type"] == "invalid_request_error"


def test_an_oversize_body_is_a_413_whatever_its_headers_say(client: TestClient) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(MAX_JSON_BODY_BYTES // 2**20 + 1):
            yield b" " * 2**20

    answer = client.post("/v1/fine_tuning/jobs", content=body(), headers={"content-type": "application/json"})
    is_openai_error(answer, 413)


@pytest.mark.parametrize("path", ["/v1/files", "/v1/uploads/upload_1/parts"])
@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded", None])
def test_only_a_form_that_is_kept_on_disk_may_be_as_large_as_a_file(
    client: TestClient, path: str, content_type: str | None
) -> None:
    headers = {"idempotency-key": "a", **({} if content_type is None else {"content-type": content_type})}
    answer = client.post(path, content=b"x" * (MAX_JSON_BODY_BYTES + 1), headers=headers)
    is_openai_error(answer, 413)


@pytest.mark.parametrize("field", ['name="purpose"', 'name="file"; filename="a"'])
def test_a_form_can_not_fill_the_memory_with_many_fields(client: TestClient, field: str) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(64):
            yield b"--B\r\nContent-Disposition: form-data; " + field.encode() + b"\r\n\r\n" + b"x" * 2**19 + b"\r\n"
        yield b"--B--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=B"}
    error = is_openai_error(client.post("/v1/files", content=body(), headers=headers), 400)
    assert "maximum" in error["message"].lower(), "refused by the limits, not once it was all there"


def test_an_internal_error_tells_its_request_id_and_nothing_else(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.model_registry.list_models", lambda *_: 1 / 0)
    answer = client.get("/v1/models")
    error = is_openai_error(answer, 500)
    assert answer.headers["x-request-id"] in error["message"]
    assert "ZeroDivision" not in json.dumps(error)


def test_the_api_never_imports_torch_and_stays_small(settings: Settings) -> None:
    program = """
import sys
from fastapi.testclient import TestClient
from api.app import create_app
with TestClient(create_app(), base_url="http://localhost") as client:
    assert client.get("/v1/models").status_code == 200
    assert client.get("/v1/fine_tuning/jobs").status_code == 200
print(sorted({"torch", "transformers", "trl", "unsloth", "datasets"} & set(sys.modules)))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS:")))
"""
    heavy, kilobytes = subprocess.check_output([sys.executable, "-c", program], text=True).splitlines()
    assert heavy == "[]"
    assert int(kilobytes) < 200 * 1024


def test_a_database_that_is_away_is_a_503_to_come_back_to(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = upload(client)
    monkeypatch.setenv("ANNEAL_DATABASE_URL", "postgresql+psycopg://postgres@127.0.0.1:1/none")
    get_settings.cache_clear()
    db.reset()
    answer = client.get(f"/v1/files/{file['id']}")
    is_openai_error(answer, 503)
    assert answer.headers["retry-after"] == "2"
    assert client.get("/health/ready").status_code == 503
    assert client.get("/health/live").status_code == 200


def test_a_database_without_our_tables_says_what_to_run(
    client: TestClient, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_url(str(settings.database_url))
    empty = str(tmp_path / "empty.db") if url.drivername == "sqlite" else "postgres"
    monkeypatch.setenv("ANNEAL_DATABASE_URL", url.set(database=empty).render_as_string(hide_password=False))
    get_settings.cache_clear()
    db.reset()
    answer = client.get("/v1/files")
    assert "anneal migrate" in is_openai_error(answer, 500)["message"]
    assert answer.headers["x-should-retry"] == "false"
