"""Batches of a campaign: its seed gives the same again, and each lie that is planted in what became of one is found."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from shared.models import Base, Batch, BatchLine, BatchStatus
from tests.campaign import batch_plan
from tests.campaign.batch_plan import BatchPlan, LinePlan
from tests.campaign.batch_verdict import judge
from tests.campaign.batch_watch import LineWatch, Recorded
from tests.campaign.chat import stream_outcome
from tests.campaign.evidence import BatchRecord, Evidence, ResultRow, result_row
from tests.campaign.findings import Known
from tests.campaign.generator import Asked
from tests.campaign.notebook import SentBatch

LINES = (LinePlan("b0-0", "one", False), LinePlan("b0-1", "two", False), LinePlan("b0-2", "three", True))
PLAN = BatchPlan(0, "finish", "/v1/completions", LINES, 5, None, uses_key=True, is_sent_in_parts=False)
CANCELLED = dataclasses.replace(PLAN, behaviour="cancel", cancel_after_s=0)


def result(number: int, *, text: str | None = None, code: str | None = None) -> ResultRow:
    """An answer of `text`, or an error."""
    body: dict[str, Any] = {"choices": [{"text": text, "finish_reason": "stop"}]}
    body["usage"] = {"prompt_tokens": 3, "completion_tokens": 4}
    response = {"status_code": 200, "request_id": "req_a", "body": body}
    error = {"code": code, "message": "x"}
    said = {"id": f"batch_req_{number}", "custom_id": f"b0-{number}", "response": None, "error": None}
    said |= {"response": response} if code is None else {"error": error}
    return result_row(json.dumps(said).encode())


OUTPUT = (result(0, text="one and more"), result(1, text="two and more"))
ERRORS = (result(2, code=batch_plan.TOO_LONG),)
GOOD = BatchRecord(
    id="batch_a",
    number=0,
    status="completed",
    error_codes=(),
    fence=2,
    has_lease=False,
    total=3,
    completed=2,
    failed=1,
    input_tokens=6,
    output_tokens=8,
    output_file_id="file-out",
    error_file_id="file-err",
    output=OUTPUT,
    errors=ERRORS,
    rows_left=0,
)
PARTIAL = dataclasses.replace(
    GOOD,
    status="cancelled",
    completed=1,
    failed=2,
    input_tokens=3,
    output_tokens=4,
    output=OUTPUT[:1],
    errors=(result(1, code="batch_cancelled"), result(2, code="batch_cancelled")),
)
UNSEEN = dataclasses.replace(
    PARTIAL,
    total=0,
    completed=0,
    failed=0,
    input_tokens=0,
    output_tokens=0,
    output=None,
    errors=None,
    output_file_id=None,
    error_file_id=None,
)
"""Cancelled before anybody looked into it."""
DUPLICATE = dataclasses.replace(PLAN, behaviour="duplicate")
REFUSED = dataclasses.replace(UNSEEN, status="failed", error_codes=("duplicate_custom_id",))


def found(
    batch: BatchRecord, plan: BatchPlan = PLAN, *, asked: tuple[Asked, ...] = (), files: Any = None, **known: Any
) -> set[str]:
    there = [name for name in (batch.output_file_id, batch.error_file_id) if name] if files is None else files
    evidence = Evidence((), (), batches=(batch,), batch_files=tuple(there), asked=asked)
    facts = Known(plans={}, references=lambda _: None, batch_plans={0: plan}, **known)  # type: ignore[arg-type]
    return {finding.check for finding in judge(evidence, facts)}


def lie(**changes: Any) -> BatchRecord:
    return dataclasses.replace(GOOD, **changes)


def partial(**changes: Any) -> BatchRecord:
    return dataclasses.replace(PARTIAL, **changes)


def recorded(row: ResultRow, line: int, *, is_error: bool = False) -> dict[tuple[str, int], Recorded]:
    return {("batch_a", line): Recorded(100.0, is_error, row.sha256)}


def test_a_seed_gives_the_same_batches_again_and_clients_have_every_habit() -> None:
    batches = [batch_plan.batch(3, number) for number in range(100)]
    assert batches == [batch_plan.batch(3, number) for number in range(100)]
    assert batches != [batch_plan.batch(4, number) for number in range(100)]
    assert {batch.behaviour for batch in batches} == {name for name, _ in batch_plan.BEHAVIOURS}
    assert {batch.endpoint for batch in batches} == {batch_plan.CHAT, batch_plan.COMPLETIONS}
    assert {batch.uses_key for batch in batches} == {batch.is_sent_in_parts for batch in batches} == {True, False}
    texts = [line.text for batch in batches for line in batch.lines]
    assert len(set(texts)) == len(texts), "a text says which line was asked"


def test_what_went_well_is_found_well() -> None:
    sent = SentBatch(PLAN, "batch_a", last_seen="completed")
    assert found(GOOD, batches=[sent], lines_recorded=recorded(OUTPUT[0], 1)) == set()
    assert found(PARTIAL, CANCELLED, lines_recorded=recorded(OUTPUT[0], 1)) == set()
    assert found(UNSEEN, CANCELLED) == found(REFUSED, DUPLICATE) == set()


@pytest.mark.parametrize(
    ("check", "batch"),
    [
        ("batch_lost", lie(status="in_progress")),
        ("batch_lost", lie(status="cancelled")),
        ("batch_lost", lie(status="failed", error_codes=("infrastructure_fault",))),
        ("batch_lost", lie(rows_left=2)),
        ("batch_lost", lie(has_lease=True)),
        ("batch_counts", lie(completed=3)),
        ("batch_counts", lie(output=OUTPUT[:1])),
        ("batch_counts", lie(output=None, output_file_id=None)),
        ("batch_counts", lie(total=2)),
        ("batch_counts", lie(total=4)),
        ("batch_counts", lie(output_tokens=9)),
        ("batch_lines", lie(output=(OUTPUT[0], OUTPUT[0]))),
        ("batch_lines", lie(output=(*OUTPUT, result(2, text="three"), result(9, text="nine")), completed=4)),
        ("batch_answers", lie(output=(OUTPUT[0], result(1, text="one and more")))),
        ("batch_answers", lie(errors=(result(2, code="batch_cancelled"),))),
        ("batch_answers", lie(errors=(result(2, code="internal_error"),))),
        ("unknown_job", lie(number=7)),
    ],
)
def test_a_lie_is_found(check: str, batch: BatchRecord) -> None:
    assert check in found(batch)


def test_a_batch_nobody_has_any_more_is_lost() -> None:
    assert found(GOOD, batches=[SentBatch(PLAN, "another")]) == {"batch_lost"}


def test_a_broken_promise_to_a_client_is_found() -> None:
    assert found(GOOD, batches=[SentBatch(PLAN, "batch_a", cancel_answer="cancelling")]) == {"batch_cancel_broken"}
    assert found(GOOD, batches=[SentBatch(PLAN, "batch_a", last_seen="expired")]) == {"batch_cancel_broken"}


def test_a_refusal_for_another_reason_is_found() -> None:
    other = dataclasses.replace(REFUSED, error_codes=("infrastructure_fault",))
    assert found(other, DUPLICATE) == {"batch_lost"}


def test_a_cancelled_batch_that_lost_its_partial_results_is_found() -> None:
    lost = partial(output=None, output_file_id=None, completed=0, failed=3, input_tokens=0, output_tokens=0)
    lost = dataclasses.replace(lost, errors=(result(0, code="batch_cancelled"), *(PARTIAL.errors or ())))
    assert found(lost, CANCELLED) == set(), "nothing was seen of the partial results"
    assert found(lost, CANCELLED, lines_recorded=recorded(OUTPUT[0], 1)) == {"line_lost"}


def test_a_result_that_is_not_the_recorded_one_is_found() -> None:
    assert found(GOOD, lines_recorded=recorded(result(0, text="one otherwise"), 1)) == {"line_lost"}
    assert found(GOOD, lines_recorded=recorded(OUTPUT[0], 1, is_error=True)) == {"line_lost"}
    assert found(GOOD, lines_changed=["line 1 had a result, and has another"]) == {"line_twice"}


def test_a_line_that_is_asked_again_after_its_result_was_recorded_is_found() -> None:
    seen = recorded(OUTPUT[0], 1)
    first = Asked("gen-1", 90.0, "replies-a", "one")
    before, after = Asked("gen-2", 95.0, "replies-b", "two"), Asked("gen-3", 120.0, "replies-b", "one")
    assert found(GOOD, asked=(first, before), lines_recorded=seen) == set()
    assert found(GOOD, asked=(first, after), lines_recorded=seen) == {"line_twice"}
    assert found(GOOD, asked=(first, before, after), lines_recorded=seen) == set(), (
        "it had begun before, and was stopped"
    )


def test_files_of_no_batch_and_batches_without_files_are_found() -> None:
    assert found(GOOD, files=["file-out", "file-err", "file-other"]) == {"batch_files"}
    assert found(GOOD, files=["file-out"]) == {"batch_files"}


def test_the_watch_sees_a_result_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.campaign.batch_watch.LOOK_EVERY_S", 0)
    engine = create_engine(f"sqlite:///{tmp_path}/a.db")
    Base.metadata.create_all(engine)
    watch = LineWatch(lambda: engine)
    with Session(engine) as session:
        batch = Batch(id="b", project_id="p", status=BatchStatus.IN_PROGRESS, endpoint="e", completion_window="24h")
        batch.input_file_id, batch.created_at, batch.expires_at = "file-a", 0, 1
        session.add(batch)
        session.add(BatchLine(batch_id="b", line=1, is_error=False, body="first"))
        session.commit()
        watch.look()
        watch.look()
        assert (list(watch.recorded), watch.changed) == ([("b", 1)], [])
        session.get_one(BatchLine, ("b", 1)).body = "second"
        session.commit()
        watch.look()
    assert len(watch.changed) == 1


def test_a_stream_with_anothers_answer_or_without_its_end_is_no_answer() -> None:
    def stream(*pieces: dict[str, Any]) -> str:
        return "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n"

    begun = {"choices": [{"text": "my question ", "finish_reason": None}]}
    ended = {"choices": [{"text": "x", "finish_reason": "stop"}]}
    assert stream_outcome(stream(begun, ended), "my question") == "answer"
    assert stream_outcome(stream(begun, ended), "your question").startswith("another's answer")
    assert stream_outcome(stream(begun), "my question").startswith("not whole")
    assert stream_outcome(stream(begun, ended).removesuffix("data: [DONE]\n\n").rstrip() + "\n\n") == "broken"
