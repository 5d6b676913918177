"""Jobs: every change of a job's status, as a verb.

    create ─► validating_files ─ files valid ─► queued ─ claim (fence+1) ─► running ─ final checkpoint ─► succeeded
                │      │                         │  ▲                        │  │
                │      └─ file invalid ─► failed │  └─ lease expired, crash, ┘  ├─ error, no attempts left ─► failed
                │                                │     deploy, memory           │
                └────── cancel ─► cancelled ◄────┴─────────── cancel obeyed ────┘

    validating_files, queued ─ pause ───────────► paused ─ resume ─► queued; validating_files if a file is unchecked
    running ─ pause obeyed, or whatever else ───► │  │
              leads to queued while one is        │  └─ file invalid ─► failed
              asked for                           └─ cancel ─► cancelled

Every move is one UPDATE guarded by the status it starts from and, for a run, by the fence of the claim: of two
workers one wins, and a worker that lost its lease can't overwrite its successor. Terminal states absorb.
A cancel or a pause of a running job is a request on its row; whoever owns the run settles it. A cancel comes first; a
run that ends by itself, well or badly, has ended, whatever was asked for. Jobs are made in `shared.job_creation`; those
that nobody runs are moved by files that are settled, a pause and a resume in `shared.waiting`.
"""

from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, bindparam, func, or_, select, update
from sqlalchemy.orm import Session

from shared import events
from shared.db import now
from shared.errors import Conflict, NotFound
from shared.models import TERMINAL, Checkpoint, Job, JobStatus
from shared.text import storable

MAX_RETRY_DELAY_S = 300.0
_BY_ID = select(Job).where(Job.id == bindparam("id"))
"""Made once: a job is read more often than anything else."""

ALLOWED: dict[JobStatus, tuple[JobStatus, ...]] = {
    JobStatus.VALIDATING_FILES: (JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED),
    JobStatus.QUEUED: (JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED),
    JobStatus.RUNNING: (
        *(JobStatus.QUEUED, JobStatus.PAUSED),
        *(JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED),
    ),
    JobStatus.PAUSED: (JobStatus.QUEUED, JobStatus.VALIDATING_FILES, JobStatus.CANCELLED, JobStatus.FAILED),
}


class JobConflict(Conflict):
    """The job is not in a state, or not in the hands, that allow the move."""


class LeaseLost(Exception):
    """Somebody else owns the run now, or nobody does: stop at once and commit nothing."""


class Orders(NamedTuple):
    """What clients have asked the owner of a run for."""

    cancel: bool
    pause: bool


def get(session: Session, project_id: str, job_id: str) -> Job:
    """The project's job.

    Raises:
        NotFound: there is none of this id in the project.
    """
    job = session.scalar(_BY_ID, {"id": job_id})
    if job is None or job.project_id != project_id:
        raise NotFound(f"there is no fine-tuning job {job_id[:100]!r}; GET /v1/fine_tuning/jobs lists yours")
    return job


def claim_next(session: Session, worker: str, lease_s: float) -> Job | None:
    """Take the oldest queued job of the highest priority: queued → running, fence one up, lease started.

    None if nothing waits.
    """
    first = (
        select(Job.id)
        .where(*_eligible())
        .order_by(Job.priority.desc(), Job.created_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)  # two claimers take two jobs; SQLite has one writer anyway
    )
    job = session.scalar(
        update(Job)
        .where(Job.id == first.scalar_subquery(), Job.status == JobStatus.QUEUED)
        .values(
            status=JobStatus.RUNNING,
            fence=Job.fence + 1,
            lease_until=now() + lease_s,
            not_before=None,
            worker=worker,
            started_at=func.coalesce(Job.started_at, now()),
            updated_at=now(),
        )
        .returning(Job)
        .execution_options(populate_existing=True)
    )
    if job is not None:
        again = "" if job.fence == 1 else f", claim {job.fence}"
        events.append(session, job, f"Job claimed by worker {worker}{again}")
    return job


def renew_lease(session: Session, job_id: str, fence: int, lease_s: float) -> Orders:
    """Prolong a run's lease. Returns what was asked for meanwhile.

    Raises:
        LeaseLost: the job has another fence or is no longer running.
    """
    row = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.fence == fence, Job.status == JobStatus.RUNNING)
        .values(lease_until=now() + lease_s)
        .returning(Job.cancel_requested_at, Job.pause_requested_at)
    ).one_or_none()
    if row is None:
        raise LeaseLost(f"job {job_id} is no longer run by claim {fence}")
    return Orders(cancel=row[0] is not None, pause=row[1] is not None)


