"""What must hold of batches: at any instant, whoever has just died; and at rest. Each breach is a sentence."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared import storage
from shared.files import BATCH_OUTPUT_PURPOSE
from shared.models import BATCH_LIVE, BATCH_TERMINAL, Batch, BatchLine, File
from tests.failpoints.scenario import Facts
from tests.failpoints.world import World

GIVEN_UP = {"cancelled": "batch_cancelled", "expired": "batch_expired"}
REFUSAL = "context_length_exceeded"
"""Of the generator, for texts that begin with `refuse`."""


def at_any_instant(world: World, session: Session) -> Iterator[str]:
    """Counts are those of the recorded lines, files are whole and belong to one batch, what is needed is there."""
    owners: Counter[str] = Counter()
    for batch in session.scalars(select(Batch)):
        owners.update(name for name in (batch.output_file_id, batch.error_file_id) if name is not None)
        if batch.status in BATCH_LIVE:
            yield from _of_live(session, batch)
        else:
            yield from _files(world, batch)
    for file_id in session.scalars(select(File.id).where(File.purpose == BATCH_OUTPUT_PURPOSE)):
        if owners[file_id] != 1:
            yield f"{owners[file_id]} batches name the file {file_id}"
    for file_id in owners:
        if session.get(File, file_id) is None:
            yield f"a batch names the file {file_id}, which has no row"


def at_rest(world: World, facts: Facts, session: Session) -> Iterator[str]:
    """Every batch has ended as it should, with one result for each line; no line that had one was asked again."""
    made = sum(entry["what"] == "create-batch" for entry in world.journal())
    all_batches = session.scalars(select(Batch)).all()
    if made and len(all_batches) > made:
        yield f"{len(all_batches)} batches after {made} requests"
    for batch_id in facts.get("batch_ends", {}):
        if session.get(Batch, batch_id) is None:
            yield f"batch {batch_id} is lost"
    for batch in all_batches:
        allowed = facts.get("batch_ends", {}).get(batch.id, ["completed"])
        if batch.status not in allowed:
            yield f"batch {batch.id} ended as {batch.status} ({batch.errors}); it should be {allowed}"
        if batch.lease_until is not None or batch.has_lines:
            yield f"batch {batch.id} has ended, with a lease until {batch.lease_until}, lines: {batch.has_lines}"
        yield from _results(world, batch)
    if left := session.scalar(select(func.count()).select_from(BatchLine)):
        yield f"{left} results of lines are left over"
    yield from _kept_and_asked_once(world, all_batches)


def _of_live(session: Session, batch: Batch) -> Iterator[str]:
    counted = select(BatchLine.is_error, func.count()).where(BatchLine.batch_id == batch.id)
    counts = dict(session.execute(counted.group_by(BatchLine.is_error)).tuples().all())
    if (counts.get(False, 0), counts.get(True, 0)) != (batch.completed, batch.failed):
        yield f"batch {batch.id} counts {batch.completed} and {batch.failed} lines, recorded are {counts}"
    if counts and not batch.has_lines:
        yield f"batch {batch.id} has lines, and nobody would remove them"
    if session.get(File, batch.input_file_id) is None:
        yield f"batch {batch.id} is {batch.status}, and its file {batch.input_file_id} is gone"
    if batch.output_file_id is not None or batch.error_file_id is not None:
        yield f"batch {batch.id} is {batch.status}, and has files"


def _files(world: World, batch: Batch) -> Iterator[str]:
    for count, file_id in ((batch.completed, batch.output_file_id), (batch.failed, batch.error_file_id)):
        lines = len(_lines(world, file_id))
        if lines != count or (file_id is None) != (count == 0):
            yield f"batch {batch.id} counts {count} lines, its file {file_id} has {lines}"
    if batch.completed + batch.failed != batch.total:
        yield f"batch {batch.id} is {batch.status} with {batch.completed} + {batch.failed} of {batch.total} lines"


def _results(world: World, batch: Batch) -> Iterator[str]:
    """Every custom_id once in both files together, with what its text asks for."""
    if batch.status not in BATCH_TERMINAL or not batch.total:
        return
    texts = {}
    for line in _lines(world, batch.input_file_id):
        row = json.loads(line)
        texts[row["custom_id"]] = row["body"]["messages"][-1]["content"]
    said = [json.loads(line) for name in (batch.output_file_id, batch.error_file_id) for line in _lines(world, name)]
    if Counter(one["custom_id"] for one in said) != Counter(list(texts)):
        yield f"batch {batch.id} has results of {[one['custom_id'] for one in said]}, not one for each of {list(texts)}"
        return
    for one in said:
        text = texts[one["custom_id"]]
        expected = {REFUSAL if text.startswith("refuse") else f"you said {text}", GIVEN_UP.get(batch.status)}
        if _gist(one) not in expected:
            yield f"batch {batch.id}: {one['custom_id']} ({text}) has the result {one}"


def _gist(said: dict[str, Any]) -> str:
    """The answer's text, or the error's code."""
    if said["error"] is not None:
        return str(said["error"]["code"])
    body = said["response"]["body"]
    return str(body["error"]["code"] if "error" in body else body["choices"][0]["message"]["content"])


def _kept_and_asked_once(world: World, all_batches: Any) -> Iterator[str]:
    """What was recorded at any time is in a file, word for word, and nobody asked for it after that."""
    files = {
        batch.id: {
            line.decode() for name in (batch.output_file_id, batch.error_file_id) for line in _lines(world, name)
        }
        for batch in all_batches
    }
    asked = world.asked()
    for batch_id, body, text, at in world.results_seen():
        if body not in files.get(batch_id, ()):
            yield f"batch {batch_id}: the result {body[:200]} was recorded, and is in no file"
        if any(one["text"] == text and one["submitted_at"] > at for one in asked):
            yield f"batch {batch_id}: {text!r} had its result, and was asked again"


def _lines(world: World, file_id: str | None) -> list[bytes]:
    if file_id is None:
        return []
    try:
        return b"".join(storage.open_file(world.settings, file_id)).splitlines()
    except FileNotFoundError:
        return []


def see(world: World, session: Session) -> list[dict[str, Any]]:
    """The results that are recorded now, as `World.remember_results` keeps them."""
    texts = {
        batch.id: [json.loads(line)["body"]["messages"][-1]["content"] for line in _lines(world, batch.input_file_id)]
        for batch in session.scalars(select(Batch))
    }
    rows = [(row.batch_id, row.body, texts[row.batch_id][row.line - 1]) for row in session.scalars(select(BatchLine))]
    at = time.time()
    return [{"batch": batch_id, "body": body, "text": text, "at": at} for batch_id, body, text in rows]
