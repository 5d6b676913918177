"""Storage keeps its promises, of whatever kind it is."""

import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared import storage
from shared.checkpoint_files import MANIFEST, CorruptCheckpoint, FileRecord, Manifest, MissingCheckpoint, verify
from shared.errors import TooLarge
from shared.settings import Settings
from shared.storage.keys import PART_BYTES, Keys
from tests.shared.places import DAY_S, JOB, WEIGHTS, Place, publish, run, save, stage

MANY = [os.urandom(2**20)] * (2 * PART_BYTES // 2**20 + 1)
"""Chunks of a file that takes more than two parts."""


# Files.


@pytest.mark.parametrize("chunks", [[], [b"abc", b"", b"def"], MANY], ids=["empty", "small", "in parts"])
def test_a_file_comes_back_as_it_was_saved(place: Place, chunks: list[bytes]) -> None:
    content = b"".join(chunks)
    stored = storage.save_file(place.settings, "file-1", chunks, max_bytes=len(content))
    assert (stored.bytes, stored.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert b"".join(storage.open_file(place.settings, "file-1", sha256=stored.sha256)) == content
    for _ in range(2):
        assert storage.local_file(place.settings, "file-1", sha256=stored.sha256).read_bytes() == content
    storage.delete_file(place.settings, "file-1")
    storage.delete_file(place.settings, "file-1")
    assert place.names() == place.unfinished() == []
    with pytest.raises(FileNotFoundError):
        storage.open_file(place.settings, "file-1")
    with pytest.raises(FileNotFoundError):
        storage.local_file(place.settings, "file-1")


def test_a_folder_hands_out_the_file_itself_and_the_checkpoint_itself(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, storage_url=f"file://{tmp_path}/storage")
    save(settings)
    location = publish(settings)
    assert storage.local_file(settings, "file-1") == tmp_path / "storage" / "files" / "file-1"
    assert storage.local_checkpoint(settings, location) == tmp_path / "storage" / "checkpoints" / JOB / "2" / "4"
    assert not settings.run_dir.exists()


class ClientLeft(Exception):
    pass


@pytest.mark.parametrize("chunks", [[b"abc"], MANY], ids=["at once", "in parts"])
@pytest.mark.parametrize("error", [ClientLeft, KeyboardInterrupt])
def test_an_upload_that_is_cut_leaves_nothing(place: Place, chunks: list[bytes], error: type[BaseException]) -> None:
    def cut() -> Iterator[bytes]:
        yield from chunks
        raise error

    with pytest.raises(error):
        storage.save_file(place.settings, "file-1", cut(), max_bytes=2**30)
    assert place.names() == place.unfinished() == []


@pytest.mark.parametrize("chunks", [[b"abc"], MANY], ids=["at once", "in parts"])
def test_an_upload_past_the_limit_leaves_nothing(place: Place, chunks: list[bytes]) -> None:
    with pytest.raises(TooLarge, match="ANNEAL_MAX_UPLOAD_BYTES"):
        storage.save_file(place.settings, "file-1", chunks, max_bytes=len(b"".join(chunks)) - 1)
    assert place.names() == place.unfinished() == []


def test_an_upload_holds_a_few_parts_in_memory_and_never_the_file(s3: Place) -> None:
    """In a process of its own, which sends 128 MiB and reads them back."""
    program = """
import resource, sys
from shared import storage
from shared.settings import Settings
settings = Settings()
storage.save_file(settings, "file-0", [b"x"], max_bytes=1)
list(storage.open_file(settings, "file-0"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
storage.save_file(settings, "file-1", (bytes(2**20) for _ in range(128)), max_bytes=2**30)
assert sum(map(len, storage.open_file(settings, "file-1"))) == 2**27
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown)
"""
    status, out, errors = run(program, s3.settings)
    assert status == 0, errors
    assert int(out) < 64 * 2**20


def test_what_a_killed_upload_left_unseen_is_cleared_once_it_is_old(s3: Place) -> None:
    program = """
import os
from shared import storage
from shared.settings import Settings
def cut():
    yield from [bytes(2**20)] * 20
    os._exit(9)
storage.save_file(Settings(), "file-1", cut(), max_bytes=2**30)
"""
    assert run(program, s3.settings)[0] == 9
    assert s3.names() == []
    assert s3.unfinished() == ["some/prefix/files/file-1"]
    storage.clear_incoming(s3.settings, 36_500 * DAY_S)  # this server dates all such uploads to 2010
    assert s3.unfinished() == ["some/prefix/files/file-1"]
    storage.clear_incoming(s3.settings, 0)
    assert s3.unfinished() == []


def test_a_forked_child_has_a_connection_of_its_own(s3: Place) -> None:
    """As in a worker's pool, whose parent may have used the store before."""
    program = """
import os
from shared import storage
from shared.settings import Settings
def save(file_id):
    storage.save_file(Settings(), file_id, [b"abc"], max_bytes=3)
save("file-parent")
child = os.fork()
if child == 0:
    save("file-child")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
save("file-after")
"""
    status, _, errors = run(program, s3.settings)
    assert status == 0, errors
    assert s3.names() == ["files/file-after", "files/file-child", "files/file-parent"]


def test_a_changed_byte_of_a_file_is_noticed_and_the_last_part_withheld(store: Place) -> None:
    content = os.urandom(PART_BYTES + 1000)
    digest = hashlib.sha256(content).hexdigest()
    save(store.settings, content=content)
    store.write("files/file-1", content[:500] + bytes([content[500] ^ 1]) + content[501:])
    received = []
    with pytest.raises(storage.DamagedFile, match="file-1"):
        received.extend(storage.open_file(store.settings, "file-1", sha256=digest))
    assert sum(map(len, received)) == PART_BYTES
    with pytest.raises(storage.DamagedFile):
        storage.local_file(store.settings, "file-1", sha256=digest)
    save(store.settings, content=content)
    assert storage.local_file(store.settings, "file-1", sha256=digest).read_bytes() == content


# Checkpoints.


def test_a_published_checkpoint_is_read_on_any_host(place: Place, tmp_path: Path) -> None:
    location = publish(place.settings)
    assert location == f"checkpoints/{JOB}/2/4"
    assert place.names() == [f"{location}/{name}" for name in ("config.json", MANIFEST, "model.safetensors")]
    for settings in (place.settings, place.other_host(tmp_path)):
        folder = storage.local_checkpoint(settings, location, recheck=True)
        assert verify(folder).step == 4
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_publishing_again_changes_nothing(place: Place) -> None:
    folder = stage(place.settings)
    location = storage.publish_checkpoint(place.settings, folder)
    assert storage.publish_checkpoint(place.settings, folder) == location
    assert verify(storage.local_checkpoint(place.settings, location)).step == 4


def test_the_host_that_published_does_not_download_again(s3: Place, requests: Callable[[], list[str]]) -> None:
    location = publish(s3.settings)
    assert not list(storage.staging_dir(s3.settings, JOB, 2).iterdir())
    before = len(requests())
    assert (storage.local_checkpoint(s3.settings, location) / "model.safetensors").read_bytes() == WEIGHTS
    assert requests()[before:] == []


def test_the_manifest_is_uploaded_last_and_deleted_first(s3: Place, requests: Callable[[], list[str]]) -> None:
    location = publish(s3.settings)
    storage.delete_tree(s3.settings, location)
    sent = [line.rpartition("/")[2] for line in requests() if line.startswith("PUT") and location in line]
    gone = [line.rpartition("/")[2] for line in requests() if line.startswith("DELETE")]
    assert sorted(sent[:-1]) == ["config.json", "model.safetensors"]
    assert sent[-1] == gone[0] == MANIFEST
    assert len(gone) == 3
    assert s3.names() == []


def test_a_folder_that_is_not_what_its_manifest_says_is_not_published(store: Place) -> None:
    folder = stage(store.settings)
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"?")
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors differs"):
        storage.publish_checkpoint(store.settings, folder)
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1])
    with pytest.raises(CorruptCheckpoint, match="7999 bytes"):
        storage.publish_checkpoint(store.settings, folder)
    assert [key for key in store.names() if key.endswith((MANIFEST, ".safetensors"))] == []


