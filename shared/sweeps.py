"""The sweep's own row: when anybody last looked, and whether silence can be told from an outage.

A lease that ran out means a dead worker only if the worker could have renewed it. After a gap in the passes of *all*
sweeps (the database was away, or the host slept) nobody could: nothing expires until everybody had a whole lease.
"""

from dataclasses import dataclass
from uuid import uuid4

from sqlalchemy.orm import Session

from shared.db import clock
from shared.models import Sweep

_THE_ROW = 1


@dataclass(frozen=True, slots=True)
class Pass:
    """What a sweep may do now."""

    may_expire: bool
    instance: str
    """Name of this database."""


def begin_pass(session: Session, lease_s: float) -> Pass:
    """Note that a sweep looks, by the database's clock; sweeps queue up on the row, so any number may do so.

    Raises:
        IntegrityError: two sweeps made the very first pass at once; one of them did.
    """
    row = session.get(Sweep, _THE_ROW, with_for_update=True, populate_existing=True)
    at = clock(session)
    if row is None:
        # Of a database that nobody has swept nothing is known: jobs may have been running for long.
        row = Sweep(id=_THE_ROW, last_pass_at=at, no_expiry_before=at + lease_s, instance=uuid4().hex)
        session.add(row)
        session.flush()
    if at - row.last_pass_at > lease_s / 2:
        row.no_expiry_before = at + lease_s
    row.last_pass_at = at
    return Pass(may_expire=at >= row.no_expiry_before, instance=row.instance)
