"""One supervised process: start, watch, restart, stop, without leaving anything behind.

            start                      first heartbeat
    waiting ─────▶ starting ───────────────▶ running
       ▲              │ died, or silent for START_SILENT_S    │ died, or silent for SILENT_AFTER_S
       └── backoff ───┴───────────────────────────────────────┘
                      └── the fifth time within a minute ──▶ GaveUp

Every child leads its own session, so Ctrl-C in a terminal reaches `anneal up` alone and a kill reaches the whole group;
it is spawned through `cli/child.py`, so it dies with `anneal up`. `anneal up` also adopts (PR_SET_CHILD_SUBREAPER)
whatever a dying child leaves, and `kill_orphans` ends it.

Owns processes and their log files. Knows nothing about what they do. Main thread only: the kernel ties a child to the
thread that made it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from shared.heartbeat import SILENT_AFTER_S

START_SILENT_S = 120.0
"""How long imports and loading may take before the first heartbeat."""
TICK_CAP_S = 1.0
"""The most silence one look may add: time in which we were stopped ourselves, or the host slept, doesn't count."""
DEATHS_ALLOWED = 5
DEATHS_WINDOW_S = 60.0
FIRST_BACKOFF_S = 0.5
LOG_BYTES = 10 * 2**20
"""A log is rotated past this size; the one before it is kept as `.1`."""
KILL_WAIT_S = 5.0

_SHIM = Path(__file__).with_name("child.py")
_PR_SET_CHILD_SUBREAPER = 36


class GaveUp(Exception):
    """A child can't be kept running. The message names it and shows the end of its log."""


@dataclass(frozen=True)
class ChildSpec:
    """What to run and how to know that it lives."""

    name: str
    command: list[str]
    log: Path
    stop_s: float
    """Between SIGTERM and SIGKILL."""
    heartbeat: Path | None = None
    """The file whose modification time must keep changing; None: it is enough not to have exited."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to our own. Secrets travel here, never in `command`, which every user of the machine can read."""
    withheld: frozenset[str] = frozenset()
    """Variables of ours that it has no business to know."""
    pass_fds: tuple[int, ...] = ()


