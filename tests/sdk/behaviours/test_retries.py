"""Answers that get lost: the SDK asks again, and nothing is done twice."""

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
from openai import APIConnectionError, ConflictError, OpenAI

from tests.integration.test_up import Up
from tests.sdk.behaviours.conftest import CreateJob, Upload, openai
from tests.sdk.data import TINY, chat_rows, jsonl
from tests.sdk.wire import Wire
from tests.waiting import wait_until

JOBS = "/v1/fine_tuning/jobs"


def key() -> dict[str, str]:
    return {"Idempotency-Key": f"key-{uuid4()}"}


def count_jobs(client: OpenAI, tag: dict[str, str]) -> int:
    return len(list(client.fine_tuning.jobs.list(metadata=tag)))


def test_a_job_whose_answer_was_lost_is_created_once(
    wire: Wire, client: OpenAI, create_job: CreateJob, tag: dict[str, str]
) -> None:
    wire.lose_answer("POST", JOBS)
    job = create_job(metadata=tag)
    (retry,) = wire.sent("POST", JOBS)
    assert retry.request_headers["x-stainless-retry-count"] == "1"
    assert [one.id for one in client.fine_tuning.jobs.list(metadata=tag)] == [job.id]


def test_a_job_whose_answer_was_lost_to_a_client_without_retries_is_created_once_more(
    wire: Wire, client: OpenAI, training_file: Any, tag: dict[str, str]
) -> None:
    """Nobody can know that the second is not meant: for that there are keys."""
    wire.lose_answer("POST", JOBS)
    jobs = client.with_options(max_retries=0).fine_tuning.jobs
    with pytest.raises(APIConnectionError):
        jobs.create(model=TINY, training_file=training_file.id, metadata=tag)
    jobs.create(model=TINY, training_file=training_file.id, metadata=tag)
    assert count_jobs(client, tag) == 2


def test_a_job_with_a_key_is_created_once_even_then(
    wire: Wire, client: OpenAI, create_job: CreateJob, tag: dict[str, str]
) -> None:
    headers = key()
    wire.lose_answer("POST", JOBS, 3)
    with pytest.raises(APIConnectionError):
        create_job(metadata=tag, extra_headers=headers)
    job = create_job(metadata=tag, extra_headers=headers)
    assert [one.id for one in client.fine_tuning.jobs.list(metadata=tag)] == [job.id]


def test_two_jobs_that_are_alike_are_two(client: OpenAI, create_job: CreateJob, tag: dict[str, str]) -> None:
    assert create_job(metadata=tag).id != create_job(metadata=tag).id
    assert count_jobs(client, tag) == 2


def test_a_retry_is_told_its_job_only_once(
    wire: Wire, client: OpenAI, create_job: CreateJob, tag: dict[str, str]
) -> None:
    first = create_job(metadata=tag)
    wire.lose_answer("POST", JOBS)
    second = create_job(metadata=tag)
    assert first.id != second.id
    assert count_jobs(client, tag) == 2


def test_a_file_whose_answer_was_lost_is_created_once(wire: Wire, client: OpenAI, upload: Upload) -> None:
    wire.lose_answer("POST", "/v1/files")
    file = upload(jsonl(chat_rows(4, seed=17)))
    assert [one.id for one in client.files.list() if one.filename == file.filename] == [file.id]


def test_an_upload_whose_answers_were_all_lost_becomes_one_file(wire: Wire, client: OpenAI) -> None:
    content, name = jsonl(chat_rows(5, seed=18)), f"{uuid4()}.jsonl"
    for path in ("/v1/uploads", "/v1/uploads/[^/]+/parts", "/v1/uploads/[^/]+/complete"):
        wire.lose_answer("POST", path)
    done = client.uploads.upload_file_chunked(
        file=content,
        filename=name,
        bytes=len(content),
        mime_type="application/jsonl",
        purpose="fine-tune",
        part_size=len(content) // 2 + 1,
    )
    assert done.file is not None
    assert client.files.content(done.file.id).content == content
    assert [one.id for one in client.files.list() if one.filename == name] == [done.file.id]


def test_a_cancel_whose_answer_was_lost_succeeds(wire: Wire, client: OpenAI, create_job: CreateJob) -> None:
    job = create_job()
    wire.lose_answer("POST", f"{JOBS}/[^/]+/cancel")
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


@pytest.mark.parametrize(("act", "status"), [("pause", "paused"), ("resume", "queued")])
def test_a_pause_and_a_resume_whose_answer_was_lost_succeed(
    act: str, status: str, wire: Wire, client: OpenAI, create_job: CreateJob
) -> None:
    job = create_job()
    if act == "resume":
        client.fine_tuning.jobs.pause(job.id)
    wire.lose_answer("POST", f"{JOBS}/[^/]+/{act}")
    assert getattr(client.fine_tuning.jobs, act)(job.id).status == status


def test_a_read_whose_answer_was_lost_is_repeated(wire: Wire, client: OpenAI) -> None:
    wire.lose_answer("GET", "/v1/models", 2)
    assert list(client.models.list())


