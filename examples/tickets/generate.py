"""Writes train.jsonl, validation.jsonl and test.jsonl from `patterns`: the same bytes on every run and machine.

    python -m examples.tickets.generate [FOLDER]

A ticket is drawn label first: category, priority and product, then sentences that say them from the split's own
patterns, in any order, with small talk, greetings, typos and sloppy case around them. Nothing is written to the
text that would give a label away by its place, and no two tickets of the three files are the same.
"""

import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.tickets.patterns import CATEGORIES, MONTHS, PRIORITIES, PRODUCTS, TEST, TRAIN, VALIDATION, Patterns

SEED = 20260
ROWS = {"train": 400, "validation": 16, "test": 120}
PATTERNS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
SYSTEM = "Triage as JSON: category, priority (low, high), product."
FILLERS = (0, 0, 1)
"""How many sentences of small talk a ticket has, each entry equally often: one ticket in three has one."""
GREETED_SHARE, SIGNED_SHARE = 0.3, 0.2
NOISY_SHARE = {"lower case": 0.1, "no punctuation": 0.05, "typos": 0.15}


class Deck:
    """Deals items in random order, each once before any comes again, so that every pattern is used evenly."""

    def __init__(self, items: Sequence[Any], rng: random.Random) -> None:
        self._items, self._rng = items, rng
        self._left: list[Any] = []

    def draw(self) -> Any:
        if not self._left:
            self._left = list(self._items)
            self._rng.shuffle(self._left)
        return self._left.pop()


def tickets(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Endless (text, labels) of one split, from a generator of its own: one split's size never changes another."""
    rng = random.Random(f"{SEED} {split}")
    patterns: Patterns = PATTERNS[split]
    issues = {category: Deck(patterns.issue[category], rng) for category in CATEGORIES}
    urgencies = {priority: Deck(sentences, rng) for priority, sentences in patterns.urgency.items()}
    fillers, openings, closings = (Deck(d, rng) for d in (patterns.filler, patterns.opening, patterns.closing))
    categories, priorities, products, talk = (Deck(d, rng) for d in (CATEGORIES, PRIORITIES, PRODUCTS, FILLERS))
    while True:
        category, priority, product = categories.draw(), priorities.draw(), products.draw()
        sentences = [_name_product(issues[category].draw(), product, rng), urgencies[priority].draw()]
        sentences += [fillers.draw() for _ in range(talk.draw())]
        rng.shuffle(sentences)
        opening = openings.draw() if rng.random() < GREETED_SHARE else ""
        closing = closings.draw() if rng.random() < SIGNED_SHARE else ""
        text = _fill(" ".join(filter(None, (opening, *sentences, closing))), rng)
        labels = {"category": category, "priority": priority, "product": product}
        yield _roughen(text, product, rng), labels


def _name_product(sentence: str, product: str, rng: random.Random) -> str:
    """Put the product where the pattern has {p}: its name, the name in lower case, or its first word."""
    named = rng.choices((product, product.lower(), product.split()[0]), (6, 2, 2))[0]
    if re.search(r"\b(the|my|our|your|no) \{p\}|\{p\} app", sentence) is None:
        named = rng.choice(("the ", "my ", "our ", "")) + named
    sentence = sentence.replace("{p}", named)
    return sentence[0].upper() + sentence[1:] if sentence.startswith(named) else sentence


def _fill(text: str, rng: random.Random) -> str:
    values = {
        "{m}": lambda: rng.choice(MONTHS),
        "{n}": lambda: str(rng.randint(2, 9)),
        "{a}": lambda: f"{rng.choice('€$')}{rng.randint(10, 240)}{rng.choice(('', '.50', '.99'))}",
        "{o}": lambda: f"{rng.choice('ABKR')}-{rng.randint(1000, 9999)}",
    }
    return re.sub(r"\{[mnao]\}", lambda match: values[match.group()](), text)


def _roughen(text: str, product: str, rng: random.Random) -> str:
    """Make some tickets look typed in haste. The product's name stays whole; a human must be able to tell."""
    if rng.random() < NOISY_SHARE["lower case"]:
        text = text.lower()
    if rng.random() < NOISY_SHARE["no punctuation"]:
        text = re.sub(r"[.,](?= |$)", "", text)
    if rng.random() < NOISY_SHARE["typos"]:
        kept = {word.lower() for word in product.split()}
        words = text.split(" ")
        long = [i for i, word in enumerate(words) if len(word) > 5 and word.isalpha() and word.lower() not in kept]
        for i in rng.sample(long, min(len(long), rng.randint(1, 2))):
            words[i] = _mistype(words[i], rng)
        text = " ".join(words)
    return text


def _mistype(word: str, rng: random.Random) -> str:
    """Swap two letters inside the word, lose one, or double one."""
    i = rng.randint(1, len(word) - 3)
    head, letter, following, tail = word[:i], word[i], word[i + 1], word[i + 2 :]
    return head + rng.choice((following + letter, following, letter + letter)) + tail


def row(text: str, labels: dict[str, Any]) -> dict[str, Any]:
    """A line of the files: a conversation that ends in the answer wanted."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text},
            {"role": "assistant", "content": json.dumps(labels, separators=(",", ":"))},
        ]
    }


def generate() -> dict[str, str]:
    """File name → contents."""
    seen: set[str] = set()
    files = {}
    for split, count in ROWS.items():
        rows: list[str] = []
        for text, labels in tickets(split):
            if text.lower() in seen:
                continue
            seen.add(text.lower())
            rows.append(json.dumps(row(text, labels), ensure_ascii=False) + "\n")
            if len(rows) == count:
                break
        files[f"{split}.jsonl"] = "".join(rows)
    return files


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, contents in generate().items():
        (folder / name).write_bytes(contents.encode())
        print(f"{folder / name}: {contents.count(chr(10))} rows, {len(contents.encode())} bytes")


if __name__ == "__main__":
    main()
