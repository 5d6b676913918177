"""The heap trimmer, on the heap of a fresh process: this one's has room from other tests."""

import subprocess
import sys

PROGRAM = """
from worker.training.heap import HeapTrimmer, resident_bytes

trimmer = HeapTrimmer(room_bytes=64 * 2**20)
print(trimmer.after_step())
kept = [bytearray(1000) for _ in range(120_000)]
print(trimmer.after_step(), trimmer.after_step())
grown = resident_bytes()
more = [bytearray(1000) for _ in range(120_000)]
pin = bytearray(1000)  # keeps the top of the heap from shrinking by itself
del more
print(trimmer.after_step(), resident_bytes() < grown + 32 * 2**20)
"""


def test_a_heap_that_has_grown_by_its_room_is_trimmed_and_only_then() -> None:
    environment = {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**32)}  # as a trainer's
    said = subprocess.check_output([sys.executable, "-c", PROGRAM], text=True, env=environment)
    assert said.split() == ["False", "True", "False", "True", "True"]
