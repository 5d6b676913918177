"""A trainer kept ready for the next job: started ahead, handed a job and its lock, replaced.

    started ── imports, weights ── waits ─┬─ a job comes: takes spec and lock, trains, ends with it
                                          └─ dead, deaf, or no longer what a fresh one would be: killed

Nothing depends on one: whoever gets none starts a fresh trainer. One process, one job, as ever; it is started like any
trainer, with the same bonds, and its hand-over keeps their order: the lock's file names it, then it has the lock, then
it trains. Main thread only.
"""

import fcntl
import logging
import os
import shutil
import socket
import sysconfig
import threading
import time
import uuid
from pathlib import Path

from shared.settings import Settings
from shared.training_spec import TrainerSpec
from worker import base_models, lifecycle, run_folder
from worker.host_lock import HostLock
from worker.trainer_process import TRAINER, Leash, TrainerProcess, TrainerSurvives, environment_for
from worker.training.standby import STANDBY_FD, TAKEN, StandbySpec

log = logging.getLogger(__name__)

HAND_OVER_LIMIT_S = 30.0
"""How long a standby may take to answer. Its imports hold the interpreter for a second or two at a time, the start of
CUDA on a host with many GPUs for longer. A dead one is known at once."""
FEW_CORES = 4
"""With fewer, imports beside a running job take a core that it needs."""
SOURCES = Path(__file__).parents[1]


class StandbyTrainer(TrainerProcess):
    """One trainer started ahead. After `hand_over` it is the job's trainer."""

    def __init__(self, settings: Settings) -> None:
        self._folder = _Folder(settings)
        self._log_file = None
        self._connection, theirs = socket.socketpair()
        self._leash_s = settings.lease_s / 2
        cache_dir = str(run_folder.caches(settings))
        try:
            self._born_as = _what_a_fresh_one_is(cache_dir)
            descriptors = theirs.fileno(), self._folder.descriptor
            self._spawn(TRAINER, str(self._folder.path), descriptors, cache_dir, **{STANDBY_FD: str(theirs.fileno())})
        except BaseException:
            self._connection.close()
            self._folder.remove()
            raise
        finally:
            theirs.close()
        self._leash = Leash(self._process, lambda: self._order(settings).model_dump_json().encode(), threading.Event())

    def hand_over(self, spec: TrainerSpec, log_path: Path, lock: HostLock, claim_lost: threading.Event) -> bool:
        """Make it this job's trainer. False: it is gone, and the lock still ours.

        Raises:
            TrainerSurvives: it could neither take the job nor be killed.
        """
        if self.exit_status() is not None or not self._is_as_fresh_for(spec):
            log.warning("the standby %d is not used: it died, or a fresh trainer would be another", self.pid)
            self.close()
            return False
        try:
            self._log_file = log_path.open("ab", buffering=0)
            for _ in range(self._waiting_reads):
                self.read_lines(0)  # what it has printed; that it was alive
            self._leash.ends_with(claim_lost)
            lock.note(self.pid)
            self._send(spec, lock)
        except OSError as error:  # a timeout is one
            how = self._how_it_is()
            log.warning("the standby %d did not take job %s: %s; %s", self.pid, spec.job_id, error, how)
            self.close()
            return False
        except BaseException:
            self.close()
            raise
        lock.close()
        self.heard_at = time.monotonic()
        return True

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._connection.close()
            self._folder.remove()

    def _how_it_is(self) -> str:
        """For the log of a standby that is no use, before it is killed."""
        deadline = time.monotonic() + 1  # its descriptors are closed a moment before its end can be seen
        while self.exit_status() is None and time.monotonic() < deadline:
            self.read_lines(0.05)
        status = self.exit_status()
        ended = "it runs" if status is None else f"its exit status is {status}"
        return f"{ended}; its last output: {self.last_output() or 'none'}"

    _waiting_reads = 4
    """A pipe holds 64 KiB, which is one read of each."""

    def _order(self, settings: Settings) -> StandbySpec:
        base = None
        if settings.trainer_memory_bytes is None:  # else a job's limit counts the weights that it loads
            try:
                base = base_models.at_hand(settings)
            except Exception:
                log.exception("no base model is loaded ahead")
        base_dir = None if base is None else str(base)
        return StandbySpec(folder=str(self._folder.path), base_model_dir=base_dir, leash_s=self._leash_s)

    def _is_as_fresh_for(self, spec: TrainerSpec) -> bool:
        try:
            return spec.leash_s == self._leash_s and _what_a_fresh_one_is(spec.cache_dir) == self._born_as
        except OSError:  # sources that are being replaced this moment
            return False

    def _send(self, spec: TrainerSpec, lock: HostLock) -> None:
        line = spec.model_dump_json().encode() + b"\n"
        self._connection.settimeout(HAND_OVER_LIMIT_S)
        sent = socket.send_fds(self._connection, [line], [lock.descriptor])
        if sent < len(line):  # whoever has all of it may have answered and gone on: sending nothing would be an EPIPE
            self._connection.sendall(line[sent:])
        if self._connection.recv(len(TAKEN)) != TAKEN:
            raise ConnectionResetError("it ended")


