"""Who is claimed next, and what those who wait are told about it. Arithmetic by hand, claims by the real queue."""

import time
from typing import Any

import pytest
from sqlalchemy import event, update

from shared import jobs, queue_view
from shared.db import clock, get_engine, reading, transaction
from shared.models import Job, JobStatus
from shared.queue_view import QueueView, Running, View
from tests.shared.test_job_moves import claimed_job
from tests.shared.test_jobs import add_file, add_job

NOW = 1000.0


def row(job_id: str) -> Job:
    with reading() as session:
        return session.get_one(Job, job_id)


def shown(view: QueueView, *job_ids: str) -> list[Any]:
    queue = view.of([row(job_id) for job_id in job_ids])
    return [queue.get(job_id) for job_id in job_ids]


def positions(*job_ids: str) -> list[int | None]:
    return [place and place["position"] for place in shown(QueueView(), *job_ids)]


def starts(running: list[Running], duration_s: float | None, count: int = 4) -> list[float | None]:
    places = [(0, float(index), str(index)) for index in range(count)]
    view = View(NOW, places, running, duration_s)
    return [view.start_of(view.position(place)) for place in places]


@pytest.mark.usefixtures("settings")
def test_the_highest_priority_is_claimed_first_then_the_oldest() -> None:
    file_id = add_file()
    low, first, second, high = (add_job(file_id, training={"priority": p}) for p in (-100, 0, 0, 100))
    order = [high, first, second, low]
    assert positions(*order) == [1, 2, 3, 4]
    for job_id in order:
        with transaction() as session:
            claimed = jobs.claim_next(session, "w", 60)
        assert claimed is not None and claimed.id == job_id


@pytest.mark.usefixtures("settings")
def test_only_queued_jobs_have_a_place_and_those_ahead_are_counted() -> None:
    file_id = add_file()
    running, paused, ahead, last = (add_job(file_id) for _ in range(4))
    with transaction() as session:
        jobs.claim_next(session, "w", 60)
        session.execute(update(Job).where(Job.id == paused).values(status=JobStatus.PAUSED))
    assert positions(running, paused, ahead, last) == [None, None, 1, 2]


def test_jobs_start_when_workers_become_free() -> None:
    one = [Running("a", 900, 1100)]
    assert starts(one, 300) == [1100, 1400, 1700, 2000]
    two = [*one, Running("b", 950, 1250)]
    assert starts(two, 300) == [1100, 1250, 1400, 1550]
    assert starts([Running("a", 900, 990)], 300)[0] == NOW, "a run that is over its time may end at any moment"


def test_what_nothing_tells_is_null() -> None:
    assert starts([], None) == [None] * 4
    assert starts([Running("a", 900, None)], None) == [None] * 4
    assert starts([Running("a", 900, 1100)], None) == [1100, None, None, None]
    assert starts([Running("a", 900, None)], 300, 1) == [1200], "it will take as long as jobs took lately"
    assert starts([], 300, 2) == [NOW, NOW + 300], "jobs are run here, and nobody is busy"


@pytest.mark.usefixtures("settings")
def test_an_estimate_is_made_of_recent_jobs_and_of_what_runs() -> None:
    file_id = add_file()
    done = [claimed_job() for _ in range(3)]
    with transaction() as session:
        at = clock(session)
        for job, took_s in zip(done, (50, 100, 1000), strict=True):
            values = {"status": "succeeded", "started_at": at - 5000, "finished_at": at - 5000 + took_s}
            session.execute(update(Job).where(Job.id == job.id).values(**values))
    running = claimed_job()
    waits, later = add_job(file_id), add_job(file_id)
    with transaction() as session:
        session.execute(update(Job).where(Job.id == running.id).values(estimated_finish=at + 40))
        session.execute(update(Job).where(Job.id == later).values(not_before=at + 10_000))
    first, second = shown(QueueView(), waits, later)
    assert first == {"position": 1, "estimated_start": int(at + 40)}
    assert second == {"position": 2, "estimated_start": int(at + 10_000)}, "it is not tried again before"


@pytest.mark.usefixtures("settings")
def test_a_hundred_jobs_cost_one_query_and_the_next_hundred_none() -> None:
    file_id = add_file()
    ids = [add_job(file_id) for _ in range(100)]
    view = QueueView()
    shown(view, ids[0])  # what recent jobs took is asked once in a while
    view._good_until = 0.0
    rows = [row(job_id) for job_id in ids]
    statements: list[str] = []
    event.listen(get_engine(), "before_cursor_execute", lambda *a: statements.append(a[2]))
    assert [view.of(rows)[job_id]["position"] for job_id in ids][:3] == [1, 2, 3]
    looks = [sql for sql in statements if sql.startswith("SELECT")]
    assert len(looks) <= 100 / 5, "each look costs one, and serves as long as it may"
    view._good_until = float("inf")
    statements.clear()
    queue = view.of(rows)
    assert [queue[job_id]["position"] for job_id in ids] == list(range(1, 101))
    assert statements == []


@pytest.mark.usefixtures("settings")
def test_a_view_is_never_old_whatever_the_look_took(monkeypatch: pytest.MonkeyPatch) -> None:
    view = QueueView()
    add_job(add_file())
    look = queue_view._view_of
    monkeypatch.setattr(queue_view, "_view_of", lambda *asked: (time.sleep(0.2), look(*asked))[1])
    view.now()
    assert view._good_until <= time.monotonic() + queue_view.OLDEST_S < time.monotonic() + 0.2 / queue_view.COST_SHARE


@pytest.mark.usefixtures("settings")
def test_what_comes_and_leaves_here_changes_the_view_and_what_is_only_shown_does_not() -> None:
    file_id = add_file()
    view = QueueView()
    ahead, behind = add_job(file_id), add_job(file_id)
    assert [place["position"] for place in shown(view, ahead, behind)] == [1, 2]
    view._good_until = float("inf")
    urgent = add_job(file_id, training={"priority": 1})
    assert [place["position"] for place in shown(view, urgent, ahead, behind)] == [1, 1, 2], "of another process"
    view.came(row(urgent))
    assert [place["position"] for place in shown(view, urgent, ahead, behind)] == [1, 2, 3]
    before = row(ahead)
    with transaction() as session:
        cancelled = jobs.request_cancel(session, "default", ahead)
    view.left(cancelled)
    assert view.of([before])[ahead]["position"] == 2, "read before the cancel, shown after it"
    assert [place and place["position"] for place in shown(view, urgent, ahead, behind)] == [1, None, 2]


@pytest.mark.usefixtures("settings")
def test_what_comes_and_leaves_during_a_look_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = add_file()
    leaves, stays = add_job(file_id), add_job(file_id)
    view = QueueView()
    left, came = row(leaves), Job(id="came", priority=1, created_at=0.0)

    def meanwhile(running: Any) -> None:  # the look has its rows
        view.left(left)
        view.came(came)

    monkeypatch.setattr(queue_view, "_duration_of", meanwhile)
    assert [job_id for _, _, job_id in view.now().waiting] == ["came", stays]
