"""Thousands of jobs, read page by page while more arrive."""

import threading
from collections import Counter

import pytest
from openai import OpenAI

from shared import db, job_creation
from shared.db import transaction
from shared.models import DEFAULT_PROJECT
from shared.schemas import JobCreate
from shared.settings import get_settings
from tests.integration.test_up import Up
from tests.sdk.behaviours.conftest import SETTINGS, openai
from tests.sdk.data import SHORT, TINY

JOBS = 5000
MORE = 100


@pytest.fixture
def thousands(service: Up, training_file: object, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Jobs as the API stores them, without a request for each."""
    places = {"ANNEAL_DATA": str(service.data), "ANNEAL_MODELS_DIR": str(service.data.parent / "models")}
    for name, value in (SETTINGS | places).items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    db.reset()
    body = {"model": TINY, "training_file": training_file.id, "training": SHORT}  # type: ignore[attr-defined]
    request = JobCreate.model_validate(body | {"metadata": {"many": "yes"}})
    ids = set()
    try:
        for _ in range(JOBS // 100):  # in short transactions: the service writes beside us
            with transaction() as session:
                ids |= {job_creation.submit(session, DEFAULT_PROJECT, request).id for _ in range(100)}
    finally:
        db.get_engine().dispose()
        db.reset()
        get_settings.cache_clear()
    return ids


def test_five_thousand_jobs_are_read_each_once_while_more_are_created(
    service: Up, thousands: set[str], client: OpenAI, training_file: object
) -> None:
    made: list[str] = []

    def create_more() -> None:
        with openai(f"{service.url}/v1") as other:
            for _ in range(MORE):
                job = other.fine_tuning.jobs.create(model=TINY, training_file=training_file.id)  # type: ignore[attr-defined]
                made.append(job.id)

    creator = threading.Thread(target=create_more)
    creator.start()
    seen = Counter(job.id for job in client.fine_tuning.jobs.list())
    were_made = len(made)
    creator.join()

    assert len(thousands) == JOBS
    assert were_made > 0, "nothing was created meanwhile"
    assert [job_id for job_id, times in seen.items() if times > 1] == []
    assert thousands - set(seen) == set()
    assert len(made) == MORE
    assert set(made) <= {job.id for job in client.fine_tuning.jobs.list(limit=100)}
