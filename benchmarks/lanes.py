#!/usr/bin/env python3
"""Several benchmarks side by side on the GPUs of one host, within one time limit.

A plan has a line for each command, `lane seconds name command`, # for a comment. The digits of a lane name its GPUs;
all commands of a lane run in turn, lanes beside each other, and what is below a line `---` once all above it has ended:

    0   200 tutorial  python3 benchmarks/training.py --model M --contenders anneal,unsloth --out $OUT/tutorial.json
    1a  150 default   python3 benchmarks/precision.py --model M --only default --out $OUT/default.json
    1b  150 fp32      python3 benchmarks/precision.py --model M --only fp32 --out $OUT/fp32.json
    ---
    01  200 scaling   python3 benchmarks/scaling.py --model M --gpus 2 --out $OUT/scaling.json

A command sees its GPUs and an equal share of the CPU's cores (by number: on a host with several NUMA nodes lanes are
not on equal terms), runs in a shell at the checkout with $OUT set, and is killed with all that it started at its time
or at --limit. A line is printed as each ends; what it wrote is in $OUT/NAME.log. Needs Python and nothing else.

    python3 benchmarks/lanes.py PLAN --out FOLDER [--limit 560]
"""

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Entry:
    """One line of a plan."""

    lane: str
    limit_s: float
    name: str
    command: str
    stage: int = 0
    """Lines `---` above it."""

    @property
    def gpus(self) -> str:
        return ",".join(sign for sign in self.lane if sign.isdigit())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--limit", type=float, default=560, help="seconds for everything")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return 0 if run(read(args.plan.read_text()), args.out.resolve(), args.limit) else 1


def read(text: str) -> list[Entry]:
    """The plan's lines.

    Raises:
        ValueError: a line has not got four parts, names no GPU, or a name comes twice.
    """
    entries: list[Entry] = []
    stage = 0
    for line in text.splitlines():
        parts = line.split(maxsplit=3)
        if not parts or parts[0].startswith("#"):
            continue
        if parts == ["---"]:
            stage += 1
            continue
        if len(parts) < 4:
            raise ValueError(f"not `lane seconds name command`: {line}")
        entry = Entry(parts[0], float(parts[1]), parts[2], parts[3], stage)
        if not entry.gpus or any(entry.name == other.name for other in entries):
            raise ValueError(f"a lane without a GPU, or a name that was there before: {line}")
        entries.append(entry)
    return entries


def run(entries: Sequence[Entry], out: Path, limit_s: float) -> bool:
    """Whether all succeeded."""
    ends_s = time.monotonic() + limit_s
    stages = [list(group) for _, group in itertools.groupby(entries, lambda entry: entry.stage)]
    succeeded = [_beside_each_other(stage, out, ends_s) for stage in stages]
    return all(succeeded)


def _beside_each_other(entries: Sequence[Entry], out: Path, ends_s: float) -> bool:
    lanes = list(dict.fromkeys(entry.lane for entry in entries))
    shares = shares_of(sorted(os.sched_getaffinity(0)), len(lanes))
    succeeded: list[bool] = []

    def go(lane: str, cores: list[int]) -> None:
        for entry in entries:
            if entry.lane == lane:
                left_s = ends_s - time.monotonic()
                try:
                    succeeded.append(_one(entry, out, cores, min(entry.limit_s, left_s)))
                except Exception as error:  # one that can't be started is no reason to leave out the rest
                    print(f"{entry.name}: {error!r}", flush=True)

    threads = [threading.Thread(target=go, args=pair) for pair in zip(lanes, shares, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(succeeded) == len(entries) and all(succeeded)


def shares_of(cores: Sequence[int], count: int) -> list[list[int]]:
    """Each lane's cores: as many for each, neighbours together; with fewer cores than lanes, all of them."""
    size = len(cores) // count
    if not size:
        return [list(cores)] * count
    return [list(cores[number * size : (number + 1) * size]) for number in range(count)]


def _one(entry: Entry, out: Path, cores: list[int], limit_s: float) -> bool:
    if limit_s <= 0:
        print(f"{entry.name}: no time left", flush=True)
        return False
    began_s = time.monotonic()
    log = out / f"{entry.name}.log"
    with log.open("wb") as stream:
        child = subprocess.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, cores)), "bash", "-c", entry.command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": entry.gpus, "OUT": str(out)},
            start_new_session=True,
        )
        try:
            status: int | str = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = "timeout"
        _end(child)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    took_s, last = time.monotonic() - began_s, lines[-1][:300] if lines else "nothing said"
    print(f"{entry.name}: {status} after {took_s:.0f} s; {last}", flush=True)
    return status == 0


def _end(child: "subprocess.Popen[bytes]") -> None:
    """With all that it started: the next command is to find its GPU empty."""
    doomed = family(child.pid)
    while doomed:
        for process in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
        child.poll()
        doomed = [process for process in family(child.pid) if process in doomed]


def family(pid: int) -> list[int]:
    """The living ones of a process, its descendants, whatever sessions they have begun, and what is left in its own."""
    parents, sessions = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            after_name = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if after_name[0] not in "XZ":
                parents[int(folder.name)], sessions[int(folder.name)] = int(after_name[1]), int(after_name[3])
    found = {other for other, session in sessions.items() if session == pid or other == pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main())
