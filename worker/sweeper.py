"""`worker sweep`: looks at the database every few seconds and mends what a crash or a lost message left.

Safe in any number: every change is a guarded move. Needs no broker: without one it still expires leases.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import redis
from sqlalchemy.exc import SQLAlchemyError

from shared import batches, events, files, jobs, sweeps
from shared.db import reading, transaction
from shared.errors import AppError
from shared.events import Publisher
from shared.heartbeat import SILENT_AFTER_S, Heartbeat
from shared.models import Batch, Job
from shared.queue import QUEUE_OF, RUN_BATCHES, TRAIN, VALIDATE_FILES, make_celery, send
from shared.redis_client import connect
from shared.settings import Settings
from worker import expiry, garbage

log = logging.getLogger(__name__)

MOST_HINTS = 16
"""Hints in a queue at once: idle workers take one each, and each then claims until nothing waits."""
COLLECT_EVERY_S = 600.0
"""Between two collections of garbage by one sweep; oftener where garbage is called so sooner."""


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
            # Far oftener than the half lease that looks like an outage.
            if stop.wait(min(5 * settings.poll_s, SILENT_AFTER_S / 3, settings.lease_s / 8)):
                return
            sweeper.sweep()


class Sweeper:
    """One pass is `sweep()`; it never raises for a database or a broker that is away."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._celery = make_celery(settings)
        self._redis = connect(settings)
        self._publisher = Publisher(self._redis)
        self._collected_at = time.monotonic()
        self._beside: dict[str, threading.Thread] = {}
        self._instance: str | None = None

    def sweep(self) -> None:
        """Expire leases here and now; a broker that hangs, or a storage that is large, must not hold that up."""
        try:
            self.expire_leases()
        except SQLAlchemyError as error:
            log.warning("pass skipped, the database said: %s", error)
            return
        self._start("hints", self._try_to_resend_hints)
        self._start("expiry", self.remove_expired)
        is_due = time.monotonic() - self._collected_at > min(COLLECT_EVERY_S, self._settings.garbage_age_s)
        if is_due and self._start("garbage", self.collect_garbage):
            self._collected_at = time.monotonic()

    def expire_leases(self) -> None:
        """Give back the runs of workers that fell silent, unless silence may have been an outage (`shared.sweeps`)."""
        with transaction() as session:
            this_pass = sweeps.begin_pass(session, self._settings.lease_s)
            expired: list[Job | Batch] = []
            if this_pass.may_expire:
                expired += jobs.expire_leases(session, self._settings.max_faults, self._settings.retry_delay_s)
                expired += batches.expire_leases(session, self._settings.max_faults)
            written = events.written(session)
        self._instance = this_pass.instance
        for row in expired:
            log.warning("lease of %s expired; it is now %s", row.id, row.status)
        self._publisher.publish(written)

    def resend_hints(self) -> None:
        """Make sure that as many hints are on their way as rows wait, up to a handful."""
        with reading() as session:
            queued = jobs.count_claimable(session)
            unchecked = files.next_unchecked(session) is not None
            idle = batches.count_claimable(session)
        for hint, waiting in ((TRAIN, queued), (VALIDATE_FILES, int(unchecked)), (RUN_BATCHES, int(idle > 0))):
            if waiting:
                under_way = int(self._redis.llen(QUEUE_OF[hint]))  # kombu keeps a queue as a list of that name
                for _ in range(min(waiting, MOST_HINTS) - under_way):
                    send(self._celery, hint)

    def remove_expired(self) -> int:
        """Remove files, uploads and answers that have had their time. Returns how many files and parts that were."""
        try:
            return expiry.remove_expired(self._settings)
        except (SQLAlchemyError, AppError, OSError) as error:
            log.warning("not everything that expired is removed: %s", error)
            return 0

    def collect_garbage(self) -> int:
        """Remove bytes that no row names. Returns how many files and folders that were."""
        try:
            return 0 if self._instance is None else garbage.collect(self._settings, self._instance)
        except (SQLAlchemyError, AppError, OSError) as error:
            log.warning("garbage not collected: %s", error)
            return 0

    def _try_to_resend_hints(self) -> None:
        try:
            self.resend_hints()
        except (SQLAlchemyError, redis.RedisError, OSError) as error:
            log.warning("hints not sent: %s", error)

    def _start(self, name: str, work: Callable[[], object]) -> bool:
        """Begin work beside the passes, unless it still goes on from an earlier one. Returns whether it began."""
        running = self._beside.get(name)
        if running is not None and running.is_alive():
            return False
        self._beside[name] = threading.Thread(target=work, name=name, daemon=True)
        self._beside[name].start()
        return True
