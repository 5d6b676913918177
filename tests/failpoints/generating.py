"""A generator for the scenarios of batches: a process without a model that speaks the real protocol.

It is forked before anything is hooked, so that its own effects are no points, and lives from the preparation to the
end of the checks. What it was asked, and when that was submitted, it writes down.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from shared.settings import Settings
from tests.fake_generator import FakeGenerator
from worker import lifecycle
from worker.generation.mailbox import Delivery


class _WhenThere(threading.Event):
    """Set as soon as a file is there: whoever sets it may be another process, and dead by now."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def is_set(self) -> bool:
        return self._path.exists()


class _Noting(FakeGenerator):
    def __init__(self, settings: Settings, asked: Path, released: Path) -> None:
        super().__init__(settings)
        self._asked_path = asked
        self.release = _WhenThere(released)

    async def _answer(self, delivery: Delivery) -> None:
        body = delivery.request.body
        note = {
            "text": body["messages"][-1]["content"],
            "submitted_at": int(delivery.entry_id.split(b"-")[0]) / 1000,
        }
        with self._asked_path.open("a") as stream:
            stream.write(json.dumps(note) + "\n")
        await super()._answer(delivery)


@contextlib.contextmanager
def generator(settings: Settings, asked: Path, released: Path) -> Iterator[int]:
    """A generator that answers as `FakeGenerator` does, `hold …` once `released` is there. Yields its process id."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            lifecycle.die_with_parent(parent)
            with _Noting(settings, asked, released):
                while True:
                    time.sleep(60)
        finally:
            os._exit(1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