def orders(session: Session, job_id: str, fence: int) -> Orders:
    """What was asked of a run.

    Raises:
        LeaseLost: as `renew_lease`.
    """
    row = session.execute(
        select(Job.fence, Job.status, Job.cancel_requested_at, Job.pause_requested_at).where(Job.id == job_id)
    ).one_or_none()
    if row is None or row[0] != fence or row[1] != JobStatus.RUNNING:
        raise LeaseLost(f"job {job_id} is no longer run by claim {fence}")
    return Orders(cancel=row[2] is not None, pause=row[3] is not None)


def owned(session: Session, job_id: str, fence: int, **values: Any) -> Job:
    """Write `values` to a running job as its owner; the door for everything a run reports.

    Raises:
        LeaseLost: as `renew_lease`.
    """
    job = session.scalar(
        update(Job)
        .where(Job.id == job_id, Job.fence == fence, Job.status == JobStatus.RUNNING)
        .values(updated_at=now(), **values)
        .returning(Job)
        .execution_options(populate_existing=True)
    )
    if job is None:
        raise LeaseLost(f"job {job_id} is no longer run by claim {fence}")
    return job


def locked(session: Session, project_id: str, job_id: str) -> Job:
    """The project's job, which nobody else moves before this transaction ends: what a client's order finds is still
    true when its outcome is written.

    Raises:
        NotFound: there is none of this id in the project.
    """
    get(session, project_id, job_id)
    return session.get_one(Job, job_id, with_for_update=True, populate_existing=True)


def request_cancel(session: Session, project_id: str, job_id: str, *, again: bool = False) -> Job:
    """Cancel: an idle job ends at once, a running one as soon as its owner reads the request.

    Args:
        again: the client has asked before and lost the answer; that the job is cancelled is what it wanted.

    Raises:
        NotFound: no such job.
        JobConflict: the job has ended.
    """
    job = locked(session, project_id, job_id)
    if again and job.status == JobStatus.CANCELLED:
        return job
    if job.status in TERMINAL:
        raise JobConflict(f"job {job_id} has already ended ({job.status}); it can't be cancelled")
    if job.status != JobStatus.RUNNING:
        cancelled = move(session, job_id, JobStatus.CANCELLED, finished_at=now(), cancel_requested_at=now())
        events.append(session, cancelled, "The job was cancelled")
        return cancelled
    if job.cancel_requested_at is None:
        job = owned(session, job_id, job.fence, cancel_requested_at=now())
        events.append(session, job, "Cancellation requested")
    return job


def succeed(session: Session, job_id: str, fence: int, **values: Any) -> Job:
    """running → succeeded. The caller has registered the final checkpoint in the same transaction."""
    job = move(session, job_id, JobStatus.SUCCEEDED, fence=fence, finished_at=now(), **values)
    events.append(session, job, f"New fine-tuned model created: {job.fine_tuned_model}")
    events.append(session, job, "The job has successfully completed")
    return job


def fail(session: Session, job_id: str, fence: int, code: str, message: str, param: str | None = None) -> Job:
    """running → failed, with a reason the user can act on."""
    error = {"code": code, "message": storable(message[:8000]), "param": param}
    job = move(session, job_id, JobStatus.FAILED, fence=fence, error=error, finished_at=now())
    events.append(session, job, f"The job failed: {message}", level="error", data={"code": code})
    return job


def settle_cancelled(session: Session, job_id: str, fence: int) -> Job:
    """running → cancelled, by the owner of the run."""
    job = move(session, job_id, JobStatus.CANCELLED, fence=fence, finished_at=now())
    events.append(session, job, "The job was cancelled")
    return job


def give_back(session: Session, job_id: str, fence: int, reason: str) -> Job:
    """running → queued without blame: a deploy, a worker that stops. The way a pause is obeyed, too.

    As on every way back to the queue, a cancel or a pause that was asked for is settled instead.
    """
    return _put_back(session, owned(session, job_id, fence), queued=f"Back in the queue: {reason}")


def retry_or_fail(session: Session, job_id: str, fence: int, reason: str, max_attempts: int, delay_s: float = 0) -> Job:
    """running → queued after a death, or failed once `max_attempts` in a row brought no new checkpoint."""
    job = owned(session, job_id, fence, attempts=Job.attempts + 1)
    if job.cancel_requested_at is None and job.attempts >= max_attempts:
        return fail(session, job_id, fence, "trainer_died", f"{reason} ({job.attempts} attempts without progress)")
    return _put_back(
        session,
        job,
        reason,
        queued=f"{reason}; trying again, attempt {job.attempts + 1} of {max_attempts}",
        not_before=now() + _backoff_s(delay_s, job.attempts),
    )


