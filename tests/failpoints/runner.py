"""Runs: each in a process of its own, forked from one that has imported everything and holds nothing.

harness ─ lanes, each with a Valkey of its own ─ one process a run ─┬─ prepare
                                                                    ├─ the process under test (and its trainer)
                                                                    └─ recovery and checks
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.failpoints import invariants, recovery
from tests.failpoints.points import KILL_AFTER, Fault, Point, read_trace
from tests.failpoints.scenarios import Scenario, collect_all
from tests.failpoints.services import Databases, running_valkey
from tests.failpoints.world import Hung, World

ON_FILES = ("create", "write", "fsync", "fdatasync", "mkdir", "unlink", "remove", "rmdir", "truncate")
RUN_LIMIT_S = 150.0
MOST_TRIES = 3
"""Of a point that a run did not come by: where threads compete, a point may be met one run and not the next."""


@dataclass
class Outcome:
    """One run."""

    scenario: str
    point: str
    operation: str
    mode: str
    number: int = 0
    ending: str = ""
    struck: bool = False
    problems: list[str] = field(default_factory=list)
    debts: list[str] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    took_s: float = 0.0
    log: str = ""

    @property
    def replay(self) -> str:
        return f"{self.scenario}:{self.number}:{self.mode}"


@dataclass(frozen=True)
class Case:
    """One run to make; no fault: the counting run."""

    scenario: Scenario
    fault: Fault | None = None
    operation: str = ""
    number: int = 0


@dataclass(frozen=True)
class Lane:
    """What one run at a time may use."""

    number: int
    redis_url: str
    databases: Databases
    settings: dict[str, str]
    """Of the service; `{run}` in a value becomes a name that no other run has."""


def run_all(
    cases: Sequence[Case], databases: Databases, lanes: int, settings: dict[str, str], report: Callable[[Outcome], None]
) -> list[Outcome]:
    """Make every run, some at once. `report` hears of each as it ends."""
    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(running_valkey()) for _ in range(lanes)]
        idle = [Lane(number, url, databases, settings) for number, url in enumerate(urls)]
        running: dict[int, tuple[Lane, Case, Path, float]] = {}
        waiting = list(reversed(cases))
        try:
            while waiting or running:
                while waiting and idle:
                    lane, case = idle.pop(), waiting.pop()
                    descriptor, path = tempfile.mkstemp(prefix="anneal-outcome-")
                    os.close(descriptor)
                    answer = Path(path)
                    running[_start(lane, case, answer)] = (lane, case, answer, time.monotonic())
                for pid, (lane, case, answer, began) in list(running.items()):
                    if os.waitpid(pid, os.WNOHANG)[0]:
                        outcome = _read(case, answer)
                    elif time.monotonic() - began > RUN_LIMIT_S:
                        os.killpg(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                        outcome = _outcome(case, problems=[f"the run took longer than {RUN_LIMIT_S:.0f} s"])
                    else:
                        continue
                    outcome.took_s = round(time.monotonic() - began, 3)
                    del running[pid]
                    idle.append(lane)
                    answer.unlink()
                    outcomes.append(outcome)
                    report(outcome)
                time.sleep(0.002)
        finally:
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
    return outcomes


def cases_of(scenario: Scenario, points: Sequence[Point], exhaustive: bool) -> Iterator[Case]:
    """Every point of a scenario with every way to fail there.

    Args:
        exhaustive: also those that leave the disk as another one does: a kill after an effect on files is the kill
            before the next, and a disk that stays full is tried at every other point, one that recovers in between.
    """
    for number, point in enumerate(points, 1):
        skipped = {"disk full" if number % 2 else "no space"}
        if point.operation in ON_FILES:
            skipped.add(KILL_AFTER)
        for mode in point.modes:
            if exhaustive or mode not in skipped:
                yield Case(scenario, Fault(point.name, mode), point.operation, number)


def one_a_point(cases: Iterable[Case]) -> Iterator[Case]:
    """Of the cases of each point the next in turn, so that neighbouring points fail differently."""
    for turn, (_, same) in enumerate(itertools.groupby(cases, lambda case: (case.scenario.name, case.number))):
        ways = list(same)
        yield ways[turn % len(ways)]


def points_of(outcome: Outcome) -> list[Point]:
    """What a counting run found."""
    return [Point(**{**point, "modes": tuple(point["modes"])}) for point in outcome.points]


def _start(lane: Lane, case: Case, answer: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        outcome = _run(lane, case)
        answer.write_text(json.dumps(asdict(outcome)))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(0)


def _read(case: Case, answer: Path) -> Outcome:
    try:
        return Outcome(**json.loads(answer.read_text()))
    except ValueError:
        return _outcome(case, problems=["the harness failed; its traceback is on standard error"])


def _outcome(case: Case, **values: Any) -> Outcome:
    fault = case.fault or Fault("", "none")
    return Outcome(case.scenario.name, fault.point, case.operation, fault.mode, case.number, **values)


def _run(lane: Lane, case: Case) -> Outcome:
    for _ in range(MOST_TRIES):
        outcome = _try(lane, case)
        if outcome.struck or case.fault is None or outcome.problems:
            break
    return outcome


def _try(lane: Lane, case: Case) -> Outcome:
    outcome = _outcome(case)
    folder = Path(tempfile.mkdtemp(prefix="anneal-point-"))
    name = f"run_{os.getpid()}_{time.monotonic_ns()}"
    trace = folder / "trace.tsv" if case.fault is None else None
    stack = contextlib.ExitStack()
    try:
        url = lane.databases.fresh(name, folder / "database")
        scenario = case.scenario
        world = World(
            folder, url, lane.redis_url, {key: value.format(run=name) for key, value in lane.settings.items()}
        )
        if scenario.has_generator:
            stack.enter_context(world.generator())
        if scenario.is_swept_before:
            world.in_child(lambda: collect_all(world))
        facts = world.in_child(lambda: scenario.prepare(world))
        outcome.ending = world.act(lambda: scenario.act(world, facts), case.fault, trace)
        outcome.struck = world.board.struck
        outcome.problems += world.leftover_processes()
        outcome.problems += world.in_child(lambda: invariants.at_any_instant(world, facts))
        outcome.problems += world.in_child(lambda: recovery.recover(world, scenario, facts))
        outcome.problems += world.in_child(lambda: invariants.at_rest(world, facts))
        outcome.debts = sorted(set(world.debts()))
        if trace is not None:
            outcome.points = [asdict(point) for point in read_trace(trace)]
        allowed = ("done", "raised", "SIGKILL") if case.fault else ("done",)
        if outcome.ending not in allowed:
            outcome.problems.append(f"the process under test {outcome.ending}")
        if outcome.problems:
            outcome.log = world.log_path.read_text()[-20_000:] if world.log_path.exists() else ""
    except (Hung, AssertionError) as error:
        outcome.problems.append(f"{type(error).__name__}: {error}")
    finally:
        stack.close()
        lane.databases.drop(name)
        shutil.rmtree(folder, ignore_errors=True)
    return outcome
