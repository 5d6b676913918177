"""What the collection of garbage looks at: everything in storage, with its age."""

import time
from pathlib import Path

import pytest

from shared import storage
from shared.checkpoint_files import MANIFEST
from shared.settings import Settings
from tests.shared.places import DAY_S, JOB, Place, publish, save


def test_everything_in_storage_is_listed_with_its_age(place: Place) -> None:
    save(place.settings, "file-1")
    save(place.settings, "file-2")
    locations = {publish(place.settings, 4), publish(place.settings, 8)}
    place.write(f"checkpoints/{JOB}/2/12/model.safetensors", b"an upload that was cut")
    locations.add(f"checkpoints/{JOB}/2/12")
    files, folders = dict(storage.list_files(place.settings)), dict(storage.list_checkpoints(place.settings))
    assert set(files) == {"file-1", "file-2"}
    assert set(folders) == locations
    assert all(0 <= age_s < 60 for age_s in (*files.values(), *folders.values()))
    for location in folders:
        storage.delete_tree(place.settings, location)
    for file_id in files:
        storage.delete_file(place.settings, file_id)
    assert place.names() == []


def test_an_empty_storage_is_listed_as_such(place: Place) -> None:
    assert list(storage.list_files(place.settings)) == list(storage.list_checkpoints(place.settings)) == []
    storage.clear_incoming(place.settings, 0)


def test_ages_are_by_the_clock_of_the_storage(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    save(place.settings)
    publish(place.settings)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + DAY_S)  # this host is a day ahead
    ages_s = [age_s for _, age_s in (*storage.list_files(place.settings), *storage.list_checkpoints(place.settings))]
    assert len(ages_s) == 2
    assert max(ages_s) < 60 or place.kind == "memory"  # whose clock is this host's


def test_what_killed_saves_left_in_a_folder_is_listed_or_cleared(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    publish(settings)
    root = settings.storage_root
    for name in (f"{JOB}/2/.tmp-8-123", f"{JOB}/2/.deleted-4-123", ".deleted-j-1/1/2"):
        (root / "checkpoints" / name).mkdir(parents=True)
    (root / "checkpoints" / "empty" / "1").mkdir(parents=True)
    (root / ".incoming").mkdir(exist_ok=True)
    (root / ".incoming" / "tmpabc").write_bytes(b"half")
    storage.clear_incoming(settings, DAY_S)
    assert (root / ".incoming" / "tmpabc").exists()
    for location, _ in list(storage.list_checkpoints(settings)):
        if not location.endswith("/4"):
            storage.delete_tree(settings, location)
    for _ in range(2):  # a folder that lost its last entry is as young as that
        storage.clear_incoming(settings, 0)
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    step = f"checkpoints/{JOB}/2/4"
    files = [f"{step}/{name}" for name in ("config.json", MANIFEST, "model.safetensors")]
    assert left == [".incoming", "checkpoints", f"checkpoints/{JOB}", f"checkpoints/{JOB}/2", step, *files]


def test_storage_belongs_to_the_database_that_came_first(place: Place) -> None:
    assert storage.owned_by(place.settings, "first") == "first"
    assert storage.owned_by(place.settings, "second") == "first"
    assert storage.owned_by(place.settings, "first") == "first"
