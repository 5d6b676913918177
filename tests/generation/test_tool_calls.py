"""Calls of tools are found in text however it is cut, and nothing else is taken for one."""

import json

import pytest

from worker.generation.tool_calls import ToolCallText

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
