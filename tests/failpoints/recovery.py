"""What production does after a fault, with nothing broken any more: clients ask again, sweeps pass, workers work.

A job that is paused stays so while everything else comes to rest; then its client resumes it.
"""

from sqlalchemy import select

from shared.db import reading
from shared.models import BATCH_LIVE, TERMINAL, Batch, File, FileStatus, Job, JobStatus
from tests.failpoints.client_scenarios import request
from tests.failpoints.scenarios import Facts, Scenario, collect_all, time_passes
from tests.failpoints.world import World
from worker import run_folder, tasks
from worker.sweeper import Sweeper

MOST_ROUNDS = 12


def recover(world: World, scenario: Scenario, facts: Facts) -> list[str]:
    """Bring the service to rest. Returns what it could not do."""
    scenario.again(world, facts)
    world.release()
    problems = []
    sweeper = Sweeper(world.settings)
    for _ in range(MOST_ROUNDS):
        sweeper.sweep()
        time_passes()
        sweeper.sweep()
        tasks.validate_files()
        tasks.train()
        if scenario.has_generator:
            tasks.run_batches()
        sweeper.remove_expired()
        if not _open_work():
            if not (paused := _paused()):
                break
            for job_id in paused:
                request(world, "at last", "POST", f"/v1/fine_tuning/jobs/{job_id}/resume")
    else:
        problems.append(f"after {MOST_ROUNDS} rounds there is still {_open_work()}")
    run_folder.forget_old(world.settings, kept_s=0)  # a week later
    collect_all(world)
    if (left := collect_all(world)) != 0:
        problems.append(f"a second collection found {left} more")
    return problems


def _open_work() -> list[str]:
    with reading() as session:
        at_rest = (*TERMINAL, JobStatus.PAUSED)
        open_jobs = session.execute(select(Job.id, Job.status).where(Job.status.not_in(at_rest))).all()
        batches = session.execute(select(Batch.id, Batch.status).where(Batch.status.in_(BATCH_LIVE))).all()
        unchecked = session.scalars(select(File.id).where(File.status == FileStatus.UPLOADED)).all()
    return [f"{job_id} {status}" for job_id, status in (*open_jobs, *batches)] + list(unchecked)


def _paused() -> list[str]:
    with reading() as session:
        return list(session.scalars(select(Job.id).where(Job.status == JobStatus.PAUSED)))
