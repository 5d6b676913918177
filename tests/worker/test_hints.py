"""Hints that were lost are sent again by the sweep: as many as there is work for, and never without end."""

import redis

from shared import job_creation
from shared.db import transaction
from shared.models import FileStatus
from shared.queue import QUEUE_OF, TRAIN, VALIDATE_FILES
from shared.schemas import JobCreate
from shared.settings import Settings
from tests.shared.test_jobs import add_file
from tests.waiting import wait_until
from tests.worker.steps import BASE
from worker.sweeper import MOST_HINTS, Sweeper


def test_a_sweep_sends_the_hints_that_a_lost_broker_took_along(settings: Settings) -> None:
    broker = redis.Redis.from_url(settings.resolved_redis_url)

    def waiting() -> tuple[int, int]:
        return int(broker.llen(QUEUE_OF[TRAIN])), int(broker.llen(QUEUE_OF[VALIDATE_FILES]))

    broker.flushall()
    sweeper = Sweeper(settings)
    sweeper.resend_hints()
    assert waiting() == (0, 0), "nothing to do, nothing to say"
    file_id = add_file(FileStatus.PROCESSED)
    add_file(FileStatus.UPLOADED)
    request = JobCreate.model_validate({"model": BASE, "training_file": file_id})
    for _ in range(3):
        with transaction() as session:
            job_creation.submit(session, "default", request)
    sweeper.resend_hints()
    assert waiting() == (3, 1)
    sweeper.resend_hints()
    assert waiting() == (3, 1), "they are on their way already"
    broker.flushall()  # as a broker does that is killed with its data
    sweeper.resend_hints()
    assert waiting() == (3, 1)
    for _ in range(MOST_HINTS):
        with transaction() as session:
            job_creation.submit(session, "default", request)
    sweeper.resend_hints()
    assert waiting() == (MOST_HINTS, 1)
    broker.flushall()
    sweeper.sweep()  # beside its pass, so that a broker that hangs holds up no lease
    wait_until(lambda: waiting() == (MOST_HINTS, 1))
