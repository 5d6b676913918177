"""What production does after a fault, with nothing broken any more: clients ask again, sweeps pass, workers work."""

from sqlalchemy import select

from shared.db import reading
from shared.models import TERMINAL, File, FileStatus, Job
from tests.failpoints.scenarios import Facts, Scenario, collect_all, time_passes
from tests.failpoints.world import World
from worker import run_folder, tasks
from worker.sweeper import Sweeper

MOST_ROUNDS = 12


def recover(world: World, scenario: Scenario, facts: Facts) -> list[str]:
    """Bring the service to rest. Returns what it could not do."""
    scenario.again(world, facts)
    problems = []
    sweeper = Sweeper(world.settings)
    for _ in range(MOST_ROUNDS):
        sweeper.sweep()
        time_passes()
        sweeper.sweep()
        tasks.validate_files()
        tasks.train()
        if not _open_work():
            break
    else:
        problems.append(f"after {MOST_ROUNDS} rounds there is still {_open_work()}")
    run_folder.forget_old(world.settings, kept_s=0)  # a week later
    collect_all(world)
    if (left := collect_all(world)) != 0:
        problems.append(f"a second collection found {left} more")
    return problems


def _open_work() -> list[str]:
    with reading() as session:
        open_jobs = session.execute(select(Job.id, Job.status).where(Job.status.not_in(TERMINAL))).all()
        unchecked = session.scalars(select(File.id).where(File.status == FileStatus.UPLOADED)).all()
    return [f"{job_id} {status}" for job_id, status in open_jobs] + list(unchecked)
