"""Batches as `worker batch` runs them, over a real Valkey: results, partial results, and whatever cuts a run off."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import redis
from sqlalchemy import select, update
from sqlalchemy.engine import make_url

from cli import valkey as embedded_valkey
from shared import batches, storage
from shared.db import now, reading, transaction
from shared.generation import PREFIX
from shared.models import Batch, BatchLine, BatchStatus, File, FileStatus, Sweep
from shared.settings import Settings
from tests.batch_rows import COMPLETIONS, MODEL, batch_of, chat_line, completion_line, make_batch
from tests.conftest import chat_row, jsonl
from tests.fake_generator import FakeGenerator
from tests.rows import stored_file
from tests.waiting import LIMIT_S, wait_until
from worker import batches as batch_runs
from worker import expiry, lifecycle, tasks
from worker.sweeper import Sweeper

TOLD_TO_RUN = "from worker.tasks import run_batches; run_batches()"


@pytest.fixture(autouse=True)
def nobody_waits_from_before(valkey: str) -> None:
    connection = redis.Redis.from_url(valkey)
    for key in connection.scan_iter(f"{PREFIX}*"):
        connection.delete(key)
    connection.close()


@pytest.fixture
def generator(settings: Settings) -> Iterator[FakeGenerator]:
    with FakeGenerator(settings) as generator:
        yield generator


@pytest.fixture
def shutdown(monkeypatch: pytest.MonkeyPatch) -> lifecycle.Shutdown:
    """This process's own order to stop, which can be given once."""
    fresh = lifecycle.Shutdown()
    monkeypatch.setattr(lifecycle, "shutdown", fresh)
    return fresh


