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

from sqlalchemy import Engine, event, func, select
from sqlalchemy.orm import Session

from shared import db
from shared.checkpoint_files import MANIFEST, CorruptCheckpoint, verify
from shared.models import Batch, BatchLine, Checkpoint, Event, File, Job, Metric, Model, Upload, UploadPart
from shared.settings import Settings
from tests.campaign.generator import Asked, asked


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
class ResultRow:
    """One line of a batch's output or error file."""

    id: str
    custom_id: str
    status_code: int | None
    code: str | None
    """Of its error, whether the line has one or its response is one; None for an answer."""
    body: dict[str, Any]
    """Of its response."""
    sha256: str
    """Of the line, without its end."""

    @property
    def input_tokens(self) -> int:
        return int(self.body.get("usage", {}).get("prompt_tokens", 0))

    @property
    def output_tokens(self) -> int:
        return int(self.body.get("usage", {}).get("completion_tokens", 0))


@dataclass(frozen=True)
class BatchRecord:
    """One batch with what is in its files."""

    id: str
    number: int
    """Of its plan."""
    status: str
    error_codes: tuple[str, ...]
    """Why it failed."""
    fence: int
    has_lease: bool
    total: int
    completed: int
    failed: int
    input_tokens: int
    output_tokens: int
    output_file_id: str | None
    error_file_id: str | None
    output: tuple[ResultRow, ...] | None
    """None if there is no such file."""
    errors: tuple[ResultRow, ...] | None
    rows_left: int
    """Results in the database, which are removed once it has ended."""

    @property
    def rows(self) -> tuple[ResultRow, ...]:
        return (*(self.output or ()), *(self.errors or ()))


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
    batches: tuple[BatchRecord, ...] = ()
    batch_files: tuple[str, ...] = ()
    """Every output or error file's row."""
    asked: tuple[Asked, ...] = ()
    """What generators were given of batches."""


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
        counted = select(BatchLine.batch_id, func.count()).group_by(BatchLine.batch_id)
        left = dict(session.execute(counted).tuples().all())
        batches = tuple(
            _batch(settings, row, left.get(row.id, 0))
            for row in session.scalars(select(Batch).order_by(Batch.created_at))
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
        batches=batches,
        batch_files=tuple(file.id for file in files if file.purpose == "batch_output"),
        asked=tuple(asked(journal_dir)),
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


def _batch(settings: Settings, row: Batch, rows_left: int) -> BatchRecord:
    return BatchRecord(
        id=row.id,
        number=int((row.batch_metadata or {}).get("campaign", -1)),
        status=str(row.status),
        error_codes=tuple(str(error["code"]) for error in row.errors or ()),
        fence=row.fence,
        has_lease=row.lease_until is not None,
        total=row.total,
        completed=row.completed,
        failed=row.failed,
        input_tokens=row.input_tokens,
        output_tokens=row.output_tokens,
        output_file_id=row.output_file_id,
        error_file_id=row.error_file_id,
        output=_results(settings, row.output_file_id),
        errors=_results(settings, row.error_file_id),
        rows_left=rows_left,
    )


def _results(settings: Settings, file_id: str | None) -> tuple[ResultRow, ...] | None:
    """The lines of a batch's file; None if there is none."""
    path = settings.storage_root / "files" / (file_id or "none")
    return tuple(map(result_row, path.read_bytes().splitlines())) if path.is_file() else None


def result_row(line: bytes) -> ResultRow:
    said: dict[str, Any] = json.loads(line)
    response = said["response"] or {}
    body = response.get("body") or {}
    error = said["error"] or body.get("error") or {}
    return ResultRow(
        id=said["id"],
        custom_id=said["custom_id"],
        status_code=response.get("status_code"),
        code=error.get("code"),
        body=body,
        sha256=hashlib.sha256(line).hexdigest(),
    )


def _sha256(settings: Settings, file_id: str) -> str | None:
    path = settings.storage_root / "files" / file_id
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _journal(path: Path) -> tuple[Step, ...]:
    if not path.exists():
        return ()
    return tuple(Step(**json.loads(line)) for line in path.read_text().splitlines())
