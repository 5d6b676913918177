"""/v1/fine_tuning/jobs over the real application; nothing trains here."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from shared.db import transaction
from shared.models import Job
from tests.conftest import upload

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
JOBS = "/v1/fine_tuning/jobs"


def create(client: TestClient, **body: Any) -> Any:
    body.setdefault("model", MODEL)
    if "training_file" not in body:
        body["training_file"] = upload(client)["id"]
    content = json.dumps(body)  # the client's own encoder refuses lone surrogates
    return client.post(JOBS, content=content, headers={"content-type": "application/json"})


def wandb(**choices: Any) -> dict[str, Any]:
    return {"type": "wandb", "wandb": {"project": "tickets", **choices}}


def test_a_job_with_checked_files_is_queued_at_once(client: TestClient) -> None:
    job = create(client, suffix="my-model", seed=7, metadata={"team": "a"}).json()
    assert job["status"] == "queued"
    assert job["object"] == "fine_tuning.job"
    assert (job["seed"], job["metadata"], job["organization_id"]) == (7, {"team": "a"}, "default")
    assert job["hyperparameters"] == {"batch_size": "auto", "learning_rate_multiplier": "auto", "n_epochs": "auto"}
    assert job["anneal"]["training"]["optimizer"] == "adamw_8bit"
    assert client.get(f"{JOBS}/{job['id']}").json() == job


def test_a_base_model_answers_to_its_alias(client: TestClient) -> None:
    assert create(client, model="smollm2-135m-instruct").json()["model"] == MODEL


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"model": "gpt-5"}, "model", "gpt-5"),
        ({"model": 5}, "model", "5"),
        ({"model": ""}, "model", ""),
        ({"model": "x" * 1000}, "model", ""),
        ({"training_file": "file-nope"}, "training_file", "file-nope"),
        ({"validation_file": "file-nope"}, "validation_file", "file-nope"),
        ({"trainning": {}}, "trainning", "unknown key"),
        ({"extra_body": {"training": {}}}, "extra_body", "send what is in it beside the other keys"),
        ({"training": {"sharding": "on"}}, "training", "sharding=on needs gpus of at least 2, and it is 1"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat", "unknown key"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate", "-1"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate", "fast"),
        ({"training": {"learning_rate": True}}, "training.learning_rate", "True"),
        ({"training": {"learning_rate": "0.5"}}, "training.learning_rate", "0.5"),
        ({"training": {"learning-rate": 1}}, "training.learning-rate", "unknown key"),
        ({"training": {"max_steps": 10**30}}, "training.max_steps", "10"),
        ({"hyperparameters": {"learning_rate_multiplier": True}}, "hyperparameters.learning_rate_multiplier", "True"),
        ({"metadata": {"k": "a\0b"}}, None, "NUL"),
        ({"model": "a\ud800"}, None, "surrogate"),
        ({"training": {"max_steps": "60"}}, "training.max_steps", "60"),
        ({"training": {"max_steps": 0}}, "training.max_steps", "0"),
        ({"training": {"load_in_4bit": True}}, "training", "QLoRA"),
        ({"training": {"method": "lora"}}, "training.method", "lora"),
        ({"training": {"batch_size": 8, "micro_batch_size": 3}}, "training", "divided"),
        (
            {"training": {"batch_size": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 2}},
            "training",
            "send two of the three",
        ),
        ({"hyperparameters": {"n_epochs": 2}, "training": {"max_steps": 5}}, None, "both set the length"),
        ({"hyperparameters": {"batch_size": 4}, "training": {"batch_size": 8}}, None, "batch_size is 4"),
        ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs", "1.5"),
        ({"suffix": "x" * 65}, "suffix", "x"),
        ({"suffix": "../up"}, "suffix", "../up"),
        ({"seed": "a"}, "seed", "a"),
        ({"seed": True}, "seed", "True"),
        ({"method": {"type": "dpo"}}, "method", "dpo"),
        ({"integrations": [{"type": "wandb"}]}, "integrations.0.wandb", "required"),
        ({"integrations": [{"type": "tensorboard"}]}, "integrations.0.type", "wandb"),
        ({"integrations": [{"type": "wandb", "wandb": {}}]}, "integrations.0.wandb.project", "required"),
        ({"integrations": [wandb(project="a/b")]}, "integrations.0.wandb.project", "a/b"),
        ({"integrations": [wandb(tag="x")]}, "integrations.0.wandb.tag", "unknown key"),
        ({"integrations": [wandb(tags=["x" * 65])]}, "integrations.0.wandb.tags.0", "x"),
        ({"integrations": [wandb(), wandb()]}, "integrations", "1"),
        ({"training": {"priority": 101}}, "training.priority", "101"),
        ({"training": {"priority": 0.5}}, "training.priority", "0.5"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "at most 16"),
        ({"metadata": {"k": "x" * 513}}, "metadata", "512"),
        ({"metadata": {"k": 3}}, "metadata.k", "3"),
    ],
)
def test_a_bad_job_is_refused_with_the_field_and_the_value(
    client: TestClient, body: dict[str, Any], param: str | None, said: str
) -> None:
    answer = create(client, **body)
    error = answer.json()["error"]
    assert answer.status_code in (400, 404), answer.text
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert said in error["message"]
    assert client.get(JOBS).json()["data"] == []


def test_a_body_that_is_not_json_is_refused(client: TestClient) -> None:
    answer = client.post(JOBS, content=b"{nope", headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "not JSON" in answer.json()["error"]["message"]


def test_a_job_can_not_train_on_a_deleted_file(client: TestClient) -> None:
    file = upload(client)
    client.delete(f"/v1/files/{file['id']}")
    assert create(client, training_file=file["id"]).status_code == 404


def test_a_job_can_not_train_on_a_file_of_another_purpose(client: TestClient) -> None:
    file = upload(client, purpose="user_data")
    answer = create(client, training_file=file["id"])
    assert answer.status_code == 400 and "user_data" in answer.json()["error"]["message"]


def test_openai_hyperparameters_become_choices_of_the_run(client: TestClient) -> None:
    hyperparameters = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    for body in (
        {"hyperparameters": hyperparameters},
        {"method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}},
    ):
        job = create(client, **body).json()
        assert job["hyperparameters"] == hyperparameters
        assert job["method"]["supervised"]["hyperparameters"] == hyperparameters
        assert job["anneal"]["training"]["batch_size"] == 4
        assert job["anneal"]["training"]["max_steps"] is None


def test_auto_becomes_numbers_once_the_trainer_has_resolved_it(client: TestClient) -> None:
    sent = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": 0.5}
    job_id = create(client, method={"type": "supervised", "supervised": {"hyperparameters": sent}}).json()["id"]
    resolved = {"batch_size": 8, "learning_rate_multiplier": 0.5, "n_epochs": 2.4, "learning_rate": 0.5 * 2e-4}
    with transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(resolved=resolved))
    job = client.get(f"{JOBS}/{job_id}").json()
    numbers = {"batch_size": 8, "learning_rate_multiplier": 0.5, "n_epochs": 3}
    assert job["hyperparameters"] == job["method"]["supervised"]["hyperparameters"] == numbers
    assert (job["anneal"]["training"]["learning_rate"], job["anneal"]["training"]["n_epochs"]) == (1e-4, 2.4)


def test_a_queued_job_is_cancelled_at_once_and_a_second_cancel_is_refused(client: TestClient) -> None:
    job = create(client).json()
    cancelled = client.post(f"{JOBS}/{job['id']}/cancel").json()
    assert cancelled["status"] == "cancelled" and cancelled["finished_at"] is not None
    again = client.post(f"{JOBS}/{job['id']}/cancel")
    assert again.status_code == 409
    assert again.headers["x-should-retry"] == "false"
    assert "already ended (cancelled)" in again.json()["error"]["message"]
    retried = client.post(f"{JOBS}/{job['id']}/cancel", headers={"x-stainless-retry-count": "1"})
    assert (retried.status_code, retried.json()["status"]) == (200, "cancelled")  # its first answer may have been lost


def test_jobs_are_listed_newest_first_and_filtered_by_metadata(client: TestClient) -> None:
    file = upload(client)["id"]
    ids = [create(client, training_file=file, metadata={"n": str(i % 2)}).json()["id"] for i in range(4)]
    assert [job["id"] for job in client.get(JOBS).json()["data"]] == ids[::-1]
    odd = client.get(JOBS, params={"metadata[n]": "1"}).json()["data"]
    assert [job["id"] for job in odd] == [ids[3], ids[1]]
    page = client.get(JOBS, params={"limit": 3}).json()
    rest = client.get(JOBS, params={"limit": 3, "after": page["last_id"]}).json()
    assert page["has_more"] and [job["id"] for job in rest["data"]] == [ids[0]]
    assert client.get(JOBS, params={"colour": "red"}).status_code == 400
    bare = create(client, training_file=file).json()["id"]
    assert [job["id"] for job in client.get(JOBS, params={"metadata": "null"}).json()["data"]] == [bare]


@pytest.mark.parametrize("text", ['quo"te', "Ünï", "dotted.key", "back\\slash", "'", "$", "[0]", "a%_b", ""])
def test_metadata_is_found_by_any_characters(text: str, client: TestClient) -> None:
    file = upload(client)["id"]
    ids = [create(client, training_file=file, metadata=pair).json()["id"] for pair in ({text: "1"}, {"key": text})]
    create(client, training_file=file, metadata={"key": "another", "other": "1"})
    for found, name, value in zip(ids, (text, "key"), ("1", text), strict=True):
        listed = client.get(JOBS, params={f"metadata[{name}]": value}).json()["data"]
        assert [job["id"] for job in listed] == [found]


def test_unknown_jobs_are_404_on_every_route(client: TestClient) -> None:
    for method, path in [
        ("GET", ""),
        ("POST", "/cancel"),
        ("POST", "/pause"),
        ("POST", "/resume"),
        ("GET", "/events"),
        ("GET", "/events?stream=true"),
        ("GET", "/checkpoints"),
        ("GET", "/metrics"),
    ]:
        answer = client.request(method, f"{JOBS}/ftjob-nope{path}")
        assert answer.status_code == 404, path
        assert "ftjob-nope" in answer.json()["error"]["message"]


def test_a_new_job_has_no_checkpoints_and_no_metrics(client: TestClient) -> None:
    job = create(client).json()["id"]
    assert client.get(f"{JOBS}/{job}/checkpoints").json()["data"] == []
    assert client.get(f"{JOBS}/{job}/metrics").json()["data"] == []
    assert client.get(f"{JOBS}/{job}/metrics", params={"format": "csv"}).text.strip() == "step"
