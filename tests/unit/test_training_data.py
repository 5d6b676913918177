"""Packing and order, on lists of integers."""

import random

from worker.training.data import IGNORED, Example, cut, learns, order_of_epoch, pack, plan_rows


def examples(lengths: list[int]) -> list[Example]:
    return [
        Example([index] * length, [IGNORED] + [index] * (length - 1), (length,)) for index, length in enumerate(lengths)
    ]


def packed_rows(rows: list[Example], row_length: int, seed: int) -> list[Example]:
    return pack(rows, plan_rows(rows, row_length, seed))


def some_lengths(count: int) -> list[int]:
    generator = random.Random(1)
    return [generator.randint(2, 300) for _ in range(count)]


def test_packing_loses_and_repeats_nothing() -> None:
    rows = examples(some_lengths(500))
    packed = packed_rows(rows, 512, seed=3)
    assert sorted(token for row in packed for token in row.ids) == sorted(token for row in rows for token in row.ids)
    assert all(sum(row.lengths) == len(row.ids) == len(row.labels) <= 512 for row in packed)
    assert sum(len(row.lengths) for row in packed) == 500


def test_packing_fills_rows() -> None:
    lengths = some_lengths(500)
    packed = packed_rows(examples(lengths), 512, seed=3)
    assert sum(lengths) / (512 * len(packed)) > 0.95


def test_a_conversation_longer_than_a_row_has_its_own() -> None:
    packed = packed_rows(examples([600, 100, 100]), 512, seed=0)
    assert sorted(row.lengths for row in packed) == [(100, 100), (600,)]


def test_packing_is_repeatable_and_follows_the_seed() -> None:
    rows = examples(some_lengths(50))
    assert packed_rows(rows, 512, seed=1) == packed_rows(rows, 512, seed=1)
    assert packed_rows(rows, 512, seed=1) != packed_rows(rows, 512, seed=2)


def test_order_changes_within_steps_only() -> None:
    lengths = some_lengths(20)
    shuffled = random.Random(2).sample(range(20), 20)
    order = list(order_of_epoch(lengths, shuffled, 8))
    for start in (0, 8, 16):
        step = order[start : start + 8]
        assert set(step) == set(shuffled[start : start + 8])
        assert [lengths[index] for index in step] == sorted(lengths[index] for index in step)


def test_the_first_token_teaches_nothing() -> None:
    assert not learns(Example([1, 2], [1, IGNORED], (2,)))
    assert learns(Example([1, 2], [IGNORED, 2], (2,)))


def test_cutting_keeps_the_beginning() -> None:
    assert cut(Example([1, 2, 3], [IGNORED, 2, 3], (3,)), 2) == Example([1, 2], [IGNORED, 2], (2,))
