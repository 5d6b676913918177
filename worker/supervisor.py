"""One claimed run, from claim to settlement: prepare, start the trainer, record what it says, obey, settle.

    claimed ─ prepare ─ trainer runs ─┬─ done ──────────────► succeeded
                                      ├─ error ─────────────► failed
                                      ├─ out of memory ─────► queued with the next rung of the ladder, or failed
                                      ├─ cancel obeyed ─────► cancelled
                                      ├─ shutdown obeyed ───► queued, resumes from its last checkpoint
                                      ├─ pause obeyed ──────► paused; queued if it was withdrawn meanwhile
                                      ├─ died, or silent ───► queued, or failed after `max_attempts` without progress
                                      └─ claim lost ────────► nothing: the trainer is stopped, nobody is told

`shared.jobs` sees to it that whatever would be queued is paused in its place while a pause is asked for.

Trains nothing itself and imports no torch. Whatever happens here, the worker lives.
"""

import logging
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus

from sqlalchemy.orm import Session

from shared import checkpoints, events, files, jobs, model_registry, results, storage
from shared.checkpoint_files import TEMPORARY_PREFIX
from shared.db import UNAVAILABLE, reading, transaction
from shared.disk import make_folder
from shared.errors import AppError
from shared.models import TERMINAL, Job, JobStatus
from shared.redis_client import connect
from shared.settings import Settings
from shared.trainer_protocol import Alive, Done, Failed, Message, Metrics, Started, Stopped, parse
from shared.training_spec import TrainerSpec, TrainingSpec
from worker import lifecycle, memory
from worker.generation import warm_up
from worker.host_lock import HostLock, LockHeld
from worker.lease import LeaseKeeper
from worker.orders import Orders
from worker.preparation import Preparation
from worker.recorder import Recorder
from worker.run_folder import RunFolder
from worker.standby import Standby
from worker.trainer_process import TrainerProcess, TrainerSurvives
from worker.training import ladder
from worker.wandb_feed import WandbFeed

log = logging.getLogger(__name__)

TICK_S = 0.2
UNSTORED_LIMIT_S = 600.0
"""How long a run that is over holds its worker while a storage out of reach takes nothing."""


def supervise(
    job: Job,
    settings: Settings,
    trainer_command: tuple[str, ...] | None = None,
    standby: Standby | None = None,
) -> None:
    """Run a job that was just claimed and settle it. Never raises for anything the job did.

    Args:
        trainer_command: what to start instead of `python -m worker.training`; no standby is used then.
        standby: where a trainer may wait that was started ahead.
    """
    try:
        run = _Run(job, settings, trainer_command, standby if trainer_command is None else None)
        with LeaseKeeper(job.id, job.fence, settings) as lease:
            try:
                run.execute(lease)
            except (jobs.LeaseLost, TrainerSurvives):
                raise
            except LockHeld as error:
                log.error("%s can't run on this host: %s", job.id, error)
                run.settle_fault("An earlier trainer of this job can't be ended on this host")
            except AppError as error:
                if error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
                    run.settle_failed(error.code, error.message, error.param)
                else:
                    run.settle_fault(error.message)
            except Exception:
                log.exception("supervising %s failed", job.id)  # the details may name hosts: not for the job's events
                run.settle_fault("The worker failed; its log has the details")
            finally:
                run.clean_up()
    except jobs.LeaseLost as error:
        log.warning("%s; its results are left to the new owner", error)
    except TrainerSurvives as error:
        # Unsettled on purpose: its lease runs out, and by then a restarted worker or another one takes it.
        log.critical("%s: %s; this worker claims nothing until it is gone", job.id, error)
        lifecycle.quarantine(error.group)
    except Exception:
        log.exception("%s could not be settled; the sweep will take it when its lease runs out", job.id)


