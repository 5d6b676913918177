"""Keeping a trainer's heap from growing without end. Knows the C library only.

The malloc settings of `environment` keep freed memory in the process, which is what makes steps fast. With rows of
varied length no freed block quite fits the next tensor, and the heap grows by some hundred megabytes a step; handing
the free pages back to the kernel now and then bounds it, for the price of faulting them in again.
"""

import ctypes
import os
from pathlib import Path

ROOM_BYTES = 2 * 2**30
"""Growth that is left alone between two trims."""


class HeapTrimmer:
    """Call `after_step` once a step; most calls only read a number."""

    def __init__(self, room_bytes: int = ROOM_BYTES) -> None:
        self._room_bytes = room_bytes
        self._limit_bytes: int | None = None
        self._libc = ctypes.CDLL(None)

    def after_step(self) -> bool:
        """Trim if the process has grown by its room since the last trim. Returns whether it did."""
        resident = resident_bytes()
        if self._limit_bytes is None:
            self._limit_bytes = resident + self._room_bytes
        if resident < self._limit_bytes:
            return False
        self._libc.malloc_trim(0)
        self._limit_bytes = resident_bytes() + self._room_bytes
        return True


def resident_bytes() -> int:
    """This process's resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
