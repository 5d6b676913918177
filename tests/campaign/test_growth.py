"""The soak's verdict: a leak is found, noise and what finished jobs leave are not taken for one."""

import random

import pytest

from tests.campaign import growth
from tests.campaign.growth import MIB, ProcessSample, Sample


def run(minutes: int = 30, **leaks: float) -> list[Sample]:
    """Samples of a service that ends four jobs a minute; `leaks` are what is added each minute."""
    draw = random.Random(1)
    samples = []
    for tick in range(minutes * 6):
        minute, jobs = tick / 6, tick * 4 // 6
        process = ProcessSample(
            rss_bytes=int(100 * MIB + draw.uniform(-2, 2) * MIB + leaks.get("rss", 0) * minute),
            descriptors=int(20 + draw.choice((0, 1, 2)) + leaks.get("descriptors", 0) * minute),
            threads=int(5 + leaks.get("threads", 0) * minute),
        )
        disk = {
            "database": jobs * 50_000,
            "storage": int(jobs * 90_000 + leaks.get("storage", 0) * minute**2),
            "run": jobs * 2_000,
            "valkey": 30 * MIB,
        }
        samples.append(Sample(tick * 10, jobs, {"api": process, "valkey": process}, disk))
    return samples


def broken(samples: list[Sample]) -> list[str]:
    return [record["what"] for record in growth.judge(samples) if not record["within_bound"]]


def test_noise_and_finished_jobs_are_no_leak() -> None:
    assert broken(run()) == []


@pytest.mark.parametrize(
    ("leaks", "found"),
    [
        ({"rss": 1 * MIB}, ["api memory", "valkey memory"]),
        ({"descriptors": 1}, ["api descriptors", "valkey descriptors"]),
        ({"threads": 1}, ["api threads", "valkey threads"]),
        ({"storage": 10_000}, ["disk storage"]),
    ],
)
def test_a_leak_is_found(leaks: dict[str, float], found: list[str]) -> None:
    assert broken(run(**leaks)) == found
