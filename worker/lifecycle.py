"""Living and dying of worker processes: nobody outlives a parent, and a shutdown reaches whoever runs a trainer.

Celery's main process gets the operator's SIGTERM; the trainer's supervisor lives in a pool child that Celery leaves
alone until its task ends. `shutdown` is a pipe made before the fork: the main process writes, the child looks.
"""

import ctypes
import mmap
import os
import select
import signal
import struct
import time

import psutil

_PID = struct.Struct("q")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, and die now if that has already happened.

    The kernel watches the parent's *thread*: children must be started from a thread that lives as long as they do.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


class Shutdown:
    """A flag that crosses a fork and wakes a selector. Set once, never cleared."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)

    def fileno(self) -> int:
        """Readable from the moment the flag is set."""
        return self._reader

    def set(self) -> None:
        os.write(self._writer, b"x")

    def is_set(self) -> bool:
        return self.wait(0)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the flag for at most so long; whether it is set."""
        # `select` takes no descriptor past 1023.
        poller = select.poll()
        poller.register(self._reader, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))


shutdown = Shutdown()


class Working:
    """Whether the pool child is in a task: the child writes its number, the main process looks.

    In memory shared across the fork. A child that died in a task is in none any more.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _PID.size)

    def set(self, working: bool) -> None:
        _PID.pack_into(self._memory, 0, os.getpid() if working else 0)

    def is_set(self) -> bool:
        (pid,) = _PID.unpack_from(self._memory, 0)
        if not pid:
            return False
        try:
            return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return False


working = Working()

_survivor: int | None = None
QUARANTINE_LOOK_S = 5.0


def quarantine(group: int) -> None:
    """Note a process group that outlived SIGKILL, stuck in a driver perhaps, and still holding the GPU."""
    global _survivor
    _survivor = group


def wait_out_quarantine() -> None:
    """Return once there is no such group. Meanwhile this worker's one slot is taken: it claims and consumes nothing."""
    global _survivor
    while _survivor is not None and not shutdown.is_set():
        try:
            os.killpg(_survivor, 0)
        except (ProcessLookupError, PermissionError):
            _survivor = None
        else:
            time.sleep(QUARANTINE_LOOK_S)
