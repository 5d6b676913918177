"""Who holds a lock on an SQLite database, as the kernel knows it.

A process that is stopped inside a transaction locks everybody out until it goes on: that is SQLite's nature, and a
recovery that waits for it is told apart from one that is slow by our own fault.
"""

import fcntl
import os
import struct
from pathlib import Path

RESERVED_BYTE = 0x40000001  # os_unix.c: what a writer holds from `BEGIN IMMEDIATE` on
SHARED_FIRST, SHARED_SIZE = 0x40000002, 510
"""What a reader holds, and what a writer needs for itself in order to commit."""
_FLOCK = "@hhqqi"


class SqliteLocks:
    """Looks at one database file. Its descriptor is never closed: closing any would drop this process's own locks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def holders(self) -> set[int]:
        """Processes that hold a lock now: the writer, and one of the readers."""
        if self._descriptor is None:
            if not self._path.exists():
                return set()
            self._descriptor = os.open(self._path, os.O_RDWR)
        ranges = ((RESERVED_BYTE, 1), (SHARED_FIRST, SHARED_SIZE))
        return {pid for start, length in ranges if (pid := self._holder(start, length))}

    def _holder(self, start: int, length: int) -> int:
        assert self._descriptor is not None
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(self._descriptor, fcntl.F_GETLK, asked))
        return 0 if kind == fcntl.F_UNLCK else pid