def test_a_published_key_is_never_written_again(store: Place) -> None:
    location = publish(store.settings)
    before = {key: store.read(key) for key in store.names()}
    another = stage(store.settings, weights=b"other weights")
    with pytest.raises(storage.AlreadyPublished, match=location):
        storage.publish_checkpoint(store.settings, another)
    assert {key: store.read(key) for key in store.names()} == before


def test_of_several_who_create_a_key_the_store_lets_one_through(s3: Place) -> None:
    keys = Keys(str(s3.settings.storage_url))
    barrier = threading.Barrier(8)
    outcomes: list[str] = []

    def create(number: int) -> None:
        barrier.wait()
        try:
            keys.create("checkpoints/key", str(number).encode())
            outcomes.append(str(number))
        except FileExistsError:
            outcomes.append("refused")

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("refused") == 7
    winner = next(outcome for outcome in outcomes if outcome != "refused")
    assert s3.read("checkpoints/key").decode() == winner


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", MANIFEST])
@pytest.mark.parametrize("harm", ["changed", "cut", "missing"])
def test_a_damaged_checkpoint_is_noticed_and_not_handed_out(place: Place, tmp_path: Path, name: str, harm: str) -> None:
    location = publish(place.settings)
    content = place.read(f"{location}/{name}")
    if harm == "missing":
        place.remove(f"{location}/{name}")
    else:
        place.write(f"{location}/{name}", content[:-1] + (b"?" if harm == "changed" else b""))
    settings = place.other_host(tmp_path)
    for _ in range(2):
        with pytest.raises(CorruptCheckpoint):
            storage.local_checkpoint(settings, location, recheck=True)
    if not place.is_folder:
        assert not [path for path in (settings.run_dir / "cache").glob("*") if not path.name.startswith(".locks")]


