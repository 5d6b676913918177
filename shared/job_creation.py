"""Making a job: every id in it is the project's, every file can be trained on, and none of them goes away meanwhile."""

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from shared import events, model_registry
from shared.db import now
from shared.errors import BadRequest, NotFound
from shared.ids import new_id
from shared.models import File, FileStatus, Job, JobStatus
from shared.schemas import JobCreate

DEFAULT_SEED = 3407
_FILE_AND_TIME = select(File, now()).where(File.id == bindparam("id")).with_for_update(read=True, of=File)
"""Made once: making it takes half as long as running it."""


def submit(session: Session, project_id: str, request: JobCreate) -> Job:
    """Store a job. It is queued at once if its files have been checked.

    Raises:
        ModelNotFound, NotFound: an id is not the project's.
        BadRequest: a file can't be trained on.
    """
    model = model_registry.find(session, project_id, request.model, hold=True)
    file, created = _usable_file(session, project_id, request.training_file, "training_file")
    checked = file.status == FileStatus.PROCESSED
    if request.validation_file is not None:
        file, created = _usable_file(session, project_id, request.validation_file, "validation_file")
        checked &= file.status == FileStatus.PROCESSED
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
        priority=request.training.priority,
        integrations=[integration.model_dump() for integration in request.integrations or ()],
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


def _usable_file(session: Session, project_id: str, file_id: str, param: str) -> tuple[File, float]:
    """The file, and the time by the database's clock."""
    # Shared lock: who settles or deletes the file waits for this job to be there, or this job sees what they did.
    file, at = session.execute(_FILE_AND_TIME, {"id": file_id}).one_or_none() or (None, 0.0)
    if file is None or file.project_id != project_id or (file.expires_at is not None and file.expires_at <= at):
        raise NotFound(f"there is no file {file_id!r}; upload it first (GET /v1/files lists yours)", param=param)
    if file.purpose != "fine-tune":
        raise BadRequest(f"file {file_id} has purpose {file.purpose!r}; it must be 'fine-tune'", param=param)
    if file.status == FileStatus.ERROR:
        raise BadRequest(
            f"file {file_id} can't be trained on: {file.status_details}", param=param, code="invalid_training_file"
        )
    return file, at
