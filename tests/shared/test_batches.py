"""Batches' rows: of two runners one wins, a stale one writes nothing, and what has ended stays as it is."""

import pytest
from sqlalchemy import func, select, update

from shared import batches, files
from shared.batches import BatchConflict, Result
from shared.db import now, reading, transaction
from shared.errors import BadRequest, Conflict, NotFound
from shared.jobs import LeaseLost
from shared.models import Batch, BatchLine, BatchStatus, File
from shared.settings import Settings
from tests.batch_rows import MODEL, batch_of, chat_line, make_batch
from tests.rows import file_row
from worker import expiry


def claim(lease_s: float = 60) -> Batch | None:
    with transaction() as session:
        return batches.claim_next(session, "test-worker", lease_s)


def begun(settings: Settings, total: int = 3) -> Batch:
    """A claimed batch of which every line is valid."""
    make_batch(settings, [chat_line("hi")])
    batch = claim()
    assert batch is not None
    with transaction() as session:
        return batches.begin(session, batch.id, batch.fence, total, MODEL)


def record(batch: Batch, *lines: int, is_error: bool = False) -> Batch:
    results = [Result(line, is_error, "{}", 3, 4) for line in lines]
    with transaction() as session:
        return batches.record(session, batch.id, batch.fence, results, 60)


def cancel(batch_id: str) -> BatchStatus:
    with transaction() as session:
        return batches.request_cancel(session, "default", batch_id).status


def finish(batch: Batch, to: BatchStatus = BatchStatus.COMPLETED) -> Batch:
    with transaction() as session:
        return batches.finish(session, batch.id, batch.fence, to)


def count_lines() -> int:
    with reading() as session:
        return session.scalar(select(func.count()).select_from(BatchLine)) or 0


def test_a_batch_at_its_wits_end_keeps_the_answers_it_has(settings: Settings) -> None:
    """It expires at once, so that whoever claims it next writes its files; only one without any answer fails."""
    batch = begun(settings)
    record(batch, 1)
    for _ in range(3):
        with transaction() as session:
            batches.postpone_or_fail(session, batch.id, batch.fence, "no luck", 3, 0)
        again = claim()
        assert again is not None
        batch = again
    assert batch.status == BatchStatus.IN_PROGRESS
    assert batch.expires_at <= batch_of(batch.id).created_at + 60
    assert batch.errors is not None
    assert batch.errors[0]["code"] == "infrastructure_fault"
    with transaction() as session:
        batches.postpone_or_fail(session, batch.id, batch.fence, "no luck", 3, 0)
    assert batch_of(batch.id).status == BatchStatus.FAILED, "not for ever"


def test_the_oldest_batch_is_claimed_once(settings: Settings) -> None:
    first, second = (make_batch(settings, [chat_line("hi")]) for _ in range(2))
    with transaction() as session:
        session.execute(update(Batch).where(Batch.id == second).values(created_at=Batch.created_at + 1))
    claims = [claim(), claim(), claim()]
    assert [batch and (batch.id, batch.fence) for batch in claims] == [(first, 1), (second, 1), None]


def test_counts_and_tokens_follow_the_results_and_a_repeat_changes_nothing(settings: Settings) -> None:
    batch = begun(settings)
    record(batch, 1, 2)
    record(batch, 3, is_error=True)
    again = record(batch, 2, 3)
    assert (again.total, again.completed, again.failed) == (3, 2, 1)
    assert (again.input_tokens, again.output_tokens) == (9, 12)
    with reading() as session:
        assert batches.finished_lines(session, batch.id) == {1, 2, 3}
        assert [row.line for row in batches.next_results(session, batch.id, is_error=True, after=0, limit=9)] == [3]


def test_a_claim_that_is_over_writes_nothing(settings: Settings) -> None:
    batch = begun(settings)
    with transaction() as session:
        session.execute(update(Batch).values(lease_until=now() - 1))
        assert [row.id for row in batches.expire_leases(session, 20)] == [batch.id]
    for attempt in (
        lambda: record(batch, 1),
        lambda: finish(batch),
    ):
        with pytest.raises(LeaseLost):
            attempt()
    successor = claim()
    assert successor is not None and successor.fence == batch.fence + 1
    with pytest.raises(LeaseLost):
        record(batch, 1)
    assert count_lines() == 0
    assert record(successor, 1).completed == 1