def test_a_key_is_answered_the_same_again(client: OpenAI, create_job: CreateJob, tag: dict[str, str]) -> None:
    headers = key()
    first = create_job(metadata=tag, extra_headers=headers)
    client.fine_tuning.jobs.cancel(first.id)
    again = create_job(metadata=tag, extra_headers=headers)
    assert again == first  # as it was then, not as the job is now
    assert count_jobs(client, tag) == 1


def test_a_replay_says_so(client: OpenAI, training_file: Any, tag: dict[str, str]) -> None:
    headers, raw = key(), client.fine_tuning.jobs.with_raw_response
    first, again = (
        raw.create(model=TINY, training_file=training_file.id, metadata=tag, extra_headers=headers) for _ in range(2)
    )
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.request_id != first.request_id
    assert again.parse() == first.parse()


def test_a_key_for_something_else_is_a_conflict(create_job: CreateJob, tag: dict[str, str], wire: Wire) -> None:
    headers = key()
    create_job(metadata=tag, extra_headers=headers)
    with pytest.raises(ConflictError) as raised:
        create_job(metadata=tag | {"more": "yes"}, extra_headers=headers)
    assert raised.value.code == "idempotency_key_reused"
    assert [one.status for one in wire.sent("POST", JOBS)] == [200, 409]  # and the SDK did not try again


def test_a_key_holds_for_files(client: OpenAI) -> None:
    content, headers, name = jsonl(chat_rows(3, seed=19)), key(), f"{uuid4()}.jsonl"
    first, again = (
        client.files.create(file=(name, content), purpose="fine-tune", extra_headers=headers) for _ in range(2)
    )
    assert first == again
    with pytest.raises(ConflictError):
        client.files.create(file=(name, content + content), purpose="fine-tune", extra_headers=headers)
    assert [one.id for one in client.files.list() if one.filename == name] == [first.id]


def test_a_key_holds_for_uploads(client: OpenAI) -> None:
    headers = key()
    first, again = (
        client.uploads.create(bytes=9, filename="a", mime_type="text/plain", purpose="user_data", extra_headers=headers)
        for _ in range(2)
    )
    assert first == again


def test_a_key_remembers_a_refusal(client: OpenAI, create_job: CreateJob, tag: dict[str, str]) -> None:
    headers = key()
    for _ in range(2):
        with pytest.raises(Exception, match="file-nope"):
            create_job(training_file="file-nope", metadata=tag, extra_headers=headers)
    assert count_jobs(client, tag) == 0


def test_requests_with_one_key_at_once_create_one_job(
    create_job: CreateJob, client: OpenAI, tag: dict[str, str]
) -> None:
    headers = key()
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: create_job(metadata=tag, extra_headers=headers), range(8)))
    assert {job.id for job in jobs} == {jobs[0].id}
    assert count_jobs(client, tag) == 1


def test_a_key_holds_across_two_api_processes(
    second_api: str, client: OpenAI, create_job: CreateJob, training_file: Any, tag: dict[str, str]
) -> None:
    headers = key()
    first = create_job(metadata=tag, extra_headers=headers, extra_body={})
    with openai(f"{second_api}/v1") as other:
        again = other.fine_tuning.jobs.create(
            model=TINY, training_file=training_file.id, metadata=tag, extra_headers=headers
        )
    assert again.id == first.id
    assert count_jobs(client, tag) == 1


def kill_api(service: Up) -> Callable[[], bool]:
    """End the API process; `anneal up` starts another. Returns whether it has."""
    api = service.find("cli.main", "api")
    assert api is not None
    api.send_signal(signal.SIGKILL)
    return lambda: service.find("cli.main", "api") not in (None, api)


def test_a_key_holds_across_a_restart_of_the_api(
    service: Up, create_job: CreateJob, client: OpenAI, tag: dict[str, str]
) -> None:
    headers = key()
    first = create_job(metadata=tag, extra_headers=headers)
    wait_until(kill_api(service))
    assert create_job(metadata=tag, extra_headers=headers) == first
    assert count_jobs(client, tag) == 1


def test_a_client_does_not_notice_a_restart_of_the_api(service: Up, client: OpenAI, create_job: CreateJob) -> None:
    restarted = kill_api(service)
    job = create_job()
    assert client.fine_tuning.jobs.retrieve(job.id).id == job.id
    wait_until(restarted)


def test_jobs_created_while_the_api_dies_are_created_once(
    service: Up, wire: Wire, training_file: Any, tag: dict[str, str]
) -> None:
    with openai(wire.url, max_retries=8) as client:

        def create(number: int) -> str:
            metadata = tag | {"number": str(number)}
            return client.fine_tuning.jobs.create(
                model=TINY, training_file=training_file.id, metadata=metadata, extra_headers=key()
            ).id

        with ThreadPoolExecutor(4) as pool:
            created = pool.map(create, range(60))
            time.sleep(0.3)
            restarted = kill_api(service)
            ids = list(created)
        wait_until(restarted)
        listed = [job.id for job in client.fine_tuning.jobs.list(metadata=tag, limit=100)]
    assert sorted(listed) == sorted(ids)
    assert len(set(ids)) == 60
