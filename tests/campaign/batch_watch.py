"""Looks at the recorded results of batches all the time: a line that has one keeps it, word for word."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from shared.models import BATCH_LIVE, Batch, BatchLine

LOOK_EVERY_S = 0.3


@dataclass(frozen=True)
class Recorded:
    """One result that was seen in the database while its batch was being run."""

    seen_at: float
    """Seconds since 1970; it was committed before."""
    is_error: bool
    sha256: str
    """Of its line, without the line's end."""


@dataclass
class LineWatch:
    """Call `look` often; what it sees is in `recorded`, what must not be in `changed`."""

    engine: Callable[[], Engine]
    looks: int = 0
    recorded: dict[tuple[str, int], Recorded] = field(default_factory=dict)
    """By the batch's id and the number of the line."""
    changed: list[str] = field(default_factory=list)
    _looked_at: float = 0

    def look(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        lines = select(BatchLine.batch_id, BatchLine.line, BatchLine.is_error, BatchLine.body)
        lines = lines.join(Batch, Batch.id == BatchLine.batch_id).where(Batch.status.in_(BATCH_LIVE))
        try:
            with Session(self.engine()) as session:
                rows = session.execute(lines).all()
        except SQLAlchemyError:
            return  # a fault
        self.looks += 1
        seen_at = time.time()
        for batch_id, line, is_error, body in rows:
            recorded = Recorded(seen_at, is_error, hashlib.sha256(body.encode()).hexdigest())
            before = self.recorded.setdefault((batch_id, line), recorded)
            if (before.is_error, before.sha256) != (recorded.is_error, recorded.sha256):
                self.changed.append(f"line {line} of {batch_id} had a result, and has another at {seen_at:.1f}")
