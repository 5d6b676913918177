"""Keys of an object store, through fsspec: written whole or not at all, read, listed, removed.

Owns the connection and the translation of its errors. Knows nothing of files and checkpoints.
"""

import contextlib
import functools
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec

from shared.storage.store_errors import talking

log = logging.getLogger(__name__)

PART_BYTES = 8 * 2**20
"""Sent or fetched at once. What is smaller goes in one PUT."""
MAX_PARTS = 9_000
"""S3 takes 10,000 for one key."""
CLOCK = ".clock"

S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 20,
        "retries": {"total_max_attempts": 3, "mode": "standard"},
    }
}
"""An endpoint that is gone is noticed within seconds, one that hangs within two minutes."""
S3_ATTEMPTS = 2
"""Of s3fs, around those of botocore: for a body that breaks off."""


class Keys:
    """Keys below a URL, named relative to it."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def write(self, key: str, chunks: Iterable[bytes], *, expected_bytes: int = 0) -> None:
        """Write one key in constant memory, in parts if it is large.

        Raises:
            Exception: whatever `chunks` raises. The key isn't there then, nor are parts of it.
        """
        part_bytes = max(PART_BYTES, expected_bytes // MAX_PARTS + 1)
        rest = iter(chunks)
        start = bytearray()
        for chunk in rest:
            start += chunk
            if len(start) >= part_bytes:
                self._write_parts(key, itertools.chain((start,), rest), part_bytes)
                return
        with talking(f"write {key}"):
            self._system.pipe_file(self._path(key), bytes(start))

    def _write_parts(self, key: str, chunks: Iterable[bytes | bytearray], part_bytes: int) -> None:
        with talking(f"write {key}"):
            stream = self._system.open(self._path(key), "wb", block_size=part_bytes, autocommit=False)
        try:
            for chunk in chunks:
                with talking(f"write {key}"):
                    stream.write(chunk)
            with talking(f"write {key}"):
                stream.close()
                stream.commit()
        except BaseException:
            self._discard(stream, key)
            raise

    def _discard(self, stream: Any, key: str) -> None:
        """Abort a multi-part upload. If the store is gone as well, `abort_uploads` does it later."""
        with contextlib.suppress(AttributeError):
            stream.closed = True  # else the collector of lost objects would close it, which sends what is buffered
        try:
            stream.discard()
            self.remove(key)  # not every store hides a key until it is whole
        except Exception as error:
            log.warning("the unfinished upload of %s could not be aborted: %s", key, error)

    def create(self, key: str, content: bytes) -> None:
        """Write a small key that must not be there yet; the store lets only the first of several through.

        Raises:
            FileExistsError: it is there.
        """
        with talking(f"create {key}"):
            self._system.pipe_file(self._path(key), content, mode="create")

    def read(self, key: str) -> bytes | None:
        """A small key, None if it is not there."""
        try:
            with talking(f"read {key}"):
                return bytes(self._system.cat_file(self._path(key)))
        except FileNotFoundError:
            return None

    def size(self, key: str) -> int:
        with talking(f"look at {key}"):
            return int(self._system.info(self._path(key))["size"])

    def download(self, key: str, path: Path) -> None:
        with talking(f"read {key}"):
            self._system.get_file(self._path(key), str(path))

    def chunks(self, key: str) -> Iterator[bytes]:
        """A key in parts. Missing, it raises FileNotFoundError here, not at the first part."""
        with talking(f"read {key}"):
            stream = self._system.open(self._path(key), "rb", block_size=PART_BYTES, cache_type="none")

        def read() -> Iterator[bytes]:
            with contextlib.closing(stream):
                while True:
                    with talking(f"read {key}"):
                        chunk = bytes(stream.read(PART_BYTES))
                    if not chunk:
                        return
                    yield chunk

        return read()

    def ages_s(self, prefix: str) -> dict[str, float]:
        """Seconds since they were written of all keys below a prefix, on the store's own clock."""
        now = self._now()
        root = self._path(prefix)
        with talking(f"list {prefix}"):
            found = {
                path: self._modified(path, info)
                for path, info in self._system.find(root, detail=True).items()
                if path.startswith(f"{root}/")
            }
        return {prefix + path.removeprefix(root): max(0.0, now - at) for path, at in found.items()}

    def below(self, prefix: str) -> list[str]:
        root = self._path(prefix)
        with talking(f"list {prefix}"):
            return [prefix + path.removeprefix(root) for path in self._system.find(root) if path.startswith(f"{root}/")]

    def remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError), talking(f"delete {key}"):
            self._system.rm_file(self._path(key))

    def abort_uploads(self, older_than_s: float) -> None:
        """Abort multi-part uploads whose sender died: they are invisible, and cost like the bytes they hold."""
        if not hasattr(self._system, "list_multipart_uploads"):
            return  # not S3; other stores forget them by themselves
        bucket, root, _ = self._system.split_path(self._path(""))
        now = self._now()
        with talking("list unfinished uploads"):
            uploads = self._system.list_multipart_uploads(bucket)
        for upload in uploads:
            if upload["Key"].startswith(root) and now - upload["Initiated"].timestamp() >= older_than_s:
                log.info("aborting the unfinished upload of %s", upload["Key"])
                with contextlib.suppress(FileNotFoundError), talking("abort an unfinished upload"):
                    self._system.abort_mpu(bucket, upload["Key"], upload["UploadId"])

    def _now(self) -> float:
        """The time on the clock that stamps the keys: a node whose own clock is wrong must not see garbage."""
        path = self._path(CLOCK)
        with talking(f"write {CLOCK}"):
            self._system.pipe_file(path, b"")
            return self._modified(path, self._system.info(path))

    def _modified(self, path: str, info: dict[str, Any]) -> float:
        at = info.get("LastModified") or info.get("last_modified") or info.get("mtime") or self._system.modified(path)
        if isinstance(at, datetime):
            return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
        return float(at)

    def _path(self, key: str) -> str:
        return str(self._system._strip_protocol(f"{self._url}/{key}"))

    @property
    def _system(self) -> Any:
        return _file_system(self._url, os.getpid())


@functools.lru_cache(maxsize=4)
def _file_system(url: str, process_id: int) -> Any:
    """One client for all threads of a process: each would have connections of its own. Not for a forked child."""
    options = S3_OPTIONS if url.startswith(("s3://", "s3a://")) else {}
    system, _ = fsspec.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
    if options:
        system.retries = S3_ATTEMPTS
    return system
