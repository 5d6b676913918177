"""Jobs: every change of a job's status, as a verb.

    create ─► validating_files ─ files valid ─► queued ─ claim (fence+1) ─► running ─ final checkpoint ─► succeeded
                │      │                         │  ▲                        │  │
                │      └─ file invalid ─► failed │  └─ lease expired, crash, ┘  ├─ error, no attempts left ─► failed
                │                                │     deploy, memory           │
                └────── cancel ─► cancelled ◄────┴─────────── cancel obeyed ────┘

Every move is one UPDATE guarded by the status it starts from and, for a run, by the fence of the claim: of two
workers one wins, and a worker that lost its lease can't overwrite its successor. Terminal states absorb.
A cancel of a running job is a request on its row; whoever owns the run settles it.
"""

from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from shared import events, model_registry
from shared.db import clock, has_passed, now
from shared.errors import BadRequest, Conflict, NotFound
from shared.ids import new_id
from shared.models import TERMINAL, File, FileStatus, Job, JobStatus
from shared.schemas import JobCreate
from shared.text import storable

DEFAULT_SEED = 3407

MAX_RETRY_DELAY_S = 300.0

ALLOWED: dict[JobStatus, tuple[JobStatus, ...]] = {
    JobStatus.VALIDATING_FILES: (JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED),
    JobStatus.QUEUED: (JobStatus.RUNNING, JobStatus.FAILED, JobStatus.CANCELLED),
    JobStatus.RUNNING: (JobStatus.QUEUED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED),
    JobStatus.PAUSED: (JobStatus.QUEUED, JobStatus.CANCELLED, JobStatus.FAILED),
}


class JobConflict(Conflict):
    """The job is not in a state, or not in the hands, that allow the move."""


class LeaseLost(Exception):
    """Somebody else owns the run now, or nobody does: stop at once and commit nothing."""


def submit(session: Session, project_id: str, request: JobCreate) -> Job:
    """Store a job. It is queued at once if its files have been checked.

    Raises:
        ModelNotFound, NotFound: an id is not the project's.
        BadRequest: a file can't be trained on.
    """
    model = model_registry.find(session, project_id, request.model, hold=True)
    files = [_usable_file(session, project_id, request.training_file, "training_file")]
    if request.validation_file is not None:
        files.append(_usable_file(session, project_id, request.validation_file, "validation_file"))
    checked = all(file.status == FileStatus.PROCESSED for file in files)
    created = clock(session)
    job = Job(
        id=new_id("ftjob"),
        project_id=project_id,
        status=JobStatus.QUEUED if checked else JobStatus.VALIDATING_FILES,
        created_at=created,
        updated_at=created,
        model=model.id,
        model_location=model.location,
        model_source=None if model.is_base else "checkpoint",
        training_file=request.training_file,
        validation_file=request.validation_file,
        suffix=request.suffix,
        seed=DEFAULT_SEED if request.seed is None else request.seed,
        job_metadata=request.metadata,
        hyperparameters=request.chosen_hyperparameters.model_dump(),
        method=request.method.model_dump(exclude_none=True) if request.method else None,
        training=request.training_spec().model_dump(),
        fence=0,
        attempts=0,
        result_files=[],
    )
    state = "Files validated, job queued" if checked else "Validating files"
    events.add_with_first(session, job, f"Created fine-tuning job: {job.id}", state)
    return job


def _usable_file(session: Session, project_id: str, file_id: str, param: str) -> File:
    # Shared lock: who settles or deletes the file waits for this job to be there, or this job sees what they did.
    file = session.get(File, file_id, with_for_update={"read": True})
    if file is None or file.project_id != project_id or has_passed(session, file.expires_at):
        raise NotFound(f"there is no file {file_id!r}; upload it first (GET /v1/files lists yours)", param=param)
    if file.purpose != "fine-tune":
        raise BadRequest(f"file {file_id} has purpose {file.purpose!r}; it must be 'fine-tune'", param=param)
    if file.status == FileStatus.ERROR:
        raise BadRequest(
            f"file {file_id} can't be trained on: {file.status_details}", param=param, code="invalid_training_file"
        )
    return file


