"""Storage in an object store: S3 and what speaks its protocol, and any other scheme that fsspec has.

    <url>/files/<file id>                        an uploaded or result file
    <url>/checkpoints/<job id>/<fence>/<step>/   a checkpoint: its files, and last its manifest.json
    <url>/.owner, .clock                         which database this is of; the store's own time
    run_dir/staging/checkpoints/…                where trainers of this host publish, before the upload
    run_dir/cache/                               downloads

There is no rename in an object store. A key appears whole or not at all: one PUT, or a multi-part upload completed
after its last byte, and aborted if anything went wrong before. A checkpoint is published by the PUT of its manifest,
which the store refuses if there is one already. Nothing read is trusted before it was compared with a digest.
"""

import contextlib
import hashlib
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shared.checkpoint_files import (
    MANIFEST,
    CorruptCheckpoint,
    FileRecord,
    MissingCheckpoint,
    parse_manifest,
    sha256_of,
    verify,
    verify_sizes,
)
from shared.settings import Settings
from shared.storage.base import (
    CHECKPOINTS,
    COPY_CHUNK_BYTES,
    FILES,
    AlreadyPublished,
    DamagedFile,
    Stored,
    checked_location,
    checked_name,
    last_change,
    too_large,
)
from shared.storage.cache import DownloadCache, Room
from shared.storage.keys import Keys

log = logging.getLogger(__name__)

TRANSFERS = 4
"""Files of a checkpoint moved at once; each holds about two parts in memory."""
MIN_STAGING_AGE_S = 86_400.0
"""What was staged and not uploaded waits at least this long: an outage of the store must not cost a checkpoint."""
CONTENT = "content"
"""Name of a file in its cache entry."""
OWNER = ".owner"


