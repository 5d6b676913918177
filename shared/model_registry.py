"""Names of models: base models by hub id or alias, tuned models and checkpoints by the name their job gave them.

    HuggingFaceTB/SmolLM2-135M-Instruct           a base model; smollm2-135m-instruct is its alias
    ft:<alias>:<project>:<suffix>:<job>           a tuned model
    ft:<alias>:<project>:<suffix>:<job>:ckpt-step-40

Base models are the operator's: `ANNEAL_BASE_MODELS` and the folders of `ANNEAL_MODELS_DIR`. They have no rows.
A name may not end like an action on a model (`…/exports`): its URL would be that action's. `shared.settings` refuses
one, and a folder of that name is passed over.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from shared.errors import ModelNotFound
from shared.models import Job, Model, table_of
from shared.settings import MODEL_ACTIONS, Settings, get_settings

BASE_LOCATION = "base:"


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model somebody may use. `location` is `base:<hub id>` or a folder relative to storage."""

    id: str
    location: str
    owned_by: str
    created_at: float
    base_model: str
    kind: str = "base"
    job_id: str | None = None
    source: str | None = None

    @property
    def is_base(self) -> bool:
        return self.location.startswith(BASE_LOCATION)


def alias_of(hub_id: str) -> str:
    """The short name of a base model: what follows the owner, in lower case."""
    return hub_id.rsplit("/", 1)[-1].lower()


def base_models(settings: Settings) -> list[NamedModel]:
    """Every base model jobs and requests may name, in the operator's order."""
    names = list(settings.base_models)
    if settings.models_dir is not None and settings.models_dir.is_dir():
        found = sorted(path.parent for path in settings.models_dir.glob("*/*/config.json"))
        names += [f"{path.parent.name}/{path.name}" for path in found if path.name not in MODEL_ACTIONS]
    return [
        NamedModel(id=name, location=BASE_LOCATION + name, owned_by=name.split("/")[0], created_at=0, base_model=name)
        for name in dict.fromkeys(names)
    ]


def find(session: Session, project_id: str, name: str, *, hold: bool = False) -> NamedModel:
    """The model of that name which `project_id` may use.

    Args:
        hold: let nobody delete it before this transaction ends.

    Raises:
        ModelNotFound: no such base model, and no such model of this project.
    """
    bases = base_models(get_settings())
    for model in bases:
        if name == model.id or name.lower() == alias_of(model.id):
            return model
    row = session.get(Model, name, with_for_update={"read": True} if hold else None)
    if row is None or row.project_id != project_id:
        raise unknown(name)
    return _named(row)


def unknown(name: str) -> ModelNotFound:
    """The error for a name that is nobody's, or somebody else's."""
    bases = ", ".join(model.id for model in base_models(get_settings()))
    return ModelNotFound(
        f"the model {name[:300]!r} does not exist; base models here are {bases}, and GET /v1/models lists every model "
        "you can use",
        param="model",
    )


def list_models(session: Session, project_id: str) -> Iterator[NamedModel]:
    """Base models first, then the project's own, newest first; one by one, for there may be thousands."""
    yield from base_models(get_settings())
    table = table_of(Model)
    mine = select(table).where(table.c.project_id == project_id)
    for row in session.execute(mine.order_by(table.c.created_at.desc(), table.c.id.desc())):
        yield _named(row)


def root_base(session: Session, job: Job) -> str:
    """Hub id of the base model at the bottom of a job's chain of tuned models."""
    if job.model_location.startswith(BASE_LOCATION):
        return job.model_location.removeprefix(BASE_LOCATION)
    row = session.get(Model, job.model)
    return row.base_model if row is not None else job.model.split(":")[1]


def tuned_name(job: Job, base_model: str) -> str:
    """The name a job's model gets, free of anything but the client's suffix."""
    short = job.id.removeprefix("ftjob-")[:8]
    return f"ft:{alias_of(base_model)}:{job.project_id}:{job.suffix or ''}:{short}"


def checkpoint_name(tuned: str, step: int) -> str:
    return f"{tuned}:ckpt-step-{step}"


def _named(row: Model | Row[Any]) -> NamedModel:
    return NamedModel(
        id=row.id,
        location=row.location,
        owned_by=row.owned_by,
        created_at=row.created_at,
        base_model=row.base_model,
        kind=row.kind,
        job_id=row.job_id,
        source=row.source,
    )
