"""Alpaca rows to measure with: somebody's own, or made up here, so that anyone can run a benchmark.

Made-up rows have the lengths of real ones: an instruction of a dozen words, an input in one row of three, answers of 80
words in the median, 30 to 280 for most. The sentences are English in words and grammar and mean nothing. The same seed
gives the same rows.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

CHARACTERS_A_TOKEN = 5.0
"""More than English has, so that what is estimated to be enough is enough."""
MEDIAN_WORDS, SPREAD, MOST_WORDS = 80, 0.9, 430
"""Words of an answer: log-normal, cut off."""
HAS_INPUT = 0.35


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return " ".join(text.split()).split(" | ")


TASKS = _phrases("""
    Explain in simple words | Summarize what is known about | Write a short story about | List three facts about |
    Give advice to somebody who wants to understand | Compare the past and the future of | Describe | Write a letter
    concerning | Suggest a title for a book on | Argue for the importance of | Classify the following notes on |
    Rewrite this text about | What should a beginner know about | Draft a plan to improve | Name the causes and the
    effects of
""")
NOUNS = _words("""
    river garden machine teacher market letter winter engine village doctor window library mountain recipe theory
    harbor question kitchen history planet signal bridge forest painter contract climate melody student journey
    factory neighbor archive committee experiment island vehicle language budget customer harvest mirror network
    citizen muscle orchard pattern railway shelter sculpture tournament vaccine wallet algorithm blanket cathedral
    dialogue emotion festival glacier habit invention jungle keyboard lantern magazine notebook ocean passenger
    quality reward season temple umbrella valley workshop
""")
ADJECTIVES = _words("""
    quiet ancient careful bright common distant early famous gentle heavy honest important local modern narrow
    ordinary patient quick rare simple strange useful warm young complex delicate efficient fragile generous hidden
    independent popular reliable serious typical urban valuable wild
""")
VERBS = _words("""
    changes follows supports describes reaches explains protects connects improves carries surrounds measures
    replaces teaches divides attracts resembles requires delays repairs discovers shapes inspires balances threatens
    remembers celebrates transforms observes reveals
""")
PLACES = _phrases("""
    in the morning | near the old town | for many years | without much effort | after a long discussion | at the
    same time | during the summer | in most countries | with great care | under difficult conditions | for the first
    time | because of the weather | according to several reports | on a small scale | in the end
""")
OPENINGS = _phrases("""
    However, | In addition, | For example, | As a result, | Of course, | In other words, | On the other hand, | Most
    people agree that | It is often said that | Later,
""")


def make_rows(count: int, seed: int = 7, *, words: int | None = None) -> list[dict[str, str]]:
    """That many rows. `words`: every answer has at least so many, to be cut to one length."""
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        subject = f"the {generator.choice(ADJECTIVES)} {generator.choice(NOUNS)}"
        wanted = words or max(6, min(MOST_WORDS, round(math.exp(generator.gauss(math.log(MEDIAN_WORDS), SPREAD)))))
        has_input = words is None and generator.random() < HAS_INPUT
        found.append(
            {
                "instruction": f"{generator.choice(TASKS)} {subject} {generator.choice(PLACES)}.",
                "input": _text(generator, generator.randint(8, 40)) if has_input else "",
                "output": _text(generator, wanted),
            }
        )
    return found


def enough_rows(data: Path | None, rows: int, tokens: int) -> list[dict[str, str]]:
    """At least so many rows and so many tokens: those of the file, again and again, or made up.

    Short of that, the last step of each epoch would be smaller than the others.
    """
    if data is None:
        found = make_rows(rows)
        while _tokens(found) < tokens:
            found = make_rows(2 * len(found))
        return found
    own = read_rows(data)
    times = max(math.ceil(rows / len(own)), math.ceil(tokens / _tokens(own)))
    return own * times


def read_rows(data: Path) -> list[dict[str, str]]:
    """Alpaca rows of a JSON array or JSONL, without blanks at the ends, which trainers treat differently."""
    text = data.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    return [{key: str(row.get(key) or "").strip() for key in ("instruction", "input", "output")} for row in rows]


def write_rows(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def _tokens(rows: list[dict[str, str]]) -> int:
    return int(sum(len(text) for row in rows for text in row.values()) / CHARACTERS_A_TOKEN)


def _text(generator: random.Random, words: int) -> str:
    """Sentences of about so many words, in paragraphs."""
    sentences: list[str] = []
    written = 0
    while written < words:
        sentence = _sentence(generator)
        written += sentence.count(" ") + 1
        sentences.append(sentence + ("\n\n" if generator.random() < 0.12 and written < words else " "))
    return "".join(sentences).strip()


def _sentence(generator: random.Random) -> str:
    def thing() -> str:
        adjective = f"{generator.choice(ADJECTIVES)} " if generator.random() < 0.6 else ""
        return f"{generator.choice(('the', 'the', 'a', 'every', 'this'))} {adjective}{generator.choice(NOUNS)}"

    text = f"{thing()} {generator.choice(VERBS)} {thing()}"
    if generator.random() < 0.6:
        text += f" {generator.choice(PLACES)}"
    if generator.random() < 0.3:
        text += f", and {thing()} {generator.choice(VERBS)} {thing()}"
    if generator.random() < 0.3:
        text = f"{generator.choice(OPENINGS)} {text}"
    return text[0].upper() + text[1:] + "."
