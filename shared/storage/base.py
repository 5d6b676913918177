"""What both kinds of storage share: results, errors, and which names may become paths or keys."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shared.errors import AppError, TooLarge, Unavailable

COPY_CHUNK_BYTES = 2**20
FILES = "files"
CHECKPOINTS = "checkpoints"
RETRY_AFTER_S = 5
_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes that are whole and in storage."""

    bytes: int
    sha256: str


class StorageFull(AppError):
    """There is no room for more; nothing was left behind."""

    status_code = 507
    should_retry = False
    code = "storage_full"

    def __init__(self, message: str = "the storage is full; delete files or checkpoints, or enlarge it") -> None:
        super().__init__(message)


class StorageUnavailable(Unavailable):
    """The object store can't be reached, or refuses. Nobody's file is at fault: worth trying again."""

    code = "storage_unavailable"

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=RETRY_AFTER_S)


class AlreadyPublished(AppError):
    """Another checkpoint is published under this key, and a key is never written twice."""

    code = "checkpoint_conflict"


class DamagedFile(AppError):
    """The bytes in storage are not those that were uploaded."""

    code = "file_damaged"


def checked_name(name: str) -> str:
    """`name`, if it can be one part of a path or key.

    Raises:
        ValueError: it could lead elsewhere.
    """
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise ValueError(f"{name[:200]!r} is outside of storage: it is no plain name")
    return name


def checked_location(location: str) -> str:
    """`location`, if it is a relative path of plain names.

    Raises:
        ValueError: it leads outside of storage.
    """
    for part in location.split("/"):
        try:
            checked_name(part)
        except ValueError as error:
            raise ValueError(f"{location[:300]!r} is outside of storage") from error
    return location


def too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"the file has more than {max_bytes} bytes; split it, or raise ANNEAL_MAX_UPLOAD_BYTES", param="file"
    )


def last_change(folder: Path) -> float:
    """When a folder or anything directly in it changed last, by the clock of its file system.

    Raises:
        FileNotFoundError: it is gone.
    """
    times = [folder.stat().st_mtime]
    for entry in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):
            times.append(entry.stat().st_mtime)
    return max(times)
