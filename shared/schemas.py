"""What goes over the wire: OpenAI's shapes, read off the types of its Python SDK, plus the one key `anneal`.

Requests forbid unknown keys, so that a misspelt choice is an error and not a surprise an hour later.
"""

import math
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from shared.model_registry import NamedModel, checkpoint_name
from shared.models import Checkpoint, File, FileStatus, Job, JobStatus
from shared.text import first_unstorable
from shared.training_spec import QUANTIZED_FULL, TrainingSpec

Auto = Literal["auto"]
T = TypeVar("T")


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        if (text := first_unstorable(value)) is not None:
            raise ValueError(f"{text[:100]!a} holds a NUL or a lone surrogate, which can't be stored; remove it")
        return value


def _bounded(metadata: dict[str, str]) -> dict[str, str]:
    if len(metadata) > 16:
        raise ValueError(f"{len(metadata)} keys; at most 16 are allowed")
    for key, text in metadata.items():
        if len(key) > 64 or len(text) > 512:
            raise ValueError(f"key {key[:64]!r}: keys have at most 64 characters, values at most 512")
    return metadata


Metadata = Annotated[dict[StrictStr, StrictStr], AfterValidator(_bounded)]


class Hyperparameters(Request):
    """OpenAI's three. A number in `n_epochs` decides the length of the run."""

    batch_size: Annotated[StrictInt, Field(ge=1, le=65536)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000, strict=True)] | Auto = "auto"
    n_epochs: Annotated[StrictInt, Field(ge=1, le=1000)] | Auto = "auto"


class SupervisedMethod(Request):
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)


class Method(Request):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedMethod | None = None
    dpo: Any = None
    reinforcement: Any = None

    @model_validator(mode="after")
    def _supervised_only(self) -> Self:
        if self.type != "supervised":
            raise ValueError(f"method.type={self.type!r} is not available here; use 'supervised'")
        return self


class WandbIntegration(Request):
    """Where in Weights & Biases a job's metrics go. Its bounds are theirs."""

    project: Annotated[StrictStr, Field(pattern=r"^[^/\\#?%:]{1,128}$")]
    name: Annotated[StrictStr, Field(min_length=1, max_length=128)] | None = None
    """Of the run; by default the job's id."""
    entity: Annotated[StrictStr, Field(pattern=r"^[^/\\#?%:\s]{1,128}$")] | None = None
    """Team or user; by default the one of the operator's key."""
    tags: Annotated[list[Annotated[StrictStr, Field(min_length=1, max_length=64)]], Field(max_length=50)] | None = None


class Integration(Request):
    type: Literal["wandb"]
    wandb: WandbIntegration


class JobCreate(Request):
    """POST /v1/fine_tuning/jobs."""

    model: Annotated[StrictStr, Field(min_length=1, max_length=256)]
    training_file: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    validation_file: Annotated[StrictStr, Field(min_length=1, max_length=64)] | None = None
    hyperparameters: Hyperparameters | None = None
    """Deprecated by OpenAI in favour of `method`, still sent by its SDK's users."""
    method: Method | None = None
    suffix: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    """At most 64 letters, digits, '.', '_' and '-': it becomes part of the model's name."""
    seed: Annotated[StrictInt, Field(ge=0, le=2**31 - 1)] | None = None
    integrations: Annotated[list[Integration], Field(max_length=1)] | None = None
    """Weights & Biases, at most once."""
    metadata: Metadata | None = None
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    """Ours: every choice of a run."""

    @field_validator("training", mode="before")
    @classmethod
    def _explain_quantized(cls, value: Any) -> Any:
        if isinstance(value, dict) and any(value.get(key) is True for key in ("load_in_4bit", "load_in_8bit")):
            raise ValueError(QUANTIZED_FULL)
        return {} if value is None else value

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        """The same choice sent twice must be the same."""
        supervised = self.method.supervised.hyperparameters if self.method and self.method.supervised else None
        if self.hyperparameters and supervised and self.hyperparameters != supervised:
            raise ValueError("hyperparameters and method.supervised.hyperparameters differ; send method only")
        chosen = self.chosen_hyperparameters
        batch = self.training.batch_size
        if "auto" not in (chosen.batch_size, batch) and chosen.batch_size != batch:
            raise ValueError(f"batch_size is {chosen.batch_size} in hyperparameters and {batch} in training; send one")
        if chosen.n_epochs != "auto" and self.training.max_steps is not None:
            raise ValueError(
                f"n_epochs={chosen.n_epochs} and training.max_steps={self.training.max_steps} both set the length; "
                "send one"
            )
        if chosen.learning_rate_multiplier != "auto" and self.training.learning_rate != "auto":
            raise ValueError("learning_rate_multiplier and training.learning_rate set the same choice; send one")
        if chosen.batch_size != "auto":
            # Re-validated, so that micro_batch_size and gradient_accumulation_steps must agree with it too.
            TrainingSpec.model_validate({**self.training.model_dump(), "batch_size": chosen.batch_size})
        return self

    @property
    def chosen_hyperparameters(self) -> Hyperparameters:
        if self.method and self.method.supervised:
            return self.method.supervised.hyperparameters
        return self.hyperparameters or Hyperparameters()

    def training_spec(self) -> TrainingSpec:
        """`training`, with the batch size OpenAI's hyperparameters may hold filled in."""
        batch = self.chosen_hyperparameters.batch_size
        if batch == "auto":
            return self.training
        return TrainingSpec.model_validate({**self.training.model_dump(), "batch_size": batch})


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: FileStatus
    status_details: str | None = None
    expires_at: int | None = None
    anneal: dict[str, Any] | None = None

    @classmethod
    def of(cls, row: File) -> Self:
        return cls(
            id=row.id,
            bytes=row.bytes,
            created_at=int(row.created_at),
            filename=row.filename,
            purpose=row.purpose,
            status=row.status,
            status_details=row.status_details,
            expires_at=_seconds(row.expires_at),
            anneal={"format": row.format, "rows": row.rows, "sha256": row.sha256},
        )


