"""client.fine_tuning.jobs on jobs that wait: creation with every choice, and what is refused."""

import time
from typing import Any

import pytest
from openai import BadRequestError, ConflictError, NotFoundError, OpenAI
from openai.types.fine_tuning import FineTuningJob

from tests.sdk.behaviours.conftest import CreateJob, Upload
from tests.sdk.data import SMOLLM2, TINY, chat_rows, jsonl
from tests.sdk.runs import ours

AUTO = {"batch_size": "auto", "learning_rate_multiplier": "auto", "n_epochs": "auto"}


def test_a_job_with_nothing_but_a_model_and_a_file(client: OpenAI, training_file: Any) -> None:
    job = client.fine_tuning.jobs.create(model=TINY, training_file=training_file.id)
    assert type(job) is FineTuningJob
    assert (job.object, job.status, job.model, job.training_file) == (
        "fine_tuning.job",
        "queued",
        TINY,
        training_file.id,
    )
    assert job.id.startswith("ftjob-")
    assert abs(job.created_at - time.time()) < 10
    assert (job.fine_tuned_model, job.finished_at, job.error, job.validation_file) == (None, None, None, None)
    assert (job.trained_tokens, job.result_files, job.metadata, job.estimated_finish) == (None, [], None, None)
    assert job.hyperparameters.to_dict() == AUTO
    assert isinstance(job.seed, int)


def test_a_job_is_retrieved_as_it_was_created(client: OpenAI, create_job: CreateJob) -> None:
    job = create_job()
    found = client.fine_tuning.jobs.retrieve(job.id).to_dict()
    assert found | {"anneal": None} == job.to_dict() | {"anneal": None}


CHOSEN = {"batch_size": 4, "learning_rate_multiplier": 0.5, "n_epochs": 3}


@pytest.mark.parametrize(
    "choices",
    [
        {"method": {"type": "supervised", "supervised": {"hyperparameters": CHOSEN}}},
        {"hyperparameters": CHOSEN},
        {"hyperparameters": CHOSEN, "method": {"type": "supervised", "supervised": {"hyperparameters": CHOSEN}}},
    ],
    ids=["method", "deprecated", "both"],
)
def test_hyperparameters_are_taken_from(choices: dict[str, Any], create_job: CreateJob) -> None:
    job = create_job(**choices, extra_body={})
    assert job.hyperparameters.to_dict() == CHOSEN
    assert job.method is not None
    assert job.method.type == "supervised"
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.to_dict() == CHOSEN


@pytest.mark.parametrize("name", sorted(AUTO))
def test_auto_is_a_choice(name: str, create_job: CreateJob) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {name: "auto"}}}
    assert create_job(method=method).hyperparameters.to_dict() == AUTO


def test_a_method_without_hyperparameters(create_job: CreateJob) -> None:
    assert create_job(method={"type": "supervised"}).hyperparameters.to_dict() == AUTO


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1])
def test_a_seed_is_kept(seed: int, create_job: CreateJob) -> None:
    assert create_job(seed=seed).seed == seed


def test_metadata_is_kept(create_job: CreateJob, client: OpenAI) -> None:
    metadata = {"k" * 64: "v" * 512} | {f"key {number}": "Ünïcödé" for number in range(15)}
    job = create_job(metadata=metadata)
    assert client.fine_tuning.jobs.retrieve(job.id).metadata == metadata


def test_a_validation_file_is_kept(create_job: CreateJob, upload: Upload) -> None:
    file = upload()
    assert create_job(validation_file=file.id).validation_file == file.id


@pytest.mark.parametrize("name", [TINY, "tiny", SMOLLM2, SMOLLM2.partition("/")[2].lower()])
def test_a_base_model_is_taken_by_name_and_alias(name: str, create_job: CreateJob) -> None:
    assert create_job(model=name).model in (TINY, SMOLLM2)


def test_choices_of_ours_come_through_extra_body(create_job: CreateJob) -> None:
    job = create_job(extra_body={"training": {"max_steps": 17, "optimizer": "adamw"}})
    training = ours(job)["training"]
    assert (training["max_steps"], training["optimizer"]) == (17, "adamw")
    assert set(job.model_extra or {}) == {"anneal"}


def test_a_queued_job_knows_its_place(create_job: CreateJob, client: OpenAI) -> None:
    first, second = create_job(), create_job()
    places = [ours(client.fine_tuning.jobs.retrieve(job.id))["queue"]["position"] for job in (first, second)]
    assert places[1] > places[0] >= 1


def test_a_job_of_lower_priority_lets_others_pass(create_job: CreateJob, client: OpenAI) -> None:
    patient = create_job(extra_body={"training": {"priority": -1}})
    later = create_job()
    places = [ours(client.fine_tuning.jobs.retrieve(job.id))["queue"]["position"] for job in (later, patient)]
    assert places[0] < places[1]


WANDB = {"type": "wandb", "wandb": {"project": "anneal", "name": "run 1", "entity": "team", "tags": ["a", "b"]}}


@pytest.mark.parametrize("wandb", [WANDB, {"type": "wandb", "wandb": {"project": "p"}}], ids=["all", "project only"])
def test_wandb_is_accepted(wandb: Any, create_job: CreateJob, client: OpenAI) -> None:
    job = client.fine_tuning.jobs.retrieve(create_job(integrations=[wandb]).id)
    assert job.integrations is not None
    (shown,) = job.integrations
    assert (shown.type, shown.wandb.project) == ("wandb", wandb["wandb"]["project"])
    assert (shown.wandb.name, shown.wandb.tags or []) == (wandb["wandb"].get("name"), wandb["wandb"].get("tags", []))


