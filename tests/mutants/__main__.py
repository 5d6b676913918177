"""`python -m tests.mutants`: remove every guard once; exit status 1 if one is not missed, or a check is no use.

python -m tests.mutants                 all of them
python -m tests.mutants --only lease    those with this in their name
python -m tests.mutants --texts         only look whether every guard is still where the list says
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.mutants.checks import Check, Result, run
from tests.mutants.guard import Guard
from tests.mutants.guards import GUARDS

PROJECT = Path(__file__).parents[2]
COPIED = ("api", "cli", "examples", "migrations", "shared", "tests", "worker", "pyproject.toml")


def main() -> int:
    options = _options()
    guards = [guard for guard in GUARDS if options.only.lower() in guard.name.lower()]
    lost = [problem for guard in guards for problem in _misplaced(guard)]
    for problem in lost:
        print(problem)
    if lost or options.texts:
        print(f"{len(guards)} guards, {len(lost)} not where the list says")
        return 1 if lost else 0
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="anneal-mutants-"))
    try:
        original = _copy(folder / "original")
        checks = list(dict.fromkeys(guard.check for guard in guards))
        print(f"{len(checks)} checks on the unchanged copy", flush=True)
        useless = _in_parallel(options.lanes, [(check, original) for check in checks], _tell_if_useless)
        print(f"{len(guards)} guards, one removed at a time", flush=True)
        mutants = _in_parallel(options.lanes, [(guard, original) for guard in guards], _judge)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    verdict = _verdict(guards, [name for name in useless if name], mutants, time.monotonic() - began)
    print(f"{verdict['caught']} of {verdict['guards']} caught; {verdict['bad']} bad")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(verdict, indent=1) + "\n")
    return 1 if verdict["bad"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only guards with this in their name")
    parser.add_argument("--texts", action="store_true", help="only check that every text is there once")
    parser.add_argument("--lanes", type=int, default=2, help="checks at once")
    parser.add_argument("--out", type=Path, help="where the verdict goes, as JSON")
    return parser.parse_args()


def _misplaced(guard: Guard) -> list[str]:
    problems = []
    for change in guard.changes:
        count = (PROJECT / change.file).read_text().count(change.old)
        if count != 1:
            problems.append(f"{guard.name}: its text is in {change.file} {count} times, not once:\n{change.old}\n")
    return problems


def _copy(target: Path) -> Path:
    target.mkdir(parents=True)
    for name in COPIED:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    return target


def _in_parallel(lanes: int, work: list[tuple[Any, Path]], do: Any) -> list[Any]:
    with ThreadPoolExecutor(lanes) as pool:
        return list(pool.map(lambda item: do(*item), work))


def _tell_if_useless(check: Check, original: Path) -> str | None:
    result = run(check, original)
    if result.outcome == "passed":
        print(f"passes    {check.name} in {result.took_s:.0f} s", flush=True)
        return None
    print(f"NO USE: {check.name} {result.outcome} on the unchanged copy\n{result.output[-3000:]}", flush=True)
    return check.name


def _judge(guard: Guard, original: Path) -> Result:
    tree = original.parent / f"mutant-{abs(hash(guard.name))}"
    shutil.copytree(original, tree)
    try:
        for change in guard.changes:
            path = tree / change.file
            path.write_text(path.read_text().replace(change.old, change.new))
        result = run(guard.check, tree)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    if _is_caught(guard, result):
        print(f"caught    {guard.name}: by {guard.check.name} in {result.took_s:.0f} s", flush=True)
    else:
        end = result.output[-3000:] if result.outcome == "broken" else ""
        print(f"SURVIVED  {guard.name}: {guard.check.name} {result.outcome}\n{end}", flush=True)
    return result


def _is_caught(guard: Guard, result: Result) -> bool:
    return result.outcome == "noticed" or (result.outcome == "hung" and guard.check.hang_counts)


def _verdict(guards: list[Guard], useless: list[str], results: list[Result], took_s: float) -> dict[str, Any]:
    rows = [
        {
            "guard": guard.name,
            "file": [change.file for change in guard.changes],
            "check": guard.check.name,
            "outcome": "caught" if _is_caught(guard, result) else f"SURVIVED ({result.outcome})",
            "took_s": round(result.took_s, 1),
        }
        for guard, result in zip(guards, results, strict=True)
    ]
    caught = sum(row["outcome"] == "caught" for row in rows)
    return {
        "harness": "mutants",
        "guards": len(rows),
        "caught": caught,
        "checks_of_no_use": useless,
        "bad": len(rows) - caught + len(useless),
        "mutants": rows,
        "took_s": round(took_s, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
