"""`anneal up`: the whole service on one machine, as one process tree.

    lock the folder → listen on the port → Valkey and migrations → API, generator, workers, sweep → ready → watch
    stop: train and batch (a trainer saves a checkpoint) → API → generator and sweep → Valkey

Owns the tree: who is started when, who is restarted, in which order they stop. Never does the work of any of them.
Single-threaded on purpose: signals are waited for (sigtimedwait), not handled, so nothing runs in between.
"""

import contextlib
import http.client
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from cli import accelerators, commands, valkey
from cli.health import status_of
from cli.listener import LISTEN_FD, CannotListen, open_listener, url
from cli.processes import Child, ChildSpec, GaveUp, adopt_orphans, kill_orphans
from cli.runlock import FolderInUse, RunLock
from shared.heartbeat import heartbeat_path
from shared.settings import Settings

TICK_S = 0.5
MIGRATION_LIMIT_S = 600.0
VALKEY_LIMIT_S = 120.0
"""An append-only file of the largest size allowed loads in far less."""
READY_LIMIT_S = 300.0
ORPHAN_LIMIT_S = 5.0
_STOP_SIGNALS = frozenset(
    # One that is ignored stays ignored (nohup, a script's background job): waiting for it would bring it back.
    number
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(number) is not signal.SIG_IGN
)
_WAITED_FOR = _STOP_SIGNALS | {signal.SIGCHLD}


class StopRequested(Exception):
    """The operator or the system asked us to stop."""


class CannotStart(Exception):
    """The service can't be brought up. The message says why and what to do."""


def up(settings: Settings) -> int:
    """Run the service until a signal; returns the exit status."""
    # First of all: one that comes during the next lines waits for the first look, instead of ending us half-way.
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    try:
        settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = RunLock(settings.run_dir)
        listener = open_listener(settings)
    except (FolderInUse, CannotListen) as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        say(f"error: {settings.data} can't be written: {error.strerror}. Choose another folder with --data")
        return 1
    for line in accelerators.describe():
        say(line)
    if not settings.api_key:
        say("no ANNEAL_API_KEY is set: whoever can reach this machine's loopback address may use the service")
    adopt_orphans()
    settings = settings.model_copy(update={"port": listener.getsockname()[1]})  # 0 has become a real one
    status = Service(settings, listener).run()
    lock.release()
    return status


