"""What ties a trainer to its supervisor: the leash, the host lock, signs of life. Real processes, real signals."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from sqlalchemy import update
from sqlalchemy.engine import make_url

from shared.db import now, reset, transaction
from shared.models import Job
from shared.settings import Settings
from shared.training_spec import TrainerSpec
from tests.campaign.sqlite_locks import SqliteLocks
from tests.campaign.toy_trainer import COMMAND
from tests.waiting import LIMIT_S, is_alive, wait_until
from tests.worker.steps import after_grace, at_step, claim, job_of, messages
from worker import lifecycle, supervisor
from worker.host_lock import HostLock, LockHeld
from worker.sweeper import Sweeper
from worker.trainer_process import TrainerProcess

LEASH_S = 3.0


def spec_of(folder: Path, leash_s: float = LEASH_S) -> TrainerSpec:
    plan = folder / "plan.json"
    plan.write_text('{"steps": 100000, "step_s": 0.05}')
    for name in ("checkpoints", "work"):
        (folder / name).mkdir(exist_ok=True)
    return TrainerSpec(
        job_id="ftjob-bonds",
        base_model="test/toy",
        base_model_dir=str(folder),
        training_file=str(plan),
        checkpoint_dir=str(folder / "checkpoints"),
        work_dir=str(folder / "work"),
        leash_s=leash_s,
    )


@contextmanager
def trainer_in(folder: Path, leash_s: float = LEASH_S) -> Iterator[tuple[TrainerProcess, threading.Event]]:
    """A running toy trainer, and the flag that says its claim is lost."""
    lost = threading.Event()
    lock = HostLock.acquire(folder / "lock")
    trainer = TrainerProcess(spec_of(folder, leash_s), folder / "trainer.log", lock, lost, COMMAND)
    try:
        wait_until(lambda: b'"metrics"' in b"".join(trainer.read_lines(0.2)))
        yield trainer, lost
    finally:
        trainer.close()


def is_locked(path: Path) -> bool:
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.fixture(autouse=True)
def _repository_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))


def test_a_trainer_lives_on_for_as_long_as_its_supervisor_shows_signs_of_life(tmp_path: Path) -> None:
    with trainer_in(tmp_path) as (trainer, _):
        deadline = time.monotonic() + 2 * LEASH_S
        while time.monotonic() < deadline:
            trainer.read_lines(0.1)
        assert trainer.exit_status() is None


def test_a_trainer_whose_claim_is_lost_ends_itself_while_its_supervisor_is_busy(tmp_path: Path) -> None:
    with trainer_in(tmp_path) as (trainer, lost):
        lost.set()
        wait_until(lambda: trainer.exit_status() is not None)
        assert trainer.exit_status() == -signal.SIGKILL


def test_a_trainer_of_a_stopped_supervisor_ends_before_the_lease_could(tmp_path: Path) -> None:
    """The supervisor is a process of its own, which can be stopped."""
    script = (
        "import sys, threading, time; from pathlib import Path; from tests.worker.test_bonds import *\n"
        "folder = Path(sys.argv[1]); lock = HostLock.acquire(folder / 'lock')\n"
        "trainer = TrainerProcess(spec_of(folder), folder / 'log', lock, threading.Event(), COMMAND)\n"
        "print(trainer.pid, flush=True)\n"
        "while True: trainer.read_lines(0.2)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        trainer = int(holder.stdout.readline())
        time.sleep(1.5)
        assert is_alive(trainer)
        holder.send_signal(signal.SIGSTOP)
        wait_until(lambda: not is_alive(trainer), 30)
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_is_held_for_exactly_as_long_as_the_trainer_lives(tmp_path: Path) -> None:
    with trainer_in(tmp_path) as (trainer, _):
        assert is_locked(tmp_path / "lock")
        trainer.kill()
        assert not is_locked(tmp_path / "lock")


def test_a_new_supervisor_ends_the_stopped_trainer_of_an_earlier_claim(tmp_path: Path) -> None:
    with trainer_in(tmp_path, leash_s=60) as (trainer, _):
        trainer.send(signal.SIGSTOP)
        lock = HostLock.acquire(tmp_path / "lock", limit_s=5)
        assert trainer.exit_status() == -signal.SIGKILL
        lock.close()


def test_a_lock_that_nobody_known_holds_is_not_broken(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(f"{os.getpid()} 1.5")  # our number, another process's birth: it was used again
    with path.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(LockHeld, match="is held by"):
            HostLock.acquire(path, limit_s=0.2)
    HostLock.acquire(path, limit_s=0.2).close()


def test_a_trainer_that_was_stopped_is_killed_and_its_job_goes_on(
    settings: Settings, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANNEAL_TRAINER_SILENT_S", "2.5")
    impatient = Settings()
    job_id = submit(steps=60, save_steps=5, step_s=0.05)
    stopped: list[int] = []

    def stop_it() -> None:
        wait_until(lambda: at_step(job_id, 7))
        toys = [p for p in psutil.Process().children() if "tests.campaign.toy_trainer" in p.cmdline()]
        toys[0].suspend()
        stopped.append(toys[0].pid)

    thread = threading.Thread(target=stop_it)
    thread.start()
    supervisor.supervise(claim(impatient), impatient, COMMAND)
    thread.join()
    assert stopped and not is_alive(stopped[0])
    assert job_of(job_id).status == "queued"
    assert any("said nothing for 2.5 s" in message for message in messages(job_id))
    supervisor.supervise(claim(settings), settings, COMMAND)
    job = job_of(job_id)
    assert job.status == "succeeded", job.error


def stop_between_transactions(process: int, settings: Settings) -> None:
    """SIGSTOP, but not while it holds SQLite's lock: that would stop everybody else, and is no part of these tests."""
    path = make_url(settings.resolved_database_url).database
    locks = SqliteLocks(Path(path)) if settings.resolved_database_url.startswith("sqlite") and path else None
    while True:
        os.kill(process, signal.SIGSTOP)
        wait_until(lambda: psutil.Process(process).status() == psutil.STATUS_STOPPED)
        if locks is None or process not in locks.holders():
            return
        os.kill(process, signal.SIGCONT)
        time.sleep(0.01)


