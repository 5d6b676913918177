"""Where bytes live: a folder every node sees, or an object store (S3, or whatever else fsspec speaks).

    files/<file id>                          an uploaded or result file
    checkpoints/<job id>/<fence>/<step>/     a checkpoint, whole once its manifest.json is there, never written twice

Names are made from ids of ours only. A row is written after its bytes are whole and durable, and bytes are removed
after their row: what a crash leaves is garbage, never a row that points at nothing. This module is the one door;
`folder` and `object_store` are the two rooms, `cache` keeps an object store's downloads on this host.

Raises, from every function, with an object store: StorageUnavailable, if it can't be reached or refuses.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from shared.settings import Settings
from shared.storage.base import (
    COPY_CHUNK_BYTES,
    AlreadyPublished,
    DamagedFile,
    StorageFull,
    StorageUnavailable,
    Stored,
)
from shared.storage.folder import FolderStorage
from shared.storage.object_store import ObjectStorage

__all__ = ["COPY_CHUNK_BYTES", "AlreadyPublished", "DamagedFile", "StorageFull", "StorageUnavailable", "Stored"]


def save_file(settings: Settings, file_id: str, chunks: Iterable[bytes], *, max_bytes: int) -> Stored:
    """Write chunks to `files/<file_id>`, in constant memory. It appears whole or not at all.

    Raises:
        TooLarge: more than `max_bytes` came; nothing is left behind.
        StorageFull: there is no room; nothing is left behind.
        Exception: whatever `chunks` raises; nothing is left behind.
    """
    return _storage(settings).save_file(file_id, chunks, max_bytes=max_bytes)


def local_file(settings: Settings, file_id: str, *, sha256: str | None = None, keep_in: Path | None = None) -> Path:
    """A path to read the file at. Folder: the file itself. Object store: a download, kept in this host's cache.

    Args:
        sha256: what the bytes must hash to, from the file's row; checked when they are downloaded.
        keep_in: a folder of the caller's on the file system of `run_dir`. With an object store the path is a hard
            link in there, which stays when the cache evicts the file. Without, it may go after an hour without use.

    Raises:
        FileNotFoundError: it is not in storage.
        DamagedFile: the downloaded bytes are not those that were uploaded.
    """
    return _storage(settings).local_file(file_id, sha256, keep_in)


def open_file(settings: Settings, file_id: str, *, sha256: str | None = None) -> Iterator[bytes]:
    """The file in chunks, in constant memory. From an object store the last one comes only if the digest is right.

    Raises:
        FileNotFoundError: it is not in storage; at once, not at the first chunk.
        DamagedFile: instead of the last chunk.
    """
    return _storage(settings).open_file(file_id, sha256)


def has_file(settings: Settings, file_id: str) -> bool:
    """Whether the file is in storage now."""
    return _storage(settings).has_file(file_id)


def delete_file(settings: Settings, file_id: str) -> None:
    """Remove a file, if it is there."""
    _storage(settings).delete_file(file_id)


def staging_dir(settings: Settings, job_id: str, fence: int) -> Path:
    """Where one claim's trainer publishes its checkpoints, `<step>/` each. Folder: their final place.

    Object store: a folder of this host, which `publish_checkpoint` empties.
    """
    return _storage(settings).staging_dir(job_id, fence)


def clear_staging(settings: Settings, job_id: str) -> None:
    """Drop what a job staged on this host and never published. For when no trainer of that job runs here."""
    _storage(settings).clear_staging(job_id)


def publish_checkpoint(settings: Settings, path: Path) -> str:
    """Put a whole `staging_dir/<step>` into storage. Returns its location, as rows store it. Safe to repeat.

    Folder: it is there already; nothing is read or copied. Object store: every file is uploaded and compared with the
    manifest on the way, manifest.json goes last, then the folder moves into this host's cache.

    Raises:
        CorruptCheckpoint: a file is not what the manifest says; nothing was published.
        AlreadyPublished: another checkpoint has this location.
        StorageFull: there is no room.
    """
    return _storage(settings).publish_checkpoint(path)


def local_checkpoint(settings: Settings, location: str, *, recheck: bool = False, keep_in: Path | None = None) -> Path:
    """A folder to read the checkpoint at. Folder: itself. Object store: a verified download, kept in the cache.

    Args:
        recheck: compare every byte with the manifest even if it was done before. A cached copy that fails is
            downloaded again.
        keep_in: a folder of the caller's, not there yet, on the file system of `run_dir`. With an object store it is
            filled with hard links and returned: it stays when the cache evicts the checkpoint.

    Raises:
        MissingCheckpoint: it is not in storage.
        CorruptCheckpoint: it is not what its manifest says.
        StorageFull: this host has no room for the download.
        ValueError: the location leads outside of storage.
    """
    return _storage(settings).local_checkpoint(location, recheck=recheck, keep_in=keep_in)


def delete_tree(settings: Settings, location: str) -> None:
    """Remove a checkpoint, or everything below `checkpoints/<job>`: at first it stops being one, then its bytes go.

    Raises:
        ValueError: the location leads outside of storage.
    """
    _storage(settings).delete_tree(location)


def list_files(settings: Settings) -> Iterator[tuple[str, float]]:
    """(file id, seconds since it was written) of everything under files/, on the storage's own clock."""
    return _storage(settings).list_files()


def list_checkpoints(settings: Settings) -> Iterator[tuple[str, float]]:
    """(location, seconds since anything in it changed) of every step folder, published or not.

    Those that a crash left, `.tmp-…` and `.deleted-…`, are among them; `delete_tree` takes them all.
    """
    return _storage(settings).list_checkpoints()


def clear_incoming(settings: Settings, older_than_s: float) -> None:
    """Remove what uploads that were cut off left behind, once it is that old: in storage, and on this host."""
    _storage(settings).clear_incoming(older_than_s)


def owner(settings: Settings) -> str | None:
    """The name of the database this storage belongs to; None if nobody's yet."""
    return _storage(settings).owner()


def owned_by(settings: Settings, instance: str) -> str:
    """The database this storage belongs to: `instance`, if nobody had claimed it, from now on."""
    return _storage(settings).owned_by(instance)


def file_on_disk(settings: Settings, file_id: str) -> Path | None:
    """Where the file is, None with an object store: for whoever can do better with a path than with chunks.

    Raises:
        FileNotFoundError: storage is a folder and the file is not there.
    """
    return local_file(settings, file_id) if settings.storage_is_folder else None


def _storage(settings: Settings) -> FolderStorage | ObjectStorage:
    return FolderStorage(settings) if settings.storage_is_folder else ObjectStorage(settings)
