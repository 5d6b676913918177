"""What the sweep mends, on real storage and databases: garbage, lost hints, competing sweeps."""

import socket
import threading
import time
from collections.abc import Callable

import pytest
from sqlalchemy import delete, select, update

from shared import jobs, storage
from shared.db import transaction
from shared.ids import new_id
from shared.models import Checkpoint, File, FileStatus, Job, Model, Sweep
from shared.settings import Settings
from tests.campaign.toy_trainer import COMMAND
from tests.rows import file_row, stored_file
from tests.worker.steps import claim, job_of
from worker import supervisor, tasks
from worker.sweeper import Sweeper


@pytest.fixture
def impatient(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Whatever no row names is garbage at once."""
    monkeypatch.setenv("ANNEAL_GARBAGE_AGE_S", "0")
    return Settings()


def collect(settings: Settings) -> int:
    sweeper = Sweeper(settings)
    sweeper.expire_leases()  # learns which database this is
    return sweeper.collect_garbage()


def stored_files(settings: Settings) -> set[str]:
    return {file_id for file_id, _ in storage.list_files(settings)}


def stored_checkpoints(settings: Settings) -> set[str]:
    return {location for location, _ in storage.list_checkpoints(settings)}


def test_files_and_checkpoints_without_a_row_are_removed_and_all_others_stay(
    impatient: Settings, submit: Callable[..., str]
) -> None:
    job_id = submit(steps=6, save_steps=2)
    supervisor.supervise(claim(impatient), impatient, COMMAND)
    assert job_of(job_id).status == "succeeded"
    kept_files, kept_checkpoints = stored_files(impatient), stored_checkpoints(impatient)
    assert len(kept_files) == 2 and len(kept_checkpoints) == 3
    storage.save_file(impatient, new_id("file"), [b"an upload whose row was never written"], max_bytes=100)
    with transaction() as session:  # as if the worker had died after retiring it
        forgotten = session.scalars(select(Checkpoint.location).where(Checkpoint.step == 2)).one()
        session.execute(delete(Checkpoint).where(Checkpoint.step == 2))
        session.execute(delete(Model).where(Model.location == forgotten))
    assert collect(impatient) == 2
    assert stored_files(impatient) == kept_files
    assert stored_checkpoints(impatient) == kept_checkpoints - {forgotten}
    assert collect(impatient) == 0


def test_what_may_still_get_its_row_is_spared(
    impatient: Settings, settings: Settings, submit: Callable[..., str]
) -> None:
    job_id = submit()
    job = claim(impatient)
    published = storage.staging_dir(impatient, job_id, job.fence) / "3"
    published.mkdir(parents=True)
    earlier = storage.staging_dir(impatient, job_id, 0) / "2"
    earlier.mkdir(parents=True)
    assert collect(settings) == 0, "an hour has not passed"
    assert collect(impatient) == 1
    assert published.is_dir(), "the running claim may be about to register it"
    assert not earlier.exists(), "no claim can register it any more"
    with transaction() as session:
        jobs.fail(session, job_id, job.fence, "trainer_error", "it was not to be")
    assert collect(impatient) == 1
    assert not published.exists()


def test_the_storage_of_another_database_is_left_alone(impatient: Settings) -> None:
    collect(impatient)
    with transaction() as session:  # as if ANNEAL_DATABASE_URL named a new, empty database
        session.execute(update(Sweep).values(instance="another"))
    storage.save_file(impatient, "file-of-the-first", [b"x"], max_bytes=1)
    assert collect(impatient) == 0
    assert "file-of-the-first" in stored_files(impatient)


def test_sweeps_in_any_number_give_a_job_back_once(settings: Settings, submit: Callable[..., str]) -> None:
    job_ids = [submit() for _ in range(5)]
    for _ in job_ids:
        claim(settings)
    Sweeper(settings).expire_leases()
    with transaction() as session:
        session.execute(update(Sweep).values(no_expiry_before=0))
        session.execute(update(Job).values(lease_until=0))
    sweepers = [Sweeper(settings) for _ in range(6)]
    threads = [threading.Thread(target=sweeper.sweep) for sweeper in sweepers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(job_of(job_id).status, job_of(job_id).faults) for job_id in job_ids] == [("queued", 1)] * 5


def test_a_job_that_takes_every_worker_down_fails_in_the_end(
    settings: Settings, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANNEAL_MAX_FAULTS", "2")
    strict = Settings()
    job_id = submit()
    for _ in range(2):
        claim(strict)
        Sweeper(strict).expire_leases()
        with transaction() as session:
            session.execute(update(Sweep).values(no_expiry_before=0))
            session.execute(update(Job).values(lease_until=0))
        Sweeper(strict).expire_leases()
    job = job_of(job_id)
    assert job.status == "failed" and job.error is not None
    assert job.error["code"] == "infrastructure_fault" and "fell silent" in job.error["message"]


def test_a_files_bytes_are_not_garbage_while_its_row_lives(impatient: Settings) -> None:
    stored_file(impatient, b"x")
    assert collect(impatient) == 0
    with transaction() as session:
        session.execute(delete(File))
    assert collect(impatient) == 1


def test_a_broker_that_never_answers_does_not_hold_up_the_leases(
    settings: Settings, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("ANNEAL_REDIS_URL", f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        sweeper = Sweeper(Settings())
        submit()
        began = time.monotonic()
        for _ in range(3):
            sweeper.sweep()
        assert time.monotonic() - began < 2


def test_a_populated_storage_is_claimed_only_by_a_database_that_knows_it(impatient: Settings) -> None:
    storage.save_file(impatient, "file-of-somebody", [b"x"], max_bytes=1)
    assert collect(impatient) == 0
    assert storage.owner(impatient) is None
    assert "file-of-somebody" in stored_files(impatient)


def test_files_on_a_storage_that_is_away_wait_and_are_not_called_invalid(settings: Settings) -> None:
    with transaction() as session:  # its bytes are on a folder that is not mounted here
        file_id = file_row(session, status=FileStatus.UPLOADED)
    tasks.validate_files()
    with transaction() as session:
        assert session.get_one(File, file_id).status == FileStatus.UPLOADED
