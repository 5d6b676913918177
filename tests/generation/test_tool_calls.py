"""Calls of tools are found in text however it is cut, and nothing else is taken for one."""

import json
from typing import Any

import pytest

from worker.generation.tool_calls import ToolCallText, for_template

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


def parted(text: str, size: int) -> tuple[str, list[dict[str, object]]]:
    parser = ToolCallText()
    said, calls = "", []
    for at in range(0, len(text), size):
        more, found = parser.push(text[at : at + size])
        said, calls = said + more, calls + found
    more, found = parser.finish()
    return said + more, calls + found


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_call_is_found_however_its_text_is_cut(size: int) -> None:
    said, calls = parted(f"Let me look. {CALL}", size)
    assert said == "Let me look. "
    (call,) = calls
    assert call["index"] == 0
    assert call["function"] == {"name": "weather", "arguments": json.dumps({"city": "Bern"})}


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_several_calls_are_numbered(size: int) -> None:
    said, calls = parted(f"{CALL}\n{CALL}", size)
    assert said.strip() == ""
    assert [call["index"] for call in calls] == [0, 1]
    assert len({str(call["id"]) for call in calls}) == 2


def test_of_calls_past_the_wanted_one_nothing_is_said() -> None:
    parser = ToolCallText(at_most=1)
    said, calls = parser.push(f"{CALL}{CALL} and so on")
    assert (said, len(calls)) == ("and so on", 1)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('"{\\"city\\": \\"Bern\\"}"', {"city": "Bern"}),
        ("null", {}),
        ('"no JSON"', None),
        ("NaN", None),
        ("[" * 10_000, None),
    ],
)
def test_arguments_are_json_or_no_call(arguments: str, wanted: object) -> None:
    said, calls = parted(f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>', 1000)
    if wanted is None:
        assert not calls
        assert said.startswith("<tool_call>")
    else:
        assert json.loads(str(calls[0]["function"]["arguments"])) == wanted  # type: ignore[index]


def test_templates_get_earlier_arguments_as_objects() -> None:
    def said(arguments: str) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}

    good, broken, plain = for_template([said('{"city": "Bern"}'), said('{"city": '), {"role": "user", "content": "hi"}])
    assert good["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}
    assert broken["tool_calls"][0]["function"]["arguments"] == '{"city": '
    assert plain == {"role": "user", "content": "hi"}


def test_a_call_that_is_not_closed_counts() -> None:
    said, calls = parted(CALL.removesuffix("</tool_call>"), 4)
    assert (said, len(calls)) == ("", 1)


@pytest.mark.parametrize(
    "text",
    ["a < b", "<tool_cal", "<tool_call>no json</tool_call>", '<tool_call>{"name": 1', "<tool_call>[]</tool_call>"],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_what_is_no_call_is_text(text: str, size: int) -> None:
    assert parted(text, size) == (text, [])
