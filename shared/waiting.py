"""Jobs that nobody runs: what moves those that wait for their files, and what a client's pause and resume do.

The diagram is in `shared.jobs`. A file that is settled moves on the jobs that wait for it; one that turned out invalid
fails them, those that are paused meanwhile too, so that a resume never finds a bad file.
"""

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared import events, jobs
from shared.db import now
from shared.jobs import JobConflict
from shared.models import TERMINAL, File, FileStatus, Job, JobStatus


def file_settled(session: Session, file_id: str, reason: str | None) -> None:
    """Move on the jobs that wait for a file, in the transaction that settles it. `reason`: why it is invalid."""
    waiting = session.scalars(
        select(Job)
        .where(
            Job.status.in_((JobStatus.VALIDATING_FILES, JobStatus.PAUSED)),
            (Job.training_file == file_id) | (Job.validation_file == file_id),
        )
        .with_for_update()  # two files of one job settled at once: the second must see the first
    ).all()
    for job in waiting:
        which = "training_file" if job.training_file == file_id else "validation_file"
        if reason is not None:
            error = {"code": f"invalid_{which}", "message": f"{file_id}: {reason}", "param": which}
            jobs.move(session, job.id, JobStatus.FAILED, error=error, finished_at=now())
            events.append(session, job, f"The job failed: {error['message']}", level="error")
        elif job.status == JobStatus.VALIDATING_FILES and _files_are_checked(session, job):
            jobs.move(session, job.id, JobStatus.QUEUED)
            events.append(session, job, "Files validated, job queued")


def request_pause(session: Session, project_id: str, job_id: str) -> Job:
    """Pause: an idle job at once, a running one once its trainer has saved and stopped. Asking again changes nothing.

    Raises:
        NotFound: no such job.
        JobConflict: the job has ended, or is being cancelled.
    """
    job = jobs.locked(session, project_id, job_id)
    _demand_live(job, "paused")
    if job.status == JobStatus.PAUSED or job.pause_requested_at is not None:
        return job
    if job.status == JobStatus.RUNNING:
        job = jobs.owned(session, job_id, job.fence, pause_requested_at=now())
        events.append(session, job, "Pause requested")
        return job
    job = jobs.move(session, job_id, JobStatus.PAUSED)
    jobs.tell_paused(session, job)
    return job


def resume(session: Session, project_id: str, job_id: str) -> Job:
    """Undo a pause, or the request for one; a job that is not paused goes on as it does.

    A run whose trainer has stopped already goes back to the queue and on from there.

    Raises:
        NotFound: no such job.
        JobConflict: the job has ended, or is being cancelled.
    """
    job = jobs.locked(session, project_id, job_id)
    _demand_live(job, "resumed")
    if job.status == JobStatus.PAUSED:
        ready = _files_are_checked(session, job)
        job = jobs.move(session, job_id, JobStatus.QUEUED if ready else JobStatus.VALIDATING_FILES)
    elif job.pause_requested_at is not None:
        job = jobs.owned(session, job_id, job.fence, pause_requested_at=None)
    else:
        return job
    events.append(session, job, "Job resumed")
    return job


def _demand_live(job: Job, done: str) -> None:
    if job.status in TERMINAL:
        raise JobConflict(f"job {job.id} has already ended ({job.status}); it can't be {done}")
    if job.cancel_requested_at is not None:
        raise JobConflict(f"job {job.id} is being cancelled; it can't be {done}")


def _files_are_checked(session: Session, job: Job) -> bool:
    ids = [name for name in (job.training_file, job.validation_file) if name is not None]
    unchecked = select(func.count()).select_from(File).where(File.id.in_(ids), File.status != FileStatus.PROCESSED)
    return not session.scalar(unchecked)
