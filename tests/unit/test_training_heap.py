"""The heap trimmer, on this process's own heap."""

from worker.training.heap import HeapTrimmer, resident_bytes


def test_a_heap_that_has_grown_by_its_room_is_trimmed_and_only_then() -> None:
    trimmer = HeapTrimmer(room_bytes=64 * 2**20)
    assert not trimmer.after_step()
    kept = [bytearray(1000) for _ in range(120_000)]
    assert trimmer.after_step()
    assert not trimmer.after_step(), "what is in use stays, and is the new measure"
    grown = resident_bytes()
    more = [bytearray(1000) for _ in range(120_000)]
    pin = bytearray(1000)  # keeps the top of the heap from shrinking by itself
    del more
    assert trimmer.after_step()
    assert resident_bytes() < grown + 32 * 2**20
    assert kept and pin
