"""client.batches of OpenAI's SDK, from the upload to the results; every answer is held against the SDK's types."""

import asyncio
import json
import threading
from collections.abc import Iterator

import pytest
import redis
from openai import BadRequestError, ConflictError, NotFoundError, OpenAI
from openai.types import Batch

from shared.generation import PREFIX
from shared.settings import Settings
from tests.batch_rows import chat_line, completion_line
from tests.conftest import jsonl
from tests.fake_generator import FakeGenerator
from tests.sdk.wire import Wire
from tests.waiting import wait_until
from worker import batches as batch_runs


@pytest.fixture
def generator(settings: Settings, valkey: str) -> Iterator[FakeGenerator]:
    connection = redis.Redis.from_url(valkey)
    for key in connection.scan_iter(f"{PREFIX}*"):
        connection.delete(key)
    connection.close()
    with FakeGenerator(settings) as generator:
        yield generator


@pytest.fixture
def sdk(server: str, generator: FakeGenerator) -> Iterator[OpenAI]:
    wire = Wire(server)
    with OpenAI(base_url=wire.url, api_key="unused") as client:
        yield client
    wire.judge()
    wire.close()


def create(sdk: OpenAI, content: bytes, **choices: object) -> Batch:
    file = sdk.files.create(file=("requests.jsonl", content), purpose="batch")
    about = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **choices}
    return sdk.batches.create(input_file_id=file.id, **about)  # type: ignore[arg-type]


def run(settings: Settings) -> threading.Thread:
    thread = threading.Thread(target=lambda: asyncio.run(batch_runs.run_all(settings, "test-worker")))
    thread.start()
    return thread


def wait_for(sdk: OpenAI, batch_id: str, *statuses: str) -> Batch:
    def arrived() -> Batch | None:
        batch = sdk.batches.retrieve(batch_id)
        return batch if batch.status in statuses else None

    return wait_until(arrived)


def test_a_batch_from_upload_to_results(settings: Settings, sdk: OpenAI) -> None:
    batch = create(sdk, jsonl([chat_line("a"), chat_line("refuse")]), metadata={"k": "v"})
    assert type(batch) is Batch and (batch.status, batch.metadata) == ("validating", {"k": "v"})
    run(settings).join()
    done = wait_for(sdk, batch.id, "completed")
    assert done.request_counts is not None and done.usage is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (2, 1, 1)
    assert (done.usage.input_tokens, done.usage.output_tokens, done.usage.total_tokens) == (3, 4, 7)
    assert done.output_file_id is not None and done.error_file_id is not None
    file = sdk.files.retrieve(done.output_file_id)
    assert (file.purpose, file.status) == ("batch_output", "processed")
    (line,) = (json.loads(line) for line in sdk.files.content(done.output_file_id).text.splitlines())
    assert line["response"]["body"]["choices"][0]["message"]["content"] == "you said a"
    (line,) = (json.loads(line) for line in sdk.files.content(done.error_file_id).text.splitlines())
    assert line["response"]["status_code"] == 400
    assert [one.id for one in sdk.batches.list(limit=1)] == [batch.id]


def test_completions_too(settings: Settings, sdk: OpenAI) -> None:
    batch = create(sdk, jsonl([completion_line("x", "one")]), endpoint="/v1/completions")
    run(settings).join()
    done = wait_for(sdk, batch.id, "completed")
    assert done.output_file_id is not None and "you said x" in sdk.files.content(done.output_file_id).text


def test_what_is_wrong_with_a_file_is_told_with_its_line(settings: Settings, sdk: OpenAI) -> None:
    batch = create(sdk, jsonl([chat_line("a"), chat_line("a")]))
    run(settings).join()
    failed = wait_for(sdk, batch.id, "failed")
    assert failed.errors is not None and failed.errors.data is not None
    (error,) = failed.errors.data
    assert (error.line, error.code, error.param) == (2, "duplicate_custom_id", "custom_id")


def test_a_cancel_keeps_what_was_done(settings: Settings, sdk: OpenAI) -> None:
    batch = create(sdk, jsonl([chat_line("a"), chat_line("hold")]))
    runner = run(settings)

    def completed() -> int:
        counts = sdk.batches.retrieve(batch.id).request_counts
        return 0 if counts is None else counts.completed

    wait_until(completed)
    assert sdk.batches.cancel(batch.id).status == "cancelling"
    ended = wait_for(sdk, batch.id, "cancelled")
    runner.join()
    assert ended.output_file_id is not None and "you said a" in sdk.files.content(ended.output_file_id).text
    assert ended.error_file_id is not None and "batch_cancelled" in sdk.files.content(ended.error_file_id).text
    assert sdk.batches.cancel(batch.id).status == "cancelled"


def test_errors_are_the_sdks(sdk: OpenAI, settings: Settings) -> None:
    with pytest.raises(NotFoundError):
        sdk.batches.retrieve("batch_nope")
    with pytest.raises(BadRequestError):
        create(sdk, jsonl([chat_line("a")]), completion_window="1h")
    batch = create(sdk, jsonl([chat_line("a")]))
    with pytest.raises(ConflictError):
        sdk.files.delete(batch.input_file_id)
    run(settings).join()
    with pytest.raises(ConflictError):
        sdk.batches.cancel(batch.id)
