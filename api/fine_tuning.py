"""/v1/fine_tuning/jobs: create, list, retrieve, cancel, pause, resume, checkpoints, metrics.

Events are in `api.job_events`.
"""

import csv
import io
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from sqlalchemy import null, select

from api.answer_schemas import CSV, JobMetrics
from api.deps import Caller, OutboxDep
from api.idempotency import OnceDep
from api.model_route import ModelRoute
from api.paging import After, Limit, page
from shared import answers, checkpoints, job_creation, jobs, model_registry, waiting
from shared.db import reading, transaction
from shared.errors import BadRequest
from shared.metadata_filter import has_metadata
from shared.models import Job, JobStatus, Metric
from shared.queue_view import QueueView, View, queue_view
from shared.schemas import FineTuningJob, JobCheckpoint, JobCreate, Page

router = APIRouter(prefix="/fine_tuning/jobs", tags=["fine-tuning"], route_class=ModelRoute)


@router.post("")
def create_job(request: JobCreate, caller: Caller, outbox: OutboxDep, once: OnceDep) -> FineTuningJob:
    """Fine-tune a model on a file: the job waits in the queue for a worker."""
    queue = queue_view().now()
    with transaction() as session:
        job = job_creation.submit(session, caller.project_id, request)
        answer = once.keep(session, job.id, _shown(job, queue))
    if job.status == JobStatus.QUEUED:
        queue_view().came(job)
        outbox.training_waits()  # after commit: the worker must find the row
    return answer


@router.get("")
def list_jobs(request: Request, caller: Caller, limit: Limit = 20, after: After = None) -> Page[FineTuningJob]:
    """The project's jobs, newest first; `metadata[key]=value` chooses some, `metadata=null` those without any."""
    query = select(Job).where(Job.project_id == caller.project_id)
    for key, value in request.query_params.multi_items():
        if key.startswith("metadata[") and key.endswith("]"):
            query = query.where(has_metadata(key[9:-1], value))
        elif key == "metadata" and value == "null":
            query = query.where(Job.job_metadata.is_(null()))
        elif key not in ("limit", "after"):
            raise BadRequest(f"unknown query parameter {key!r}; use limit, after, metadata[key]=value", param=key)
    with reading() as session:
        rows, more = page(session, query, Job, after=after, limit=limit)
    queue = queue_view().of(rows)
    data = [FineTuningJob.of(job, queue.get(job.id)) for job in rows]
    return Page.of(data, more, [row.id for row in data])


@router.get("/{job_id}")
def retrieve_job(job_id: str, caller: Caller) -> FineTuningJob:
    """A job as it is now."""
    with reading() as session:
        job = jobs.get(session, caller.project_id, job_id)
    return _shown(job, queue_view())


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, caller: Caller, once: OnceDep) -> FineTuningJob:
    """An idle job ends at once; a running one within a micro-batch, and the answer shows `cancel_requested`."""
    with transaction() as session:
        job = jobs.request_cancel(session, caller.project_id, job_id, again=once.is_retry)
        answers.forget_creation(session, job_id)
        answer = once.keep(session, None, FineTuningJob.of(job))
    queue_view().left(job)
    return answer


@router.post("/{job_id}/pause")
def pause_job(job_id: str, caller: Caller, once: OnceDep) -> FineTuningJob:
    """A job that waits is paused at once; one that trains saves a checkpoint at the end of its step and stops.

    Meanwhile it shows status `running` and `pause_requested`. What it has done so far is kept: resumed, it ends as if
    it had never been paused. Its worker goes on with other jobs.
    """
    with transaction() as session:
        job = waiting.request_pause(session, caller.project_id, job_id)
        answers.forget_creation(session, job_id)
        answer = once.keep(session, None, FineTuningJob.of(job))
    queue_view().left(job)
    return answer


@router.post("/{job_id}/resume")
def resume_job(job_id: str, caller: Caller, outbox: OutboxDep, once: OnceDep) -> FineTuningJob:
    """A paused job goes back to its place in the queue; one that is still stopping goes on."""
    queue = queue_view().now()
    with transaction() as session:
        job = waiting.resume(session, caller.project_id, job_id)
        answers.forget_creation(session, job_id)
        answer = once.keep(session, None, _shown(job, queue))
    if job.status == JobStatus.QUEUED:
        queue_view().came(job)
        outbox.training_waits()
    return answer


@router.get("/{job_id}/checkpoints")
def list_checkpoints(job_id: str, caller: Caller, limit: Limit = 10, after: After = None) -> Page[JobCheckpoint]:
    """The job's checkpoints, newest first. Each can be used as a model by name."""
    with reading() as session:
        job = jobs.get(session, caller.project_id, job_id)
        rows = checkpoints.newest_first(session, job_id)
        base = model_registry.root_base(session, job)
    if after is not None:
        ids = [row.id for row in rows]
        if after not in ids:
            raise BadRequest(f"after={after!r} is not the id of a checkpoint of {job_id}", param="after")
        rows = rows[ids.index(after) + 1 :]
    data = [JobCheckpoint.of(row, model_registry.tuned_name(job, base)) for row in rows[:limit]]
    return Page.of(data, len(rows) > limit, [row.id for row in data])


@router.get("/{job_id}/metrics", response_model=None, responses={200: {"model": JobMetrics, "content": CSV}})
def job_metrics(job_id: str, caller: Caller, format: Literal["json", "csv"] = "json") -> Response:
    """The whole curve, one row a logged step."""
    with reading() as session:
        jobs.get(session, caller.project_id, job_id)
        rows = session.scalars(select(Metric).where(Metric.job_id == job_id).order_by(Metric.step)).all()
    values = [{"step": row.step, **row.values} for row in rows]
    if format == "json":
        return JSONResponse({"object": "list", "data": values, "has_more": False})  # from here: it may be long
    columns = list(dict.fromkeys(key for row in values for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or ["step"])
    writer.writeheader()
    writer.writerows(values)
    return PlainTextResponse(text.getvalue(), media_type="text/csv")


def _shown(job: Job, queue: QueueView | View) -> FineTuningJob:
    return FineTuningJob.of(job, queue.of([job]).get(job.id))
