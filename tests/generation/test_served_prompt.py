"""The prompt the built-in engine decodes from is the one the trainer learnt to answer, token by token."""

import asyncio
from collections.abc import Iterator

import pytest

from shared.generation import GenerationRequest
from shared.settings import Settings
from tests.generation.parameter_table import answered
from tests.generation.trained_prompt import TURNS, trained_prompt
from worker.base_models import resolve
from worker.generation.transformers_engine import TransformersBackend, TransformersEngine
from worker.training import templates

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersEngine]:
    settings = Settings(data=tmp_path_factory.mktemp("data"), generation_dtype="float32")
    folder = resolve(NAME, settings).path
    backend = TransformersBackend(settings)
    engine = backend.load(folder, NAME, backend.plan(folder, NAME))
    yield engine
    engine.close()


@pytest.mark.parametrize("template", ["chatml", "alpaca"])
@pytest.mark.parametrize("messages", TURNS)
def test_the_served_prompt_is_the_one_that_was_trained(
    engine: TransformersEngine, messages: list[dict[str, str]], template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = trained_prompt(engine.tokenizer, messages, template)
    # As a tuned model's folder has it.
    monkeypatch.setattr(engine.tokenizer, "chat_template", templates.choose(template, engine.tokenizer).source)
    body = {"messages": messages, "temperature": 0.0, "top_p": 1.0, "n": 1}
    request = GenerationRequest(
        id="x", replies="x", model=NAME, location="base:x", endpoint="chat", body=body, deadline_s=9
    )
    assert engine.encode(request) == expected


def test_the_real_model_answers(engine: TransformersEngine) -> None:
    question = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 20}
    (choice,), usage = asyncio.run(answered(engine, question))
    assert "Paris" in choice.text
    assert choice.finish_reason == "stop"
    assert usage.completion_tokens < 20
