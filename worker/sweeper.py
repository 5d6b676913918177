"""`worker sweep`: looks at the database every few seconds and mends what a crash or a lost message left.

Safe in any number: every change is a guarded move. Needs no broker: without one it still expires leases.
"""

import logging
import signal
import threading
import time
from types import FrameType

import redis
from sqlalchemy.exc import SQLAlchemyError

from shared import events, files, jobs
from shared.db import clock, reading, transaction
from shared.events import Publisher
from shared.heartbeat import SILENT_AFTER_S, Heartbeat
from shared.queue import QUEUE_OF, TRAIN, VALIDATE_FILES, make_celery, send
from shared.redis_client import connect
from shared.settings import Settings

log = logging.getLogger(__name__)

MOST_HINTS = 16
"""Hints in a queue at once: idle workers take one each, and each then claims until nothing waits."""


def run(settings: Settings) -> None:
    """Sweep until SIGTERM or SIGINT."""
    stop = threading.Event()

    def ask_to_stop(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    sweeper = Sweeper(settings)
    with Heartbeat(settings, "sweep", every_s=None) as heartbeat:  # beaten here: a pass that hangs must show
        while True:
            heartbeat.beat()
            if stop.wait(min(5 * settings.poll_s, SILENT_AFTER_S / 3)):
                return
            sweeper.sweep()


class Sweeper:
    """One pass is `sweep()`; it never raises for a database or a broker that is away."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._celery = make_celery(settings)
        self._redis = connect(settings)
        self._publisher = Publisher(self._redis)
        self._last_pass = time.monotonic()
        self._no_expiry_before = 0.0

    def sweep(self) -> None:
        try:
            self.expire_leases()
            self.resend_hints()
        except SQLAlchemyError as error:
            log.warning("pass skipped, the database said: %s", error)
        except (redis.RedisError, OSError) as error:
            log.warning("hints not sent, the broker said: %s", error)

    def expire_leases(self) -> None:
        """Give back the runs of workers that fell silent.

        After a gap in our own passes nobody could renew anything: nothing expires until everybody had a whole lease.
        """
        began = time.monotonic()
        if began - self._last_pass > self._settings.lease_s / 2:
            self._no_expiry_before = began + self._settings.lease_s
        with transaction() as session:
            clock(session)  # raises while the database is away
            expired = []
            if began >= self._no_expiry_before:
                expired = jobs.expire_leases(session, self._settings.max_attempts, self._settings.retry_delay_s)
            written = events.written(session)
        self._last_pass = time.monotonic()
        for job in expired:
            log.warning("lease of %s expired; it is now %s", job.id, job.status)
        self._publisher.publish(written)

    def resend_hints(self) -> None:
        """Make sure that as many hints are on their way as rows wait, up to a handful."""
        with reading() as session:
            queued = jobs.count_claimable(session)
            unchecked = files.next_unchecked(session) is not None
        for hint, waiting in ((TRAIN, queued), (VALIDATE_FILES, int(unchecked))):
            if waiting:
                under_way = int(self._redis.llen(QUEUE_OF[hint]))  # kombu keeps a queue as a list of that name
                for _ in range(min(waiting, MOST_HINTS) - under_way):
                    send(self._celery, hint)
