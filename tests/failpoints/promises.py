"""What clients were promised: whoever got a 200 finds what it said, whoever asks again gets what was asked for.

Uploads, answers kept for keys, pauses and needed files must hold at any instant; the rest at rest.
"""

import json
from collections.abc import Iterator
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import storage
from shared.models import (
    TERMINAL,
    Answer,
    Base,
    Batch,
    Creation,
    Event,
    File,
    Job,
    JobStatus,
    Model,
    Upload,
    UploadPart,
    UploadStatus,
)
from tests.failpoints.scenarios import Facts
from tests.failpoints.upload_scenarios import CONTENT
from tests.failpoints.world import World

MAKES: dict[str, type[Base]] = {"submit": Job, "upload": File, "begin": Upload, "create-batch": Batch}
"""What a request creates, by what the journal calls it."""
KINDS: dict[str, type[Base]] = {"fine_tuning.job": Job, "file": File, "upload": Upload, "batch": Batch}
BEGINS_PAUSE, ENDS_PAUSE = ("Pause requested", "Job paused"), "Job resumed"


def of_uploads(session: Session) -> Iterator[str]:
    """An upload that has ended has no parts, and a completed one is a file."""
    for upload in session.scalars(select(Upload)):
        parts = session.scalars(select(UploadPart.id).where(UploadPart.upload_id == upload.id)).all()
        if upload.status != UploadStatus.PENDING and parts:
            yield f"upload {upload.id} is {upload.status} and has parts {parts}"
        file = None if upload.file_id is None else session.get(File, upload.file_id)
        if (upload.status == UploadStatus.COMPLETED) != (file is not None):
            yield f"upload {upload.id} is {upload.status} and its file is {upload.file_id}"


def of_answers(session: Session, facts: Facts) -> Iterator[str]:
    """What is told again to whoever asks again is there."""
    told = [(row.key, row.body) for row in session.scalars(select(Answer).where(Answer.status_code == 200))]
    told += [("no key", row.body) for row in session.scalars(select(Creation))]
    for key, text in told:
        body = json.loads(text)
        model = KINDS.get(body.get("object", ""))
        if model is not None and session.get(model, body["id"]) is None and body["id"] != facts.get("file"):
            yield f"{body['object']} {body['id']} is told again ({key}), and does not exist"


def of_pauses(session: Session, job: Job) -> Iterator[str]:
    """Between a pause and its end nobody claims the job, and nothing of it runs."""
    asked, paused = False, False
    for line in session.scalars(select(Event.message).where(Event.job_id == job.id).order_by(Event.sequence)):
        if line.startswith(BEGINS_PAUSE):
            asked, paused = True, line.startswith(BEGINS_PAUSE[1])
        elif line.startswith(ENDS_PAUSE):
            asked, paused = False, False
        elif (asked and line.startswith("Job claimed")) or (paused and line.startswith(("Step ", "Resumed from"))):
            yield f"job {job.id}: after a pause and before its end came {line!r}"
    if job.status == JobStatus.PAUSED and not paused:
        yield f"job {job.id} is paused, and its events don't say so"
    if job.status == JobStatus.PAUSED and (job.lease_until is not None or job.pause_requested_at is not None):
        yield f"job {job.id} is paused, with a lease until {job.lease_until}, asked at {job.pause_requested_at}"
    if asked and job.status not in (JobStatus.RUNNING, JobStatus.PAUSED, *TERMINAL):
        yield f"job {job.id} was asked to pause and is {job.status}"


def of_needed_files(session: Session, job: Job) -> Iterator[str]:
    for name in (job.training_file, job.validation_file):
        if job.status not in TERMINAL and name is not None and session.get(File, name) is None:
            yield f"job {job.id} is {job.status}, and its file {name} is gone"


