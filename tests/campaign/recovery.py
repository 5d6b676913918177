"""How long the service took to go on after a fault that ended a run: until the next claim of its job was committed."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import pairwise

from shared.settings import Settings
from tests.campaign import promises
from tests.campaign.evidence import EventRow, JobRecord
from tests.campaign.faults import Fault
from tests.campaign.verdict import ENDINGS, attempts

LIMIT_LEASES = 1.5
NEEDED = ("supervisor", "worker", "sweep", "valkey", "postgres", "connection")
"""Whose help a recovery may need: somebody notices, somebody tells, somebody is free to claim."""
LEAVES = (*ENDINGS, "Back in the queue", promises.PAUSED)
AGAIN = "; trying again"
TURN_S = 0.5
"""A worker that takes another job so soon was not free for this one: that one was older."""
AWAY_S = {"supervisor": 2.0, "worker": 4.0, "sweep": 4.0, "valkey": 4.0, "postgres": 4.0, "connection": 1.0}
"""How long a killed one helps nobody once it is started again: imports, and reaching the broker."""


@dataclass(frozen=True)
class Recovery:
    fault: Fault
    seconds: float
    """From the fault to the next claim, less the time in which no worker was free: a job waits for its turn."""
    waited_s: float
    """That time."""
    limit_s: float
    disturbed_by: str | None
    """What a recovery needs and was away meanwhile because of another fault; None if nothing was."""

    @property
    def is_undisturbed(self) -> bool:
        return self.disturbed_by is None


@dataclass(frozen=True)
class _Run:
    """One claim of one job, from that claim until the job was out of its worker's hands."""

    began: float
    ended: float


def recoveries(
    jobs: Sequence[JobRecord],
    faults: Sequence[Fault],
    settings: Settings,
    locking: Container[int] = (),
    workers: int | None = None,
) -> list[Recovery]:
    """One for each claim that ended in a further claim and was hit: from the last fault that hit it to that claim.

    A run that was stopped, went on and was hit again died of the second; where the run ended well there was nothing
    to recover from.

    Args:
        locking: faults that stopped a process inside an SQLite transaction, which is an outage of the database.
        workers: how many there are, one job each; None for more than enough.
    """
    found = []
    runs = [_Run(events[0].created_at, _left_at(events)) for job in jobs for events in attempts(job)]
    for job in jobs:
        hits: dict[int, list[Fault]] = {}
        for fault in faults:
            if fault.job_id == job.id and fault.fence is not None:
                hits.setdefault(fault.fence, []).append(fault)
        claims = attempts(job)
        for fence, (attempt, following) in enumerate(pairwise(claims), start=1):
            claimed_at = following[0].created_at
            before = [fault for fault in hits.get(fence, []) if fault.at < claimed_at]
            paused = any(event.message.startswith((promises.ASKED, promises.PAUSED)) for event in attempt)
            if before and not paused:  # else its client decides when it goes on
                fault = _deadly(before)
                waited_s = 0.0
                if workers is not None:
                    back_at = fault.at + (0 if fault.role == "trainer" else _away_s(fault, settings.lease_s, locking))
                    waited_s = _wait_for_a_worker(runs, _left_at(attempt), claimed_at, workers, back_at)
                limit_s = _limit_s(fault, settings)
                late_at = min(claimed_at, fault.at + limit_s + waited_s)  # too late is too late, whatever follows
                disturbed_by = _disturbed_by(fault, faults, late_at, settings.lease_s, locking)
                found.append(Recovery(fault, claimed_at - fault.at - waited_s, waited_s, limit_s, disturbed_by))
    return found


def _left_at(attempt: Sequence[EventRow]) -> float:
    """When a claimed job was out of its worker's hands."""
    ends = (event for event in attempt if event.message.startswith(LEAVES) or AGAIN in event.message)
    return next(ends, attempt[-1]).created_at


def _wait_for_a_worker(runs: Sequence[_Run], since: float, until: float, workers: int, back_at: float) -> float:
    """How long from `since` on no worker was free.

    Args:
        back_at: when the worker that was hit could work again.
    """
    for at in sorted({since, back_at, *(run.ended for run in runs)}):
        if since <= at < until:
            busy = sum(run.began <= at + TURN_S and at < run.ended for run in runs if run.began < until)
            if busy + (at < back_at) < workers:
                return at - since
    return max(0.0, until - since)


def _disturbed_by(
    fault: Fault, faults: Sequence[Fault], late_at: float, lease_s: float, locking: Container[int]
) -> str | None:
    if fault.number in locking:
        return "SQLite locked"
    for other in faults:
        overlaps = other.at < late_at and fault.at < other.at + _away_s(other, lease_s, locking)
        if other is fault or not overlaps:
            continue
        if other.number in locking:
            return "SQLite locked"
        if (other.job_id, other.fence) == (fault.job_id, fault.fence):
            return "hit again"
        if other.role in NEEDED:
            return other.role
    return None


def _limit_s(fault: Fault, settings: Settings) -> float:
    """1.5 leases, or 1.5 times the silence an operator allows a trainer, if that is what must pass first."""
    stopped_trainer = (fault.action, fault.role) == ("stop", "trainer")
    return LIMIT_LEASES * max(settings.lease_s, settings.trainer_silent_s if stopped_trainer else 0)


def _away_s(fault: Fault, lease_s: float, locking: Container[int]) -> float:
    """How long what it hit was away, with what follows from that."""
    away_s = fault.hold_s if fault.hold_s is not None else (fault.restart_s or 0) + AWAY_S.get(fault.role, 0)
    outage = fault.role in ("postgres", "connection") or fault.number in locking
    return away_s + (1.5 * lease_s if outage else 0)  # after an outage nobody's lease expires for a whole one


def _deadly(hits: list[Fault]) -> Fault:
    """The first that certainly ended the run, or else the last."""
    return next((fault for fault in hits if fault.action in ("kill", "damage")), hits[-1])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values don't exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)] if ordered else 0.0
