"""The integration with Weights & Biases, its own library in its own process, offline; read with its own reader."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select, update

from shared.db import reading, transaction
from shared.models import Event, Job, Metric
from shared.settings import Settings
from shared.trainer_protocol import Started
from tests.waiting import is_alive, wait_until
from tests.worker.steps import expected, job_of, messages, run_next
from worker import wandb_feed
from worker.training.environment import trainer_environment

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # nothing here is about databases

PROJECT = "tickets"
CHOICES = {"project": PROJECT, "name": "a try", "entity": "a-team", "tags": ["mine"]}


@pytest.fixture
def submit_reported(settings: Settings, submit: Callable[..., str]) -> Callable[..., str]:
    """Store a job of the toy that asks for the integration."""

    def submit_reported(**plan: Any) -> str:
        job_id = submit(**plan)
        with transaction() as session:
            integrations = [{"type": "wandb", "wandb": CHOICES}]
            session.execute(update(Job).where(Job.id == job_id).values(integrations=integrations))
        return job_id

    return submit_reported


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def records(file: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    lines = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.splitlines()
    return [json.loads(line) for line in lines]


def finished_runs(settings: Settings, job_id: str, count: int) -> list[list[dict[str, Any]]]:
    """Records of the job's runs, the oldest first, once there are so many and their processes have ended."""
    folder = settings.run_dir / "jobs" / job_id / "wandb"

    def files() -> list[Path]:
        return sorted(folder.glob(f"offline-run-*/run-{job_id}.wandb"), key=lambda path: path.stat().st_mtime)

    wait_until(lambda: len(files()) >= count and not reporters(), 60)
    return [records(file) for file in files()]


def reporters() -> list[psutil.Process]:
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if _reports(process)]


