"""`anneal api`: uvicorn around `api.app:create_app`, on the socket `anneal up` opened or one of its own.

The heartbeat is renewed by the event loop itself: a loop that hangs falls silent, whatever its threads still do.
"""

import ctypes
import gc
import tempfile

import uvicorn

from cli.listener import inherited_listener, open_listener
from shared import logs
from shared.heartbeat import BEAT_EVERY_S, Heartbeat
from shared.settings import Settings

OPEN_STREAMS_STOP_S = 5
"""How long open requests and streams may go on after SIGTERM."""
M_ARENA_MAX = -8
"""Of glibc's `mallopt` (malloc.h)."""
SPOOL = "spool"
"""Folder in `run_dir` for the bodies of uploads until they are whole: a /tmp may be memory."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        CannotListen: the address can't be served, with the reason.
    """
    _keep_one_heap()
    logs.configure(settings.log_level)
    listener = inherited_listener() or open_listener(settings)
    heartbeat = Heartbeat(settings, "api", every_s=None)
    spool = settings.run_dir / SPOOL
    spool.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(spool)

    async def beat() -> None:
        heartbeat.beat()

    config = uvicorn.Config(
        "api.app:create_app",  # by name: the command must not import fastapi to print its help
        factory=True,
        log_config=None,
        log_level=settings.log_level,
        server_header=False,
        callback_notify=beat,
        timeout_notify=int(BEAT_EVERY_S),
        timeout_graceful_shutdown=OPEN_STREAMS_STOP_S,
    )
    config.load()
    gc.collect()
    gc.freeze()  # what is there now stays: looking through it again and again would stop every request for a while
    with heartbeat:
        uvicorn.Server(config).run(sockets=[listener])


def _keep_one_heap() -> None:
    """One malloc arena for all threads, instead of one for each: what a thread frees is then another's to use.

    With an arena each, half an hour of load left 10 MiB of free memory spread over those of threads that had gone.
    Python's threads hold one lock anyway, so they don't wait for this one. Elsewhere than glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
