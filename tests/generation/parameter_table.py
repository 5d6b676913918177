"""Which engine honours which parameter: rows that the tests of each engine try, and the table in docs/serving.md.

python -m tests.generation.parameter_table      writes the table
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.generation import Choice, GenerationRequest, joined
from worker.generation.engine import Engine, Usage

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
BEGIN, END = "<!-- engines: begin -->\n", "<!-- engines: end -->\n"
ENGINES = ("transformers", "vllm")
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}},
    "required": ["yes"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Row:
    """One line of the table: what a client sends, and who honours it. Refused by all others, with its name."""

    shown: str
    body: dict[str, Any]
    engines: tuple[str, ...] = ENGINES
    param: str = field(default="")
    """Of the refusal."""


_TEXT: dict[str, Any] = {"prompt": "The capital of France is"}
ROWS = (
    Row("`max_tokens`, `max_completion_tokens`", {"max_tokens": 3}),
    Row("`temperature`, `top_p`; 0 takes the likeliest token", {"temperature": 0.7, "top_p": 0.9}),
    Row("`n`", {"n": 2}),
    Row("`stop`, up to 4 strings, across tokens", {"stop": ["Q", "Zz"]}),
    Row("`seed`", {"seed": 7, "temperature": 1.0}),
    Row("`logprobs`, `top_logprobs`", {"logprobs": True, "top_logprobs": 3}),
    Row("`frequency_penalty`, `presence_penalty`", {"frequency_penalty": 0.5, "presence_penalty": 0.5}),
    Row("`logit_bias`", {"logit_bias": {"198": -100.0}}),
    Row("`response_format` json_object", {"response_format": {"type": "json_object"}}, ("vllm",), "response_format"),
    Row(
        "`response_format` json_schema",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        ("vllm",),
        "response_format",
    ),
    Row("completions: `prompt` as text", _TEXT),
    Row("completions: `prompt` as token ids", {"prompt": [66, 67, 68]}),
    Row("completions: `logprobs`", {**_TEXT, "logprobs": 2}),
    Row("completions: `echo`", {**_TEXT, "echo": True}),
    Row("completions: `echo` with `logprobs` (scoring)", {**_TEXT, "echo": True, "logprobs": 1}, ("vllm",), "logprobs"),
)
UNTRIED = (
    ("`stream`, `stream_options`", "yes", "yes"),
    ("several prompts in one request", "yes", "yes"),
    ("`tools` with `tool_choice` auto or none, where the checkpoint's chat template knows tools", "yes", "yes"),
    ("`tool_choice` required or a named function", "no", "yes"),
)
"""Lines whose tests are elsewhere: of the API, and of templates with tools."""


async def answered(engine: Engine, body: dict[str, Any]) -> tuple[list[Choice], Usage]:
    """One request, put to an engine itself."""
    body = {"max_tokens": 8, "temperature": 0.0, "top_p": 1.0, "n": 1, **body}
    endpoint: Any = "completion" if "prompt" in body else "chat"
    if endpoint == "chat":
        body.setdefault("messages", [{"role": "user", "content": "hi"}])
    pieces: list[Choice] = []
    request = GenerationRequest(
        id="gen-1", replies="x", model="a model", location="base:x", endpoint=endpoint, body=body, deadline_s=100
    )
    usage = await engine.answer(request, 1, pieces.extend)
    return sorted(joined(pieces), key=lambda choice: choice.index), usage


def table() -> str:
    """Markdown."""
    lines = ["| parameter | " + " | ".join(f"`{name}`" for name in ENGINES) + " |", "| --- | --- | --- |"]
    for row in ROWS:
        marks = ("yes" if name in row.engines else "no" for name in ENGINES)
        lines.append(f"| {row.shown} | " + " | ".join(marks) + " |")
    lines += [f"| {' | '.join(line)} |" for line in UNTRIED]
    return "\n".join(lines) + "\n"


def documented() -> str:
    """The table as it stands in the documentation."""
    return DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    DOCS.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
