"""State changes under competition, on both databases."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, update

from shared import events, files, job_creation, jobs
from shared.db import clock, now, transaction
from shared.errors import Conflict, NotFound
from shared.models import TERMINAL, Event, File, FileStatus, Job, JobStatus
from shared.schemas import JobCreate
from shared.settings import Settings
from tests.rows import file_row
from worker import tasks

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def add_file(status: FileStatus = FileStatus.PROCESSED) -> str:
    with transaction() as session:
        return file_row(session, status=status)


def add_job(file_id: str, **body: Any) -> str:
    with transaction() as session:
        request = JobCreate.model_validate({"model": BASE, "training_file": file_id, **body})
        return job_creation.submit(session, "default", request).id


def status_of(job_id: str) -> str:
    with transaction() as session:
        job = session.get(Job, job_id)
        assert job is not None
        return job.status


def at_once(*actions: Callable[[], object]) -> list[BaseException]:
    """Run all actions in threads that start together; what they raised."""
    barrier = threading.Barrier(len(actions))
    raised: list[BaseException] = []

    def run(action: Callable[[], object]) -> None:
        barrier.wait()
        try:
            action()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.usefixtures("settings")
def test_eight_claimers_take_every_job_once_and_the_oldest_first() -> None:
    file_id = add_file()
    expected = [add_job(file_id) for _ in range(40)]
    claimed: list[str] = []

    def claim_all() -> None:
        while True:
            with transaction() as session:
                job = jobs.claim_next(session, "w", 60)
            if job is None:
                return
            assert job.fence == 1
            claimed.append(job.id)

    assert at_once(*[claim_all] * 8) == []
    assert sorted(claimed) == sorted(expected)
    assert set(claimed[:8]) <= set(expected[:20]), "old jobs come before young ones"


@pytest.mark.usefixtures("settings")
def test_a_cancel_racing_completion_ends_in_exactly_one_state() -> None:
    file_id = add_file()
    ends = []
    for _ in range(25):
        job_id = add_job(file_id)
        with transaction() as session:
            assert jobs.claim_next(session, "w", 60) is not None

        def complete(job_id: str = job_id) -> None:
            with transaction() as session:
                jobs.succeed(session, job_id, 1, fine_tuned_model="m")

        def cancel(job_id: str = job_id) -> None:
            with transaction() as session:
                jobs.request_cancel(session, "default", job_id)

        def obey(job_id: str = job_id) -> None:
            with transaction() as session:
                jobs.settle_cancelled(session, job_id, 1)

        raised = at_once(complete, cancel, obey)
        assert all(isinstance(error, jobs.JobConflict | jobs.LeaseLost) for error in raised), raised
        ends.append(status_of(job_id))
        with transaction() as session:
            final = session.scalars(
                select(Event.message).where(
                    Event.job_id == job_id,
                    Event.message.in_(("The job was cancelled", "The job has successfully completed")),
                )
            ).all()
        assert len(final) == 1
    assert set(ends) <= {"succeeded", "cancelled"}


@pytest.mark.usefixtures("settings")
def test_terminal_states_absorb() -> None:
    file_id = add_file()
    for end in TERMINAL:
        job_id = add_job(file_id)
        with transaction() as session:
            job = jobs.claim_next(session, "w", 60)
            assert job is not None and job.id == job_id
            session.execute(update(Job).where(Job.id == job_id).values(status=end))
        moves: list[Callable[[Any], object]] = [
            lambda s: jobs.succeed(s, job_id, 1),  # noqa: B023 - called in this turn
            lambda s: jobs.fail(s, job_id, 1, "x", "y"),  # noqa: B023
            lambda s: jobs.settle_cancelled(s, job_id, 1),  # noqa: B023
            lambda s: jobs.give_back(s, job_id, 1, "x"),  # noqa: B023
            lambda s: jobs.retry_or_fail(s, job_id, 1, "x", 3),  # noqa: B023
            lambda s: jobs.renew_lease(s, job_id, 1, 60),  # noqa: B023
            lambda s: jobs.request_cancel(s, "default", job_id),  # noqa: B023
        ]
        for move in moves:
            with pytest.raises((jobs.LeaseLost, jobs.JobConflict)), transaction() as session:
                move(session)
        assert status_of(job_id) == end


@pytest.mark.usefixtures("settings")
def test_an_old_fence_writes_nothing() -> None:
    job_id = add_job(add_file())
    with transaction() as session:
        jobs.claim_next(session, "a", 60)
    with transaction() as session:
        jobs.give_back(session, job_id, 1, "deploy")
        jobs.claim_next(session, "b", 60)
    for move in (lambda s: jobs.succeed(s, job_id, 1), lambda s: jobs.owned(s, job_id, 1, current_step=9)):
        with pytest.raises(jobs.LeaseLost), transaction() as session:
            move(session)
    assert status_of(job_id) == "running"


@pytest.mark.usefixtures("settings")
def test_events_are_numbered_without_a_gap_by_competing_writers() -> None:
    job_id = add_job(add_file())

    def write() -> None:
        for _ in range(10):
            with transaction() as session:
                job = session.get(Job, job_id)
                assert job is not None
                events.append(session, job, "x")

    assert at_once(*[write] * 4) == []
    with transaction() as session:
        numbers = [event.sequence for event in events.read_after(session, job_id, 0)]
    assert numbers == list(range(1, 43))


def test_the_settling_of_a_file_moves_the_jobs_that_wait_for_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "send", lambda celery, hint: None)  # no broker here, and its clients are patient
    good, bad = add_file(FileStatus.UPLOADED), add_file(FileStatus.UPLOADED)
    waits, fails, waits_for_both = add_job(good), add_job(bad), add_job(good, validation_file=bad)
    assert {status_of(job) for job in (waits, fails, waits_for_both)} == {"validating_files"}
    folder = settings.storage_root / "files"
    folder.mkdir(parents=True)
    (folder / good).write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / bad).write_text('{"prompt": "a"}\n')
    tasks.validate_files()
    assert status_of(waits) == "queued"
    for job_id, param in ((fails, "training_file"), (waits_for_both, "validation_file")):
        with transaction() as session:
            job = session.get(Job, job_id)
            assert job is not None and job.error is not None
            assert job.status == JobStatus.FAILED
            assert (job.error["param"], job.error["code"]) == (param, f"invalid_{param}")
            assert "Line 1" in job.error["message"]


@pytest.mark.usefixtures("settings")
def test_leases_are_measured_by_the_database_clock() -> None:
    job_id = add_job(add_file())
    with transaction() as session:
        jobs.claim_next(session, "a", 60)
    with transaction() as session:
        job = session.get(Job, job_id)
        assert job is not None and job.lease_until is not None
        assert 58 < job.lease_until - clock(session) <= 60
        assert jobs.expire_leases(session, 3) == []
        session.execute(update(Job).values(lease_until=now() - 0.1))
    with transaction() as session:
        assert [job.id for job in jobs.expire_leases(session, 3)] == [job_id]


@pytest.mark.usefixtures("settings")
def test_a_job_created_while_its_file_is_settled_or_deleted_is_never_stranded() -> None:
    for attempt in range(12):
        status = FileStatus.UPLOADED if attempt % 2 else FileStatus.PROCESSED
        file_id = add_file(status)
        created: list[str] = []

        def create(file_id: str = file_id, created: list[str] = created) -> None:
            created.append(add_job(file_id))

        def settle(file_id: str = file_id) -> None:
            with transaction() as session:
                files.settle_valid(session, file_id, "messages", 1)

        def remove(file_id: str = file_id) -> None:
            with transaction() as session:
                files.delete(session, "default", file_id)

        raised = at_once(create, settle if attempt % 2 else remove)
        assert all(isinstance(error, NotFound | Conflict) for error in raised), raised
        with transaction() as session:
            exists = session.get(File, file_id) is not None
        if created:
            assert exists and status_of(created[0]) == "queued"


@pytest.mark.usefixtures("settings")
def test_two_files_settled_at_once_move_their_job_on() -> None:
    for _ in range(10):
        one, two = add_file(FileStatus.UPLOADED), add_file(FileStatus.UPLOADED)
        job_id = add_job(one, validation_file=two)

        def settle(file_id: str) -> Callable[[], None]:
            def act() -> None:
                with transaction() as session:
                    files.settle_valid(session, file_id, "messages", 1)

            return act

        assert at_once(settle(one), settle(two)) == []
        assert status_of(job_id) == "queued"