class Deleted(BaseModel):
    id: str
    object: str
    deleted: Literal[True] = True


class Page(BaseModel, Generic[T]):
    """A list, newest first; `after` takes the last id of the page before."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None

    @classmethod
    def of(cls, data: list[T], has_more: bool, ids: list[str]) -> Self:
        """A page of objects with the ids that cursors are made of."""
        return cls(data=data, has_more=has_more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)


class JobError(BaseModel):
    code: str
    message: str
    param: str | None = None


class ShownHyperparameters(BaseModel):
    """OpenAI's three: numbers once the trainer has settled them, "auto" until then."""

    batch_size: int | Auto
    learning_rate_multiplier: float | Auto
    n_epochs: int | Auto


class ShownSupervised(BaseModel):
    hyperparameters: ShownHyperparameters


class ShownMethod(BaseModel):
    type: Literal["supervised"] = "supervised"
    supervised: ShownSupervised


class FineTuningJob(BaseModel):
    """OpenAI's `fine_tuning.job`; `anneal` holds the resolved choices and where the run is."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobError | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: ShownHyperparameters
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: JobStatus
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[Integration]
    metadata: dict[str, Any] | None
    method: ShownMethod
    anneal: dict[str, Any]

    @classmethod
    def of(cls, job: Job, queue: dict[str, int | None] | None = None) -> Self:
        """What a job shows.

        Args:
            queue: of `shared.queue_view`, of a queued job.
        """
        resolved = job.resolved or {}
        hyperparameters = ShownHyperparameters(
            **{key: _shown_hyperparameter(key, resolved.get(key, sent)) for key, sent in job.hyperparameters.items()}
        )
        return cls(
            id=job.id,
            created_at=int(job.created_at),
            error=JobError(**job.error) if job.error else None,
            fine_tuned_model=job.fine_tuned_model,
            finished_at=_seconds(job.finished_at),
            hyperparameters=hyperparameters,
            model=job.model,
            organization_id=job.project_id,
            result_files=list(job.result_files or []),
            seed=job.seed,
            status=job.status,
            trained_tokens=job.trained_tokens,
            training_file=job.training_file,
            validation_file=job.validation_file,
            estimated_finish=_seconds(job.estimated_finish),
            integrations=[Integration.model_validate(integration) for integration in job.integrations or ()],
            metadata=job.job_metadata,
            method=ShownMethod(supervised=ShownSupervised(hyperparameters=hyperparameters)),
            anneal={
                "training": {**job.training, **(job.adapted or {}), **resolved},
                "adapted": job.adapted,
                "current_step": job.current_step,
                "total_steps": job.total_steps,
                "started_at": _seconds(job.started_at),
                "base": {"source": job.model_source, "revision": job.model_revision},
                "claims": job.fence,
                "cancel_requested": job.cancel_requested_at is not None,
                "pause_requested": job.pause_requested_at is not None,
                "queue": queue,
            },
        )


class JobCheckpoint(BaseModel):
    """OpenAI's `fine_tuning.job.checkpoint`."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]

    @classmethod
    def of(cls, row: Checkpoint, tuned: str) -> Self:
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            fine_tuned_model_checkpoint=checkpoint_name(tuned, row.step),
            fine_tuning_job_id=row.job_id,
            step_number=row.step,
            metrics=row.metrics,
        )


class ModelObject(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    anneal: dict[str, Any]

    @classmethod
    def of(cls, model: NamedModel) -> Self:
        return cls(
            id=model.id,
            created=int(model.created_at),
            owned_by=model.owned_by,
            anneal={
                "kind": model.kind,
                "base_model": model.base_model,
                "fine_tuning_job_id": model.job_id,
                "source": model.source,
            },
        )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


def _seconds(value: float | None) -> int | None:
    return None if value is None else int(value)


def _shown_hyperparameter(name: str, value: Any) -> Any:
    """OpenAI's epochs are whole: a part of one counts as one. `anneal.training` has the exact number."""
    return math.ceil(value) if name == "n_epochs" and value != "auto" else value
