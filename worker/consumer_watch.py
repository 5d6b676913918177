"""Notices a Celery worker that takes no messages any more, or does not leave when told to, and ends its process.

Deaf: a pool child was killed at the very moment a task was handed to it. The pool knows a task as lost only once a
child has accepted it; this one counts as under way for ever, and with one slot and no prefetch the consumer never asks
for another. The worker stays healthy by every other sign, and its jobs wait for other workers, if there are any. What
can't be mistaken: hints wait in the queue, look after look, while the pool child is in no task. A healthy idle worker
takes one within milliseconds, so this blames nobody for a broker that is away or a worker that is busy.

Staying: told to leave shortly after its broker came back, Celery's main process may wait for ever, its pool child
in no task any more. Messages are hints and acknowledged early, so nothing is lost by leaving without Celery's goodbye.
"""

import faulthandler
import logging
import os
import threading
import time

import redis

from shared.redis_client import connect
from shared.settings import Settings
from worker import lifecycle

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
LOOKS = 4
"""In a row, after which it is certain."""
EXIT_STATUS = 70
"""EX_SOFTWARE of sysexits.h."""
LEAVE_S = 5.0
"""How long Celery may take to leave once its pool child is in no task."""


class ConsumerWatch(threading.Thread):
    """A daemon thread of the worker's main process, the one that talks to the broker."""

    def __init__(self, settings: Settings, queue: str) -> None:
        super().__init__(name="consumer-watch", daemon=True)
        self._client = connect(settings)
        self._queue = queue
        self._looks = 0

    def run(self) -> None:
        while not self.is_wedged():
            if lifecycle.shutdown.wait(LOOK_EVERY_S):
                self._see_it_leave()
                return
        log.critical("hints wait in %s and this idle worker takes none; it ends, to be started again", self._queue)
        _end(EXIT_STATUS)  # its pool child is idle, and dies with it

    def is_wedged(self) -> bool:
        """Look once; whether this and the looks before it leave no doubt."""
        try:
            ignored = not lifecycle.working.is_set() and bool(self._client.llen(self._queue))
        except redis.RedisError:
            ignored = False  # no broker, so nobody can be blamed for taking nothing from it
        self._looks = self._looks + 1 if ignored else 0
        return self._looks >= LOOKS

    def _see_it_leave(self) -> None:
        """Ends this process if it hasn't ended by itself."""
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < LEAVE_S:
            time.sleep(LEAVE_S / 20)
            if lifecycle.working.is_set():
                idle_since = time.monotonic()
        log.error("this worker was told to leave and has nothing to do, but doesn't leave; it ends")
        faulthandler.dump_traceback(all_threads=True)
        _end(0)


def _end(status: int) -> None:
    logging.shutdown()
    os._exit(status)
