"""AsyncOpenAI: the same service through the asynchronous client."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, AuthenticationError, BadRequestError, ConflictError, NotFoundError
from openai.types import FileObject, Model, Upload
from openai.types.fine_tuning import FineTuningJob

from tests.sdk.behaviours.conftest import CreateJob
from tests.sdk.data import SHORT, TINY, chat_rows, jsonl
from tests.sdk.runs import Runs
from tests.sdk.wire import Wire

CONTENT = jsonl(chat_rows(3))


@pytest.fixture
def run(async_client: AsyncOpenAI) -> Callable[[Callable[[AsyncOpenAI], Awaitable[Any]]], Any]:
    """Run a coroutine function with the client, in a loop of its own."""

    def run(story: Callable[[AsyncOpenAI], Awaitable[Any]]) -> Any:
        async def with_client() -> Any:
            async with async_client as client:
                return await story(client)

        return asyncio.run(with_client())

    return run


async def create(client: AsyncOpenAI, training_file: str, **choices: Any) -> FineTuningJob:
    return await client.fine_tuning.jobs.create(
        model=TINY, training_file=training_file, extra_body={"training": SHORT}, **choices
    )


def test_a_file_is_created_read_and_deleted(run: Any) -> None:
    async def story(client: AsyncOpenAI) -> None:
        file = await client.files.create(file=("a.jsonl", CONTENT), purpose="fine-tune")
        assert (type(file), file.bytes) == (FileObject, len(CONTENT))
        assert await client.files.retrieve(file.id) == file
        assert (await client.files.content(file.id)).content == CONTENT
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(NotFoundError):
            await client.files.retrieve(file.id)

    run(story)


def test_a_path_is_sent(run: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(CONTENT)
    file = run(lambda client: client.files.create(file=tmp_path / "rows.jsonl", purpose="fine-tune"))
    assert (file.filename, file.bytes) == ("rows.jsonl", len(CONTENT))


def test_content_is_streamed(run: Any) -> None:
    async def story(client: AsyncOpenAI) -> bytes:
        file = await client.files.create(file=("a", b"0123456789" * 10**5), purpose="user_data")
        async with client.files.with_streaming_response.content(file.id) as answer:
            return b"".join([chunk async for chunk in answer.iter_bytes(4096)])

    assert run(story) == b"0123456789" * 10**5


def test_waiting_for_a_file(run: Any) -> None:
    async def story(client: AsyncOpenAI) -> str:
        file = await client.files.create(file=("a.jsonl", CONTENT), purpose="fine-tune")
        return (await client.files.wait_for_processing(file.id, poll_interval=0.1)).status

    assert run(story) == "processed"


def test_files_are_listed_page_by_page(run: Any) -> None:
    async def story(client: AsyncOpenAI) -> tuple[list[str], list[str]]:
        for _ in range(3):
            await client.files.create(file=("a", CONTENT), purpose="batch")
        pages = [file.id async for file in client.files.list(purpose="batch", limit=2)]
        return pages, [file.id for file in (await client.files.list(purpose="batch")).data]

    pages, whole = run(story)
    assert pages == whole
    assert len(set(whole)) == len(whole) >= 3


def test_a_file_expires(run: Any) -> None:
    expires_after = {"anchor": "created_at", "seconds": 7200}
    file = run(lambda client: client.files.create(file=("a", b"x"), purpose="user_data", expires_after=expires_after))
    assert file.expires_at == file.created_at + 7200


def test_an_upload_in_parts(run: Any) -> None:
    async def story(client: AsyncOpenAI) -> Upload:
        return await client.uploads.upload_file_chunked(
            file=CONTENT,
            filename="a.jsonl",
            bytes=len(CONTENT),
            mime_type="application/jsonl",
            purpose="fine-tune",
            part_size=50,
            md5=hashlib.md5(CONTENT).hexdigest(),
        )

    done = run(story)
    assert (done.status, done.file.bytes) == ("completed", len(CONTENT))


def test_parts_at_once_and_a_cancel(run: Any) -> None:
    async def story(client: AsyncOpenAI) -> Upload:
        upload = await client.uploads.create(bytes=90, filename="a", mime_type="text/plain", purpose="user_data")
        parts = await asyncio.gather(*(client.uploads.parts.create(upload.id, data=b"x" * 30) for _ in range(3)))
        assert {part.upload_id for part in parts} == {upload.id}
        return await client.uploads.cancel(upload.id)

    assert run(story).status == "cancelled"


def test_a_job_is_created_listed_and_cancelled(run: Any, training_file: Any, tag: dict[str, str]) -> None:
    async def story(client: AsyncOpenAI) -> None:
        jobs = client.fine_tuning.jobs
        job = await create(client, training_file.id, metadata=tag)
        assert (type(job), job.status) == (FineTuningJob, "queued")
        assert (await jobs.retrieve(job.id)).id == job.id
        assert [one.id async for one in jobs.list(metadata=tag)] == [job.id]
        assert (await jobs.cancel(job.id)).status == "cancelled"
        with pytest.raises(ConflictError):
            await jobs.cancel(job.id)

    run(story)


def test_a_job_is_paused_and_resumed(run: Any, training_file: Any) -> None:
    async def story(client: AsyncOpenAI) -> list[str]:
        job = await create(client, training_file.id)
        paused = await client.fine_tuning.jobs.pause(job.id)
        resumed = await client.fine_tuning.jobs.resume(job.id)
        return [job.status, paused.status, resumed.status]

    assert run(story) == ["queued", "paused", "queued"]


def test_many_jobs_at_once(run: Any, training_file: Any, tag: dict[str, str]) -> None:
    async def story(client: AsyncOpenAI) -> tuple[set[str], list[str]]:
        numbered = (create(client, training_file.id, metadata=tag | {"n": str(number)}) for number in range(20))
        made = await asyncio.gather(*numbered)
        return {job.id for job in made}, [job.id async for job in client.fine_tuning.jobs.list(metadata=tag, limit=7)]

    made, listed = run(story)
    assert len(listed) == len(made) == 20
    assert set(listed) == made


def test_events_and_checkpoints_are_listed_page_by_page(run: Any, runs: Runs) -> None:
    job_id = runs.finished.result(600).id

    async def story(client: AsyncOpenAI) -> None:
        jobs = client.fine_tuning.jobs
        events = [event.id async for event in jobs.list_events(job_id, limit=5)]
        assert events == [event.id for event in (await jobs.list_events(job_id, limit=1000)).data]
        steps = [checkpoint.step_number async for checkpoint in jobs.checkpoints.list(job_id, limit=1)]
        assert steps == [6, 4, 2]

    run(story)


def test_models_are_listed_and_retrieved(run: Any) -> None:
    async def story(client: AsyncOpenAI) -> None:
        assert TINY in [model.id async for model in client.models.list()]
        model = await client.models.retrieve(TINY)
        assert (type(model), model.id) == (Model, TINY)
        with pytest.raises(NotFoundError):
            await client.models.retrieve("no/pe")

    run(story)


def test_failures_have_their_exceptions(run: Any, async_client: AsyncOpenAI) -> None:
    async def story(client: AsyncOpenAI) -> None:
        with pytest.raises(BadRequestError) as raised:
            await client.files.create(file=("a", b""), purpose="fine-tune")
        assert (raised.value.request_id or "").startswith("req_")
        with pytest.raises(AuthenticationError):
            await client.with_options(api_key="wrong").models.list()

    run(story)


def test_a_lost_answer_is_asked_for_again(run: Any, wire: Wire, training_file: Any, tag: dict[str, str]) -> None:
    wire.lose_answer("POST", "/v1/fine_tuning/jobs")

    async def story(client: AsyncOpenAI) -> tuple[str, list[str]]:
        job = await create(client, training_file.id, metadata=tag)
        return job.id, [one.id async for one in client.fine_tuning.jobs.list(metadata=tag)]

    made, listed = run(story)
    assert listed == [made]


def test_a_key_creates_once(run: Any, training_file: Any, create_job: CreateJob, tag: dict[str, str]) -> None:
    async def story(client: AsyncOpenAI) -> set[str]:
        headers = {"Idempotency-Key": f"async-{tag['tag']}"}
        made = (create(client, training_file.id, metadata=tag, extra_headers=headers) for _ in range(5))
        return {job.id for job in await asyncio.gather(*made)}

    assert len(run(story)) == 1