def to_clients(world: World, facts: Facts, session: Session) -> Iterator[str]:
    """At rest: what the journal says."""
    journal = world.journal()
    expected = {facts.get("status"), facts.get("status_again")}
    if facts.get("status") is not None and not any(entry["status"] in expected for entry in journal):
        yield f"no request was answered {sorted(expected, key=str)}: {journal}"
    for entry in journal:
        if entry["status"] == 200:
            yield from _kept(entry, facts, session)
        elif entry["status"] >= 400 and "error" not in entry["body"]:
            yield f"an error without OpenAI's body: {entry}"
    made = sum(entry["what"] == "submit" for entry in journal)
    jobs = len(session.scalars(select(Job.id)).all())
    if made and jobs > made:
        yield f"{jobs} jobs after {made} requests"
    if "once" in facts:
        yield from _made_once(facts["once"], journal, session)
    if "upload_ends" in facts:
        yield from _ended(world, facts, session)
    for name in facts.get("gone", ()):
        if session.get(File, name) is not None or session.get(UploadPart, name) is not None:
            yield f"{name} has expired, and is there"
    for row in (*session.scalars(select(Answer)), *session.scalars(select(Creation))):
        if row.body == "{}":
            yield f"an old {type(row).__name__} is there"


def _kept(entry: dict[str, Any], facts: Facts, session: Session) -> Iterator[str]:
    """What one answer of 200 promised."""
    name, what = str(entry["body"].get("id")), entry["what"]
    if what in ("submit", "cancel", "pause", "resume") and session.get(Job, name) is None:
        yield f"{what} was answered 200, and job {name} does not exist"
    if what == "upload" and session.get(File, name) is None:
        yield f"upload was answered 200, and file {name} does not exist"
    if what in ("create-batch", "cancel-batch") and session.get(Batch, name) is None:
        yield f"{what} was answered 200, and batch {name} does not exist"
    if what == "begin" and session.get(Upload, name) is None:
        yield f"begin was answered 200, and upload {name} does not exist"
    if what == "complete" and session.get(File, entry["body"]["file"]["id"]) is None:
        yield f"complete was answered 200, and file {entry['body']['file']['id']} does not exist"
    if what == "delete" and session.get(File, facts["file"]) is not None:
        yield "delete was answered 200, and the file is there"
    if what == "delete-model" and session.get(Model, facts["tuned"]) is not None:
        yield "delete-model was answered 200, and the model is there"
    if what == "pause":
        said = session.scalars(select(Event.message).where(Event.job_id == name)).all()
        if not any(line.startswith(BEGINS_PAUSE) for line in said):
            yield f"pause was answered 200, and job {name} was never asked to"


def _made_once(what: str, journal: list[dict[str, Any]], session: Session) -> Iterator[str]:
    """One key, one object: in the table, and in every answer."""
    made = session.scalars(select(MAKES[what])).all()
    if what == "submit":  # its training file was there before
        made = [row for row in made if isinstance(row, Job)]
    named = {entry["body"]["id"] for entry in journal if entry["status"] == 200}
    ids = {str(row.id) for row in made}  # type: ignore[attr-defined]
    if len(made) != 1 or named != ids:
        yield f"one key made {sorted(ids)}, and its answers name {sorted(named)}"
    kept = session.scalars(select(Answer)).all()
    if [json.loads(row.body)["id"] for row in kept] != list(ids):
        yield f"one key keeps {len(kept)} answers"


def _ended(world: World, facts: Facts, session: Session) -> Iterator[str]:
    upload = session.get_one(Upload, facts["upload"])
    if upload.status != facts["upload_ends"]:
        yield f"upload {upload.id} is {upload.status}; it should be {facts['upload_ends']}"
    if upload.file_id is not None and b"".join(storage.open_file(world.settings, upload.file_id)) != CONTENT:
        yield f"file {upload.file_id} has other bytes than its parts had"
    acknowledged = {
        entry["body"]["id"] for entry in world.journal() if entry["what"] == "part" and entry["status"] == 200
    }
    present = set(session.scalars(select(UploadPart.id)))
    if upload.status == UploadStatus.PENDING and acknowledged - present:
        yield f"parts {sorted(acknowledged - present)} were acknowledged, and are gone"
