"""Batches: every change of a batch's status, and the results of its lines, as verbs.

    create ─► validating ─ lines valid ─► in_progress ─ all lines done ─► finalizing ─ files written ─► completed
                 │  │                         │  │                            │
                 │  └─ not valid ─► failed    │  └─ a day has passed ─► expired, with files of what was done
                 │                            │                               │
                 └──── cancel ────────────────┴─────► cancelling ◄────────────┘
                                                          └─ files of what was done ─► cancelled

    validating, with no runner ─ cancel ─► cancelled        validating ─ a day has passed ─► expired
    any of the first four ─ too many runs in a row ended badly, or its input is gone ─► failed

Whoever runs a batch has claimed it: fence one up, a lease on the database's clock. Every move is one UPDATE guarded by
that fence and by the status; of two runners one wins, and one that lost its lease writes nothing. Without a lease any
runner may claim it, and goes on after the lines that have a result. Terminal states absorb.

A line has its result once its `BatchLine` is there, which commits with the counts. The files are made of those rows,
and `worker.expiry` removes them once the batch has ended.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, delete, func, insert, or_, select, update
from sqlalchemy.orm import Session

from shared import files
from shared.batch_schemas import BatchCreate
from shared.db import clock, now
from shared.errors import BadRequest, Conflict, NotFound
from shared.ids import new_id
from shared.jobs import MAX_RETRY_DELAY_S, LeaseLost
from shared.models import BATCH_LIVE, BATCH_TERMINAL, Batch, BatchLine, BatchStatus, File, table_of

WINDOW_S = 24 * 3600
_KEEP = insert(table_of(BatchLine))
"""Without the ORM, which would make one statement for each number of rows: large ones, and every connection keeps its
last hundred."""
PURPOSE = "batch"


class BatchConflict(Conflict):
    """The batch is not in a state that allows the move."""


class Result(NamedTuple):
    """What became of one line."""

    line: int
    is_error: bool
    body: str
    """The line of the output or error file."""
    input_tokens: int = 0
    output_tokens: int = 0


def create(session: Session, project_id: str, request: BatchCreate) -> Batch:
    """Store a batch; a runner reads its file later.

    Raises:
        NotFound, BadRequest: the file is not the project's, or not for batches.
    """
    # Shared lock: nobody deletes the file before the batch that needs it is there.
    session.get(File, request.input_file_id, with_for_update={"read": True})
    file = files.get(session, project_id, request.input_file_id, param="input_file_id")
    if file.purpose != PURPOSE:
        raise BadRequest(f"file {file.id} has purpose {file.purpose!r}; it must be 'batch'", param="input_file_id")
    created_at = clock(session)
    batch = Batch(
        id=new_id("batch", "_"),
        project_id=project_id,
        status=BatchStatus.VALIDATING,
        endpoint=request.endpoint,
        completion_window=request.completion_window,
        input_file_id=file.id,
        output_expires_after_s=request.output_expires_after and request.output_expires_after.seconds,
        batch_metadata=request.metadata,
        created_at=created_at,
        expires_at=created_at + WINDOW_S,
    )
    session.add(batch)
    session.flush()
    return batch


def get(session: Session, project_id: str, batch_id: str) -> Batch:
    """The project's batch.

    Raises:
        NotFound: there is none of this id in the project.
    """
    batch = session.get(Batch, batch_id)
    if batch is None or batch.project_id != project_id:
        raise NotFound(f"there is no batch {batch_id[:100]!r}; GET /v1/batches lists yours")
    return batch


def request_cancel(session: Session, project_id: str, batch_id: str) -> Batch:
    """Cancel: a batch that nobody has looked into ends at once, any other as soon as a runner sees it. One that is
    cancelled, or about to be, stays so.

    Raises:
        NotFound: no such batch.
        BatchConflict: it has ended in another way.
    """
    get(session, project_id, batch_id)
    batch = session.get_one(Batch, batch_id, with_for_update=True, populate_existing=True)
    if batch.status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
        return batch
    if batch.status in BATCH_TERMINAL:
        raise BatchConflict(f"batch {batch_id} has already ended ({batch.status}); it can't be cancelled")
    batch.status, batch.cancelling_at = BatchStatus.CANCELLING, clock(session)
    if not batch.total and batch.lease_until is None:
        batch.status, batch.cancelled_at = BatchStatus.CANCELLED, batch.cancelling_at
    session.flush()
    return batch


def claim_next(session: Session, worker: str, lease_s: float) -> Batch | None:
    """Take the oldest batch that nobody runs: fence one up, lease started. None if there is none."""
    first = (
        select(Batch.id)
        .where(*_claimable())
        .order_by(Batch.created_at, Batch.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    return session.scalar(
        update(Batch)
        .where(Batch.id == first.scalar_subquery(), *_claimable())
        .values(fence=Batch.fence + 1, lease_until=now() + lease_s, worker=worker, not_before=None)
        .returning(Batch)
        .execution_options(populate_existing=True)
    )


def count_claimable(session: Session) -> int:
    """How many batches wait for a runner right now."""
    return session.scalar(select(func.count()).select_from(Batch).where(*_claimable())) or 0


def _claimable() -> tuple[ColumnElement[bool], ...]:
    ready = or_(Batch.not_before.is_(None), Batch.not_before <= now())
    return Batch.status.in_(BATCH_LIVE), Batch.lease_until.is_(None), ready


def look(session: Session, batch_id: str, fence: int) -> BatchStatus:
    """The status of a batch, for its runner.

    Raises:
        LeaseLost: it is not this claim's any more.
    """
    status = session.scalar(select(Batch.status).where(*_held(batch_id, fence)))
    if status is None:
        raise _lost(batch_id, fence)
    return BatchStatus(status)


def owned(session: Session, batch_id: str, fence: int, *also: ColumnElement[bool], **values: Any) -> Batch:
    """Write `values` to a batch as its runner; nobody else moves it before this transaction ends.

    Raises:
        LeaseLost: it is not this claim's any more, or not what `also` demands.
    """
    batch = session.scalar(
        update(Batch)
        .where(*_held(batch_id, fence), *also)
        .values({"fence": fence, **values})  # at least something
        .returning(Batch)
        .execution_options(populate_existing=True)
    )
    if batch is None:
        raise _lost(batch_id, fence)
    return batch


def renew_lease(session: Session, batch_id: str, fence: int, lease_s: float) -> BatchStatus:
    """Prolong a claim. Returns the status, which a client may have changed to `cancelling`.

    Raises:
        LeaseLost: as `owned`.
    """
    return BatchStatus(owned(session, batch_id, fence, lease_until=now() + lease_s).status)


def begin(session: Session, batch_id: str, fence: int, total: int, model: str) -> Batch:
    """validating → in_progress: every line is valid. One that is being cancelled learns only how many lines it has.

    Raises:
        LeaseLost: as `owned`.
    """
    batch = owned(session, batch_id, fence, total=total, model=model, has_lines=True)
    if batch.status == BatchStatus.VALIDATING:
        batch.status, batch.in_progress_at = BatchStatus.IN_PROGRESS, clock(session)
        session.flush()
    return batch


def record(session: Session, batch_id: str, fence: int, results: Sequence[Result], lease_s: float) -> Batch:
    """Keep results of lines, and prolong the claim. A line that has one keeps it: a commit whose confirmation was lost
    may be sent again.

    Raises:
        LeaseLost: as `owned`; nothing was kept.
    """
    owned(session, batch_id, fence)  # from here on nobody else records any
    lines = [result.line for result in results]
    known = set(
        session.scalars(select(BatchLine.line).where(BatchLine.batch_id == batch_id, BatchLine.line.in_(lines)))
    )
    kept = [result for result in results if result.line not in known]
    if kept:
        rows = [
            {"batch_id": batch_id, "line": result.line, "is_error": result.is_error, "body": result.body}
            for result in kept
        ]
        session.execute(_KEEP, rows)
    failed = sum(result.is_error for result in kept)
    return owned(
        session,
        batch_id,
        fence,
        completed=Batch.completed + len(kept) - failed,
        failed=Batch.failed + failed,
        input_tokens=Batch.input_tokens + sum(result.input_tokens for result in kept),
        output_tokens=Batch.output_tokens + sum(result.output_tokens for result in kept),
        faults=0 if kept else Batch.faults,
        lease_until=now() + lease_s,
    )


def finished_lines(session: Session, batch_id: str) -> set[int]:
    """Numbers of the lines that have a result."""
    return set(session.scalars(select(BatchLine.line).where(BatchLine.batch_id == batch_id)))


def next_results(session: Session, batch_id: str, *, is_error: bool, after: int, limit: int) -> list[BatchLine]:
    """Results that go into one of the two files, in the order of their lines."""
    rows = select(BatchLine).where(
        BatchLine.batch_id == batch_id, BatchLine.is_error == is_error, BatchLine.line > after
    )
    return list(session.scalars(rows.order_by(BatchLine.line).limit(limit)))


def begin_finalizing(session: Session, batch_id: str, fence: int) -> Batch:
    """in_progress → finalizing. One that is being cancelled stays that.

    Raises:
        LeaseLost: as `owned`.
    """
    batch = owned(session, batch_id, fence)
    if batch.status == BatchStatus.IN_PROGRESS:
        batch.status, batch.finalizing_at = BatchStatus.FINALIZING, clock(session)
        session.flush()
    return batch


def finish(session: Session, batch_id: str, fence: int, to: BatchStatus, **values: Any) -> Batch:
    """A live batch → `to`, or `cancelled` if that was asked for meanwhile. The caller has registered the files in the
    same transaction.

    Raises:
        LeaseLost: as `owned`.
    """
    batch = owned(session, batch_id, fence, lease_until=None, worker=None, **values)
    ended = BatchStatus.CANCELLED if batch.status == BatchStatus.CANCELLING and to != BatchStatus.FAILED else to
    assert ended in BATCH_TERMINAL
    batch.status = ended
    setattr(batch, f"{ended}_at", clock(session))
    session.flush()
    return batch


def fail(session: Session, batch_id: str, fence: int, errors: Sequence[dict[str, Any]]) -> Batch:
    """A live batch → failed, with reasons as OpenAI's `batch.errors` has them. One that is being cancelled is, all the
    same.

    Raises:
        LeaseLost: as `owned`.
    """
    batch = owned(session, batch_id, fence)
    if batch.status == BatchStatus.CANCELLING:
        return finish(session, batch_id, fence, BatchStatus.CANCELLED)
    return finish(session, batch_id, fence, BatchStatus.FAILED, errors=list(errors))


def give_back(session: Session, batch_id: str, fence: int, delay_s: float = 0) -> None:
    """End a claim without blame: any runner may go on, at once or a little later.

    Raises:
        LeaseLost: as `owned`.
    """
    owned(session, batch_id, fence, lease_until=None, worker=None, not_before=now() + delay_s)


def postpone_or_fail(
    session: Session, batch_id: str, fence: int, reason: str, max_faults: int, delay_s: float
) -> Batch:
    """End a claim that went wrong. The next one waits `delay_s`, twice as long each time; the batch ends once
    `max_faults` in a row brought no line its result: failed, or expired early if some lines have theirs.

    Raises:
        LeaseLost: as `owned`.
    """
    batch = owned(session, batch_id, fence, faults=Batch.faults + 1)
    if batch.faults >= max_faults:
        message = f"{reason} ({batch.faults} times in a row); create the batch again, or ask the operator"
        error = {"code": "infrastructure_fault", "line": None, "message": message, "param": None}
        has_answers = batch.status == BatchStatus.IN_PROGRESS and batch.completed + batch.failed > 0
        if not has_answers or batch.expires_at <= clock(session):
            return fail(session, batch_id, fence, [error])
        # Its answers are kept: it expires at once, and whoever claims it next writes the files.
        return owned(session, batch_id, fence, lease_until=None, worker=None, errors=[error], expires_at=now())
    wait_s = min(delay_s * 2 ** (batch.faults - 1), MAX_RETRY_DELAY_S)
    return owned(session, batch_id, fence, lease_until=None, worker=None, not_before=now() + wait_s)


def expire_leases(session: Session, max_faults: int) -> list[Batch]:
    """End every claim whose lease has run out: its runner is dead or cut off."""
    expired = session.scalars(
        select(Batch)
        .where(Batch.status.in_(BATCH_LIVE), Batch.lease_until < now())
        .limit(100)
        .with_for_update(skip_locked=True)
    ).all()
    return [
        postpone_or_fail(session, batch.id, batch.fence, f"worker {batch.worker} fell silent", max_faults, 0)
        for batch in expired
    ]


def find_ended_with_lines(session: Session, limit: int) -> list[str]:
    """Ids of batches to `remove_lines` of."""
    ended = select(Batch.id).where(Batch.has_lines.is_(True), Batch.status.in_(BATCH_TERMINAL))
    return list(session.scalars(ended.limit(limit)))


def remove_lines(session: Session, batch_id: str, limit: int) -> int:
    """Remove at most that many results of a batch that has ended: its files have them. Returns how many that were."""
    table = table_of(BatchLine)
    lines = select(table.c.line).where(table.c.batch_id == batch_id).order_by(table.c.line).limit(limit)
    gone = session.execute(
        delete(table).where(table.c.batch_id == batch_id, table.c.line.in_(lines)).returning(table.c.line)
    )
    removed = len(gone.all())
    if removed < limit:
        session.execute(update(Batch).where(Batch.id == batch_id).values(has_lines=False))
    return removed


def _held(batch_id: str, fence: int) -> tuple[ColumnElement[bool], ...]:
    # A claim that was given back, or expired, is over even before somebody else claims.
    return Batch.id == batch_id, Batch.fence == fence, Batch.status.in_(BATCH_LIVE), Batch.lease_until.is_not(None)


def _lost(batch_id: str, fence: int) -> LeaseLost:
    return LeaseLost(f"batch {batch_id} is no longer run by claim {fence}")