def get(session: Session, project_id: str, job_id: str) -> Job:
    """The project's job.

    Raises:
        NotFound: there is none of this id in the project.
    """
    job = session.get(Job, job_id)
    if job is None or job.project_id != project_id:
        raise NotFound(f"there is no fine-tuning job {job_id[:100]!r}; GET /v1/fine_tuning/jobs lists yours")
    return job


def file_settled(session: Session, file_id: str, reason: str | None) -> None:
    """Move on the jobs that wait for a file, in the transaction that settles it. `reason`: why it is invalid."""
    waiting = session.scalars(
        select(Job)
        .where(
            Job.status == JobStatus.VALIDATING_FILES,
            (Job.training_file == file_id) | (Job.validation_file == file_id),
        )
        .with_for_update()  # two files of one job settled at once: the second must see the first
    ).all()
    for job in waiting:
        which = "training_file" if job.training_file == file_id else "validation_file"
        if reason is not None:
            error = {"code": f"invalid_{which}", "message": f"{file_id}: {reason}", "param": which}
            _move(session, job.id, JobStatus.FAILED, error=error, finished_at=now())
            events.append(session, job, f"The job failed: {error['message']}", level="error")
            continue
        ids = [name for name in (job.training_file, job.validation_file) if name is not None]
        unchecked = session.scalar(
            select(func.count()).select_from(File).where(File.id.in_(ids), File.status != FileStatus.PROCESSED)
        )
        if not unchecked:
            _move(session, job.id, JobStatus.QUEUED)
            events.append(session, job, "Files validated, job queued")


def claim_next(session: Session, worker: str, lease_s: float) -> Job | None:
    """Take the oldest queued job: queued → running, fence one up, lease started. None if nothing waits."""
    oldest = (
        select(Job.id)
        .where(*_eligible())
        .order_by(Job.created_at, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)  # two claimers take two jobs; SQLite has one writer anyway
    )
    job = session.scalar(
        update(Job)
        .where(Job.id == oldest.scalar_subquery(), Job.status == JobStatus.QUEUED)
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


def renew_lease(session: Session, job_id: str, fence: int, lease_s: float) -> bool:
    """Prolong a run's lease. Returns whether a cancel was asked for.

    Raises:
        LeaseLost: the job has another fence or is no longer running.
    """
    row = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.fence == fence, Job.status == JobStatus.RUNNING)
        .values(lease_until=now() + lease_s)
        .returning(Job.cancel_requested_at)
    ).one_or_none()
    if row is None:
        raise LeaseLost(f"job {job_id} is no longer run by claim {fence}")
    return row[0] is not None


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


def request_cancel(session: Session, project_id: str, job_id: str) -> Job:
    """Cancel: an idle job ends at once, a running one as soon as its owner reads the request.

    Raises:
        NotFound: no such job.
        JobConflict: the job has ended.
    """
    get(session, project_id, job_id)
    # Locked, because the job may move between any two statements; what is decided here must still be true when written.
    job = session.get_one(Job, job_id, with_for_update=True, populate_existing=True)
    if job.status in TERMINAL:
        raise JobConflict(f"job {job_id} has already ended ({job.status}); it can't be cancelled")
    if job.status != JobStatus.RUNNING:
        cancelled = _move(session, job_id, JobStatus.CANCELLED, finished_at=now(), cancel_requested_at=now())
        events.append(session, cancelled, "The job was cancelled")
        return cancelled
    if job.cancel_requested_at is None:
        job = owned(session, job_id, job.fence, cancel_requested_at=now())
        events.append(session, job, "Cancellation requested")
    return job


def succeed(session: Session, job_id: str, fence: int, **values: Any) -> Job:
    """running → succeeded. The caller has registered the final checkpoint in the same transaction."""
    job = _move(session, job_id, JobStatus.SUCCEEDED, fence=fence, finished_at=now(), estimated_finish=None, **values)
    events.append(session, job, f"New fine-tuned model created: {job.fine_tuned_model}")
    events.append(session, job, "The job has successfully completed")
    return job


def fail(session: Session, job_id: str, fence: int, code: str, message: str, param: str | None = None) -> Job:
    """running → failed, with a reason the user can act on."""
    error = {"code": code, "message": storable(message[:8000]), "param": param}
    job = _move(session, job_id, JobStatus.FAILED, fence=fence, error=error, finished_at=now(), estimated_finish=None)
    events.append(session, job, f"The job failed: {message}", level="error", data={"code": code})
    return job


