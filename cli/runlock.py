"""One `anneal up` per data folder: an exclusive flock that the kernel releases however its holder ends."""

import fcntl
import os
from pathlib import Path


class FolderInUse(Exception):
    """The message names the process that holds the folder."""


class RunLock:
    """Holds `{run_dir}/lock` until the process ends; the file holds the holder's process id.

    Raises:
        FolderInUse: another process holds it.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "lock"
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited: children must not hold it
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            raise FolderInUse(
                f"{run_dir.parent} is in use by another `anneal up`, process {holder}: "
                "stop that one, or choose another folder with --data"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let the next one in. The file stays: removing it would race with whoever has just opened it."""
        os.close(self._descriptor)
