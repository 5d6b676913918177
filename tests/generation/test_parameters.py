"""Every parameter is honoured, harmless, or refused by name. None of these requests reaches a generator."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types.chat import completion_create_params
from pydantic import ValidationError

from shared.chat_schema import NEUTRAL, ChatRequest
from shared.errors import BadRequest

BODY: dict[str, Any] = {"model": "acme/tiny", "messages": [{"role": "user", "content": "hi"}]}


def parsed(**changes: Any) -> ChatRequest:
    return ChatRequest.model_validate({**BODY, **changes})


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content", "content": "x"}),
        ("reasoning_effort", "high"),
        ("web_search_options", {}),
        ("store", True),
        ("service_tier", "priority"),
        ("verbosity", "low"),
    ],
)
def test_what_no_engine_honours_is_refused_by_name(client: TestClient, param: str, value: Any) -> None:
    answer = client.post("/v1/chat/completions", json={**BODY, param: value})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, "unsupported_parameter")
    assert "is not supported; leave it out" in error["message"]
    assert json.dumps(value)[:20] in error["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": "x" * 300}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "22"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "hi", "tool_call_id": "x"}]}, "messages.0"),
        ({"n": True}, "n"),
        ({"n": 0}, "n"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "magic", "function": {"name": "f"}}]}, "tools.0.type"),
        ({"messages": [{"role": "user", "content": "hi", "colour": "red"}]}, "messages.0.colour"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
        ),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
def test_wrong_values_are_refused_by_name(client: TestClient, changes: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/chat/completions", json={**BODY, **changes})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 6}, "two names of one limit"),
        ({"stream_options": {"include_usage": True}}, "stream: true"),
        ({"top_logprobs": 3}, "logprobs: true"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "none of the tools"),
    ],
)
def test_contradictions_are_refused(client: TestClient, changes: dict[str, Any], words: str) -> None:
    answer = client.post("/v1/chat/completions", json={**BODY, **changes})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("field", ["model", "content", "stop"])
def test_text_that_is_no_unicode_is_refused(client: TestClient, field: str) -> None:
    texts = {"model": "acme/tiny", "content": "hi", "stop": "x", field: "a\ud800b"}
    message = {"role": "user", "content": texts["content"]}
    body = json.dumps({"model": texts["model"], "messages": [message], "stop": texts["stop"]})
    answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert "surrogate" in answer.json()["error"]["message"]


def test_null_and_neutral_values_ask_for_nothing() -> None:
    assert parsed(**dict.fromkeys(NEUTRAL)) == parsed()
    for key, values in NEUTRAL.items():
        for value in values:
            assert parsed(**{key: value}) == parsed()


def test_every_parameter_of_the_sdk_is_known() -> None:
    """A new SDK may bring new parameters: each must be decided on, not fall under `unknown`."""
    known = {*ChatRequest.model_fields, *NEUTRAL}
    sdk = set(completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert sdk <= known
    assert not set(ChatRequest.model_fields) & set(NEUTRAL)


def test_content_may_come_in_parts_and_developer_means_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parsed(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    assert [(message.role, message.text) for message in request.messages] == [("system", "be brief"), ("user", "ab")]


def test_an_answer_of_the_sdk_can_be_sent_back_as_history() -> None:
    said = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "audio": None}
    assert parsed(messages=[*BODY["messages"], said, *BODY["messages"]]).messages[1].text == "yes"
    with pytest.raises(ValidationError):
        parsed(messages=[{**said, "tool_calls": [{"id": "x"}]}])


def test_limits_and_stops_are_one_thing_under_two_names() -> None:
    assert parsed(max_tokens=5).generation_body() == parsed(max_completion_tokens=5).generation_body()
    assert parsed(stop="a").generation_body() == parsed(stop=["a"]).generation_body()
    assert "stop" not in parsed(stop=None).generation_body()


def test_generators_are_told_only_what_asks_for_something() -> None:
    neutral = {"presence_penalty": 0, "logit_bias": {}, "logprobs": False, "tools": [], "n": 1, "top_logprobs": 0}
    bare = {"messages": BODY["messages"], "temperature": 1.0, "top_p": 1.0, "n": 1}
    assert parsed().generation_body() == bare
    assert parsed(**neutral, response_format={"type": "text"}, user="me").generation_body() == bare


def test_an_unsupported_value_is_a_bad_request_wherever_it_is_parsed() -> None:
    with pytest.raises(BadRequest):
        parsed(store=True)
