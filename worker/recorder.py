"""What a trainer reports, made rows: metrics, events, checkpoints. Every write goes by the claim's fence.

Messages wait in order until the database takes them; a database that is away delays the record, not the training.
A step that is trained again after a resume overwrites its metrics and emits nothing new.
"""

import contextlib
import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import checkpoints, events, jobs, storage
from shared.checkpoint_files import MANIFEST, CorruptCheckpoint, sha256_of, verify
from shared.db import UNAVAILABLE, clock, transaction
from shared.errors import AppError
from shared.models import Event as EventRow
from shared.models import Job, Metric
from shared.redis_client import connect
from shared.settings import Settings
from shared.trainer_protocol import Checkpoint, Evaluation, Event, Message, Metrics, Started

log = logging.getLogger(__name__)

MAX_WAITING = 20_000
"""Messages held while the database is away; beyond it the trainer's pipe fills and it waits too."""
BATCH = 200
STORE_AGAIN_S = 1.0
STORED_SOON_S = 0.05
"""How long a flush waits for a checkpoint: small ones that piled up are all registered in one, not one a tick."""
KEPT_WHILE_RUNNING = 2
"""At least: were the newest one damaged, there must be one before it."""


class Recorder:
    """Holds one run's unsaved messages. `flush` is called between reads of the trainer's pipe."""

    def __init__(self, job: Job, base_model: str, keep_checkpoints: int, settings: Settings) -> None:
        self._job = job
        self._base_model = base_model
        self._keep = keep_checkpoints
        self._settings = settings
        self._publisher = events.Publisher(connect(settings))
        self._waiting: deque[Message] = deque()
        self._storing_thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._storing: Future[str | None] | None = None
        self._store_again_at = 0.0
        self._location = ""
        self._unsure = False
        """A commit failed, and may have taken effect all the same: only its confirmation was lost."""

    @property
    def full(self) -> bool:
        return len(self._waiting) >= MAX_WAITING

    def add(self, message: Message) -> None:
        self._waiting.append(message)

    def flush(self) -> bool:
        """Write what waits and can be written now. Returns whether nothing is left.

        Raises:
            LeaseLost: the claim is over; nothing of this batch is written.
            StorageFull: a checkpoint has no room.
        """
        while self._waiting:
            batch = self._next_batch()
            if isinstance(batch[0], Checkpoint):
                if not self._stored(batch[0]):
                    return False
                if not self._location:
                    self._waiting.popleft()
                    continue
            try:
                with transaction() as session:
                    doomed = self._write(session, batch)
                    written = events.written(session)
            except UNAVAILABLE as error:
                log.warning("%d messages of %s wait for the database: %s", len(self._waiting), self._job.id, error)
                self._unsure = True
                return False
            self._unsure = False
            for _ in batch:
                self._waiting.popleft()
            self._publisher.publish(written)
            for location in doomed:
                if self._settings.storage_is_folder:
                    self._delete(location)
                else:  # which may hang for minutes
                    self._storing_thread.submit(self._delete, location)
        return True

    def _delete(self, location: str) -> None:
        with contextlib.suppress(AppError, OSError):  # garbage from now on, which the sweep removes
            storage.delete_tree(self._settings, location)

    def publish(self, written: list[EventRow]) -> None:
        self._publisher.publish(written)

    def _next_batch(self) -> list[Message]:
        """A checkpoint alone (it is verified first, outside of any transaction), or the messages up to the next one."""
        batch: list[Message] = []
        for message in self._waiting:
            if isinstance(message, Checkpoint):
                return batch or [message]
            batch.append(message)
            if len(batch) == BATCH:
                break
        return batch

    def _stored(self, message: Checkpoint) -> bool:
        """Whether it is known where the checkpoint is: `_location`, empty if it is not whole.

        In a thread: hashing and uploading gigabytes takes seconds, and meanwhile the trainer's pipe and a cancel must
        be served. A storage out of reach is asked again until the claim is lost.
        """
        if self._storing is None:
            if time.monotonic() < self._store_again_at:
                return False
            self._storing = self._storing_thread.submit(_store, self._settings, message)
        if not wait([self._storing], STORED_SOON_S).done:
            return False
        storing, self._storing = self._storing, None
        try:
            self._location = storing.result() or ""
        except storage.StorageFull:
            raise  # not a matter of seconds: the run is given up until there is room
        except (AppError, OSError) as error:
            log.warning("checkpoint %d of %s waits for the storage: %s", message.step, self._job.id, error)
            self._store_again_at = time.monotonic() + STORE_AGAIN_S
            return False
        if not self._location:
            log.error("checkpoint %d of %s is not registered", message.step, self._job.id)
        return True

    def close(self) -> None:
        """Stop storing; what waits is dropped."""
        self._storing_thread.shutdown(wait=False, cancel_futures=True)

    def _write(self, session: Session, batch: list[Message]) -> list[str]:
        """One transaction. Returns folders to delete once it has committed."""
        fence = self._job.fence
        doomed: list[str] = []
        job = jobs.owned(session, self._job.id, fence)
        for message in batch:
            match message:
                case Started():
                    self._started(session, job, message)
                case Event():
                    # An attempt after the first says most of it again.
                    if not ((fence > 1 or self._unsure) and _is_told(session, job, message.message, since=0)):
                        events.append(session, job, message.message, level=message.level, data=message.data)
                case Metrics():
                    _metrics(session, job, message)
                case Evaluation():
                    _evaluation(session, job, message)
                case Checkpoint():
                    doomed += self._checkpoint(session, job, message)
                case _:
                    raise AssertionError(f"{message.type} settles a run, it is not recorded")
        latest = next((m for m in reversed(batch) if isinstance(m, Metrics)), None)
        if latest is not None:
            finish = clock(session) + latest.remaining_s
            jobs.owned(
                session,
                job.id,
                fence,
                current_step=latest.step,
                total_steps=latest.total_steps,
                trained_tokens=latest.tokens,
                estimated_finish=finish,
            )
        return doomed

    def _started(self, session: Session, job: Job, message: Started) -> None:
        jobs.owned(
            session,
            job.id,
            self._job.fence,
            resolved=message.resolved,
            total_steps=message.total_steps,
            current_step=message.first_step - 1,
        )
        text = (
            f"Resumed from step {message.first_step - 1}"
            if message.first_step > 1
            else f"Fine-tuning job started: {message.total_steps} steps on {message.train_examples} rows, "
            f"{message.parameters:,} parameters on {message.device}"
        )
        if not (self._unsure and _is_told(session, job, text, since=self._job.updated_at)):
            events.append(session, job, text, data=message.model_dump(exclude={"type", "resolved"}))

    def _checkpoint(self, session: Session, job: Job, message: Checkpoint) -> list[str]:
        metrics = _checkpoint_metrics(session, job, message.step)
        replaced = checkpoints.register(
            session,
            job,
            self._job.fence,
            base_model=self._base_model,
            step=message.step,
            location=self._location,
            manifest_sha256=message.manifest_sha256,
            resumable=message.resumable,
            tokens=message.tokens,
            metrics=metrics,
        )
        session.flush()
        keep = self._keep if not message.resumable else max(self._keep, KEPT_WHILE_RUNNING)
        retired = checkpoints.retire(session, job, self._base_model, keep)
        return retired if replaced is None else [*retired, replaced]


