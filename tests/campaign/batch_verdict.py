"""The verdict on batches: each has ended as it may, and every line has exactly one result, which it kept.

Reads `Evidence` and what the harness knows, as `verdict` does.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

from tests.campaign.batch_clients import ENDED
from tests.campaign.batch_plan import COMPLETIONS, REFUSED, TOO_LONG, BatchPlan, LinePlan
from tests.campaign.evidence import BatchRecord, Evidence, ResultRow
from tests.campaign.findings import Finding, Known
from tests.campaign.generator import Asked

GIVEN_UP = {"cancelled": "batch_cancelled", "expired": "batch_expired"}
GENERATOR_FAULTS = ("generator_lost", "generator_crashed")
"""A line on whose account several generators have died may have one of these for its result."""


def judge(evidence: Evidence, known: Known) -> Iterator[Finding]:
    """Every finding about batches."""
    for batch in evidence.batches:
        plan = known.batch_plans.get(batch.number)
        if plan is None:
            yield Finding("unknown_job", batch.id, f"nobody sent batch number {batch.number}")
            continue
        subject = f"batch {batch.number} ({batch.id})"
        for name, check in BATCH_CHECKS.items():
            yield from (Finding(name, subject, what) for what in check(batch, plan, known))
        yield from (Finding("line_twice", subject, what) for what in _asked_again(batch, plan, known, evidence.asked))
    present = {batch.id for batch in evidence.batches}
    for sent in known.batches:
        if sent.batch_id not in present:
            yield Finding("batch_lost", f"batch {sent.plan.index}", f"{sent.batch_id} is not in the database")
    yield from _files(evidence)
    for what in known.lines_changed:
        yield Finding("line_twice", "database", what)


def _ended(batch: BatchRecord, plan: BatchPlan, known: Known) -> Iterator[str]:
    if batch.status not in ENDED:
        yield f"it is still {batch.status}"
    elif batch.status not in plan.allowed_ends:
        yield f"it is {batch.status} {list(batch.error_codes)}, expected {' or '.join(plan.allowed_ends)}"
    elif batch.status == "failed" and set(batch.error_codes) != {REFUSED.get(plan.behaviour)}:
        yield f"it failed with {list(batch.error_codes)}, expected {REFUSED.get(plan.behaviour)}"
    if batch.status in ENDED and batch.rows_left:
        yield f"it has ended, and {batch.rows_left} results of lines were never removed"
    if batch.status in ENDED and batch.has_lease:
        yield "it has ended, and somebody holds it"


def _told(batch: BatchRecord, plan: BatchPlan, known: Known) -> Iterator[str]:
    for sent in known.batches:
        if sent.batch_id != batch.id:
            continue
        if sent.cancel_answer in ("cancelling", "cancelled") and batch.status != "cancelled":
            yield f"its cancellation was answered with `{sent.cancel_answer}`, and it is {batch.status}"
        if sent.last_seen in ENDED and sent.last_seen != batch.status:
            yield f"a client saw it {sent.last_seen}, and it is {batch.status}"


def _counted(batch: BatchRecord, plan: BatchPlan, known: Known) -> Iterator[str]:
    """Counts equal what is in the files, and together all lines of the input."""
    if batch.status not in ENDED:
        return
    for what, count, rows in (("completed", batch.completed, batch.output), ("failed", batch.failed, batch.errors)):
        if rows is not None and len(rows) != count:
            yield f"it counts {count} lines {what}, its file has {len(rows)}"
        if (rows is None) != (count == 0):
            yield f"it counts {count} lines {what}, and its file is {'not there' if rows is None else 'there'}"
    # One that was cancelled before anybody looked into its file knows of no lines.
    if batch.total != len(plan.lines) and not (batch.total == 0 and batch.status in ("cancelled", "failed")):
        yield f"it counts {batch.total} lines, its input has {len(plan.lines)}"
    if batch.completed + batch.failed != batch.total:
        yield f"it is {batch.status} with {batch.completed} lines completed and {batch.failed} failed of {batch.total}"
    tokens = [(row.input_tokens, row.output_tokens) for row in batch.output or ()]
    if (batch.input_tokens, batch.output_tokens) != (sum(i for i, _ in tokens), sum(o for _, o in tokens)):
        yield f"it counts {batch.input_tokens} and {batch.output_tokens} tokens, other than its lines together"


def _each_once(batch: BatchRecord, plan: BatchPlan, known: Known) -> Iterator[str]:
    """Every custom_id is exactly once in the two files together."""
    if batch.status not in ENDED or not batch.total:
        return
    count = Counter(row.custom_id for row in batch.rows)
    for line in plan.lines:
        if count[line.custom_id] != 1:
            yield f"{line.custom_id} has {count[line.custom_id]} results"
    if unknown := sorted(count.keys() - {line.custom_id for line in plan.lines}):
        yield f"there are results of {unknown}, which nobody asked for"
    if len({row.id for row in batch.rows}) != len(batch.rows):
        yield "two results have the same id"


def _answered(batch: BatchRecord, plan: BatchPlan, known: Known) -> Iterator[str]:
    """Each result is one that its line may have."""
    lines = {line.custom_id: line for line in plan.lines}
    given_up = GIVEN_UP.get(batch.status)
    for row in batch.output or ():
        if row.custom_id in lines:
            yield from _whole(row, lines[row.custom_id], plan)
    for row in batch.errors or ():
        line = lines.get(row.custom_id)
        allowed = {given_up, *GENERATOR_FAULTS} | ({TOO_LONG} if line is not None and line.is_too_long else set())
        if row.code not in allowed:
            yield f"{row.custom_id} has the error {row.code}"


def _whole(row: ResultRow, line: LinePlan, plan: BatchPlan) -> Iterator[str]:
    choices = row.body.get("choices", [])
    if row.status_code != 200 or len(choices) != 1 or not choices[0].get("finish_reason"):
        yield f"{row.custom_id} is no whole answer: {json.dumps(row.body)[:200]}"
    elif line.is_too_long:
        yield f"{row.custom_id} is too long for the model, and was answered"
    elif plan.endpoint == COMPLETIONS and not choices[0]["text"].startswith(line.text):
        yield f"{row.custom_id} has another's answer: {choices[0]['text'][:100]!r}"
    elif row.output_tokens > plan.max_tokens + (len(line.text) if plan.endpoint == COMPLETIONS else 0):
        yield f"{row.custom_id} has {row.output_tokens} tokens, asked for were {plan.max_tokens}"


def _kept(batch: BatchRecord, plan: BatchPlan, known: Known) -> Iterator[str]:
    """A result that was once seen recorded is in its file, word for word: in a cancelled batch's too."""
    if batch.status not in ENDED:
        return
    files = {True: {row.sha256 for row in batch.errors or ()}, False: {row.sha256 for row in batch.output or ()}}
    for (batch_id, line), recorded in known.lines_recorded.items():
        if batch_id == batch.id and recorded.sha256 not in files[recorded.is_error]:
            yield f"the result of line {line} was recorded by {recorded.seen_at:.1f}, and is not in its file"


