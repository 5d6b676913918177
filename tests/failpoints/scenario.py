"""One thing the service does, in three acts: what is there before, what is done, what a client does again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import update

from shared.db import now, transaction
from shared.models import Batch, Job, Sweep
from tests.failpoints.world import World
from worker.sweeper import Sweeper

Facts = dict[str, Any]
"""What a scenario is judged by: the jobs it made and how each may end (`ends`), what a client must be answered."""

SUCCEEDS = ["succeeded"]
LARGE = b'{"prompt": "padding", "completion": "' + b"y" * 5000 + b'"}\n'
"""Makes a file too large to be checked before its sender is answered."""


@dataclass(frozen=True)
class Scenario:
    """One thing the service does.

    Attributes:
        prepare: makes what must be there before, with nothing broken.
        act: runs in the process under test.
        again: what a client does that got no answer, or an error.
        looks_behind: at the files of a storage that is a folder.
        has_generator: somebody answers the lines of batches.
        is_swept_before: a sweep has passed at least once, which makes the storage the database's.
    """

    name: str
    prepare: Callable[[World], Facts]
    act: Callable[[World, Facts], None]
    again: Callable[[World, Facts], None] = lambda world, facts: None
    looks_behind: bool = False
    has_generator: bool = False
    is_swept_before: bool = True


def facts_of(world: World, job_id: str, ends: list[str] | None = None) -> Facts:
    return {"job": job_id, "ends": {job_id: ends or SUCCEEDS}}


def time_passes() -> None:
    """As long as it takes for every lease to run out, every retry to be due and every grace to end."""
    with transaction() as session:
        session.execute(update(Job).where(Job.lease_until.is_not(None)).values(lease_until=now() - 1))
        session.execute(update(Job).values(not_before=None))
        session.execute(update(Batch).where(Batch.lease_until.is_not(None)).values(lease_until=now() - 1))
        session.execute(update(Batch).values(not_before=None))
        session.execute(update(Sweep).values(no_expiry_before=0, last_pass_at=now()))


def take_back(world: World) -> None:
    """The sweep finds that a worker is gone."""
    sweeper = Sweeper(world.settings)
    sweeper.expire_leases()
    time_passes()
    sweeper.expire_leases()


def collect_all(world: World) -> int:
    """Collect garbage of any age. Returns how much there was."""
    sweeper = Sweeper(world.settings.model_copy(update={"garbage_age_s": 0}))
    sweeper.expire_leases()
    return sweeper.collect_garbage()
