"""Checkpoints are whole or not there, whatever happens while one is written."""

import errno
import hashlib
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from shared import disk
from shared.disk import swap
from worker.training import checkpoint
from worker.training.checkpoint import CorruptCheckpoint, FileRecord, Manifest, publish, verify
from worker.training.failures import DiskFull

Usage = namedtuple("Usage", "total used free")


def manifest(files: dict[str, FileRecord]) -> Manifest:
    return Manifest(job_id="ftjob-1", step=4, fence=2, base_model="test/tiny", tokens=100, resumable=True, files=files)


def write_two_files(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "config.json").write_bytes(b"{}")


def publish_one(folder: Path, write: Callable[[Path], None] = write_two_files) -> None:
    publish(folder, write, expected_bytes=7000, make_manifest=manifest)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    publish_one(tmp_path / "4")
    return tmp_path / "4"


def test_a_published_checkpoint_verifies(published: Path) -> None:
    found = verify(published)
    assert (found.step, found.fence, found.tokens) == (4, 2, 100)
    assert found.files["config.json"].size == 2
    assert [path.name for path in published.parent.iterdir()] == ["4"]


def test_the_reported_digest_is_that_of_the_manifest(tmp_path: Path) -> None:
    _, digest = publish(tmp_path / "4", write_two_files, expected_bytes=1, make_manifest=manifest)
    assert digest == hashlib.sha256((tmp_path / "4" / "manifest.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_a_file_cut_at_any_point_is_noticed(published: Path, name: str) -> None:
    content = (published / name).read_bytes()
    for length in {0, 1, len(content) // 2, len(content) - 1}:
        (published / name).write_bytes(content[:length])
        with pytest.raises(CorruptCheckpoint):
            verify(published)


def test_a_changed_byte_is_noticed(published: Path) -> None:
    file = published / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match="SHA-256"):
        verify(published)


def test_missing_and_unlisted_files_are_noticed(published: Path) -> None:
    (published / "config.json").rename(published / "training_args.bin")
    with pytest.raises(CorruptCheckpoint, match=r"missing \['config.json'\], unlisted \['training_args.bin'\]"):
        verify(published)


def test_a_folder_without_a_manifest_was_never_published(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="never published"):
        verify(tmp_path)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left on device")]
)
def test_a_disk_that_fills_up_leaves_nothing_half_written(published: Path, error: Exception) -> None:
    def write_half(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with pytest.raises(DiskFull, match="are free"):
        publish_one(published.parent / "8", write_half)
    assert [path.name for path in published.parent.iterdir()] == ["4"]
    verify(published)


def test_a_disk_without_room_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, checkpoint.SPARE_BYTES + 100))
    with pytest.raises(DiskFull, match="needs about"):
        publish_one(tmp_path / "4", lambda folder: pytest.fail("wrote although there was no room"))
    assert not list(tmp_path.iterdir())


def test_a_bug_while_writing_is_no_full_disk(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise KeyError("weight")

    with pytest.raises(KeyError):
        publish_one(tmp_path / "4", write)
    assert not list(tmp_path.iterdir())


def test_a_death_before_the_rename_leaves_only_garbage_with_a_telling_name(tmp_path: Path) -> None:
    def die(folder: Path) -> None:
        write_two_files(folder)
        os._exit(9)

    child = os.fork()
    if child == 0:
        publish_one(tmp_path / "4", die)
    os.waitpid(child, 0)
    assert [path.name for path in tmp_path.iterdir()] == [f".tmp-4-{child}"]
    publish_one(tmp_path / "4")
    verify(tmp_path / "4")


def publish_replay(folder: Path, write: Callable[[Path], None] = write_two_files) -> tuple[Manifest, str]:
    """Publish the same step once more, as an attempt of another fence would."""
    return publish(
        folder,
        write,
        expected_bytes=1,
        make_manifest=lambda files: manifest(files).model_copy(update={"fence": 3}),
    )


def test_a_replayed_step_with_the_same_files_leaves_what_is_published_alone(published: Path) -> None:
    identity = (published / "model.safetensors").stat().st_ino
    found, digest = publish_replay(published)
    assert found.fence == verify(published).fence == 2
    assert digest == hashlib.sha256((published / "manifest.json").read_bytes()).hexdigest()
    assert (published / "model.safetensors").stat().st_ino == identity
    assert [path.name for path in published.parent.iterdir()] == ["4"]


@pytest.mark.parametrize("can_swap", [True, False])
@pytest.mark.parametrize("damage", [True, False])
def test_a_replayed_step_replaces_a_damaged_or_different_one(
    published: Path, monkeypatch: pytest.MonkeyPatch, damage: bool, can_swap: bool
) -> None:
    if not can_swap:  # as on network file systems
        monkeypatch.setattr(checkpoint, "swap", lambda one, other: False)

    def write_another(folder: Path) -> None:
        write_two_files(folder)
        (folder / "config.json").write_bytes(b'{"a": 1}')

    if damage:
        (published / "model.safetensors").write_bytes(b"cut")
    found, digest = publish_replay(published, write_two_files if damage else write_another)
    assert found == verify(published)
    assert found.fence == 3
    assert digest == hashlib.sha256((published / "manifest.json").read_bytes()).hexdigest()
    assert [path.name for path in published.parent.iterdir()] == ["4"]


def test_a_crash_while_a_step_is_replaced_leaves_a_whole_one(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed right after the swap: the name that rows know holds the new folder, and never nothing."""

    def swap_and_die(one: Path, other: Path) -> bool:
        if not swap(one, other):
            os._exit(77)
        os._exit(9)

    (published / "config.json").unlink()
    monkeypatch.setattr(checkpoint, "swap", swap_and_die)
    child = os.fork()
    if child == 0:
        publish_replay(published)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 9, "this file system can't swap two folders"
    assert verify(published).fence == 3


def test_a_new_folder_is_on_disk_before_anything_is_published_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    real = disk.sync

    def remember(path: Path) -> None:
        synced.append(path)
        real(path)

    monkeypatch.setattr(disk, "sync", remember)
    publish_one(tmp_path / "job" / "2" / "4")
    assert {tmp_path, tmp_path / "job"} <= set(synced)


def test_a_folder_that_a_dead_process_made_is_synced_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job" / "2").mkdir(parents=True)
    synced: list[Path] = []
    monkeypatch.setattr(disk, "sync", synced.append)
    disk.make_folder(tmp_path / "job" / "2")
    assert {tmp_path, tmp_path / "job"} <= set(synced)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.EACCES])
def test_a_manifest_that_can_not_be_read_just_now_is_no_corrupt_checkpoint(
    published: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(_path: Path) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        verify(published)
