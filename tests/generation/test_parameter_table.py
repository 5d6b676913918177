"""The table of engines and parameters in docs/serving.md: each of its lines is tried on the built-in engine here, and
on vLLM in test_vllm."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import BadRequest
from shared.settings import Settings
from tests.generation import parameter_table
from tests.generation.parameter_table import ROWS, Row, answered
from worker.generation.transformers_engine import NAME, SUPPORTED, TransformersBackend, TransformersEngine


@pytest.fixture(scope="module")
def engine(tiny_models: Path) -> Iterator[TransformersEngine]:
    backend = TransformersBackend(Settings(generation_dtype="float32"))
    folder = tiny_models / "acme" / "tiny"
    engine = backend.load(folder, "acme/tiny", backend.plan(folder, "acme/tiny"))
    yield engine
    engine.close()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.shown)
def test_the_built_in_engine_does_what_the_table_says(engine: TransformersEngine, row: Row) -> None:
    if NAME not in row.engines:
        with pytest.raises(BadRequest) as caught:
            asyncio.run(answered(engine, row.body))
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", row.param)
        assert "another engine" in caught.value.message
        return
    choices, usage = asyncio.run(answered(engine, row.body))
    assert len(choices) == row.body.get("n", 1)
    assert all(choice.finish_reason for choice in choices)
    assert usage.completion_tokens > 0
    assert all((choice.logprobs is not None) == ("logprobs" in row.body) for choice in choices)


def test_every_parameter_that_is_supported_is_in_the_table() -> None:
    tried = {key for row in ROWS for key in row.body}
    elsewhere = {"messages", "tools", "tool_choice", "parallel_tool_calls"}
    assert tried | elsewhere >= SUPPORTED


def test_the_documentation_has_the_table() -> None:
    assert parameter_table.documented() == parameter_table.table(), "run python -m tests.generation.parameter_table"
