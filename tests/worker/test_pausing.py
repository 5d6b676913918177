"""A pause of a run under real supervision: the trainer saves and stops, and a resumed job ends as if nothing was."""

import csv
import io
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select

from shared import checkpoints, jobs, storage, waiting
from shared.checkpoint_files import sha256_of
from shared.db import reading, transaction
from shared.models import Event, Job, Metric
from shared.settings import Settings
from tests.campaign.toy_trainer import COMMAND
from tests.waiting import LIMIT_S, wait_until
from tests.worker.steps import at_step, claim, expected, in_thread, job_of, messages, run_next, toys
from worker import lifecycle, supervisor, tasks
from worker.trainer_process import TrainerProcess


def pause(job_id: str) -> Job:
    with transaction() as session:
        return waiting.request_pause(session, "default", job_id)


def resume(job_id: str) -> Job:
    with transaction() as session:
        return waiting.resume(session, "default", job_id)


def pause_at(job_id: str, step: int, settings: Settings) -> None:
    """Run the next job, which is this one, and pause it when it has done the step."""
    thread = in_thread(claim(settings), settings)
    wait_until(lambda: at_step(job_id, step))
    assert pause(job_id).status == "running"
    thread.join(LIMIT_S)
    assert not thread.is_alive() and toys() == []


def metrics_of(job_id: str) -> dict[int, dict[str, Any]]:
    with reading() as session:
        return {row.step: row.values for row in session.scalars(select(Metric).where(Metric.job_id == job_id))}


def test_a_paused_job_resumed_twice_equals_one_that_nobody_paused(
    settings: Settings, submit: Callable[..., str]
) -> None:
    job_id = submit(steps=100, step_s=0.05, validated=True)
    stood_at: list[int] = []
    for _ in range(2):
        pause_at(job_id, 3 + max(stood_at, default=0), settings)
        job = job_of(job_id)
        with reading() as session:
            newest = checkpoints.newest_first(session, job_id)[0]
        assert (job.status, job.attempts, job.faults, job.estimated_finish) == ("paused", 0, 0, None)
        assert newest.resumable and newest.step == job.current_step, "nothing that was done is lost"
        stood_at.append(newest.step)
        assert messages(job_id)[-1] == f"Job paused at step {newest.step}"
        assert resume(job_id).status == "queued"
    run_next(settings)
    job, wanted = job_of(job_id), expected(settings, job_of(job_id), 100)
    assert (job.status, job.fence) == ("succeeded", 3), job.error
    with reading() as session:
        location = checkpoints.newest_first(session, job_id)[0].location
    assert sha256_of(settings.storage_root / location / "model.safetensors") == wanted.weights_sha256
    assert job.trained_tokens == wanted.tokens[-1]
    curve = metrics_of(job_id)
    assert [curve[step]["loss"] for step in range(1, 101)] == wanted.losses
    assert [curve[step]["tokens"] for step in range(1, 101)] == wanted.tokens
    said = messages(job_id)
    assert [said.count(f"Resumed from step {step}") for step in stood_at] == [1, 1]
    assert sum(message.startswith("Resumed from") for message in said) == 2
    assert all(sum(message.startswith(f"Step {step}/100") for message in said) == 1 for step in range(1, 101))


