"""What one request may ask for: JSON that can be sent on, bounded parts, biases and log-probabilities."""

from typing import Any

import pytest
from pydantic import ValidationError

from shared.chat_schema import MAX_BIASES, MAX_JSON_DEPTH, MAX_PARTS, ChatRequest
from shared.completions import Offsets
from shared.errors import BadRequest
from shared.generation import GenerationRequest
from worker.generation.engine import MAX_SCORES, room_for


def nested(depth: int) -> dict[str, Any]:
    value: Any = "x"
    for _ in range(depth):
        value = {"a": [value]}
    return {"type": value}


def asked(**options: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "hi"}], **options})


def with_parameters(parameters: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}


def with_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}


@pytest.mark.parametrize("place", [with_parameters, with_schema])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"description": "\ud83d"}, "surrogate"),
        ({"\ud83d": 1}, "surrogate"),
        (nested(MAX_JSON_DEPTH), "deep"),
        (nested(3_000), "deep"),
        ({"maximum": float("nan")}, "not JSON"),
    ],
)
def test_schemas_are_json_that_can_be_sent_on(place: Any, value: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        asked(**place(value))
    fine = asked(**place({"type": "object", "properties": {"é": {"enum": [1, 2.5, None, True, "🦜"]}}}))
    assert GenerationRequest(
        id="1", replies="r", model="m", location="l", endpoint="chat", body=fine.generation_body(), deadline_s=1
    ).model_dump_json()


def test_parts_and_biases_are_bounded() -> None:
    parts = [{"type": "text", "text": "x"}] * (MAX_PARTS // 2 + 1)
    with pytest.raises(ValidationError, match=str(2 * len(parts))):
        asked(messages=[{"role": "user", "content": parts}] * 2)
    with pytest.raises(ValidationError, match="biases"):
        asked(logit_bias={str(token): 1.0 for token in range(MAX_BIASES + 1)})
    with pytest.raises(ValidationError, match="token id"):
        asked(logit_bias={"9" * 5000: 1.0})


def request_for(**body: Any) -> GenerationRequest:
    return GenerationRequest(
        id="1", replies="r", model="m", location="l", endpoint="chat", body={"n": 1, **body}, deadline_s=1
    )


def test_log_probabilities_of_one_request_are_bounded() -> None:
    assert room_for(request_for(logprobs=True, top_logprobs=20), 100, 8192) == 8092
    assert room_for(request_for(n=128), 100, 8192) == 8092, "text alone is small"
    with pytest.raises(BadRequest, match=str(MAX_SCORES)) as refused:
        room_for(request_for(n=128, logprobs=True, top_logprobs=20), 100, 8192)
    assert refused.value.param == "top_logprobs"
    with pytest.raises(BadRequest, match=str(MAX_SCORES)):
        room_for(request_for(n=20, logprobs=5, max_tokens=4000), 100, 8192)


def test_parts_of_a_character_are_spelt_as_bytes_and_take_no_room() -> None:
    parrot = "🦜".encode()
    tokens = [*([byte] for byte in parrot[:2]), list(parrot[2:]), list(b" ok")]
    entries = [
        {
            "token": bytes(token).decode(errors="replace"),
            "bytes": token,
            "logprob": -1.0,
            "top_logprobs": [{"token": "�", "bytes": [0xE2], "logprob": -2.0}],
        }
        for token in tokens
    ]
    shown = Offsets().logprobs(0, entries)
    assert shown is not None
    assert shown["text_offset"] == [0, 0, 0, 1]
    assert shown["tokens"] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\xa6\\x9c", " ok"]
    assert shown["top_logprobs"][0] == {"bytes:\\xf0": -1.0, "bytes:\\xe2": -2.0}
