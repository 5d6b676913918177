"""Pieces of an answer: whole characters, nothing of a stop string, and joined they are the answer."""

import random
from typing import Any

import pytest

from tests.generation.conftest import make_tiny_model
from worker import tokenizers
from worker.generation.text import AnswerText

TEXT = "naïve 😀 日本語 — e\u0301 END of it"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token a byte: the hardest case, every character but ASCII comes in parts."""
    return tokenizers.load(make_tiny_model(tmp_path_factory.mktemp("tokenizer") / "tiny"))


def pieces(tokenizer: Any, text: str, *stop: str) -> tuple[list[str], AnswerText]:
    answer = AnswerText(tokenizer, stop)
    sent = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        sent.append(answer.push(token))
        if answer.stopped:
            break
    return [*sent, answer.finish()], answer


def test_pieces_are_whole_characters_as_early_as_possible(tokenizer: Any) -> None:
    sent, answer = pieces(tokenizer, TEXT)
    assert "".join(sent) == TEXT
    assert not any("\ufffd" in piece for piece in sent)
    assert [piece for piece in sent if piece] == list(TEXT), "one character each, none held back"
    assert answer.token_count == len(TEXT.encode())


@pytest.mark.parametrize("stop", ["END", "E", "it", "naïve", "😀", "日本", " END of", TEXT])
def test_a_stop_string_is_found_across_tokens_and_never_sent(tokenizer: Any, stop: str) -> None:
    sent, answer = pieces(tokenizer, TEXT, "no such text", stop)
    assert answer.stopped
    assert "".join(sent) == TEXT[: TEXT.index(stop)]


def test_the_beginning_of_a_stop_string_is_sent_once_it_turns_out_not_to_be_one(tokenizer: Any) -> None:
    sent, answer = pieces(tokenizer, "aabaab aabaac", "aabaac!", "aabaax")
    assert not answer.stopped
    assert "".join(sent) == "aabaab aabaac"
    assert sent[:6] == ["", "", "", "", "", "aab"]


def test_the_earliest_of_several_stop_strings_wins(tokenizer: Any) -> None:
    sent, _ = pieces(tokenizer, "one two three", "three", "two", "e t")
    assert "".join(sent) == "on"


def test_a_character_that_never_completes_is_not_sent(tokenizer: Any) -> None:
    answer = AnswerText(tokenizer, [])
    sent = [answer.push(token) for token in tokenizer("ok 😀", add_special_tokens=False)["input_ids"][:-1]]
    assert "".join([*sent, answer.finish()]) == "ok "


def test_control_tokens_are_not_text(tokenizer: Any) -> None:
    sent, _ = pieces(tokenizer, "a<s>b</s>")
    assert "".join(sent) == "ab"


def test_any_bytes_at_all_give_the_decoders_text(tokenizer: Any) -> None:
    dice = random.Random(0)
    for _ in range(200):
        ids = [dice.randrange(3, 259) for _ in range(dice.randrange(1, 60))]
        answer = AnswerText(tokenizer, [])
        text = "".join(answer.push(token) for token in ids) + answer.finish()
        assert text.rstrip("\ufffd") == tokenizer.decode(ids).rstrip("\ufffd")
