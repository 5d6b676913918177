"""The Celery app and the hints sent through it.

A message is a hint that work waits, never the work: it names no job. Losing one costs seconds (the sweep re-sends),
receiving one twice costs nothing (the second finds nothing to claim). The settings follow from how Celery behaves on
Redis: late acknowledgement repeats long tasks and loops poison ones, so acknowledgement is early and truth elsewhere.
"""

import logging
import queue
import threading

from celery import Celery
from kombu.exceptions import OperationalError as BrokerError

from shared.settings import Settings

log = logging.getLogger(__name__)

TRAIN = "anneal.train"
VALIDATE_FILES = "anneal.validate_files"
QUEUE_OF = {TRAIN: "train", VALIDATE_FILES: "batch"}

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

    Bounded: while the broker is away, hints beyond a handful are dropped, and the sweep makes up for them.
    """

    def __init__(self, celery: Celery) -> None:
        self._celery = celery
        self._hints: queue.Queue[str | None] = queue.Queue(maxsize=64)
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def training_waits(self) -> None:
        """A job was queued. Call after the commit: the worker must find the row."""
        self._put(TRAIN)

    def files_wait(self) -> None:
        """A file was stored that nobody has checked yet."""
        self._put(VALIDATE_FILES)

    def close(self) -> None:
        """Send what waits, for at most a few seconds."""
        self._put(None)
        self._thread.join(timeout=SOCKET_CONNECT_TIMEOUT_S)

    def _put(self, hint: str | None) -> None:
        try:
            self._hints.put_nowait(hint)
        except queue.Full:
            log.warning("hint %s dropped: the broker is slow or away; the sweep will send it", hint)

    def _run(self) -> None:
        while (hint := self._hints.get()) is not None:
            send(self._celery, hint)


def send(celery: Celery, hint: str) -> None:
    """Send one hint now. A broker out of reach is logged and forgiven: the sweep sends hints for what waits."""
    try:
        celery.send_task(hint, queue=QUEUE_OF[hint], ignore_result=True, retry=False)
    except (BrokerError, OSError) as error:
        log.warning("hint %s not sent (%s); the sweep will send it", hint, error)
