"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable
from typing import TypeVar

import psutil

LIMIT_S = 60.0
"""For a machine that has much else to do. Only a test that fails waits so long."""

Found = TypeVar("Found")


def wait_until(condition: Callable[[], Found], limit_s: float = LIMIT_S) -> Found:
    """Ask until the answer is true; return it.

    Raises:
        AssertionError: it was not within the limit.
    """
    deadline, pause_s = time.monotonic() + limit_s, 0.01
    while not (found := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {limit_s:g} s; the last answer was {found!r}"
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 0.2)  # who looks too often slows down what it waits for
    return found


def is_alive(process: psutil.Process | int) -> bool:
    """Not if it is gone, nor if it only waits for its parent to hear of that."""
    try:
        found = psutil.Process(process) if isinstance(process, int) else process
        return found.is_running() and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
