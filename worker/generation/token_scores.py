"""Log-probabilities of an answer's tokens in OpenAI's shape, sent no earlier than the text they belong to.

Imports no torch.
"""

from collections import deque
from functools import lru_cache
from typing import Any, Protocol

from worker.generation.text import AnswerText


class Scores(Protocol):
    """`worker.generation.sampling.TokenScores`."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class TokenEntries:
    """Of one answer. A token is held back as long as its first character is, and dropped with a stop string."""

    def __init__(self, tokenizer: Any, text: AnswerText) -> None:
        self._tokenizer = tokenizer
        self._text = text
        self._waiting: deque[tuple[int, Scores]] = deque()

    def push(self, scores: Any) -> None:
        """Take the next token's, before its text is pushed."""
        self._waiting.append((self._text.decoded_length, scores))

    def take(self, *, everything: bool) -> list[dict[str, Any]]:
        """Entries that may be sent now; `everything`: no token follows."""
        entries = []
        while self._waiting and (
            self._waiting[0][0] < self._text.sent_length or (everything and not self._text.stopped)
        ):
            entries.append(self._entry(self._waiting.popleft()[1]))
        return entries

    def _entry(self, scores: Scores) -> dict[str, Any]:
        top = [self._shown(token_id, logprob) for token_id, logprob in scores.top]
        return {**self._shown(scores.token_id, scores.logprob), "top_logprobs": top}

    def _shown(self, token_id: int, logprob: float) -> dict[str, Any]:
        content = token_bytes(self._tokenizer, token_id)
        # JSON has no infinity: what can't happen is shown as OpenAI shows it.
        return {
            "token": content.decode(errors="replace"),
            "logprob": max(logprob, -9999.0),
            "bytes": list(content),
        }


@lru_cache(maxsize=65_536)
def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """What a token stands for: part of a character, often."""
    token: str = tokenizer.convert_ids_to_tokens(token_id)
    if token_id not in tokenizer.added_tokens_decoder and all(letter in _BYTE_OF for letter in token):
        return bytes(_BYTE_OF[letter] for letter in token)
    text: str = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    return text.encode()


def _byte_letters() -> dict[str, int]:
    """Byte-level tokenizers write each byte as one visible letter: those that are visible as themselves, the others as
    the letters from U+0100 on (GPT-2, 2019)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in visible}
    hidden = [byte for byte in range(256) if byte not in visible]
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF = _byte_letters()