class Child:
    """A process that is kept running."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.exit_code: int | None = None
        """Of its last run; None until one has ended."""
        self._process: subprocess.Popen[bytes] | None = None
        self._start_at = 0.0
        self._deaths: deque[float] = deque(maxlen=DEATHS_ALLOWED)
        self._last_beat: float | None = None
        self._beaten = False
        self._silent_s = 0.0
        self._looked_at = 0.0

    @property
    def pid(self) -> int | None:
        """The process id; None while it isn't running."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Spawn it, its output appended to its log."""
        spec = self.spec
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        if spec.heartbeat is not None:
            spec.heartbeat.unlink(missing_ok=True)  # a predecessor's
        shim = [sys.executable, "-I", "-S", str(_SHIM), str(os.getpid())]
        with spec.log.open("ab") as log:  # append mode, so that rotation can cut the file under the writer
            self._process = subprocess.Popen(
                [*shim, *spec.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in os.environ.items() if name not in spec.withheld}
                | dict(spec.environment),
                pass_fds=spec.pass_fds,
                start_new_session=True,
            )
        self._last_beat, self._beaten, self._silent_s = None, False, 0.0
        self._looked_at = time.monotonic()

    def tend(self) -> str | None:
        """Look once: rotate the log, end it if it hangs, start it again when its backoff is over.

        Returns what happened, for the operator; None if nothing did.

        Raises:
            GaveUp: it died too often.
        """
        rotate(self.spec.log)
        if self._process is None:
            if time.monotonic() < self._start_at:
                return None
            try:
                self.start()
            except OSError as error:  # no memory for a process, no room for its log: perhaps soon again
                return self._died(f"can't be started: {error}")
            return None
        status = self._exit_status()
        if status is None and self._is_silent():
            self.kill()
            status = f"said nothing for {self._silent_s:.0f} s and was killed"
        if status is None:
            return None
        self._process = None
        return self._died(status)

    def terminate(self) -> None:
        """Ask it to stop: the main process only, which knows how to stop its own."""
        if self._process is not None and self._exit_status() is None:
            os.kill(self._process.pid, signal.SIGTERM)  # not Popen's: it may reap first and let the group escape

    def has_exited(self) -> bool:
        """Whether it is gone, its group with it."""
        if self._process is not None and self._exit_status() is not None:
            self._process = None
        return self._process is None

    def kill(self) -> None:
        """End it, its group and its descendants in groups of their own."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid).children(recursive=True)
            self._kill_group()
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_WAIT_S)

    def end_of_log(self, lines: int = 20) -> str:
        """The last lines it wrote."""
        try:
            with self.spec.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 16_384))
                return b"\n".join(log.read().splitlines()[-lines:]).decode(errors="replace")
        except FileNotFoundError:
            return ""

    def _exit_status(self) -> str | None:
        """How it ended; None while it runs. Ends its group before its process id can be used again."""
        assert self._process is not None
        if self._process.returncode is None:
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return None
            self._kill_group()
        code = self.exit_code = self._process.wait()
        return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    def _kill_group(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _is_silent(self) -> bool:
        """Whether the heartbeat has stood still too long, counted in our own looks rather than by any clock."""
        now = time.monotonic()
        looked_at, self._looked_at = self._looked_at, now
        if self.spec.heartbeat is None:
            return False
        try:
            beat: float | None = self.spec.heartbeat.stat().st_mtime
        except OSError:
            beat = None
        if beat is not None and beat != self._last_beat:
            self._last_beat, self._beaten, self._silent_s = beat, True, 0.0
            return False
        self._silent_s += min(now - looked_at, TICK_CAP_S)
        return self._silent_s > (SILENT_AFTER_S if self._beaten else START_SILENT_S)

    def _died(self, status: str) -> str:
        now = time.monotonic()
        self._deaths.append(now)
        recent = sum(1 for death in self._deaths if now - death < DEATHS_WINDOW_S)
        if recent >= DEATHS_ALLOWED:
            raise GaveUp(
                f"{self.spec.name} died {recent} times within {DEATHS_WINDOW_S:.0f} s, the last time: {status}. "
                f"The end of {self.spec.log}:\n{self.end_of_log()}"
            )
        backoff_s = FIRST_BACKOFF_S * 2 ** (recent - 1)
        self._start_at = now + backoff_s
        return f"{self.spec.name}: {status}; starting again in {backoff_s:g} s (its log: {self.spec.log})"


def adopt_orphans() -> None:
    """Become the parent of whatever our descendants leave behind, so that `kill_orphans` can find it."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_orphans(children: Iterable[Child]) -> int:
    """End and reap the processes that came to us because their parent died; returns how many there were."""
    adopted = _children_of_this_thread() - {child.pid for child in children}
    for pid in adopted:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)  # ours and not waited for, so the number can't have passed to a stranger
            os.waitpid(pid, os.WNOHANG)  # one that can't die yet is met again at the next look
    return len(adopted)


def _children_of_this_thread() -> set[int]:
    """From the kernel's list where it keeps one: looking through every process on each tick would cost a percent."""
    try:
        return {int(pid) for pid in Path("/proc/thread-self/children").read_text().split()}
    except FileNotFoundError:
        return {process.pid for process in psutil.Process().children()}


def rotate(log: Path, limit_bytes: int = LOG_BYTES) -> None:
    """Keep a log within bounds: past the limit its end becomes `.1` and the file is cut to nothing.

    The writer keeps its open file, and appends. What it writes between the copy and the cut is lost.
    """
    try:
        with log.open("r+b") as file:
            if file.seek(0, os.SEEK_END) <= limit_bytes:
                return
            file.seek(-limit_bytes, os.SEEK_END)
            log.with_name(log.name + ".1").write_bytes(file.read(limit_bytes))
            file.truncate(0)
    except OSError:  # a full disk must not stop the watch over the others
        return
