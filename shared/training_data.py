"""Training files: one format a file, every row a conversation. Streamed, never held whole.

A file is JSONL or one JSON array. A row is one of

    {"messages": [{"role": "system|user|assistant", "content": "…"}, …]}       at least one assistant turn, the last
    {"prompt": "…", "completion": "…"}
    {"instruction": "…", "input": "…"?, "output": "…"}                         Alpaca

Used by the API (small uploads, before answering), by `worker batch` (large ones) and by the trainer (the same
rules, so that what was accepted is what is trained on). Knows no tokenizer.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shared.errors import BadRequest
from shared.text import is_storable

FORMATS = {
    "messages": frozenset({"messages"}),
    "prompt": frozenset({"prompt", "completion"}),
    "alpaca": frozenset({"instruction", "output"}),
}
ROLES = ("system", "user", "assistant")
MAX_LINE_BYTES = 16 * 2**20
MAX_ARRAY_BYTES = 64 * 2**20
"""A JSON array is parsed whole, so it is bounded; JSONL is not."""


class InvalidRow(BadRequest):
    """A file that can't be trained on. `line` counts from 1; for a JSON array it is the row's number."""

    code = "invalid_file_format"

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message if line is None else f"Line {line}: {message}", param="file")
        self.line = line


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row in normal form.

    `alpaca` keeps the three fields for the Alpaca text format; it is None for rows of another format.
    """

    messages: tuple[dict[str, str], ...]
    alpaca: tuple[str, str, str] | None = None


@dataclass(frozen=True, slots=True)
class FileSummary:
    """What validation learned: the format's name (`messages`, `prompt`, `alpaca`) and the number of rows."""

    format: str
    rows: int


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Yield every row of a training file in order.

    Raises:
        InvalidRow: at the first row that breaks the rules, or if there is none.
    """
    format_name: str | None = None
    count = 0
    with path.open("rb") as stream:
        for line, row in _rows(stream):
            found = _format_of(row, line)
            if format_name is None:
                format_name = found
            elif found != format_name:
                raise InvalidRow(
                    f"this row is in the {_named(found)} format, the rows before it in {_named(format_name)}; "
                    "a file holds one format",
                    line,
                )
            count += 1
            yield _conversation(row, found, line)
    if count == 0:
        raise InvalidRow("the file is empty; it needs at least one row")


def validate(path: Path) -> FileSummary:
    """Read the whole file and say what it is.

    Raises:
        InvalidRow: as `read_conversations`.
    """
    rows = 0
    format_name = ""
    for conversation in read_conversations(path):
        if rows == 0:
            format_name = "alpaca" if conversation.alpaca is not None else "messages"
        rows += 1
    if format_name == "messages":
        with path.open("rb") as stream:
            _, first = next(_rows(stream))
        format_name = _format_of(first, 1)
    return FileSummary(format=format_name, rows=rows)


def _rows(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(line number, parsed value) of JSONL or of a JSON array, told apart by the first character."""
    start = stream.peek(4096) if hasattr(stream, "peek") else b""
    if start.startswith(b"\xef\xbb\xbf"):
        stream.read(3)
        start = start[3:]
    if start.lstrip()[:1] == b"[":
        yield from _array(stream)
        return
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise InvalidRow(f"longer than {MAX_LINE_BYTES} bytes", number)
        if line.strip():
            yield number, _parse(line, number)


def _array(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    text = stream.read(MAX_ARRAY_BYTES + 1)
    if len(text) > MAX_ARRAY_BYTES:
        raise InvalidRow(f"a JSON array may have {MAX_ARRAY_BYTES} bytes at most; send JSONL, one object a line")
    try:
        rows = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRow(f"starts with '[' but is not a JSON array: {error}") from error
    yield from enumerate(rows, start=1)


def _parse(line: bytes, number: int) -> Any:
    try:
        return json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRow(f"not JSON ({error}); the file must be JSONL or a JSON array", number) from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _named(format_name: str) -> str:
    return {"messages": "`messages`", "prompt": "`prompt`/`completion`", "alpaca": "`instruction`/`output`"}[
        format_name
    ]


def _format_of(row: Any, line: int) -> str:
    if not isinstance(row, dict):
        raise InvalidRow(f"a row must be a JSON object, this one is {_kind(row)}", line)
    for name, required in FORMATS.items():
        if required <= row.keys():
            return name
    keys = ", ".join(sorted(map(repr, row))[:8]) or "none"
    raise InvalidRow(
        f"found the keys {keys}; a row needs `messages`, or `prompt` and `completion`, or `instruction` and `output`",
        line,
    )


def _kind(value: Any) -> str:
    return {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )


def _conversation(row: dict[str, Any], format_name: str, line: int) -> Conversation:
    if format_name == "messages":
        return Conversation(tuple(_messages(row["messages"], line)))
    if format_name == "prompt":
        prompt, completion = (_text(row, key, line) for key in ("prompt", "completion"))
        return Conversation(_single_turn(prompt, completion))
    instruction, output = (_text(row, key, line) for key in ("instruction", "output"))
    extra = "" if row.get("input") is None else _text(row, "input", line, empty=True)
    question = f"{instruction}\n\n{extra}" if extra else instruction
    return Conversation(_single_turn(question, output), (instruction, extra, output))


def _single_turn(user: str, assistant: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})


def _text(row: dict[str, Any], key: str, line: int, *, empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise InvalidRow(f"`{key}` must be a string, it is {_kind(value)}", line)
    if not value.strip() and not empty:
        raise InvalidRow(f"`{key}` is empty", line)
    _demand_text(value, f"`{key}`", line)
    return value


def _demand_text(value: str, where: str, line: int) -> None:
    if not is_storable(value):
        raise InvalidRow(f"{where} holds a NUL or a lone surrogate, which no tokenizer takes; remove it", line)


def _messages(value: Any, line: int) -> Iterator[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise InvalidRow("`messages` must be a non-empty array", line)
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise InvalidRow(f"{where} must be an object, it is {_kind(message)}", line)
        role = message.get("role")
        if role not in ROLES:
            raise InvalidRow(f"{where}.role is {role!r}; it must be one of {', '.join(ROLES)}", line)
        unknown = sorted(message.keys() - {"role", "content", "name"})
        if unknown:
            raise InvalidRow(f"{where} has the key {unknown[0]!r}, which can't be trained on; remove it", line)
        content = message.get("content")
        if not isinstance(content, str):
            raise InvalidRow(f"{where}.content must be a string, it is {_kind(content)}", line)
        _demand_text(content, f"{where}.content", line)
        if role == "assistant" and not content.strip():
            raise InvalidRow(f"{where}.content is empty: there is nothing to learn from it", line)
        if role == "system" and index > 0:
            raise InvalidRow(f"{where} is a system message; only the first message may be one", line)
        yield {"role": role, "content": content}
    if not any(m.get("role") == "assistant" for m in value):
        raise InvalidRow("no assistant message: there is nothing to learn from this row", line)
    if value[-1].get("role") != "assistant":
        raise InvalidRow(f"the last message must be the assistant's, it is the {value[-1].get('role')}'s", line)