def postpone_or_fail(session: Session, job_id: str, fence: int, reason: str, max_faults: int, delay_s: float) -> Job:
    """running → queued after a fault that was not the trainer's, with a budget of its own."""
    job = owned(session, job_id, fence, faults=Job.faults + 1)
    if job.cancel_requested_at is None and job.faults >= max_faults:
        return fail(session, job_id, fence, "infrastructure_fault", f"{reason} ({job.faults} times in a row)")
    return _put_back(
        session,
        job,
        reason,
        queued=f"{reason}; trying again later",
        not_before=now() + _backoff_s(delay_s, job.faults),
    )


def adapt(session: Session, job_id: str, fence: int, overrides: dict[str, Any], message: str) -> Job:
    """running → queued without blame: memory ran out, and the next attempt makes other choices."""
    job = owned(session, job_id, fence)
    adapted = {**(job.adapted or {}), **overrides}
    return _put_back(session, job, message, queued=message, data={"training": overrides}, adapted=adapted)


def _put_back(
    session: Session,
    job: Job,
    trouble: str | None = None,
    *,
    queued: str,
    data: dict[str, Any] | None = None,
    **values: Any,
) -> Job:
    """running → queued, or what a client has asked for meanwhile: cancelled, else paused.

    Args:
        job: as `owned` has just read it.
        trouble: what a pause does not explain; told on a paused job too.
        queued: the event of a job that is queued.
    """
    if job.cancel_requested_at is not None:
        return settle_cancelled(session, job.id, job.fence)
    status = JobStatus.QUEUED if job.pause_requested_at is None else JobStatus.PAUSED
    moved = move(session, job.id, status, fence=job.fence, lease_until=None, worker=None, **values)
    if status == JobStatus.QUEUED:
        events.append(session, moved, queued, level="warn" if trouble else "info", data=data)
        return moved
    if trouble:
        events.append(session, moved, trouble, level="warn", data=data)
    tell_paused(session, moved)
    return moved


def tell_paused(session: Session, job: Job) -> None:
    """The event of a job that was paused: where it will go on."""
    newest = select(func.max(Checkpoint.step)).where(Checkpoint.job_id == job.id, Checkpoint.resumable)
    step = session.scalar(newest) or 0
    events.append(session, job, f"Job paused at step {step}", data={"step": step})


def expire_leases(session: Session, max_faults: int, delay_s: float = 0) -> list[Job]:
    """Take every run whose lease has run out from its worker, which is dead or cut off.

    Not the trainer's fault as far as anybody knows, so it spends the budget of faults; that one is bounded too, or a
    job that takes its whole host down would do so for ever.
    """
    expired = session.scalars(
        select(Job)
        .where(Job.status == JobStatus.RUNNING, Job.lease_until < now())
        .limit(100)
        .with_for_update(skip_locked=True)
    ).all()
    return [
        postpone_or_fail(session, job.id, job.fence, f"Worker {job.worker} fell silent", max_faults, delay_s)
        for job in expired
    ]


def count_claimable(session: Session) -> int:
    """How many jobs wait for a worker right now."""
    return session.scalar(select(func.count()).select_from(Job).where(*_eligible())) or 0


def _eligible() -> tuple[ColumnElement[bool], ...]:
    return (Job.status == JobStatus.QUEUED, or_(Job.not_before.is_(None), Job.not_before <= now()))


def _backoff_s(first_s: float, times: int) -> float:
    return float(min(first_s * 2 ** (times - 1), MAX_RETRY_DELAY_S))


def move(session: Session, job_id: str, to: JobStatus, *, fence: int | None = None, **values: Any) -> Job:
    """Move a job to `to` in one UPDATE guarded by its current status and fence. For the verbs of jobs only.

    No move starts a run, so what only a run has ends with each: a pause that was asked for, an estimate of its end.

    Raises:
        LeaseLost: with a fence: the run is somebody else's, or over.
        JobConflict: `to` can't follow the job's status.
    """
    sources = [status for status, targets in ALLOWED.items() if to in targets]
    held = [] if fence is None else [Job.fence == fence, Job.status == JobStatus.RUNNING]
    job = session.scalar(
        update(Job)
        .where(Job.id == job_id, Job.status.in_(sources), *held)
        .values(status=to, updated_at=now(), pause_requested_at=None, estimated_finish=None, **values)
        .returning(Job)
        .execution_options(populate_existing=True)
    )
    if job is None:
        if fence is not None:
            raise LeaseLost(f"job {job_id} is no longer run by claim {fence}")
        raise JobConflict(f"job {job_id} can't become {to}")
    return job


assert not set(ALLOWED) & set(TERMINAL), "terminal states absorb"
