"""Checkpoints spoiled on purpose: cut at a random byte, or one bit turned over."""

import contextlib
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from shared.models import Checkpoint, Job, JobStatus
from shared.settings import Settings
from tests.campaign import procfs
from tests.campaign.evidence import engine_of

REGISTERED_WITHIN_S = 1.5
"""How long a trainer is held still; far less than it takes to be given up for silent."""


@dataclass(frozen=True)
class Damage:
    """One checkpoint that must not be used any more."""

    at: float
    job_id: str
    step: int
    location: str
    file: str
    path: Path
    before: bytes

    def undo(self) -> None:
        with contextlib.suppress(OSError):
            self.path.write_bytes(self.before)


def damage_newest_checkpoint(
    database_url: str, settings: Settings, trainer: procfs.Trainer, draw: random.Random
) -> Damage | None:
    """Spoil the newest checkpoint of `trainer`'s run, and kill it, so that the next attempt meets what was spoiled.

    It must be one of its own: it began long before, so nobody can be between checking that one and loading it. It is
    held still until all it has published is registered, or its next attempt would begin from a later one. None if
    there is no such checkpoint, or the trainer is gone by then.
    """
    if not procfs.send(trainer.process, signal.SIGSTOP):
        return None
    try:
        newest = _newest_once_all_are_registered(database_url, settings, trainer)
        damage = None if newest is None else _spoil(settings, trainer, *newest, draw)
        if damage is not None and not procfs.send(trainer.process, signal.SIGKILL):
            damage.undo()  # its successor may be loading it already, checked and whole
            return None
        return damage
    finally:
        procfs.send(trainer.process, signal.SIGCONT)


def _newest_once_all_are_registered(
    database_url: str, settings: Settings, trainer: procfs.Trainer
) -> tuple[int, str] | None:
    """(step, location)."""
    query = (
        select(Checkpoint.step, Checkpoint.location)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(
            *(Job.id == trainer.job_id, Job.status == JobStatus.RUNNING, Job.fence == trainer.fence),
            *(Checkpoint.fence == trainer.fence, Checkpoint.resumable),
        )
        .order_by(Checkpoint.step.desc())
        .limit(1)
    )
    folder = settings.storage_root / "checkpoints" / trainer.job_id / str(trainer.fence)
    deadline = time.monotonic() + REGISTERED_WITHIN_S
    while time.monotonic() < deadline:
        published = max((int(path.name) for path in folder.glob("[0-9]*")), default=None)
        if published is None:
            return None
        try:
            with Session(engine_of(database_url)) as session:
                row = session.execute(query).one_or_none()
        except SQLAlchemyError:
            return None
        if row is not None and row[0] == published:
            return row[0], row[1]
        time.sleep(0.05)
    return None


def _spoil(settings: Settings, trainer: procfs.Trainer, step: int, location: str, draw: random.Random) -> Damage | None:
    folder = settings.storage_root / location
    try:
        path = draw.choice(sorted(folder.iterdir()))
        before = path.read_bytes()
        at = time.time()
        if draw.random() < 0.5:
            os.truncate(path, draw.randrange(len(before)))
        else:
            spoiled = bytearray(before)
            spoiled[draw.randrange(len(spoiled))] ^= 1 << draw.randrange(8)
            path.write_bytes(spoiled)
    except (OSError, ValueError):
        return None  # retired at this moment
    return Damage(at, trainer.job_id, step, location, path.name, path, before)