def test_a_byte_that_changed_on_the_way_is_fetched_again(
    store: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = publish(store.settings)
    real = Keys.download

    def garble_once(self: Keys, key: str, path: Path) -> None:
        real(self, key, path)
        if key.endswith("model.safetensors"):
            path.write_bytes(WEIGHTS[:-1] + b"?")
            monkeypatch.setattr(Keys, "download", real)

    monkeypatch.setattr(Keys, "download", garble_once)
    assert verify(storage.local_checkpoint(store.other_host(tmp_path), location)).step == 4


def test_a_damaged_copy_on_this_host_is_fetched_again(store: Place) -> None:
    location = publish(store.settings)
    folder = storage.local_checkpoint(store.settings, location)
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1])  # cut: noticed always
    assert verify(storage.local_checkpoint(store.settings, location))
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"?")  # changed: noticed when asked for
    assert verify(storage.local_checkpoint(store.settings, location, recheck=True))


@pytest.mark.parametrize("content", ["../../evil", "a/b", "..", MANIFEST])
def test_a_manifest_can_not_name_a_file_elsewhere(store: Place, content: str) -> None:
    files = {content: FileRecord(size=1, sha256="")}
    manifest = Manifest(job_id=JOB, step=1, fence=1, base_model="b", tokens=1, resumable=True, files=files)
    store.write("checkpoints/j/1/1/manifest.json", manifest.model_dump_json().encode())
    with pytest.raises(CorruptCheckpoint, match="no name of a file"):
        storage.local_checkpoint(store.settings, "checkpoints/j/1/1")


def test_a_deleted_checkpoint_is_gone_here_too(place: Place) -> None:
    location, other = publish(place.settings, 4), publish(place.settings, 8)
    storage.local_checkpoint(place.settings, location)
    storage.delete_tree(place.settings, location)
    storage.delete_tree(place.settings, location)
    with pytest.raises(MissingCheckpoint, match=location):
        storage.local_checkpoint(place.settings, location)
    assert verify(storage.local_checkpoint(place.settings, other)).step == 8
    storage.delete_tree(place.settings, f"checkpoints/{JOB}")
    assert place.names() == []
    with pytest.raises(MissingCheckpoint):
        storage.local_checkpoint(place.settings, other)


def test_no_location_leads_out_of_storage(place: Place) -> None:
    publish(place.settings)
    before = place.names()
    outside = [
        "../data",
        "checkpoints/../../data",
        "/etc",
        "",
        ".",
        "checkpoints//x",
        "checkpoints/x/",
        "a\\b",
        "a\0",
        "é",
    ]
    actions = [
        storage.local_checkpoint,
        storage.delete_tree,
        storage.local_file,
        storage.open_file,
        storage.delete_file,
    ]
    for location, action in itertools.product(outside, [*actions, save]):
        with pytest.raises(ValueError, match="outside of storage"):
            action(place.settings, location)
    assert place.names() == before


def test_no_link_in_a_folder_leads_out_of_storage(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    publish(settings)
    (settings.storage_root / "checkpoints" / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="outside of storage"):
        storage.local_checkpoint(settings, "checkpoints/link")
