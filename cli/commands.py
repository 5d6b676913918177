"""The command line of each process of the service, in one place for `anneal up` and `anneal worker`.

Never a secret in here: every user of a machine can read command lines.
"""

import sys
from typing import Literal

WorkerKind = Literal["train", "batch", "generate", "sweep"]
CELERY_KINDS = ("train", "batch")


def anneal(*arguments: str) -> list[str]:
    """`anneal …` by this interpreter. -P: folders named `api` or `shared` in the current one change nothing."""
    return [sys.executable, "-P", "-m", "cli.main", *arguments]


def celery_worker(queue: str, log_level: str) -> list[str]:
    """A Celery worker of one queue with one slot. Without gossip and its like: they'd be traffic for nobody."""
    return [
        *(sys.executable, "-P", "-m", "celery", "--app", "worker.app:celery_app", "--quiet", "worker"),
        *("--queues", queue, "--hostname", f"{queue}@%h", "--concurrency", "1", "--pool", "prefork"),
        *("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", log_level),
    ]


def worker(kind: WorkerKind, log_level: str) -> list[str]:
    """What runs one kind of worker."""
    return celery_worker(kind, log_level) if kind in CELERY_KINDS else anneal("worker", kind)
