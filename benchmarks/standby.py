#!/usr/bin/env python3
"""From POST of a job to the start of its first step and to its first metrics, through `anneal up`: cold and warm.

    python -m benchmarks.standby [--jobs 3] [--rows 200] [--out FILE]

cold    ANNEAL_STANDBY_TRAINER=false: every job starts a process of its own
warm    a trainer waits, its imports and weights behind it (the first of the jobs finds an empty cache of tokens)
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LIMIT_S = 300.0
LOOK_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=3, help="of each kind")
    parser.add_argument("--rows", type=int, default=200, help="of the training file")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {}
    for name, standby in (("cold", "false"), ("warm", "true")):
        with service(ANNEAL_STANDBY_TRAINER=standby, ANNEAL_GENERATION_WARM_UP="false") as (client, data):
            jobs = [one_job(client, data, options.rows, warm=name == "warm") for _ in range(options.jobs)]
        found[name] = {**{key: statistics.median(job[key] for job in jobs) for key in jobs[0]}, "jobs": jobs}
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version()}
    result = {"command": " ".join(["python -m benchmarks.standby", *sys.argv[1:]]), "machine": machine, **found}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


@contextmanager
def service(**settings: str) -> Iterator[tuple[httpx.Client, Path]]:
    """A client of an `anneal up` that is ready, and its folder."""
    with tempfile.TemporaryDirectory(prefix="anneal-bench-") as folder:
        command = [sys.executable, "-m", "cli.main", "up", "--data", folder, "--port", "0"]
        up = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | settings
        )
        try:
            assert up.stdout is not None
            with httpx.Client(base_url=up.stdout.readline().strip().rsplit(" ", 1)[-1], timeout=30) as client:
                run_one(client, 8)  # whatever happens once: weights are unpacked, kernels compiled
                yield client, Path(folder)
        finally:
            up.terminate()
            up.wait(timeout=120)


def one_job(client: httpx.Client, data: Path, rows: int, *, warm: bool) -> dict[str, float]:
    if warm:
        wait_for_standby(data)
    return run_one(client, rows)


def run_one(client: httpx.Client, rows: int) -> dict[str, float]:
    """Seconds from POST to `started` and to the first metrics, of a job of one step."""
    text = "".join(json.dumps({"prompt": f"Question {n}?", "completion": f"Answer {n}."}) + "\n" for n in range(rows))
    upload = {"file": ("rows.jsonl", text.encode())}
    file = client.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).raise_for_status().json()
    body = {"model": MODEL, "training_file": file["id"], "training": {"max_steps": 1, "batch_size": 2}}
    posted = time.perf_counter()
    job = client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()
    url = f"/v1/fine_tuning/jobs/{job['id']}"
    seen: dict[str, float] = {}
    while time.perf_counter() - posted < LIMIT_S:
        for event in client.get(f"{url}/events").raise_for_status().json()["data"]:
            for name, words in (("to_started_s", "job started"), ("to_first_metrics_s", "Step 1/")):
                if words in event["message"]:
                    seen.setdefault(name, round(time.perf_counter() - posted, 2))
        state: dict[str, Any] = client.get(url).raise_for_status().json()
        if state["status"] == "succeeded":
            return seen
        assert state["status"] != "failed", state["error"]
        time.sleep(LOOK_S)
    raise TimeoutError(f"the job has not ended within {LIMIT_S:.0f} s")


def wait_for_standby(data: Path) -> None:
    """Until a trainer waits that was started after the last job."""
    since, deadline = time.time(), time.monotonic() + LIMIT_S
    while not any(at >= since for at in ready(data)):
        assert time.monotonic() < deadline, "no trainer waits"
        time.sleep(0.2)


def ready(data: Path) -> list[float]:
    found = []
    for path in (data / "run" / "standby").glob("*/ready"):
        with suppress(FileNotFoundError):
            found.append(path.stat().st_mtime)
    return found


if __name__ == "__main__":
    main()
