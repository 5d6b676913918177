"""Every failure reaches a program as the exception of OpenAI's own client, over a real socket."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from api import job_events
from api.envelope import MAX_JSON_BODY_BYTES
from shared import db
from shared.settings import Settings, get_settings
from tests.conftest import chat_row, jsonl, serving

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAX_UPLOAD_BYTES = 2**20


class Sdk:
    """The official client, which counts what it sends."""

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self.sent = 0

        def count(_request: Any) -> None:
            self.sent += 1

        http = openai.DefaultHttpxClient(event_hooks={"request": [count]})
        options = {"api_key": "none", "max_retries": 0, **options}
        self.client = openai.OpenAI(base_url=f"{url}/v1", http_client=http, **options)

    def fails(self, kind: type[openai.APIStatusError], call: Callable[[openai.OpenAI], Any]) -> openai.APIStatusError:
        """Expect this exception, exactly, with everything a program may look at."""
        with pytest.raises(openai.APIStatusError) as caught:
            call(self.client)
        error = caught.value
        assert type(error) is kind, error
        assert error.request_id is not None and error.request_id.startswith("req_")
        assert isinstance(error.code, str) and isinstance(error.type, str) and error.message
        return error


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    """Errors look alike whatever the database is."""
    path = tmp_path / "anneal.db"
    path.write_bytes(sqlite_template.read_bytes())
    return f"sqlite:///{path}"


@pytest.fixture
def sdk(settings: Settings) -> Iterator[Sdk]:
    with serving(settings.model_copy(update={"max_upload_bytes": MAX_UPLOAD_BYTES})) as url:
        yield Sdk(url)


def connect(sdk: Sdk) -> socket.socket:
    address = urlsplit(sdk.url)
    return socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=20)


def job(client: openai.OpenAI) -> Any:
    file = client.files.create(file=("a.jsonl", jsonl([chat_row()] * 2)), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)


def test_what_a_request_got_wrong(sdk: Sdk) -> None:
    error = sdk.fails(openai.BadRequestError, lambda c: c.fine_tuning.jobs.create(model=MODEL, training_file=""))
    assert (error.param, error.type) == ("training_file", "invalid_request_error")
    error = sdk.fails(openai.NotFoundError, lambda c: c.files.retrieve("file-nope"))
    assert error.code == "not_found"
    error = sdk.fails(openai.NotFoundError, lambda c: c.responses.create(model=MODEL, input="hi"))
    assert error.code == "unknown_url" and "/v1/chat/completions" in error.message
    error = sdk.fails(openai.NotFoundError, lambda c: c.embeddings.create(model=MODEL, input="hi"))
    assert error.code == "unknown_url"
    error = sdk.fails(openai.PermissionDeniedError, lambda c: c.models.delete(MODEL))
    assert error.type == "permission_error"
    error = sdk.fails(openai.APIStatusError, lambda c: c.put("/files", cast_to=object))
    assert error.status_code == 405 and error.response.headers["allow"] == "GET, POST"


def test_a_wrong_key(settings: Settings) -> None:
    with serving(settings.model_copy(update={"api_key": "right"})) as url:
        error = Sdk(url, api_key="wrong").fails(openai.AuthenticationError, lambda c: c.models.list())
        assert error.code == "invalid_api_key"
        assert Sdk(url, api_key="right").client.models.list().data


def test_a_conflict_is_not_repeated_in_vain(sdk: Sdk) -> None:
    ended = job(sdk.client)
    sdk.client.fine_tuning.jobs.cancel(ended.id)
    sdk.sent = 0
    sdk.fails(openai.ConflictError, lambda c: c.with_options(max_retries=3).fine_tuning.jobs.cancel(ended.id))
    assert sdk.sent == 1


def test_too_much_at_once_says_when_to_come_back(sdk: Sdk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_events, "MAX_STREAMS", 0)
    path = f"/fine_tuning/jobs/{job(sdk.client).id}/events?stream=true"
    error = sdk.fails(openai.RateLimitError, lambda c: c.get(path, cast_to=object))
    assert int(error.response.headers["retry-after"]) > 0 and "x-should-retry" not in error.response.headers


def test_what_went_wrong_here(sdk: Sdk, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("shared.model_registry.list_models", lambda *_: 1 / 0)
        error = sdk.fails(openai.InternalServerError, lambda c: c.models.list())
        assert error.status_code == 500 and str(error.request_id) in error.message
        sdk.sent = 0
        sdk.fails(openai.InternalServerError, lambda c: c.with_options(max_retries=1).models.list())
        assert sdk.sent == 2, "an internal error may be gone the next time"
    monkeypatch.setenv("ANNEAL_DATABASE_URL", "postgresql+psycopg://postgres@127.0.0.1:1/none")
    get_settings.cache_clear()
    db.reset()
    error = sdk.fails(openai.InternalServerError, lambda c: c.files.list())
    assert error.status_code == 503 and error.code == "service_unavailable"
    assert error.response.headers["retry-after"] == "2"
    assert "127.0.0.1" not in error.message


def test_a_body_that_is_too_large_is_answered_and_not_cut_off(sdk: Sdk) -> None:
    def too_large(call: Callable[[openai.OpenAI], Any]) -> None:
        assert sdk.fails(openai.APIStatusError, call).status_code == 413

    large = b"x" * (3 * MAX_UPLOAD_BYTES)
    too_large(lambda c: c.files.create(file=("a", large[: MAX_UPLOAD_BYTES + 1]), purpose="user_data"))
    too_large(lambda c: c.files.create(file=("a", large), purpose="user_data"))
    too_large(lambda c: c.fine_tuning.jobs.create(model="m" * MAX_JSON_BODY_BYTES, training_file="file-x"))
    assert sdk.client.models.list().data


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
@pytest.mark.parametrize("chunked", [True, False])
def test_even_a_plain_client_that_sends_all_before_it_reads_gets_the_413(
    sdk: Sdk, connection: str, chunked: bool
) -> None:
    megabytes = MAX_JSON_BODY_BYTES // 2**20 + 24
    length = "transfer-encoding: chunked" if chunked else f"content-length: {megabytes * 2**20}"
    with connect(sdk) as raw:
        raw.sendall(
            f"POST /v1/fine_tuning/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"connection: {connection}\r\n{length}\r\n\r\n".encode()
        )
        for _ in range(megabytes):
            raw.sendall((b"100000\r\n%b\r\n" if chunked else b"%b") % (b" " * 2**20))
        raw.sendall(b"0\r\n\r\n" if chunked else b"")
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_asks_first_is_refused_before_it_sends(sdk: Sdk) -> None:
    with connect(sdk) as raw:
        raw.sendall(
            b"POST /v1/fine_tuning/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"connection: close\r\nexpect: 100-continue\r\ncontent-length: 999999999\r\n\r\n"
        )
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")
