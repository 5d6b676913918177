"""What grows: samples of every process and of the disk, and the bounds they must keep.

A process may not grow at all, beyond noise. The disk may grow by what each finished job leaves for good (its rows, its
kept checkpoints, its files, its logs), and by no more a job in the end than in the beginning.
"""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from shared.models import TERMINAL, Job
from tests.campaign import procfs
from tests.campaign.evidence import engine_of
from tests.campaign.service import Service

MIB = 2**20
BOUNDS: dict[str, Any] = {
    "warm_up_share": 0.2,
    "rss_bytes": 10 * MIB,
    "rss_share_an_hour": 0.05,
    "valkey_bytes_a_job": 64 * 1024,
    "descriptors": 3,
    "threads": 3,
    "disk_a_job_later_over_earlier": 1.25,
    "valkey_disk_bytes": 200 * MIB,
}
"""Measured over the run without its first fifth. Memory: a straight line through the samples may rise by 10 MiB over
the run, or by 5 % an hour. Valkey keeps a job's live events for an hour, so it may add 64 KiB for each job that ends
meanwhile; its append-only file is rewritten from 64 MiB on. Descriptors and threads: the mean of the last third over
that of the first. Disk: bytes a job in the second half over those in the first half."""


@dataclass(frozen=True)
class ProcessSample:
    rss_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Sample:
    at_s: float
    jobs_ended: int
    processes: dict[str, ProcessSample] = field(default_factory=dict)
    disk_bytes: dict[str, int] = field(default_factory=dict)


class Sampler:
    """Looks at a running service."""

    def __init__(self, service: Service, database_url: str) -> None:
        self.samples: list[Sample] = []
        self._service = service
        self._database_url = database_url
        self._began = time.monotonic()

    def take(self) -> Sample:
        data = self._service.settings.data
        disk = {
            "database": sum(_size(str(path)) for path in data.glob("anneal.db*"))
            or folder_bytes(data.parent / "postgres"),
            "storage": folder_bytes(self._service.settings.storage_root),
            "run": folder_bytes(self._service.settings.run_dir),
            "valkey": folder_bytes(data / "valkey"),
        }
        sample = Sample(time.monotonic() - self._began, self._jobs_ended(), self._processes(), disk)
        self.samples.append(sample)
        return sample

    def _jobs_ended(self) -> int:
        try:
            with Session(engine_of(self._database_url)) as session:
                return session.scalar(select(func.count()).select_from(Job).where(Job.status.in_(TERMINAL))) or 0
        except SQLAlchemyError:
            return self.samples[-1].jobs_ended if self.samples else 0

    def _processes(self) -> dict[str, ProcessSample]:
        found = {}
        for member in self._service.members:
            process = member.identity
            if process is None or member.role == "postgres":
                continue
            found[member.name] = _look(process.pid)
            if member.role in ("train", "batch"):
                found |= {f"{member.name} pool": _look(child.pid) for child in procfs.children(process.pid)[:1]}
        return {name: sample for name, sample in found.items() if sample is not None}


def _look(pid: int) -> ProcessSample | None:
    try:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
        return ProcessSample(int(status["VmRSS"].split()[0]) * 1024, descriptors, int(status["Threads"]))
    except (OSError, KeyError):
        return None


def folder_bytes(folder: Path) -> int:
    return sum(_size(f"{root}/{name}") for root, _, names in os.walk(folder) for name in names)


def _size(path: str) -> int:
    """Of a file that may go at any moment, as SQLite's journal does."""
    with contextlib.suppress(OSError):
        return os.lstat(path).st_size
    return 0


def judge(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One record for everything that was watched, with its rule and whether it was kept."""
    steady = [sample for sample in samples if sample.at_s >= BOUNDS["warm_up_share"] * samples[-1].at_s]
    hours = (steady[-1].at_s - steady[0].at_s) / 3600
    jobs = steady[-1].jobs_ended - steady[0].jobs_ended
    records = []
    for name in sorted({name for sample in steady for name in sample.processes}):
        looks = [(sample.at_s, sample.processes[name]) for sample in steady if name in sample.processes]
        if len(looks) < len(steady) / 2:
            continue  # started again on the way: a deploy, not a leak
        records.append(_memory(name, looks, hours, jobs))
        for what in ("descriptors", "threads"):
            values = [float(getattr(look, what)) for _, look in looks]
            first, last = _mean(values[: len(values) // 3]), _mean(values[-len(values) // 3 :])
            rule = f"at most {BOUNDS[what]} more"
            records.append(_record(f"{name} {what}", first, last, rule, last - first <= BOUNDS[what]))
    records += [_disk(name, steady) for name in ("database", "storage", "run")]
    most = max(sample.disk_bytes["valkey"] for sample in steady)
    rule = f"at most {BOUNDS['valkey_disk_bytes']:,}"
    first = float(steady[0].disk_bytes["valkey"])
    records.append(_record("disk valkey", first, float(most), rule, most <= BOUNDS["valkey_disk_bytes"]))
    return records


def _memory(name: str, looks: list[tuple[float, ProcessSample]], hours: float, jobs: int) -> dict[str, Any]:
    times, values = [at for at, _ in looks], [float(look.rss_bytes) for _, look in looks]
    slope, start = _line(times, values)
    first, last = start + slope * times[0], start + slope * times[-1]
    allowed = max(BOUNDS["rss_bytes"], BOUNDS["rss_share_an_hour"] * hours * _mean(values))
    if name == "valkey":
        allowed += jobs * BOUNDS["valkey_bytes_a_job"]
    return _record(f"{name} memory", first, last, f"at most {allowed:,.0f} more", last - first <= allowed)


def _disk(name: str, steady: Sequence[Sample]) -> dict[str, Any]:
    half = len(steady) // 2
    earlier, later = _bytes_a_job(name, steady[:half]), _bytes_a_job(name, steady[half:])
    bound = BOUNDS["disk_a_job_later_over_earlier"]
    rule = f"bytes a job, at most {bound:g} times as many later"
    return _record(f"disk {name}", earlier, later, rule, later <= bound * max(earlier, 1024))


def _bytes_a_job(name: str, samples: Sequence[Sample]) -> float:
    slope, _ = _line([float(s.jobs_ended) for s in samples], [float(s.disk_bytes[name]) for s in samples])
    return slope


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """(slope, value at 0) of the least-squares line; a flat one through too little."""
    x_mean, y_mean = _mean(xs), _mean(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0
    return slope, y_mean - slope * x_mean


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _record(what: str, first: float, last: float, rule: str, kept: bool) -> dict[str, Any]:
    return {"what": what, "first": round(first), "last": round(last), "rule": rule, "within_bound": kept}
