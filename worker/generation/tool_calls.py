"""Calls of tools inside a model's text: `<tool_call>{"name": …, "arguments": …}</tool_call>`.

This is how Hermes, Qwen and SmolLM write them; templates that know tools ask for this form. Imports no torch.
"""

import json
from typing import Any

from shared.ids import new_id
from worker.generation.text import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def for_template(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as chat templates want them: the arguments of earlier calls as objects, where OpenAI has JSON.

    What a model wrote and is no JSON object stays the text it is: a client must be able to send it back.
    """
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(call["function"]["arguments"] or "{}")
    except ValueError:
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}} if isinstance(arguments, dict) else call


class ToolCallText:
    """Parts one answer's text into what is said and what is called, as it comes."""

    def __init__(self, at_most: int | None = None) -> None:
        """Calls past `at_most` are left out: `parallel_tool_calls: false` asks for one."""
        self._at_most = at_most
        self._held = ""
        self._inside = False
        self.count = 0
        """Calls so far."""

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """(text that may be sent now, calls that are complete now, as OpenAI's deltas)."""
        self._held += text
        said, calls = "", []
        while True:
            mark = CLOSE if self._inside else OPEN
            before, found, after = self._held.partition(mark)
            if not found:
                break
            if self._inside:
                call = self._parse(before)
                if call is not None:
                    calls += self._wanted(call)
                    after = after.lstrip()
                else:
                    said += OPEN + before + CLOSE  # no call after all
            else:
                said += before
            self._held, self._inside = after, not self._inside
        if not self._inside:
            keep = overlap(self._held, OPEN)
            said += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        return said, calls

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """What was held back, now that nothing follows; a model may end instead of closing its last call."""
        held, self._held = self._held, ""
        if self._inside and (call := self._parse(held)) is not None:
            return "", self._wanted(call)
        return (OPEN if self._inside else "") + held, []

    def _wanted(self, call: dict[str, Any]) -> list[dict[str, Any]]:
        return [call] if self._at_most is None or call["index"] < self._at_most else []

    def _parse(self, text: str) -> dict[str, Any] | None:
        try:
            call = json.loads(text)
            arguments = call.get("arguments") or {}
            if isinstance(arguments, str):  # some models quote them, as OpenAI's API does
                arguments = json.loads(arguments)
            function = {"name": str(call["name"]), "arguments": json.dumps(arguments, allow_nan=False)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        self.count += 1
        return {"index": self.count - 1, "id": new_id("call"), "type": "function", "function": function}
