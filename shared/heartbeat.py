"""Heartbeats: files whose modification time says "this process still makes progress".

Owns `{run_dir}/heartbeats/<name>`. `anneal up` kills and restarts a child whose file stops changing, and
`anneal health NAME` reads its age. Never the truth about a job: leases in the database are.

A loop that can hang should call `Heartbeat.beat()` itself; the thread only proves that the interpreter runs.
"""

import re
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.settings import Settings

BEAT_EVERY_S = 2.0
"""How often a heartbeat is renewed."""
SILENT_AFTER_S = 15.0
"""A process that has not beaten for this long is taken for hung."""

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")


def heartbeat_path(settings: Settings, name: str) -> Path:
    """The file of one process.

    Raises:
        ValueError: the name is not a plain lower-case word.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no process name: use lower-case letters, digits, '-' and '_'")
    return settings.run_dir / "heartbeats" / name


def age(settings: Settings, name: str) -> float | None:
    """Seconds since the last beat; None if the process has not started or has stopped in good order."""
    try:
        beaten_at = heartbeat_path(settings, name).stat().st_mtime
    except FileNotFoundError:
        return None
    return max(0.0, time.time() - beaten_at)


class Heartbeat:
    """Renews one process's heartbeat from a daemon thread while the block runs.

    Leaving the block removes the file; a crash leaves it to grow old, which is the point.

    Args:
        every_s: seconds between beats; None starts no thread, and the caller beats.
    """

    def __init__(self, settings: Settings, name: str, *, every_s: float | None = BEAT_EVERY_S) -> None:
        self.name = name
        self._path = heartbeat_path(settings, name)
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """Say "alive" once. A full or vanished disk is no reason to die here: the silence will be noticed."""
        try:
            self._path.touch()  # a new time on an existing file needs no disk space
        except OSError:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.touch()
            except OSError:
                return

    def __enter__(self) -> Self:
        self.beat()
        if self._every_s is not None:
            self._thread = threading.Thread(target=self._run, name=f"heartbeat-{self._path.name}", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=BEAT_EVERY_S)
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        assert self._every_s is not None
        while not self._stopped.wait(self._every_s):
            self.beat()
