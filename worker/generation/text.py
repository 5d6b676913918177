"""Tokens → text to send: whole characters only, and nothing of a stop string.

Owns what one answer has produced so far. Knows nothing of models or queues; imports no torch.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

INCOMPLETE = "\ufffd"
"""What a decoder shows for bytes that are no whole character yet."""


class AnswerText:
    """Turns one answer's tokens into pieces of text that may be sent, as early as they may be.

    A piece is held back while its last bytes are an unfinished character, or while its end could be the beginning of
    a stop string. What was sent is never taken back: the pieces, joined, are the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = 0
        self._sent = 0
        self._held = ""
        self.stopped = False
        """A stop string was found; nothing more comes."""

    @property
    def decoded_length(self) -> int:
        """Characters of all tokens seen so far, those held back included."""
        return self._decoded

    @property
    def sent_length(self) -> int:
        """Characters that may be sent by now."""
        return self._sent

    @property
    def token_count(self) -> int:
        """Tokens seen, those of a stop string and the end-of-text token included."""
        return len(self._ids)

    def push(self, token_id: int) -> str:
        """Take one more token; return what may be sent now (often nothing)."""
        self._ids.append(token_id)
        piece = self._decoder.step(self._tokenizer.backend_tokenizer, token_id)
        return self._release(piece) if piece else ""

    def finish(self) -> str:
        """What was held back, now that no token follows. An unfinished character is dropped: it can't be shown."""
        if self.stopped:
            return ""
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        rest = self._release(whole[self._decoded :].rstrip(INCOMPLETE))
        if self.stopped:
            return rest
        self._sent += len(self._held)
        rest, self._held = rest + self._held, ""
        return rest

    def _release(self, piece: str) -> str:
        self._decoded += len(piece)
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            self._sent += min(found)
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        self._sent += len(text) - keep
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
