"""A job's events: the record in the database, and the live stream that follows it.

`append` numbers events by a counter on the job's row, in the transaction that makes them true. `publish`, after the
commit, copies them to a Redis Stream whose entry ids *are* those numbers, so that a reader who holds number n asks
for what comes after n and sees at once if something is missing; then the database has it. The stream may be lost,
late or absent: it only makes things faster.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import redis
from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from shared.db import clock
from shared.ids import new_id
from shared.models import Event, Job, table_of
from shared.text import storable

STREAM_LENGTH = 1000
STREAM_TTL_S = 3600
RETRY_AFTER_S = 5.0

_JOBS, _EVENTS = table_of(Job), table_of(Event)


def stream_key(job_id: str) -> str:
    return f"anneal:events:{job_id}"


def add_with_first(session: Session, job: Job, *messages: str) -> None:
    """Insert a job that is being made, with its first events, at its own time: two statements.

    The session doesn't get to know these objects: its unit of work would take longer than both statements.
    """
    job.last_event = len(messages)
    first = [_event(job, sequence, job.created_at, message) for sequence, message in enumerate(messages, 1)]
    session.execute(insert(_JOBS), _columns(job))
    session.execute(insert(_EVENTS), [_columns(event) for event in first])
    session.info.setdefault("events", []).extend(first)


def append(
    session: Session,
    job: Job,
    message: str,
    *,
    level: str = "info",
    type: str = "message",
    data: dict[str, Any] | None = None,
) -> Event:
    """Add one event to a job, numbered one past its last. Commits with the caller's transaction."""
    sequence = session.scalar(
        update(Job).where(Job.id == job.id).values(last_event=Job.last_event + 1).returning(Job.last_event),
        execution_options={"synchronize_session": False},
    )
    assert sequence is not None, "the caller holds the job's row"
    event = _event(job, sequence, clock(session), message, level=level, type=type, data=data)
    session.add(event)
    session.info.setdefault("events", []).append(event)
    return event


def _event(
    job: Job,
    sequence: int,
    created_at: float,
    message: str,
    *,
    level: str = "info",
    type: str = "message",
    data: dict[str, Any] | None = None,
) -> Event:
    return Event(
        id=new_id("ftevent"),
        job_id=job.id,
        project_id=job.project_id,
        sequence=sequence,
        created_at=created_at,
        level=level,
        type=type,
        message=storable(message[:4000]),
        data=data,
    )


def _columns(row: Job | Event) -> dict[str, Any]:
    """What has been set of a new object, by the names of the table's columns."""
    values = vars(row)
    return {
        attribute.columns[0].name: values[attribute.key]
        for attribute in row.__mapper__.column_attrs
        if attribute.key in values
    }


def written(session: Session) -> list[Event]:
    """The events this transaction has appended, for `Publisher.publish` once it has committed."""
    return list(session.info.get("events", []))


def read_after(session: Session, job_id: str, sequence: int, limit: int = 500) -> list[Event]:
    """Events past number `sequence`, oldest first."""
    return list(
        session.scalars(
            select(Event).where(Event.job_id == job_id, Event.sequence > sequence).order_by(Event.sequence).limit(limit)
        )
    )


def shown(event: Event) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job.event`."""
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data or {},
    }


class Publisher:
    """Copies committed events to the live stream. A broker out of reach costs one timeout every 5 s, nothing else."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._silent_until = 0.0

    def publish(self, events: Sequence[Event]) -> None:
        if not events or time.monotonic() < self._silent_until:
            return
        try:
            with self._client.pipeline(transaction=False) as pipe:
                for event in events:
                    key = stream_key(event.job_id)
                    body = json.dumps(shown(event), allow_nan=False)
                    pipe.xadd(key, {"event": body}, id=f"{event.sequence}-0", maxlen=STREAM_LENGTH, approximate=True)
                    pipe.expire(key, STREAM_TTL_S)
                pipe.execute(raise_on_error=False)  # an entry id that is not the newest is refused: already there
        except redis.RedisError:
            self._silent_until = time.monotonic() + RETRY_AFTER_S
