"""The tables. State changes are verbs in `jobs.py`, `batches.py`, `files.py`, `checkpoints.py`; nothing else
writes a status.

Times are seconds since 1970 by the database's clock, as doubles. Every row belongs to a project.
"""

from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    desc,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

DEFAULT_PROJECT = "default"


class FileStatus(StrEnum):
    """What is known of a file.

    uploaded: in by an upload too large to check at once; out by `worker batch`. A crash leaves it, the sweep re-sends.
    processed, error: settled, never left.
    """

    UPLOADED = "uploaded"
    PROCESSED = "processed"
    ERROR = "error"


class JobStatus(StrEnum):
    """OpenAI's words; the diagram is in `shared.jobs`.

    validating_files: in by creation, or a resume, while a file is unchecked; out by whoever settles the file.
    queued: in by creation, a resume, or a run that was given up (lease expired, deploy, a crash with attempts left);
        out by a claim. A crash leaves it: the sweep re-sends the hint.
    running: in by a claim only; out by the owner of the fence, or by the sweep once the lease has expired.
    paused: in by a client, at once or, from a run, once its trainer has saved and stopped; out by a client's resume or
        cancel, or by a file that turns out invalid. A crash leaves it, and so does everything else.
    succeeded, failed, cancelled: absorbing.
    """

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)
LIVE = tuple(status for status in JobStatus if status not in TERMINAL)


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON(none_as_null=True), list[str]: JSON, float: Float(53), int: BigInteger}  # noqa: RUF012


def table_of(model: type[Base]) -> Table:
    """For statements without the ORM."""
    return Base.metadata.tables[model.__tablename__]


class File(Base):
    """A file a client uploaded, or a result. Its bytes are `files/<id>` in storage, there before the row is."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64))
    filename: Mapped[str] = mapped_column(String(512))
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))
    status: Mapped[FileStatus] = mapped_column(String(16))
    status_details: Mapped[str | None] = mapped_column(Text)
    format: Mapped[str | None] = mapped_column(String(16))
    rows: Mapped[int | None]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    """From then on nobody sees it; the sweep removes it once no live job needs it."""

    __table_args__ = (
        Index("files_by_project", "project_id", "created_at", "id"),
        Index("files_by_status", "status"),
        Index("files_by_expiry", "expires_at"),
    )


class UploadStatus(StrEnum):
    """OpenAI's words.

    pending: in by creation; out by completion, cancel, or the sweep once `expires_at` has passed.
    completed, cancelled, expired: absorbing.
    """

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Upload(Base):
    """A file that comes in parts."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64))
    filename: Mapped[str] = mapped_column(String(512))
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int]
    """As announced; what the parts amount to must equal it."""
    mime_type: Mapped[str] = mapped_column(String(256))
    status: Mapped[UploadStatus] = mapped_column(String(16))
    created_at: Mapped[float]
    expires_at: Mapped[float]
    file_id: Mapped[str | None] = mapped_column(String(64))
    """Of the file it became."""
    completion_sha256: Mapped[str | None] = mapped_column(String(64))
    """Of the part ids (and md5) it was completed with: a client that lost the answer asks again with the same."""
    file_expires_after_s: Mapped[int | None]

    __table_args__ = (Index("uploads_by_status", "status", "expires_at"),)


