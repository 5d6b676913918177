"""An object store that is out of reach: said so, and nothing lost or half done."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from shared import storage
from shared.checkpoint_files import verify
from shared.errors import AppError
from shared.settings import Settings
from shared.storage.keys import PART_BYTES
from tests.shared.places import Place, save, stage

MANY = [os.urandom(2**20)] * (2 * PART_BYTES // 2**20 + 1)
"""Chunks of a file that takes more than two parts."""


def test_a_store_out_of_reach_is_said_to_be_with_the_time_to_try_again(
    s3: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where nobody listens
    settings = Settings(data=tmp_path / "away", storage_url=f"{s3.settings.storage_url}/away")
    began = time.monotonic()
    folder = stage(settings)
    actions: list[Callable[[], Any]] = [
        lambda: save(settings),
        lambda: storage.open_file(settings, "file-1"),
        lambda: storage.local_checkpoint(settings, "checkpoints/j/1/1"),
        lambda: storage.publish_checkpoint(settings, folder),
        lambda: list(storage.list_files(settings)),
        lambda: storage.delete_file(settings, "file-1"),
    ]
    for action in actions:
        with pytest.raises(storage.StorageUnavailable, match="AWS_") as caught:
            action()
        assert (caught.value.status_code, caught.value.retry_after_s) == (503, 5)
    assert time.monotonic() - began < 30
    assert verify(folder), "nothing staged is lost"


def test_a_missing_bucket_is_no_missing_checkpoint(bucket: str, tmp_path: Path) -> None:
    """Else a mistyped URL would make a job forget its progress."""
    settings = Settings(data=tmp_path, storage_url="s3://no-such-bucket")
    with pytest.raises(storage.StorageUnavailable, match="bucket does not exist"):
        storage.local_checkpoint(settings, "checkpoints/j/1/1")
    with pytest.raises(AppError):
        save(settings)


def test_a_store_that_goes_away_during_an_upload_leaves_nothing_to_be_seen(
    s3: Place, s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)  # shares its buckets with the other one
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    settings = Settings(data=tmp_path, storage_url=f"{s3.settings.storage_url}/cut")

    def chunks() -> Iterator[bytes]:
        yield from MANY[: len(MANY) // 2 + 1]
        server.stop()
        yield from MANY

    with pytest.raises(storage.StorageUnavailable):
        storage.save_file(settings, "file-1", chunks(), max_bytes=2**30)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert s3.names() == []
    assert s3.unfinished() == ["some/prefix/cut/files/file-1"]  # nobody was there to abort it
    storage.clear_incoming(s3.settings, 0)
    assert s3.unfinished() == []