def test_a_supervisor_stopped_past_its_lease_commits_nothing_and_its_successor_finishes(
    settings: Settings, submit: Callable[..., str]
) -> None:
    job_id = submit(steps=40, save_steps=4, step_s=0.05)
    child = os.fork()
    if child == 0:
        reset()
        supervisor.supervise(claim(settings), settings, COMMAND)
        os._exit(0)
    try:
        wait_until(lambda: at_step(job_id, 6))
        stop_between_transactions(child, settings)
        after_grace(settings)
        with transaction() as session:
            session.execute(update(Job).where(Job.id == job_id).values(lease_until=now() - 1))
        Sweeper(settings).expire_leases()
        supervisor.supervise(claim(settings), settings, COMMAND)
        finished = job_of(job_id)
        told = messages(job_id)
        assert (finished.status, finished.fence) == ("succeeded", 2)
        os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, 0)
        child = 0
        assert status == 0, "a worker that lost its claim lives on"
        assert job_of(job_id).updated_at == finished.updated_at
        assert messages(job_id) == told
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_worker_whose_trainer_outlives_sigkill_claims_nothing_until_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lifecycle, "QUARANTINE_LOOK_S", 0.05)
    survivor = subprocess.Popen(["sleep", "60"], start_new_session=True)  # none really outlives SIGKILL on demand
    lifecycle.quarantine(survivor.pid)
    waiting = threading.Thread(target=lifecycle.wait_out_quarantine)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    survivor.kill()
    survivor.wait()
    waiting.join(LIMIT_S)
    assert not waiting.is_alive()
    lifecycle.wait_out_quarantine()  # and never again