class _Run:
    """The state of one supervised attempt."""

    def __init__(
        self, job: Job, settings: Settings, trainer_command: tuple[str, ...] | None, standby: Standby | None
    ) -> None:
        self._job = job
        self._settings = settings
        self._command = trainer_command
        self._device: str | None = None
        """What the trainer trains on, once it has said so."""
        with reading() as session:
            self._base_model = model_registry.root_base(session, job)
        self._training = TrainingSpec.model_validate({**job.training, **(job.adapted or {})})
        # Neither used for a job of several processes, its threads being as many as cores, nor started beside one.
        self._standby = standby if self._training.gpus == 1 else None
        self._recorder = Recorder(job, self._base_model, self._training.keep_checkpoints, settings)
        self._folder = RunFolder(settings, job.id, job.fence)
        self._wandb = WandbFeed(job, self._folder.job)
        self._checkpoint_dir = storage.staging_dir(settings, job.id, job.fence)
        self._leash_s = settings.lease_s / 2  # shorter than what is left of a lease when a heartbeat fails to come
        self._looks_s: deque[float] = deque([0.0], maxlen=3)
        """How long the last rounds of the loop took; a long one means that this process stood still."""
        self._silenced = self._overdue = False
        self._resolved: dict[str, object] | None = None
        """Of this attempt, once its trainer has said so."""
        self._trainer: TrainerProcess | None = None
        self._orders: Orders

    def execute(self, lease: LeaseKeeper) -> None:
        self._folder.work.mkdir(parents=True, exist_ok=True)
        make_folder(self._checkpoint_dir)  # on disk before anything in it is called published
        prepared = Preparation(self._job, self._training, self._base_model, self._folder, self._settings, self._write)
        with HostLock.acquire(self._folder.lock) as lock:
            storage.clear_staging(self._settings, self._job.id)  # no trainer of this job runs here now
            data_files = prepared.files()  # first: without them the storage is the wrong one, and says nothing
            base_dir = prepared.base_dir()
            resume_from, complete = prepared.resume_point()
            if complete:
                self._succeed(self._job.total_steps)  # the run had ended; only its settlement was lost
                return
            if lease.cancel_requested.is_set():
                self._settle_cancelled()
                return
            if lease.pause_requested.is_set():
                self._give_back("a pause was asked for and withdrawn")
                return
            spec = prepared.spec(base_dir, data_files, resume_from, self._leash_s)
            memory_kills = memory.kills()
            self._trainer = self._start(spec, lock, lease)
        log.info("trainer %d started for %s", self._trainer.pid, self._job.id)
        try:
            outcome = self._follow(self._trainer, lease)
            self._trainer.kill()
            ours = self._silenced or self._overdue
            killed = outcome is None and not ours and self._trainer.exit_status() == -signal.SIGKILL
            if killed and memory.kills() > memory_kills:
                outcome = memory.KILLED
            self._settle(outcome, lease)
        finally:
            self._trainer.close()

    def _start(self, spec: TrainerSpec, lock: HostLock, lease: LeaseKeeper) -> TrainerProcess:
        """The trainer that waits for a job, or a fresh one."""
        log_path = self._folder.trainer_log
        if self._standby is not None and (ready := self._standby.take(spec, log_path, lock, lease.lost)):
            return ready
        return TrainerProcess(spec, log_path, lock, lease.lost, self._command)

    def _follow(self, trainer: TrainerProcess, lease: LeaseKeeper) -> Message | None:
        """Record messages and pass on orders until the trainer is gone. Returns its last word, None if it had none."""
        verdict: Message | None = None
        orders = self._orders = Orders(trainer, lease, self._settings)
        looked_at = time.monotonic()
        while trainer.exit_status() is None:
            if self._recorder.full:
                lease.lost.wait(TICK_S)
            else:
                verdict = self._take(trainer.read_lines(TICK_S)) or verdict
                if time.monotonic() - trainer.heard_at > self._settings.trainer_silent_s:
                    log.error("trainer of %s says nothing any more; killing it", self._job.id)
                    self._silenced = True
                    trainer.kill()
                    break
            for trouble in self._wandb.troubles():
                self._recorder.add(trouble)
            self._recorder.flush()
            # A trainer that died of its leash did so because of us.
            self._looks_s.append(time.monotonic() - looked_at)
            looked_at = time.monotonic()
            if lease.lost.is_set():
                raise jobs.LeaseLost(f"job {self._job.id} is no longer run by claim {self._job.fence}")
            orders.pass_on()
            if orders.overdue:
                log.warning("trainer of %s did not stop in time; killing it", self._job.id)
                self._overdue = True
                trainer.kill()
        orders.close()
        verdict = self._take(trainer.drain()) or verdict
        began = time.monotonic()
        while not self._recorder.flush():  # a checkpoint is on its way, or the database is away: the end waits for it
            if lease.lost.wait(TICK_S):
                raise jobs.LeaseLost(f"job {self._job.id} is no longer run by claim {self._job.fence}")
            waited_s = time.monotonic() - began
            if lease.cancel_requested.is_set():
                return verdict  # nobody wants it any more
            if lifecycle.shutdown.is_set() and waited_s > self._settings.deploy_stop_s:
                return None  # given back; the next worker finds the checkpoint before
            if waited_s > UNSTORED_LIMIT_S:
                raise storage.StorageUnavailable(
                    f"what the trainer published could not be stored for {waited_s:.0f} s; its worker's log says why"
                )
        return verdict

    def _take(self, lines: list[bytes]) -> Message | None:
        """Queue messages for the record; the ones that end a run are returned instead."""
        verdict: Message | None = None
        for line in lines:
            try:
                message = parse(line)
            except ValueError:
                log.warning("trainer of %s wrote no message: %r", self._job.id, line[:200])
                continue
            if isinstance(message, Started):
                self._resolved, self._device = message.resolved, message.device
            if isinstance(message, Metrics) and self._standby is not None and self._device is not None:
                self._standby.stepping(self._device)
            if isinstance(message, Done | Stopped | Failed):
                verdict = message
            elif not isinstance(message, Alive):
                self._recorder.add(message)
                self._wandb.take(message)
        return verdict

    def _settle(self, verdict: Message | None, lease: LeaseKeeper) -> None:
        match verdict:
            case Done():
                self._succeed(verdict.step)
            case Failed(code="out_of_memory"):
                self._settle_out_of_memory(verdict)
            case Failed(code="device_error"):
                self.settle_retry(f"The trainer's GPU, or what connects it to others, failed: {verdict.message}")
            case Failed():
                self.settle_failed(verdict.code, verdict.message, verdict.param)
            case _ if lease.cancel_requested.is_set():
                self._settle_cancelled()
            case _ if lifecycle.shutdown.is_set():
                self._give_back("its worker was shut down")
            case _ if self._orders.given and self._stopped_as_told(verdict):
                self._give_back("a pause was asked for and withdrawn")
            case _ if max(self._looks_s) > self._leash_s:
                self.settle_fault(f"The worker stood still for {max(self._looks_s):.0f} s and its trainer ended")
            case _:
                self.settle_retry(self._obituary())

    def _stopped_as_told(self, verdict: Message | None) -> bool:
        """Whether it ended because of an order: obeyed, too late, or too early for it to have a handler."""
        assert self._trainer is not None
        return isinstance(verdict, Stopped) or self._overdue or self._trainer.exit_status() == -signal.SIGTERM

    def _settle_out_of_memory(self, verdict: Failed) -> None:
        """Once more with the next rung of the ladder, from the last checkpoint; or failed, with what would fit."""
        # This attempt's own: with an earlier one's, running out while loading would take the same rung for ever.
        rung = None if self._resolved is None else ladder.next_rung(self._training, self._resolved)
        if self._resolved is None and verdict is memory.KILLED:
            self.settle_retry(verdict.message)  # the model may fit another time; it is not known to be the reason
            return
        if rung is None:
            self.settle_failed(verdict.code, verdict.message, verdict.param)
            return
        overrides, message = rung.overrides, rung.message
        self._leave(lambda session: jobs.adapt(session, self._job.id, self._job.fence, overrides, message))

    def _obituary(self) -> str:
        assert self._trainer is not None
        status = self._trainer.exit_status()
        if self._silenced:
            how = f"said nothing for {self._settings.trainer_silent_s:g} s and was killed"
        elif status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        else:
            how = f"exited with {status}"
        last = self._trainer.last_output()
        return f"The trainer {how}" + (f". Its last output: {last}" if last else "")

    def _succeed(self, last_step: int | None) -> None:
        """The last step's checkpoint is the model; its loss curve becomes the result file."""
        with reading() as session:
            newest = checkpoints.newest_first(session, self._job.id)[:1]
        if not newest or newest[0].step != last_step:
            self.settle_retry(f"The final checkpoint, of step {last_step}, was damaged on its way to storage")
            return
        curve = results.write_curve(self._settings, self._job)
        published = []

        def change(session: Session) -> Job:
            job = jobs.owned(session, self._job.id, self._job.fence)
            newest = checkpoints.newest_first(session, job.id)[0]
            name = checkpoints.publish_tuned(session, job, base_model=self._base_model, location=newest.location)
            published.append((name, newest.location))
            results.register(session, job, curve)
            values = {"fine_tuned_model": name, "trained_tokens": newest.tokens, "result_files": [curve.file_id]}
            return jobs.succeed(session, job.id, self._job.fence, **values)

        try:
            self._leave(change)
        except BaseException:
            files.discard_bytes(self._settings, curve.file_id)
            raise
        if self._settings.generation_warm_up:
            warm_up.recommend(connect(self._settings), *published[-1])

    def _give_back(self, reason: str) -> None:
        self._leave(lambda session: jobs.give_back(session, self._job.id, self._job.fence, reason))

    def _settle_cancelled(self) -> None:
        self._leave(lambda session: jobs.settle_cancelled(session, self._job.id, self._job.fence))

    def settle_failed(self, code: str, message: str, param: str | None) -> None:
        self._leave(lambda session: jobs.fail(session, self._job.id, self._job.fence, code, message, param))

    def settle_retry(self, reason: str) -> None:
        most, delay_s = self._settings.max_attempts, self._settings.retry_delay_s
        self._leave(lambda session: jobs.retry_or_fail(session, self._job.id, self._job.fence, reason, most, delay_s))

    def settle_fault(self, reason: str) -> None:
        most, delay_s = self._settings.max_faults, self._settings.retry_delay_s
        self._leave(
            lambda session: jobs.postpone_or_fail(session, self._job.id, self._job.fence, reason, most, delay_s)
        )

    def _leave(self, move: Callable[[Session], Job]) -> None:
        """Out of running, by one of the verbs of `jobs`."""
        left: list[Job] = []
        self._write(lambda session: left.append(move(session)))
        job = left[-1]
        if job.status in TERMINAL:
            summary = {"status": job.status, "fine_tuned_model": job.fine_tuned_model, "error": job.error}
            self._wandb.end(0 if job.status == JobStatus.SUCCEEDED else 1, **summary)

    def _write(self, change: Callable[[Session], object]) -> None:
        """One settling transaction, tried until the database takes it or the claim is lost."""
        while True:
            try:
                with transaction() as session:
                    change(session)
                    written = events.written(session)
            except UNAVAILABLE as error:
                log.warning("%s not settled yet: %s", self._job.id, error)
                time.sleep(1)
            else:
                self._recorder.publish(written)
                return

    def clean_up(self) -> None:
        """Remove scratch folders and half-written checkpoints, those of earlier claims too; trainers' logs stay."""
        self._recorder.close()
        self._wandb.close()
        self._folder.clear()
        for fence in range(1, self._job.fence + 1):
            for leftover in self._checkpoint_dir.with_name(str(fence)).glob(f"{TEMPORARY_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)
