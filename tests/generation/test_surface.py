"""What both endpoints offer beyond plain text, through the official SDK, on the built-in engine."""

import json
import math
from collections.abc import Callable
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.generation.conftest import CONTEXT, TEMPLATE, RunningGenerator, make_tiny_model, user
from worker.generation.token_scores import token_bytes

TINY = "acme/tiny"
SPECIALS = ("<pad>", "<s>")
"""Which a tiny model of random weights says, and no text shows."""


def ask(sdk: openai.OpenAI, text: str = "hi", **options: Any) -> Any:
    options = {"model": TINY, "max_tokens": 20, "temperature": 0, **options}
    return sdk.chat.completions.create(messages=user(text), **options)


def complete(sdk: openai.OpenAI, prompt: Any = "hello", **options: Any) -> Any:
    options = {"model": TINY, "max_tokens": 12, "temperature": 0, **options}
    return sdk.completions.create(prompt=prompt, **options)


@pytest.fixture(scope="module")
def reference(tiny_models: Any) -> Callable[[list[int]], torch.Tensor]:
    """Log-probabilities [tokens, vocabulary] that plain transformers gives for a text's ids."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models / "acme" / "tiny", dtype=torch.float32)

    def logprobs(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)

    return logprobs


@pytest.fixture(scope="module")
def tokenizer(tiny_models: Any) -> Any:
    return AutoTokenizer.from_pretrained(tiny_models / "acme" / "tiny")


def test_several_choices_are_several_draws(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    answer = ask(sdk, n=3, temperature=1, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert texts[0] == ask(sdk, temperature=1, seed=5).choices[0].message.content, "the first is what n=1 would be"
    assert answer.usage.completion_tokens == 60 or any(choice.finish_reason == "stop" for choice in answer.choices)
    streamed: dict[int, str] = {}
    for chunk in ask(sdk, n=3, temperature=1, seed=5, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[index] for index in range(3)] == texts


def test_logprobs_are_those_of_the_model(
    generator: RunningGenerator, sdk: openai.OpenAI, reference: Any, tokenizer: Any
) -> None:
    answer = ask(sdk, logprobs=True, top_logprobs=3, temperature=1, seed=2)
    entries = answer.choices[0].logprobs.content
    said = b"".join(bytes(entry.bytes) for entry in entries if entry.token not in SPECIALS)
    assert said.decode(errors="ignore") == answer.choices[0].message.content.replace("\ufffd", "")
    prompt = tokenizer.apply_chat_template(user("hi"), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for entry in entries:
        expected = reference(ids)[-1]
        token_id = next(
            number for number in range(len(tokenizer)) if token_bytes(tokenizer, number) == bytes(entry.bytes)
        )
        assert math.isclose(entry.logprob, float(expected[token_id]), abs_tol=1e-3)
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == pytest.approx(expected.topk(3).values.tolist(), abs=1e-3)
        ids.append(token_id)


def test_streamed_logprobs_are_the_whole_ones(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    whole = ask(sdk, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    chunks = ask(sdk, logprobs=True, top_logprobs=2, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    assert [entry for part in parts if part for entry in part.content] == whole


def test_tokens_of_a_stop_string_have_no_logprobs(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    text = ask(sdk).choices[0].message.content
    answer = ask(sdk, logprobs=True, stop=text[5:8]).choices[0]
    assert "".join(entry.token for entry in answer.logprobs.content) == answer.message.content == text[:5]


def test_a_completion_goes_on_from_text_or_from_its_tokens(
    generator: RunningGenerator, sdk: openai.OpenAI, tokenizer: Any
) -> None:
    answer = complete(sdk)
    assert answer.object == "text_completion"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == 5
    ids = tokenizer("hello")["input_ids"]
    assert complete(sdk, ids).choices[0].text == answer.choices[0].text
    streamed = complete(sdk, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(streamed)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert last.usage == answer.usage


def test_every_prompt_has_its_choices(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    answer = complete(sdk, ["one", "two"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1] == complete(sdk, "one").choices[0].text
    assert texts[2] == texts[3] == complete(sdk, "two").choices[0].text
    assert answer.usage.prompt_tokens == 6
    streamed: dict[int, str] = {}
    for chunk in complete(sdk, ["one", "two"], n=2, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[index] for index in range(4)] == texts


def test_logprobs_of_a_completion_have_its_shape(
    generator: RunningGenerator, sdk: openai.OpenAI, reference: Any, tokenizer: Any
) -> None:
    choice = complete(sdk, logprobs=2).choices[0]
    scores = choice.logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset) == 12
    assert scores.text_offset[:2] == [0, len(scores.tokens[0])]
    expected = reference(tokenizer("hello")["input_ids"])[-1]
    assert scores.token_logprobs[0] == pytest.approx(float(expected.max()), abs=1e-3)
    assert sorted(scores.top_logprobs[0].values()) == pytest.approx(sorted(expected.topk(2).values.tolist()), abs=1e-3)


def test_echo_repeats_the_prompt(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    plain = complete(sdk).choices[0].text
    assert complete(sdk, echo=True).choices[0].text == "hello" + plain
    answer = complete(sdk, echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == ("hello", 0)


def test_penalties_and_biases_change_what_is_chosen(
    generator: RunningGenerator, sdk: openai.OpenAI, tokenizer: Any
) -> None:
    (letter,) = tokenizer("q")["input_ids"]
    assert ask(sdk, logit_bias={str(letter): 100}, max_tokens=6).choices[0].message.content == "qqqqqq"
    text = ask(sdk, logit_bias={str(letter): 100}, frequency_penalty=2, max_tokens=100).choices[0].message.content
    assert 20 < text.count("q") < 100, "after so many losses of two, others are likelier"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
            "tools",
        ),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ],
)
def test_what_the_engine_or_the_model_cannot_do_is_refused(
    generator: RunningGenerator, sdk: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(sdk, **options)
    assert caught.value.param == param
    with pytest.raises(openai.BadRequestError):
        ask(sdk, stream=True, **options)


@pytest.mark.parametrize(
    ("prompt", "options", "param"),
    [
        ("hello", {"echo": True, "logprobs": 1}, "logprobs"),
        ("", {}, "prompt"),
        ([99999], {}, "prompt"),
        ("x" * 300, {}, "prompt"),
        ("x" * 250, {}, "max_tokens"),
    ],
)
def test_a_completion_that_cannot_be_is_refused(
    generator: RunningGenerator, sdk: openai.OpenAI, prompt: Any, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(sdk, prompt, **options)
    assert caught.value.param == param
    if param == "max_tokens":
        assert all(number in caught.value.message for number in (str(CONTEXT), "250", "12"))


WITH_TOOLS = (
    "{% if tools %}{{ '<s>tools:' }}{% for tool in tools %}{{ tool.function.name }}{% endfor %}{{ '</s>' }}{% endif %}"
)


@pytest.mark.parametrize("environment", [{}], indirect=True)
def test_tools_are_in_the_prompt_of_a_template_that_knows_them(
    settings: Any, start_generator: Any, sdk: openai.OpenAI, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model(settings.models_dir / "acme" / f"tools-{tmp_path.name}")
    (folder / "chat_template.jinja").write_text(WITH_TOOLS + TEMPLATE)
    start_generator()
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    model = f"acme/tools-{tmp_path.name}"
    without = ask(sdk, model=model).usage.prompt_tokens
    answer = ask(sdk, model=model, tools=[tool])
    assert answer.usage.prompt_tokens == without + len("tools:weather") + 2
    assert answer.choices[0].message.tool_calls is None
    history = [
        *user("how warm is it?"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": json.dumps({"celsius": 22})},
    ]
    again = sdk.chat.completions.create(model=model, messages=history, tools=[tool], max_tokens=3)  # type: ignore[list-item,arg-type]
    assert again.usage is not None
    assert again.usage.completion_tokens == 3