def _store(settings: Settings, message: Checkpoint) -> str | None:
    """Where the checkpoint is in storage; None if its folder is not what the trainer wrote.

    Raises:
        AppError, OSError: the storage is out of reach, or full.
    """
    folder = Path(message.path)
    try:
        verify(folder)
        manifest_sha256 = sha256_of(folder / MANIFEST)
    except (CorruptCheckpoint, FileNotFoundError) as error:
        log.error("checkpoint %s: %s", message.path, error)
        return None
    if manifest_sha256 != message.manifest_sha256:
        log.error("checkpoint %s: its manifest is not the one that was reported", message.path)
        return None
    try:
        return storage.publish_checkpoint(settings, folder)
    except (storage.AlreadyPublished, CorruptCheckpoint) as error:
        log.error("checkpoint %s: %s", message.path, error)
        return None


def _is_told(session: Session, job: Job, message: str, since: float) -> bool:
    """Whether the job has had this very event since then."""
    same = select(EventRow.id).where(
        EventRow.job_id == job.id, EventRow.message == message, EventRow.created_at >= since
    )
    return session.scalar(same.limit(1)) is not None


def _metrics(session: Session, job: Job, message: Metrics) -> None:
    values = message.model_dump(exclude={"type", "step"}, exclude_none=True)
    row = session.get(Metric, (job.id, message.step))
    if row is not None:
        row.values = {**row.values, **values}
        return
    session.add(Metric(job_id=job.id, step=message.step, project_id=job.project_id, values=values))
    events.append(
        session,
        job,
        f"Step {message.step}/{message.total_steps}: training loss={message.loss:.4f}",
        type="metrics",
        data=step_data(message, values),
    )


