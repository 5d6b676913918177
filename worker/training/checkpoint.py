"""Checkpoint folders: published whole or not at all, and checked before anybody trusts one.

    <checkpoint_dir>/.tmp-<step>-<pid>/   being written; a crash leaves it behind, and it is garbage
    <checkpoint_dir>/<step>/              published: every file on disk, manifest.json written last, then one rename

A folder holds a model that transformers loads as it is. A resumable one also holds optimizer.pt, scheduler.pt,
rng_state.pth and trainer_state.json, never training_args.bin, which is a pickle of code. This module knows files
only, and imports no torch: the supervisor verifies with it.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from worker.training.failures import DiskFull

MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
RESUME_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
SPARE_BYTES = 64 * 2**20
"""Left free on the disk beside the checkpoint itself, for everybody's logs and databases."""
_CHUNK_BYTES = 2**20


class CorruptCheckpoint(Exception):
    """The folder is not the checkpoint its manifest describes, or no checkpoint at all."""


class FileRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    sha256: str


class Manifest(BaseModel):
    """What a checkpoint folder holds, and where it comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str
    step: int
    fence: int
    base_model: str
    tokens: int
    """Non-padding tokens trained on so far, over all attempts."""
    resumable: bool
    files: dict[str, FileRecord]


def publish(
    folder: Path,
    write: Callable[[Path], None],
    *,
    expected_bytes: int,
    make_manifest: Callable[[dict[str, FileRecord]], Manifest],
) -> tuple[Manifest, str]:
    """Have `write` fill a temporary folder, then make it appear as `folder` in one rename.

    Returns:
        The manifest and the SHA-256 of its file.

    Raises:
        DiskFull: before anything is written if `expected_bytes` do not fit, or when the disk fills up meanwhile;
            either way the temporary folder is gone and what was published before is untouched.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _demand_space(folder.parent, expected_bytes)
    temporary = folder.parent / f"{TEMPORARY_PREFIX}{folder.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o755)
    try:
        write(temporary)
        files = {path.name: _record(path) for path in sorted(temporary.iterdir())}
        manifest = make_manifest(files)
        content = manifest.model_dump_json(indent=1).encode()
        (temporary / MANIFEST).write_bytes(content)
        _sync(temporary / MANIFEST)
        _sync(temporary)
        if folder.exists():
            # A replayed step after a crash between rename and report; the new one is as good and carries our fence.
            shutil.rmtree(folder)
        temporary.rename(folder)
        _sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _disk_is_full(error):
            raise _disk_full(folder.parent, expected_bytes) from error
        raise
    return manifest, hashlib.sha256(content).hexdigest()


def verify(path: Path) -> Manifest:
    """Read the manifest and compare every file with it, byte for byte.

    Raises:
        CorruptCheckpoint: a file is missing, cut, changed or unlisted, or the manifest can't be read.
    """
    manifest = read_manifest(path)
    listed = {*manifest.files, MANIFEST}
    present = {entry.name for entry in path.iterdir()}
    if present != listed:
        raise CorruptCheckpoint(
            f"{path}: missing {sorted(listed - present) or 'nothing'}, unlisted {sorted(present - listed) or 'nothing'}"
        )
    for name, record in manifest.files.items():
        size = (path / name).stat().st_size
        if size != record.size:
            raise CorruptCheckpoint(f"{path / name} has {size} bytes, its manifest says {record.size}")
        if _sha256(path / name) != record.sha256:
            raise CorruptCheckpoint(f"{path / name} differs from the SHA-256 in its manifest")
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, unchecked against the files.

    Raises:
        CorruptCheckpoint: there is none, or it is not a manifest.
    """
    try:
        return Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{path} has no {MANIFEST}: it was never published") from error
    except (OSError, ValidationError) as error:
        raise CorruptCheckpoint(f"{path / MANIFEST} can't be read: {error}") from error


def _record(path: Path) -> FileRecord:
    _sync(path)
    return FileRecord(size=path.stat().st_size, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _demand_space(parent: Path, expected_bytes: int) -> None:
    if shutil.disk_usage(parent).free < expected_bytes + SPARE_BYTES:
        raise _disk_full(parent, expected_bytes)


def _disk_is_full(error: BaseException) -> bool:
    """safetensors and torch.save wrap the operating system's error in their own, so the text has to do."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error).lower()
    return "no space left" in text or "disk quota" in text or "unexpected pos" in text or "file write failed" in text


def _disk_full(parent: Path, expected_bytes: int) -> DiskFull:
    free = shutil.disk_usage(parent).free
    return DiskFull(
        f"a checkpoint needs about {expected_bytes / 2**20:.0f} MiB and {SPARE_BYTES / 2**20:.0f} MiB to spare, but "
        f"only {free / 2**20:.0f} MiB are free on the checkpoint storage; the checkpoints published so far are kept. "
        "Free some space or lower training.keep_checkpoints, then create the job again."
    )
