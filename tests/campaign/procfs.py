"""Processes as the kernel shows them. A process is its id and its start time: ids are used again, pairs are not."""

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """One process, for ever the same."""

    pid: int
    started_ticks: int


@dataclass(frozen=True)
class Seen:
    """What one look at a process found."""

    process: Process
    state: str
    parent_pid: int
    session: int


@dataclass(frozen=True)
class Trainer:
    """A trainer and the claim it works for, told by its working folder: `run/jobs/<job>/<fence>`."""

    process: Process
    job_id: str
    fence: int


def look(pid: int) -> Seen | None:
    """The process of that id now; None if there is none, a zombie counting as none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    if fields[0] in "ZX":
        return None
    return Seen(Process(pid, int(fields[19])), fields[0], int(fields[1]), int(fields[3]))


def lives(process: Process) -> bool:
    seen = look(process.pid)
    return seen is not None and seen.process == process


def runs(process: Process) -> bool:
    """Whether it lives, is not stopped, and has not been killed already: a killed one may still wait for its end."""
    seen = look(process.pid)
    if seen is None or seen.process != process or seen.state in "Tt":
        return False
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process.pid}/status").read_text()
        for pending in re.findall(r"(?:SigPnd|ShdPnd):\s*([0-9a-f]+)", status):
            if int(pending, 16) & (1 << (signal.SIGKILL - 1)):
                return False
        return True
    return False


def send(process: Process, number: signal.Signals) -> bool:
    """Signal exactly this process. Returns whether it was still there."""
    if not lives(process):
        return False
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def every() -> Iterator[Seen]:
    for name in os.listdir("/proc"):  # noqa: PTH208 - called twenty times a second
        if name.isdigit() and (seen := look(int(name))) is not None:
            yield seen


def children(pid: int) -> list[Process]:
    return sorted((seen.process for seen in every() if seen.parent_pid == pid), key=lambda process: process.pid)


def trainers(run_dir: Path) -> list[Trainer]:
    """Every trainer of the service in that folder, stopped ones too, in the order of their jobs."""
    found = [Trainer(process, where[1], int(where[2])) for process, where in _in(run_dir, r"jobs/([^/]+)/(\d+)")]
    return sorted(found, key=lambda trainer: (trainer.job_id, trainer.fence, trainer.process.pid))


def standbys(run_dir: Path) -> list[Process]:
    """Every trainer that was started ahead and has not yet begun with a job; some have taken one already."""
    return sorted((process for process, _ in _in(run_dir, "standby/[^/]+")), key=lambda process: process.pid)


def _in(run_dir: Path, folder: str) -> Iterator[tuple[Process, re.Match[str]]]:
    """Leaders of sessions whose current folder is such a one: what they start shares it."""
    pattern = re.compile(rf"{re.escape(str(run_dir))}/{folder}(?: \(deleted\))?")
    for name in os.listdir("/proc"):  # noqa: PTH208
        if not name.isdigit():
            continue
        try:
            match = pattern.fullmatch(os.readlink(f"/proc/{name}/cwd"))  # noqa: PTH115 - as above
        except OSError:
            continue
        seen = look(int(name)) if match is not None else None
        if match is not None and seen is not None and seen.session == seen.process.pid:
            yield seen.process, match


def of_service(data: Path) -> list[Seen]:
    """Every process that was started with this data folder in its environment."""
    marker = f"ANNEAL_DATA={data}".encode()
    found = []
    for seen in every():
        with contextlib.suppress(OSError):
            if marker in Path(f"/proc/{seen.process.pid}/environ").read_bytes().split(b"\0"):
                found.append(seen)
    return found
