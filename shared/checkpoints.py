"""Checkpoints as rows: registered by fence once their folder is whole, listed, retired.

The folder is the trainer's work and is published before; a folder that no row names is garbage. Every registered
checkpoint is a model that can be served by name, so the two rows come and go together.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from shared import events, jobs, model_registry
from shared.db import clock
from shared.errors import Conflict, PermissionDenied
from shared.ids import new_id
from shared.models import LIVE, TERMINAL, Checkpoint, Job, Model


def register(
    session: Session,
    job: Job,
    fence: int,
    *,
    base_model: str,
    step: int,
    location: str,
    manifest_sha256: str,
    resumable: bool,
    tokens: int,
    metrics: dict[str, Any],
) -> str | None:
    """Make a published checkpoint known and servable. It counts as progress: the job's crash budget is full again.

    Returns the location it replaces, if an earlier attempt had published the same step; the caller deletes it.

    Raises:
        LeaseLost: the claim is over; the folder stays garbage.
    """
    job = jobs.owned(session, job.id, fence, attempts=0, faults=0, trained_tokens=tokens)
    replaced = session.scalar(
        delete(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.step == step).returning(Checkpoint.location)
    )
    name = model_registry.checkpoint_name(model_registry.tuned_name(job, base_model), step)
    created = clock(session)
    session.add(
        Checkpoint(
            id=new_id("ftckpt"),
            job_id=job.id,
            project_id=job.project_id,
            step=step,
            fence=fence,
            location=location,
            manifest_sha256=manifest_sha256,
            resumable=resumable,
            tokens=tokens,
            metrics=metrics,
            created_at=created,
        )
    )
    session.merge(_model(job, name, "checkpoint", base_model, location, created))
    if replaced is None:  # else a step that was trained again, which emits nothing new
        data = {"step": step, "model": name, "tokens": tokens}
        events.append(session, job, f"Checkpoint created at step {step}: {name}", data=data)
    return None if replaced == location else replaced


def discard(session: Session, job: Job, fence: int, step: int, base_model: str) -> None:
    """Forget a checkpoint whose files turned out to be damaged, and the model it was.

    Raises:
        LeaseLost: the claim is over.
    """
    job = jobs.owned(session, job.id, fence)
    session.execute(delete(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.step == step))
    name = model_registry.checkpoint_name(model_registry.tuned_name(job, base_model), step)
    session.execute(delete(Model).where(Model.id == name))
    message = f"The checkpoint of step {step} is damaged and no longer used; the one before it is"
    events.append(session, job, message, level="warn", data={"step": step, "model": name})


def publish_tuned(session: Session, job: Job, *, base_model: str, location: str) -> str:
    """Give the final checkpoint the job's own model name. Returns the name."""
    name = model_registry.tuned_name(job, base_model)
    session.merge(_model(job, name, "tuned", base_model, location, clock(session)))
    return name


def _model(job: Job, name: str, kind: str, base_model: str, location: str, created: float) -> Model:
    return Model(
        id=name,
        project_id=job.project_id,
        kind=kind,
        job_id=job.id,
        base_model=base_model,
        location=location,
        owned_by=job.project_id,
        source=job.model_source,
        created_at=created,
    )


def newest_first(session: Session, job_id: str) -> list[Checkpoint]:
    return list(session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc())))


def retire(session: Session, job: Job, base_model: str, keep: int) -> list[str]:
    """Forget all but the newest `keep` checkpoints, the best by validation loss, and those a live job starts from.

    Returns the folders to delete once this is committed.
    """
    known = newest_first(session, job.id)
    best = best_of(known)
    tuned = model_registry.tuned_name(job, base_model)
    names = [model_registry.checkpoint_name(tuned, row.step) for row in known[keep:]]
    if not names:
        return []
    # Locked first, and their users looked for in a second statement: a job that is being created with one of them holds
    # a shared lock on its name, and only a statement that begins after its commit sees it.
    session.execute(select(Model.id).where(Model.id.in_(names)).order_by(Model.id).with_for_update())
    in_use = set(session.scalars(select(Job.model_location).where(Job.status.in_(LIVE))))
    old = [row for row in known[keep:] if row is not best and row.location not in in_use]
    for checkpoint in old:
        session.execute(delete(Model).where(Model.id == model_registry.checkpoint_name(tuned, checkpoint.step)))
        session.delete(checkpoint)
    return [checkpoint.location for checkpoint in old]


def delete_model(session: Session, project_id: str, name: str) -> list[str]:
    """Forget a model by name: a checkpoint alone, a tuned model together with the final checkpoint it is.

    Earlier checkpoints of the same job stay, and a job goes on naming the model it made. Requests for the model that a
    generator has begun on are answered to their end; it has the weights in memory.

    Returns the folders to delete once this is committed: those that no other name has.

    Raises:
        ModelNotFound: no such model of the project.
        PermissionDenied: a base model.
        Conflict: the job it belongs to has not ended, or one that has not ended starts from it.
    """
    model = model_registry.find(session, project_id, name)
    if model.is_base:
        raise PermissionDenied(
            f"{model.id} is a base model, which the operator lists in ANNEAL_BASE_MODELS or ANNEAL_MODELS_DIR; "
            "only tuned models and checkpoints can be deleted",
            param="model",
        )
    # Every name of these weights: a job that is being created with one of them holds a shared lock on it.
    rows = session.scalars(
        select(Model).where(Model.location == model.location).order_by(Model.id).with_for_update()
    ).all()
    if all(row.id != name for row in rows):
        raise model_registry.unknown(name)
    user = session.scalar(
        select(Job.id)
        .where((Job.id == model.job_id) | (Job.model_location == model.location), Job.status.not_in(TERMINAL))
        .limit(1)
    )
    if user is not None:
        why = "it belongs to" if user == model.job_id else "it is needed by"
        raise Conflict(f"{name} can't be deleted: {why} job {user}, which has not ended; cancel the job first")
    doomed = rows if model.kind == "tuned" else [row for row in rows if row.id == name]
    for row in doomed:
        session.delete(row)
    session.execute(delete(Checkpoint).where(Checkpoint.job_id == model.job_id, Checkpoint.location == model.location))
    return [model.location] if len(doomed) == len(rows) else []


def best_of(known: Sequence[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest loss over the whole validation file, the earliest of equals; None without any."""
    measured = [row for row in known if row.metrics.get("full_valid_loss") is not None]
    return min(measured, key=lambda row: (row.metrics["full_valid_loss"], row.step), default=None)
