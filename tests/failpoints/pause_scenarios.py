"""Jobs that a client pauses and resumes, while they wait, while they run, while nobody knows that they don't."""

from typing import Any

from shared import waiting
from shared.db import transaction
from shared.models import FileStatus
from tests.failpoints import toy
from tests.failpoints.client_scenarios import request, until_answered
from tests.failpoints.scenario import LARGE, Facts, Scenario, facts_of, time_passes
from tests.failpoints.worker_scenarios import at_step_3, meanwhile, run_and_be_killed, step_of
from tests.failpoints.world import World
from worker import tasks
from worker.sweeper import Sweeper

LONG = {"steps": 12, "save_steps": 100, "step_s": 0.1}
"""Its one checkpoint before the last is the one that the pause asks for."""


def ask(world: World, facts: Facts, what: str) -> None:
    """Ask for the job to be paused, resumed or cancelled."""
    request(world, what, "POST", f"/v1/fine_tuning/jobs/{facts['job']}/{what}")


def pause(world: World, facts: Facts) -> None:
    ask(world, facts, "pause")


def resume(world: World, facts: Facts) -> None:
    ask(world, facts, "resume")


def _prepare_waiting(world: World) -> Facts:
    return facts_of(world, world.add_job({"steps": 2})) | {"status": 200}


def _prepare_unchecked(world: World) -> Facts:
    """A job whose file turns out to be good, and is looked at while the job is paused."""
    file_id = world.add_file(toy.rows(steps=2) + LARGE, FileStatus.UPLOADED)
    return facts_of(world, world.submit(file_id)) | {"status": 200}


def _pause_and_validate(world: World, facts: Facts) -> None:
    pause(world, facts)
    tasks.validate_files()


def _prepare_paused(world: World) -> Facts:
    facts = _prepare_waiting(world)
    pause(world, facts)
    world.forget_journal()
    return facts


def _prepare_long_run(world: World) -> Facts:
    return facts_of(world, world.add_job(LONG)) | {"status": 200, "status_again": 409}


def _run_until_pause(world: World, facts: Facts) -> None:
    def pause_now() -> None:
        with transaction() as session:
            waiting.request_pause(session, "default", facts["job"])
        world.note(what="pause", status=200, body={"id": facts["job"]})

    meanwhile(lambda: step_of(facts["job"]) >= 3, pause_now)
    tasks.train()


def _prepare_silent(world: World) -> Facts:
    """A worker died in the middle of a run; a client who does not know asks for a pause."""
    Sweeper(world.settings).expire_leases()
    facts = facts_of(world, run_and_be_killed(world, at_step_3, {"steps": 6, "save_steps": 1, "step_s": 0.03}))
    pause(world, facts)
    return facts


def _expire(world: World, facts: Facts) -> None:
    time_passes()
    Sweeper(world.settings).expire_leases()


def _prepare_withdrawn(world: World) -> Facts:
    facts = _prepare_silent(world) | {"status": 200}
    world.forget_journal()
    return facts


def _prepare_cancelled(world: World) -> Facts:
    facts: dict[str, Any] = _prepare_silent(world)
    ask(world, facts, "cancel")
    return facts | {"ends": {facts["job"]: ["cancelled"]}}


PAUSE_SCENARIOS = (
    Scenario("pause-waiting", _prepare_waiting, pause, until_answered(pause)),
    Scenario("pause-unchecked", _prepare_unchecked, _pause_and_validate, until_answered(pause)),
    Scenario("pause-running", _prepare_long_run, _run_until_pause, until_answered(pause)),
    Scenario("pause-silent", _prepare_silent, _expire),
    Scenario("pause-and-cancel", _prepare_cancelled, _expire),
    Scenario("resume-paused", _prepare_paused, resume, until_answered(resume)),
    Scenario("resume-withdrawing", _prepare_withdrawn, resume, until_answered(resume)),
)
