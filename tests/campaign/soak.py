"""`python -m tests.campaign.soak`: the whole service under a steady load for half an hour, and nothing may grow.

    python -m tests.campaign.soak --minutes 30 --out benchmarks/results

Jobs, live event streams, chat, uploads and deletions go on all the time; every 10 s each process's memory, descriptors
and threads are noted, and the bytes on disk. What may grow, and how far, is `growth.BOUNDS`, fixed before measuring.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.campaign import growth
from tests.campaign import plan as plans
from tests.campaign.campaign import Campaign
from tests.campaign.growth import Sampler
from tests.campaign.options import Options
from tests.campaign.patience import Client, GaveUp
from tests.campaign.plan import JobPlan

SAMPLE_EVERY_S = 10.0
CALM_BEHAVIOURS = ("finish", "cancel", "diverge", "invalid", "garbage")
"""Jobs of the soak: without those whose trainers die or fill their logs on purpose."""


class Soak(Campaign):
    """A campaign whose faults are none and whose time is long."""

    def __init__(self, options: Options) -> None:
        super().__init__(options, lambda text: print(text, flush=True))
        self.sampler = Sampler(self.service, self.database_url)
        self.uploads = Uploader(self)

    def _plan(self, index: int) -> JobPlan:
        for number in range(index * 100, index * 100 + 100):
            job = plans.toy_job(self.options.seed, number)
            if job.behaviour in CALM_BEHAVIOURS:
                self.plans[index] = dataclasses.replace(job, index=index)
                return self.plans[index]
        raise AssertionError("a hundred jobs in a row that are not calm")

    def _strike(self) -> None:
        self.uploads.thread.start()
        ends_at = time.monotonic() + self.options.minutes * 60
        next_sample = time.monotonic()
        while time.monotonic() < ends_at:
            self._tend()
            if time.monotonic() >= next_sample:
                next_sample += SAMPLE_EVERY_S
                sample = self.sampler.take()
                if len(self.sampler.samples) % 30 == 1:
                    self._say(f"{sample.at_s:.0f} s: {sample.jobs_ended} jobs ended, disk {sample.disk_bytes}")
        self.uploads.stop()


class Uploader:
    """Uploads a file, reads it back, deletes it, again and again; what is left in the end is nothing."""

    def __init__(self, soak: Campaign) -> None:
        self.count = 0
        self._notebook = soak.notebook
        self._url = soak.service.url
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="uploader", daemon=True)

    def stop(self) -> None:
        self._stop.set()
        self.thread.join(timeout=60)

    def _run(self) -> None:
        client, draw = Client(self._url, self._notebook), random.Random(0)
        while not self._stop.wait(0.5):
            row = json.dumps({"prompt": "a", "completion": "b" * draw.randint(1, 400)}) + "\n"
            content = (row * draw.randint(1, 500)).encode()
            try:
                file = {"file": ("some.jsonl", content)}
                answer = client.call("POST", "/v1/files", files=file, data={"purpose": "fine-tune"})
                path = f"/v1/files/{answer.json()['id']}"
                if client.call("GET", f"{path}/content").content != content:
                    raise GaveUp(f"{path}: other bytes came back than were sent")
                client.call("DELETE", path)
                client.call("GET", "/v1/files", params={"limit": 20})
                client.call("GET", "/v1/models")
            except GaveUp as error:
                with self._notebook.lock:
                    self._notebook.refusals.append(str(error))
            self.count += 1


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--out", type=Path, default=None, help="folder for the verdict")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if given.seed is None else given.seed
    print(f"SEED={seed}", flush=True)
    soak = Soak(
        Options(
            seed=seed,
            faults=0,
            jobs=0,
            database=given.database,
            minutes=given.minutes,
            lease_s=20,
            generators=1,
            batches=0,  # files that stay are growth
            parcels=False,
        )
    )
    print(f"working in {soak.folder}", flush=True)
    soak.run()
    result = _verdict(soak)
    where = given.out or soak.folder
    where.mkdir(parents=True, exist_ok=True)
    (where / f"soak_{given.database}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(_summary(result), flush=True)
    if result["good"]:
        shutil.rmtree(soak.folder, ignore_errors=True)
    else:
        print(f"everything is in {soak.folder}", flush=True)
    return 0 if result["good"] else 1


def _verdict(soak: Soak) -> dict[str, Any]:
    grown = growth.judge(soak.sampler.samples)
    return {
        "good": not soak.findings and all(one["within_bound"] for one in grown),
        "options": dataclasses.asdict(soak.options),
        "machine": {"cores": os.cpu_count(), "sqlite": sqlite3.sqlite_version},
        "times_s": soak.times_s,
        "bounds": growth.BOUNDS,
        "load": {
            "jobs": len(soak.evidence.jobs),
            "chats": len(soak.chats),
            "streams": len(soak.notebook.followed),
            "uploads_and_deletions": soak.uploads.count,
        },
        "growth": grown,
        "findings": [dataclasses.asdict(finding) for finding in soak.findings[:100]],
        "samples": [dataclasses.asdict(sample) for sample in soak.sampler.samples[::6]],
    }


def _summary(result: dict[str, Any]) -> str:
    lines = [f"load: {result['load']}"]
    for one in result["growth"]:
        mark = "  " if one["within_bound"] else "! "
        lines.append(f"{mark}{one['what']:<34} {one['first']:>14,.0f} → {one['last']:>14,.0f}   {one['rule']}")
    lines += [f"! {finding['check']}: {finding['subject']}: {finding['what']}" for finding in result["findings"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
