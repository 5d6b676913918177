"""LiteLLM's calls for files and fine-tuning, pointed at the service as its users do it."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from openai import AuthenticationError, BadRequestError, NotFoundError
from openai.types.fine_tuning import FineTuningJob

from tests.integration.test_up import KEY
from tests.sdk.behaviours.conftest import CreateJob
from tests.sdk.data import TINY, chat_rows, jsonl
from tests.sdk.runs import Runs
from tests.sdk.wire import Wire

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it fetches a price list when it is imported

import litellm

CONTENT = jsonl(chat_rows(3))


@pytest.fixture
def there(wire: Wire) -> Iterator[dict[str, Any]]:
    """How LiteLLM is told where to go."""
    return {"custom_llm_provider": "openai", "api_base": wire.url, "api_key": KEY}


@pytest.fixture
def file(there: dict[str, Any]) -> Any:
    return litellm.create_file(file=("rows.jsonl", CONTENT), purpose="fine-tune", **there)


@pytest.fixture
def job(there: dict[str, Any], file: Any) -> Any:
    return litellm.create_fine_tuning_job(model=TINY, training_file=file.id, **there)


def test_a_file_is_created(file: Any) -> None:
    assert (file.object, file.purpose, file.status, file.bytes) == ("file", "fine-tune", "processed", len(CONTENT))


def test_a_file_is_created_with_an_expiry(there: dict[str, Any]) -> None:
    expires_after = {"anchor": "created_at", "seconds": 3600}
    file = litellm.create_file(file=("b", CONTENT), purpose="batch", expires_after=expires_after, **there)
    assert file.expires_at == file.created_at + 3600


def test_a_file_is_retrieved(file: Any, there: dict[str, Any]) -> None:
    found = litellm.file_retrieve(file_id=file.id, **there)
    assert (found.id, found.bytes) == (file.id, file.bytes)


def test_files_are_listed(file: Any, there: dict[str, Any]) -> None:
    assert file.id in [one.id for one in litellm.file_list(**there).data]
    assert file.id not in [one.id for one in litellm.file_list(purpose="batch", **there).data]


def test_content_is_read(file: Any, there: dict[str, Any]) -> None:
    assert litellm.file_content(file_id=file.id, **there).content == CONTENT


def test_a_file_is_deleted(file: Any, there: dict[str, Any]) -> None:
    assert litellm.file_delete(file_id=file.id, **there).deleted
    with pytest.raises(NotFoundError):
        litellm.file_retrieve(file_id=file.id, **there)


def test_a_job_is_created(job: Any, file: Any) -> None:
    assert isinstance(job, FineTuningJob)
    assert (job.object, job.status, job.model, job.training_file) == ("fine_tuning.job", "queued", TINY, file.id)


def test_a_job_is_created_with_every_choice(file: Any, there: dict[str, Any]) -> None:
    job = litellm.create_fine_tuning_job(
        model=f"openai/{TINY}",
        training_file=file.id,
        validation_file=file.id,
        hyperparameters={"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5},
        suffix="litellm",
        seed=3,
        **there,
    )
    assert job.hyperparameters.to_dict() == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    assert (job.validation_file, job.seed) == (file.id, 3)


def test_a_job_is_retrieved(job: Any, there: dict[str, Any]) -> None:
    found = litellm.retrieve_fine_tuning_job(fine_tuning_job_id=job.id, **there)
    assert (found.id, found.status) == (job.id, "queued")


def test_a_finished_job_is_retrieved(runs: Runs, there: dict[str, Any]) -> None:
    finished = runs.finished.result(600)
    found = litellm.retrieve_fine_tuning_job(fine_tuning_job_id=finished.id, **there)
    assert (found.status, found.fine_tuned_model) == ("succeeded", finished.fine_tuned_model)
    assert (found.trained_tokens, found.result_files) == (finished.trained_tokens, finished.result_files)


def test_a_failed_job_is_retrieved(runs: Runs, there: dict[str, Any]) -> None:
    failed = runs.broken.result(600)
    found = litellm.retrieve_fine_tuning_job(fine_tuning_job_id=failed.id, **there)
    assert found.error is not None
    assert (found.status, found.error.code) == ("failed", "invalid_training_file")


def test_jobs_are_listed(job: Any, create_job: CreateJob, there: dict[str, Any]) -> None:
    newest = create_job()
    assert [one.id for one in litellm.list_fine_tuning_jobs(limit=2, **there).data] == [newest.id, job.id]
    assert [one.id for one in litellm.list_fine_tuning_jobs(limit=1, after=newest.id, **there).data] == [job.id]


def test_a_job_is_cancelled(job: Any, there: dict[str, Any]) -> None:
    assert litellm.cancel_fine_tuning_job(fine_tuning_job_id=job.id, **there).status == "cancelled"


@pytest.mark.parametrize(
    ("choices", "expected", "said"),
    [
        ({"model": "nope"}, NotFoundError, "nope"),
        ({"training_file": "file-nope"}, NotFoundError, "file-nope"),
        ({"suffix": "no spaces"}, BadRequestError, "suffix"),
        ({"api_key": "wrong"}, AuthenticationError, "API key"),
    ],
)
def test_a_failure_has_its_exception(
    choices: dict[str, Any], expected: type[Exception], said: str, file: Any, there: dict[str, Any]
) -> None:
    with pytest.raises(expected, match=said):
        litellm.create_fine_tuning_job(**{"model": TINY, "training_file": file.id} | there | choices)


def test_a_lost_answer_creates_one_job(file: Any, there: dict[str, Any], wire: Wire) -> None:
    wire.lose_answer("POST", "/v1/fine_tuning/jobs")
    job = litellm.create_fine_tuning_job(model=TINY, training_file=file.id, max_retries=2, **there)
    listed = litellm.list_fine_tuning_jobs(limit=2, **there).data
    assert listed[0].id == job.id
    assert listed[1].training_file != file.id
