"""What must hold: at any instant, whoever has just died; and at rest, after recovery. Each breach is a sentence."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import redis
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import events, storage
from shared.checkpoint_files import MANIFEST, CorruptCheckpoint, verify
from shared.db import reading
from shared.models import TERMINAL, Checkpoint, Event, File, Job, Metric, Model, UploadPart
from tests.campaign.toy_model import reference
from tests.campaign.toy_trainer import read_plan
from tests.failpoints import batch_promises, promises
from tests.failpoints.scenarios import Facts
from tests.failpoints.world import World

LAST_WORDS = {
    "The job has successfully completed": "succeeded",
    "The job failed": "failed",
    "The job was cancelled": "cancelled",
}


def at_any_instant(world: World, facts: Facts) -> list[str]:
    """Nothing lost, no row without bytes, no published folder that is not whole, no gap in the events."""
    problems: list[str] = []
    with reading() as session:
        missing = set(facts.get("ends", {})) - set(session.scalars(select(Job.id)))
        problems += [f"job {job_id} is lost" for job_id in missing]
        problems += _files_without_bytes(world, session)
        problems += promises.of_uploads(session)
        problems += promises.of_answers(session, facts)
        problems += batch_promises.at_any_instant(world, session)
        if not facts.get("damages"):
            problems += _checkpoints_that_lie(world, session)
        for job in session.scalars(select(Job)):
            problems += _numbering(session, job)
            problems += promises.of_pauses(session, job)
            problems += promises.of_needed_files(session, job)
            problems += _live_stream_that_lies(world, session, job)
    world.remember_results()
    problems += _half_published(world) if not facts.get("damages") else []
    return problems


def at_rest(world: World, facts: Facts) -> list[str]:
    """All of the above, and: every job ended once and as it should, bytes and rows are the same set."""
    problems = at_any_instant(world, facts | {"damages": False})
    with reading() as session:
        all_jobs = list(session.scalars(select(Job)))
        for job in all_jobs:
            allowed = facts.get("ends", {}).get(job.id, ["succeeded", "cancelled"])
            if job.status not in allowed:
                problems.append(f"job {job.id} ended as {job.status} ({job.error}); it should be {allowed}")
            problems += _ending(session, job)
            if job.status == "succeeded":
                problems += _result(world, facts, session, job)
        problems += _bytes_without_rows(world, session)
        problems += _models(session)
        problems += promises.to_clients(world, facts, session)
        problems += batch_promises.at_rest(world, facts, session)
    return problems


def _files_without_bytes(world: World, session: Session) -> list[str]:
    problems = []
    for row in (*session.scalars(select(File)), *session.scalars(select(UploadPart))):
        try:
            content = b"".join(storage.open_file(world.settings, row.id))
        except FileNotFoundError:
            problems.append(f"file {row.id} has a row and no bytes")
            continue
        if len(content) != row.bytes or hashlib.sha256(content).hexdigest() != row.sha256:
            problems.append(f"file {row.id} has other bytes than its row says")
    return problems


def _checkpoints_that_lie(world: World, session: Session) -> list[str]:
    problems = []
    for row in session.scalars(select(Checkpoint)):
        try:
            path = storage.local_checkpoint(world.settings, row.location, recheck=True)
            manifest = verify(path)
        except (CorruptCheckpoint, OSError) as error:
            problems.append(f"registered checkpoint {row.location} is not whole: {error}")
            continue
        digest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
        if digest != row.manifest_sha256 or (manifest.step, manifest.fence) != (row.step, row.fence):
            problems.append(f"registered checkpoint {row.location} is another one than its row says")
    return problems


def _half_published(world: World) -> list[str]:
    problems = []
    for folder in (world.settings.data / "storage").glob("checkpoints/*/*/*"):
        if folder.name.isdigit():
            try:
                verify(folder)
            except CorruptCheckpoint as error:
                problems.append(f"published folder {folder} is not whole: {error}")
    return problems


def _numbering(session: Session, job: Job) -> list[str]:
    numbers = session.scalars(select(Event.sequence).where(Event.job_id == job.id).order_by(Event.sequence)).all()
    if list(numbers) != list(range(1, job.last_event + 1)):
        return [f"job {job.id} has {job.last_event} events, numbered {numbers}"]
    return []


def _live_stream_that_lies(world: World, session: Session, job: Job) -> list[str]:
    """What a client was shown live must be in the record under that number, or the record must be able to follow."""
    known = {row.sequence: row.id for row in session.scalars(select(Event).where(Event.job_id == job.id))}
    client = redis.Redis.from_url(world.settings.resolved_redis_url)
    problems = []
    for entry_id, fields in client.xrange(events.stream_key(job.id)):
        number = int(entry_id.split(b"-")[0])
        shown = json.loads(fields[b"event"])
        if known.get(number) != shown["id"]:
            problems.append(
                f"job {job.id}: event {number} was shown live ({shown['message']}) and is not in the record"
            )
    return problems


def _ending(session: Session, job: Job) -> list[str]:
    """One terminal state, told once; each step told once."""
    said = session.scalars(select(Event.message).where(Event.job_id == job.id).order_by(Event.sequence)).all()
    ends = [status for line in said for start, status in LAST_WORDS.items() if line.startswith(start)]
    problems = []
    if job.status in TERMINAL and ends != [job.status]:
        problems.append(f"job {job.id} is {job.status} and was told to end as {ends}")
    told = Counter(match[1] for line in said if (match := re.match(r"(Step \d+)/", line)))
    problems += [f"job {job.id}: {step} was told {times} times" for step, times in told.items() if times > 1]
    return problems


def _result(world: World, facts: Facts, session: Session, job: Job) -> list[str]:
    """What an undisturbed run leaves: weights, losses, tokens, one model, one result file."""
    content = facts.get("contents", {}).get(job.id)  # of a file that is gone by now
    path = world.folder / "trained-on.jsonl"
    path.write_bytes(content.encode() if content else b"".join(storage.open_file(world.settings, job.training_file)))
    steps = read_plan(path).steps
    expected = reference(job.seed, path.read_bytes(), steps)
    problems: list[str] = []

    def demand(holds: bool, problem: str) -> None:
        if not holds:
            problems.append(f"job {job.id}: {problem}")

    final = session.scalar(select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.step == steps))
    tuned = session.scalars(select(Model).where(Model.job_id == job.id, Model.kind == "tuned")).all()
    if job.fine_tuned_model == facts.get("tuned"):
        demand(final is None and not tuned, "its model was deleted and is there")
    elif final is None:
        demand(False, "it succeeded and has no final checkpoint")
    else:
        folder = storage.local_checkpoint(world.settings, final.location)
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        demand(digest == expected.weights_sha256, "its weights are not those of an undisturbed run")
        demand([model.id for model in tuned] == [job.fine_tuned_model], "it has not exactly one tuned model")
        demand(all(model.location == final.location for model in tuned), "its model is not its last checkpoint")
    rows = session.scalars(select(Metric).where(Metric.job_id == job.id).order_by(Metric.step)).all()
    demand([row.step for row in rows] == list(range(1, steps + 1)), f"metrics of steps {[row.step for row in rows]}")
    losses = [row.values.get("loss") for row in rows]
    demand(losses == expected.losses, "its losses are not those of an undisturbed run")
    demand(job.trained_tokens == expected.tokens[-1], f"{job.trained_tokens} tokens, not {expected.tokens[-1]}")
    demand(len(job.result_files) == 1, f"it has {len(job.result_files)} result files")
    demand(all(session.get(File, name) is not None for name in job.result_files), "its result file has no row")
    return problems


def _bytes_without_rows(world: World, session: Session) -> list[str]:
    rows = {*session.scalars(select(File.id)), *session.scalars(select(UploadPart.id))}
    locations = set(session.scalars(select(Checkpoint.location)))
    problems = [
        f"file {file_id} has bytes and no row"
        for file_id, _ in storage.list_files(world.settings)
        if file_id not in rows
    ]
    found = {location for location, _ in storage.list_checkpoints(world.settings)}
    problems += [f"{location} has bytes and no row" for location in sorted(found - locations)]
    root = world.settings.data / "storage"
    incoming = root / ".incoming"
    problems += [f"{path} is left over" for path in (incoming.iterdir() if incoming.is_dir() else ())]
    used = session.scalars(select(File.id).where(File.purpose == "fine-tune-results")).all()
    named = {name for names in session.scalars(select(Job.result_files)) for name in names}
    problems += [f"result file {file_id} belongs to no job" for file_id in set(used) - named]
    return problems + _scratch(world)


def _scratch(world: World) -> list[str]:
    """Working folders of runs that are over: they may hold copies of files and weights."""
    folder = world.settings.run_dir / "jobs"
    return [
        f"working folder {path} is left over" for path in folder.glob("*/*") if path.is_dir() and path.name.isdigit()
    ]


def _models(session: Session) -> list[str]:
    locations = set(session.scalars(select(Checkpoint.location)))
    models = session.scalars(select(Model)).all()
    problems = [
        f"model {row.id} is at {row.location}, where no checkpoint is"
        for row in models
        if row.location not in locations
    ]
    served = {row.location for row in models if row.kind == "checkpoint"}
    return problems + [f"checkpoint {place} is no model" for place in sorted(locations - served)]


def trees(root: Path) -> list[str]:
    """Everything below a folder, for a report."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))
