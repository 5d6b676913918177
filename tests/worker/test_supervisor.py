"""Supervision with the real database, pipes, signals and checkpoints; only the arithmetic is a toy's."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from shared import checkpoints, jobs, model_registry, storage
from shared.checkpoint_files import sha256_of
from shared.db import now, reading, transaction
from shared.errors import Unavailable
from shared.models import Checkpoint, Event, File, Job, Metric, Model, Sweep
from shared.settings import Settings
from tests.waiting import LIMIT_S, is_alive, wait_until
from tests.worker.steps import (
    BASE,
    TOY,
    after_grace,
    at_step,
    claim,
    expected,
    failing,
    in_thread,
    job_of,
    messages,
    run_next,
    toys,
)
from worker import base_models, gpu_watch, lifecycle, recorder, run_folder, supervisor, tasks
from worker.host_lock import HostLock
from worker.sweeper import Sweeper


def test_a_finished_run_leaves_a_model_metrics_events_and_a_result_file(
    settings: Settings, submit: Callable[..., str]
) -> None:
    job_id = submit(steps=5, save_steps=2, validated=True)
    run_next(settings)
    job = job_of(job_id)
    wanted = expected(settings, job, 5)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == f"ft:smollm2-135m-instruct:default:toy:{job_id[6:14]}"
    assert job.trained_tokens == wanted.tokens[-1] and job.estimated_finish is None
    with reading() as session:
        assert list(session.scalars(select(Metric.step).order_by(Metric.step))) == [1, 2, 3, 4, 5]
        steps = {row.step: row for row in session.scalars(select(Checkpoint))}
        assert sorted(steps) == [2, 4, 5]
        valid = wanted.validation_losses[2]
        assert steps[2].metrics == {
            "step": 2,
            "train_loss": wanted.losses[1],
            "valid_loss": valid,
            "full_valid_loss": valid,
        }
        model = session.get(Model, job.fine_tuned_model)
        assert model is not None and model.location == steps[5].location
        assert session.get(Model, f"{job.fine_tuned_model}:ckpt-step-2") is not None
        sequences = list(session.scalars(select(Event.sequence).order_by(Event.sequence)))
        assert sequences == list(range(1, len(sequences) + 1))
        result = session.get(File, job.result_files[0])
        assert result is not None and result.purpose == "fine-tune-results"
    curve = storage.local_file(settings, result.id).read_text().splitlines()
    assert curve[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert curve[2] == f"2,{wanted.losses[1]},,{wanted.validation_losses[2]},"
    assert sha256_of(settings.storage_root / model.location / "model.safetensors") == wanted.weights_sha256


def test_only_the_newest_checkpoints_and_the_best_are_kept(settings: Settings, submit: Callable[..., str]) -> None:
    job_id = submit({"keep_checkpoints": 2}, steps=10, save_steps=1, validated=True)
    run_next(settings)
    losses = expected(settings, job_of(job_id), 10).validation_losses
    best = min(losses, key=lambda step: losses[step])
    kept = sorted({best, 9, 10})
    assert best not in (9, 10), "or this proves nothing"
    with reading() as session:
        rows = checkpoints.newest_first(session, job_id)
        assert sorted(row.step for row in rows) == kept
        tuned = model_registry.tuned_name(job_of(job_id), BASE)
        assert session.get(Model, f"{tuned}:ckpt-step-{best}") is not None
        forgotten = next(step for step in range(1, 9) if step != best)
        assert session.get(Model, f"{tuned}:ckpt-step-{forgotten}") is None
    folder = storage.staging_dir(settings, job_id, 1)
    assert sorted(int(path.name) for path in folder.iterdir()) == kept


def test_small_checkpoints_that_pile_up_are_registered_together(
    settings: Settings, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[bool] = []
    flush = recorder.Recorder.flush
    monkeypatch.setattr(recorder.Recorder, "flush", lambda self: rounds.append(flush(self)) or rounds[-1])
    job_id = submit(steps=60, save_steps=1, step_s=0.0)
    run_next(settings)
    assert job_of(job_id).status == "succeeded"
    assert len(rounds) < 40, "not one a round, of a fifth of a second each"


def test_a_killed_trainer_goes_on_from_its_checkpoint_and_repeats_no_metric(
    settings: Settings, submit: Callable[..., str]
) -> None:
    job_id = submit(steps=5, save_steps=1, behaviour="kill_at_3")
    run_next(settings)
    assert job_of(job_id).status == "queued"
    run_next(settings)
    job = job_of(job_id)
    assert (job.status, job.fence, job.attempts) == ("succeeded", 2, 0)
    said = messages(job_id)
    assert sum(message.startswith("Step 2/5") for message in said) == 1
    assert sum(message == "Resumed from step 2" for message in said) == 1


def test_a_poison_job_fails_after_three_attempts_with_its_last_words(
    settings: Settings, submit: Callable[..., str]
) -> None:
    job_id = submit(behaviour="poison")
    for _ in range(3):
        run_next(settings)
    job = job_of(job_id)
    assert job.status == "failed" and job.error is not None
    assert job.error["code"] == "trainer_died"
    assert "SIGKILL" in job.error["message"] and "the last words" in job.error["message"]
    assert sum(message.startswith("Step 1/5") for message in messages(job_id)) == 1


def test_progress_fills_the_crash_budget_again(settings: Settings, submit: Callable[..., str]) -> None:
    job_id = submit(steps=5, save_steps=1, behaviour="kill_at_3")
    with transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(attempts=2))
    run_next(settings)  # publishes steps 1 and 2, then dies: that is progress
    assert job_of(job_id).status == "queued"


def test_an_error_the_trainer_explains_is_final(settings: Settings, submit: Callable[..., str]) -> None:
    job_id = submit(steps=5, save_steps=2, behaviour="diverge")
    run_next(settings)
    job = job_of(job_id)
    assert job.status == "failed" and job.error is not None
    assert job.error["code"] == "diverged" and "step 3" in job.error["message"]
    with reading() as session:
        assert [row.step for row in checkpoints.newest_first(session, job_id)] == [2]


def test_a_job_whose_gpu_failed_is_tried_again_and_says_why(settings: Settings, submit: Callable[..., str]) -> None:
    job_id = submit(steps=5)
    for attempt in range(1, settings.max_attempts + 1):
        assert job_of(job_id).status == "queued", attempt
        after_grace(settings)
        supervisor.supervise(claim(settings), settings, failing("device_error", "CUDA error: uncorrectable ECC error"))
    job = job_of(job_id)
    assert job.status == "failed" and job.error is not None
    assert job.error["code"] == "trainer_died" and "uncorrectable ECC error" in job.error["message"]


def test_a_worker_that_has_lost_a_gpu_claims_nothing(
    settings: Settings, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there = [2]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu_watch, "count_gpus", lambda: there[0])
    monkeypatch.setattr(gpu_watch, "_began_with", 0)
    gpu_watch.begin()
    assert gpu_watch.missing() == 0
    there[0] = 1
    job_id = submit(steps=5)
    tasks.train()
    assert job_of(job_id).status == "queued"
    assert "1 of this worker's GPUs are gone" in caplog.text


def test_the_folder_of_a_run_of_weeks_stays_while_it_is_locked(settings: Settings) -> None:
    folder = run_folder.RunFolder(settings, "ftjob-1", 1)
    with HostLock.acquire(folder.lock):
        run_folder.forget_old(settings, kept_s=-1)
        assert folder.lock.exists()
    run_folder.forget_old(settings, kept_s=-1)
    assert not folder.job.exists()


def test_a_cancel_stops_a_running_job(settings: Settings, submit: Callable[..., str]) -> None:
    patient = settings.model_copy(update={"trainer_stop_s": 60})  # it is not killed, it obeys
    job_id = submit(steps=5000, step_s=0.05)
    thread = in_thread(claim(settings), patient)
    wait_until(lambda: (job_of(job_id).current_step or 0) > 2)
    started = time.monotonic()
    with transaction() as session:
        assert jobs.request_cancel(session, "default", job_id).status == "running"
    thread.join(LIMIT_S)
    assert time.monotonic() - started < 30
    assert job_of(job_id).status == "cancelled"
    assert toys() == []


def test_a_trainer_deaf_to_signals_is_killed(settings: Settings, submit: Callable[..., str]) -> None:
    quick = settings.model_copy(update={"trainer_stop_s": 0.5})
    job_id = submit(steps=1000, step_s=0.05, behaviour="deaf")
    thread = in_thread(claim(settings), quick)
    wait_until(lambda: (job_of(job_id).current_step or 0) > 1)
    with transaction() as session:
        jobs.request_cancel(session, "default", job_id)
    thread.join(LIMIT_S)
    assert job_of(job_id).status == "cancelled"
    assert toys() == []


def test_a_worker_that_shuts_down_saves_and_gives_the_job_back(
    settings: Settings, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "shutdown", lifecycle.Shutdown())
    job_id = submit(steps=1000, step_s=0.05)
    thread = in_thread(claim(settings), settings)
    wait_until(lambda: (job_of(job_id).current_step or 0) > 2)
    lifecycle.shutdown.set()
    thread.join(LIMIT_S)
    job = job_of(job_id)
    assert (job.status, job.attempts, job.lease_until) == ("queued", 0, None)
    with reading() as session:
        newest = checkpoints.newest_first(session, job_id)[0]
    assert newest.resumable and newest.step >= 3


def test_a_run_that_lost_its_claim_commits_nothing_more(settings: Settings, submit: Callable[..., str]) -> None:
    job_id = submit(steps=100_000, step_s=0.02, save_steps=3)
    slow = settings.model_copy(update={"poll_s": 1.5})  # the trainer goes on for a while after the claim is gone
    thread = in_thread(claim(settings), slow)
    wait_until(lambda: (job_of(job_id).current_step or 0) > 2)
    with transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(fence=Job.fence + 1))
    before = everything_of(job_id)
    thread.join(LIMIT_S)
    assert not thread.is_alive() and toys() == []
    assert everything_of(job_id) == before


def everything_of(job_id: str) -> tuple[Any, ...]:
    """What a run writes: (status, fence, step, metrics, events, checkpoints)."""
    with reading() as session:
        job = session.get(Job, job_id)
        assert job is not None
        metrics = list(session.scalars(select(Metric.step).where(Metric.job_id == job_id).order_by(Metric.step)))
        saved = [row.step for row in checkpoints.newest_first(session, job_id)]
    return job.status, job.fence, job.current_step, metrics, messages(job_id), saved


def test_a_final_checkpoint_damaged_before_it_is_registered_is_not_a_model(
    settings: Settings, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recorder.verify

    def damage(path: Path) -> Any:
        if path.name == "5" and "/1/" in str(path):  # the first attempt's last step
            (path / "model.safetensors").write_text("not what was written")
        return whole(path)

    monkeypatch.setattr(recorder, "verify", damage)
    job_id = submit(steps=5, save_steps=2)
    run_next(settings)
    job = job_of(job_id)
    assert (job.status, job.fine_tuned_model) == ("queued", None)
    run_next(settings)
    assert job_of(job_id).status == "succeeded"


def test_a_fault_that_is_not_the_trainers_waits_and_spends_another_budget(
    settings: Settings, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any) -> None:
        raise Unavailable("the hub is out of reach; try again")

    resolve = base_models.resolve
    patient = settings.model_copy(update={"retry_delay_s": 60})
    job_id = submit()
    with monkeypatch.context() as patch:
        patch.setattr(base_models, "resolve", unreachable)
        supervisor.supervise(claim(settings), patient, TOY)
    job = job_of(job_id)
    assert (job.status, job.attempts, job.faults) == ("queued", 0, 1)
    with transaction() as session:
        assert jobs.claim_next(session, "w", 60) is None, "it waits before it is tried again"
        session.execute(update(Job).values(not_before=now() - 1))
    assert base_models.resolve is resolve
    run_next(settings)
    job = job_of(job_id)
    assert (job.status, job.faults) == ("succeeded", 0)


def test_a_trainer_that_can_not_be_started_leaves_no_process_and_no_secret(
    settings: Settings, submit: Callable[..., str]
) -> None:
    job_id = submit()
    supervisor.supervise(claim(settings), settings, ("/nonexistent/program",))
    assert job_of(job_id).status == "queued"
    assert "/nonexistent" not in " ".join(messages(job_id))


def test_a_job_with_a_cancel_requested_is_not_given_back(settings: Settings, submit: Callable[..., str]) -> None:
    job_id = submit()
    claim(settings)
    with transaction() as session:
        jobs.request_cancel(session, "default", job_id)
    with transaction() as session:
        jobs.give_back(session, job_id, 1, "deploy")
    assert job_of(job_id).status == "cancelled"


def test_after_an_outage_nothing_expires_until_everybody_had_a_lease(
    settings: Settings, submit: Callable[..., str]
) -> None:
    job_id = submit()
    claim(settings)
    with transaction() as session:
        session.execute(update(Job).values(lease_until=now() - 1))
    after_grace(settings)
    with transaction() as session:  # as if the database had been away that long
        session.execute(update(Sweep).values(last_pass_at=now() - settings.lease_s))
    Sweeper(settings).expire_leases()
    assert job_of(job_id).status == "running"
    Sweeper(settings).expire_leases()  # another process: the grace is everybody's
    assert job_of(job_id).status == "running"
    after_grace(settings)
    Sweeper(settings).expire_leases()
    assert job_of(job_id).status == "queued"


def test_an_expired_lease_returns_the_job_to_the_queue(settings: Settings, submit: Callable[..., str]) -> None:
    job_id = submit()
    claim(settings)
    after_grace(settings)
    Sweeper(settings).expire_leases()
    assert job_of(job_id).status == "running", "the lease is still good"
    with transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=now() - 1))
    Sweeper(settings).expire_leases()
    assert job_of(job_id).status == "queued"
    assert any("fell silent" in message for message in messages(job_id))


def test_a_run_whose_settlement_was_lost_is_settled_without_training_again(
    settings: Settings, submit: Callable[..., str]
) -> None:
    job_id = submit(steps=3)
    run_next(settings)
    with transaction() as session:  # as if the worker had died between the final checkpoint and `succeeded`
        session.execute(update(Job).where(Job.id == job_id).values(status="queued", fine_tuned_model=None))
    events_before = len(messages(job_id))
    run_next(settings)
    job = job_of(job_id)
    assert job.status == "succeeded" and job.fine_tuned_model is not None
    assert not any("Fine-tuning job started" in message for message in messages(job_id)[events_before:])


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    settings: Settings, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "shutdown", lifecycle.Shutdown())
    job_id = submit(steps=8, save_steps=1, step_s=0.1)
    thread = in_thread(claim(settings), settings)
    wait_until(lambda: at_step(job_id, 3))
    lifecycle.shutdown.set()
    thread.join(LIMIT_S)
    with reading() as session:
        newest, before = checkpoints.newest_first(session, job_id)[:2]
    weights = settings.storage_root / newest.location / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setattr(lifecycle, "shutdown", lifecycle.Shutdown())
    run_next(settings)
    assert job_of(job_id).status == "succeeded"
    assert any(message == f"Resumed from step {before.step}" for message in messages(job_id))


def test_a_flood_and_garbage_from_the_trainer_do_no_harm(settings: Settings, submit: Callable[..., str]) -> None:
    for behaviour in ("flood", "garbage"):
        job_id = submit(steps=2, behaviour=behaviour)
        run_next(settings)
        assert job_of(job_id).status == "succeeded"
    logs = list((settings.run_dir / "jobs").rglob("trainer-*.log"))
    assert logs and all(log.stat().st_size <= 11 * 2**20 for log in logs)


def test_a_supervisor_killed_outright_takes_its_trainer_with_it(settings: Settings, submit: Callable[..., str]) -> None:
    submit(steps=1000, step_s=0.05)
    child = os.fork()
    if child == 0:
        from shared import db

        db.reset()
        run_next(settings)
        os._exit(0)
    wait_until(lambda: bool(toys()))
    trainer = toys()[0]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_until(lambda: not is_alive(trainer))
