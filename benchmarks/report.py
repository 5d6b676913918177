"""The file that a benchmark keeps up to date while it runs: what was asked on which machine, and what was found."""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any


def runs_of(out: Path | None) -> list[dict[str, Any]]:
    """Those of an earlier report, to go on from."""
    return json.loads(out.read_text())["runs"] if out is not None and out.exists() else []


def write(out: Path | None, program: str, runs: list[dict[str, Any]], **more: Any) -> None:
    """Whole or not at all: a benchmark that is cut off must leave what it has.

    Args:
        program: as it is started.
        more: what else is told, before the runs.
    """
    if out is None:
        return
    report = {
        "command": command(program),
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine(),
        "device": device(runs),
        **more,
        "runs": runs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(out.name + ".new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    new.replace(out)


def command(program: str) -> str:
    """What was typed, with folders that are somebody's own left out."""
    return " ".join([program, *(Path(part).name if part.startswith("/") else part for part in sys.argv[1:])])


def machine() -> dict[str, Any]:
    return {"cpus": len(os.sched_getaffinity(0)), "processor": _processor(), "python": platform.python_version()}


def device(runs: list[dict[str, Any]]) -> str | None:
    return next((run["device"] for run in runs if run["device"]), None)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
