"""/v1/batches: create, list, retrieve, cancel. `worker batch` reads and answers the requests in a batch's file."""

from fastapi import APIRouter
from sqlalchemy import select

from api.deps import Caller, OutboxDep
from api.idempotency import OnceDep
from api.paging import After, Limit, page
from shared import answers, batches
from shared.batch_schemas import BatchCreate, BatchObject
from shared.db import reading, transaction
from shared.models import BATCH_TERMINAL, Batch
from shared.schemas import Page

router = APIRouter(prefix="/batches", tags=["batches"])


@router.post("")
def create_batch(request: BatchCreate, caller: Caller, outbox: OutboxDep, once: OnceDep) -> BatchObject:
    """Store a batch. Its file is read afterwards: `status` and `errors` say what came of it.

    What is not answered within a day is left: the batch expires, and keeps what was done.
    """
    with transaction() as session:
        batch = batches.create(session, caller.project_id, request)
        answer = once.keep(session, batch.id, BatchObject.of(batch))
    outbox.batches_wait()
    return answer


@router.get("")
def list_batches(caller: Caller, limit: Limit = 20, after: After = None) -> Page[BatchObject]:
    """The project's batches, newest first."""
    query = select(Batch).where(Batch.project_id == caller.project_id)
    with reading() as session:
        rows, more = page(session, query, Batch, after=after, limit=limit)
    return Page.of([BatchObject.of(row) for row in rows], more, [row.id for row in rows])


@router.get("/{batch_id}")
def retrieve_batch(batch_id: str, caller: Caller) -> BatchObject:
    """A batch as it is now."""
    with reading() as session:
        return BatchObject.of(batches.get(session, caller.project_id, batch_id))


@router.post("/{batch_id}/cancel")
def cancel_batch(batch_id: str, caller: Caller, outbox: OutboxDep, once: OnceDep) -> BatchObject:
    """A batch that is being run is `cancelling` at first. Its output file gets what was answered.

    The requests that were not are in its error file.
    """
    with transaction() as session:
        batch = batches.request_cancel(session, caller.project_id, batch_id)
        answers.forget_creation(session, batch_id)
        answer = once.keep(session, None, BatchObject.of(batch))
    if batch.status not in BATCH_TERMINAL:
        outbox.batches_wait()
    return answer
