"""What a finished job leaves: numbers, checkpoints, the result file, events, a model."""

import csv
import io
import re
import time

import pytest
from openai import BadRequestError, OpenAI
from openai.types.fine_tuning import FineTuningJob
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from tests.integration.test_up import Up
from tests.sdk.data import SHORT, SMOLLM2, TINY, chat_rows
from tests.sdk.runs import EPOCHS, FINISHED_STEPS, TRAIN_ROWS, Runs, ours

LIMIT_S = 600
COLUMNS = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]


@pytest.fixture(scope="module")
def job(runs: Runs) -> FineTuningJob:
    return runs.finished.result(LIMIT_S)


@pytest.fixture(scope="module")
def checkpoints(client: OpenAI, job: FineTuningJob) -> list[FineTuningJobCheckpoint]:
    """Newest first."""
    return client.fine_tuning.jobs.checkpoints.list(job.id).data


@pytest.fixture(scope="module")
def curve(client: OpenAI, job: FineTuningJob) -> list[dict[str, str]]:
    """Rows of the result file."""
    (file_id,) = job.result_files
    return list(csv.DictReader(io.StringIO(client.files.content(file_id).text)))


def test_it_succeeded(job: FineTuningJob) -> None:
    assert (job.status, job.error) == ("succeeded", None)
    assert job.finished_at is not None
    assert job.created_at <= job.finished_at <= time.time() + 1
    assert job.estimated_finish is None


def test_what_was_asked_is_still_shown(job: FineTuningJob, runs: Runs) -> None:
    assert (job.seed, job.metadata, job.model) == (42, {"suite": "finished"}, TINY)
    assert (job.training_file, job.validation_file) == (runs.training_file, runs.validation_file)


def test_auto_has_become_numbers(job: FineTuningJob) -> None:
    shown = job.hyperparameters
    assert (shown.batch_size, shown.n_epochs) == (SHORT["batch_size"], EPOCHS)
    assert isinstance(shown.learning_rate_multiplier, float)
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.to_dict() == shown.to_dict()


def test_its_model_is_named_after_base_suffix_and_job(job: FineTuningJob) -> None:
    short = job.id.removeprefix("ftjob-")[:8]
    assert job.fine_tuned_model == f"ft:tiny:{job.organization_id}:done:{short}"


def test_trained_tokens_are_those_of_every_row_in_every_epoch(job: FineTuningJob, service: Up) -> None:
    from jinja2 import Template
    from tokenizers import Tokenizer

    from tests.training.tiny_llama import SMOLLM2_TEMPLATE

    tokenizer = Tokenizer.from_file(str(service.data.parent / "models" / TINY / "tokenizer.json"))
    texts = [Template(SMOLLM2_TEMPLATE).render(messages=row["messages"]) for row in chat_rows(TRAIN_ROWS)]
    lengths = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    assert max(lengths) < SHORT["max_seq_length"]
    # The line break after the last answer's end is nobody's: it is not trained on.
    assert job.trained_tokens == EPOCHS * sum(length - 1 for length in lengths)


def test_three_checkpoints_are_listed_newest_first(checkpoints: list[FineTuningJobCheckpoint]) -> None:
    assert [checkpoint.step_number for checkpoint in checkpoints] == [6, 4, 2]
    assert all(type(checkpoint) is FineTuningJobCheckpoint for checkpoint in checkpoints)


def test_a_checkpoint_belongs_to_its_job(checkpoints: list[FineTuningJobCheckpoint], job: FineTuningJob) -> None:
    assert {checkpoint.fine_tuning_job_id for checkpoint in checkpoints} == {job.id}
    assert all(checkpoint.id.startswith("ftckpt-") for checkpoint in checkpoints)
    assert job.finished_at is not None
    assert all(job.created_at <= checkpoint.created_at <= job.finished_at for checkpoint in checkpoints)


def test_a_checkpoint_is_a_model(checkpoints: list[FineTuningJobCheckpoint], job: FineTuningJob) -> None:
    names = [checkpoint.fine_tuned_model_checkpoint for checkpoint in checkpoints]
    assert names == [f"{job.fine_tuned_model}:ckpt-step-{step}" for step in (6, 4, 2)]


@pytest.mark.parametrize(
    "metric",
    [
        "train_loss",
        "train_mean_token_accuracy",
        "valid_loss",
        "valid_mean_token_accuracy",
        "full_valid_loss",
        "full_valid_mean_token_accuracy",
    ],
)
def test_a_checkpoint_has_its_metrics(metric: str, checkpoints: list[FineTuningJobCheckpoint]) -> None:
    for checkpoint in checkpoints:
        assert checkpoint.metrics.step == checkpoint.step_number
        value = getattr(checkpoint.metrics, metric)
        assert value is not None
        assert 0 <= value <= (1 if "accuracy" in metric else 10)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_pages_of_checkpoints_hold_each_once(
    limit: int, client: OpenAI, job: FineTuningJob, checkpoints: list[FineTuningJobCheckpoint]
) -> None:
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=limit)) == checkpoints


def test_checkpoints_after_one_are_older(
    client: OpenAI, job: FineTuningJob, checkpoints: list[FineTuningJobCheckpoint]
) -> None:
    assert client.fine_tuning.jobs.checkpoints.list(job.id, after=checkpoints[0].id).data == checkpoints[1:]


