"""Clients that ask a model again and again, whole answers and streamed ones, and note how each question ended.

Half of the questions go to /v1/completions and want their prompt back before the answer, which says whose answer it is.
Some clients go away in the middle of a stream.
"""

import json
import random
import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx

from tests.campaign.clients import server_sent_events
from tests.campaign.plan import BASE_MODEL

LEAVES_SHARE = 0.1
"""Of the streams are left after their first event."""
LEFT = "left"


@dataclass
class Chat:
    """One question and how it ended."""

    asked_at: float
    took_s: float
    outcome: str
    """`answer`, `error CODE` (in OpenAI's shape), `left` (its client went), `broken` (the connection was lost) or what
    else came."""


class Chatter:
    """Asks a model again and again, whole and streamed in turn."""

    def __init__(self, url: str, *, pause_s: float = 0.4, model: str = BASE_MODEL, seed: int = 0) -> None:
        self.chats: list[Chat] = []
        self._url = url
        self._pause_s = pause_s
        self._model = model
        self._seed = seed
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"chatter-{seed}", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        draw = random.Random(self._seed)
        with httpx.Client(base_url=self._url, timeout=60) as http:
            while not self._stop.is_set():
                began = time.time()
                outcome = self._ask(http, draw, f"question {len(self.chats)} of client {self._seed} ")
                self.chats.append(Chat(began, time.time() - began, outcome))
                self._stop.wait(self._pause_s)

    def _ask(self, http: httpx.Client, draw: random.Random, prompt: str) -> str:
        is_chat, is_streamed, leaves = draw.random() < 0.5, draw.random() < 0.5, draw.random() < LEAVES_SHARE
        body: dict[str, Any] = {"model": self._model, "max_tokens": 6, "stream": is_streamed}
        body |= {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt, "echo": True}
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        try:
            if is_streamed and leaves:
                return _leave(http, path, body)
            answer = http.post(path, json=body)
        except httpx.TransportError:
            return "broken"
        if is_streamed and answer.status_code == 200:
            return stream_outcome(answer.text, "" if is_chat else prompt)
        content = answer.json()
        if answer.status_code == 200:
            return _outcome([content], "" if is_chat else prompt)
        return _error_outcome(content) or answer.text[:200]


def _leave(http: httpx.Client, path: str, body: dict[str, Any]) -> str:
    with http.stream("POST", path, json=body) as answer:
        if answer.status_code != 200:
            return _error_outcome(json.loads(answer.read())) or answer.text[:200]
        for _ in server_sent_events(answer.iter_lines()):
            return LEFT
    return "broken"


def stream_outcome(text: str, begins_with: str = "") -> str:
    """How a stream ended, all of which was read."""
    events = [data for _, data in server_sent_events(iter(text.split("\n")))]
    if events and events[-1] == "[DONE]":
        return _outcome([json.loads(event) for event in events[:-1]], begins_with)
    if events and (error := _error_outcome(json.loads(events[-1]))):
        return error
    return "broken"  # ended without a last word; httpx doesn't raise if the server closed in good order


def _outcome(pieces: list[dict[str, Any]], begins_with: str) -> str:
    """Of an answer that says it is whole."""
    choices = [choice for piece in pieces for choice in piece["choices"]]
    if sum(choice.get("finish_reason") is not None for choice in choices) != 1:
        return f"not whole: {json.dumps(pieces)[:200]}"
    text = "".join(choice.get("text") or "" for choice in choices)
    return "answer" if text.startswith(begins_with) else f"another's answer: {text[:100]!r}, not {begins_with!r}"


def _error_outcome(content: dict[str, Any]) -> str | None:
    error = content.get("error", {})
    return f"error {error['code']}" if set(error) >= {"message", "type", "code"} else None
