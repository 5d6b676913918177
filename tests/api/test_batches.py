"""/v1/batches: what is asked for is stored and shown in OpenAI's shape; what comes of it is the runner's."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from shared.db import transaction
from shared.ids import new_id
from shared.models import Batch, BatchStatus
from tests.batch_rows import CHAT, chat_line
from tests.conftest import jsonl, upload

BATCHES = "/v1/batches"
KEYS = {
    *("id", "object", "endpoint", "model", "errors", "input_file_id", "completion_window", "status"),
    *("output_file_id", "error_file_id", "created_at", "in_progress_at", "expires_at", "finalizing_at"),
    *("completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at"),
    *("request_counts", "usage", "metadata"),
}


@pytest.fixture
def file_id(client: TestClient) -> str:
    return str(upload(client, jsonl([chat_line("hi")]), purpose="batch")["id"])


def body(file_id: str, **changes: Any) -> dict[str, Any]:
    return {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **changes}


def create(client: TestClient, file_id: str, headers: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
    answer = client.post(BATCHES, json=body(file_id, **changes), headers=headers)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_batch_is_shown_as_openai_shows_it(client: TestClient, file_id: str) -> None:
    batch = create(client, file_id, metadata={"team": "support"})
    assert set(batch) == KEYS
    assert (batch["status"], batch["input_file_id"], batch["endpoint"]) == ("validating", file_id, CHAT)
    assert batch["expires_at"] == batch["created_at"] + 24 * 3600
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert batch["usage"]["total_tokens"] == 0 and batch["metadata"] == {"team": "support"}
    assert client.get(f"{BATCHES}/{batch['id']}").json() == batch


def test_the_list_is_paged_newest_first(client: TestClient, file_id: str) -> None:
    ids = [create(client, file_id)["id"] for _ in range(3)]
    with transaction() as session:
        for number, batch_id in enumerate(ids):
            session.execute(update(Batch).where(Batch.id == batch_id).values(created_at=number))
    first = client.get(BATCHES, params={"limit": 2}).json()
    assert ([batch["id"] for batch in first["data"]], first["has_more"]) == (ids[:0:-1], True)
    rest = client.get(BATCHES, params={"limit": 2, "after": first["last_id"]}).json()
    assert ([batch["id"] for batch in rest["data"]], rest["has_more"]) == (ids[:1], False)
    assert client.get(BATCHES, params={"limit": 101}).status_code == 400


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
        ({"endpoints": CHAT}, "endpoints"),
        ({"input_file_id": None}, "input_file_id"),
    ],
)
def test_what_is_no_batch_is_refused_with_the_field(
    changes: dict[str, Any], param: str, client: TestClient, file_id: str
) -> None:
    answer = client.post(BATCHES, json=body(file_id, **changes))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_file_must_be_there_and_for_batches(client: TestClient) -> None:
    answer = client.post(BATCHES, json=body("file-nobodys"))
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "input_file_id")
    answer = client.post(BATCHES, json=body(upload(client)["id"]))
    assert answer.status_code == 400 and "must be 'batch'" in answer.json()["error"]["message"]


def test_a_batch_of_another_project_does_not_exist(client: TestClient, file_id: str) -> None:
    batch_id = create(client, file_id)["id"]
    with transaction() as session:
        session.execute(update(Batch).values(project_id="other"))
    assert client.get(f"{BATCHES}/{batch_id}").status_code == 404
    assert client.post(f"{BATCHES}/{batch_id}/cancel").status_code == 404
    assert client.get(BATCHES).json()["data"] == []


def test_a_cancel_is_obeyed_once_and_refused_after_another_end(client: TestClient, file_id: str) -> None:
    batch_id = create(client, file_id)["id"]
    answers = [client.post(f"{BATCHES}/{batch_id}/cancel").json() for _ in range(2)]
    assert [answer["status"] for answer in answers] == ["cancelled", "cancelled"]
    with transaction() as session:
        session.execute(update(Batch).values(status=BatchStatus.COMPLETED))
    refused = client.post(f"{BATCHES}/{batch_id}/cancel")
    assert (refused.status_code, refused.headers["x-should-retry"]) == (409, "false")


def test_the_file_of_a_live_batch_can_not_be_deleted(client: TestClient, file_id: str) -> None:
    batch_id = create(client, file_id)["id"]
    refused = client.delete(f"/v1/files/{file_id}")
    assert refused.status_code == 409 and batch_id in refused.json()["error"]["message"]
    client.post(f"{BATCHES}/{batch_id}/cancel")
    assert client.delete(f"/v1/files/{file_id}").status_code == 200


def test_a_key_makes_one_batch_of_many_requests(client: TestClient, file_id: str) -> None:
    headers = {"idempotency-key": new_id("key")}
    first, again = (create(client, file_id, headers) for _ in range(2))
    assert first == again
    other = client.post(BATCHES, json=body(file_id, metadata={"a": "b"}), headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")


def test_a_retry_is_told_of_the_batch_whose_answer_was_lost(client: TestClient, file_id: str) -> None:
    first = create(client, file_id, {"x-stainless-retry-count": "0"})
    assert create(client, file_id, {"x-stainless-retry-count": "1"}) == first
    assert create(client, file_id, {"x-stainless-retry-count": "0"})["id"] != first["id"]
