"""/v1/models: what is listed, and what a deletion takes with it. Models come from real supervision of toy trainers."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from sqlalchemy import update

from shared import checkpoints, job_creation, model_registry
from shared.db import reading, transaction
from shared.models import Job, JobStatus, Model
from shared.schemas import JobCreate
from shared.settings import Settings
from tests.conftest import upload
from tests.waiting import LIMIT_S
from tests.worker.conftest import base_folder, submit  # noqa: F401 - fixtures
from tests.worker.steps import BASE, claim, job_of, run_next

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def tuned(settings: Settings, submit: Callable[..., str]) -> Job:  # noqa: F811
    """A job that has ended, with checkpoints of the steps 2, 4 and 5."""
    job_id = submit(steps=5, save_steps=2)
    run_next(settings)
    return job_of(job_id)


def ids(client: TestClient) -> list[str]:
    return [model["id"] for model in client.get("/v1/models").json()["data"]]


def steps_of(client: TestClient, job: Job) -> list[int]:
    return [row["step_number"] for row in client.get(f"{JOBS}/{job.id}/checkpoints").json()["data"]]


def location_of(name: str) -> str:
    with reading() as session:
        return session.get_one(Model, name).location


def test_models_are_found_by_id_with_slashes_encoded_or_not(client: TestClient) -> None:
    assert ids(client) == [BASE]
    for path in (BASE, BASE.replace("/", "%2F"), "smollm2-135m-instruct"):
        assert client.get(f"/v1/models/{path}").json()["owned_by"] == "HuggingFaceTB"
    answer = client.get("/v1/models/ft:nope")
    assert answer.status_code == 404
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("model_not_found", "model")


def test_base_models_come_first_then_the_projects_own_with_their_kind(client: TestClient, tuned: Job) -> None:
    listed = client.get("/v1/models").json()["data"]
    name = tuned.fine_tuned_model
    assert [model["id"] for model in listed][:2] == [BASE, name]
    assert {model["id"] for model in listed[2:]} == {f"{name}:ckpt-step-{step}" for step in (2, 4, 5)}
    assert [model["anneal"]["kind"] for model in listed] == ["base", "tuned", *["checkpoint"] * 3]
    assert all(model["anneal"]["fine_tuning_job_id"] == tuned.id for model in listed[1:])
    assert client.get("/v1/models").json()["data"] == listed
    assert client.get(f"/v1/models/{name}").json() == listed[1]


def test_a_deleted_model_is_gone_with_its_final_checkpoint_and_weights(
    client: TestClient, settings: Settings, tuned: Job
) -> None:
    name = str(tuned.fine_tuned_model)
    weights = settings.storage_root / location_of(name)
    assert weights.is_dir()
    answer = client.delete(f"/v1/models/{name.replace(':', '%3A')}")
    assert answer.json() == {"id": name, "object": "model", "deleted": True}
    assert not weights.exists()
    assert sorted(ids(client)) == sorted([BASE, f"{name}:ckpt-step-4", f"{name}:ckpt-step-2"])
    assert steps_of(client, tuned) == [4, 2]
    assert client.get(f"{JOBS}/{tuned.id}").json()["fine_tuned_model"] == name
    file_id = upload(client)["id"]
    for gone in (name, f"{name}:ckpt-step-5"):
        for answer in (
            client.get(f"/v1/models/{gone}"),
            client.delete(f"/v1/models/{gone}"),
            client.post(JOBS, json={"model": gone, "training_file": file_id}),
            client.post("/v1/chat/completions", json={"model": gone, "messages": [{"role": "user", "content": "hi"}]}),
        ):
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


def test_a_deleted_checkpoint_leaves_the_model_made_of_it(client: TestClient, settings: Settings, tuned: Job) -> None:
    name = str(tuned.fine_tuned_model)
    final, early = settings.storage_root / location_of(name), settings.storage_root / location_of(f"{name}:ckpt-step-2")
    assert client.delete(f"/v1/models/{name}:ckpt-step-5").status_code == 200
    assert final.is_dir() and name in ids(client) and steps_of(client, tuned) == [4, 2]
    assert client.delete(f"/v1/models/{name}:ckpt-step-2").status_code == 200
    assert not early.exists() and steps_of(client, tuned) == [4]
    assert client.delete(f"/v1/models/{name}").status_code == 200
    assert not final.exists()


def test_a_model_stays_while_a_job_that_starts_from_it_has_not_ended(client: TestClient, tuned: Job) -> None:
    name = str(tuned.fine_tuned_model)
    body = {"model": name, "training_file": upload(client)["id"]}
    child = client.post(JOBS, json=body).json()["id"]
    for status in (JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.RUNNING, JobStatus.VALIDATING_FILES):
        with transaction() as session:
            session.execute(update(Job).where(Job.id == child).values(status=status))
        for held in (name, f"{name}:ckpt-step-5"):
            answer = client.delete(f"/v1/models/{held}")
            assert answer.status_code == 409 and child in answer.json()["error"]["message"]
            assert answer.headers["x-should-retry"] == "false"
    assert name in ids(client)
    assert client.delete(f"/v1/models/{name}:ckpt-step-4").status_code == 200
    with transaction() as session:
        session.execute(update(Job).where(Job.id == child).values(status=JobStatus.CANCELLED))
    assert client.delete(f"/v1/models/{name}").status_code == 200
    assert client.get(f"{JOBS}/{child}").json()["model"] == name
    assert client.get(f"{JOBS}/{child}/checkpoints").json()["data"] == []


def test_a_checkpoint_of_a_job_that_runs_can_not_be_deleted(
    client: TestClient,
    settings: Settings,
    submit: Callable[..., str],  # noqa: F811
) -> None:
    submit(steps=5)
    job = claim(settings)
    with transaction() as session:
        checkpoints.register(
            session,
            job,
            job.fence,
            base_model=BASE,
            step=2,
            location=f"checkpoints/{job.id}/1/2",
            manifest_sha256="0" * 64,
            resumable=True,
            tokens=1,
            metrics={},
        )
    name = next(name for name in ids(client) if name.endswith(":ckpt-step-2"))
    answer = client.delete(f"/v1/models/{name}")
    assert answer.status_code == 409 and "belongs to" in answer.json()["error"]["message"]
    assert name in ids(client)


def test_a_job_that_is_being_created_keeps_its_model(client: TestClient, tuned: Job) -> None:
    """Of a creation and a deletion at the same time one waits for the other; never is there a job without a model."""
    name, answers = str(tuned.fine_tuned_model), []
    request = JobCreate(model=name, training_file=upload(client)["id"])
    deleting = threading.Thread(target=lambda: answers.append(client.delete(f"/v1/models/{name}")))
    with transaction() as session:
        job = job_creation.submit(session, "default", request)
        deleting.start()
        deleting.join(0.5)
        assert not answers, "the deletion did not wait"
    deleting.join(LIMIT_S)
    assert answers[0].status_code == 409 and job.id in answers[0].json()["error"]["message"]


def test_base_models_and_other_projects_models_are_not_deleted(client: TestClient, tuned: Job) -> None:
    for name in (BASE, "smollm2-135m-instruct"):
        answer = client.delete(f"/v1/models/{name}")
        assert answer.status_code == 403 and "ANNEAL_BASE_MODELS" in answer.json()["error"]["message"]
    assert client.delete("/v1/models/ft:nope").status_code == 404
    with transaction() as session:
        session.execute(update(Model).values(project_id="other"))
    assert client.delete(f"/v1/models/{tuned.fine_tuned_model}").status_code == 404
    assert client.get(f"/v1/models/{tuned.fine_tuned_model}").status_code == 404
    assert ids(client) == [BASE]


def test_a_base_model_named_like_an_action_is_refused(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANNEAL_BASE_MODELS", '["owner/exports"]')
    with pytest.raises(ValidationError, match="named like an action"):
        Settings()
    for folder in ("push", "mine"):
        (tmp_path / "owner" / folder).mkdir(parents=True)
        (tmp_path / "owner" / folder / "config.json").write_text("{}")
    found = model_registry.base_models(settings.model_copy(update={"models_dir": tmp_path}))
    assert [model.id for model in found] == [BASE, "owner/mine"]
