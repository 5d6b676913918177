"""A claim that is lost while nothing happens that could be written: the lease alone tells, and the trainer goes."""

from collections.abc import Callable

from sqlalchemy import update

from shared.db import transaction
from shared.models import Job
from shared.settings import Settings
from tests.waiting import LIMIT_S, wait_until
from tests.worker.steps import claim, in_thread, job_of, toys


def test_a_run_in_the_middle_of_a_long_step_learns_from_its_lease_that_its_claim_is_lost(
    settings: Settings, submit: Callable[..., str]
) -> None:
    job_id = submit(steps=3, step_s=60)
    thread = in_thread(claim(settings), settings)
    wait_until(lambda: job_of(job_id).total_steps is not None)  # it has said that it starts, and says no more for long
    with transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(fence=Job.fence + 1))
    try:
        thread.join(LIMIT_S)
        assert not thread.is_alive() and toys() == []
    finally:
        for toy in toys():
            toy.kill()
