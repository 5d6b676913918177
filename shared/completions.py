"""Answers in OpenAI's shapes, made of the pieces that generators send. Knows no HTTP.

A request of `n` choices has the choices 0 … n-1; the second of several prompts has n … 2n-1, and so on.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.chat_schema import ChatRequest
from shared.completion_schema import CompletionRequest
from shared.generation import Choice, Endpoint
from shared.generation_client import Piece
from shared.ids import new_id

_PREFIX: dict[Endpoint, str] = {"chat": "chatcmpl", "completion": "cmpl"}
_OBJECT: dict[Endpoint, str] = {"chat": "chat.completion", "completion": "text_completion"}


def split(request: ChatRequest | CompletionRequest) -> list[dict[str, Any]]:
    """The bodies of the generation requests that a client's request becomes: one for each prompt."""
    return [request.generation_body()] if isinstance(request, ChatRequest) else request.generation_bodies()


def head(endpoint: Endpoint, model: str) -> dict[str, Any]:
    """What a whole answer and each of its chunks begin with."""
    return {
        "id": f"{_PREFIX[endpoint]}-{new_id('x')[2:]}",
        "object": _OBJECT[endpoint],
        "created": int(time.time()),
        "model": model,
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Offsets:
    """Where each token's text begins in its choice: the older endpoint wants to know."""

    def __init__(self) -> None:
        self._before: dict[int, bytes] = defaultdict(bytes)

    def logprobs(self, index: int, entries: Sequence[dict[str, Any]] | None) -> dict[str, Any] | None:
        """Entries as chat has them, in the older endpoint's shape."""
        if entries is None:
            return None
        offsets = []
        for entry in entries:
            offsets.append(len(self._before[index].decode(errors="ignore")))
            self._before[index] += bytes(entry["bytes"] or b"")
        return {
            "tokens": [_spelt(entry) for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [_by_token(entry) for entry in entries],
            "text_offset": offsets,
        }


def _by_token(entry: dict[str, Any]) -> dict[str, float] | None:
    """The likeliest tokens of a place, and the one that is there."""
    if entry["logprob"] is None:
        return None
    found = {_spelt(top): top["logprob"] for top in entry["top_logprobs"]}
    return {_spelt(entry): entry["logprob"], **found}


def _spelt(entry: dict[str, Any]) -> str:
    """A token's text; of one that is part of a character its bytes, as OpenAI writes them."""
    token: str = entry["token"]
    if "\ufffd" not in token or entry["bytes"] is None:
        return token
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry["bytes"])


@dataclass
class _Answer:
    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] | None = None
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    finish_reason: str | None = None

    def add(self, choice: Choice) -> None:
        self.text.append(choice.text)
        if choice.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += choice.logprobs
        for delta in choice.tool_calls or ():
            call = self.tool_calls.setdefault(
                delta["index"], {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
            )
            call["id"] = delta.get("id") or call["id"]
            for key, value in (delta.get("function") or {}).items():
                call["function"][key] += value or ""
        self.finish_reason = choice.finish_reason or self.finish_reason


class Whole:
    """A whole answer, added up from its pieces."""

    def __init__(self, endpoint: Endpoint, model: str, n: int = 1) -> None:
        self._endpoint = endpoint
        self._head = head(endpoint, model)
        self._n = n
        self._answers: dict[int, _Answer] = defaultdict(_Answer)
        self._prompt_tokens = 0
        self._completion_tokens = 0

    def add(self, piece: Piece, prompt_index: int = 0) -> None:
        for choice in piece.choices:
            self._answers[prompt_index * self._n + choice.index].add(choice)
        if piece.end is not None:
            self._prompt_tokens += piece.end.prompt_tokens
            self._completion_tokens += piece.end.completion_tokens

    def body(self) -> dict[str, Any]:
        """OpenAI's JSON of all that was added."""
        shape = _chat_choice if self._endpoint == "chat" else _completion_choice
        choices = [shape(index, answer) for index, answer in sorted(self._answers.items())]
        return {**self._head, "choices": choices, "usage": usage(self._prompt_tokens, self._completion_tokens)}


def _chat_choice(index: int, answer: _Answer) -> dict[str, Any]:
    text = "".join(answer.text)
    calls = [answer.tool_calls[key] for key in sorted(answer.tool_calls)]
    message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    logprobs = None if answer.logprobs is None else {"content": answer.logprobs, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}


def _completion_choice(index: int, answer: _Answer) -> dict[str, Any]:
    return {
        "index": index,
        "text": "".join(answer.text),
        "logprobs": Offsets().logprobs(index, answer.logprobs),
        "finish_reason": answer.finish_reason,
    }
