"""Walking a list of jobs while others are created, with clocks that tie and step back.

What holds: a job that was there before the first page is seen exactly once, and one that is created meanwhile once at
most. Whether it is seen depends on its place alone: by (created_at, id), which never changes, behind the cursor or not.
A job's time is taken before its commit, so one that commits late may have a place that a walk has passed; a client that
walks only to the newest job it knows should go on for some seconds of `created_at`.
"""

from collections.abc import Callable

from fastapi.testclient import TestClient
from sqlalchemy import select, update

from shared.db import reading, transaction
from shared.models import Job
from tests.api.test_jobs import JOBS
from tests.shared.test_jobs import add_file, add_job

AT = 1_000_000.0


def add(file_id: str, created_at: float) -> str:
    """A job that the database's clock was wrong about, or whose transaction took its time to commit."""
    job_id = add_job(file_id)
    with transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(created_at=created_at))
    return job_id


def walk(client: TestClient, limit: int, between: Callable[[int], None] = lambda page: None) -> list[str]:
    """Ids of all pages, newest first."""
    seen: list[str] = []
    after: dict[str, str] = {}
    for number in range(1000):
        page = client.get(JOBS, params={"limit": limit, **after}).json()
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            return seen
        after = {"after": page["last_id"]}
        between(number)
    raise AssertionError("the list has no end")


def test_what_was_there_is_seen_once_whatever_is_created_meanwhile(client: TestClient) -> None:
    """Equal times, a clock that stepped back, transactions that committed late: the place of a row never changes."""
    file_id = add_file()
    there = [add(file_id, AT + index // 4) for index in range(24)]
    born: dict[str, float] = {}

    def create(page: int) -> None:
        for created_at in (AT + 100, AT + 5 - page, AT + page, AT - 1):
            born[add(file_id, created_at)] = created_at

    seen = walk(client, 5, create)
    assert len(seen) == len(set(seen)), "none twice"
    assert set(there) <= set(seen), "none missing"
    assert {job for job in born if born[job] <= AT - 100} <= set(seen), "the walk was not yet there"
    assert not [job for job in seen if born.get(job) == AT + 100], "it was past their place"


def test_jobs_of_one_instant_have_an_order_that_stays(client: TestClient) -> None:
    file_id = add_file()
    ids = [add(file_id, AT) for _ in range(12)]
    assert walk(client, 5) == walk(client, 1) == walk(client, 100) == sorted(ids, reverse=True)


def test_a_cursor_whose_job_has_moved_on_still_holds(client: TestClient) -> None:
    file_id = add_file()
    ids = [add(file_id, AT + index) for index in range(6)]
    seen = walk(client, 2, lambda page: client.post(f"{JOBS}/{ids[5 - 2 * page - 1]}/cancel").raise_for_status())
    assert seen == ids[::-1]
    with reading() as session:
        assert len(session.scalars(select(Job.id).where(Job.status == "cancelled")).all()) == 2
