"""What workers and sweeps do, through their own tasks, with a trainer in a process of its own."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import select

from shared import db, jobs, results, storage
from shared.db import reading, transaction
from shared.models import Checkpoint, FileStatus, Job
from tests.failpoints import toy
from tests.failpoints.scenario import LARGE, SUCCEEDS, Facts, Scenario, collect_all, facts_of, take_back, time_passes
from tests.failpoints.world import World
from worker import lifecycle, tasks
from worker.lease import LeaseKeeper
from worker.sweeper import Sweeper

SHORTLY_S = 15.0


def _prepare_unchecked(world: World) -> Facts:
    good = world.add_file(toy.rows(steps=2) + LARGE, FileStatus.UPLOADED)
    bad = world.add_file(LARGE + b'{"prompt": "no completion"}\n', FileStatus.UPLOADED)
    facts = facts_of(world, world.submit(good))
    facts["ends"][world.submit(bad)] = ["failed"]
    return facts


def running(name: str, plan: dict[str, Any], ends: list[str] | None = None, **training: Any) -> Scenario:
    """One job from its claim to its end."""

    def prepare(world: World) -> Facts:
        validation = world.add_file(b'{"prompt": "q", "completion": "a"}\n')
        file_id = world.add_file(toy.rows(**plan))
        return facts_of(world, world.submit(file_id, validation_file=validation, **training), ends)

    return Scenario(name, prepare, lambda world, facts: tasks.train())


def step_of(job_id: str) -> int:
    with reading() as session:
        return session.scalar(select(Job.current_step).where(Job.id == job_id)) or 0


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SHORTLY_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


def meanwhile(condition: Callable[[], bool], then: Callable[[], None]) -> None:
    """Do something from another thread once the run is under way."""

    def watch() -> None:
        _wait_for(condition)
        then()

    threading.Thread(target=watch, daemon=True).start()


def _prepare_long_run(world: World) -> Facts:
    return facts_of(world, world.add_job({"steps": 12, "save_steps": 5, "step_s": 0.1}))


def _run_until_deploy(world: World, facts: Facts) -> None:
    meanwhile(lambda: step_of(facts["job"]) >= 3, lambda: lifecycle.shutdown.set())
    tasks.train()


def _prepare_cancellable(world: World) -> Facts:
    # Saved well before the cancel can come, so that every run has the same points.
    return {"job": world.add_job({"steps": 12, "save_steps": 2, "step_s": 0.1}), "ends": {}}


def _run_until_cancel(world: World, facts: Facts) -> None:
    def cancel() -> None:
        with transaction() as session:
            jobs.request_cancel(session, "default", facts["job"])

    meanwhile(lambda: step_of(facts["job"]) >= 3, cancel)
    tasks.train()


def _die_on(owner: Any, name: str) -> None:
    def die(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, die)


def run_and_be_killed(world: World, when: Callable[[str], None], plan: dict[str, Any], **training: Any) -> str:
    """A job whose first worker is killed; then its lease runs out and the sweep takes it back. Returns its id."""
    job_id = world.add_job(plan, **training)
    child = os.fork()
    if child == 0:
        db.reset()
        when(job_id)
        tasks.train()
        os._exit(0)
    os.waitpid(child, 0)
    return job_id


def at_step_3(job_id: str) -> None:
    meanwhile(lambda: step_of(job_id) >= 3, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _prepare_interrupted(world: World) -> Facts:
    plan = {"steps": 6, "save_steps": 1, "step_s": 0.03}
    job_id = run_and_be_killed(world, at_step_3, plan, keep_checkpoints=2)
    take_back(world)
    return facts_of(world, job_id)


def _prepare_damaged(world: World) -> Facts:
    facts = _prepare_interrupted(world)
    with reading() as session:
        newest = session.scalars(
            select(Checkpoint).where(Checkpoint.job_id == facts["job"]).order_by(Checkpoint.step.desc())
        ).first()
    if newest is not None:
        weights = world.settings.storage_root / newest.location / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    return facts | {"damages": True}


def _prepare_unsettled(world: World) -> Facts:
    """Every step was trained and its checkpoint registered; the worker died before it could say so."""
    job_id = run_and_be_killed(world, lambda _: _die_on(results, "write_curve"), {"steps": 3})
    take_back(world)
    return facts_of(world, job_id)


def _prepare_claimable(world: World) -> Facts:
    return facts_of(world, world.add_job({"steps": 2}))


def _keep_a_lease(world: World, facts: Facts) -> None:
    """Claim, renew four times, give back."""
    settings = world.settings
    with transaction() as session:
        job = jobs.claim_next(session, "worker", settings.lease_s)
    assert job is not None
    seen = {job.lease_until}
    with LeaseKeeper(job.id, job.fence, settings.model_copy(update={"heartbeat_s": 0.03, "poll_s": 0.01})) as lease:
        deadline = time.monotonic() + 5
        while len(seen) < 5 and not lease.lost.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
            with reading() as session:
                seen.add(session.get_one(Job, job.id).lease_until)
    assert len(seen) == 5, "the lease is renewed again and again, whatever went wrong once"
    with transaction() as session:
        jobs.give_back(session, job.id, job.fence, "the worker stops")


def _prepare_silent_workers(world: World) -> Facts:
    """Two jobs of workers that are gone, one that waits, one file that nobody has checked."""
    Sweeper(world.settings).expire_leases()
    facts: Facts = {"ends": {world.add_job({"steps": 2}): SUCCEEDS for _ in range(3)}}
    world.add_file(toy.rows(), FileStatus.UPLOADED)
    with transaction() as session:
        for _ in range(2):
            jobs.claim_next(session, "gone", 60)
    time_passes()
    return facts


def _sweep(world: World, facts: Facts) -> None:
    sweeper = Sweeper(world.settings)
    sweeper.sweep()
    sweeper.sweep()


def _prepare_garbage(world: World) -> Facts:
    """Whatever crashes can leave, beside a job whose bytes must all stay."""
    root = world.settings.storage_root
    facts = _prepare_interrupted(world)
    kept = root / "checkpoints" / facts["job"] / "1"
    whole = next(path for path in sorted(kept.iterdir()) if path.name.isdigit())
    storage.save_file(world.settings, "file-of-nobody", [b"no row"], max_bytes=100)
    (root / ".incoming").mkdir(exist_ok=True)
    (root / ".incoming" / "tmpabcdefgh").write_bytes(b"half an upload")
    for name in ("77", ".tmp-78-1", ".deleted-79-1"):
        _copy(whole, kept / name)
    _copy(whole, root / "checkpoints" / "ftjob-ofnobody" / "1" / "5")
    return facts


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def _collect(world: World, facts: Facts) -> None:
    collect_all(world)


WORKER_SCENARIOS = (
    Scenario("validate", _prepare_unchecked, lambda world, facts: tasks.validate_files()),
    Scenario("cancel-running", _prepare_cancellable, _run_until_cancel),
    running("run", {"steps": 4, "save_steps": 1}, keep_checkpoints=1),
    running("run-diverging", {"steps": 4, "save_steps": 2, "behaviour": "diverge"}, ends=["failed"]),
    running("run-dying", {"steps": 4, "save_steps": 2, "behaviour": "kill_at_3"}),
    running("run-out-of-memory", {"steps": 4, "save_steps": 2, "behaviour": "out_of_memory"}),
    Scenario("resume", _prepare_interrupted, lambda world, facts: tasks.train()),
    Scenario("resume-from-damage", _prepare_damaged, lambda world, facts: tasks.train(), looks_behind=True),
    Scenario("settle-complete", _prepare_unsettled, lambda world, facts: tasks.train()),
    Scenario("deploy", _prepare_long_run, _run_until_deploy),
    Scenario("heartbeat", _prepare_claimable, _keep_a_lease),
    Scenario("sweep", _prepare_silent_workers, _sweep),
    Scenario("collect", _prepare_garbage, _collect, looks_behind=True),
    Scenario("collect-first", lambda world: {}, _collect, is_swept_before=False),
)