def test_no_integrations_are_none(create_job: CreateJob) -> None:
    assert not create_job(integrations=[]).integrations
    assert not create_job(integrations=None).integrations


@pytest.mark.parametrize(
    ("choices", "param", "said"),
    [
        ({"model": "gpt-4o-mini"}, "model", "gpt-4o-mini"),
        ({"training_file": "file-nope"}, "training_file", "file-nope"),
        ({"validation_file": "file-nope"}, "validation_file", "file-nope"),
    ],
)
def test_what_a_job_names_must_exist(choices: Any, param: str, said: str, create_job: CreateJob) -> None:
    with pytest.raises(NotFoundError) as raised:
        create_job(**choices)
    assert raised.value.param == param
    assert said in raised.value.message


DPO = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}
GRADER = {"type": "string_check", "name": "g", "input": "a", "reference": "a", "operation": "eq"}
REINFORCEMENT = {"type": "reinforcement", "reinforcement": {"grader": GRADER}}


@pytest.mark.parametrize(
    ("choices", "param"),
    [
        ({"suffix": "x" * 65}, "suffix"),
        ({"suffix": "no spaces"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"metadata": {f"k{number}": "v" for number in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"method": DPO}, "method"),
        ({"method": REINFORCEMENT}, "method"),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}}, "method"),
        ({"hyperparameters": {"batch_size": 1.5}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": -1}}, "hyperparameters.learning_rate_multiplier"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
        ({"integrations": [{"type": "tensorboard"}]}, "integrations"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"),
        ({"extra_body": {"trainning": {}}}, "trainning"),
        ({"extra_body": {"training": {"learning_rat": 1}}}, "training.learning_rat"),
        ({"extra_body": {"training": {"method": "lora"}}}, "training.method"),
        ({"extra_body": {"training": {"load_in_4bit": True}}}, "training"),
    ],
)
def test_a_choice_that_can_not_be_kept_is_refused(choices: Any, param: str, create_job: CreateJob) -> None:
    with pytest.raises(BadRequestError) as raised:
        create_job(**choices)
    assert raised.value.type == "invalid_request_error"
    assert (raised.value.param or "").startswith(param)


def test_one_choice_sent_twice_must_agree(create_job: CreateJob) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}
    with pytest.raises(BadRequestError, match="differ"):
        create_job(hyperparameters={"n_epochs": 3}, method=method)
    with pytest.raises(BadRequestError, match="max_steps"):
        create_job(method=method, extra_body={"training": {"max_steps": 5}})


def test_a_file_of_another_purpose_can_not_be_trained_on(upload: Upload, create_job: CreateJob) -> None:
    file = upload(purpose="user_data")
    with pytest.raises(BadRequestError) as raised:
        create_job(training_file=file.id)
    assert raised.value.param == "training_file"


def test_a_job_may_be_created_before_its_file_is_checked(upload: Upload, create_job: CreateJob, client: OpenAI) -> None:
    file = upload(jsonl(chat_rows(10)) + b"\n" * 2**22)
    job = create_job(training_file=file.id)
    assert job.status in ("validating_files", "queued")
    client.files.wait_for_processing(file.id, poll_interval=0.2)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"


def test_a_job_whose_file_turns_out_bad_fails_with_the_reason(
    upload: Upload, create_job: CreateJob, client: OpenAI
) -> None:
    file = upload(jsonl(chat_rows(10)) + b"\n" * 2**22 + b"not json\n")
    job = create_job(training_file=file.id)
    client.files.wait_for_processing(file.id, poll_interval=0.2)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert file.id in job.error.message
    assert job.finished_at is not None


def test_a_queued_job_is_cancelled_at_once(create_job: CreateJob, client: OpenAI) -> None:
    job = create_job()
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert (cancelled.id, cancelled.status) == (job.id, "cancelled")
    assert cancelled.finished_at is not None
    assert cancelled.error is None


def test_a_cancelled_job_can_not_be_cancelled_paused_or_resumed(create_job: CreateJob, client: OpenAI) -> None:
    jobs, job = client.fine_tuning.jobs, create_job()
    jobs.cancel(job.id)
    for act in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(ConflictError, match="cancelled"):
            act(job.id)


def test_a_queued_job_is_paused_and_resumed(create_job: CreateJob, client: OpenAI) -> None:
    jobs, job = client.fine_tuning.jobs, create_job()
    assert jobs.pause(job.id).status == "paused"
    assert jobs.retrieve(job.id).status == "paused"
    assert jobs.pause(job.id).status == "paused"
    resumed = jobs.resume(job.id)
    assert (resumed.status, resumed.created_at) == ("queued", job.created_at)


def test_a_paused_job_is_cancelled(create_job: CreateJob, client: OpenAI) -> None:
    jobs, job = client.fine_tuning.jobs, create_job()
    jobs.pause(job.id)
    assert jobs.cancel(job.id).status == "cancelled"


@pytest.mark.parametrize("act", ["retrieve", "cancel", "pause", "resume", "list_events"])
def test_a_job_that_is_not_there_is_not_found(act: str, client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="ftjob-nope"):
        getattr(client.fine_tuning.jobs, act)("ftjob-nope")


def test_checkpoints_of_a_job_that_is_not_there_are_not_found(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="ftjob-nope"):
        client.fine_tuning.jobs.checkpoints.list("ftjob-nope")
