"""Moves that must not happen: from another state, by another claim, by a host's clock. One caller at a time."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, update

from shared import checkpoints, jobs
from shared.db import clock, reading, transaction
from shared.models import Checkpoint, Job, JobStatus, Model
from tests.shared.test_jobs import BASE, add_file, add_job, status_of

LEASE_S = 60


def claimed_job() -> Job:
    """A job that its first claim runs."""
    add_job(add_file())
    with transaction() as session:
        job = jobs.claim_next(session, "worker", LEASE_S)
    assert job is not None
    return job


def give_back(job: Job) -> None:
    with transaction() as session:
        jobs.give_back(session, job.id, job.fence, "a deploy")


def register(session: Any, job: Job, step: int, **metrics: float) -> None:
    checkpoints.register(
        session,
        job,
        job.fence,
        base_model=BASE,
        step=step,
        location=f"checkpoints/{job.id}/{job.fence}/{step}",
        manifest_sha256="",
        resumable=True,
        tokens=step,
        metrics=metrics,
    )
    session.flush()


NOT_IN_THE_DIAGRAM = [
    (start, end) for start in JobStatus for end in JobStatus if end not in jobs.ALLOWED.get(start, ())
]


@pytest.mark.usefixtures("settings")
def test_a_move_that_the_diagram_does_not_have_is_refused_whoever_asks() -> None:
    job_id = add_job(add_file())
    for start, end in NOT_IN_THE_DIAGRAM:
        with transaction() as session:
            session.execute(update(Job).where(Job.id == job_id).values(status=start))
        with pytest.raises(jobs.JobConflict), transaction() as session:
            jobs.move(session, job_id, end)
        assert status_of(job_id) == start


@pytest.mark.usefixtures("settings")
def test_a_claim_that_gave_its_job_back_can_not_end_it_while_it_waits() -> None:
    job = claimed_job()
    give_back(job)
    ends: list[Callable[[Any], object]] = [
        lambda session: jobs.fail(session, job.id, job.fence, "code", "message"),
        lambda session: jobs.settle_cancelled(session, job.id, job.fence),
        lambda session: jobs.succeed(session, job.id, job.fence),
    ]
    for end in ends:
        with pytest.raises(jobs.LeaseLost), transaction() as session:
            end(session)
        assert status_of(job.id) == "queued"


@pytest.mark.usefixtures("settings")
def test_a_lease_is_renewed_by_the_claim_that_has_it_and_by_no_earlier_one() -> None:
    earlier = claimed_job()
    give_back(earlier)
    with transaction() as session:
        assert jobs.claim_next(session, "another", LEASE_S) is not None
    with pytest.raises(jobs.LeaseLost), transaction() as session:
        jobs.renew_lease(session, earlier.id, earlier.fence, 10 * LEASE_S)
    with transaction() as session:
        jobs.renew_lease(session, earlier.id, earlier.fence + 1, LEASE_S)


@pytest.mark.usefixtures("settings")
def test_a_host_whose_clock_is_an_hour_off_takes_a_lease_like_everybody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    right = time.time

    def left_s(job: Job) -> float:
        with reading() as session:
            until = session.get_one(Job, job.id).lease_until
            assert until is not None
            return until - clock(session)

    for error_s in (-3600, 3600):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda error_s=error_s: right() + error_s)
            job = claimed_job()
            assert LEASE_S - 10 < left_s(job) <= LEASE_S
            with transaction() as session:
                jobs.renew_lease(session, job.id, job.fence, 2 * LEASE_S)
            assert 2 * LEASE_S - 10 < left_s(job) <= 2 * LEASE_S
            with transaction() as session:
                assert jobs.expire_leases(session, 3) == []


@pytest.mark.usefixtures("settings")
def test_a_checkpoint_is_registered_by_the_claim_that_runs_and_by_no_earlier_one() -> None:
    earlier = claimed_job()
    give_back(earlier)
    with transaction() as session:
        jobs.claim_next(session, "another", LEASE_S)
    with pytest.raises(jobs.LeaseLost), transaction() as session:
        register(session, earlier, 4)
    with reading() as session:
        assert checkpoints.newest_first(session, earlier.id) == []


@pytest.mark.usefixtures("settings")
def test_a_checkpoint_that_a_live_job_starts_from_is_kept_until_that_job_has_ended() -> None:
    job = claimed_job()
    with transaction() as session:
        for step in (1, 2, 3):
            register(session, job, step, full_valid_loss=1 / step)
        base = session.scalars(select(Model).where(Model.location.endswith("/1"))).one()
    child_id = add_job(add_file(), model=base.id)

    def retire() -> list[str]:
        with transaction() as session:
            return checkpoints.retire(session, session.get_one(Job, job.id), BASE, keep=1)

    assert retire() == [f"checkpoints/{job.id}/1/2"]
    with transaction() as session:
        assert session.get(Model, base.id) is not None
        jobs.request_cancel(session, "default", child_id)
    assert retire() == [base.location]
    with reading() as session:
        assert session.get(Model, base.id) is None
        assert [row.step for row in session.scalars(select(Checkpoint))] == [3]