def test_after_must_be_a_checkpoint_of_the_job(client: OpenAI, job: FineTuningJob) -> None:
    with pytest.raises(BadRequestError) as raised:
        client.fine_tuning.jobs.checkpoints.list(job.id, after="ftckpt-nope")
    assert raised.value.param == "after"


def test_the_result_file_is_a_file_of_results(client: OpenAI, job: FineTuningJob) -> None:
    (file_id,) = job.result_files
    file = client.files.retrieve(file_id)
    assert (file.purpose, file.status) == ("fine-tune-results", "processed")
    assert file.filename.endswith(".csv")
    assert len(client.files.content(file_id).content) == file.bytes
    assert file in list(client.files.list(purpose="fine-tune-results"))


def test_the_result_file_has_openais_columns(client: OpenAI, job: FineTuningJob) -> None:
    (file_id,) = job.result_files
    assert client.files.content(file_id).text.splitlines()[0].split(",") == COLUMNS


def test_the_result_file_has_a_row_a_step(curve: list[dict[str, str]]) -> None:
    assert [int(row["step"]) for row in curve] == list(range(1, FINISHED_STEPS + 1))
    assert all(0 < float(row["train_loss"]) < 10 for row in curve)
    assert all(0 <= float(row["train_accuracy"]) <= 1 for row in curve)


def test_the_result_file_has_the_validation_where_there_was_one(
    curve: list[dict[str, str]], checkpoints: list[FineTuningJobCheckpoint]
) -> None:
    valid = {int(row["step"]): float(row["valid_loss"]) for row in curve if row["valid_loss"]}
    assert valid == pytest.approx({one.step_number: one.metrics.full_valid_loss for one in checkpoints})


def test_the_training_loss_fell(curve: list[dict[str, str]]) -> None:
    assert float(curve[-1]["train_loss"]) < float(curve[0]["train_loss"])


def test_every_step_is_an_event_of_metrics(client: OpenAI, job: FineTuningJob) -> None:
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
    metrics = [event for event in events if event.type == "metrics"]
    steps = [event.data["step"] for event in metrics if "train_loss" in event.data]  # type: ignore[index, operator]
    assert sorted(set(steps)) == list(range(1, FINISHED_STEPS + 1))
    assert all(re.match(r"Step \d+/\d+: ", event.message) for event in metrics if "train_loss" in event.data)  # type: ignore[operator]


def test_events_tell_how_it_ended(client: OpenAI, job: FineTuningJob) -> None:
    newest, before = client.fine_tuning.jobs.list_events(job.id, limit=2).data
    assert newest.message == "The job has successfully completed"
    assert before.message == f"New fine-tuned model created: {job.fine_tuned_model}"


def test_it_went_through_openais_states_in_order(runs: Runs) -> None:
    seen = [job.status for job in runs.seen_running.result(LIMIT_S)]
    assert list(dict.fromkeys(seen)) in (["queued", "running", "succeeded"], ["running", "succeeded"])


def test_while_it_runs_an_end_is_estimated(runs: Runs) -> None:
    running = [job for job in runs.seen_running.result(LIMIT_S) if job.estimated_finish is not None]
    finished_at = runs.finished.result(LIMIT_S).finished_at
    assert running
    assert finished_at is not None
    assert {job.status for job in running} == {"running"}
    assert abs((running[-1].estimated_finish or 0) - finished_at) < 20


def test_before_it_ends_it_has_no_model_and_no_results(runs: Runs) -> None:
    for job in runs.seen_running.result(LIMIT_S)[:-1]:
        assert (job.fine_tuned_model, job.finished_at, job.result_files) == (None, None, [])


def test_a_real_model_is_trained(runs: Runs, client: OpenAI) -> None:
    job = runs.real.result(LIMIT_S)
    assert (job.status, job.error) == ("succeeded", None)
    assert (job.fine_tuned_model or "").startswith("ft:smollm2-135m-instruct:default:real:")
    assert job.model == SMOLLM2
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data[0].step_number == 2


def test_without_a_validation_file_there_is_no_validation(runs: Runs, client: OpenAI) -> None:
    job = runs.real.result(LIMIT_S)
    (newest, *_) = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert newest.metrics.valid_loss is newest.metrics.full_valid_loss is None
    assert newest.metrics.train_loss is not None


def test_a_failed_job_says_why(runs: Runs, client: OpenAI) -> None:
    job = runs.broken.result(LIMIT_S)
    assert (job.status, job.fine_tuned_model, job.result_files) == ("failed", None, [])
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training.max_seq_length")
    assert f"{SHORT['max_seq_length']} tokens" in job.error.message
    newest = client.fine_tuning.jobs.list_events(job.id, limit=1).data[0]
    assert newest.level == "error"
    assert job.error.message in newest.message


def test_the_whole_curve_is_ours(client: OpenAI, job: FineTuningJob) -> None:
    curve = client.get(f"/fine_tuning/jobs/{job.id}/metrics", cast_to=dict[str, object])
    assert [row["step"] for row in curve["data"]] == list(range(1, FINISHED_STEPS + 1))  # type: ignore[attr-defined]
    assert ours(job)["total_steps"] == FINISHED_STEPS
