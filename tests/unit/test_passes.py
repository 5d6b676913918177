"""How a step's conversations become passes: each is in one, nothing is padded, what all begin with is there once."""

import random

import pytest

from worker.training import passes
from worker.training.data import IGNORED, Example


def conversation(ids: list[int], prompt: int) -> Example:
    return Example(ids, [IGNORED] * prompt + ids[prompt:], (len(ids),))


def some(count: int, prefix: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    start = [rng.randrange(1000) for _ in range(prefix)]
    return [
        conversation(start + [1000 + n] + [rng.randrange(1000) for _ in range(rng.randrange(5, 40))], prefix + 2)
        for n in range(count)
    ]


def successors(one: passes.Pass) -> list[tuple[int, int, int]]:
    """(token, its position, what is to follow it) of every trained token, sorted."""
    return sorted(
        (int(one.ids[at]), int(one.positions[at]), int(target))
        for at, target in zip(one.learned, one.targets, strict=True)
    )


@pytest.mark.parametrize("prefix", [0, passes.SHORTEST_PREFIX - 1, passes.SHORTEST_PREFIX, 30])
def test_a_pass_trains_each_token_on_its_successor(prefix: int) -> None:
    rows = some(5, prefix)
    one = passes.join(rows)
    shared = prefix if prefix >= passes.SHORTEST_PREFIX else 0
    assert one.prefix == shared
    assert len(one.ids) == len(one.positions) == shared + sum(one.lengths)
    wanted = [
        (row.ids[at - 1], at - 1, row.labels[at])
        for row in rows
        for at in range(1, len(row.ids))
        if row.labels[at] != IGNORED
    ]
    assert successors(one) == sorted(wanted)


def test_tokens_of_a_shared_beginning_are_learned_for_each_conversation() -> None:
    rows = [Example(row.ids, list(row.ids), row.lengths) for row in some(3, 20)]
    one = passes.join(rows)
    assert one.prefix == 20
    assert len(one.learned) == sum(len(row.ids) - 1 for row in rows) == passes.count_learned(rows)
    assert [int(at) for at in one.learned].count(4) == 3


def test_what_is_shared_leaves_each_conversation_something_of_its_own() -> None:
    ids = list(range(40))
    rows = [conversation(ids, 5), conversation(ids[:30], 5), conversation(ids, 5)]
    assert passes.shared_prefix(rows) == 29
    assert passes.shared_prefix(rows[:1]) == 0
    assert passes.join(rows).lengths == [11, 1, 11]


def test_packed_rows_come_apart_again() -> None:
    rows = some(4, 0)
    row = Example(
        [token for one in rows for token in one.ids],
        [label for one in rows for label in one.labels],
        tuple(len(one.ids) for one in rows),
    )
    assert passes.conversations([row]) == rows
    assert passes.count_learned([row]) == passes.count_learned(rows)


@pytest.mark.parametrize(("most", "most_tokens"), [(3, None), (100, 90), (1, None), (100, 1)])
def test_every_row_is_in_one_pass_within_the_limits(most: int, most_tokens: int | None) -> None:
    rows = some(17, 0)
    chunks = list(passes.chunks(rows, most, most_tokens))
    assert sorted(row.ids for chunk in chunks for row in chunk) == sorted(row.ids for row in rows)
    for chunk in chunks:
        assert len(chunk) <= most
        assert most_tokens is None or len(chunk) == 1 or sum(len(row.ids) for row in chunk) <= most_tokens


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_shares_are_everybody_and_nearly_equal(world: int) -> None:
    rows = some(17, 0)
    shares = [passes.share(rows, rank, world) for rank in range(world)]
    assert sorted(row.ids for share in shares for row in share) == sorted(row.ids for row in rows)
    loads = [sum(len(row.ids) for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(len(row.ids) for row in rows)
