"""/v1/fine_tuning/jobs/{id}/events: a page, or a live stream that a client can leave and rejoin without a gap."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import redis
from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from sqlalchemy import select
from sse_starlette import EventSourceResponse, ServerSentEvent

from api.answer_schemas import JobEvent, also_streams
from api.deps import Caller
from api.paging import After
from shared import events, jobs
from shared.db import reading
from shared.errors import BadRequest, TooManyRequests
from shared.models import TERMINAL, Event, Job, JobStatus
from shared.schemas import Page

router = APIRouter(prefix="/fine_tuning/jobs", tags=["fine-tuning"])

WAIT_MS = 1000
"""How long the tail waits on the live stream before it looks into the database itself."""
PING_S = 15
MAX_STREAMS = 200
MAX_AGE_S = 3600.0
SEND_TIMEOUT_S = 30
"""A client that takes nothing for so long is dropped; it comes back with Last-Event-ID."""


@router.get("/{job_id}/events", response_model=None, responses=also_streams(Page[JobEvent], "an event"))
async def list_events(
    request: Request,
    job_id: str,
    caller: Caller,
    stream: bool = False,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after: After = None,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Page[dict[str, Any]] | Response:
    """A page, newest first. `stream=true`: server-sent events, oldest first, from Last-Event-ID on, to `[DONE]`."""
    await run_in_threadpool(_check_exists, caller.project_id, job_id)
    if not stream:
        return await run_in_threadpool(_page, job_id, after, limit)
    if last_event_id is not None and not re.fullmatch("[0-9]{1,18}", last_event_id):
        raise BadRequest(f"Last-Event-ID {last_event_id[:40]!r} is not the number of an event", param="Last-Event-ID")
    streams: Streams = request.app.state.streams
    streams.check_room()
    events_after = streams.follow(job_id, int(last_event_id or 0))
    return EventSourceResponse(events_after, ping=PING_S, send_timeout=SEND_TIMEOUT_S)


def _check_exists(project_id: str, job_id: str) -> None:
    with reading() as session:
        jobs.get(session, project_id, job_id)


def _page(job_id: str, after: str | None, limit: int) -> Page[dict[str, Any]]:
    query = select(Event).where(Event.job_id == job_id)
    with reading() as session:
        if after is not None:
            cursor = session.get(Event, after)
            if cursor is None or cursor.job_id != job_id:
                raise BadRequest(f"after={after!r} is not the id of an event of {job_id}", param="after")
            query = query.where(Event.sequence < cursor.sequence)
        rows = session.scalars(query.order_by(Event.sequence.desc()).limit(limit + 1)).all()
    data = [events.shown(row) for row in rows[:limit]]
    return Page.of(data, len(rows) > limit, [row["id"] for row in data])


class Streams:
    """The live streams this process serves, bounded in number and age. Its own connections: each stream blocks one."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self.client = client
        self._open = 0

    def check_room(self) -> None:
        """Raises `TooManyRequests` when as many streams are open as this process serves."""
        if self._open >= MAX_STREAMS:
            raise TooManyRequests(
                f"{MAX_STREAMS} event streams are open already; poll the events, or try again later", retry_after_s=10
            )

    async def follow(self, job_id: str, sequence: int) -> AsyncIterator[ServerSentEvent]:
        """Replay from the database, then tail the live stream; any gap in the numbers sends us back to the database.

        Past `MAX_AGE_S` the stream just ends, without `[DONE]`: the client comes back with the last id it has.
        """
        ends_at = time.monotonic() + MAX_AGE_S
        self._open += 1
        try:
            while time.monotonic() < ends_at:
                rows, ended = await run_in_threadpool(_read, job_id, sequence)
                for row in rows:
                    sequence = row.sequence
                    yield _sse(sequence, json.dumps(events.shown(row)))
                if not rows and ended:
                    yield ServerSentEvent(data="[DONE]")
                    return
                if rows:
                    continue
                async for number, body in _tail(self.client, job_id, sequence):
                    sequence = number
                    yield _sse(number, body)
        finally:
            self._open -= 1


async def _tail(client: redis.asyncio.Redis, job_id: str, sequence: int) -> AsyncIterator[tuple[int, str]]:
    """Entries right after `sequence` for as long as they come without a gap or a pause."""
    key = events.stream_key(job_id)
    while True:
        try:
            answer: Any = await client.xread({key: f"{sequence}-0"}, count=500, block=WAIT_MS)
        except redis.RedisError:
            await asyncio.sleep(WAIT_MS / 1000)  # the broker is away: the database alone, once a second
            return
        if not answer:
            return
        for entry_id, fields in answer[0][1]:
            number = int(entry_id.split(b"-")[0])
            if number != sequence + 1:
                return
            sequence = number
            yield number, fields[b"event"].decode()


def _read(job_id: str, sequence: int) -> tuple[list[Event], bool]:
    """(events past `sequence`, whether the job had ended before they were read)."""
    with reading() as session:
        status = session.scalar(select(Job.status).where(Job.id == job_id))
        return events.read_after(session, job_id, sequence), JobStatus(status) in TERMINAL if status else True


def _sse(sequence: int, body: str) -> ServerSentEvent:
    return ServerSentEvent(data=body, id=str(sequence))
