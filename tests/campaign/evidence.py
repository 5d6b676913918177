"""What a campaign left: every row, every file, every note of the clients, in plain records for the verdict.

Reads the database and the storage folder of a service that has been stopped. Judges nothing.
"""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event, select
from sqlalchemy.orm import Session

from shared import db
from shared.checkpoint_files import MANIFEST, CorruptCheckpoint, verify
from shared.models import Checkpoint, Event, File, Job, Metric, Model, Upload, UploadPart
from shared.settings import Settings


@dataclass(frozen=True)
class EventRow:
    sequence: int
    created_at: float
    type: str
    message: str
    data: dict[str, Any]


@dataclass(frozen=True)
class CheckpointRow:
    step: int
    fence: int
    location: str
    resumable: bool
    tokens: int
    damage: str | None
    """Why it does not verify; None if it is whole and its manifest the registered one."""
    weights_sha256: str | None


@dataclass(frozen=True)
class Step:
    """One step a toy did, whether or not anybody learned of it."""

    at: float
    fence: int
    step: int
    loss: float


@dataclass(frozen=True)
class JobRecord:
    """One job with everything that belongs to it."""

    id: str
    number: int
    """Of its plan."""
    status: str
    error_code: str | None
    fence: int
    last_event: int
    trained_tokens: int | None
    fine_tuned_model: str | None
    result_files: tuple[str, ...]
    events: tuple[EventRow, ...]
    metrics: dict[int, dict[str, Any]]
    checkpoints: tuple[CheckpointRow, ...]
    tuned: tuple[str, ...]
    """Locations of its rows in `models` of kind `tuned`."""
    journal: tuple[Step, ...]


@dataclass(frozen=True)
class FileRow:
    id: str
    filename: str
    sha256: str | None
    """Of the bytes in storage; None if there are none."""


@dataclass(frozen=True)
class UploadRow:
    id: str
    filename: str
    status: str
    file_id: str | None
    parts: int


@dataclass(frozen=True)
class Evidence:
    jobs: tuple[JobRecord, ...]
    result_files: tuple[str, ...]
    """Every result file's row."""
    rows_without_bytes: tuple[str, ...] = ()
    bytes_without_rows: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = field(default=())
    """Processes of the service after its end."""
    files: tuple[FileRow, ...] = ()
    uploads: tuple[UploadRow, ...] = ()


@lru_cache(maxsize=1)
def engine_of(database_url: str) -> Engine:
    """For reading only, and never for long: who waits here lets nobody go on that was stopped inside a transaction."""
    engine = db.make_engine(database_url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout=200"))
    return engine.execution_options(reading=True)


def collect(database_url: str, settings: Settings, journal_dir: Path) -> Evidence:
    with Session(engine_of(database_url)) as session:
        events, metrics, rows, tuned = defaultdict(list), defaultdict(dict), defaultdict(list), defaultdict(list)
        for told in session.scalars(select(Event).order_by(Event.job_id, Event.sequence)):
            shown = EventRow(told.sequence, told.created_at, told.type, told.message, told.data or {})
            events[told.job_id].append(shown)
        for metric in session.scalars(select(Metric)):
            metrics[metric.job_id][metric.step] = metric.values
        for row in session.scalars(select(Checkpoint).order_by(Checkpoint.step)):
            rows[row.job_id].append(_checkpoint(settings, row))
        for model in session.scalars(select(Model).where(Model.kind == "tuned")):
            tuned[model.job_id].append(model.location)
        jobs = tuple(
            JobRecord(
                id=job.id,
                number=int((job.job_metadata or {}).get("campaign", -1)),
                status=str(job.status),
                error_code=(job.error or {}).get("code"),
                fence=job.fence,
                last_event=job.last_event,
                trained_tokens=job.trained_tokens,
                fine_tuned_model=job.fine_tuned_model,
                result_files=tuple(job.result_files),
                events=tuple(events[job.id]),
                metrics=metrics[job.id],
                checkpoints=tuple(rows[job.id]),
                tuned=tuple(tuned[job.id]),
                journal=_journal(journal_dir / job.id),
            )
            for job in session.scalars(select(Job).order_by(Job.created_at, Job.id))
        )
        files = list(session.scalars(select(File)))
        parts = Counter(session.scalars(select(UploadPart.upload_id)))
        uploads = tuple(
            UploadRow(row.id, row.filename, str(row.status), row.file_id, parts[row.id])
            for row in session.scalars(select(Upload))
        )
    results = tuple(file.id for file in files if file.purpose == "fine-tune-results")
    without_bytes, without_rows = compare_storage(database_url, settings)
    return Evidence(
        jobs,
        results,
        tuple(without_bytes),
        tuple(without_rows),
        files=tuple(FileRow(file.id, file.filename, _sha256(settings, file.id)) for file in files),
        uploads=uploads,
    )


PLACES = (("files", 1), ("checkpoints", 3), (".incoming", 1))
"""Folders of storage, and how deep below each its files or checkpoints are."""


def compare_storage(database_url: str, settings: Settings) -> tuple[list[str], list[str]]:
    """(rows whose bytes are missing, bytes that no row names), as paths relative to storage."""
    with Session(engine_of(database_url)) as session:
        rows = {f"files/{file_id}" for file_id in session.scalars(select(File.id))}
        rows |= {f"files/{part_id}" for part_id in session.scalars(select(UploadPart.id))}
        rows |= set(session.scalars(select(Checkpoint.location)))
        rows |= set(session.scalars(select(Model.location)))
    root = settings.storage_root
    found = {path.relative_to(root).as_posix() for place, depth in PLACES for path in _below(root / place, depth)}
    return sorted(rows - found), sorted(found - rows)


def _below(folder: Path, depth: int) -> list[Path]:
    """What lies that deep below a folder from which others may be removing things."""
    if not depth:
        return [folder]
    try:
        entries = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [path for entry in entries for path in _below(entry, depth - 1)]


def _checkpoint(settings: Settings, row: Checkpoint) -> CheckpointRow:
    folder = settings.storage_root / row.location
    damage, weights = None, None
    try:
        manifest = verify(folder)
        if hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() != row.manifest_sha256:
            damage = "its manifest is not the registered one"
        elif (manifest.step, manifest.job_id, manifest.fence) != (row.step, row.job_id, row.fence):
            damage = f"its manifest is of step {manifest.step} of {manifest.job_id}, claim {manifest.fence}"
        weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    except (CorruptCheckpoint, OSError) as error:
        damage = str(error)
    return CheckpointRow(row.step, row.fence, row.location, row.resumable, row.tokens, damage, weights)


def _sha256(settings: Settings, file_id: str) -> str | None:
    path = settings.storage_root / "files" / file_id
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _journal(path: Path) -> tuple[Step, ...]:
    if not path.exists():
        return ()
    return tuple(Step(**json.loads(line)) for line in path.read_text().splitlines())