def settle_cancelled(session: Session, job_id: str, fence: int) -> Job:
    """running → cancelled, by the owner of the run."""
    job = _move(session, job_id, JobStatus.CANCELLED, fence=fence, finished_at=now(), estimated_finish=None)
    events.append(session, job, "The job was cancelled")
    return job


def give_back(session: Session, job_id: str, fence: int, reason: str) -> Job:
    """running → queued without blame: a deploy, a worker that stops. A cancel that was asked for is settled instead."""
    if owned(session, job_id, fence).cancel_requested_at is not None:
        return settle_cancelled(session, job_id, fence)
    job = _move(session, job_id, JobStatus.QUEUED, fence=fence, lease_until=None, worker=None)
    events.append(session, job, f"Back in the queue: {reason}")
    return job


def retry_or_fail(session: Session, job_id: str, fence: int, reason: str, max_attempts: int, delay_s: float = 0) -> Job:
    """running → queued after a death, or failed once `max_attempts` in a row brought no new checkpoint."""
    job = owned(session, job_id, fence, attempts=Job.attempts + 1)
    if job.cancel_requested_at is not None:
        return settle_cancelled(session, job_id, fence)
    if job.attempts >= max_attempts:
        return fail(session, job_id, fence, "trainer_died", f"{reason} ({job.attempts} attempts without progress)")
    return _try_again(
        session,
        job,
        f"{reason}; trying again, attempt {job.attempts + 1} of {max_attempts}",
        _backoff_s(delay_s, job.attempts),
    )


def postpone_or_fail(session: Session, job_id: str, fence: int, reason: str, max_faults: int, delay_s: float) -> Job:
    """running → queued after a fault that was not the trainer's, with a budget of its own."""
    job = owned(session, job_id, fence, faults=Job.faults + 1)
    if job.cancel_requested_at is not None:
        return settle_cancelled(session, job_id, fence)
    if job.faults >= max_faults:
        return fail(session, job_id, fence, "infrastructure_fault", f"{reason} ({job.faults} times in a row)")
    return _try_again(session, job, f"{reason}; trying again later", _backoff_s(delay_s, job.faults))


def _try_again(session: Session, job: Job, message: str, delay_s: float) -> Job:
    values = {"lease_until": None, "worker": None, "not_before": now() + delay_s}
    moved = _move(session, job.id, JobStatus.QUEUED, fence=job.fence, **values)
    events.append(session, moved, message, level="warn")
    return moved


def adapt(session: Session, job_id: str, fence: int, overrides: dict[str, Any], message: str) -> Job:
    """running → queued without blame: memory ran out, and the next attempt makes other choices."""
    job = owned(session, job_id, fence)
    if job.cancel_requested_at is not None:
        return settle_cancelled(session, job_id, fence)
    values = {"adapted": {**(job.adapted or {}), **overrides}, "lease_until": None, "worker": None}
    moved = _move(session, job_id, JobStatus.QUEUED, fence=fence, **values)
    events.append(session, moved, message, level="warn", data={"training": overrides})
    return moved


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


def _move(session: Session, job_id: str, to: JobStatus, *, fence: int | None = None, **values: Any) -> Job:
    """Move a job to `to` in one UPDATE guarded by its current status and fence.

    Raises:
        LeaseLost: with a fence: the run is somebody else's, or over.
        JobConflict: `to` can't follow the job's status.
    """
    sources = [status for status, targets in ALLOWED.items() if to in targets]
    held = [] if fence is None else [Job.fence == fence, Job.status == JobStatus.RUNNING]
    job = session.scalar(
        update(Job)
        .where(Job.id == job_id, Job.status.in_(sources), *held)
        .values(status=to, updated_at=now(), **values)
        .returning(Job)
        .execution_options(populate_existing=True)
    )
    if job is None:
        if fence is not None:
            raise LeaseLost(f"job {job_id} is no longer run by claim {fence}")
        raise JobConflict(f"job {job_id} can't become {to}")
    return job


assert not set(ALLOWED) & set(TERMINAL), "terminal states absorb"
