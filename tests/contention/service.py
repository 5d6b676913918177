"""One service for contenders: settings in the environment, rows to fight about, processes that start together."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from sqlalchemy import select

from shared import db, job_creation
from shared.db import reading, transaction
from shared.models import Event, Job
from shared.schemas import JobCreate
from shared.settings import get_settings
from tests.rows import stored_file
from worker import lifecycle

BASE = "test/tiny"
LIMIT_S = 900.0
LAST_WORDS = {
    "The job has successfully completed": "succeeded",
    "The job failed": "failed",
    "The job was cancelled": "cancelled",
}
_context = multiprocessing.get_context("fork")
Barrier = Any


@contextmanager
def service(folder: Path, database_url: str, redis_url: str) -> Iterator[None]:
    """The settings of a service, in this process's environment and its children's."""
    model = folder / "models" / BASE
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("ANNEAL_")]:
        del os.environ[name]
    os.environ.update(
        ANNEAL_DATA=str(folder / "data"),
        ANNEAL_DATABASE_URL=database_url,
        ANNEAL_REDIS_URL=redis_url,
        ANNEAL_MODELS_DIR=str(folder / "models"),
        ANNEAL_HUB_OFFLINE="true",
        ANNEAL_POLL_S="0.5",
        ANNEAL_RETRY_DELAY_S="0",
    )
    get_settings.cache_clear()
    redis.Redis.from_url(redis_url).flushall()
    db.reset()
    try:
        yield
    finally:
        db.get_engine().dispose()
        db.reset()
        os.environ.clear()
        os.environ.update(before)
        get_settings.cache_clear()


def at_once(*works: Callable[[Barrier], Any]) -> list[Any]:
    """Run each work in a process of its own; they share a barrier for as many. Returns what they return.

    Raises:
        RuntimeError: one of them raised, died or did not end.
    """
    db.get_engine().dispose()
    db.reset()
    barrier = _context.Barrier(len(works))
    pipes = [_context.Pipe(duplex=False) for _ in works]
    children = []
    for work, (_, writer) in zip(works, pipes, strict=True):
        children.append(_context.Process(target=_live, args=(work, barrier, writer)))
        children[-1].start()
        writer.close()
    answers = []
    for child, (reader, _) in zip(children, pipes, strict=True):
        try:
            if not reader.poll(LIMIT_S):
                raise RuntimeError("a contender did not end")
            problem, value = reader.recv()
        except EOFError as error:
            raise RuntimeError("a contender died") from error
        if problem:
            raise RuntimeError(problem)
        answers.append(value)
        child.join()
    return answers


def _live(work: Callable[[Barrier], Any], barrier: Barrier, writer: Any) -> None:
    db.reset()  # connections don't survive a fork
    lifecycle.shutdown = lifecycle.Shutdown()
    try:
        writer.send((None, work(barrier)))
    except BaseException:
        barrier.abort()
        writer.send((traceback.format_exc(), None))


def add_file(content: bytes) -> str:
    return stored_file(get_settings(), content)


def add_jobs(file_id: str, count: int) -> list[str]:
    """That many jobs, oldest first."""
    request = JobCreate.model_validate({"model": BASE, "training_file": file_id})
    ids = []
    for _ in range(count):
        with transaction() as session:
            ids.append(job_creation.submit(session, "default", request).id)
    return ids


def problems_of(job_ids: Sequence[str]) -> list[str]:
    """Of jobs that have ended: more than one end, an end that was told otherwise, a gap in the events."""
    problems = []
    with reading() as session:
        for job_id in job_ids:
            job = session.get_one(Job, job_id)
            told = session.execute(
                select(Event.sequence, Event.message).where(Event.job_id == job_id).order_by(Event.sequence)
            ).all()
            if [number for number, _ in told] != list(range(1, job.last_event + 1)):
                problems.append(f"job {job_id}: its events are numbered {[number for number, _ in told]}")
            ends = [end for _, line in told for start, end in LAST_WORDS.items() if line.startswith(start)]
            if ends != [job.status]:
                problems.append(f"job {job_id} is {job.status} and was told to end as {ends}")
    return problems
