"""The Celery application of `worker train` and `worker batch`, and what happens at its processes' births and deaths."""

import os
from typing import Any

from celery import signals

from shared import db, heartbeat, logs
from shared.heartbeat import SILENT_AFTER_S, Heartbeat
from shared.queue import QUEUE_OF, TRAIN, make_celery
from shared.settings import get_settings
from worker import compile_caches, gpu_watch, lifecycle, standby
from worker.consumer_watch import ConsumerWatch

celery_app = make_celery(get_settings())
celery_app.conf.imports = ("worker.tasks",)

_main_pid = os.getpid()
_heartbeats: list[Heartbeat] = []


class _WorkerHeartbeat(Heartbeat):
    """The worker's own, which falls silent with its pool child's: one that was stopped or hangs must be replaced."""

    def beat(self) -> None:
        age_s = heartbeat.age(get_settings(), _child_name(self.name))
        if age_s is None or age_s < SILENT_AFTER_S:  # None: the first child is still being born
            super().beat()


def _child_name(name: str) -> str:
    return f"{name}-child"


@signals.setup_logging.connect
def _logs(**_: Any) -> None:
    logs.configure(get_settings().log_level)


@signals.celeryd_after_setup.connect
def _alive(instance: Any, **_: Any) -> None:
    # Before the broker is reached: a worker that waits for it is healthy.
    name = "-".join(sorted(instance.app.amqp.queues.consume_from))
    heartbeat.heartbeat_path(get_settings(), _child_name(name)).unlink(missing_ok=True)  # of a worker before us
    _begin(_WorkerHeartbeat(get_settings(), name))
    if name == QUEUE_OF[TRAIN]:
        gpu_watch.begin()
        compile_caches.bound(get_settings())  # here, for a pool's child that takes long to be up is killed
    ConsumerWatch(get_settings(), name).start()


@signals.worker_shutting_down.connect
def _shutting_down(**_: Any) -> None:
    lifecycle.shutdown.set()  # the pool child's supervisor asks its trainer for a checkpoint


@signals.worker_process_init.connect
def _child(**_: Any) -> None:
    lifecycle.die_with_parent(_main_pid)
    lifecycle.working.set(False)  # the child before may have died in a task
    db.reset()  # connections don't survive a fork
    # The parent's heartbeat came along with the fork; its thread didn't.
    name = _heartbeats[0].name
    _begin(Heartbeat(get_settings(), _child_name(name)))
    if name == QUEUE_OF[TRAIN]:
        standby.keep(get_settings())


@signals.worker_process_shutdown.connect
def _child_ends(**_: Any) -> None:
    if (ahead := standby.kept()) is not None:
        ahead.close()


@signals.task_prerun.connect
def _task_begins(**_: Any) -> None:
    lifecycle.working.set(True)


@signals.task_postrun.connect
def _task_ended(**_: Any) -> None:
    lifecycle.working.set(False)


def _begin(heart: Heartbeat) -> None:
    heart.__enter__()
    _heartbeats.append(heart)  # kept for the life of the process
