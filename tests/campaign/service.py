"""The whole service as separate processes on one host, kept running the way an orchestrator would.

Owns the processes and their log files: a process that ends is started again a moment later, and nothing else is done
about it. What a dead process leaves behind is the service's own affair. Main thread only: every process dies with the
thread that started it.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from cli import child, commands, valkey
from cli.listener import LISTEN_FD, open_listener
from shared.settings import Settings
from tests.campaign import as_user, procfs
from tests.campaign.postgres import Postgres

REPOSITORY = Path(__file__).parents[2]
LOG_LEVEL = "info"
STARTED_AFTER_S = 4.0
READY_WORD = b" ready."
"""Celery's, once it has reached the broker."""


@dataclass
class Member:
    """One process of the service."""

    name: str
    role: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    pass_fds: tuple[int, ...] = ()
    user: str | None = None
    stop_s: float = 15
    process: subprocess.Popen[bytes] | None = None
    start_at: float = 0
    """When it is to be started again."""
    started_at: float = 0
    log: Path | None = None
    log_offset: int = 0
    """Where in the log its present life begins."""
    wipe: Path | None = None
    """Folder to empty before the next start."""

    @property
    def identity(self) -> procfs.Process | None:
        """The running process; None between two."""
        if self.process is None or self.process.poll() is not None:
            return None
        seen = procfs.look(self.process.pid)
        return None if seen is None else seen.process

    @property
    def is_ready(self) -> bool:
        """Whether it does its work: it has said so, or has had time for its imports."""
        if self.identity is None or self.log is None:
            return False
        if self.role != "train":
            return time.monotonic() - self.started_at > STARTED_AFTER_S
        with self.log.open("rb") as log:
            log.seek(self.log_offset)
            return READY_WORD in log.read()


class Service:
    """Started by `start`, kept running by calls of `tend`, ended by `stop`."""

    def __init__(
        self, settings: Settings, environment: dict[str, str], log_dir: Path, roles: dict[str, int], *, toy: bool
    ) -> None:
        self.settings = settings
        self.members: list[Member] = []
        self.restart_s: dict[str, float] = {}
        """By name of the member: how long its next restart takes. Otherwise drawn."""
        self._environment = environment
        self._log_dir = log_dir
        self._roles = roles
        self._toy = toy
        self._draw = random.Random(0)
        self._listener = open_listener(settings)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def start(self, postgres: Postgres | None) -> None:
        log_dir = self._log_dir
        log_dir.mkdir(parents=True, exist_ok=True)
        if postgres is not None:
            self._add(Member("postgres", "postgres", postgres.command, user=postgres.user))
            postgres.wait_until_ready()
            postgres.create_database()
        self._add(Member("valkey", "valkey", valkey.command(self.settings)))
        with (log_dir / "migrate.log").open("ab") as log:
            subprocess.run(commands.anneal("migrate"), env=self._environment, stdout=log, stderr=log, check=True)
        descriptor = self._listener.fileno()
        extra = {LISTEN_FD: str(descriptor)}
        self._add(Member("api", "api", commands.anneal("api"), environment=extra, pass_fds=(descriptor,)))
        train = commands.worker("train", LOG_LEVEL)
        if self._toy:
            train = [sys.executable, "-m", "tests.campaign.worker", LOG_LEVEL]
        stop_s = self.settings.deploy_stop_s + 2 * self.settings.trainer_stop_s + 10
        for role, command in (
            ("train", train),
            ("batch", commands.worker("batch", LOG_LEVEL)),
            ("sweep", commands.worker("sweep", LOG_LEVEL)),
            ("generate", [sys.executable, "-m", "tests.campaign.generator"]),
        ):
            for number in range(1, self._roles.get(role, 0) + 1):
                self._add(Member(f"{role}-{number}", role, command, stop_s=stop_s if role == "train" else 15))

    def of(self, role: str) -> list[Member]:
        return [member for member in self.members if member.role == role]

    def tend(self) -> list[str]:
        """Start again what has ended. Returns what happened."""
        news = []
        now = time.monotonic()
        for member in self.members:
            if member.process is not None and (status := member.process.poll()) is not None:
                news.append(f"{member.name} ended with {status}")
                member.process = None
                member.start_at = now + self.restart_s.pop(member.name, self._draw.uniform(0.1, 1))
            elif member.process is None and now >= member.start_at:
                self._spawn(member)
                news.append(f"{member.name} started as {member.process and member.process.pid}")
        return news

    def stop(self, *roles: str) -> list[str]:
        """End the members of these roles in good order. Returns the names of those that had to be killed."""
        stubborn = []
        members = [member for member in self.members if member.role in roles and member.process is not None]
        for member in members:
            assert member.process is not None
            # PostgreSQL's "fast" shutdown: at SIGTERM it would wait for every client to leave.
            member.process.send_signal(signal.SIGINT if member.role == "postgres" else signal.SIGTERM)
        deadline = time.monotonic() + max((member.stop_s for member in members), default=0)
        for member in members:
            assert member.process is not None
            try:
                member.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                stubborn.append(member.name)
                member.process.kill()
                member.process.wait()
            member.process = None
        return stubborn

    def kill(self) -> None:
        """End everything at once, whatever state it is in."""
        for member in self.members:
            if member.process is not None:
                member.process.kill()
                member.process.wait()
        for seen in procfs.of_service(self.settings.data):
            if seen.process.pid != os.getpid():
                procfs.send(seen.process, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._listener.close()

    def _add(self, member: Member) -> None:
        self.members.append(member)
        self._spawn(member)

    def _spawn(self, member: Member) -> None:
        if member.wipe is not None:
            shutil.rmtree(member.wipe, ignore_errors=True)
            member.wipe.mkdir(mode=0o700, parents=True, exist_ok=True)
            member.wipe = None
        script = [child.__file__] if member.user is None else [as_user.__file__]
        user = [] if member.user is None else [member.user]
        shim = [sys.executable, "-I", "-S", *script, str(os.getpid()), *user]
        member.log = self._log_dir / f"{member.name}.log"
        with member.log.open("ab") as log:
            member.log_offset = log.tell()
            member.process = subprocess.Popen(
                [*shim, *member.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self._environment, **member.environment},
                pass_fds=member.pass_fds,
                start_new_session=True,
            )
        member.started_at = time.monotonic()
