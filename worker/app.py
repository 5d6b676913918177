"""The Celery application of `worker train` and `worker batch`, and what happens at its processes' births and deaths."""

import os
from typing import Any

from celery import signals

from shared import db, logs
from shared.heartbeat import Heartbeat
from shared.queue import make_celery
from shared.settings import get_settings
from worker import lifecycle

celery_app = make_celery(get_settings())
celery_app.conf.imports = ("worker.tasks",)

_main_pid = os.getpid()
_heartbeats: list[Heartbeat] = []


@signals.setup_logging.connect
def _logs(**_: Any) -> None:
    logs.configure(get_settings().log_level)


@signals.celeryd_after_setup.connect
def _alive(instance: Any, **_: Any) -> None:
    # Before the broker is reached: a worker that waits for it is healthy.
    heartbeat = Heartbeat(get_settings(), "-".join(sorted(instance.app.amqp.queues.consume_from)))
    heartbeat.__enter__()
    _heartbeats.append(heartbeat)  # kept for the life of the process


@signals.worker_shutting_down.connect
def _shutting_down(**_: Any) -> None:
    lifecycle.shutdown.set()  # the pool child's supervisor asks its trainer for a checkpoint


@signals.worker_process_init.connect
def _child(**_: Any) -> None:
    lifecycle.die_with_parent(_main_pid)
    db.reset()  # connections don't survive a fork
