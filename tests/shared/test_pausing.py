"""Pause and resume: from every state, against every way a run can end, under competition."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, update

from shared import files, jobs, waiting
from shared.db import now, reading, transaction
from shared.errors import Conflict
from shared.models import TERMINAL, Event, File, FileStatus, Job, JobStatus
from tests.shared.test_job_moves import claimed_job, register
from tests.shared.test_jobs import add_file, add_job, at_once, status_of

Move = Callable[[Any, Job], object]

WAYS_BACK: dict[str, Move] = {
    "a deploy": lambda session, job: jobs.give_back(session, job.id, job.fence, "a deploy"),
    "a dead trainer": lambda session, job: jobs.retry_or_fail(session, job.id, job.fence, "It died", 3, 60),
    "a fault": lambda session, job: jobs.postpone_or_fail(session, job.id, job.fence, "The hub is away", 3, 60),
    "no memory": lambda session, job: jobs.adapt(session, job.id, job.fence, {"micro_batch_size": 1}, "Memory ran out"),
    "a silent worker": lambda session, job: jobs.expire_leases(session, 3),
}
ENDS: dict[JobStatus, Move] = {
    JobStatus.SUCCEEDED: lambda session, job: jobs.succeed(session, job.id, job.fence),
    JobStatus.FAILED: lambda session, job: jobs.fail(session, job.id, job.fence, "code", "message"),
}


def pause(job_id: str) -> Job:
    with transaction() as session:
        return waiting.request_pause(session, "default", job_id)


def resume(job_id: str) -> Job:
    with transaction() as session:
        return waiting.resume(session, "default", job_id)


def cancel(job_id: str) -> Job:
    with transaction() as session:
        return jobs.request_cancel(session, "default", job_id)


def settle(move: Move, job: Job) -> Job:
    with transaction() as session:
        session.execute(update(Job).where(Job.id == job.id).values(lease_until=now() - 1))
        move(session, job)
    with reading() as session:
        return session.get_one(Job, job.id)


def messages(job_id: str) -> list[str]:
    with reading() as session:
        return list(session.scalars(select(Event.message).where(Event.job_id == job_id).order_by(Event.sequence)))


@pytest.mark.usefixtures("settings")
def test_a_job_that_waits_is_paused_at_once_and_nobody_claims_it_until_it_is_resumed() -> None:
    job_id = add_job(add_file())
    assert pause(job_id).status == pause(job_id).status == "paused"
    with transaction() as session:
        assert jobs.count_claimable(session) == 0
        assert jobs.claim_next(session, "w", 60) is None
    assert resume(job_id).status == resume(job_id).status == "queued"
    assert messages(job_id)[2:] == ["Job paused at step 0", "Job resumed"]
    with transaction() as session:
        assert jobs.claim_next(session, "w", 60) is not None


@pytest.mark.usefixtures("settings")
def test_a_running_job_is_asked_once_and_told_to_its_owner() -> None:
    job = claimed_job()
    with transaction() as session:
        assert jobs.orders(session, job.id, job.fence) == (False, False)
    assert pause(job.id).status == pause(job.id).status == "running"
    assert messages(job.id).count("Pause requested") == 1
    with transaction() as session:
        assert jobs.orders(session, job.id, job.fence) == (False, True)
        assert jobs.renew_lease(session, job.id, job.fence, 60) == (False, True)


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("way", WAYS_BACK)
def test_whatever_would_queue_a_run_pauses_it_while_a_pause_is_asked_for(way: str) -> None:
    job = claimed_job()
    with transaction() as session:
        register(session, job, 4)
        register(session, job, 7)
    pause(job.id)
    paused = settle(WAYS_BACK[way], job)
    assert (paused.status, paused.pause_requested_at, paused.lease_until) == ("paused", None, None)
    assert messages(job.id)[-1] == "Job paused at step 7"
    with transaction() as session:
        assert jobs.claim_next(session, "w", 60) is None
    assert resume(job.id).status == "queued"


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("way", WAYS_BACK)
def test_a_withdrawn_pause_queues_the_run_like_any_other(way: str) -> None:
    job = claimed_job()
    pause(job.id)
    assert resume(job.id).status == "running"
    with transaction() as session:
        assert jobs.orders(session, job.id, job.fence) == (False, False)
    assert settle(WAYS_BACK[way], job).status == "queued"
    assert messages(job.id)[-2] == "Job resumed"


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("way", WAYS_BACK)
@pytest.mark.parametrize("first", ["pause", "cancel"])
def test_a_cancel_wins_over_a_pause_whichever_came_first(way: str, first: str) -> None:
    job = claimed_job()
    if first == "pause":
        pause(job.id)
    assert cancel(job.id).status == "running"
    for order in (pause, resume):
        with pytest.raises(jobs.JobConflict, match="being cancelled"):
            order(job.id)
    assert settle(WAYS_BACK[way], job).status == "cancelled"


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_ends_has_ended_though_a_pause_was_asked_for(end: JobStatus) -> None:
    job = claimed_job()
    pause(job.id)
    ended = settle(ENDS[end], job)
    assert (ended.status, ended.pause_requested_at) == (end, None)


@pytest.mark.usefixtures("settings")
def test_a_budget_that_is_spent_fails_the_job_though_a_pause_was_asked_for() -> None:
    for last in (
        lambda session, job: jobs.retry_or_fail(session, job.id, job.fence, "It died", 1),
        lambda session, job: jobs.postpone_or_fail(session, job.id, job.fence, "The hub is away", 1, 0),
    ):
        job = claimed_job()
        pause(job.id)
        assert settle(last, job).status == "failed"


@pytest.mark.usefixtures("settings")
def test_a_paused_job_is_cancelled_at_once_and_takes_no_more_orders() -> None:
    job_id = add_job(add_file())
    pause(job_id)
    assert cancel(job_id).status == "cancelled"
    for order in (pause, resume):
        with pytest.raises(jobs.JobConflict, match=r"already ended \(cancelled\)"):
            order(job_id)


@pytest.mark.usefixtures("settings")
def test_terminal_states_take_neither_pause_nor_resume() -> None:
    job_id = add_job(add_file())
    for end in TERMINAL:
        with transaction() as session:
            session.execute(update(Job).where(Job.id == job_id).values(status=end))
        for order in (pause, resume):
            with pytest.raises(jobs.JobConflict, match=end):
                order(job_id)
        assert status_of(job_id) == end


@pytest.mark.usefixtures("settings")
def test_a_job_paused_while_its_file_is_unchecked_waits_for_it_again() -> None:
    file_id = add_file(FileStatus.UPLOADED)
    job_id = add_job(file_id)
    assert pause(job_id).status == "paused"
    assert resume(job_id).status == "validating_files"
    pause(job_id)
    with transaction() as session:
        files.settle_valid(session, file_id, "messages", 1)
    assert status_of(job_id) == "paused", "its file is good, and the client has not resumed it"
    assert resume(job_id).status == "queued"


@pytest.mark.usefixtures("settings")
def test_a_paused_job_whose_file_turns_out_invalid_fails() -> None:
    for which in ("training_file", "validation_file"):
        bad = add_file(FileStatus.UPLOADED)
        chosen = {"training_file": add_file(), "validation_file": add_file(), which: bad}
        job_id = add_job(chosen["training_file"], validation_file=chosen["validation_file"])
        pause(job_id)
        with transaction() as session:
            files.settle_invalid(session, bad, "line 3 is no JSON")
        with reading() as session:
            job = session.get_one(Job, job_id)
        assert job.status == "failed" and job.error is not None
        assert (job.error["code"], job.error["param"]) == (f"invalid_{which}", which)


@pytest.mark.usefixtures("settings")
def test_a_file_that_a_paused_job_needs_stays() -> None:
    file_id = add_file()
    job_id = add_job(file_id)
    pause(job_id)
    with pytest.raises(Conflict, match=job_id), transaction() as session:
        files.delete(session, "default", file_id)
    with reading() as session:
        assert session.get(File, file_id) is not None


@pytest.mark.usefixtures("settings")
def test_a_resume_while_a_file_is_settled_strands_no_job() -> None:
    for attempt in range(12):
        file_id = add_file(FileStatus.UPLOADED)
        job_id = add_job(file_id)
        pause(job_id)

        def settle_file(file_id: str = file_id, valid: bool = bool(attempt % 2)) -> None:
            with transaction() as session:
                if valid:
                    files.settle_valid(session, file_id, "messages", 1)
                else:
                    files.settle_invalid(session, file_id, "bad")

        raised = at_once(settle_file, lambda job_id=job_id: resume(job_id))
        assert all(isinstance(error, jobs.JobConflict) for error in raised), raised
        assert status_of(job_id) == ("queued" if attempt % 2 else "failed")


@pytest.mark.usefixtures("settings")
def test_orders_that_race_with_the_owner_leave_one_consistent_state() -> None:
    for _ in range(20):
        job = claimed_job()

        def owner(job: Job = job) -> None:
            with transaction() as session:
                jobs.give_back(session, job.id, job.fence, "a deploy")

        def claimer() -> None:
            with transaction() as session:
                jobs.claim_next(session, "another", 60)

        assert at_once(lambda job=job: pause(job.id), owner, claimer) == []
        with reading() as session:
            row = session.get_one(Job, job.id)
        told = messages(job.id)
        if row.status == "running":
            assert row.fence == 2 and (row.pause_requested_at is not None) == ("Pause requested" in told)
        else:
            assert row.status == "paused" and row.pause_requested_at is None
        with transaction() as session:  # out of the way of the next turn
            session.execute(update(Job).where(Job.id == job.id).values(status=JobStatus.CANCELLED))
