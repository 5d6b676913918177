"""A trainer started ahead: whom it takes its job from, what becomes of it when it can't, and with whom it dies.

What it trains is `tests/training/test_standby.py`'s business; no imports are waited for here.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.settings import Settings
from shared.training_spec import TrainerSpec
from tests.worker.steps import wait_for
from tests.worker.test_bonds import is_locked, lives, spec_of
from worker import base_models, run_folder, standby
from worker.host_lock import HostLock
from worker.standby import Standby, StandbyTrainer, clear_folders
from worker.trainer_process import TrainerProcess


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    return Settings(data=tmp_path / "data", base_models=("nobody/nothing",), lease_s=60)


@pytest.fixture
def ahead(ours: Settings) -> Iterator[Standby]:
    """Not started: pytest changes the environment between a test and its fixtures."""
    kept = Standby(ours)
    yield kept
    kept.close()


def spec_for(settings: Settings, folder: Path, **fields: Any) -> TrainerSpec:
    values = {"leash_s": settings.lease_s / 2, "cache_dir": str(run_folder.caches(settings)), **fields}
    return spec_of(folder).model_copy(update=values)


def process_of(kept: Standby) -> StandbyTrainer:
    assert kept._trainer is not None
    return kept._trainer


def take(kept: Standby, settings: Settings, folder: Path, lock: HostLock, **fields: Any) -> TrainerProcess | None:
    return kept.take(spec_for(settings, folder, **fields), folder / "trainer.log", lock, threading.Event())


def test_the_lock_is_the_standbys_once_it_has_the_job(ahead: Standby, ours: Settings, tmp_path: Path) -> None:
    ahead.start()
    lock = HostLock.acquire(tmp_path / "lock")
    trainer = take(ahead, ours, tmp_path, lock)
    assert trainer is not None
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(lock.descriptor)
        assert is_locked(tmp_path / "lock")
        assert (tmp_path / "lock").read_text().split()[0] == str(trainer.pid)
        trainer.send(signal.SIGSTOP)
        HostLock.acquire(tmp_path / "lock", limit_s=5).close()  # the next claim's supervisor ends it by its number
        assert trainer.exit_status() == -signal.SIGKILL
    finally:
        trainer.close()
    assert list(run_folder.standbys(ours).iterdir()) == []


def test_a_cancel_right_after_the_hand_over_is_obeyed(ahead: Standby, ours: Settings, tmp_path: Path) -> None:
    ahead.start()
    trainer = take(ahead, ours, tmp_path, HostLock.acquire(tmp_path / "lock"))
    assert trainer is not None
    try:
        trainer.send(signal.SIGUSR1)
        wait_for(lambda: trainer.exit_status() is not None, 30)
        assert trainer.exit_status() == 0
        assert b'{"type":"stopped","reason":"cancelled","step":0}' in trainer.drain()
    finally:
        trainer.close()


def test_a_claim_that_is_lost_ends_the_standby_that_took_it(ours: Settings, tmp_path: Path) -> None:
    short = ours.model_copy(update={"lease_s": 3.0, "heartbeat_s": 1.0})
    kept = Standby(short)
    kept.start()
    lost = threading.Event()
    lock = HostLock.acquire(tmp_path / "lock")
    trainer = kept.take(spec_for(short, tmp_path), tmp_path / "trainer.log", lock, lost)
    assert trainer is not None
    try:
        trainer.read_lines(2)
        assert trainer.exit_status() is None
        lost.set()
        wait_for(lambda: trainer.exit_status() is not None, 15)
        assert trainer.exit_status() == -signal.SIGKILL
    finally:
        trainer.close()


@pytest.mark.parametrize("harm", ["killed", "stopped", "stale environment", "another leash"])
def test_a_standby_that_is_no_use_is_gone_and_leaves_the_lock(
    harm: str, ahead: Standby, ours: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby, "HAND_OVER_LIMIT_S", 1.0)
    ahead.start()
    process, fields = process_of(ahead), {}
    match harm:
        case "killed":
            os.kill(process.pid, signal.SIGKILL)
            wait_for(lambda: process.exit_status() is not None)
        case "stopped":
            process.send(signal.SIGSTOP)
        case "stale environment":
            monkeypatch.setenv("OMP_NUM_THREADS", "1")
        case _:
            fields = {"leash_s": 1.0}
    with HostLock.acquire(tmp_path / "lock") as lock:
        assert take(ahead, ours, tmp_path, lock, **fields) is None
        assert not lives(process.pid)
        assert is_locked(tmp_path / "lock"), "by us"
    assert not is_locked(tmp_path / "lock")
    assert list(run_folder.standbys(ours).iterdir()) == []
    ahead.start()
    assert process_of(ahead).exit_status() is None, "the next job finds another"


def test_a_standby_dies_with_its_worker_even_if_it_was_stopped(ours: Settings) -> None:
    script = (
        "import sys, time; from pathlib import Path; from shared.settings import Settings\n"
        "from worker.standby import Standby\n"
        "kept = Standby(Settings(data=Path(sys.argv[1]))); kept.start()\n"
        "print(kept._trainer.pid, flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", script, str(ours.data)], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    process = int(worker.stdout.readline())
    try:
        time.sleep(1.5)  # `die_with_parent` comes first, but not before the interpreter
        os.kill(process, signal.SIGSTOP)
        worker.kill()
        worker.wait()
        wait_for(lambda: not lives(process), 10)
    finally:
        worker.kill()
        if lives(process):
            os.kill(process, signal.SIGKILL)
    assert len(list(run_folder.standbys(ours).iterdir())) == 1
    clear_folders(ours)
    assert list(run_folder.standbys(ours).iterdir()) == []


def test_a_folder_in_use_is_not_cleared(ahead: Standby, ours: Settings) -> None:
    ahead.start()
    clear_folders(ours)
    assert len(list(run_folder.standbys(ours).iterdir())) == 1


def test_it_knows_no_secret(ahead: Standby, monkeypatch: pytest.MonkeyPatch, ours: Settings) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-that-must-not-show")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/where/the/operator/says")
    ahead.start()
    environment = Path(f"/proc/{process_of(ahead).pid}/environ").read_bytes().split(b"\0")
    assert not any(b"a-secret" in variable for variable in environment)
    assert f"TORCHINDUCTOR_CACHE_DIR={run_folder.caches(ours)}/inductor".encode() in environment
    assert b"TRITON_CACHE_DIR=/where/the/operator/says" in environment


def test_no_weights_are_loaded_ahead_of_a_memory_limit(
    ahead: Standby, ours: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_models, "at_hand", lambda _settings: tmp_path)
    ahead.start()
    process = process_of(ahead)
    assert process._order(ours).base_model_dir == str(tmp_path)
    assert process._order(ours.model_copy(update={"trainer_memory_bytes": 2**30})).base_model_dir is None


@pytest.mark.parametrize(("device", "cores", "started"), [("cpu", 64, 0), ("NVIDIA H100", 8, 1), ("NVIDIA H100", 2, 0)])
def test_beside_a_running_job_it_is_started_only_where_the_job_does_not_need_the_processor(
    device: str, cores: int, started: int, ours: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead:
        def exit_status(self) -> int:
            return 1

    begun: list[Dead] = []
    monkeypatch.setattr(standby, "StandbyTrainer", lambda _settings: begun.append(Dead()) or begun[-1])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    kept = Standby(ours)
    for _ in range(3):
        kept.stepping(device)
    assert len(begun) == started, "once a job, even if it dies"