def _asked_again(batch: BatchRecord, plan: BatchPlan, known: Known, asked: Sequence[Asked]) -> Iterator[str]:
    """A line whose result is recorded is not asked again, by whoever comes to the batch after that.

    A runner that had begun before, was stopped and lost its claim may ask a little more until it notices.
    """
    numbers = {line.text: number for number, line in enumerate(plan.lines, start=1)}
    questions = [question for question in asked if question.text in numbers]
    began: dict[str, float] = {}
    for question in questions:
        began[question.reader] = min(question.submitted_at, began.get(question.reader, question.submitted_at))
    for question in questions:
        number = numbers[question.text]
        recorded = known.lines_recorded.get((batch.id, number))
        if recorded is not None and began[question.reader] > recorded.seen_at:
            late_s = question.submitted_at - recorded.seen_at
            yield f"line {number} was asked again {late_s:.1f} s after its result was recorded"


BATCH_CHECKS: dict[str, Callable[[BatchRecord, BatchPlan, Known], Iterator[str]]] = {
    "batch_lost": _ended,
    "batch_cancel_broken": _told,
    "batch_counts": _counted,
    "batch_lines": _each_once,
    "batch_answers": _answered,
    "line_lost": _kept,
}


def _files(evidence: Evidence) -> Iterator[Finding]:
    """Each output or error file belongs to exactly one batch."""
    owners = defaultdict(list)
    for batch in evidence.batches:
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id is not None:
                owners[file_id].append(batch.id)
    for file_id in sorted({*owners, *evidence.batch_files}):
        if file_id not in evidence.batch_files or len(owners[file_id]) != 1:
            is_there = file_id in evidence.batch_files
            what = f"it is {'there' if is_there else 'gone'}, and {owners[file_id]} name it"
            yield Finding("batch_files", file_id, what)