def test_a_worker_whose_job_was_paused_goes_on_with_the_next(
    settings: Settings, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = supervisor.supervise
    monkeypatch.setattr(supervisor, "supervise", lambda job, settings, **_: real(job, settings, COMMAND))
    paused, other = submit(steps=1000, step_s=0.03), submit(steps=2)
    claimed: list[str] = []

    def watch() -> bool:
        if at_step(paused, 2) and not claimed:
            claimed.append(pause(paused).id)
        return job_of(other).status == "succeeded"

    thread = threading.Thread(target=tasks.train)
    thread.start()
    wait_until(watch)
    thread.join(LIMIT_S)
    assert (job_of(paused).status, job_of(other).status) == ("paused", "succeeded")


def test_a_pause_is_obeyed_however_little_of_the_run_there_is(settings: Settings, submit: Callable[..., str]) -> None:
    for delay_s in (0.0, 0.1, 0.3, 0.6, 1.0):
        job_id = submit(steps=1000, step_s=0.05)
        thread = in_thread(claim(settings), settings)
        time.sleep(delay_s)
        pause(job_id)
        thread.join(LIMIT_S)
        assert (job_of(job_id).status, job_of(job_id).attempts) == ("paused", 0), messages(job_id)


def test_a_trainer_that_does_not_stop_in_time_is_killed_and_its_job_paused(
    settings: Settings, submit: Callable[..., str]
) -> None:
    quick = settings.model_copy(update={"deploy_stop_s": 0.5})
    job_id = submit(steps=1000, step_s=0.05, save_steps=2, behaviour="deaf")
    began = time.monotonic()
    pause_at(job_id, 5, quick)
    assert time.monotonic() - began < 30, "it would train for 50 s"
    job = job_of(job_id)
    assert (job.status, job.attempts) == ("paused", 0)
    with reading() as session:
        saved = checkpoints.newest_first(session, job_id)[0].step
    assert messages(job_id)[-1] == f"Job paused at step {saved}"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a trainer has been sent a signal."""
    event, send = threading.Event(), TrainerProcess.send

    def send_and_tell(trainer: TrainerProcess, number: signal.Signals) -> None:
        send(trainer, number)
        event.set()

    monkeypatch.setattr(TrainerProcess, "send", send_and_tell)
    return event


def test_a_pause_that_is_withdrawn_after_the_trainer_was_told_sends_the_job_to_the_queue(
    settings: Settings, submit: Callable[..., str], told: threading.Event
) -> None:
    job_id = submit(steps=8, step_s=1.0)  # stops at the end of a step, and there is time to change one's mind
    thread = in_thread(claim(settings), settings)
    wait_until(lambda: at_step(job_id, 1))
    pause(job_id)
    assert told.wait(LIMIT_S)
    assert resume(job_id).status == "running"
    thread.join(LIMIT_S)
    job = job_of(job_id)
    assert (job.status, job.attempts, job.pause_requested_at) == ("queued", 0, None)
    assert not any(message.startswith("Job paused") for message in messages(job_id))
    assert messages(job_id).index("Pause requested") < messages(job_id).index("Job resumed")


def test_a_cancel_wins_while_a_trainer_saves_for_a_pause(
    settings: Settings, submit: Callable[..., str], told: threading.Event
) -> None:
    quick = settings.model_copy(update={"trainer_stop_s": 0.5})
    job_id = submit(steps=1000, step_s=0.05, behaviour="deaf")
    thread = in_thread(claim(settings), quick)
    wait_until(lambda: at_step(job_id, 2))
    pause(job_id)
    assert told.wait(LIMIT_S)
    began = time.monotonic()
    with transaction() as session:
        jobs.request_cancel(session, "default", job_id)
    thread.join(LIMIT_S)
    assert job_of(job_id).status == "cancelled"
    assert time.monotonic() - began < 30, "the deadline is the cancel's, not the minute of the pause"


def test_a_deploy_while_a_pause_is_asked_for_ends_paused(
    settings: Settings, submit: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "shutdown", lifecycle.Shutdown())
    job_id = submit(steps=1000, step_s=0.05)
    blind = settings.model_copy(update={"poll_s": 30.0, "heartbeat_s": 10.0})  # it never reads the request
    thread = in_thread(claim(settings), blind)
    wait_until(lambda: at_step(job_id, 2))
    pause(job_id)
    lifecycle.shutdown.set()
    thread.join(LIMIT_S)
    assert job_of(job_id).status == "paused"


def test_a_trainer_that_dies_while_a_pause_is_asked_for_leaves_a_paused_job_with_the_reason(
    settings: Settings, submit: Callable[..., str]
) -> None:
    job_id = submit(steps=5, save_steps=1, step_s=0.8, behaviour="kill_at_3")
    blind = settings.model_copy(update={"poll_s": 30.0, "heartbeat_s": 10.0})
    thread = in_thread(claim(settings), blind)
    wait_until(lambda: at_step(job_id, 1))
    pause(job_id)
    thread.join(LIMIT_S)
    assert job_of(job_id).status == "paused"
    said = messages(job_id)
    assert said[-1] == "Job paused at step 2" and "SIGKILL" in said[-2]
    resume(job_id)
    run_next(settings)
    assert job_of(job_id).status == "succeeded"


def test_a_run_that_ends_while_a_pause_is_asked_for_has_succeeded(
    settings: Settings, submit: Callable[..., str]
) -> None:
    job_id = submit(steps=3, step_s=0.8)
    blind = settings.model_copy(update={"poll_s": 30.0, "heartbeat_s": 10.0})
    thread = in_thread(claim(settings), blind)
    wait_until(lambda: at_step(job_id, 1))
    pause(job_id)
    thread.join(LIMIT_S)
    assert job_of(job_id).status == "succeeded"


def test_a_checkpoint_shows_nothing_of_steps_after_it(settings: Settings, submit: Callable[..., str]) -> None:
    """A dead attempt had gone further, and its rows stay until they are overwritten."""
    job_id = submit(steps=5, save_steps=2, eval_steps=3, validated=True)
    with transaction() as session:
        for step in (4, 5):
            values = {"loss": 9.0, "eval_loss": 9.0}
            session.add(Metric(job_id=job_id, step=step, project_id="default", values=values))
    run_next(settings)
    with reading() as session:
        saved = {row.step: row.metrics for row in checkpoints.newest_first(session, job_id)}
    assert saved[2] == {"step": 2, "train_loss": expected(settings, job_of(job_id), 5).losses[1]}


def test_numbers_of_validation_have_openais_names_everywhere(settings: Settings, submit: Callable[..., str]) -> None:
    job_id = submit(steps=7, save_steps=2, eval_steps=3, validated=True)
    run_next(settings)
    wanted = expected(settings, job_of(job_id), 7)
    evaluated = {step: wanted.validation_losses[step] for step in (3, 6, 7)}
    with reading() as session:
        saved = {row.step: row.metrics for row in checkpoints.newest_first(session, job_id)}
        told = [event.data for event in session.scalars(select(Event).where(Event.type == "metrics")) if event.data]
    assert saved[4] == {"step": 4, "train_loss": wanted.losses[3], "valid_loss": evaluated[3]}
    assert saved[6] == {
        "step": 6,
        "train_loss": wanted.losses[5],
        "valid_loss": evaluated[6],
        "full_valid_loss": evaluated[6],
    }
    assert {data["step"]: data["train_loss"] for data in told if "train_loss" in data} == dict(
        enumerate(wanted.losses, 1)
    )
    assert {data["step"]: data["full_valid_loss"] for data in told if "full_valid_loss" in data} == evaluated
    assert {data["total_steps"] for data in told} == {7}
    file = storage.local_file(settings, job_of(job_id).result_files[0]).read_text()
    rows = {int(row["step"]): row for row in csv.DictReader(io.StringIO(file))}
    assert {step: float(row["valid_loss"]) for step, row in rows.items() if row["valid_loss"]} == evaluated
