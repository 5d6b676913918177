"""POSTs that are sent again: with a key, without one, at the same time, to another process, after a crash."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from shared import job_creation
from shared.db import transaction
from shared.errors import Unavailable
from shared.models import Answer, Creation, File
from shared.settings import Settings
from tests.conftest import chat_row, jsonl, upload
from tests.waiting import LIMIT_S

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
JOBS = "/v1/fine_tuning/jobs"
CONTENT = jsonl([chat_row()] * 3)


def create(client: Any, file_id: str, key: str | None = None, retry: int | None = None, **body: Any) -> Any:
    headers = {} if key is None else {"idempotency-key": key}
    if retry is not None:
        headers["x-stainless-retry-count"] = str(retry)
    return client.post(JOBS, json={"model": MODEL, "training_file": file_id} | body, headers=headers)


def send_file(client: Any, content: bytes = CONTENT, name: str = "a.jsonl", **headers: str) -> Any:
    return client.post("/v1/files", files={"file": (name, content)}, data={"purpose": "fine-tune"}, headers=headers)


def job_ids(client: Any) -> list[str]:
    return [job["id"] for job in client.get(JOBS).json()["data"]]


def is_replay(answer: Any) -> bool:
    return bool(answer.headers.get("idempotent-replayed") == "true")


def stored_files(settings: Settings) -> int:
    return len(list((settings.storage_root / "files").iterdir()))


def test_a_key_creates_one_job_and_replays_its_answer(client: TestClient) -> None:
    file_id = upload(client)["id"]
    first, second = create(client, file_id, "k1"), create(client, file_id, "k1")
    assert first.status_code == second.status_code == 200
    assert second.json() == first.json()
    assert is_replay(second) and not is_replay(first)
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    other = create(client, file_id, "k2").json()["id"]
    assert job_ids(client) == [other, first.json()["id"]]


def test_a_key_belongs_to_one_body(client: TestClient) -> None:
    file_id = upload(client)["id"]
    create(client, file_id, "k1")
    answer = create(client, file_id, "k1", seed=1)
    assert answer.status_code == 409 and answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("idempotency_key_reused", "Idempotency-Key") and "k1" in error["message"]
    assert is_replay(create(client, file_id, "k1")) and len(job_ids(client)) == 1


def test_a_key_belongs_to_one_route(client: TestClient) -> None:
    file_id = send_file(client, **{"idempotency-key": "k1"}).json()["id"]
    job = create(client, file_id, "k1").json()["id"]
    cancelled = [client.post(f"{JOBS}/{job}/cancel", headers={"idempotency-key": "k1"}) for _ in range(2)]
    assert [answer.status_code for answer in cancelled] == [200, 200]
    assert is_replay(cancelled[1]) and cancelled[1].json()["status"] == "cancelled"
    assert client.post(f"{JOBS}/{job}/cancel").status_code == 409


def test_a_model_that_is_not_there_yet_leaves_the_key_free(client: TestClient) -> None:
    file_id = upload(client)["id"]
    for _ in range(2):
        answer = create(client, file_id, "early", model="ft:smollm2-135m-instruct:default::soon")
        assert answer.status_code == 404 and not is_replay(answer)
    assert create(client, file_id, "early").status_code == 200


def test_errors_about_the_request_are_replayed(client: TestClient) -> None:
    for key, body in (("missing", {}), ("invalid", {"seed": -1})):
        first, second = (create(client, "file-nope", key, **body) for _ in range(2))
        assert first.status_code in (400, 404) and second.status_code == first.status_code
        assert second.json() == first.json() and is_replay(second)
    job = create(client, upload(client)["id"]).json()["id"]
    client.post(f"{JOBS}/{job}/cancel")
    conflicts = [client.post(f"{JOBS}/{job}/cancel", headers={"idempotency-key": "c"}) for _ in range(2)]
    assert [answer.status_code for answer in conflicts] == [409, 409] and is_replay(conflicts[1])
    assert conflicts[1].headers["x-should-retry"] == "false"


def test_a_failure_of_ours_leaves_the_key_free(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = upload(client)["id"]
    real = job_creation.submit

    def away(*_: Any) -> Any:
        raise Unavailable("the database is out of reach")

    monkeypatch.setattr("shared.job_creation.submit", away)
    assert create(client, file_id, "k1").status_code == 503
    monkeypatch.setattr("shared.job_creation.submit", lambda *_: 1 / 0)
    assert create(client, file_id, "k1").status_code == 500
    monkeypatch.setattr("shared.job_creation.submit", real)
    answer = create(client, file_id, "k1")
    assert answer.status_code == 200 and not is_replay(answer)


def test_a_key_is_free_again_after_a_day(client: TestClient) -> None:
    file_id = upload(client)["id"]
    first = create(client, file_id, "k1")
    with transaction() as session:
        session.execute(update(Answer).values(created_at=Answer.created_at - 24 * 3600))
    second = create(client, file_id, "k1", seed=1)
    assert second.status_code == 200 and second.json()["id"] != first.json()["id"]
    assert is_replay(create(client, file_id, "k1", seed=1))


@pytest.mark.parametrize("key", ["", "x" * 256, b"tab\there", b"caf\xe9"])
def test_a_key_that_is_none_is_refused(client: TestClient, key: str | bytes) -> None:
    answer = client.post(JOBS, json={}, headers={"idempotency-key": key})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "Idempotency-Key"
    assert create(client, upload(client)["id"], "x" * 255).status_code == 200


def test_a_file_sent_again_with_its_key_is_stored_once(client: TestClient, settings: Settings) -> None:
    key = {"idempotency-key": "f1"}
    first, second = send_file(client, **key), send_file(client, **key)  # each with a boundary of its own
    assert second.json() == first.json() and is_replay(second)
    for other in (send_file(client, CONTENT + CONTENT, **key), send_file(client, name="b.jsonl", **key)):
        assert other.status_code == 409 and other.json()["error"]["code"] == "idempotency_key_reused"
    assert len(client.get("/v1/files").json()["data"]) == stored_files(settings) == 1
    refused = [send_file(client, b"not json\n", **{"idempotency-key": "f2"}) for _ in range(2)]
    assert [answer.status_code for answer in refused] == [400, 400] and is_replay(refused[1])
    assert stored_files(settings) == 1


def test_a_retry_without_a_key_is_told_once_what_was_created(client: TestClient) -> None:
    file_id = upload(client)["id"]
    first = create(client, file_id, retry=0)
    retried = create(client, file_id, retry=1)
    assert retried.json() == first.json() and is_replay(retried)
    assert create(client, file_id, retry=2).json() == first.json(), "that answer was lost too"
    again = create(client, file_id, retry=1)
    assert again.json()["id"] != first.json()["id"] and not is_replay(again)
    assert len(job_ids(client)) == 2


def test_only_a_retry_of_the_same_request_is_told(client: TestClient) -> None:
    file_id = upload(client)["id"]
    ids = [
        create(client, file_id, retry=0).json()["id"],
        create(client, file_id, retry=0).json()["id"],
        create(client, file_id).json()["id"],
        create(client, file_id, retry=1, seed=5).json()["id"],
    ]
    assert len(set(ids)) == 4
    assert create(client, file_id, retry=1).json()["id"] == ids[1], "the newest that nobody was told about"
    with transaction() as session:
        session.execute(update(Creation).values(created_at=Creation.created_at - 61))
    assert create(client, file_id, retry=1).json()["id"] not in ids


def test_a_client_that_has_used_the_id_did_not_lose_it(client: TestClient) -> None:
    file_id = send_file(client, **{"x-stainless-retry-count": "0"}).json()["id"]
    job = create(client, file_id, retry=0).json()["id"]
    client.post(f"{JOBS}/{job}/cancel")
    retried = create(client, file_id, retry=1).json()["id"]
    assert retried != job
    client.post(f"{JOBS}/{retried}/cancel")
    client.delete(f"/v1/files/{file_id}")
    answer = send_file(client, **{"x-stainless-retry-count": "1"})
    assert answer.json()["id"] != file_id


def test_a_file_retried_without_a_key_is_told_once(client: TestClient, settings: Settings) -> None:
    first = send_file(client, **{"x-stainless-retry-count": "0"}).json()
    assert send_file(client, **{"x-stainless-retry-count": "1"}).json() == first
    assert stored_files(settings) == 1
    assert send_file(client, **{"x-stainless-retry-count": "1"}).json()["id"] != first["id"]


def test_uploads_and_their_parts_are_made_once(client: TestClient, settings: Settings) -> None:
    about = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": len(CONTENT), "mime_type": "application/jsonl"}

    def send(path: str, **options: Any) -> list[Any]:
        answers = [client.post(f"/v1/uploads{path}", headers={"idempotency-key": "u"}, **options) for _ in range(2)]
        assert answers[0].text == answers[1].text and [is_replay(answer) for answer in answers] == [False, True]
        return answers

    upload_id = send("", json=about)[0].json()["id"]
    part_id = send(f"/{upload_id}/parts", files={"data": ("data", CONTENT)})[0].json()["id"]
    assert stored_files(settings) == 1
    refused = send(f"/{upload_id}/complete", json={"part_ids": ["part_nope"]})
    assert [answer.status_code for answer in refused] == [400, 400]
    done = client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part_id]})
    assert done.json()["status"] == "completed"
    ids = [
        client.post("/v1/uploads", json=about, headers={"x-stainless-retry-count": str(retry)}).json()["id"]
        for retry in (0, 1, 1)
    ]
    assert ids[0] == ids[1] != ids[2]


def test_requests_that_arrive_together_with_one_key_create_once(server: str) -> None:
    with httpx.Client(base_url=server, timeout=30) as client, ThreadPoolExecutor(8) as pool:
        file_id = send_file(client).json()["id"]
        for number in range(5):
            answers = list(pool.map(lambda _, n=number: create(client, file_id, f"k{n}", seed=n), range(8)))
            assert {answer.status_code for answer in answers} == {200}
            assert len({answer.text for answer in answers}) == 1
            assert sum(not is_replay(answer) for answer in answers) == 1
        assert len(job_ids(client)) == 5
        files = list(pool.map(lambda _: send_file(client, name="b.jsonl", **{"idempotency-key": "f"}), range(8)))
        assert len({answer.json()["id"] for answer in files}) == 1
        retries = list(pool.map(lambda _: create(client, file_id, retry=1, seed=9), range(4)))
        assert {answer.status_code for answer in retries} == {200}


class Api:
    """An API process on a port of its own, which dies at a commit once `trap` says so."""

    def __init__(self, folder: Path) -> None:
        self.trap = folder / "trap"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self._listener.getsockname()[1]}", timeout=60)
        self.start()

    def start(self) -> None:
        self.trap.unlink(missing_ok=True)
        descriptor = self._listener.fileno()
        command = [sys.executable, "-m", "tests.api.dying_api", str(descriptor), str(self.trap)]
        self.process = subprocess.Popen(command, pass_fds=[descriptor])

    def dies_at_commit(self, when: str, request: Callable[[], Any]) -> None:
        """Let it work on a request and die `before` or `after` its next commit; the client gets no answer."""
        self.trap.write_text(when)
        with pytest.raises(httpx.TransportError):
            request()
        assert self.process.wait(LIMIT_S) == -signal.SIGKILL

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()
        self._listener.close()


@pytest.fixture
def apis(settings: Settings, tmp_path: Path) -> Iterator[list[Api]]:
    """Two API processes on one database."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    both = [Api(folder) for folder in folders]
    yield both
    for api in both:
        api.close()


