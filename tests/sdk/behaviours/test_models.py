"""client.models: base models, tuned models and checkpoints, by names that hold slashes and colons."""

import pytest
from openai import APIStatusError, ConflictError, NotFoundError, OpenAI
from openai.types import Model, ModelDeleted
from openai.types.fine_tuning import FineTuningJob

from tests.sdk.behaviours.conftest import CreateJob
from tests.sdk.data import SMOLLM2, TINY
from tests.sdk.runs import Runs, ours

LIMIT_S = 600


@pytest.fixture(scope="module")
def tuned(runs: Runs) -> str:
    name = runs.finished.result(LIMIT_S).fine_tuned_model
    assert name is not None
    return name


def test_base_models_are_listed(client: OpenAI) -> None:
    models = list(client.models.list())
    assert {TINY, SMOLLM2} <= {model.id for model in models}
    assert all(type(model) is Model for model in models)
    assert [model.id for model in client.models.list()] == [model.id for model in models]


def test_tuned_models_and_checkpoints_are_listed(client: OpenAI, tuned: str) -> None:
    listed = {model.id: ours(model)["kind"] for model in client.models.list()}
    assert listed[tuned] == "tuned"
    assert {name: kind for name, kind in listed.items() if name.startswith(f"{tuned}:")} == {
        f"{tuned}:ckpt-step-{step}": "checkpoint" for step in (2, 4, 6)
    }


@pytest.mark.parametrize("name", [TINY, SMOLLM2])
def test_a_base_model_is_retrieved_by_a_name_with_a_slash(name: str, client: OpenAI) -> None:
    model = client.models.retrieve(name)
    assert (type(model), model.id, model.owned_by) == (Model, name, name.split("/")[0])


@pytest.mark.parametrize("ending", ["", ":ckpt-step-2", ":ckpt-step-6"])
def test_a_tuned_model_is_retrieved_by_a_name_with_colons(ending: str, client: OpenAI, tuned: str, runs: Runs) -> None:
    model = client.models.retrieve(tuned + ending)
    assert model.id == tuned + ending
    assert ours(model)["fine_tuning_job_id"] == runs.ids["finished"]
    assert ours(model)["base_model"] == TINY


@pytest.mark.parametrize("name", ["nope", "no/pe", "ft:tiny:default::nope", "a/b/c", "naïve model", "x?y#z"])
def test_a_model_that_is_not_there_is_not_found(name: str, client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as raised:
        client.models.retrieve(name)
    assert raised.value.code == "model_not_found"
    assert name in raised.value.message


@pytest.mark.parametrize("name", [TINY, SMOLLM2])
def test_a_base_model_can_not_be_deleted(name: str, client: OpenAI) -> None:
    with pytest.raises(APIStatusError) as raised:
        client.models.delete(name)
    assert raised.value.status_code in (400, 403)
    assert client.models.retrieve(name).id == name


def test_deleting_a_model_that_is_not_there_is_not_found(client: OpenAI) -> None:
    with pytest.raises(NotFoundError):
        client.models.delete("ft:tiny:default::nope")


@pytest.mark.parametrize("ending", ["", ":ckpt-step-4"])
def test_a_tuned_model_is_a_base_to_go_on_from(ending: str, create_job: CreateJob, tuned: str, client: OpenAI) -> None:
    job = create_job(model=tuned + ending)
    assert (job.status, job.model) == ("queued", tuned + ending)
    client.fine_tuning.jobs.cancel(job.id)


def test_a_model_that_a_job_starts_from_stays(create_job: CreateJob, tuned: str, client: OpenAI) -> None:
    job = create_job(model=f"{tuned}:ckpt-step-4")
    with pytest.raises(ConflictError, match=job.id) as raised:
        client.models.delete(f"{tuned}:ckpt-step-4")
    assert raised.value.response.headers["x-should-retry"] == "false"
    client.fine_tuning.jobs.cancel(job.id)


@pytest.fixture(scope="module")
def disposable(runs: Runs) -> FineTuningJob:
    """A finished job whose models nobody else here asks for."""
    return runs.paused.result(LIMIT_S).ended


def test_a_deleted_checkpoint_is_gone_alone(client: OpenAI, disposable: FineTuningJob) -> None:
    checkpoints = client.fine_tuning.jobs.checkpoints.list(disposable.id).data
    oldest = checkpoints[-1]
    assert len(checkpoints) > 1
    deleted = client.models.delete(oldest.fine_tuned_model_checkpoint)
    assert (type(deleted), deleted.deleted) == (ModelDeleted, True)
    assert deleted.id == oldest.fine_tuned_model_checkpoint
    assert [one.id for one in client.fine_tuning.jobs.checkpoints.list(disposable.id)] == [
        one.id for one in checkpoints[:-1]
    ]
    assert client.models.retrieve(disposable.fine_tuned_model or "").id == disposable.fine_tuned_model


def test_a_deleted_model_is_gone(client: OpenAI, disposable: FineTuningJob, create_job: CreateJob) -> None:
    name = disposable.fine_tuned_model
    assert name is not None
    assert client.models.delete(name).to_dict() == {"id": name, "object": "model", "deleted": True}
    for act in (client.models.retrieve, client.models.delete):
        with pytest.raises(NotFoundError):
            act(name)
    assert name not in [model.id for model in client.models.list()]
    with pytest.raises(NotFoundError) as raised:
        create_job(model=name)
    assert raised.value.param == "model"
    assert client.fine_tuning.jobs.retrieve(disposable.id).fine_tuned_model == name