class Standby:
    """The one that this worker keeps, if any."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._trainer: StandbyTrainer | None = None
        self._tried_beside_job = False

    def start(self) -> None:
        """Have one that lives. A failure is no job's: it is logged."""
        if lifecycle.shutdown.is_set() or (self._trainer is not None and self._trainer.exit_status() is None):
            return
        try:
            self.close()
            clear_folders(self._settings)
            self._trainer = StandbyTrainer(self._settings)
        except TrainerSurvives as error:
            log.critical("%s; this worker claims nothing until it is gone", error)
            lifecycle.quarantine(error.group)
            lifecycle.wait_out_quarantine()
        except Exception:
            log.exception("no trainer could be started ahead")

    def stepping(self, device: str) -> None:
        """The running job has made a step: on a GPU the next trainer starts now, its imports being the CPU's work."""
        if self._tried_beside_job or device == "cpu" or len(os.sched_getaffinity(0)) < FEW_CORES:
            return
        self._tried_beside_job = True  # once, for this is called at each step and what failed would fail again
        if self._trainer is None:
            self.start()

    def take(
        self, spec: TrainerSpec, log_path: Path, lock: HostLock, claim_lost: threading.Event
    ) -> TrainerProcess | None:
        """The job's trainer, or None if a fresh one must be started. As `StandbyTrainer.hand_over`."""
        trainer, self._trainer = self._trainer, None
        self._tried_beside_job = False
        if trainer is not None and trainer.hand_over(spec, log_path, lock, claim_lost):
            return trainer
        return None

    def close(self) -> None:
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            trainer.close()


_ours: Standby | None = None


def keep(settings: Settings) -> None:
    """From now on this worker keeps a standby."""
    global _ours
    if settings.standby_trainer:
        _ours = Standby(settings)
        _ours.start()


def kept() -> Standby | None:
    """What `keep` began."""
    return _ours


class _Folder:
    """A standby's scratch folder, locked by it for as long as it lives."""

    def __init__(self, settings: Settings) -> None:
        while True:
            self.path = run_folder.standbys(settings) / uuid.uuid4().hex[:12]
            self.path.mkdir(mode=0o700, parents=True)
            try:
                self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # not locked yet, it looked left behind to another worker
            fcntl.flock(self.descriptor, fcntl.LOCK_SH)
            if self.path.exists():
                return
            os.close(self.descriptor)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.descriptor)


def clear_folders(settings: Settings) -> None:
    """Remove the folders that killed standbys have left behind."""
    for path in run_folder.standbys(settings).glob("*"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # somebody's
        finally:
            os.close(descriptor)


def _what_a_fresh_one_is(cache_dir: str | None) -> tuple[object, ...]:
    """What a trainer started now would run: environment, our sources, installed packages."""
    files = [path for name in ("shared", "worker") for path in sorted((SOURCES / name).rglob("*.py"))]
    sources = tuple((str(path), at.st_size, at.st_mtime_ns) for path in files for at in (path.stat(),))
    packages = tuple(sorted(path.name for path in Path(sysconfig.get_path("purelib")).glob("*.dist-info")))
    return tuple(sorted(environment_for(cache_dir).items())), sources, packages
