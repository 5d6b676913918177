"""Fine-tuning what was fine-tuned: a tuned model or a checkpoint as the base, by name, and what that makes of names."""

import threading
import time
from collections.abc import Callable

import pytest
from sqlalchemy import select

from shared import checkpoints, job_creation, model_registry, waiting
from shared.checkpoint_files import read_manifest
from shared.db import reading, transaction
from shared.errors import Conflict
from shared.models import Checkpoint, Job, Model
from shared.schemas import JobCreate
from shared.settings import Settings
from tests.worker.steps import BASE, job_of, run_next
from worker import preparation


def test_each_link_starts_from_the_weights_named_and_names_the_base_at_the_bottom(
    settings: Settings, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started_from: list[str] = []
    make_spec = preparation.Preparation.spec

    def spec(self: preparation.Preparation, *arguments: object) -> object:
        made = make_spec(self, *arguments)  # type: ignore[arg-type]
        started_from.append(made.base_model_dir)
        return made

    monkeypatch.setattr(preparation.Preparation, "spec", spec)
    first = submit(steps=4, save_steps=2)
    run_next(settings)
    tuned = job_of(first).fine_tuned_model
    second = submit(steps=4, save_steps=2, model=tuned)
    run_next(settings)
    middle = f"{job_of(second).fine_tuned_model}:ckpt-step-2"
    third = submit(steps=2, model=middle)
    run_next(settings)
    for job_id, base, source in ((first, BASE, "folder"), (second, tuned, "checkpoint"), (third, middle, "checkpoint")):
        job = job_of(job_id)
        assert (job.status, job.model, job.model_source) == ("succeeded", base, source), job.error
        assert job.fine_tuned_model == f"ft:smollm2-135m-instruct:default:toy:{job_id[6:14]}"
        with reading() as session:
            model = session.get_one(Model, job.fine_tuned_model)
            assert (model.base_model, model_registry.root_base(session, job)) == (BASE, BASE)
            assert read_manifest(settings.storage_root / model.location).base_model == base
    with reading() as session:
        folders = [str(settings.storage_root / session.get_one(Model, name).location) for name in (tuned, middle)]
    assert started_from[1:] == folders


def test_a_paused_job_keeps_the_checkpoint_it_starts_from(settings: Settings, submit: Callable[..., str]) -> None:
    submit({"keep_checkpoints": 1}, steps=6, save_steps=2)
    run_next(settings)
    with reading() as session:
        (model,) = [row for row in model_registry.list_models(session, "default") if row.kind == "tuned"]
    child = submit(steps=2, model=model.id)
    with transaction() as session:
        waiting.request_pause(session, "default", child)
    with pytest.raises(Conflict, match=child), transaction() as session:
        checkpoints.delete_model(session, "default", model.id)
    with transaction() as session:
        waiting.resume(session, "default", child)
    run_next(settings)
    assert job_of(child).status == "succeeded"


def test_a_checkpoint_stays_while_a_job_is_being_created_with_it(
    settings: Settings, submit: Callable[..., str]
) -> None:
    """Retention looks for users after the creation has begun and before it is committed."""
    parent = submit({"keep_checkpoints": 3}, steps=6, save_steps=2)
    run_next(settings)
    name = f"{job_of(parent).fine_tuned_model}:ckpt-step-2"
    file_id = job_of(parent).training_file
    retired: list[str] = []

    def retire() -> None:
        with transaction() as session:
            retired.extend(checkpoints.retire(session, session.get_one(Job, parent), BASE, keep=1))

    retiring = threading.Thread(target=retire)
    with transaction() as session:
        job_creation.submit(session, "default", JobCreate(model=name, training_file=file_id))
        retiring.start()
        time.sleep(0.3)
    retiring.join()
    with reading() as session:
        location = session.get_one(Model, name).location
        assert session.scalar(select(Checkpoint.step).where(Checkpoint.location == location)) == 2
    assert len(retired) == 1 and location not in retired
