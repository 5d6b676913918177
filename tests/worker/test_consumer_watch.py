"""When a worker may be called deaf: hints wait, look after look, and it has nothing to do."""

import os
import time

import pytest

from shared.queue import TRAIN, make_celery, send
from shared.redis_client import connect
from shared.settings import Settings
from tests.waiting import LIMIT_S
from worker import consumer_watch, lifecycle
from worker.consumer_watch import LOOKS, ConsumerWatch

QUEUE = "train"


@pytest.fixture(autouse=True)
def _empty_queue(settings: Settings) -> None:
    connect(settings).delete(QUEUE)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_an_idle_worker_that_takes_no_hint_is_deaf(settings: Settings) -> None:
    watch = ConsumerWatch(settings, QUEUE)
    assert not any(watch.is_wedged() for _ in range(2 * LOOKS)), "nothing waits"
    send(make_celery(settings), TRAIN)
    looks = [watch.is_wedged() for _ in range(LOOKS)]
    assert looks == [False] * (LOOKS - 1) + [True]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_busy_worker_or_one_without_a_broker_is_not(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    send(make_celery(settings), TRAIN)
    watch = ConsumerWatch(settings, QUEUE)
    lifecycle.working.set(True)
    assert not any(watch.is_wedged() for _ in range(2 * LOOKS))
    lifecycle.working.set(False)
    monkeypatch.setenv("ANNEAL_REDIS_URL", "redis://127.0.0.1:1/0")
    assert not any(ConsumerWatch(Settings(), QUEUE).is_wedged() for _ in range(LOOKS))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_one_hint_taken_in_between_begins_the_count_again(settings: Settings) -> None:
    watch = ConsumerWatch(settings, QUEUE)
    for _ in range(2):
        send(make_celery(settings), TRAIN)
        assert not any(watch.is_wedged() for _ in range(LOOKS - 1))
        connect(settings).delete(QUEUE)
        assert not watch.is_wedged()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_deaf_worker_ends_its_process(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []

    def end(status: int) -> None:
        ended.append(status)

    monkeypatch.setattr(consumer_watch.os, "_exit", end)
    monkeypatch.setattr(consumer_watch, "LOOK_EVERY_S", 0.01)
    send(make_celery(settings), TRAIN)
    watch = ConsumerWatch(settings, QUEUE)
    watch.start()
    watch.join(LIMIT_S)
    assert ended == [consumer_watch.EXIT_STATUS]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_worker_told_to_leave_is_given_time_for_its_task_and_no_more(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[float] = []

    def end(status: int) -> None:
        assert status == 0
        ended.append(time.monotonic())

    monkeypatch.setattr(consumer_watch.os, "_exit", end)
    monkeypatch.setattr(consumer_watch, "LEAVE_S", 0.4)
    monkeypatch.setattr(lifecycle, "shutdown", lifecycle.Shutdown())
    lifecycle.working.set(True)
    watch = ConsumerWatch(settings, QUEUE)
    watch.start()
    lifecycle.shutdown.set()
    time.sleep(1)
    assert not ended, "its child is in a task"
    lifecycle.working.set(False)
    idle_at = time.monotonic()
    watch.join(LIMIT_S)
    assert 0.3 < ended[0] - idle_at < 30


def test_a_child_that_died_in_a_task_is_in_none() -> None:
    child = os.fork()
    if not child:
        lifecycle.working.set(True)
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not lifecycle.working.is_set()
    os.waitpid(child, 0)
    assert not lifecycle.working.is_set()
