"""Writes train.jsonl, validation.jsonl and test.jsonl from `patterns`: the same bytes on every run and machine.

    python -m examples.tickets.generate [FOLDER]

A ticket is drawn label first: category, priority, needs_reply and product, then a sentence for each from the split's
own patterns, in any order, with small talk, greetings, typos and sloppy case around them. Nothing is written to the
text that would give a label away by its place, and no two tickets of the three files are the same.
"""

import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from examples.tickets.patterns import CATEGORIES, MONTHS, PRIORITIES, PRODUCTS, TEST, TRAIN, VALIDATION, Patterns

SEED = 20260
ROWS = {"train": 528, "validation": 40, "test": 120}
PATTERNS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
SYSTEM = "Triage the ticket as JSON: category, priority, product, needs_reply."

UNNAMED_SHARE = 0.12
"""Tickets that name no product; their `product` is null."""
UNNAMED = {
    "train": (
        *("the device", "my device", "your product", "the thing I bought", "the gadget", "this article", "the unit"),
        *("my purchase", "the machine", "one of your products", "what I bought from you", "my order", "the appliance"),
    ),
    "validation": ("the item", "my new device", "your gadget"),
    "test": ("my gadget", "the item", "your device"),
}
UNNAMED_BARE = ("device", "gadget", "product", "unit", "machine")
ANSWERS: tuple[bool | None, ...] = (False, False, False, True, None)
"""What a ticket says about an answer, in equal parts; None says nothing and wants one, as people do."""
ANSWERS_TO_QUESTIONS: tuple[bool | None, ...] = (True, None)
"""The same for a ticket that asks something: nobody asks and then wants no answer."""

T = TypeVar("T")


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
    answers = {wanted: Deck(sentences, rng) for wanted, sentences in patterns.answer.items()}
    fillers, openings, closings = (Deck(d, rng) for d in (patterns.filler, patterns.opening, patterns.closing))
    categories, priorities, products = (Deck(d, rng) for d in (CATEGORIES, PRIORITIES, PRODUCTS))
    said_with = {False: Deck(ANSWERS, rng), True: Deck(ANSWERS_TO_QUESTIONS, rng)}
    while True:
        category, priority = categories.draw(), priorities.draw()
        product = None if rng.random() < UNNAMED_SHARE else products.draw()
        issue = issues[category].draw()
        said = said_with[category == "usage" or issue.endswith("?")].draw()
        sentences = [_name_product(issue, product, split, rng)]
        if priority in urgencies:
            sentences.append(urgencies[priority].draw())
        if said is not None:
            sentences.append(answers[said].draw())
        sentences += [fillers.draw() for _ in range(rng.choice((0, 0, 1, 1, 2)))]
        rng.shuffle(sentences)
        opening = openings.draw() if rng.random() < 0.4 else ""
        closing = closings.draw() if rng.random() < 0.3 else ""
        text = _fill(" ".join(filter(None, (opening, *sentences, closing))), rng)
        labels = {"category": category, "priority": priority, "product": product, "needs_reply": said is not False}
        yield _roughen(text, product, rng), labels


def _name_product(sentence: str, product: str | None, split: str, rng: random.Random) -> str:
    """Put the product, or a word for it, where the pattern has {p}."""
    determined = re.search(r"\b(the|my|our|your) \{p\}|\{p\} app", sentence) is not None
    if product is None:
        named = rng.choice(UNNAMED[split])
        if determined:
            named = rng.choice(UNNAMED_BARE)
    else:
        bare = rng.choices((product, product.lower(), product.split()[0]), (6, 2, 2))[0]
        named = bare if determined else rng.choice(("the ", "my ", "our ", "")) + bare
    sentence = sentence.replace("{p}", named)
    return sentence[0].upper() + sentence[1:] if sentence[0] == named[0] else sentence


def _fill(text: str, rng: random.Random) -> str:
    values = {
        "{m}": lambda: rng.choice(MONTHS),
        "{n}": lambda: str(rng.randint(2, 9)),
        "{a}": lambda: f"{rng.choice('€$')}{rng.randint(10, 240)}{rng.choice(('', '.50', '.99'))}",
        "{o}": lambda: f"{rng.choice('ABKR')}-{rng.randint(1000, 9999)}",
    }
    return re.sub(r"\{[mnao]\}", lambda match: values[match.group()](), text)


def _roughen(text: str, product: str | None, rng: random.Random) -> str:
    """Make one ticket in three look typed in haste. The product's name stays whole; a human must be able to tell."""
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.08:
        text = re.sub(r"[.,](?= |$)", "", text)
    if rng.random() < 0.2:
        kept = {word.lower() for word in (product or "").split()}
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
