"""The suite's own judge: each way an answer can be wrong is found, and told with its place."""

from typing import Any

import pytest
from openai.types import FileObject, Upload
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from tests.sdk.strict import ErrorBody, ListPage, WholeList, problems

FILE = {
    "id": "file-1",
    "object": "file",
    "bytes": 3,
    "created_at": 1,
    "filename": "a.jsonl",
    "purpose": "fine-tune",
    "status": "processed",
}
JOB = {
    "id": "ftjob-1",
    "object": "fine_tuning.job",
    "created_at": 1,
    "hyperparameters": {"batch_size": "auto", "learning_rate_multiplier": 0.5, "n_epochs": 3},
    "model": "a/b",
    "organization_id": "default",
    "result_files": ["file-2"],
    "seed": 0,
    "status": "queued",
    "training_file": "file-1",
    "error": None,
    "metadata": {"k": "v"},
    "integrations": [{"type": "wandb", "wandb": {"project": "p", "tags": ["t"]}}],
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "auto"}}},
}


def without(answer: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != key}


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        (FileObject, FILE),
        (FileObject, FILE | {"expires_at": None, "anneal": {"anything": [1]}}),
        (FileObject, FILE | {"purpose": "evals"}),
        (FineTuningJob, JOB),
        (FineTuningJob, JOB | {"status": "paused"}),
        (FineTuningJob, JOB | {"error": {"code": "c", "message": "m", "param": None}}),
        (ListPage[FileObject], {"object": "list", "data": [FILE], "has_more": False, "first_id": "file-1"}),
        (ErrorBody, {"error": {"message": "m", "type": "t", "param": None, "code": "c"}}),
    ],
)
def test_a_right_answer_has_no_problems(expected: Any, answer: Any) -> None:
    assert problems(expected, answer) == []


@pytest.mark.parametrize("field", sorted(FILE))
def test_every_missing_field_is_found(field: str) -> None:
    assert problems(FileObject, without(FILE, field)) == [f"$.{field}: is missing"]


@pytest.mark.parametrize(
    ("expected", "answer", "place", "said"),
    [
        (FileObject, FILE | {"sha256": "x"}, "$.sha256", "is not in FileObject"),
        (FileObject, FILE | {"status": "pending"}, "$.status", "none of"),
        (FileObject, FILE | {"purpose": "paused"}, "$.purpose", "none of"),
        (FileObject, FILE | {"bytes": 3.0}, "$.bytes", "is float, not int"),
        (FileObject, FILE | {"bytes": True}, "$.bytes", "is bool, not int"),
        (FileObject, FILE | {"bytes": "3"}, "$.bytes", "is str, not int"),
        (FileObject, FILE | {"filename": None}, "$.filename", "is NoneType, not str"),
        (FileObject, FILE | {"expires_at": 1.5}, "$.expires_at", "is float"),
        (FileObject, [FILE], "$", "is list, not FileObject"),
        (FineTuningJob, JOB | {"status": "pausing"}, "$.status", "none of"),
        (FineTuningJob, JOB | {"result_files": None}, "$.result_files", "not a list"),
        (FineTuningJob, JOB | {"result_files": [1]}, "$.result_files[0]", "is int, not str"),
        (FineTuningJob, JOB | {"metadata": {"k": 1}}, "$.metadata.k", "is int, not str"),
        (FineTuningJob, JOB | {"hyperparameters": {"n_epochs": 1.5}}, "$.hyperparameters.n_epochs", "1.5"),
        (FineTuningJob, JOB | {"hyperparameters": {"n_epochs": "all"}}, "$.hyperparameters.n_epochs", "'all'"),
        (FineTuningJob, JOB | {"method": {"type": "sft"}}, "$.method.type", "none of"),
        (FineTuningJob, JOB | {"error": {"code": "c"}}, "$.error.message", "is missing"),
        (FineTuningJob, JOB | {"integrations": [{"type": "wandb"}]}, "$.integrations[0].wandb", "is missing"),
        (Upload, FILE | {"object": "upload", "expires_at": 2, "status": "processed"}, "$.status", "none of"),
        (FineTuningJobEvent, {"id": "e", "created_at": 1, "level": "warning", "message": "m"}, "$.level", "none of"),
        (FineTuningJobCheckpoint, {"metrics": {"loss": 1}}, "$.metrics.loss", "is not in Metrics"),
        (ListPage[FileObject], {"object": "list", "data": [FILE]}, "$.has_more", "is missing"),
        (ListPage[FileObject], {"object": "list", "data": [{}], "has_more": True}, "$.data[0].id", "is missing"),
        (WholeList[FileObject], {"object": "list", "data": [FILE], "has_more": False}, "$.has_more", "is not in"),
        (ErrorBody, {"error": {"message": "m", "type": "t", "code": "c"}}, "$.error.param", "is missing"),
        (ErrorBody, {"detail": "no"}, "$.detail", "is not in ErrorBody"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(expected: Any, answer: Any, place: str, said: str) -> None:
    assert any(problem.startswith(place) and said in problem for problem in problems(expected, answer))


def test_a_type_it_does_not_know_is_never_passed_over() -> None:
    with pytest.raises(TypeError, match="nobody taught"):
        problems(bytes, "x")
