"""From a training file to token ids with labels: render, cut, drop, pack, order. Lists of integers, no torch.

A label is the token itself where it is trained on and IGNORED elsewhere. Segments are tokenized apart, as they are
when the model is served, so that a prompt's tokens never merge with an answer's.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared.training_data import Conversation, InvalidRow, read_conversations
from worker.training.failures import BadTrainingFile, BadValidationFile
from worker.training.templates import Template, Tokenizer, segments

IGNORED = -100
"""The label cross-entropy leaves out."""

TrainOn = Literal["assistant", "all"]


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation, or several that share a row.

    `lengths` are the conversations' lengths in order; their sum is that of `ids` and `labels`.
    """

    ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...]


@dataclass(slots=True)
class Examples:
    """A file's rows, ready to train on, and what was lost on the way."""

    rows: list[Example] = field(default_factory=list)
    cut: int = 0
    """Rows longer than the limit, kept up to it."""
    dropped: int = 0
    """Rows with nothing left to learn once cut."""

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)


def load_training(path: Path, template: Template, tokenizer: Tokenizer, longest: int, train_on: TrainOn) -> Examples:
    """Every row of the training file.

    Raises:
        BadTrainingFile: a row breaks the rules of `shared.training_data`, or none is left.
    """
    try:
        examples = _load(path, template, tokenizer, longest, train_on)
    except InvalidRow as error:
        raise BadTrainingFile(error.message, "training_file") from error
    if not examples.rows:
        raise BadTrainingFile(
            f"none of the {examples.dropped} rows has anything to learn within {longest} tokens: the prompts alone "
            "are longer; raise training.max_seq_length or shorten the prompts",
            "training.max_seq_length",
        )
    return examples


def load_validation(path: Path, template: Template, tokenizer: Tokenizer, longest: int, train_on: TrainOn) -> Examples:
    """Every row of the validation file.

    Raises:
        BadValidationFile: as `load_training`.
    """
    try:
        return load_training(path, template, tokenizer, longest, train_on)
    except BadTrainingFile as error:
        param = "validation_file" if error.param == "training_file" else error.param
        raise BadValidationFile(error.message, param) from error


def render(conversation: Conversation, template: Template, tokenizer: Tokenizer, train_on: TrainOn) -> Example:
    """The whole conversation, uncut, up to the last token that is trained on.

    What follows that token (a newline in ChatML) can't change a gradient, so it isn't computed.
    """
    ids: list[int] = []
    labels: list[int] = []
    for segment in segments(conversation, template, tokenizer):
        tokens = tokenizer.encode(segment.text, add_special_tokens=False)
        ids += tokens
        labels += tokens if segment.answer or train_on == "all" else [IGNORED] * len(tokens)
    while labels and labels[-1] == IGNORED:
        labels.pop()
        ids.pop()
    return Example(ids, labels, (len(ids),))


def learns(example: Example) -> bool:
    """Whether any token is trained on. The first can't be: nothing comes before it."""
    return any(label != IGNORED for label in example.labels[1:])


def cut(example: Example, longest: int) -> Example:
    """The first `longest` tokens of one conversation."""
    ids, labels = example.ids[:longest], example.labels[:longest]
    return Example(ids, labels, (len(ids),))


def plan_rows(rows: Sequence[Example], row_length: int, seed: int) -> list[list[int]]:
    """Which conversations share a row of at most `row_length` tokens: first fit, in an order drawn from `seed`.

    A conversation longer than that has a row of its own.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)  # noqa: S311 - repeatable, not secret
    open_rows: list[tuple[int, list[int]]] = []
    packed: list[list[int]] = []
    for index in order:
        length = len(rows[index].ids)
        place = next((p for p, (used, _) in enumerate(open_rows) if used + length <= row_length), None)
        if place is None:
            if len(open_rows) == OPEN_ROWS:
                packed.append(open_rows.pop(0)[1])
            open_rows.append((length, [index]))
        else:
            used, members = open_rows[place]
            open_rows[place] = (used + length, [*members, index])
    packed += [members for _, members in open_rows]
    return packed


def pack(rows: Sequence[Example], plan: Sequence[Sequence[int]]) -> list[Example]:
    """The rows of a plan. Each conversation in them attends to itself only (proved by a test)."""
    return [_join([rows[index] for index in members]) for members in plan]


OPEN_ROWS = 64
"""Rows that still take conversations while packing; bounds the work per conversation."""


def order_of_epoch(lengths: Sequence[int], shuffled: Sequence[int], batch_size: int) -> Iterator[int]:
    """The epoch's shuffled order, sorted by length within each optimizer step.

    Micro-batches of like lengths waste less attention; the step's conversations, and so its gradient, stay the same.
    """
    for start in range(0, len(shuffled), batch_size):
        yield from sorted(shuffled[start : start + batch_size], key=lambda index: lengths[index])


def _load(path: Path, template: Template, tokenizer: Tokenizer, longest: int, train_on: TrainOn) -> Examples:
    examples = Examples()
    for conversation in read_conversations(path):
        example = render(conversation, template, tokenizer, train_on)
        if len(example.ids) > longest:
            example = cut(example, longest)
            examples.cut += 1
        if learns(example):
            examples.rows.append(example)
        else:
            examples.dropped += 1
    return examples


def _join(members: list[Example]) -> Example:
    return Example(
        [token for member in members for token in member.ids],
        [label for member in members for label in member.labels],
        tuple(length for member in members for length in member.lengths),
    )
