"""Where bytes live: a folder every node sees.

    files/<file id>                          an uploaded or result file
    checkpoints/<job id>/<fence>/<step>/     a checkpoint, published by rename, never written twice
    .incoming/                               half-written files; nothing in it is ever read

Names are made from ids of ours only. A row is written after its bytes are whole and on disk, and bytes are removed
after their row: what a crash leaves is garbage, never a row that points at nothing.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shared.errors import AppError, TooLarge
from shared.settings import Settings

COPY_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes that are whole and on disk."""

    path: Path
    bytes: int
    sha256: str


class StorageFull(AppError):
    status_code = 507
    code = "storage_full"


def file_path(settings: Settings, file_id: str) -> Path:
    return settings.storage_root / "files" / file_id


def checkpoint_dir(settings: Settings, job_id: str, fence: int) -> Path:
    """Folder in which one claim of a job publishes its checkpoints, `<step>/` each."""
    return settings.storage_root / "checkpoints" / job_id / str(fence)


def location_of(settings: Settings, path: Path) -> str:
    """`path` as rows store it: relative to storage, with forward slashes."""
    return path.relative_to(settings.storage_root).as_posix()


def path_of(settings: Settings, location: str) -> Path:
    """Absolute path of a stored location.

    Raises:
        ValueError: the location leads outside of storage.
    """
    path = (settings.storage_root / location).resolve()
    if not path.is_relative_to(settings.storage_root.resolve()):
        raise ValueError(f"{location!r} is outside of storage")
    return path


def save_file(settings: Settings, file_id: str, chunks: Iterable[bytes], *, max_bytes: int) -> Stored:
    """Write chunks to `files/<file_id>`: temporary file, fsync, rename, fsync of the folder.

    Raises:
        TooLarge: more than `max_bytes` came; nothing is left behind.
        StorageFull: the disk is full; nothing is left behind.
    """
    target = file_path(settings, file_id)
    incoming = settings.storage_root / ".incoming"
    for folder in (target.parent, incoming):
        folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    size = 0
    descriptor, name = tempfile.mkstemp(dir=incoming)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            for chunk in chunks:
                size += len(chunk)
                if size > max_bytes:
                    raise TooLarge(
                        f"the file has more than {max_bytes} bytes; split it, or raise ANNEAL_MAX_UPLOAD_BYTES",
                        param="file",
                    )
                digest.update(chunk)
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).rename(target)
        sync_folder(target.parent)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            raise StorageFull("the storage is full; delete files or checkpoints, or enlarge it") from error
        raise
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Stored(target, size, digest.hexdigest())


def delete_file(settings: Settings, file_id: str) -> None:
    file_path(settings, file_id).unlink(missing_ok=True)


def delete_tree(settings: Settings, location: str) -> None:
    """Remove a published folder: renamed away first, so that nobody sees half of it."""
    path = path_of(settings, location)
    doomed = path.with_name(f".deleted-{path.name}-{os.getpid()}")
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
