"""What can notice a missing guard: a test by its node id, points of a failpoint scenario, a part of the contention.

A check passes with exit status 0 and notices something with 1; anything else is a check that did not run.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

KILL_AFTER_S = 10.0


@dataclass(frozen=True)
class Check:
    """One command, run in a copy of the project."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float = 240.0
    hang_counts: bool = False
    """Whether running past the limit counts as noticing: without the guard the check itself waits for ever."""


@dataclass(frozen=True)
class Result:
    """passed, noticed, hung, or broken: the check could not be run."""

    outcome: str
    output: str
    took_s: float


def pytest(node: str, **values: float | bool) -> Check:
    return Check(node, ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", node), **values)  # type: ignore[arg-type]


def failpoints(scenario: str, match: str | None = None, mode: str | None = None, database: str = "sqlite") -> Check:
    """The points of a scenario that match; without a text only the run in which nothing fails, judged by its fsyncs."""
    arguments = ["-m", "tests.failpoints", "--database", database, "--scenario", scenario, "--lanes", "1"]
    arguments += ["--list"] if match is None else ["--match", match]
    arguments += [] if mode is None else ["--mode", mode]
    what = "without a fault" if match is None else f"{match!r}, {mode or 'every way to fail'}"
    return Check(f"failpoints {scenario}: {what}", tuple(arguments))


def contention(part: str, database: str, scale: float) -> Check:
    arguments = ("-m", "tests.contention", "--database", database, "--part", part, "--scale", str(scale), "--seed", "1")
    return Check(f"contention {part} on {database}", arguments)


def run(check: Check, tree: Path) -> Result:
    """Run a check in a copy of the project."""
    began = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ANNEAL_", "PYTEST_"))}
    process = subprocess.Popen(
        (sys.executable, "-W", "ignore", *check.arguments),
        cwd=tree,
        env={**environment, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=check.limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # so that it can stop the servers that it started
        try:
            output, _ = process.communicate(timeout=KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        return Result("hung", output.decode(errors="replace"), time.monotonic() - began)
    outcome = {0: "passed", 1: "noticed"}.get(process.returncode, "broken")
    return Result(outcome, output.decode(errors="replace"), time.monotonic() - began)
