"""One trainer for one job on this host, for certain: a lock that lives exactly as long as the trainer does.

    supervisor opens the file, locks it, starts the trainer with the descriptor, writes the trainer's number, closes
    its own copy; from then on the lock is the trainer's alone, and the kernel frees it when the trainer is gone

The lease in the database decides who may run a job. It can't end the trainer of a supervisor that was stopped for
longer than its lease; the next supervisor of the same job on the same host finds the lock held, and ends it.
"""

import contextlib
import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Self

EVICTION_LIMIT_S = 30.0
"""How long a trainer that was sent SIGKILL may take to vanish: the kernel may be writing its memory to a device."""
PAUSE_S = 0.05
NOTE_BYTES = 64


class LockHeld(Exception):
    """Somebody holds the job's lock and can't be made to let go."""


class HostLock:
    """The lock of one job, held by whoever has `descriptor` open; leaving the block lets go of our own copy."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def acquire(cls, path: Path, limit_s: float = EVICTION_LIMIT_S) -> Self:
        """Take the lock, from a trainer that an earlier claim has left behind if need be.

        Raises:
            LockHeld: it is still held after `limit_s`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + limit_s
        try:
            while not _locked(descriptor):
                _end_holder(descriptor)
                if time.monotonic() > deadline:
                    raise LockHeld(f"{path} is held by {_read(descriptor) or 'an unknown process'}")
                time.sleep(PAUSE_S)
            # Room for what `give_to` will note: a disk that is full must say so before the trainer runs, not after.
            os.pwrite(descriptor, b" " * NOTE_BYTES, 0)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def give_to(self, pid: int) -> None:
        """Note who holds it from now on, and let go of our own copy."""
        self.note(pid)
        self.close()

    def note(self, pid: int) -> None:
        """Write down who is to be ended by whoever finds the lock held."""
        with contextlib.suppress(FileNotFoundError):
            os.pwrite(self.descriptor, f"{pid} {_birth(pid)}".ljust(NOTE_BYTES).encode(), 0)

    def close(self) -> None:
        if self._open:
            self._open = False
            os.close(self.descriptor)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock of this file or folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _locked(descriptor)
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(descriptor: int) -> str:
    return os.pread(descriptor, NOTE_BYTES, 0).decode(errors="replace").strip()


def _end_holder(descriptor: int) -> None:
    """Kill the group of the trainer named in the file, if that number is still the process it was."""
    try:
        pid, born = _read(descriptor).split()
        if _birth(int(pid)) == born:
            os.killpg(int(pid), signal.SIGKILL)
    except (ValueError, FileNotFoundError, ProcessLookupError, PermissionError):
        return  # nobody yet, or no longer


def _birth(pid: int) -> str:
    """What tells this process from a later one of the same number: clock ticks after the boot, and which boot it was.

    Not a time of day: the host's clock may be set meanwhile.
    """
    stat = Path(f"/proc/{pid}/stat").read_text()
    ticks = stat.rpartition(")")[2].split()[19]  # field 22; the name in parentheses may hold anything
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return f"{ticks}-{boot}"
