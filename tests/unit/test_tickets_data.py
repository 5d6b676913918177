"""The bundled tickets: reproducible, honest about what training has seen, and readable by the service."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import examples.tickets
from cli.demo.work import TRAINING
from examples.tickets.generate import PATTERNS, ROWS, generate
from examples.tickets.patterns import CATEGORIES, PRIORITIES, PRODUCTS, TRAIN
from shared import training_data

FOLDER = Path(examples.tickets.__file__).parent
HELD_OUT = ("validation", "test")
LONGEST_SHARED_RUN = 5
"""Words in a row that a held-out sentence may share with one from training: "to get back to me" is just English."""


def tickets(split: str) -> list[tuple[str, dict[str, Any]]]:
    rows = [json.loads(line)["messages"] for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]
    return [(row[1]["content"], json.loads(row[2]["content"])) for row in rows]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+|\{[a-z]\}", text.lower())


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


def test_the_files_are_what_the_script_makes_byte_for_byte():
    made = generate()
    assert sorted(made) == sorted(path.name for path in FOLDER.glob("*.jsonl"))
    for name, contents in made.items():
        assert (FOLDER / name).read_bytes() == contents.encode(), (
            f"{name} is stale: python -m examples.tickets.generate"
        )


@pytest.mark.parametrize("split", ROWS)
def test_the_service_reads_every_row(split: str):
    summary = training_data.validate(FOLDER / f"{split}.jsonl")
    assert (summary.format, summary.rows) == ("messages", ROWS[split])


def test_there_is_enough_to_train_on_and_to_judge_by_and_the_files_stay_small():
    assert ROWS["train"] == TRAINING["max_steps"] * TRAINING["batch_size"]  # the demo sees every row once
    assert ROWS["test"] >= 100
    assert sum(path.stat().st_size for path in FOLDER.glob("*.jsonl")) < 600_000


@pytest.mark.parametrize("split", HELD_OUT)
def test_no_held_out_sentence_pattern_is_in_training(split: str):
    trained = {" ".join(words(sentence)) for sentence in TRAIN.sentences()}
    assert not trained & {" ".join(words(sentence)) for sentence in PATTERNS[split].sentences()}
    runs_trained = {run for sentence in TRAIN.sentences() for run in runs(sentence, LONGEST_SHARED_RUN + 1)}
    shared = {s for s in PATTERNS[split].sentences() if runs(s, LONGEST_SHARED_RUN + 1) & runs_trained}
    assert not shared


@pytest.mark.parametrize("split", HELD_OUT)
def test_no_held_out_sentence_is_in_the_text_of_a_training_ticket(split: str):
    texts = [" ".join(words(text)) for text, _ in tickets("train")]
    for sentence in PATTERNS[split].sentences():
        fixed = max(re.split(r"\{[a-z]\}", sentence.lower()), key=len)  # the longest part that is no slot
        assert len(words(fixed)) >= 2, sentence
        if len(words(fixed)) >= 4:
            assert not any(" ".join(words(fixed)) in text for text in texts), sentence


def test_validation_and_test_share_no_sentence_either():
    assert not set(PATTERNS["validation"].sentences()) & set(PATTERNS["test"].sentences())


def test_no_ticket_is_in_two_files_or_twice_in_one():
    texts = [text.lower() for split in ROWS for text, _ in tickets(split)]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("split", ROWS)
def test_no_ticket_says_its_own_label(split: str):
    for text, labels in tickets(split):
        assert not re.search(rf"\b{labels['category']}", text.lower()), text
        assert not re.search(rf"\b{labels['priority']}\b", text.lower()), text


@pytest.mark.parametrize("split", ROWS)
def test_the_product_is_in_the_text_exactly_when_the_label_names_one(split: str):
    for text, labels in tickets(split):
        named = [product for product in PRODUCTS if re.search(rf"\b{product.split()[0].lower()}\b", text.lower())]
        assert named == ([] if labels["product"] is None else [labels["product"]]), text


@pytest.mark.parametrize("split", ROWS)
def test_labels_are_balanced_so_that_guessing_the_commonest_fails(split: str):
    found = tickets(split)
    for key, values in (("category", CATEGORIES), ("priority", PRIORITIES)):
        counts = Counter(labels[key] for _, labels in found)
        assert set(counts) == set(values)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert all(list(labels) == ["category", "priority", "product"] for _, labels in found)


def test_the_sentence_with_the_cue_comes_at_any_place():
    """A model that learnt "the first sentence is the issue" would be caught."""
    places = Counter()
    for text, labels in tickets("train"):
        if labels["product"] is not None:
            at = text.lower().index(labels["product"].split()[0].lower()) / len(text)
            places[int(at * 4)] += 1
    assert min(places.values()) > 0.1 * sum(places.values())
