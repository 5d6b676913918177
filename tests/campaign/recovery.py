"""How long the service took to go on after a fault that ended a run: until the next claim of its job was committed."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import pairwise

from shared.settings import Settings
from tests.campaign import promises
from tests.campaign.evidence import JobRecord
from tests.campaign.faults import Fault
from tests.campaign.verdict import attempts

LIMIT_LEASES = 1.5
NEEDED = ("supervisor", "worker", "sweep", "valkey", "postgres", "connection")
"""Whose help a recovery may need: somebody notices, somebody tells, somebody is free to claim."""
AWAY_S = {"supervisor": 2.0, "worker": 4.0, "sweep": 4.0, "valkey": 4.0, "postgres": 4.0, "connection": 1.0}
"""How long a killed one helps nobody once it is started again: imports, and reaching the broker."""


@dataclass(frozen=True)
class Recovery:
    fault: Fault
    seconds: float
    limit_s: float
    is_undisturbed: bool
    """Nothing that a recovery needs was away meanwhile because of another fault."""


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
    runs = [(events[0].created_at, events[-1].created_at) for job in jobs for events in attempts(job)]
    for job in jobs:
        hits: dict[int, list[Fault]] = {}
        for fault in faults:
            if fault.job_id == job.id and fault.fence is not None:
                hits.setdefault(fault.fence, []).append(fault)
        claims = attempts(job)
        for fence, (_, following) in enumerate(pairwise(claims), start=1):
            claimed_at = following[0].created_at
            before = [fault for fault in hits.get(fence, []) if fault.at < claimed_at]
            paused = any(event.message.startswith((promises.ASKED, promises.PAUSED)) for event in claims[fence - 1])
            if before and not paused:  # else its client decides when it goes on
                fault = _deadly(before)
                limit_s = _limit_s(fault, settings)
                late_at = min(claimed_at, fault.at + limit_s)  # too late is too late, whatever follows
                disturbed = fault.number in locking or any(
                    other.at < late_at and fault.at < other.at + _away_s(other, settings.lease_s, locking)
                    for other in faults
                    if other is not fault and (other.number in locking or _is_needed(other, fault))
                )
                if workers is not None and not disturbed:
                    # Given back, it waits for its turn like any other job: until then nobody was free.
                    helpers = workers - (fault.role != "trainer")
                    given_back_at = claims[fence - 1][-1].created_at
                    busy = sum(began <= given_back_at and late_at <= ended for began, ended in runs)
                    disturbed = given_back_at < late_at and busy >= helpers
                found.append(Recovery(fault, claimed_at - fault.at, limit_s, not disturbed))
    return found


def _limit_s(fault: Fault, settings: Settings) -> float:
    """1.5 leases, or 1.5 times the silence an operator allows a trainer, if that is what must pass first."""
    stopped_trainer = (fault.action, fault.role) == ("stop", "trainer")
    return LIMIT_LEASES * max(settings.lease_s, settings.trainer_silent_s if stopped_trainer else 0)


def _is_needed(other: Fault, fault: Fault) -> bool:
    """Whether what `other` hit is needed for a recovery from `fault`, or is the same run."""
    return other.role in NEEDED or (other.job_id, other.fence) == (fault.job_id, fault.fence)


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
