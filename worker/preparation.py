"""What a claimed run needs before its trainer can start: base weights, data, and the checkpoint to go on from.

Owns the trainer's spec. Damaged checkpoints are passed over here, and forgotten, so that nobody else trusts them.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import checkpoints, events, jobs, model_registry, storage
from shared.checkpoint_files import MANIFEST, CorruptCheckpoint, MissingCheckpoint, sha256_of
from shared.db import reading
from shared.errors import BadRequest
from shared.models import Checkpoint, File, Job
from shared.settings import Settings
from shared.training_spec import TrainerSpec, TrainingSpec
from worker import base_models, run_folder
from worker.run_folder import RunFolder

log = logging.getLogger(__name__)

Write = Callable[[Callable[[Session], object]], None]
"""Runs one transaction until the database takes it or the claim is lost, and publishes its events."""


class Preparation:
    """Of one claim of a job."""

    def __init__(
        self, job: Job, training: TrainingSpec, base_model: str, folder: RunFolder, settings: Settings, write: Write
    ) -> None:
        self._job = job
        self._training = training
        self._base_model = base_model
        self._folder = folder
        self._settings = settings
        self._write = write

    def base_dir(self) -> Path:
        """The folder of what is fine-tuned; where base weights came from is told on the job."""
        location = self._job.model_location
        if not location.startswith(model_registry.BASE_LOCATION):
            try:
                return storage.local_checkpoint(
                    self._settings, location, recheck=True, keep_in=self._folder.work / "base"
                )
            except CorruptCheckpoint as error:
                log.error("base %s: %s", location, error)
                missing = isinstance(error, MissingCheckpoint)
                raise BadRequest(
                    f"the model {self._job.model!r} "
                    + ("no longer exists" if missing else "is damaged; start from another checkpoint"),
                    param="model",
                    code="model_not_found" if missing else "model_damaged",
                ) from error
        found = base_models.resolve(location.removeprefix(model_registry.BASE_LOCATION), self._settings)
        message = f"Base model {self._job.model}: {found.source}" + (f" ({found.note})" if found.note else "")
        data = {"source": found.source, "revision": found.revision}

        def tell(session: Session) -> None:
            values = {"model_source": found.source, "model_revision": found.revision}
            job = jobs.owned(session, self._job.id, self._job.fence, **values)
            if (self._job.model_source, self._job.model_revision) != (found.source, found.revision):
                # Else an earlier claim has told it.
                events.append(session, job, message, level="warn" if found.note else "info", data=data)

        self._write(tell)
        return found.path

    def resume_point(self) -> tuple[Path | None, bool]:
        """(newest whole checkpoint that can be resumed, whether the run was already complete)."""
        with reading() as session:
            rows = checkpoints.newest_first(session, self._job.id)
        for row in rows:
            try:
                path = storage.local_checkpoint(
                    self._settings, row.location, recheck=True, keep_in=self._folder.work / f"resume-{row.step}"
                )
                if sha256_of(path / MANIFEST) != row.manifest_sha256:
                    raise CorruptCheckpoint(f"{path / MANIFEST} is not the one that was registered")
            except CorruptCheckpoint as error:
                # Anything else is storage out of reach, a fault: going back to an older one would throw work away.
                log.error("checkpoint %s is not used: %s", row.location, error)
                self._discard(row)
                continue
            if row.step == self._job.total_steps:
                return None, True
            if row.resumable:
                return path, False
        return None, False

    def files(self) -> tuple[str, str | None]:
        """Paths of the training and the validation file.

        To be asked for before `resume_point`: a storage that lacks these is the wrong one, and its lack of
        checkpoints says nothing.

        Raises:
            StorageUnavailable: one is not there.
        """
        validation = self._job.validation_file
        return self._local_file(self._job.training_file), None if validation is None else self._local_file(validation)

    def spec(
        self, base_dir: Path, files: tuple[str, str | None], resume_from: Path | None, leash_s: float
    ) -> TrainerSpec:
        hyperparameters = self._job.hyperparameters
        return TrainerSpec(
            job_id=self._job.id,
            fence=self._job.fence,
            base_model=self._job.model,
            base_model_dir=str(base_dir),
            training_file=files[0],
            validation_file=files[1],
            checkpoint_dir=str(storage.staging_dir(self._settings, self._job.id, self._job.fence)),
            work_dir=str(self._folder.work),
            cache_dir=str(run_folder.caches(self._settings)),
            resume_from=None if resume_from is None else str(resume_from),
            training=self._training,
            n_epochs=hyperparameters.get("n_epochs", "auto"),
            learning_rate_multiplier=hyperparameters.get("learning_rate_multiplier", "auto"),
            seed=self._job.seed,
            leash_s=leash_s,
            memory_limit_bytes=self._settings.trainer_memory_bytes,
        )

    def _local_file(self, file_id: str) -> str:
        with reading() as session:
            sha256 = session.scalar(select(File.sha256).where(File.id == file_id))
        try:
            return str(storage.local_file(self._settings, file_id, sha256=sha256, keep_in=self._folder.work))
        except FileNotFoundError as error:
            raise storage.StorageUnavailable(
                f"the bytes of file {file_id} are not in storage: it is not mounted, or not this database's"
            ) from error

    def _discard(self, damaged: Checkpoint) -> None:
        """Nobody may resume from it or be served by it; what is left of its folder becomes garbage."""
        self._write(
            lambda session: checkpoints.discard(session, self._job, self._job.fence, damaged.step, self._base_model)
        )
