"""POSTs with an Idempotency-Key that clients send again whatever they were answered: each takes effect once."""

from typing import Any

from shared.models import FileStatus
from tests.failpoints import toy
from tests.failpoints.client_scenarios import request
from tests.failpoints.scenario import Facts, Scenario
from tests.failpoints.world import BASE, World

KEY = "a-key-of-the-client"


def _prepare_file(world: World) -> Facts:
    return {"file": world.add_file(toy.rows(steps=2), FileStatus.PROCESSED), "status": 200, "once": "submit"}


def _create_job(world: World, facts: Facts) -> None:
    body = {"model": BASE, "training_file": facts["file"], "training": {"keep_checkpoints": 1}}
    request(world, "submit", "POST", "/v1/fine_tuning/jobs", KEY, json=body)


def _upload(world: World, facts: Facts) -> None:
    form: dict[str, Any] = {"files": {"file": ("a.jsonl", toy.rows())}, "data": {"purpose": "fine-tune"}}
    request(world, "upload", "POST", "/v1/files", KEY, **form)


def _begin_upload(world: World, facts: Facts) -> None:
    body = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 100, "mime_type": "application/jsonl"}
    request(world, "begin", "POST", "/v1/uploads", KEY, json=body)


ONCE_SCENARIOS = (
    Scenario("submit-with-key", _prepare_file, _create_job, _create_job),
    Scenario("upload-with-key", lambda world: {"status": 200, "once": "upload"}, _upload, _upload),
    Scenario("begin-with-key", lambda world: {"status": 200, "once": "begin"}, _begin_upload, _begin_upload),
)
