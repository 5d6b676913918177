"""What a heartbeat promises to those who kill by it."""

import os
import time
from pathlib import Path

import pytest

from cli import health
from shared import heartbeat
from shared.heartbeat import Heartbeat, age, heartbeat_path
from shared.settings import Settings
from tests.waiting import wait_until


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path)


def test_a_process_that_never_started_has_no_age(settings: Settings) -> None:
    assert age(settings, "train") is None


def test_the_thread_renews_the_heartbeat_while_the_block_runs(settings: Settings) -> None:
    with Heartbeat(settings, "train", every_s=0.02):
        path = heartbeat_path(settings, "train")
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime)


def test_without_a_thread_only_the_caller_beats(settings: Settings) -> None:
    with Heartbeat(settings, "api", every_s=None) as alive:
        path = heartbeat_path(settings, "api")
        os.utime(path, (0, 0))
        time.sleep(0.1)
        assert path.stat().st_mtime == 0
        alive.beat()
        assert path.stat().st_mtime > 0


def test_leaving_in_good_order_removes_the_file(settings: Settings) -> None:
    with Heartbeat(settings, "sweep"):
        assert age(settings, "sweep") is not None
    assert age(settings, "sweep") is None


def test_a_beat_that_cannot_be_written_raises_nothing(settings: Settings) -> None:
    settings.run_dir.parent.mkdir(exist_ok=True)
    settings.run_dir.write_text("a file where the folder should be")
    Heartbeat(settings, "train", every_s=None).beat()


@pytest.mark.parametrize("name", ["../lock", "", "Train", "a/b"])
def test_a_name_is_never_a_path(settings: Settings, name: str) -> None:
    with pytest.raises(ValueError, match="no process name"):
        heartbeat_path(settings, name)


def test_health_tells_alive_from_silent_from_absent(settings: Settings) -> None:
    assert "not running" in str(health.check(settings, "train"))
    with Heartbeat(settings, "train", every_s=None):
        assert health.check(settings, "train") is None
        long_ago = time.time() - heartbeat.SILENT_AFTER_S - 5
        os.utime(heartbeat_path(settings, "train"), (long_ago, long_ago))
        assert "silent" in str(health.check(settings, "train"))


def test_a_worker_falls_silent_with_the_child_that_does_its_work(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker import app

    monkeypatch.setattr(app, "get_settings", lambda: settings)
    worker = app._WorkerHeartbeat(settings, "train", every_s=None)
    child = heartbeat_path(settings, "train-child")
    worker.beat()
    assert age(settings, "train") is not None, "the child is still being born"
    for child_age_s, silent in ((0.0, False), (heartbeat.SILENT_AFTER_S + 1, True)):
        child.touch()
        os.utime(child, (time.time() - child_age_s,) * 2)
        os.utime(heartbeat_path(settings, "train"), (0, 0))
        worker.beat()
        assert (heartbeat_path(settings, "train").stat().st_mtime == 0) is silent
