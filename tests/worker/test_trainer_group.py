"""Everything a trainer started ends with it, and a trainer with its supervisor, even one that can't run a line."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from tests.waiting import is_alive, wait_until
from tests.worker.test_bonds import spec_of
from worker.host_lock import HostLock
from worker.trainer_process import TrainerProcess

SUPERVISOR = """
import sys, threading, time
from pathlib import Path
from tests.worker.test_bonds import spec_of
from tests.campaign.toy_trainer import COMMAND
from worker.host_lock import HostLock
from worker.trainer_process import TrainerProcess
folder = Path(sys.argv[1])
lock = HostLock.acquire(folder / "lock")
trainer = TrainerProcess(spec_of(folder, 60), folder / "trainer.log", lock, threading.Event(), COMMAND)
while b'"metrics"' not in b"".join(trainer.read_lines(0.2)): pass
print(trainer.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _repository_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))


def test_what_a_trainer_started_is_gone_once_it_was_killed(tmp_path: Path) -> None:
    script = "import subprocess, time; subprocess.Popen(['sleep', '300']); time.sleep(300)"
    lock = HostLock.acquire(tmp_path / "lock")
    command = (sys.executable, "-c", script)
    trainer = TrainerProcess(spec_of(tmp_path), tmp_path / "trainer.log", lock, threading.Event(), command)
    try:
        wait_until(lambda: bool(psutil.Process(trainer.pid).children()))
        (started,) = psutil.Process(trainer.pid).children()
        trainer.kill()
        wait_until(lambda: not is_alive(started.pid))
    finally:
        trainer.close()


def test_a_trainer_that_was_stopped_dies_with_its_killed_supervisor(tmp_path: Path) -> None:
    # Stopped, it can't look at its leash: the kernel alone can end it.
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(tmp_path)], stdout=subprocess.PIPE)
    assert supervisor.stdout is not None
    trainer = int(supervisor.stdout.readline())
    try:
        os.kill(trainer, signal.SIGSTOP)
        supervisor.kill()
        supervisor.wait()
        wait_until(lambda: not is_alive(trainer))
    finally:
        supervisor.kill()
        if is_alive(trainer):
            os.kill(trainer, signal.SIGKILL)
