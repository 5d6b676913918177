"""Storage in a folder that every node sees.

    files/<file id>                          an uploaded or result file
    checkpoints/<job id>/<fence>/<step>/     a checkpoint, published by rename, never written twice
    .incoming/                               half-written files; nothing in it is ever read

Everything is handed out in place: no function here copies a byte that is already in the folder.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from shared.checkpoint_files import MissingCheckpoint, verify
from shared.disk import make_folder, sync
from shared.settings import Settings
from shared.storage.base import (
    CHECKPOINTS,
    COPY_CHUNK_BYTES,
    FILES,
    StorageFull,
    Stored,
    checked_location,
    checked_name,
    last_change,
    too_large,
)

INCOMING = ".incoming"
DELETED = ".deleted-"
OWNER = ".owner"


class FolderStorage:
    def __init__(self, settings: Settings) -> None:
        self._root = settings.storage_root

    # Files.

    def save_file(self, file_id: str, chunks: Iterable[bytes], *, max_bytes: int) -> Stored:
        """Temporary file, fsync, rename, fsync of the folder."""
        target = self.file_path(file_id)
        incoming = self._root / INCOMING
        make_folder(target.parent)
        make_folder(incoming)
        digest = hashlib.sha256()
        size = 0
        descriptor, name = tempfile.mkstemp(dir=incoming)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                for chunk in chunks:
                    size += len(chunk)
                    if size > max_bytes:
                        raise too_large(max_bytes)
                    digest.update(chunk)
                    stream.write(chunk)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).rename(target)
            sync(target.parent)
        except OSError as error:
            Path(name).unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull from error
            raise
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return Stored(size, digest.hexdigest())

    def local_file(self, file_id: str, sha256: str | None, keep_in: Path | None) -> Path:
        path = self.file_path(file_id)
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return path

    def open_file(self, file_id: str, sha256: str | None) -> Iterator[bytes]:
        stream = self.file_path(file_id).open("rb")  # here, not in the generator: a missing file is told at once

        def chunks() -> Iterator[bytes]:
            with stream:
                while chunk := stream.read(COPY_CHUNK_BYTES):
                    yield chunk

        return chunks()

    def has_file(self, file_id: str) -> bool:
        return self.file_path(file_id).is_file()

    def delete_file(self, file_id: str) -> None:
        self.file_path(file_id).unlink(missing_ok=True)

    def file_path(self, file_id: str) -> Path:
        return self._root / FILES / checked_name(file_id)

    # Checkpoints.

    def staging_dir(self, job_id: str, fence: int) -> Path:
        """The final place: what the trainer renames there is published."""
        return self._root / CHECKPOINTS / checked_name(job_id) / str(fence)

    def clear_staging(self, job_id: str) -> None:
        """Nothing is staged here."""

    def publish_checkpoint(self, path: Path) -> str:
        return checked_location(path.relative_to(self._root).as_posix())

    def local_checkpoint(self, location: str, *, recheck: bool, keep_in: Path | None) -> Path:
        path = self._path(location)
        if not path.is_dir():
            raise MissingCheckpoint(f"{location} is not in storage: it was never published, or deleted")
        if recheck:
            verify(path)
        return path

    def delete_tree(self, location: str) -> None:
        """Renamed away first, so that nobody sees half of it."""
        path = self._path(location)
        doomed = path.with_name(f"{DELETED}{path.name.lstrip('.')}-{os.getpid()}")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            path.rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def _path(self, location: str) -> Path:
        path = (self._root / checked_location(location)).resolve()
        if not path.is_relative_to(self._root.resolve()):
            raise ValueError(f"{location!r} is outside of storage")
        return path

    # What garbage collection looks at.

    def list_files(self) -> Iterator[tuple[str, float]]:
        now = self._now()
        for entry in _entries(self._root / FILES):
            with suppress(FileNotFoundError):
                yield entry.name, max(0.0, now - entry.stat().st_mtime)

    def list_checkpoints(self) -> Iterator[tuple[str, float]]:
        now = self._now()
        for job in _entries(self._root / CHECKPOINTS):
            for fence in _entries(job):
                for step in _entries(fence) if fence.name.isdecimal() else ():
                    with suppress(FileNotFoundError):
                        yield f"{CHECKPOINTS}/{job.name}/{fence.name}/{step.name}", max(0.0, now - last_change(step))

    def clear_incoming(self, older_than_s: float) -> None:
        now = self._now()
        for entry in _entries(self._root / INCOMING):
            with suppress(FileNotFoundError):
                if now - entry.stat().st_mtime >= older_than_s:
                    entry.unlink()
        for job in _entries(self._root / CHECKPOINTS):
            for folder in (*_entries(job), job):
                if folder.name.startswith(DELETED):
                    shutil.rmtree(folder, ignore_errors=True)
                # Only an empty folder can be removed so; a trainer that needs it again makes it again.
                with suppress(OSError):
                    if now - folder.stat().st_mtime >= older_than_s:
                        folder.rmdir()

    def owner(self) -> str | None:
        try:
            return (self._root / OWNER).read_text()
        except FileNotFoundError:
            return None

    def owned_by(self, instance: str) -> str:
        make_folder(self._root / INCOMING)
        owner = self._root / OWNER
        with tempfile.NamedTemporaryFile(dir=self._root / INCOMING) as stream:
            stream.write(instance.encode())
            stream.flush()
            os.fsync(stream.fileno())
            try:
                os.link(stream.name, owner)  # whole, and only the first of several succeeds
                sync(self._root)
            except FileExistsError:
                return owner.read_text()
        return instance

    def _now(self) -> float:
        """The time on the clock that stamps the files: a node whose own clock is wrong must not see garbage."""
        make_folder(self._root / INCOMING)
        with tempfile.NamedTemporaryFile(dir=self._root / INCOMING) as stamp:
            return os.fstat(stamp.fileno()).st_mtime


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