class Broker:
    """A Valkey of the test's own, without persistence."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([*embedded_valkey.command(self._settings), "--appendonly", "no"], **quiet)
        wait_until(self._answers)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            return embedded_valkey.answers(self._settings)
        except OSError:
            return False


def run(settings: Settings) -> None:
    asyncio.run(asyncio.wait_for(batch_runs.run_all(settings, "test-worker"), 60))


@contextmanager
def running(settings: Settings) -> Iterator[threading.Thread]:
    """A runner in a thread, which must have ended by itself when the block has."""
    thread = threading.Thread(target=run, args=(settings,))
    thread.start()
    yield thread
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def content(settings: Settings, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    lines = b"".join(storage.open_file(settings, file_id)).splitlines()
    return [json.loads(line) for line in lines]


def texts(settings: Settings, file_id: str | None) -> list[str]:
    found = content(settings, file_id)
    return [line["response"]["body"]["choices"][0]["message"]["content"] for line in found]


def codes(settings: Settings, file_id: str | None) -> set[str]:
    return {line["error"]["code"] for line in content(settings, file_id)}


def test_every_line_gets_its_answer_or_its_error(settings: Settings, generator: FakeGenerator) -> None:
    lines = [chat_line("a"), chat_line("refuse"), chat_line("b"), chat_line("stumble", temperature=0)]
    batch_id = make_batch(settings, lines, output_expires_after={"anchor": "created_at", "seconds": 3600})
    run(settings)
    batch = batch_of(batch_id)
    assert (batch.status, batch.model, batch.errors) == (BatchStatus.COMPLETED, MODEL, None)
    assert (batch.total, batch.completed, batch.failed) == (4, 3, 1)
    assert (batch.input_tokens, batch.output_tokens) == (9, 12)
    times = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert list(times) == sorted(time for time in times if time is not None)
    answers = content(settings, batch.output_file_id)
    assert [line["custom_id"] for line in answers] == ["a", "b", "stumble"]
    assert texts(settings, batch.output_file_id) == ["you said a", "you said b", "you said stumble"]
    first = answers[0]
    assert first["error"] is None and first["id"].startswith("batch_req_")
    assert first["response"]["status_code"] == 200 and first["response"]["request_id"].startswith("req_")
    assert first["response"]["body"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    (refused,) = content(settings, batch.error_file_id)
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("refuse", 400)
    assert refused["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert generator.asked["stumble"] == 2
    with reading() as session:
        output = session.get_one(File, batch.output_file_id)
        assert (output.purpose, output.filename, output.rows) == ("batch_output", f"{batch_id}_output.jsonl", 3)
        assert output.expires_at == pytest.approx(output.created_at + 3600)
        assert set(session.scalars(select(BatchLine.line))) == {1, 2, 3, 4}
    expiry.remove_expired(settings)
    with reading() as session:
        assert session.scalars(select(BatchLine.line)).all() == []


def test_a_line_that_breaks_the_runner_costs_that_line_alone(
    settings: Settings, generator: FakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = make_batch(settings, [chat_line(text) for text in ("a", "poison", "b")])
    parse, seen = batch_runs.batch_input.parse_body, 0

    def breaking(body: dict[str, Any], endpoint: str) -> Any:
        nonlocal seen
        seen += (is_poison := body["messages"][0]["content"] == "poison")
        if is_poison and seen > 1:  # the first look was the check
            raise RuntimeError("nobody thought of this")
        return parse(body, endpoint)

    monkeypatch.setattr(batch_runs.batch_input, "parse_body", breaking)
    run(settings)
    batch = batch_of(batch_id)
    assert (batch.status, batch.completed, batch.failed, batch.faults) == (BatchStatus.COMPLETED, 2, 1, 0)
    (failed,) = content(settings, batch.error_file_id)
    assert failed["response"]["status_code"] == 500


def test_a_completion_has_an_answer_for_each_prompt(settings: Settings, generator: FakeGenerator) -> None:
    batch_id = make_batch(settings, [completion_line(["x", "y"], "two")], COMPLETIONS)
    run(settings)
    batch = batch_of(batch_id)
    (line,) = content(settings, batch.output_file_id)
    choices = line["response"]["body"]["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, "you said x"), (1, "you said y")]
    assert (batch.completed, batch.input_tokens, batch.error_file_id) == (1, 6, None)


GOOD = chat_line("hi", "good")


@pytest.mark.parametrize(
    ("lines", "line", "code", "param"),
    [
        (b"\n\n", None, "empty_file", None),
        (b"{}\n{no\n", 2, "invalid_json_line", None),
        (b"[1]\n", 1, "invalid_json_line", None),
        ([GOOD, GOOD], 2, "duplicate_custom_id", "custom_id"),
        ([{**GOOD, "custom_id": 7}], 1, "invalid_custom_id", "custom_id"),
        ([{**GOOD, "method": "GET"}], 1, "invalid_method", "method"),
        ([{**GOOD, "url": COMPLETIONS}], 1, "invalid_url", "url"),
        ([{**GOOD, "extra": 1}], 1, "unknown_parameter", "extra"),
        ([{key: GOOD[key] for key in ("custom_id", "method", "url")}], 1, "missing_required_parameter", "body"),
        ([{**GOOD, "body": []}], 1, "invalid_value", "body"),
        ([chat_line("hi", stream=True)], 1, "invalid_value", "body.stream"),
        ([chat_line("hi", temperature=3)], 1, "invalid_value", "body.temperature"),
        ([chat_line("hi", temprature=1)], 1, "unknown_parameter", "body.temprature"),
        ([chat_line("hi", reasoning_effort="high")], 1, "unsupported_parameter", "body.reasoning_effort"),
        ([GOOD, chat_line("b", model="smollm2-135m-instruct")], 2, "mismatched_model", "body.model"),
        ([chat_line("hi", model="nobody/nothing")], None, "model_not_found", "body.model"),
    ],
)
def test_a_file_that_is_no_input_fails_its_batch_with_the_line(
    lines: Any, line: int | None, code: str, param: str | None, settings: Settings
) -> None:
    batch_id = make_batch(settings, lines)
    run(settings)
    batch = batch_of(batch_id)
    assert batch.status == BatchStatus.FAILED and batch.failed_at is not None
    assert batch.errors is not None
    assert {"line": line, "code": code, "param": param}.items() <= batch.errors[-1].items()
    assert (batch.total, batch.output_file_id, batch.error_file_id) == (0, None, None)


def test_too_many_lines_too_many_bytes_and_too_many_errors_are_each_told(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runs.batch_input, "MAX_LINES", 3)
    many = make_batch(settings, [chat_line(str(n)) for n in range(4)])
    wrong = make_batch(settings, b"no\n" * 3)
    run(settings)
    errors = batch_of(many).errors
    assert errors is not None and (errors[0]["code"], errors[0]["line"]) == ("too_many_lines", 4)
    assert [error["line"] for error in batch_of(wrong).errors or []] == [1, 2, 3]
    monkeypatch.setattr(batch_runs.batch_input, "MAX_BYTES", 10)
    large = make_batch(settings, [chat_line("hi")])
    run(settings)
    assert (batch_of(large).errors or [{}])[0]["code"] == "file_too_large"


def test_a_line_that_is_too_long_is_named_and_the_next_is_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runs.batch_input, "MAX_LINE_BYTES", 300)
    batch_id = make_batch(settings, [chat_line("x" * 1000), chat_line("a"), chat_line("a")])
    run(settings)
    errors = batch_of(batch_id).errors or []
    assert [(error["line"], error["code"]) for error in errors] == [(1, "line_too_long"), (3, "duplicate_custom_id")]


def test_a_cancelled_batch_keeps_what_was_done(settings: Settings, generator: FakeGenerator) -> None:
    batch_id = make_batch(settings, [chat_line("a"), chat_line("hold 1"), chat_line("b"), chat_line("hold 2")])
    with running(settings):
        wait_until(lambda: batch_of(batch_id).completed == 2)
        with transaction() as session:
            shown = batches.request_cancel(session, "default", batch_id)
        assert (shown.status, shown.cancelled_at) == (BatchStatus.CANCELLING, None)
    batch = batch_of(batch_id)
    assert batch.status == BatchStatus.CANCELLED and batch.cancelled_at is not None
    assert (batch.completed, batch.failed) == (2, 2)
    assert texts(settings, batch.output_file_id) == ["you said a", "you said b"]
    left = content(settings, batch.error_file_id)
    assert [(line["custom_id"], line["response"]) for line in left] == [("hold 1", None), ("hold 2", None)]
    assert codes(settings, batch.error_file_id) == {"batch_cancelled"}


def test_a_batch_that_is_not_done_within_a_day_expires_with_what_was(
    settings: Settings, generator: FakeGenerator
) -> None:
    batch_id = make_batch(settings, [chat_line("a"), chat_line("hold")])
    with transaction() as session:
        session.execute(update(Batch).values(expires_at=now() + 2))
    run(settings)
    batch = batch_of(batch_id)
    assert batch.status == BatchStatus.EXPIRED and batch.expired_at is not None
    assert texts(settings, batch.output_file_id) == ["you said a"]
    assert codes(settings, batch.error_file_id) == {"batch_expired"}


def test_a_batch_nobody_ever_looked_into_expires_without_files(settings: Settings) -> None:
    batch_id = make_batch(settings, [chat_line("a")])
    with transaction() as session:
        session.execute(update(Batch).values(expires_at=now() - 1))
    run(settings)
    batch = batch_of(batch_id)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == (BatchStatus.EXPIRED, None, None)


def test_a_shutdown_gives_the_claim_back_and_another_worker_goes_on(
    settings: Settings, generator: FakeGenerator, shutdown: lifecycle.Shutdown, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = make_batch(settings, [chat_line("a"), chat_line("hold"), chat_line("b")])
    with running(settings):
        wait_until(lambda: batch_of(batch_id).completed == 2)
        shutdown.set()
        began = time.monotonic()
    assert time.monotonic() - began < 30
    batch = batch_of(batch_id)
    assert (batch.status, batch.lease_until, batch.completed) == (BatchStatus.IN_PROGRESS, None, 2)
    monkeypatch.setattr(lifecycle, "shutdown", lifecycle.Shutdown())
    generator.release.set()
    run(settings)
    assert batch_of(batch_id).status == BatchStatus.COMPLETED
    assert texts(settings, batch_of(batch_id).output_file_id) == ["you said a", "you said hold", "you said b"]
    assert (generator.asked["a"], generator.asked["b"], generator.asked["hold"]) == (1, 1, 2)


def test_a_real_worker_takes_the_hint_and_on_sigterm_gives_the_batch_back(
    settings: Settings, generator: FakeGenerator, valkey: str
) -> None:
    connection = redis.Redis.from_url(valkey)
    connection.delete("batch")
    batch_id = make_batch(settings, [chat_line("a"), chat_line("hold")])
    worker = subprocess.Popen([sys.executable, "-m", "cli.main", "worker", "batch"], env=dict(os.environ))
    try:
        Sweeper(settings).resend_hints()
        wait_until(lambda: batch_of(batch_id).completed == 1, 40)
        worker.terminate()
        assert worker.wait(LIMIT_S) == 0
    finally:
        worker.kill()
        worker.wait()
    batch = batch_of(batch_id)
    assert (batch.status, batch.lease_until) == (BatchStatus.IN_PROGRESS, None)
    assert connection.llen("batch") == 1, "another worker is told"
    connection.delete("batch")


def test_a_killed_runner_costs_only_the_lines_it_was_at(settings: Settings, generator: FakeGenerator) -> None:
    batch_id = make_batch(settings, [chat_line("a"), chat_line("hold"), chat_line("b")])
    process = subprocess.Popen([sys.executable, "-c", TOLD_TO_RUN], env=dict(os.environ))
    wait_until(lambda: batch_of(batch_id).completed == 2, 40)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with reading() as session:
        assert batches.count_claimable(session) == 0, "its lease has not run out"
    sweeper = Sweeper(settings)
    sweeper.expire_leases()
    with transaction() as session:
        session.execute(update(Batch).values(lease_until=now() - 1))
        session.execute(update(Sweep).values(no_expiry_before=now() - 1))
    sweeper.expire_leases()
    generator.release.set()
    run(settings)
    batch = batch_of(batch_id)
    assert (batch.status, batch.fence, batch.completed) == (BatchStatus.COMPLETED, 2, 3)
    assert texts(settings, batch.output_file_id) == ["you said a", "you said hold", "you said b"]
    assert (generator.asked["a"], generator.asked["b"]) == (1, 1)


def test_a_runner_that_lost_its_lease_writes_nothing_more(settings: Settings, generator: FakeGenerator) -> None:
    batch_id = make_batch(settings, [chat_line("a"), chat_line("hold")])
    with running(settings):
        wait_until(lambda: batch_of(batch_id).completed == 1)
        with transaction() as session:  # as if it had been cut off, and another had claimed the batch
            session.execute(update(Batch).values(fence=Batch.fence + 1, lease_until=now() + 60, worker="another"))
        generator.release.set()
    batch = batch_of(batch_id)
    assert (batch.status, batch.completed, batch.worker) == (BatchStatus.IN_PROGRESS, 1, "another")
    assert [file_id for file_id, _ in storage.list_files(settings)] == [batch.input_file_id]


def test_what_is_being_cancelled_is_ended_by_the_next_runner(settings: Settings, generator: FakeGenerator) -> None:
    batch_id = make_batch(settings, [chat_line("a"), chat_line("b")])
    with transaction() as session:
        batch = batches.claim_next(session, "one that died", 60)
        assert batch is not None
        batches.begin(session, batch_id, batch.fence, 2, MODEL)
        batches.request_cancel(session, "default", batch_id)
        batches.give_back(session, batch_id, batch.fence)
    run(settings)
    batch = batch_of(batch_id)
    assert (batch.status, batch.completed, batch.failed) == (BatchStatus.CANCELLED, 0, 2)
    assert batch.output_file_id is None and codes(settings, batch.error_file_id) == {"batch_cancelled"}
    assert not generator.asked


def test_files_are_checked_while_a_batch_runs(settings: Settings, generator: FakeGenerator) -> None:
    batch_id = make_batch(settings, [chat_line("hold")])
    thread = threading.Thread(target=tasks.run_batches)
    thread.start()
    wait_until(lambda: generator.asked["hold"])
    file_id = stored_file(settings, jsonl([chat_row()]), status=FileStatus.UPLOADED)

    def is_checked() -> bool:
        with reading() as session:
            return session.get_one(File, file_id).status == FileStatus.PROCESSED

    wait_until(is_checked)
    assert batch_of(batch_id).status == BatchStatus.IN_PROGRESS
    generator.release.set()
    thread.join(LIMIT_S)
    assert not thread.is_alive() and batch_of(batch_id).status == BatchStatus.COMPLETED


def test_a_small_batch_does_not_wait_for_a_large_one(settings: Settings, generator: FakeGenerator) -> None:
    large = make_batch(settings, [chat_line(f"hold {n}") for n in range(40)])
    with running(settings):
        wait_until(lambda: sum(generator.asked.values()) == settings.batch_requests)
        small = make_batch(settings, [chat_line("a")])
        wait_until(lambda: batch_of(small).status == BatchStatus.COMPLETED)
        assert batch_of(large).completed == 0
        assert sum(generator.asked.values()) == settings.batch_requests + 1, "so many are under way at most"
        generator.release.set()
    assert batch_of(large).completed == 40


def test_a_batch_waits_for_a_generator(settings: Settings) -> None:
    batch_id = make_batch(settings, [chat_line("a")])
    with running(settings):
        wait_until(lambda: batch_of(batch_id).status == BatchStatus.IN_PROGRESS)
        with FakeGenerator(settings):
            wait_until(lambda: batch_of(batch_id).status == BatchStatus.COMPLETED)


def test_a_database_that_drops_its_connections_costs_nothing(settings: Settings, generator: FakeGenerator) -> None:
    url = make_url(settings.resolved_database_url)
    if url.get_backend_name() != "postgresql":
        pytest.skip("SQLite has no connections to drop")
    admin = url.set(drivername="postgresql").render_as_string(hide_password=False)
    batch_id = make_batch(settings, [chat_line(f"line {n}") for n in range(200)])
    with running(settings) as thread, psycopg.connect(admin, autocommit=True) as connection:
        wait_until(lambda: batch_of(batch_id).fence == 1)  # before, the sweep would have to send another hint
        while thread.is_alive():
            connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where datname = current_database() and pid <> pg_backend_pid()"
            )
            time.sleep(0.3)
    batch = batch_of(batch_id)
    assert (batch.status, batch.completed) == (BatchStatus.COMPLETED, 200)
    assert batch.fence == 1 and batch.faults == 0
    assert texts(settings, batch.output_file_id) == [f"you said line {n}" for n in range(200)]


@pytest.fixture
def own_broker(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Settings, Broker]]:
    """A Valkey that may be killed, and settings with it."""
    mine = settings.model_copy(update={"data": tmp_path_factory.mktemp("vk"), "redis_url": None})
    for cached in ("valkey_socket", "resolved_redis_url"):
        mine.__dict__.pop(cached, None)
    broker = Broker(mine)
    broker.start()
    url = f"unix://{mine.valkey_socket}"
    yield settings.model_copy(update={"redis_url": url, "resolved_redis_url": url}), broker
    broker.kill()


def test_a_broker_that_dies_and_forgets_everything_costs_nothing(own_broker: tuple[Settings, Broker]) -> None:
    settings, broker = own_broker
    batch_id = make_batch(settings, [chat_line(text) for text in ("a", "hold 1", "b", "hold 2", "c")])
    with FakeGenerator(settings) as before, running(settings):
        wait_until(lambda: batch_of(batch_id).completed == 3)
        broker.kill()
        time.sleep(1)
        assert batch_of(batch_id).status == BatchStatus.IN_PROGRESS
        broker.start()
        before.release.set()
        wait_until(lambda: batch_of(batch_id).status == BatchStatus.COMPLETED, 60)
    batch = batch_of(batch_id)
    assert (batch.completed, batch.failed, batch.fence) == (5, 0, 1)


def test_a_model_that_is_gone_fails_the_lines_that_are_left(
    settings: Settings, generator: FakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = make_batch(settings, [chat_line("a"), chat_line("b")])
    with transaction() as session:
        batch = batches.claim_next(session, "one that died", 60)
        assert batch is not None
        batches.begin(session, batch_id, batch.fence, 2, "ft:deleted")
        batches.give_back(session, batch_id, batch.fence)
    run(settings)
    batch = batch_of(batch_id)
    assert (batch.status, batch.failed) == (BatchStatus.COMPLETED, 2)
    statuses = [line["response"]["status_code"] for line in content(settings, batch.error_file_id)]
    assert statuses == [404, 404]


def test_an_input_that_is_missing_from_storage_fails_the_batch(settings: Settings) -> None:
    batch_id = make_batch(settings, [chat_line("a")])
    storage.delete_file(settings, batch_of(batch_id).input_file_id)
    run(settings)
    batch = batch_of(batch_id)
    assert batch.status == BatchStatus.FAILED and (batch.errors or [{}])[0]["code"] == "file_missing"


def test_the_sweep_sends_a_hint_for_a_batch_that_nobody_runs(settings: Settings, valkey: str) -> None:
    connection = redis.Redis.from_url(valkey)
    connection.delete("batch")
    sweeper = Sweeper(settings)
    sweeper.resend_hints()
    assert connection.llen("batch") == 0
    make_batch(settings, [chat_line("a")])
    sweeper.resend_hints()
    sweeper.resend_hints()
    (message,) = connection.lrange("batch", 0, -1)
    assert json.loads(message)["headers"]["task"] == "anneal.run_batches"
    connection.delete("batch")
