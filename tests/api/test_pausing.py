"""Pause, resume, priority, the queue and integrations over the real application; nothing trains here."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from sqlalchemy import update

from shared import jobs
from shared.db import clock, transaction
from shared.models import Job
from shared.queue_view import OLDEST_S
from tests.api.test_jobs import JOBS, create, wandb
from tests.conftest import upload


@pytest.fixture
def sdk(server: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0) as client:
        yield client


def claim() -> Job:
    with transaction() as session:
        job = jobs.claim_next(session, "worker", 60)
    assert job is not None
    return job


def act(client: TestClient, job_id: str, what: str) -> dict[str, Any]:
    answer = client.post(f"{JOBS}/{job_id}/{what}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def place(client: TestClient, job_id: str) -> int | None:
    queue = client.get(f"{JOBS}/{job_id}").json()["anneal"]["queue"]
    return None if queue is None else int(queue["position"])


def test_a_queued_job_is_paused_and_resumed_at_its_old_place(client: TestClient) -> None:
    file_id = upload(client)["id"]
    first, second = (create(client, training_file=file_id).json()["id"] for _ in range(2))
    paused = act(client, first, "pause")
    assert (paused["status"], paused["anneal"]["queue"]) == ("paused", None)
    assert act(client, first, "pause") == paused, "asking again changes nothing"
    assert place(client, second) == 1
    resumed = act(client, first, "resume")
    assert (resumed["status"], resumed["anneal"]["queue"]["position"]) == ("queued", 1)
    assert place(client, second) == 2


def test_a_running_job_shows_that_a_pause_is_asked_for(client: TestClient) -> None:
    job_id = create(client).json()["id"]
    claim()
    assert client.get(f"{JOBS}/{job_id}").json()["anneal"]["pause_requested"] is False
    asked = act(client, job_id, "pause")
    assert (asked["status"], asked["anneal"]["pause_requested"]) == ("running", True)
    assert client.get(f"{JOBS}/{job_id}").json() == asked
    withdrawn = act(client, job_id, "resume")
    assert (withdrawn["status"], withdrawn["anneal"]["pause_requested"]) == ("running", False)
    assert act(client, job_id, "resume")["status"] == "running"


def test_orders_that_come_too_late_are_conflicts_that_need_no_retry(client: TestClient) -> None:
    cancelled, being_cancelled = (create(client).json()["id"] for _ in range(2))
    act(client, cancelled, "cancel")
    claim()
    act(client, being_cancelled, "cancel")
    for job_id in (cancelled, being_cancelled):
        for what in ("pause", "resume"):
            answer = client.post(f"{JOBS}/{job_id}/{what}")
            assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
            assert job_id in answer.json()["error"]["message"]


def test_a_resumed_job_is_hinted_to_the_workers(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = create(client).json()["id"]
    act(client, job_id, "pause")
    hinted: list[str] = []
    monkeypatch.setattr(client.app.state.outbox, "training_waits", lambda: hinted.append(job_id))  # type: ignore[attr-defined]
    act(client, job_id, "resume")
    assert hinted == [job_id]


def test_the_sdk_pauses_and_resumes(sdk: OpenAI) -> None:
    file = sdk.files.create(file=("a.jsonl", b'{"prompt": "a", "completion": "b"}\n'), purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(model="smollm2-135m-instruct", training_file=file.id)
    assert sdk.fine_tuning.jobs.pause(job.id).status == "paused"  # type: ignore[comparison-overlap]
    assert sdk.fine_tuning.jobs.resume(job.id).status == "queued"


def test_places_follow_priority_and_are_listed_alike(client: TestClient) -> None:
    file_id = upload(client)["id"]
    low, normal, high = (
        create(client, training_file=file_id, training={"priority": priority}).json() for priority in (-1, 0, 1)
    )
    assert [job["anneal"]["training"]["priority"] for job in (low, normal, high)] == [-1, 0, 1]
    assert [place(client, job["id"]) for job in (high, normal, low)] == [1, 2, 3]
    listed = client.get(JOBS).json()["data"]
    assert {job["id"]: job["anneal"]["queue"]["position"] for job in listed} == {
        high["id"]: 1,
        normal["id"]: 2,
        low["id"]: 3,
    }
    act(client, high["id"], "cancel")
    assert [place(client, job["id"]) for job in (high, normal, low)] == [None, 1, 2]


def test_a_start_is_estimated_from_the_run_that_is_ahead(client: TestClient) -> None:
    file_id = upload(client)["id"]
    running, waits = (create(client, training_file=file_id).json()["id"] for _ in range(2))
    assert client.get(f"{JOBS}/{waits}").json()["anneal"]["queue"]["estimated_start"] is None, "nothing is known yet"
    claim()
    with transaction() as session:
        finish = clock(session) + 500
        session.execute(update(Job).where(Job.id == running).values(estimated_finish=finish))
    time.sleep(OLDEST_S)  # what another process does is seen then
    shown = client.get(f"{JOBS}/{waits}").json()["anneal"]["queue"]
    assert shown == {"position": 1, "estimated_start": int(finish)}
    assert client.get(f"{JOBS}/{running}").json()["estimated_finish"] == int(finish)


def test_an_integration_is_kept_and_shown_in_openais_shape(client: TestClient) -> None:
    sent = wandb(name="a try", tags=["a"])
    job = create(client, integrations=[sent]).json()
    shown = [{"type": "wandb", "wandb": {"project": "tickets", "name": "a try", "entity": None, "tags": ["a"]}}]
    assert job["integrations"] == client.get(f"{JOBS}/{job['id']}").json()["integrations"] == shown
    assert create(client, integrations=[]).json()["integrations"] == []
    assert create(client, integrations=None).json()["integrations"] == []