class UploadPart(Base):
    """Bytes of an upload: `files/<id>` in storage, there before the row is, like a file's."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"))
    project_id: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]

    __table_args__ = (Index("upload_parts_by_upload", "upload_id"),)


class BatchStatus(StrEnum):
    """OpenAI's words; the diagram is in `shared.batches`.

    validating: in by creation; out by the runner that has read the input file, or by a cancel that finds no runner.
    in_progress: in by the runner, once every line is valid; out by it or by a cancel.
    finalizing: in by the runner, once every line has its result; out by it, with the files, or by a cancel.
    cancelling: in by a client; out by the runner, with the files of what was done.
    failed, completed, expired, cancelled: absorbing.

    A crash leaves each of the first four, without a lease once the sweep has looked: another runner goes on.
    """

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


BATCH_TERMINAL = (BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED)
BATCH_LIVE = tuple(status for status in BatchStatus if status not in BATCH_TERMINAL)


class Batch(Base):
    """A file of requests that generators answer when they have time, and who sees to it."""

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64))
    status: Mapped[BatchStatus] = mapped_column(String(16))
    endpoint: Mapped[str] = mapped_column(String(64))
    completion_window: Mapped[str] = mapped_column(String(16))
    input_file_id: Mapped[str] = mapped_column(String(64))
    output_file_id: Mapped[str | None] = mapped_column(String(64))
    error_file_id: Mapped[str | None] = mapped_column(String(64))
    output_expires_after_s: Mapped[int | None]
    batch_metadata: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    errors: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """Why it failed: OpenAI's `{code, line, message, param}` each."""
    model: Mapped[str | None] = mapped_column(String(512))
    """Of every line; known once they are validated."""

    total: Mapped[int] = mapped_column(default=0)
    completed: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    input_tokens: Mapped[int] = mapped_column(default=0)
    output_tokens: Mapped[int] = mapped_column(default=0)

    created_at: Mapped[float]
    expires_at: Mapped[float]
    in_progress_at: Mapped[float | None]
    finalizing_at: Mapped[float | None]
    completed_at: Mapped[float | None]
    failed_at: Mapped[float | None]
    expired_at: Mapped[float | None]
    cancelling_at: Mapped[float | None]
    cancelled_at: Mapped[float | None]

    fence: Mapped[int] = mapped_column(default=0)
    """As of a job."""
    lease_until: Mapped[float | None]
    """Null: no runner has it, and any may claim it."""
    worker: Mapped[str | None] = mapped_column(String(256))
    not_before: Mapped[float | None]
    faults: Mapped[int] = mapped_column(default=0)
    """Runs in a row that ended badly without one more line done."""
    has_lines: Mapped[bool] = mapped_column(Boolean, default=False)
    """Whether there may be `BatchLine`s of it."""

    __table_args__ = (
        Index("batches_by_project", "project_id", "created_at", "id"),
        Index("batches_by_status", "status", "created_at", "id"),
        Index("batches_by_lines", "has_lines", "status"),
    )


class BatchLine(Base):
    """The result of one line of a batch, until the batch's files have it."""

    __tablename__ = "batch_lines"

    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id"), primary_key=True)
    line: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    """Of the input file, from 1."""
    is_error: Mapped[bool] = mapped_column(Boolean)
    """Of which of the two files it is a line."""
    body: Mapped[str] = mapped_column(Text)
    """That line: JSON, in ASCII."""


class Job(Base):
    """A fine-tuning job: what was asked, what was resolved, who runs it, how far it is."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64))
    status: Mapped[JobStatus] = mapped_column(String(32))
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    updated_at: Mapped[float]

    model: Mapped[str] = mapped_column(String(256))
    """Name as the client sent it, aliases resolved."""
    model_location: Mapped[str] = mapped_column(String(512))
    model_source: Mapped[str | None] = mapped_column(String(64))
    """Where base weights really came from: folder, cache, hub, package; `checkpoint` for a tuned model."""
    model_revision: Mapped[str | None] = mapped_column(String(128))
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int]
    job_metadata: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    integrations: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """As sent, in OpenAI's shape."""
    hyperparameters: Mapped[dict[str, Any]]
    """OpenAI's three, as sent; shown as numbers once resolved."""
    method: Mapped[dict[str, Any] | None]
    training: Mapped[dict[str, Any]]
    """`TrainingSpec` as sent."""
    resolved: Mapped[dict[str, Any] | None]
    """`Resolved`, from the trainer."""
    adapted: Mapped[dict[str, Any] | None]
    """Choices of `training` that were overridden because memory ran out."""

    fence: Mapped[int] = mapped_column(default=0)
    """Number of claims so far; a write by an older claim matches no row."""
    lease_until: Mapped[float | None]
    worker: Mapped[str | None] = mapped_column(String(256))
    cancel_requested_at: Mapped[float | None]
    pause_requested_at: Mapped[float | None]
    """Of a running job; whoever owns the run settles it, and a cancel comes first."""
    priority: Mapped[int] = mapped_column(Integer, default=0)
    """Higher is claimed first; among equals the oldest."""
    attempts: Mapped[int] = mapped_column(default=0)
    """Trainer deaths in a row without a new checkpoint."""
    faults: Mapped[int] = mapped_column(default=0)
    """Faults in a row that were not the trainer's: the hub, the disk, a worker that vanished."""
    not_before: Mapped[float | None]
    """A queued job is not claimed before this; a broken worker must not burn through the queue in seconds."""
    last_event: Mapped[int] = mapped_column(default=0)
    """Number of the newest event; counts up in the transaction that writes it."""

    current_step: Mapped[int | None]
    total_steps: Mapped[int | None]
    estimated_finish: Mapped[float | None]
    trained_tokens: Mapped[int | None]
    fine_tuned_model: Mapped[str | None] = mapped_column(String(256))
    result_files: Mapped[list[str]] = mapped_column(default=list)
    error: Mapped[dict[str, Any] | None]

    __table_args__ = (
        Index("jobs_by_project", "project_id", "created_at", "id"),
        Index("jobs_by_status", "status", desc("priority"), "created_at", "id"),
        Index("jobs_by_end", "status", "finished_at"),
    )


