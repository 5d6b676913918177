"""A job's events: pages, and streams over a real socket."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from shared import events, jobs
from shared.db import transaction
from shared.models import Job
from shared.redis_client import connect
from shared.settings import Settings

JOBS = "/v1/fine_tuning/jobs"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def http(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=20) as client:
        yield client


@pytest.fixture
def job_id(http: httpx.Client) -> str:
    row = json.dumps({"prompt": "a", "completion": "b"}).encode()
    file = http.post("/v1/files", files={"file": ("a.jsonl", row)}, data={"purpose": "fine-tune"}).json()
    body = {"model": MODEL, "training_file": file["id"], "training": {"max_steps": 5}}
    return str(http.post(JOBS, json=body).json()["id"])


@pytest.fixture
def emit(settings: Settings, job_id: str) -> Callable[..., None]:
    """Append an event and, unless told otherwise, publish it live."""
    publisher = events.Publisher(connect(settings))

    def emit(message: str, live: bool = True) -> None:
        with transaction() as session:
            job = session.get(Job, job_id)
            assert job is not None
            events.append(session, job, message)
            written = events.written(session)
        if live:
            publisher.publish(written)

    return emit


def stream(http: httpx.Client, job_id: str, last: int | None = None) -> Iterator[tuple[int, Any]]:
    """(id, data) of each event; (0, '[DONE]') ends."""
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    with http.stream("GET", f"{JOBS}/{job_id}/events", params={"stream": "true"}, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        number = 0
        for line in answer.iter_lines():
            if line.startswith("id:"):
                number = int(line[3:])
            elif line.startswith("data:"):
                data = line[5:].strip()
                if data == "[DONE]":
                    yield 0, data
                    return
                yield number, json.loads(data)


def test_events_are_paged_newest_first(http: httpx.Client, job_id: str, emit: Callable[..., None]) -> None:
    for number in range(5):
        emit(f"event {number}")
    page = http.get(f"{JOBS}/{job_id}/events", params={"limit": 3}).json()
    assert [event["message"] for event in page["data"]] == ["event 4", "event 3", "event 2"]
    assert page["has_more"]
    rest = http.get(f"{JOBS}/{job_id}/events", params={"limit": 50, "after": page["last_id"]}).json()
    assert [event["message"] for event in rest["data"]][:2] == ["event 1", "event 0"]
    assert not rest["has_more"]
    assert set(page["data"][0]) == {"id", "object", "created_at", "level", "message", "type", "data"}


def test_a_stream_replays_then_follows_live_then_ends(
    http: httpx.Client, job_id: str, emit: Callable[..., None]
) -> None:
    def later() -> None:
        time.sleep(0.5)
        for number in range(20):
            emit(f"live {number}", live=number % 5 != 4)  # a lost live copy must not be a lost event
        with transaction() as session:
            jobs.request_cancel(session, "default", job_id)

    thread = threading.Thread(target=later)
    thread.start()
    seen = list(stream(http, job_id))
    thread.join()
    assert seen[-1] == (0, "[DONE]")
    numbers = [number for number, _ in seen[:-1]]
    assert numbers == list(range(1, len(numbers) + 1))
    assert [event["message"] for _, event in seen if "live" in str(event)] == [f"live {n}" for n in range(20)]
    assert seen[-2][1]["message"] == "The job was cancelled"


def test_a_live_event_arrives_at_once(http: httpx.Client, job_id: str, emit: Callable[..., None]) -> None:
    sent: dict[str, float] = {}

    def later() -> None:
        for number in range(3):
            time.sleep(0.4)
            sent[f"live {number}"] = time.monotonic()
            emit(f"live {number}")

    thread = threading.Thread(target=later)
    thread.start()
    delays = []
    for _, event in stream(http, job_id):
        if event["message"] in sent:
            delays.append(time.monotonic() - sent[event["message"]])
        if event["message"] == "live 2":
            break
    thread.join()
    assert sorted(delays)[1] < 0.25, delays


def test_a_client_that_comes_back_misses_nothing_and_sees_nothing_twice(
    http: httpx.Client, job_id: str, emit: Callable[..., None]
) -> None:
    for number in range(6):
        emit(f"event {number}")
    first = []
    for number, _ in stream(http, job_id):
        first.append(number)
        if len(first) == 4:
            break
    with transaction() as session:
        jobs.request_cancel(session, "default", job_id)
    rest = [number for number, _ in stream(http, job_id, last=first[-1])][:-1]
    assert first + rest == list(range(1, len(first) + len(rest) + 1))


def test_without_a_broker_streams_still_work(
    http: httpx.Client, job_id: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, emit: Callable[..., None]
) -> None:
    async def away(*_: Any, **__: Any) -> None:
        raise events.redis.ConnectionError("away")

    monkeypatch.setattr("redis.asyncio.Redis.xread", away)
    emit("unseen by the broker", live=False)

    def later() -> None:
        time.sleep(0.5)
        with transaction() as session:
            jobs.request_cancel(session, "default", job_id)

    thread = threading.Thread(target=later)
    thread.start()
    seen = [str(event) for _, event in stream(http, job_id)]
    thread.join()
    assert seen[-1] == "[DONE]" and any("unseen by the broker" in event for event in seen)


def test_a_bad_last_event_id_is_refused(http: httpx.Client, job_id: str) -> None:
    for value in ("x", "-1", "1.5", "9" * 30):
        answer = http.get(f"{JOBS}/{job_id}/events", params={"stream": "true"}, headers={"Last-Event-ID": value})
        assert answer.status_code == 400, value
