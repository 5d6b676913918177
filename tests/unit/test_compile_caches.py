"""Compilers' caches are bounded, but not under a trainer that may be reading them."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from shared.settings import Settings
from worker import compile_caches, run_folder
from worker.host_lock import HostLock


@pytest.fixture
def ours(tmp_path: Path) -> Settings:
    """100 bytes of Inductor's, 10 of Triton's, 1,000 of tokens."""
    settings = Settings(data=tmp_path)
    for name, size in {"inductor/ab/graph": 60, "inductor/kernel.py": 40, "triton/k": 10, "tokens/row": 1000}.items():
        path = run_folder.caches(settings) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    return settings


def names(settings: Settings) -> list[str]:
    return sorted(path.name for path in run_folder.caches(settings).iterdir())


FULL = ["inductor", "tokens", "triton"]


def test_a_compilers_cache_past_the_bound_goes_and_no_other(ours: Settings) -> None:
    compile_caches.bound(ours, 10_000)
    assert names(ours) == FULL
    compile_caches.bound(ours, 50)
    assert names(ours) == ["tokens", "triton"]


@contextmanager
def a_job(settings: Settings) -> Iterator[None]:
    with HostLock.acquire(settings.run_dir / "jobs" / "ftjob-1" / "lock"):
        yield


@contextmanager
def a_standby(settings: Settings) -> Iterator[None]:
    folder = run_folder.standbys(settings) / "0123"
    folder.mkdir(parents=True)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    yield
    os.close(descriptor)


@pytest.mark.parametrize("somebody", [a_job, a_standby])
def test_nothing_goes_while_a_trainer_of_this_host_lives(
    somebody: Callable[[Settings], AbstractContextManager[None]], ours: Settings
) -> None:
    with somebody(ours):
        compile_caches.bound(ours, 50)
        assert names(ours) == FULL
    compile_caches.bound(ours, 50)
    assert names(ours) == ["tokens", "triton"]


def test_what_a_crash_left_half_removed_goes_too(ours: Settings) -> None:
    left = run_folder.caches(ours) / ".inductor-removed"
    left.mkdir()
    (left / "file").touch()
    compile_caches.bound(ours, 10_000)
    assert names(ours) == FULL


def test_without_any_cache_there_is_nothing_to_do(tmp_path: Path) -> None:
    compile_caches.bound(Settings(data=tmp_path / "new"), 0)
