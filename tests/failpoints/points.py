"""Points and faults: which effect is about to happen, what it is called, and whether it is the one to spoil.

A point is named by its operation, what it touches and the line of the product that caused it, with a number for the
k-th time in this process: `commit in worker/tasks.py:28 train #1`. Times and threads may move a number, never a name.
"""

import mmap
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

PROJECT = Path(__file__).parents[2]
PACKAGES = tuple(f"{PROJECT / name}{os.sep}" for name in ("api", "shared", "worker"))
TRAINER = str(PROJECT / "tests" / "campaign" / "toy_trainer.py")
TRANSPARENT = tuple(str(PROJECT / "shared" / name) for name in ("db.py", "disk.py"))
"""Doors that everybody goes through: their caller is the one to name."""

KILL_BEFORE, KILL_AFTER, TORN = "kill before", "kill after", "kill half-way"
"""kill -9 of this process: before the effect, after it, or (of a write) after half of its bytes."""

FULL_FOR_EFFECTS = 12
"""How many further writes a full disk refuses in the process that met it, until somebody has made room."""

_write, _open = os.write, os.open  # the real ones, for the harness's own records
_NUMBERED = (
    (re.compile(r"\b(ft[a-z]+|file)-[A-Za-z0-9]{24}"), r"<\1>"),
    (re.compile(r"\b(upload|part|batch)_[A-Za-z0-9]{24}"), r"<\1>"),
    (re.compile(r"\btmp[a-z0-9_]{8}$"), "<temporary>"),
    (re.compile(r"(?<=/\.tmp-)\d+|(?<=/\.deleted-)\d+|(?<=>/\d/)\d+"), "<step>"),
    (re.compile(r"(?<=-)\d+(?=/|$)"), "<pid>"),
    (re.compile(r"(?<=-)[0-9a-f]{16,}"), "<hex>"),
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Fault:
    """One way to fail at one point."""

    point: str
    mode: str


@dataclass(frozen=True)
class Point:
    """One effect of one scenario, as the counting run met it."""

    role: str
    name: str
    operation: str
    modes: tuple[str, ...]


class Board:
    """What a process that is about to be killed must leave to others: whether the fault has struck."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)  # shared with forked children

    @property
    def struck(self) -> bool:
        return self._memory[0] == 1

    def strike(self) -> bool:
        """Take the one shot. False if it has been fired already: a fault happens once."""
        if self._memory[0] == 1:
            return False
        self._memory[0] = 1
        return True


class Points:
    """Counts this process's effects and spoils the chosen one."""

    def __init__(self, role: str, root: Path, board: Board, fault: Fault | None, trace: Path | None) -> None:
        self.role = role
        self.root = str(root.resolve()) + os.sep
        self._board = board
        self._fault = fault
        self._trace_path = trace
        self._trace = self._open_trace()
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        self._full_for = 0

    def become(self, role: str) -> None:
        """Start counting anew, as another process."""
        self.role = role
        self._counts = {}
        self._lock = threading.Lock()
        self._trace = self._open_trace()

    def at(
        self,
        operation: str,
        target: str,
        perform: Callable[[], Result],
        *,
        errors: Mapping[str, Callable[[], BaseException]],
        late_errors: Mapping[str, Callable[[], BaseException]] | None = None,
        tear: Callable[[], Any] | None = None,
    ) -> Result:
        """Let an effect happen, unless it is the one to spoil.

        Args:
            errors: what may be raised in its place, by the name of the mode.
            late_errors: what may be raised once it has happened: its confirmation is lost.
            tear: makes half of it happen.
        """
        late = late_errors or {}
        mode = self._before(operation, target, errors, late, tear)
        result = perform()
        self._after(mode, late)
        return result

    async def at_async(
        self,
        operation: str,
        target: str,
        perform: Callable[[], Awaitable[Result]],
        *,
        errors: Mapping[str, Callable[[], BaseException]],
        late_errors: Mapping[str, Callable[[], BaseException]],
    ) -> Result:
        """`at`, for an effect that an event loop waits for."""
        mode = self._before(operation, target, errors, late_errors, None)
        result = await perform()
        self._after(mode, late_errors)
        return result

    def _before(
        self,
        operation: str,
        target: str,
        errors: Mapping[str, Callable[[], BaseException]],
        late: Mapping[str, Callable[[], BaseException]],
        tear: Callable[[], Any] | None,
    ) -> str | None:
        """Name and trace the effect; spoil it if that is to be before it. Returns the mode of what is to follow it."""
        if self._full_for and "disk full" in errors:
            self._full_for -= 1
            raise errors["disk full"]()
        source = _source(sys._getframe(1))
        if source is None:
            return None
        name = self._number(f"{self.role}: {operation} {shape(target)} in {source}".replace("  ", " "))
        if self._trace is not None:
            modes = [KILL_BEFORE, KILL_AFTER, *([TORN] if tear else []), *errors, *late]
            _write(self._trace, f"{self.role}\t{operation}\t{name}\t{'|'.join(modes)}\n".encode())
        fault = self._fault
        if fault is None or fault.point != name or not self._board.strike():
            return None
        if fault.mode == KILL_BEFORE:
            die()
        if fault.mode == TORN:
            assert tear is not None
            tear()
            die()
        if fault.mode in errors:
            self._full_for = FULL_FOR_EFFECTS if fault.mode == "disk full" else 0
            raise errors[fault.mode]()
        return fault.mode

    def _after(self, mode: str | None, late: Mapping[str, Callable[[], BaseException]]) -> None:
        if mode in late:
            raise late[mode]()
        if mode is not None:
            die()

    def covers(self, path: str) -> bool:
        return path.startswith(self.root) or path + os.sep == self.root

    def shown(self, path: str) -> str:
        """A path as points name it."""
        return path.removeprefix(self.root) if path.startswith(self.root) else "the data folder"

    def _open_trace(self) -> int | None:
        if self._trace_path is None:
            return None
        return _open(self._trace_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _number(self, name: str) -> str:
        with self._lock:
            count = self._counts[name] = self._counts.get(name, 0) + 1
        return f"{name} #{count}"


def die() -> None:
    """What a crash, the out-of-memory killer or a power switch does to this process."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def read_trace(path: Path) -> list[Point]:
    """The points of a counting run, those of one process together, in the order they were met."""
    points = []
    for line in path.read_text().splitlines():
        role, operation, name, modes = line.split("\t")
        points.append(Point(role, name, operation, tuple(modes.split("|"))))
    return sorted(points, key=lambda point: point.role)


def shape(path: str) -> str:
    """A path without what differs from run to run."""
    for pattern, replacement in _NUMBERED:
        path = pattern.sub(replacement, path)
    return path


def _source(frame: FrameType | None) -> str | None:
    """The innermost line of the product on the stack; None if it is nobody of ours."""
    while frame is not None:
        name = frame.f_code.co_filename
        if (name.startswith(PACKAGES) and name not in TRANSPARENT) or name == TRAINER:
            return f"{Path(name).relative_to(PROJECT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return None
