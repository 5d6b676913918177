"""How the conversations of one optimizer step become forward passes. Arrays of integers, no torch.

    a step's conversations ─ shortest first ─ cut into passes ─ each pass one flat run of tokens, without padding:

        [ tokens all its conversations begin with ] [ the rest of the 1st ] [ the rest of the 2nd ] …

Each conversation attends to the shared beginning and to itself. A beginning such as the template's system prompt is
computed once per pass; what it would have computed for each conversation is the same, and its gradient is the sum.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.training.data import IGNORED, Example

SHORTEST_PREFIX = 8
"""Tokens below which a shared beginning is not worth its bookkeeping."""


Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass over t tokens."""

    ids: Numbers
    """Token ids, t of them."""
    positions: Numbers
    """Of each token in its conversation."""
    prefix: int
    """How many of them, the first ones, begin every conversation of this pass."""
    lengths: list[int]
    """Of what follows the prefix in each conversation; prefix + sum(lengths) = t."""
    learned: Numbers
    """Indices of the tokens whose successor is trained on; one of the prefix may come up for each conversation."""
    targets: Numbers
    """Those successors."""


def conversations(rows: Sequence[Example]) -> list[Example]:
    """The rows' conversations, packed ones apart."""
    found = []
    for row in rows:
        start = 0
        for length in row.lengths:
            end = start + length
            found.append(Example(row.ids[start:end], row.labels[start:end], (length,)))
            start = end
    return found


def chunks(rows: Sequence[Example], most: int, most_tokens: int | None = None) -> Iterator[list[Example]]:
    """At most `most` rows and `most_tokens` tokens (or one row) at a time, shortest first."""
    waiting: list[Example] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: len(row.ids)):
        full = len(waiting) == most or (most_tokens is not None and tokens + len(row.ids) > most_tokens)
        if waiting and full:
            yield waiting
            waiting, tokens = [], 0
        waiting.append(row)
        tokens += len(row.ids)
    if waiting:
        yield waiting


def plan(rows: Sequence[Example], most: int, most_tokens: int | None = None) -> Iterator[Pass]:
    """The passes of these rows."""
    for chunk in chunks(rows, most, most_tokens):
        yield join(sorted(conversations(chunk), key=lambda example: len(example.ids)))


def share(rows: Sequence[Example], rank: int, world: int) -> list[Example]:
    """What one of `world` processes takes of a step: every conversation is somebody's, token counts are near equal."""
    loads = [0] * world
    mine = []
    for example in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        least = loads.index(min(loads))
        loads[least] += len(example.ids)
        if least == rank:
            mine.append(example)
    return mine


def join(members: Sequence[Example]) -> Pass:
    """The conversations as one pass."""
    prefix = shared_prefix(members)
    ids, positions = [_numbers(members[0].ids[:prefix])], [np.arange(prefix, dtype=np.int32)]
    learned, targets = [], []
    start = prefix
    for member in members:
        labels = _numbers(member.labels)
        at = np.flatnonzero(labels[1:] != IGNORED).astype(np.int32)  # of the predecessors, in the conversation
        targets.append(labels[1:][at])
        learned.append(np.where(at < prefix, at, at + (start - prefix)).astype(np.int32))
        ids.append(_numbers(member.ids[prefix:]))
        positions.append(np.arange(prefix, len(member.ids), dtype=np.int32))
        start += len(member.ids) - prefix
    return Pass(
        ids=np.concatenate(ids),
        positions=np.concatenate(positions),
        prefix=prefix,
        lengths=[len(member.ids) - prefix for member in members],
        learned=np.concatenate(learned),
        targets=np.concatenate(targets),
    )


def _numbers(values: Sequence[int]) -> Numbers:
    return np.array(values, dtype=np.int32)


def shared_prefix(members: Sequence[Example]) -> int:
    """Tokens with which all of them begin and after which each has at least one more; 0 if too few to matter."""
    if len(members) < 2:
        return 0
    # What the smallest and the largest list have in common, all lists between them have too.
    first, last = min(member.ids for member in members), max(member.ids for member in members)
    longest = min(len(member.ids) for member in members) - 1
    common = 0
    while common < longest and first[common] == last[common]:
        common += 1
    return common if common >= SHORTEST_PREFIX else 0


def count_learned(rows: Sequence[Example]) -> int:
    """Tokens the loss is taken over: a conversation's first has nothing before it."""
    count = 0
    for row in rows:
        learned = _numbers(row.labels) != IGNORED
        learned[np.cumsum((0, *row.lengths[:-1]))] = False
        count += int(np.count_nonzero(learned))
    return count
