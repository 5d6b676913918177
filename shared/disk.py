"""Folders and renames that survive a power cut.

A rename is on disk once the folder around it is synced, and a new folder once its parent is. Knows paths only.
"""

import ctypes
import errno
import os
from pathlib import Path

SYNCED_LEVELS = 4
"""checkpoints/<job>/<fence> and the storage around it; syncing what is on disk already costs next to nothing."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
"""What kernels and file systems answer that can rename, but not swap."""


def sync(path: Path) -> None:
    """Put a file's bytes, or a folder's entries, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents as needed; it is on disk when this returns, and so are those around it.

    Whether or not they were there: whoever made them may have died, or failed, before the entry was on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for made in (folder, *folder.parents)[:SYNCED_LEVELS]:
        if made != made.parent:
            sync(made.parent)


def swap(one: Path, other: Path) -> bool:
    """Exchange two paths in one step: at no instant is either missing. False if this file system can't."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    if library.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one))
