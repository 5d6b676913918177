"""Checkpoint folders: published whole or not at all.

    <checkpoint_dir>/.tmp-<step>-<pid>/       being written; a crash leaves it behind, and it is garbage
    <checkpoint_dir>/<step>/                  published: every file on disk, manifest.json written last, then one rename
    <checkpoint_dir>/.deleted-<step>-<pid>/   a damaged one that was replaced; garbage too

A folder holds a model that transformers loads as it is. A resumable one also holds optimizer.pt, scheduler.pt,
rng_state.pth and trainer_state.json, never training_args.bin, which is a pickle of code. This module knows files
only, and imports no torch. How a folder is checked is in `shared.checkpoint_files`.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from shared.checkpoint_files import (
    MANIFEST,
    TEMPORARY_PREFIX,
    CorruptCheckpoint,
    FileRecord,
    Manifest,
    read_manifest,
    sha256_of,
    verify,
)
from shared.disk import make_folder, swap, sync
from worker.training.failures import DiskFull

__all__ = [
    "MANIFEST",
    "RESUME_FILES",
    "SPARE_BYTES",
    "TEMPORARY_PREFIX",
    "CorruptCheckpoint",
    "FileRecord",
    "Manifest",
    "publish",
    "read_manifest",
    "verify",
]

RESUME_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
SPARE_BYTES = 64 * 2**20
"""Left free on the disk beside the checkpoint itself, for everybody's logs and databases."""


def publish(
    folder: Path,
    write: Callable[[Path], None],
    *,
    expected_bytes: int,
    make_manifest: Callable[[dict[str, FileRecord]], Manifest],
) -> tuple[Manifest, str]:
    """Have `write` fill a temporary folder, then make it appear as `folder` in one rename.

    A step that is published already with the same files is kept as it is: a key is never written twice.

    Returns:
        The manifest of what is published now, and the SHA-256 of its file.

    Raises:
        DiskFull: before anything is written if `expected_bytes` do not fit, or when the disk fills up meanwhile;
            either way the temporary folder is gone and what was published before is untouched.
    """
    make_folder(folder.parent)
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
        sync(temporary / MANIFEST)
        sync(temporary)
        if folder.exists():
            manifest, content = _settle_with_published(folder, temporary, manifest, content)
        else:
            temporary.rename(folder)
        sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _disk_is_full(error):
            raise _disk_full(folder.parent, expected_bytes) from error
        raise
    return manifest, hashlib.sha256(content).hexdigest()


def _settle_with_published(folder: Path, ours: Path, manifest: Manifest, content: bytes) -> tuple[Manifest, bytes]:
    """A step was replayed after a crash between rename and report. Returns what is published in the end.

    The same files are kept, whoever wrote them, and ours go. A damaged or different folder makes way in one step, so
    that a crash finds one or the other; where the file system can't swap, a damaged one is renamed away first.
    """
    try:
        published = verify(folder)
        if published.files == manifest.files:
            shutil.rmtree(ours, ignore_errors=True)
            return published, (folder / MANIFEST).read_bytes()
    except (CorruptCheckpoint, OSError):
        pass  # worth nothing to anybody
    doomed = folder.with_name(f".deleted-{folder.name}-{os.getpid()}")
    shutil.rmtree(doomed, ignore_errors=True)
    if swap(ours, folder):
        ours.rename(doomed)
    else:
        folder.rename(doomed)
        ours.rename(folder)
    sync(folder.parent)
    shutil.rmtree(doomed, ignore_errors=True)
    return manifest, content


def _record(path: Path) -> FileRecord:
    sync(path)
    return FileRecord(size=path.stat().st_size, sha256=sha256_of(path))


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