class ObjectStorage:
    def __init__(self, settings: Settings) -> None:
        assert settings.storage_url is not None
        self._keys = Keys(settings.storage_url)
        self._staging = settings.run_dir / "staging"
        self._cache = DownloadCache(settings.run_dir / "cache", settings.cache_bytes)

    # Files.

    def save_file(self, file_id: str, chunks: Iterable[bytes], *, max_bytes: int) -> Stored:
        digest = hashlib.sha256()
        size = 0

        def counted() -> Iterator[bytes]:
            nonlocal size
            for chunk in chunks:
                size += len(chunk)
                if size > max_bytes:
                    raise too_large(max_bytes)
                digest.update(chunk)
                yield chunk

        self._keys.write(_file_key(file_id), counted(), expected_bytes=max_bytes)
        return Stored(size, digest.hexdigest())

    def local_file(self, file_id: str, sha256: str | None, keep_in: Path | None) -> Path:
        key = _file_key(file_id)

        def check(folder: Path) -> None:
            if sha256 is not None and sha256_of(folder / CONTENT) != sha256:
                raise _damaged(file_id)

        def fill(folder: Path, room: Room) -> None:
            room(self._keys.size(key))
            self._keys.download(key, folder / CONTENT)
            check(folder)

        return self._cache.obtain(key, fill=fill, check=check, keep_in=keep_in and keep_in / file_id) / CONTENT

    def open_file(self, file_id: str, sha256: str | None) -> Iterator[bytes]:
        chunks = self._keys.chunks(_file_key(file_id))  # here: a missing file is told at once

        def checked() -> Iterator[bytes]:
            digest = hashlib.sha256()
            held = b""
            for chunk in chunks:
                if held:
                    yield held
                digest.update(chunk)
                held = chunk
            if sha256 is not None and digest.hexdigest() != sha256:
                raise _damaged(file_id)
            if held:
                yield held

        return checked()

    def has_file(self, file_id: str) -> bool:
        try:
            self._keys.size(_file_key(file_id))
        except FileNotFoundError:
            return False
        return True

    def delete_file(self, file_id: str) -> None:
        self._keys.remove(_file_key(file_id))
        self._cache.drop(_file_key(file_id))

    # Checkpoints.

    def staging_dir(self, job_id: str, fence: int) -> Path:
        return self._staging / CHECKPOINTS / checked_name(job_id) / str(fence)

    def clear_staging(self, job_id: str) -> None:
        shutil.rmtree(self._staging / CHECKPOINTS / checked_name(job_id), ignore_errors=True)

    def publish_checkpoint(self, path: Path) -> str:
        location = checked_location(path.relative_to(self._staging).as_posix())
        try:
            content = (path / MANIFEST).read_bytes()
        except FileNotFoundError:
            if self._keys.read(f"{location}/{MANIFEST}") is None:
                raise MissingCheckpoint(f"{path} has no {MANIFEST}: it was never published") from None
            return location  # a repetition: it was uploaded, and has moved into the cache
        if not self._is_published(location, content):
            manifest = verify_sizes(path)
            with ThreadPoolExecutor(TRANSFERS, thread_name_prefix="upload") as pool:
                list(pool.map(lambda item: self._upload(path, location, *item), manifest.files.items()))
            try:
                self._keys.create(f"{location}/{MANIFEST}", content)  # from here on the checkpoint is published
            except FileExistsError:
                self._is_published(location, content)
        self._cache.adopt(location, path)
        return location

    def _upload(self, folder: Path, location: str, name: str, record: FileRecord) -> None:
        """Upload one file of a checkpoint unless it is not the one that its manifest describes."""

        def chunks() -> Iterator[bytes]:
            digest = hashlib.sha256()
            with (folder / name).open("rb") as stream:
                while chunk := stream.read(COPY_CHUNK_BYTES):
                    digest.update(chunk)
                    yield chunk
            if digest.hexdigest() != record.sha256:
                raise CorruptCheckpoint(f"{folder / name} differs from the SHA-256 in its manifest")

        self._keys.write(f"{location}/{name}", chunks(), expected_bytes=record.size)

    def _is_published(self, location: str, content: bytes) -> bool:
        """Whether this very manifest is in the store.

        Raises:
            AlreadyPublished: another one is.
        """
        published = self._keys.read(f"{location}/{MANIFEST}")
        if published is not None and published != content:
            raise AlreadyPublished(f"another checkpoint is published at {location}; a key is never written twice")
        return published is not None

    def local_checkpoint(self, location: str, *, recheck: bool, keep_in: Path | None) -> Path:
        checked_location(location)

        def fill(folder: Path, room: Room) -> None:
            try:
                self._download(location, folder, room)
            except MissingCheckpoint:
                raise
            except CorruptCheckpoint as error:  # on the way or in the store? What callers give up is gone for good
                log.warning("%s is downloaded once more: %s", location, error)
                for path in folder.iterdir():
                    path.unlink()
                self._download(location, folder, room)

        return self._cache.obtain(location, fill=fill, check=verify if recheck else verify_sizes, keep_in=keep_in)

    def _download(self, location: str, folder: Path, room: Room) -> None:
        content = self._keys.read(f"{location}/{MANIFEST}")
        if content is None:
            raise MissingCheckpoint(f"{location} is not in storage: it was never published, or deleted")
        manifest = parse_manifest(content, location)
        room(sum(record.size for record in manifest.files.values()) + len(content))

        def fetch(name: str) -> None:
            try:
                self._keys.download(f"{location}/{name}", folder / name)
            except FileNotFoundError as error:
                raise CorruptCheckpoint(f"{location}/{name} is missing, though the manifest lists it") from error

        with ThreadPoolExecutor(TRANSFERS, thread_name_prefix="download") as pool:
            list(pool.map(fetch, manifest.files))
        (folder / MANIFEST).write_bytes(content)
        verify(folder)

    def delete_tree(self, location: str) -> None:
        # The manifest goes first: without it, what is left is no checkpoint, only garbage.
        for key in sorted(self._keys.below(checked_location(location)), key=lambda key: not key.endswith(MANIFEST)):
            self._keys.remove(key)
        self._cache.drop(location)

    # What garbage collection looks at.

    def list_files(self) -> Iterator[tuple[str, float]]:
        for key, age_s in self._keys.ages_s(FILES).items():
            yield key.removeprefix(f"{FILES}/"), age_s

    def list_checkpoints(self) -> Iterator[tuple[str, float]]:
        youngest_s: dict[str, float] = {}
        for key, age_s in self._keys.ages_s(CHECKPOINTS).items():
            location = key.rpartition("/")[0]
            if location.count("/") == 3 and location.split("/")[2].isdecimal():
                youngest_s[location] = min(age_s, youngest_s.get(location, age_s))
        yield from youngest_s.items()

    def clear_incoming(self, older_than_s: float) -> None:
        # Known by when they began only, and a large file over a slow line takes hours.
        self._keys.abort_uploads(max(older_than_s, MIN_STAGING_AGE_S))
        self._cache.clear_leftovers(older_than_s)
        limit_s = max(older_than_s, MIN_STAGING_AGE_S)
        for pattern in ("*/*/*", "*/*", "*"):
            for folder in (self._staging / CHECKPOINTS).glob(pattern):
                with contextlib.suppress(OSError):  # it was published meanwhile, or isn't empty
                    if time.time() - last_change(folder) >= limit_s:
                        shutil.rmtree(folder) if pattern == "*/*/*" else folder.rmdir()

    def owner(self) -> str | None:
        content = self._keys.read(OWNER)
        return None if content is None else content.decode()

    def owned_by(self, instance: str) -> str:
        try:
            self._keys.create(OWNER, instance.encode())
        except FileExistsError:
            return (self._keys.read(OWNER) or b"").decode()
        return instance


def _file_key(file_id: str) -> str:
    return f"{FILES}/{checked_name(file_id)}"


def _damaged(file_id: str) -> DamagedFile:
    return DamagedFile(f"the bytes of file {file_id} in storage are not those that were uploaded; upload them again")
