"""The Celery app and the hints sent through it.

A message is a hint that work waits, never the work: it names no job. Losing one costs seconds (the sweep re-sends),
receiving one twice costs nothing (the second finds nothing to claim). The settings follow from how Celery behaves on
Redis: late acknowledgement repeats long tasks and loops poison ones, so acknowledgement is early and truth elsewhere.
"""

import logging
import queue
import threading
import time
from contextlib import suppress

from celery import Celery
from kombu.exceptions import OperationalError as BrokerError

from shared.settings import Settings

log = logging.getLogger(__name__)

TRAIN = "anneal.train"
VALIDATE_FILES = "anneal.validate_files"
RUN_BATCHES = "anneal.run_batches"
QUEUE_OF = {TRAIN: "train", VALIDATE_FILES: "batch", RUN_BATCHES: "batch"}

BURST = 16
PACE_S = 0.1
MOST_WAITING = 64
SOCKET_TIMEOUT_S = 5
SOCKET_CONNECT_TIMEOUT_S = 2


def make_celery(settings: Settings) -> Celery:
    """The app both sides share: workers register tasks on it, everybody else sends by name."""
    # kombu spells a unix socket with its own scheme.
    broker = settings.resolved_redis_url
    if broker.startswith("unix://"):
        broker = broker.replace("unix://", "redis+socket://", 1)
    app = Celery("anneal", broker=broker)
    app.conf.update(
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue="train",
        task_routes={name: {"queue": target} for name, target in QUEUE_OF.items()},
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_remote_control=False,  # cancel goes through the database
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "socket_timeout": SOCKET_TIMEOUT_S,
            "socket_connect_timeout": SOCKET_CONNECT_TIMEOUT_S,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "visibility_timeout": 3600,
        },
    )
    return app


class Outbox:
    """Sends hints from a thread of its own, so that no request ever waits for the broker.

    A burst of jobs needs no more hints than there may be idle workers, for each of them works until nothing waits: some
    go out at once, the next at a pace, those beyond a bound not at all. The last ones to come are always sent.
    """

    def __init__(self, celery: Celery) -> None:
        self._celery = celery
        self._hints: queue.Queue[str | None] = queue.Queue(maxsize=MOST_WAITING)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def training_waits(self) -> None:
        """A job was queued. Call after the commit: the worker must find the row."""
        self._put(TRAIN)

    def files_wait(self) -> None:
        """A file was stored that nobody has checked yet."""
        self._put(VALIDATE_FILES)

    def batches_wait(self) -> None:
        """A batch was created, or one that nobody runs has to be ended."""
        self._put(RUN_BATCHES)

    def close(self) -> None:
        """Send what waits, for at most a few seconds."""
        self._closing.set()
        with suppress(queue.Full):
            self._hints.put(None, timeout=SOCKET_CONNECT_TIMEOUT_S)
        self._thread.join(timeout=SOCKET_CONNECT_TIMEOUT_S)

    def _put(self, hint: str) -> None:
        try:
            self._hints.put_nowait(hint)
        except queue.Full:
            # As many wait already, and will be sent after the commit that asked for this one.
            log.debug("hint %s is not needed, or the broker is slow or away", hint)

    def _run(self) -> None:
        allowance, last_at = float(BURST), time.monotonic()
        while (hint := self._hints.get()) is not None:
            at = time.monotonic()
            allowance, last_at = min(BURST, allowance + (at - last_at) / PACE_S), at
            if allowance < 1:
                self._closing.wait(PACE_S)
            allowance -= 1
            send(self._celery, hint)


def send(celery: Celery, hint: str) -> None:
    """Send one hint now. A broker out of reach is logged and forgiven: the sweep sends hints for what waits."""
    try:
        celery.send_task(hint, queue=QUEUE_OF[hint], ignore_result=True, retry=False)
    except (BrokerError, OSError) as error:
        log.warning("hint %s not sent (%s); the sweep will send it", hint, error)
