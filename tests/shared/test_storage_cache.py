"""A host's copies of an object store: whole, fetched once, bounded."""

import os
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from shared import storage
from shared.checkpoint_files import verify
from shared.settings import Settings
from shared.storage import cache
from shared.storage.keys import PART_BYTES
from tests.shared.places import DAY_S, JOB, Place, publish, run, save, stage, start

Usage = namedtuple("Usage", "total used free")


def test_two_processes_that_want_the_same_checkpoint_fetch_it_once(
    s3: Place, tmp_path: Path, requests: Callable[[], list[str]]
) -> None:
    location = publish(s3.settings, weights=os.urandom(PART_BYTES))
    other = s3.other_host(tmp_path)
    program = f"""
from shared import storage
from shared.checkpoint_files import verify
from shared.settings import Settings
print(verify(storage.local_checkpoint(Settings(), {location!r})).step)
"""
    processes = [start(program, other) for _ in range(3)]
    for process in processes:
        out, errors = process.communicate(timeout=60)
        assert (out, process.returncode) == ("4\n", 0), errors
    fetched = [line for line in requests() if line.startswith("GET") and line.endswith("model.safetensors")]
    assert len(fetched) == 1


def test_a_fetch_that_was_killed_leaves_garbage_that_is_cleared(s3: Place, tmp_path: Path) -> None:
    location = publish(s3.settings)
    other = s3.other_host(tmp_path)
    program = f"""
import os
from shared import storage
from shared.settings import Settings
from shared.storage.keys import Keys
Keys.download = lambda self, key, path: (path.write_bytes(b"half"), os._exit(9))
storage.local_checkpoint(Settings(), {location!r})
"""
    assert run(program, other)[0] == 9
    folder = other.run_dir / "cache"
    assert len(list(folder.glob(".tmp-*"))) == 1
    assert verify(storage.local_checkpoint(other, location)).step == 4
    storage.clear_incoming(other, DAY_S)
    assert len(list(folder.glob(".tmp-*"))) == 1
    storage.clear_incoming(other, 0)
    assert sorted(path.name for path in folder.iterdir()) == [".locks", f"checkpoints+{JOB}+2+4"]


def cached(settings: Settings) -> set[str]:
    return {path.name.rpartition("+")[2] for path in (settings.run_dir / "cache").glob("[!.]*")}


def grow_old(settings: Settings) -> None:
    """As if nobody had used the cached copies for two hours; their order stays."""
    for path in (settings.run_dir / "cache").glob("[!.]*"):
        at = path.stat().st_mtime - 2 * cache.RECENT_S
        os.utime(path, (at, at))


def test_past_its_budget_the_least_recently_used_copies_go(store: Place, tmp_path: Path) -> None:
    size = 8500  # of one checkpoint, roughly
    settings = store.other_host(tmp_path).model_copy(update={"cache_bytes": 3 * size})
    locations = {step: publish(store.settings, step) for step in (1, 2, 3, 4)}
    for step in (1, 2, 3):
        storage.local_checkpoint(settings, locations[step])
    grow_old(settings)
    storage.local_checkpoint(settings, locations[1])  # used again: 2 is the oldest now
    storage.local_checkpoint(settings, locations[4])
    assert cached(settings) == {"1", "3", "4"}
    assert verify(storage.local_checkpoint(settings, locations[2]))


def test_what_was_used_within_the_hour_stays_even_past_the_budget(store: Place, tmp_path: Path) -> None:
    settings = store.other_host(tmp_path).model_copy(update={"cache_bytes": 1})
    for step in (1, 2, 3):
        storage.local_checkpoint(settings, publish(store.settings, step))
    assert cached(settings) == {"1", "2", "3"}
    grow_old(settings)
    storage.local_checkpoint(settings, publish(store.settings, 4))
    assert cached(settings) == {"4"}


def test_a_full_disk_takes_even_the_recent_copies_and_then_says_so(
    store: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = store.other_host(tmp_path)
    locations = [publish(store.settings, step) for step in (1, 2)]
    storage.local_checkpoint(settings, locations[0])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, cache.SPARE_BYTES + 10))
    with pytest.raises(storage.StorageFull, match="this host needs"):
        storage.local_checkpoint(settings, locations[1])
    assert cached(settings) == set()


def test_what_a_run_keeps_outlives_its_copy_in_the_cache(store: Place, tmp_path: Path) -> None:
    settings = store.other_host(tmp_path)
    location = publish(store.settings)
    save(store.settings)
    work = settings.run_dir / "jobs" / "1"
    folder = storage.local_checkpoint(settings, location, keep_in=work / "base")
    file = storage.local_file(settings, "file-1", keep_in=work / "files")
    assert folder == work / "base"
    copy = storage.local_checkpoint(settings, location) / "model.safetensors"
    assert copy.samefile(folder / "model.safetensors"), "linked, not copied"
    shutil.rmtree(settings.run_dir / "cache")
    assert verify(folder).step == 4
    assert file.read_bytes() == b"abc"
    assert work in file.parents
    assert storage.local_checkpoint(settings, location, keep_in=work / "base") == folder, "an attempt may start over"


def test_staged_checkpoints_of_a_job_are_cleared_when_asked_or_after_a_day(store: Place) -> None:
    folder = stage(store.settings)
    storage.clear_incoming(store.settings, 0)
    assert folder.exists(), "the store may be away for hours"
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - 2 * DAY_S,) * 2)
    storage.clear_incoming(store.settings, 0)
    assert not folder.exists()
    fence, job = folder.parent, folder.parent.parent
    os.utime(fence, (time.time() - 2 * DAY_S,) * 2)
    storage.clear_incoming(store.settings, 0)
    assert not fence.exists() and job.exists(), "a folder that lost its last entry is as young as that"
    folder = stage(store.settings, fence=3)
    storage.clear_staging(store.settings, JOB)
    assert not folder.exists()
