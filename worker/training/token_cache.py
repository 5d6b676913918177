"""Rows that were rendered and tokenised once, kept for the next run on the same file.

An entry is named by everything its rows follow from: the bytes of the file, the chat template, the tokenizer's files,
the limit of length, what is trained on, the code and the libraries that do it. So nothing ever has to be invalidated;
an entry that was damaged is no entry. Lists of integers, no torch.

    <64 hex digits>   magic, header length, header (JSON), numbers, SHA-256 of all that
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path

from shared import training_data
from shared.training_spec import TrainerSpec
from worker import tokenizers
from worker.training import data, model, templates
from worker.training.data import Example, Examples, TrainOn
from worker.training.templates import Template, Tokenizer

MAX_BYTES = 2 * 2**30
"""Of all entries together; past it those not used for longest go."""
MAX_ENTRY_BYTES = MAX_BYTES // 4
MAGIC = b"annealt1"
LENGTH_BYTES = 8
DIGEST_BYTES = 32
NOT_REPEATABLE = ("strftime_now", "now()")
"""What a template calls to write the date: the same rows differ tomorrow."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CODE = (data, templates, training_data, tokenizers, model)
"""Modules whose sources turn bytes into rows."""
LIBRARIES = ("jinja2", "tokenizers", "transformers")

Load = Callable[[Path, Template, Tokenizer, int, TrainOn], Examples]


def cached(spec: TrainerSpec, load: Load) -> Load:
    """`load`, one of those of `data`, asked only for what this host's cache has not got."""
    if spec.cache_dir is None:
        return load
    folder, base = Path(spec.cache_dir) / "tokens", Path(spec.base_model_dir)

    def load_cached(path: Path, template: Template, tokenizer: Tokenizer, longest: int, train_on: TrainOn) -> Examples:
        if any(name in template.source for name in NOT_REPEATABLE):
            return load(path, template, tokenizer, longest, train_on)
        entry = folder / _name(path, template, base, longest, train_on)
        examples = read(entry)
        if examples is None:
            examples = load(path, template, tokenizer, longest, train_on)
            with contextlib.suppress(OSError):  # a disk too full for a cache is no reason to end a run
                write(entry, examples)
        return examples

    return load_cached


def read(entry: Path) -> Examples | None:
    """What was written, or None: there is nothing, or not what was written."""
    try:
        content = entry.read_bytes()
        os.utime(entry)  # the oldest go first
    except OSError:
        return None
    body, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest or not body.startswith(MAGIC):
        return None
    start = len(MAGIC) + LENGTH_BYTES
    end = start + int.from_bytes(body[len(MAGIC) : start], "little")
    header = json.loads(body[start:end])
    numbers = array("i")
    numbers.frombytes(body[end:])
    if sys.byteorder != "little":
        numbers.byteswap()
    examples = Examples(cut=header["cut"], dropped=header["dropped"])
    at = 0
    for length in header["lengths"]:
        ids, labels = numbers[at : at + length].tolist(), numbers[at + length : at + 2 * length].tolist()
        examples.rows.append(Example(ids, labels, (length,)))
        at += 2 * length
    return examples


def write(entry: Path, examples: Examples) -> None:
    """Put the rows there, whole or not at all; older entries go if they become too many.

    Raises:
        OSError: the disk is full, or nothing may be written there.
    """
    header = json.dumps(
        {"cut": examples.cut, "dropped": examples.dropped, "lengths": [len(row.ids) for row in examples.rows]}
    ).encode()
    numbers = array("i")
    for row in examples.rows:
        numbers.extend(row.ids)
        numbers.extend(row.labels)
    if sys.byteorder != "little":
        numbers.byteswap()
    body = MAGIC + len(header).to_bytes(LENGTH_BYTES, "little") + header + numbers.tobytes()
    if len(body) > MAX_ENTRY_BYTES:
        return
    entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=entry.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(body + hashlib.sha256(body).digest())
        Path(temporary).replace(entry)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    prune(entry.parent, MAX_BYTES)


def prune(folder: Path, most_bytes: int) -> None:
    """Remove what was not used for longest until the rest is no more than `most_bytes`."""
    found = []
    for path in folder.iterdir():  # what a killed trainer left half written too
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size


def _name(path: Path, template: Template, base: Path, longest: int, train_on: TrainOn) -> str:
    tokenizer_files = [_digest(base / name) for name in TOKENIZER_FILES]
    parts = [_digest(path), template.name, template.source, template.end_of_turn, tokenizer_files, longest, train_on]
    return hashlib.sha256(json.dumps([*parts, _code()]).encode()).hexdigest()


@functools.cache
def _code() -> list[str | None]:
    """What turns bytes into rows: our sources, so that nobody has to remember a number, and the libraries'."""
    sources = [_digest(Path(str(module.__file__))) for module in CODE]
    return [*sources, *(importlib.metadata.version(name) for name in LIBRARIES)]


def _digest(path: Path) -> str | None:
    if not path.exists():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
