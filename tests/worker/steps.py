"""What tests of supervision do again and again: claim, run, look."""

import sys
import threading

import psutil
from sqlalchemy import select, update

from shared import jobs, storage
from shared.db import reading, transaction
from shared.models import Event, Job, Sweep
from shared.settings import Settings
from tests.campaign.toy_model import Reference, reference
from tests.campaign.toy_trainer import COMMAND
from worker import supervisor
from worker.sweeper import Sweeper

TOY = COMMAND
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def claim(settings: Settings) -> Job:
    with transaction() as session:
        job = jobs.claim_next(session, "test-worker", settings.lease_s)
    assert job is not None
    return job


def run_next(settings: Settings) -> None:
    supervisor.supervise(claim(settings), settings, TOY)


def job_of(job_id: str) -> Job:
    with reading() as session:
        job = session.get(Job, job_id)
    assert job is not None
    return job


def at_step(job_id: str, step: int) -> bool:
    """Whether the job has done so many steps."""
    return (job_of(job_id).current_step or 0) >= step


def expected(settings: Settings, job: Job, steps: int) -> Reference:
    """What the toy must have done, computed here and now."""
    data = storage.local_file(settings, job.training_file).read_bytes()
    return reference(job.seed, data, steps)


def messages(job_id: str) -> list[str]:
    with reading() as session:
        return list(session.scalars(select(Event.message).where(Event.job_id == job_id).order_by(Event.sequence)))


def failing(code: str, message: str) -> tuple[str, ...]:
    """The command of a trainer that says this before its first step, and ends."""
    return (
        sys.executable,
        "-c",
        "import os, sys; from shared.trainer_protocol import Failed\n"
        f"message = Failed(code={code!r}, message={message!r}).model_dump_json()\n"
        "os.write(int(os.environ['ANNEAL_PROTOCOL_FD']), message.encode() + b'\\n'); sys.exit(1)\n",
    )


def in_thread(job: Job, settings: Settings) -> threading.Thread:
    thread = threading.Thread(target=supervisor.supervise, args=(job, settings, TOY))
    thread.start()
    return thread


def after_grace(settings: Settings) -> None:
    """Let a sweep find that everybody has had their lease."""
    Sweeper(settings).expire_leases()
    with transaction() as session:
        session.execute(update(Sweep).values(no_expiry_before=0))


def toys() -> list[psutil.Process]:
    mine = psutil.Process().children(recursive=True)
    return [p for p in mine if p.status() != psutil.STATUS_ZOMBIE and "tests.campaign.toy_trainer" in p.cmdline()]