def _reports(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "worker.wandb_report" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def history(run: list[dict[str, Any]], name: str) -> dict[int, float]:
    items = [record["history"]["item"] for record in run if record["type"] == "history"]
    return {item["_step"]: item[name] for item in items if name in item}


def exit_code(run: list[dict[str, Any]]) -> int:
    return int(next(record["exit"].get("exit_code", 0) for record in run if record["type"] == "exit"))


@pytest.mark.usefixtures("offline")
def test_a_job_that_asks_for_it_leaves_a_run_with_its_curve(
    settings: Settings, submit_reported: Callable[..., str]
) -> None:
    job_id = submit_reported(steps=5, save_steps=2, validated=True)
    run_next(settings)
    assert job_of(job_id).status == "succeeded"
    wanted = expected(settings, job_of(job_id), 5)
    (run,) = finished_runs(settings, job_id, 1)
    about = next(record["run"] for record in run if record["type"] == "run")
    assert (about["run_id"], about["project"], about["entity"]) == (job_id, PROJECT, "a-team")
    assert about["display_name"] == "a try" and {"mine", f"anneal/{job_id}"} <= set(about["tags"])
    assert about["config"]["update"]["seed"] == job_of(job_id).seed
    assert history(run, "train_loss") == dict(enumerate(wanted.losses, 1))
    assert history(run, "valid_loss") == {step: wanted.validation_losses[step] for step in (2, 4, 5)}
    assert exit_code(run) == 0
    summaries = [record["summary"]["update"] for record in run if record["type"] == "summary"]
    assert any(summary.get("status") == "succeeded" for summary in summaries)


@pytest.mark.usefixtures("offline")
def test_a_run_that_was_broken_off_goes_on_under_its_id_with_the_whole_curve(
    settings: Settings, submit_reported: Callable[..., str]
) -> None:
    job_id = submit_reported(steps=5, save_steps=1, behaviour="kill_at_3")
    run_next(settings)
    (first,) = finished_runs(settings, job_id, 1)
    assert list(history(first, "train_loss")) == [1, 2]
    assert exit_code(first) == 1 and any(record["type"] == "preempting" for record in first)
    time.sleep(1)  # their folders are named by the second
    run_next(settings)
    _, second = finished_runs(settings, job_id, 2)
    wanted = expected(settings, job_of(job_id), 5)
    assert history(second, "train_loss") == dict(enumerate(wanted.losses, 1))
    assert exit_code(second) == 0


def test_without_a_key_the_job_runs_and_says_once_what_is_missing(
    settings: Settings, submit_reported: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    job_id = submit_reported(steps=5, save_steps=1, behaviour="kill_at_3")
    for _ in range(2):
        run_next(settings)
    assert job_of(job_id).status == "succeeded"
    with reading() as session:
        warned = session.scalars(select(Event).where(Event.level == "warn", Event.message.contains("Biases"))).all()
    assert len(warned) == 1 and "WANDB_API_KEY is not set on the worker" in warned[0].message
    assert not (settings.run_dir / "jobs" / job_id / "wandb").exists()


@pytest.mark.usefixtures("offline")
def test_a_job_that_does_not_ask_for_it_starts_no_process(settings: Settings, submit: Callable[..., str]) -> None:
    job_id = submit(steps=3)
    run_next(settings)
    assert not list((settings.run_dir / "jobs" / job_id).glob("wandb*"))


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Put a package of the same name in the way of the real one."""
    (folder / "wandb.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{Path.cwd()}")


@pytest.mark.parametrize("code", ["raise SystemExit('no disk for this')", "import time; time.sleep(600)"])
@pytest.mark.usefixtures("offline")
def test_a_process_that_fails_neither_fails_nor_delays_the_run(
    code: str,
    settings: Settings,
    submit_reported: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    stand_in(monkeypatch, tmp_path, code)
    job_id = submit_reported(steps=60, step_s=0.05)
    began = time.monotonic()
    run_next(settings)
    assert time.monotonic() - began < 20
    assert job_of(job_id).status == "succeeded"
    with reading() as session:
        assert len(session.scalars(select(Metric)).all()) == 60
    assert any("no disk for this" in message for message in messages(job_id)) == ("no disk" in code)
    for left in reporters():
        left.kill()


@pytest.mark.usefixtures("offline")
def test_a_process_that_reads_no_more_is_killed_soon_after_the_end(
    settings: Settings, submit_reported: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in(monkeypatch, tmp_path, "import time; time.sleep(600)")
    monkeypatch.setattr(wandb_feed, "END_LIMIT_S", 0.5)
    job = job_of(submit_reported())
    feed = wandb_feed.WandbFeed(job, tmp_path)
    feed.take(
        Started(
            resolved={},
            total_steps=1,
            first_step=1,
            train_examples=1,
            validation_examples=0,
            train_tokens=1,
            parameters=1,
            device="cpu",
            versions={},
        )
    )
    wait_until(lambda: bool(reporters()))
    feed.end(0, note="x" * 2**20)  # more than a pipe holds
    feed.close()
    wait_until(lambda: not reporters())
    wait_until(lambda: not any(thread.name == f"wandb-{job.id}" for thread in threading.enumerate()))


@pytest.mark.parametrize("code", ["import time; time.sleep(600)", None])
@pytest.mark.usefixtures("offline")
def test_its_processes_die_with_their_worker(
    code: str | None,
    settings: Settings,
    submit_reported: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The one that hangs, and the real one, which has a child of its own."""
    if code is not None:
        stand_in(monkeypatch, tmp_path, code)
    submit_reported(steps=1000, step_s=0.05)
    child = os.fork()
    if child == 0:
        from shared import db

        db.reset()
        run_next(settings)
        os._exit(0)

    def processes() -> list[psutil.Process]:
        return [p for p in psutil.Process(child).children(recursive=True) if is_of_wandb(p)]

    wait_until(lambda: len(processes()) == (2 if code is None else 1))
    left = processes()
    os.kill(child, 9)
    os.waitpid(child, 0)
    wait_until(lambda: not any(map(is_alive, left)))


def is_of_wandb(process: psutil.Process) -> bool:
    try:
        return "wandb" in " ".join([process.name(), *process.cmdline()])
    except psutil.NoSuchProcess:
        return False


@pytest.mark.usefixtures("settings")
def test_a_trainer_never_sees_the_key() -> None:
    base = {"WANDB_API_KEY": "secret", "WANDB_MODE": "offline", "WANDB_BASE_URL": "https://example.org", "PATH": "/bin"}
    assert not [name for name in trainer_environment(base) if name.startswith("WANDB")]
