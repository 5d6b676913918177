"""A batch's life: created, validated, run, taken over, given back, cancelled, expired, swept."""

import json
import os
import signal
from collections.abc import Callable
from typing import Any

from sqlalchemy import func, select, update

from shared import batches, db
from shared.batch_schemas import BatchCreate
from shared.db import now, reading, transaction
from shared.models import DEFAULT_PROJECT, Batch, BatchLine
from tests.failpoints.client_scenarios import request, until_answered
from tests.failpoints.once_scenarios import KEY
from tests.failpoints.scenario import Facts, Scenario, take_back, time_passes
from tests.failpoints.worker_scenarios import meanwhile
from tests.failpoints.world import BASE, World
from tests.rows import stored_file
from worker import lifecycle, tasks
from worker.sweeper import Sweeper

ENDPOINT = "/v1/chat/completions"
QUICK = ("one", "refuse two", "stumble three", "four")
LONG = ("one", "refuse two", "hold three", "four")
"""One line of it is answered when `World.release` says so."""
BEFORE_THE_LONG_ONE = 3


def _requests(*texts: str, custom_ids: tuple[str, ...] = ()) -> bytes:
    """A batch's input file: one request for each text."""
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        body = {"model": BASE, "messages": [{"role": "user", "content": text}]}
        custom_id = custom_ids[number] if custom_ids else f"line-{number}"
        rows.append({"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body})
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _add_file(world: World, content: bytes) -> str:
    return stored_file(world.settings, content, purpose="batch", filename="requests.jsonl")


def _add_batch(world: World, content: bytes) -> str:
    body = {"input_file_id": _add_file(world, content), "endpoint": ENDPOINT, "completion_window": "24h"}
    with transaction() as session:
        return batches.create(session, DEFAULT_PROJECT, BatchCreate.model_validate(body)).id


def _facts_of(batch_id: str, *ends: str) -> Facts:
    return {"batch": batch_id, "batch_ends": {batch_id: ends or ("completed",)}}


def _run(world: World, facts: Facts) -> None:
    tasks.run_batches()


def recorded(batch_id: str) -> int:
    """How many lines of a batch have their result."""
    with reading() as session:
        counted = select(func.count()).select_from(BatchLine).where(BatchLine.batch_id == batch_id)
        return session.scalar(counted) or 0


def _when_under_way(batch_id: str, then: Callable[[], object]) -> None:
    """Do something from another thread once every line but the long one has its result."""
    meanwhile(lambda: recorded(batch_id) >= BEFORE_THE_LONG_ONE, then)


def _prepare_with_file(world: World) -> Facts:
    return {"file": _add_file(world, _requests(*QUICK)), "status": 200}


def _create(world: World, facts: Facts) -> None:
    body = {"input_file_id": facts["file"], "endpoint": ENDPOINT, "completion_window": "24h"}
    key, retries = facts.get("key"), facts.get("retries", 0)
    request(world, "create-batch", "POST", "/v1/batches", key, retries=retries, json=body)


def _prepare_waiting(world: World) -> Facts:
    return _facts_of(_add_batch(world, _requests(*QUICK)))


def _prepare_invalid(world: World) -> Facts:
    twice = _requests(*QUICK[:2], custom_ids=("the same", "the same"))
    return _facts_of(_add_batch(world, twice), "failed")


def _cancel(world: World, facts: Facts) -> None:
    request(world, "cancel-batch", "POST", f"/v1/batches/{facts['batch']}/cancel")


def _prepare_cancellable(world: World) -> Facts:
    return _facts_of(_add_batch(world, _requests(*LONG)), "cancelled") | {"status": 200}


def _run_until_cancelled(world: World, facts: Facts) -> None:
    def cancel() -> None:
        _cancel(world, facts)
        until_answered(_cancel)(world, facts)  # else the long line would keep the runner for ever

    _when_under_way(facts["batch"], cancel)
    tasks.run_batches()


def _prepare_long(world: World) -> Facts:
    return _facts_of(_add_batch(world, _requests(*LONG)))


def _run_until_deploy(world: World, facts: Facts) -> None:
    _when_under_way(facts["batch"], lifecycle.shutdown.set)
    tasks.run_batches()
    world.release()  # what is not done goes on later


def _prepare_half_run(world: World) -> Facts:
    """A batch whose runner was killed while one line was being answered. Its lease runs on."""
    batch_id = _add_batch(world, _requests(*LONG))
    child = os.fork()
    if child == 0:
        db.reset()
        _when_under_way(batch_id, lambda: os.kill(os.getpid(), signal.SIGKILL))
        tasks.run_batches()
        os._exit(0)
    os.waitpid(child, 0)
    world.remember_results()
    world.release()
    return _facts_of(batch_id)


def _prepare_taken_back(world: World) -> Facts:
    facts = _prepare_half_run(world)
    take_back(world)
    return facts


def _prepare_half_cancelled(world: World) -> Facts:
    facts = _prepare_taken_back(world)
    with transaction() as session:
        batches.request_cancel(session, DEFAULT_PROJECT, facts["batch"])
    return _facts_of(facts["batch"], "cancelled")


def _prepare_overdue(world: World) -> Facts:
    facts = _prepare_taken_back(world)
    with transaction() as session:
        session.execute(update(Batch).values(expires_at=now() - 1))
    return _facts_of(facts["batch"], "expired")


def _prepare_to_sweep(world: World) -> Facts:
    """One batch whose runner is gone, and one that has ended and whose results are still rows."""
    ended = _add_batch(world, _requests(*QUICK))
    tasks.run_batches()
    Sweeper(world.settings).expire_leases()
    facts = _prepare_half_run(world)
    time_passes()
    return {"batch_ends": {**facts["batch_ends"], ended: ("completed",)}}


def _sweep(world: World, facts: Facts) -> None:
    sweeper = Sweeper(world.settings)
    sweeper.expire_leases()
    sweeper.resend_hints()
    sweeper.remove_expired()


def _scenario(name: str, *acts: Callable[..., Any]) -> Scenario:
    return Scenario(name, *acts, has_generator=True)


BATCH_SCENARIOS = (
    _scenario("batch-create", _prepare_with_file, _create, until_answered(_create)),
    _scenario(
        "batch-create-with-key",
        lambda world: _prepare_with_file(world) | {"key": KEY, "once": "create-batch"},
        _create,
        _create,
    ),
    _scenario("batch-run", _prepare_waiting, _run),
    _scenario("batch-invalid", _prepare_invalid, _run),
    _scenario("batch-cancel-waiting", _prepare_cancellable, _cancel, until_answered(_cancel)),
    _scenario("batch-cancel-running", _prepare_cancellable, _run_until_cancelled, until_answered(_cancel)),
    _scenario("batch-cancelled-half-way", _prepare_half_cancelled, _run),
    _scenario("batch-resume", _prepare_taken_back, _run),
    _scenario("batch-deploy", _prepare_long, _run_until_deploy),
    _scenario("batch-expire", _prepare_overdue, _run),
    _scenario("batch-sweep", _prepare_to_sweep, _sweep),
)
