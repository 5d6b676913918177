"""The queue as those who wait in it see it: how many are ahead, and when a job may start.

One look at the database serves many answers: counting who is ahead for each job that is read would cost more than the
reading. A view grows old in proportion to what it cost, so that looking takes a fiftieth of one processor at most: a
short queue is some milliseconds behind, one of ten thousand jobs two seconds, which is the most. What this process
itself puts into the queue or takes out of it is told to the view (`came`, `left`).

An estimate, and no promise: workers are those that run a job now, one at least, and a job that waits will take as long
as jobs took lately.
"""

import bisect
import heapq
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from shared.db import clock, get_engine, now, reading
from shared.models import Job, JobStatus

COST_SHARE = 1 / 50
OLDEST_S = 2.0
RECENT_JOBS = 20
"""Finished ones whose median duration is taken."""
DURATION_KEPT_S = 30.0
"""Finding the recent ones among all that ever finished is the dear part, and it hardly changes."""

Place = tuple[int, float, str]
"""What claims go by: (minus the priority, created_at, id)."""


@dataclass(frozen=True, slots=True)
class Running:
    """A run as far as the queue is concerned. Times are seconds since 1970."""

    worker: str | None
    started_at: float | None
    estimated_finish: float | None


@dataclass
class View:
    """The queue at one instant.

    Args:
        at: that instant, by the database's clock.
        waiting: sorted.
        duration_s: of a job; None if nothing tells.
    """

    at: float
    waiting: list[Place]
    running: Sequence[Running]
    duration_s: float | None
    lock: threading.Lock = field(default_factory=threading.Lock)
    _starts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        by_worker = {run.worker: max(self._finish_of(run), self.at) for run in self.running}
        self._free_at = list(by_worker.values())
        if not self.running and self.duration_s is not None:
            self._free_at = [self.at]  # jobs have been run here, and nobody is busy
        heapq.heapify(self._free_at)

    def of(self, jobs: Iterable[Job]) -> dict[str, dict[str, int | None]]:
        """What `anneal.queue` shows of those jobs that are queued, by id."""
        with self.lock:
            return {job.id: self._shown(job) for job in jobs if job.status == JobStatus.QUEUED}

    def position(self, place: Place) -> int:
        """1 for the next to be claimed; of a job that is not in the view, the position it would have."""
        return bisect.bisect_left(self.waiting, place) + 1

    def add(self, place: Place) -> None:
        index = bisect.bisect_left(self.waiting, place)
        if self.waiting[index : index + 1] != [place]:
            self.waiting.insert(index, place)

    def remove(self, place: Place) -> None:
        index = bisect.bisect_left(self.waiting, place)
        if self.waiting[index : index + 1] == [place]:
            del self.waiting[index]

    def start_of(self, position: int) -> float | None:
        """When the job at a position may start; None if nothing tells."""
        while len(self._starts) < position:
            if not self._free_at:
                return None
            start = self._free_at[0]
            self._starts.append(start)
            heapq.heapreplace(self._free_at, start + (float("inf") if self.duration_s is None else self.duration_s))
        start = self._starts[position - 1]
        return None if start == float("inf") else start

    def _shown(self, job: Job) -> dict[str, int | None]:
        position = self.position(_place(job))
        start = self.start_of(position)
        if start is not None and job.not_before is not None:
            start = max(start, job.not_before)
        return {"position": position, "estimated_start": None if start is None else int(start)}

    def _finish_of(self, run: Running) -> float:
        if run.estimated_finish is not None:
            return run.estimated_finish
        if self.duration_s is None or run.started_at is None:
            return float("inf")
        return run.started_at + self.duration_s


class QueueView:
    """Views of one database, each used for a while. Safe in threads: one looks, the others use what there is."""

    def __init__(self) -> None:
        self._looking = threading.Lock()
        self._view: View | None = None
        self._changing = threading.Lock()
        self._changes: list[tuple[Callable[[View, Place], None], Place]] = []
        """During the latest look, which may not have seen them."""
        self._good_until = 0.0
        self._duration_s: float | None = None
        self._duration_good_until = 0.0

    def of(self, jobs: Iterable[Job]) -> dict[str, dict[str, int | None]]:
        """What `anneal.queue` shows of those jobs that are queued, by id. Call outside of transactions."""
        queued = [job for job in jobs if job.status == JobStatus.QUEUED]
        return self.now().of(queued) if queued else {}

    def now(self) -> View:
        """The view to use now; a look at the database, of all that wait, if the last one is too old.

        Call outside of transactions: other writers need not wait for a look, and on SQLite it could wait for its own.
        """
        view = self._view
        if view is not None and (time.monotonic() < self._good_until or not self._looking.acquire(blocking=False)):
            return view
        if view is None:
            self._looking.acquire()
        try:
            newer = self._view
            return self._look() if newer is None or newer is view else newer
        finally:
            self._looking.release()

    def came(self, job: Job) -> None:
        """A job waits that did not. Call after the commit."""
        self._change(View.add, _place(job))

    def left(self, job: Job) -> None:
        """A job waits no longer. Call after the commit."""
        self._change(View.remove, _place(job))

    def _change(self, change: Callable[[View, Place], None], place: Place) -> None:
        with self._changing:
            if self._looking.locked():
                self._changes.append((change, place))
            if (view := self._view) is not None:
                with view.lock:
                    change(view, place)

    def _look(self) -> View:
        began = time.monotonic()
        self._changes = []
        with reading() as session:
            if began >= self._duration_good_until:
                self._duration_s = _recent_duration(session)
                self._duration_good_until = began + DURATION_KEPT_S
            view = _view_of(session, self._duration_s)
        with self._changing:
            for change, place in self._changes:
                change(view, place)
            self._view = view
        self._good_until = time.monotonic() + min((time.monotonic() - began) / COST_SHARE, OLDEST_S)
        return view


_views: WeakKeyDictionary[Engine, QueueView] = WeakKeyDictionary()


def queue_view() -> QueueView:
    """This process's, of the database it uses now."""
    return _views.setdefault(get_engine(), QueueView())


def _place(job: Job) -> Place:
    return (-job.priority, job.created_at, job.id)


def _view_of(session: Session, duration_s: float | None) -> View:
    columns = (Job.status, Job.priority, Job.created_at, Job.id, Job.worker, Job.started_at, Job.estimated_finish)
    live = Job.status.in_((JobStatus.QUEUED, JobStatus.RUNNING))
    rows = session.execute(select(now(), *columns).where(live)).all()
    waiting, running = [], []
    for _, status, priority, created_at, job_id, worker, started_at, finish in rows:
        if status == JobStatus.QUEUED:
            waiting.append((-priority, created_at, job_id))
        else:
            running.append(Running(worker, started_at, finish))
    at = rows[0][0] if rows else clock(session)
    waiting.sort()
    return View(at, waiting, running, duration_s or _duration_of(running))


def _recent_duration(session: Session) -> float | None:
    """Median of the newest finished jobs, from their first claim to their end."""
    finished = session.execute(
        select(Job.started_at, Job.finished_at)
        .where(Job.status == JobStatus.SUCCEEDED, Job.started_at.is_not(None))
        .order_by(Job.finished_at.desc())
        .limit(RECENT_JOBS)
    ).all()
    durations = [row.finished_at - row.started_at for row in finished]
    return statistics.median(durations) if durations else None


def _duration_of(running: Sequence[Running]) -> float | None:
    """Before anything has finished: what the jobs that run will have taken, by their own estimates."""
    estimates = [run.estimated_finish - run.started_at for run in running if run.estimated_finish and run.started_at]
    return statistics.median(estimates) if estimates else None
