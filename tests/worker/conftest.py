"""A base folder that no toy reads, and jobs whose training file tells the toy trainer what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared import job_creation
from shared.db import transaction
from shared.schemas import JobCreate
from shared.settings import Settings
from tests.rows import stored_file
from tests.worker.steps import BASE
from worker import base_models


@pytest.fixture(autouse=True)
def base_folder(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The toy reads no weights: any folder is a base model."""
    found = base_models.BaseModelFiles(path=tmp_path, source="folder", revision=None, note=None)
    monkeypatch.setattr(base_models, "resolve", lambda *_: found)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))


@pytest.fixture
def submit(settings: Settings) -> Callable[..., str]:
    """Store a job whose training file tells the toy what to do; returns its id."""

    def submit(
        training: dict[str, Any] | None = None, *, validated: bool = False, model: str = BASE, **plan: Any
    ) -> str:
        content = json.dumps({"steps": 5, **plan}).encode()
        file_id = stored_file(settings, content, filename="plan.json")
        with transaction() as session:
            body = {"model": model, "training_file": file_id, "suffix": "toy", "training": training or {}}
            request = JobCreate.model_validate({**body, "validation_file": file_id if validated else None})
            return job_creation.submit(session, "default", request).id

    return submit
