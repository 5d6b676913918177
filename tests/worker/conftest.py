"""A base folder that no toy reads, and jobs whose training file tells the toy trainer what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared import files, job_creation, storage
from shared.db import transaction
from shared.ids import new_id
from shared.models import FileStatus
from shared.schemas import JobCreate
from shared.settings import Settings
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
        file_id = new_id("file")
        content = json.dumps({"steps": 5, **plan}).encode()
        stored = storage.save_file(settings, file_id, [content], max_bytes=10**6)
        with transaction() as session:
            files.create(
                session,
                file_id=file_id,
                project_id="default",
                filename="plan.json",
                purpose="fine-tune",
                size_bytes=stored.bytes,
                sha256=stored.sha256,
                status=FileStatus.PROCESSED,
            )
            body = {"model": model, "training_file": file_id, "suffix": "toy", "training": training or {}}
            request = JobCreate.model_validate({**body, "validation_file": file_id if validated else None})
            return job_creation.submit(session, "default", request).id

    return submit
