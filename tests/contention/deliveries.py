"""Hints delivered again and again: as calls of the task's body, and as real messages to real Celery workers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import redis
from sqlalchemy import func, select

from shared.db import reading
from shared.models import TERMINAL, Job
from shared.queue import QUEUE_OF, TRAIN, make_celery, send
from shared.settings import get_settings
from tests.campaign.toy_trainer import JOURNAL
from tests.contention.service import Barrier, add_file, add_jobs, at_once, problems_of
from tests.failpoints import toy
from worker import tasks

TRAINING_FILE = toy.rows(steps=1, step_s=0)
LIMIT_S = 900.0


def calls(count: int, callers: int, jobs_count: int, folder: Path) -> dict[str, Any]:
    """`count` calls of the task's body by `callers` processes, while `jobs_count` jobs come in."""
    journal = _journal(folder)
    file_id = add_file(TRAINING_FILE)

    def call(barrier: Barrier) -> list[str]:
        toy.be_the_trainer_of_this_process()
        barrier.wait()
        for _ in range(count // callers):
            tasks.train()
        return []

    def submit(barrier: Barrier) -> list[str]:
        barrier.wait()
        return add_jobs(file_id, jobs_count)

    began = time.monotonic()
    job_ids = at_once(*[call] * callers, submit)[-1]
    at_once(lambda _: toy.be_the_trainer_of_this_process() or tasks.train())  # for those that came after the last call
    took_s = time.monotonic() - began
    return {
        "deliveries": count,
        "callers": callers,
        "jobs": jobs_count,
        "deliveries_per_s": round(count / took_s, 1),
        "problems": _problems(job_ids, journal),
    }


def messages(count: int, workers: int, jobs_count: int, folder: Path) -> dict[str, Any]:
    """`count` messages through the broker to `workers` Celery workers, while `jobs_count` jobs come in."""
    journal = _journal(folder)
    settings = get_settings()
    file_id = add_file(TRAINING_FILE)
    broker = redis.Redis.from_url(settings.resolved_redis_url)
    began = time.monotonic()
    with (folder / "workers.log").open("ab") as log:
        processes = [
            subprocess.Popen(
                (sys.executable, "-W", "ignore", "-m", "tests.campaign.worker", "warning"),
                stdout=log,
                stderr=log,
                env={**os.environ, JOURNAL: str(journal), "PYTHONPATH": str(Path.cwd())},
            )
            for _ in range(workers)
        ]
    try:
        celery = make_celery(settings)
        job_ids: list[str] = []
        for number in range(count):
            if number * jobs_count // count >= len(job_ids):
                job_ids += add_jobs(file_id, 1)
            send(celery, TRAIN)
        sent_s = time.monotonic() - began
        deadline = began + LIMIT_S
        while (broker.llen(QUEUE_OF[TRAIN]) or _unfinished(job_ids)) and time.monotonic() < deadline:
            if not broker.llen(QUEUE_OF[TRAIN]):
                send(celery, TRAIN)  # the sweep's part: a job that came after the last message was looked at
            time.sleep(0.2)
        took_s = time.monotonic() - began
        left = int(broker.llen(QUEUE_OF[TRAIN]))
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(timeout=60)
    problems = _problems(job_ids, journal)
    if left:
        problems.append(f"{left} messages were not taken within {LIMIT_S:.0f} s")
    return {
        "deliveries": count,
        "workers": workers,
        "jobs": jobs_count,
        "sent_per_s": round(count / sent_s, 1),
        "deliveries_per_s": round(count / took_s, 1),
        "problems": problems,
    }


def _journal(folder: Path) -> Path:
    """Where every trainer notes every step it does, whoever gets to know of it."""
    journal = folder / "journal"
    journal.mkdir(exist_ok=True)
    os.environ[JOURNAL] = str(journal)
    return journal


def _unfinished(job_ids: list[str]) -> int:
    with reading() as session:
        return (
            session.scalar(
                select(func.count()).select_from(Job).where(Job.id.in_(job_ids), Job.status.not_in(TERMINAL))
            )
            or 0
        )


def _problems(job_ids: list[str], journal: Path) -> list[str]:
    """Each job must have been trained once, by its first claim, and have ended once."""
    problems = problems_of(job_ids)
    with reading() as session:
        for job_id, status, fence in session.execute(select(Job.id, Job.status, Job.fence).where(Job.id.in_(job_ids))):
            if (status, fence) != ("succeeded", 1):
                problems.append(f"job {job_id} is {status} after {fence} claims")
    for job_id in job_ids:
        path = journal / job_id
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        steps = Counter((line["fence"], line["step"]) for line in lines)
        if steps != {(1, 1): 1}:
            problems.append(f"job {job_id} was trained as {dict(steps)} (claim, step)")
    return problems