def test_whatever_a_crash_cuts_off_is_done_once(apis: list[Api], settings: Settings) -> None:
    one, two = apis
    file_id = send_file(one.client).json()["id"]

    one.dies_at_commit("after", lambda: create(one.client, file_id, "k1"))
    (job,) = job_ids(two.client)
    told = create(two.client, file_id, "k1")
    assert told.json()["id"] == job and is_replay(told)

    one.start()  # on the same socket: a client only waits
    assert create(one.client, file_id, "k1").json() == told.json()

    one.dies_at_commit("before", lambda: create(one.client, file_id, "k2"))
    assert job_ids(two.client) == [job]
    second = create(two.client, file_id, "k2")
    assert second.status_code == 200 and not is_replay(second), "nothing had happened, and nothing is held"

    two.dies_at_commit("after", lambda: create(two.client, file_id, retry=0, seed=7))
    one.start()
    jobs_now = job_ids(one.client)
    retried = create(one.client, file_id, retry=1, seed=7)
    assert retried.json()["id"] == jobs_now[0] and job_ids(one.client) == jobs_now and len(jobs_now) == 3

    key = {"idempotency-key": "f1"}
    one.dies_at_commit("after", lambda: send_file(one.client, name="b.jsonl", **key))
    two.start()
    assert is_replay(send_file(two.client, name="b.jsonl", **key))
    names = [file["filename"] for file in two.client.get("/v1/files").json()["data"]]
    assert sorted(names) == ["a.jsonl", "b.jsonl"] and stored_files(settings) == 2


def test_a_second_request_waits_for_the_first_in_another_process(apis: list[Api]) -> None:
    """The first stands in the middle of its transaction, because the test holds what it needs."""
    one, two = apis
    file_id = send_file(one.client).json()["id"]
    two.client.get(JOBS)
    answers: list[Any] = []
    with transaction() as session:
        session.execute(update(File).where(File.id == file_id).values(rows=3))
        threads = [
            threading.Thread(target=lambda api=api: answers.append(create(api.client, file_id, "k1"))) for api in apis
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert not answers
    for thread in threads:
        thread.join(LIMIT_S)
    assert answers[0].text == answers[1].text and sorted(map(is_replay, answers)) == [False, True]
    assert len(job_ids(one.client)) == 1