def test_a_lease_that_is_renewed_does_not_expire(settings: Settings) -> None:
    batch = begun(settings)
    with transaction() as session:
        session.execute(update(Batch).values(lease_until=now() - 1))
        assert batches.renew_lease(session, batch.id, batch.fence, 60) == BatchStatus.IN_PROGRESS
        assert batches.expire_leases(session, 20) == []


def test_a_batch_that_takes_every_worker_down_fails_in_the_end(settings: Settings) -> None:
    make_batch(settings, [chat_line("hi")])
    for _ in range(3):
        assert claim() is not None
        with transaction() as session:
            session.execute(update(Batch).values(lease_until=now() - 1))
            (batch,) = batches.expire_leases(session, 3)
    assert batch.status == BatchStatus.FAILED and batch.failed_at is not None
    assert batch.errors is not None and batch.errors[0]["code"] == "infrastructure_fault"
    assert claim() is None


def test_faults_in_a_row_are_forgotten_with_a_result(settings: Settings) -> None:
    batch = begun(settings)
    with transaction() as session:
        batches.postpone_or_fail(session, batch.id, batch.fence, "no luck", 3, 0)
    again = claim()
    assert again is not None and again.faults == 1
    assert record(again, 1).faults == 0


def test_a_postponed_batch_is_not_claimed_at_once(settings: Settings) -> None:
    batch = begun(settings)
    with transaction() as session:
        batches.postpone_or_fail(session, batch.id, batch.fence, "no luck", 3, 60)
    assert claim() is None
    with transaction() as session:
        session.execute(update(Batch).values(not_before=now() - 1))
    assert claim() is not None


def test_a_batch_nobody_has_looked_into_is_cancelled_at_once(settings: Settings) -> None:
    batch_id = make_batch(settings, [chat_line("hi")])
    assert cancel(batch_id) == cancel(batch_id) == BatchStatus.CANCELLED
    batch = batch_of(batch_id)
    assert batch.cancelling_at == batch.cancelled_at is not None
    assert claim() is None


def test_a_cancel_that_races_with_the_end_wins_or_is_refused(settings: Settings) -> None:
    batch = begun(settings)
    with transaction() as session:
        batches.begin_finalizing(session, batch.id, batch.fence)
    assert cancel(batch.id) == BatchStatus.CANCELLING
    assert finish(batch).status == BatchStatus.CANCELLED
    other = begun(settings)
    assert finish(other).status == BatchStatus.COMPLETED
    with pytest.raises(BatchConflict, match="already ended"):
        cancel(other.id)


@pytest.mark.parametrize("end", [BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.FAILED])
def test_what_has_ended_stays_as_it_is(end: BatchStatus, settings: Settings) -> None:
    batch = begun(settings)
    ended = finish(batch, end)
    assert getattr(ended, f"{end}_at") is not None
    with pytest.raises(LeaseLost):
        finish(batch, BatchStatus.COMPLETED)
    with pytest.raises(LeaseLost), transaction() as session:
        batches.give_back(session, batch.id, batch.fence)
    assert batch_of(batch.id).status == end and claim() is None


def test_a_file_that_a_live_batch_needs_neither_goes_nor_expires(settings: Settings) -> None:
    batch = begun(settings)
    with pytest.raises(Conflict, match=batch.id), transaction() as session:
        files.delete(session, "default", batch.input_file_id)
    with transaction() as session:
        session.execute(update(File).values(expires_at=now() - 1))
    assert expiry.remove_expired(settings) == 0
    finish(batch)
    assert expiry.remove_expired(settings) == 1


def test_results_go_once_the_batch_has_ended_in_bounded_steps(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry, "MOST_LINES", 2)
    batch = begun(settings)
    record(batch, 1, 2, 3)
    expiry.remove_expired(settings)
    assert count_lines() == 3
    finish(batch)
    left = []
    for _ in range(3):
        expiry.remove_expired(settings)
        left.append(count_lines())
    assert left == [1, 0, 0]
    assert not batch_of(batch.id).has_lines


def test_only_a_file_for_batches_of_the_same_project_will_do(settings: Settings) -> None:
    with transaction() as session:
        training = file_row(session)
        foreign = file_row(session, project_id="other", purpose="batch")
        gone = file_row(session, purpose="batch", expires_after_s=-1)
    for file_id, error in ((training, BadRequest), (foreign, NotFound), (gone, NotFound), ("file-x", NotFound)):
        request = batches.BatchCreate(input_file_id=file_id, endpoint="/v1/completions", completion_window="24h")
        with pytest.raises(error) as caught, transaction() as session:
            batches.create(session, "default", request)
        assert caught.value.param == "input_file_id"
