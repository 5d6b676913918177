"""`python -m tests.failpoints`: every point of every scenario, every way to fail there; exit status 1 if any is bad.

python -m tests.failpoints                           SQLite, all points
python -m tests.failpoints --database postgresql
python -m tests.failpoints --once                    every point, each with one of its ways to fail, in turn
python -m tests.failpoints --only run:17:"kill after"    one of them again, with its log
python -m tests.failpoints --list                    the points, without running them
python -m tests.failpoints --scenario run --every 5  every fifth case of one scenario
python -m tests.failpoints --scenario "batch-*"      all scenarios of batches
"""

import argparse
import contextlib
import fnmatch
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

from tests.failpoints import cuts, runner
from tests.failpoints.points import Point
from tests.failpoints.runner import Case, Outcome
from tests.failpoints.scenarios import SCENARIOS, Scenario
from tests.failpoints.services import databases, running_s3

TELL_EVERY = 100


def main() -> int:
    options = _options()
    chosen = [scenario for scenario in SCENARIOS if fnmatch.fnmatchcase(scenario.name, options.scenario)]
    if options.only:
        wanted, number, mode = options.only.split(":", 2)
        chosen = [scenario for scenario in SCENARIOS if scenario.name == wanted]
    if not chosen:
        print("no scenario of that name; there are " + ", ".join(scenario.name for scenario in SCENARIOS))
        return 2
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(databases(options.database))
        settings = {}
        if options.storage == "s3":
            settings["ANNEAL_STORAGE_URL"] = stack.enter_context(running_s3()) + "/{run}"
            chosen = [scenario for scenario in chosen if not scenario.looks_behind]

        def run(cases: list[Case]) -> list[Outcome]:
            return runner.run_all(cases, source, options.lanes, settings, _Reporter(len(cases)))

        counted = {outcome.scenario: outcome for outcome in run([Case(scenario) for scenario in chosen])}
        points = {scenario.name: runner.points_of(counted[scenario.name]) for scenario in chosen}
        _show_points(chosen, points, options.list)
        if options.list:
            return int(any(outcome.problems or outcome.debts for outcome in counted.values()))
        cases = [
            case
            for scenario in chosen
            for case in runner.cases_of(
                scenario, points[scenario.name], options.exhaustive or bool(options.only or options.mode)
            )
        ]
        if options.only:
            cases = [case for case in cases if (str(case.number), case.fault and case.fault.mode) == (number, mode)]
        cases = [case for case in cases if _is_wanted(case, options.match, options.mode)][:: options.every]
        if options.once:
            cases = list(runner.one_a_point(cases))
        cases = cases[options.skip :]
        if not cases:
            print("no case of that kind")
            return 2
        print(f"{len(cases)} runs on {options.database} and {options.storage}, {options.lanes} at once", flush=True)
        outcomes = [*counted.values(), *run(cases)]
    verdict = _verdict(points, outcomes, options, time.monotonic() - began)
    if not (options.only or options.scenario != "*" or options.match or options.mode):
        verdict["checkpoint_cuts"] = cuts.run_all()
        verdict["bad"] += verdict["checkpoint_cuts"]["accepted"]
    _show(verdict, outcomes)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(verdict, indent=1) + "\n")
    return 1 if verdict["bad"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.failpoints", description=__doc__.splitlines()[0])
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--storage", choices=("folder", "s3"), default="folder")
    parser.add_argument("--scenario", default="*", help="only these: a name, or a pattern of names")
    parser.add_argument("--exhaustive", action="store_true", help="also ways to fail that leave the disk as others do")
    parser.add_argument("--every", type=int, default=1, help="only every n-th case")
    parser.add_argument("--once", action="store_true", help="every point with one of its ways to fail, in turn")
    parser.add_argument("--skip", type=int, default=0, help="go on after that many cases, in the order of --list")
    parser.add_argument("--match", default="", help="only points with this in their name")
    parser.add_argument("--mode", help="only this way to fail")
    parser.add_argument("--only", metavar="SCENARIO:N:MODE", help="one case again")
    parser.add_argument("--list", action="store_true", help="count and name the points, run none")
    parser.add_argument("--lanes", type=int, default=max(2, os.cpu_count() or 2), help="runs at once")
    parser.add_argument("--out", type=Path, help="where the verdict goes, as JSON")
    return parser.parse_args()


def _is_wanted(case: Case, text: str, mode: str | None) -> bool:
    assert case.fault is not None
    return text in case.fault.point and mode in (None, case.fault.mode)


class _Reporter:
    """Tells what is bad at once, and now and then how far the runs are."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = self._bad = 0

    def __call__(self, outcome: Outcome) -> None:
        self._done += 1
        if outcome.problems or outcome.debts:
            self._bad += 1
            print(f"BAD  {outcome.replay}  ({outcome.point or 'no fault'}; it ended: {outcome.ending})")
            for sentence in [*outcome.problems, *outcome.debts]:
                print(f"       {sentence}")
        if self._done % TELL_EVERY == 0:
            print(f"{self._done} of {self._total} runs, {self._bad} bad", flush=True)


def _show_points(chosen: list[Scenario], points: dict[str, list[Point]], in_full: bool) -> None:
    for scenario in chosen:
        print(f"{scenario.name}: {len(points[scenario.name])} points")
        for number, point in enumerate(points[scenario.name] if in_full else [], 1):
            print(f"  {number:4} {point.name}  [{', '.join(point.modes)}]")


def _verdict(
    points: dict[str, list[Point]], outcomes: list[Outcome], options: argparse.Namespace, took_s: float
) -> dict[str, object]:
    faults = [outcome for outcome in outcomes if outcome.point]
    struck = [outcome for outcome in faults if outcome.struck]
    bad = [outcome for outcome in outcomes if outcome.problems or outcome.debts]
    return {
        "harness": "failpoints",
        "database": options.database,
        "storage": options.storage,
        "every": options.every,
        "once": options.once,
        "skipped": options.skip,
        "points": sum(len(found) for found in points.values()),
        "points_by_operation": dict(Counter(point.operation for found in points.values() for point in found)),
        "points_by_scenario": {name: len(found) for name, found in points.items()},
        "points_struck": len({(outcome.scenario, outcome.point) for outcome in struck}),
        "runs": len(faults),
        "runs_struck": len(struck),
        "runs_by_mode": dict(Counter(outcome.mode for outcome in struck)),
        "not_reached": [f"{outcome.replay} {outcome.point}" for outcome in faults if not outcome.struck],
        "bad": len(bad),
        "bad_runs": [
            {"replay": o.replay, "point": o.point, "ending": o.ending, "problems": o.problems, "debts": o.debts}
            for o in bad
        ],
        "names": {name: [point.name for point in found] for name, found in points.items()},
        "took_s": round(took_s, 1),
    }


def _show(verdict: dict[str, object], outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.problems and len(outcomes) < 4:
            print(outcome.log)
    shown = {name: value for name, value in verdict.items() if name not in ("names", "bad_runs")}
    print(json.dumps(shown, indent=1))
    print(f"{verdict['points_struck']} points struck in {verdict['runs_struck']} runs: {verdict['bad']} bad")


if __name__ == "__main__":
    sys.exit(main())
