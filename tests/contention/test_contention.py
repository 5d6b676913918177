"""A small contention at each change; `python -m tests.contention` is the whole of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contention import claims, deliveries, races
from tests.contention.service import service
from tests.failpoints.services import databases, running_valkey


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def contended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("contention")
    with (
        databases(request.param) as source,
        running_valkey() as redis_url,
        service(folder, source.fresh("contention", folder), redis_url),
    ):
        yield folder


def test_a_cancel_and_a_completion_at_the_same_instant_leave_one_end(contended: Path) -> None:
    result = races.run(40, seed=1)
    assert result["problems"] == []


def test_each_job_is_claimed_by_one_of_many(contended: Path) -> None:
    result = claims.run(8, 80)
    assert result["problems"] == []


def test_a_hint_that_is_delivered_again_and_again_trains_once(contended: Path) -> None:
    result = deliveries.calls(120, 3, 4, contended)
    assert result["problems"] == []