class Service:
    """The process tree of one `anneal up`."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self._settings = settings
        self._listener = listener
        self._children: list[Child] = []

    def run(self) -> int:
        """Start everything, watch it, stop everything. Whatever happens, nothing is left running."""
        try:
            self._start()
            self._wait_until_ready()
            while True:
                self._look()
        except StopRequested:
            say("stopping; once more to stop at once")
            return 0
        except (GaveUp, CannotStart) as error:
            say(f"error: {error}")
            return 1
        finally:
            self._stop()

    def _start(self) -> None:
        settings = self._settings
        say(f"data in {settings.data}, logs in {settings.run_dir / 'logs'}")
        if settings.redis_url is None:
            try:
                self._add("valkey", valkey.command(settings), stop_s=10, beats=False)
            except valkey.ValkeyUnusable as error:
                raise CannotStart(str(error)) from error
        self._migrate()
        if settings.redis_url is None:
            self._wait_until(lambda: valkey.answers(settings), VALKEY_LIMIT_S, "Valkey has not loaded its data")
        descriptor = self._listener.fileno()
        self._add("api", commands.anneal("api"), stop_s=10, pass_fds=(descriptor,), extra={LISTEN_FD: str(descriptor)})
        kinds: tuple[tuple[commands.WorkerKind, float], ...] = (
            ("generate", 10),
            ("train", settings.deploy_stop_s + 2 * settings.trainer_stop_s),
            ("batch", 15),
            ("sweep", 10),
        )
        for kind, stop_s in kinds:
            self._add(kind, commands.worker(kind, settings.log_level), stop_s=stop_s)

    def _add(
        self,
        name: str,
        command: list[str],
        *,
        stop_s: float,
        beats: bool = True,
        pass_fds: tuple[int, ...] = (),
        extra: dict[str, str] | None = None,
    ) -> Child:
        """Start a child and watch over it from now on."""
        settings = self._settings
        environment = {
            "ANNEAL_DATA": str(settings.data),
            "ANNEAL_PORT": str(self._settings.port),
            "PYTHONUNBUFFERED": "1",
        }
        spec = ChildSpec(
            name=name,
            command=command,
            log=settings.run_dir / "logs" / f"{name}.log",
            stop_s=stop_s,
            heartbeat=heartbeat_path(settings, name) if beats else None,
            environment=environment | (extra or {}),
            withheld=frozenset() if name == "api" else frozenset({"ANNEAL_API_KEY"}),
            pass_fds=pass_fds,
        )
        child = Child(spec)
        self._children.append(child)
        child.start()
        return child

    def _migrate(self) -> None:
        """Bring the database's tables up to date; Valkey loads meanwhile."""
        migration = self._add("migrate", commands.anneal("migrate"), stop_s=10, beats=False)
        limit = time.monotonic() + MIGRATION_LIMIT_S
        while not migration.has_exited():
            if time.monotonic() > limit:
                raise CannotStart(f"the migrations took over {MIGRATION_LIMIT_S:.0f} s; see {migration.spec.log}")
            _sleep(TICK_S)
        self._children.remove(migration)
        if migration.exit_code != 0:
            raise CannotStart(f"the migrations failed:\n{migration.end_of_log()}")

    def _wait_until_ready(self) -> None:
        """Print the address on standard output once the service can take jobs. The one line scripts wait for."""
        self._wait_until(self._is_ready, READY_LIMIT_S, "the API does not report ready")
        say(f"Anneal is ready at {url(self._settings.host, self._settings.port)}", sys.stdout)

    def _wait_until(self, condition: Callable[[], bool], limit_s: float, complaint: str) -> None:
        limit = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > limit:
                raise CannotStart(f"{complaint} after {limit_s:.0f} s; see {self._settings.run_dir / 'logs'}")
            self._look(TICK_S / 5)

    def _is_ready(self) -> bool:
        """One question to /health/ready, over the port clients use."""
        try:
            return status_of(self._settings, "/health/ready", timeout_s=2) == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False

    def _look(self, wait_s: float = TICK_S) -> None:
        """Wait for something to happen, then look after every child once."""
        _sleep(wait_s)
        for child in self._children:
            event = child.tend()
            if event is not None:
                say(event)
        kill_orphans(self._children)

    def _stop(self) -> None:
        """Stop in order, each within its time; a second signal ends all of them at once."""
        stages = (("migrate", "train", "batch"), ("api",), ("generate", "sweep"), ("valkey",))
        try:
            for names in stages:
                self._stop_stage([child for child in self._children if child.spec.name in names])
        except StopRequested:
            say("stopping at once")
        for child in self._children:
            child.kill()
        self._listener.close()
        limit = time.monotonic() + ORPHAN_LIMIT_S
        while kill_orphans(()) and time.monotonic() < limit:
            time.sleep(0.05)

    def _stop_stage(self, children: Sequence[Child]) -> None:
        asked_at = time.monotonic()
        for child in children:
            child.terminate()
        waiting = list(children)
        while waiting := [child for child in waiting if not child.has_exited()]:
            for child in waiting:
                if time.monotonic() - asked_at > child.spec.stop_s:
                    say(f"{child.spec.name} has not stopped within {child.spec.stop_s:.0f} s and is killed")
                    child.kill()
            _sleep(TICK_S)


def say(text: str, stream: TextIO | None = None) -> None:
    """Tell the operator, by default on standard error: standard output is for the one line that scripts read."""
    with contextlib.suppress(OSError):  # a terminal that was closed is no reason to leave processes behind
        print(text, file=stream or sys.stderr, flush=True)


def _sleep(seconds: float) -> None:
    """Wait until a child changes or the time is over.

    Raises:
        StopRequested: a signal to stop came, now or since the last call.
    """
    received = signal.sigtimedwait(_WAITED_FOR, seconds)
    if received is not None and received.si_signo in _STOP_SIGNALS:
        raise StopRequested
