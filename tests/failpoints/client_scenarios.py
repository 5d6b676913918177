"""What clients ask for, through the API's own application."""

from collections.abc import Callable
from typing import Any

from fastapi.testclient import TestClient

from api.app import create_app
from shared.models import FileStatus
from tests.failpoints import toy
from tests.failpoints.scenario import LARGE, Facts, Scenario, facts_of
from tests.failpoints.world import BASE, World


def request(
    world: World, what: str, method: str, url: str, key: str | None = None, retries: int = 0, **body: Any
) -> None:
    """One request as OpenAI's SDK makes it; the answer is noted as soon as it is there, and the API shut down after it.

    Args:
        key: sent as the Idempotency-Key.
        retries: how often the client has tried before.
    """
    headers = {"x-stainless-retry-count": str(retries)} | ({} if key is None else {"idempotency-key": key})
    with TestClient(create_app(world.settings), base_url="http://localhost", raise_server_exceptions=False) as client:
        answer = client.request(method, url, headers=headers, **body)
        world.note(what=what, status=answer.status_code, body=answer.json(), key=key)


def until_answered(act: Callable[[World, Facts], None]) -> Callable[[World, Facts], None]:
    """What a client does again: the same, unless it was answered 200."""

    def again(world: World, facts: Facts) -> None:
        if not any(entry["status"] == 200 for entry in world.journal()):
            act(world, facts | {"retries": 1})

    return again


def upload(world: World, content: bytes, what: str = "upload") -> None:
    request(world, what, "POST", "/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"})


def uploading(name: str, content: bytes) -> Scenario:
    def act(world: World, facts: Facts) -> None:
        upload(world, content)

    def again(world: World, facts: Facts) -> None:
        if not any(entry["status"] == facts["status"] for entry in world.journal()):
            upload(world, content)

    status = 400 if b"no completion" in content else 200
    return Scenario(name, lambda world: {"status": status}, act, again)


def _create_job(world: World, facts: Facts) -> None:
    body = {"model": BASE, "training_file": facts["file"], "training": {"keep_checkpoints": 1}}
    request(world, "submit", "POST", "/v1/fine_tuning/jobs", retries=facts.get("retries", 0), json=body)


def submitting(name: str, status: FileStatus) -> Scenario:
    def prepare(world: World) -> Facts:
        return {"file": world.add_file(toy.rows(steps=2) + LARGE, status), "status": 200}

    return Scenario(name, prepare, _create_job, until_answered(_create_job))


def _prepare_file_alone(world: World) -> Facts:
    return {"file": world.add_file(toy.rows()), "status": 200, "status_again": 404, "deletes": True}


def _delete_file(world: World, facts: Facts) -> None:
    request(world, "delete", "DELETE", f"/v1/files/{facts['file']}")


def _prepare_waiting(world: World) -> Facts:
    return facts_of(world, world.add_job({"steps": 2}), ends=["cancelled"]) | {"status": 200, "status_again": 409}


def _cancel_by_request(world: World, facts: Facts) -> None:
    request(world, "cancel", "POST", f"/v1/fine_tuning/jobs/{facts['job']}/cancel")


CLIENT_SCENARIOS = (
    uploading("upload", toy.rows()),
    uploading("upload-large", toy.rows() + LARGE),
    uploading("upload-refused", toy.rows() + b'{"prompt": "no completion"}\n'),
    Scenario("delete-file", _prepare_file_alone, _delete_file, until_answered(_delete_file)),
    submitting("submit", FileStatus.PROCESSED),
    submitting("submit-unchecked", FileStatus.UPLOADED),
    Scenario("cancel-waiting", _prepare_waiting, _cancel_by_request, until_answered(_cancel_by_request)),
)
