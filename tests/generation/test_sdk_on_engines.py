"""The official SDK against the whole service, with SmolLM2 on each engine and a template that knows tools.

vLLM's half needs `make setup-vllm`.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import redis

from shared.generation import PREFIX
from shared.settings import Settings, get_settings
from tests.generation.conftest import RunningGenerator, user
from worker.base_models import resolve

PYTHON = Path(os.environ.get("ANNEAL_VLLM_PYTHON") or Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL = "acme/tooled"
TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\\nYou may call these tools: ' + (tools | tojson) +
'\\nCall one as <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\\n' }}{% endif -%}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' +
({'name': call.function.name, 'arguments': call.function.arguments} | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
VLLM = pytest.param(
    "vllm", marks=pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no {PYTHON}; `make setup-vllm` builds it")
)

pytestmark = [pytest.mark.smollm2, pytest.mark.timeout(600)]


@pytest.fixture(params=["transformers", VLLM])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def environment(engine: str) -> dict[str, str]:
    waits = {"ANNEAL_GENERATION_LOAD_WAIT_S": "400"}
    return {"ANNEAL_ENGINE": engine, "ANNEAL_VLLM_PYTHON": str(PYTHON), **waits}


@pytest.fixture
def settings(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """With a SmolLM2 that knows tools among the operator's models."""
    folder = tmp_path / "models" / MODEL
    shutil.copytree(resolve(SMOLLM2, settings).path, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setenv("ANNEAL_MODELS_DIR", str(tmp_path / "models"))
    get_settings.cache_clear()
    return get_settings()


@pytest.fixture
def client(
    start_generator: Callable[..., RunningGenerator], sdk: openai.OpenAI, broker: redis.Redis
) -> Iterator[openai.OpenAI]:
    start_generator()
    yield sdk.with_options(timeout=500)
    assert not [key for key in broker.scan_iter(f"{PREFIX}requests*") if broker.xlen(key)], "nothing is left queued"


def called(city: str) -> Any:
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": city, "type": "function", "function": function}],
    }


def told(city: str, weather: str) -> list[Any]:
    return [
        *user(f"What is the weather in {city}?"),
        called(city),
        {"role": "tool", "tool_call_id": city, "content": weather},
        {"role": "assistant", "content": f"{weather.capitalize()}."},
    ]


def test_chat_completions_tools_and_errors(client: openai.OpenAI, engine: str) -> None:
    greedy: dict[str, Any] = {"model": MODEL, "temperature": 0}
    answer = client.chat.completions.create(**greedy, messages=user("What is the capital of France?"), max_tokens=20)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 3

    stream = client.chat.completions.create(
        **greedy,
        messages=user("What is the capital of France?"),
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage == answer.usage
    entries = [
        entry
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or ()
    ]
    assert "".join(entry.token for entry in entries).removesuffix("<|im_end|>") == text
    assert all(len(entry.top_logprobs) == 2 for entry in entries)

    completion = client.completions.create(
        **greedy, prompt=["The capital of France is", "One, two, three,"], max_tokens=4, echo=True
    )
    assert "Paris" in completion.choices[0].text
    assert completion.choices[1].text.startswith("One, two, three, four")

    conversation = [*told("Rome", "sunny"), *told("Oslo", "rain"), *user("What is the weather in Paris?")]
    asked: dict[str, Any] = {**greedy, "messages": conversation, "tools": [WEATHER], "max_tokens": 60}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls or ()
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    with client.chat.completions.stream(**asked) as events:
        for _ in events:
            pass
        (streamed,) = events.get_final_completion().choices[0].message.tool_calls or ()
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    with_none = client.chat.completions.create(**asked, tool_choice="none").choices[0].message
    assert not with_none.tool_calls

    schema = {"type": "object", "properties": {"city": {"enum": ["Lyon", "Nice"]}}, "required": ["city"]}
    wanted: dict[str, Any] = {
        **greedy,
        "messages": user("A city in France, as JSON."),
        "max_tokens": 40,
        "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    }
    named: dict[str, Any] = {**asked, "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    if engine == "vllm":
        found = json.loads(client.chat.completions.create(**wanted).choices[0].message.content or "")
        assert found["city"] in ("Lyon", "Nice")
        (forced,) = client.chat.completions.create(**named).choices[0].message.tool_calls or ()
        assert json.loads(forced.function.arguments).keys() == {"city"}
    else:
        for refused, param in ((wanted, "response_format"), (named, "tool_choice")):
            with pytest.raises(openai.BadRequestError, match=param) as refusal:
                client.chat.completions.create(**refused)
            assert refusal.value.param == param

    broken = called("Rome")
    broken["tool_calls"][0]["function"]["arguments"] = '{"city": '
    gone_on = client.chat.completions.create(**{**asked, "messages": [*user("hi"), broken, *user("go on")]})
    assert gone_on.choices[0].finish_reason, "what a model got wrong can be sent back to it"
    with pytest.raises(openai.BadRequestError, match="context") as overflow:
        client.chat.completions.create(**greedy, messages=user("word " * 9000))
    assert overflow.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="acme/nobody", messages=user("hi"))