def step_data(message: Metrics, values: dict[str, Any]) -> dict[str, Any]:
    """`data` of a step's event: OpenAI's keys, and everything else under ours."""
    return {
        "step": message.step,
        "total_steps": message.total_steps,
        "train_loss": message.loss,
        "train_mean_token_accuracy": message.mean_token_accuracy,
        "anneal": values,
    }


def _evaluation(session: Session, job: Job, message: Evaluation) -> None:
    values = message.model_dump(exclude={"type", "step"}, exclude_none=True)
    row = session.get(Metric, (job.id, message.step))
    if row is None:
        session.add(Metric(job_id=job.id, step=message.step, project_id=job.project_id, values=values))
    else:
        if "eval_loss" in row.values:
            return
        row.values = {**row.values, **values}
    events.append(
        session,
        job,
        f"Step {message.step}: validation loss={message.eval_loss:.4f}",
        type="metrics",
        # OpenAI looks at a part of the validation file often and at all of it at checkpoints; here it is always all.
        data={
            "step": message.step,
            "total_steps": job.total_steps,
            "valid_loss": message.eval_loss,
            "valid_mean_token_accuracy": message.eval_mean_token_accuracy,
            "full_valid_loss": message.eval_loss,
            "full_valid_mean_token_accuracy": message.eval_mean_token_accuracy,
            "anneal": values,
        },
    )


def _checkpoint_metrics(session: Session, job: Job, step: int) -> dict[str, Any]:
    """OpenAI's names for what is known of a checkpoint's step; names without a value are left out.

    Training and `valid_…`: the newest at or before the step, which need not have been logged or evaluated itself.
    `full_valid_…`: of these very weights.
    """
    train = _newest(session, job, step, "loss")
    valid = None if job.validation_file is None else _newest(session, job, step, "eval_loss")
    named: dict[str, Any] = {"step": step}
    if train is not None:
        named["train_loss"] = train.values["loss"]
        named["train_mean_token_accuracy"] = train.values.get("mean_token_accuracy")
    if valid is not None:
        accuracy = valid.values.get("eval_mean_token_accuracy")
        named |= {"valid_loss": valid.values["eval_loss"], "valid_mean_token_accuracy": accuracy}
        if valid.step == step:
            named |= {"full_valid_loss": valid.values["eval_loss"], "full_valid_mean_token_accuracy": accuracy}
    return {name: value for name, value in named.items() if value is not None}


def _newest(session: Session, job: Job, step: int, name: str) -> Metric | None:
    """The newest row at or before a step that has a value of this name."""
    has_it = Metric.values[name].as_float().is_not(None)
    rows = select(Metric).where(Metric.job_id == job.id, Metric.step <= step, has_it)
    return session.scalar(rows.order_by(Metric.step.desc()).limit(1))