class Event(Base):
    """What happened to a job, numbered without gaps from 1."""

    __tablename__ = "events"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    project_id: Mapped[str] = mapped_column(String(64))
    sequence: Mapped[int]
    created_at: Mapped[float]
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any] | None]

    __table_args__ = (UniqueConstraint("job_id", "sequence"),)


class Metric(Base):
    """One step of a job's curve. A step that is trained again after a resume overwrites its row."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    project_id: Mapped[str] = mapped_column(String(64))
    values: Mapped[dict[str, Any]]


class Checkpoint(Base):
    """A published checkpoint. The row is written after its folder is whole; a folder without a row is garbage."""

    __tablename__ = "checkpoints"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    project_id: Mapped[str] = mapped_column(String(64))
    step: Mapped[int] = mapped_column(Integer)
    fence: Mapped[int]
    location: Mapped[str] = mapped_column(String(512))
    """Folder relative to storage: `checkpoints/<job>/<fence>/<step>`."""
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    resumable: Mapped[bool]
    tokens: Mapped[int]
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[float]

    __table_args__ = (UniqueConstraint("job_id", "step"),)


class Model(Base):
    """A tuned model or one of its checkpoints, served by name. Base models are in settings, not here."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(String(256), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(16))
    """`tuned`, or `checkpoint` of one."""
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    base_model: Mapped[str] = mapped_column(String(256))
    location: Mapped[str] = mapped_column(String(512))
    owned_by: Mapped[str] = mapped_column(String(64))
    source: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[float]

    __table_args__ = (Index("models_by_project", "project_id", "created_at"),)


class Sweep(Base):
    """One row: when the sweep last looked, so that any number of sweeps, restarted at any time, share one grace."""

    __tablename__ = "sweeps"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    last_pass_at: Mapped[float]
    no_expiry_before: Mapped[float]
    """Until then no lease expires: after an outage everybody has one whole lease to renew theirs."""
    instance: Mapped[str] = mapped_column(String(64))
    """Name of this database, written into the storage it belongs to: garbage is collected in no other."""


class Answer(Base):
    """What a POST with an `Idempotency-Key` was answered: `shared.answers`."""

    __tablename__ = "answers"

    project_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    route: Mapped[str] = mapped_column(String(256), primary_key=True)
    """Method and path."""
    key: Mapped[str] = mapped_column(String(256), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(String(64))
    """Of method, path and body."""
    status_code: Mapped[int] = mapped_column(Integer)
    body: Mapped[str] = mapped_column(Text)
    created_at: Mapped[float]

    __table_args__ = (Index("answers_by_age", "created_at"),)


class Creation(Base):
    """Which object a POST created, for a client that lost the answer and sends the same body again without a key."""

    __tablename__ = "creations"

    object_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(String(64))
    request_sha256: Mapped[str] = mapped_column(String(64))
    """Of method, path and body."""
    body: Mapped[str] = mapped_column(Text)
    """What was answered."""
    created_at: Mapped[float]
    told_to: Mapped[int] = mapped_column(Integer, default=0)
    """The try that was answered with it last, 0 being the first one; a later try has lost that answer too."""

    __table_args__ = (
        Index("creations_by_request", "project_id", "request_sha256", "created_at"),
        Index("creations_by_age", "created_at"),
    )
