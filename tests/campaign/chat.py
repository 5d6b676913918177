"""A client that asks a model again and again, whole answers and streamed ones in turn, and notes how each ended."""

import json
import random
import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx

from tests.campaign.clients import server_sent_events
from tests.campaign.plan import BASE_MODEL


@dataclass
class Chat:
    """One question and how it ended."""

    asked_at: float
    took_s: float
    outcome: str
    """`answer`, `error CODE` (in OpenAI's shape), `broken` (the connection was lost) or what else came."""


class Chatter:
    """Asks a model again and again, whole and streamed in turn."""

    def __init__(self, url: str, *, pause_s: float = 0.4, model: str = BASE_MODEL) -> None:
        self.chats: list[Chat] = []
        self._url = url
        self._pause_s = pause_s
        self._model = model
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name="chatter", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        draw = random.Random(0)
        with httpx.Client(base_url=self._url, timeout=60) as http:
            while not self._stop.is_set():
                began = time.time()
                outcome = self._ask(http, streamed=draw.random() < 0.5)
                self.chats.append(Chat(began, time.time() - began, outcome))
                self._stop.wait(self._pause_s)

    def _ask(self, http: httpx.Client, *, streamed: bool) -> str:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 6,
            "stream": streamed,
        }
        try:
            answer = http.post("/v1/chat/completions", json=body)
        except httpx.TransportError:
            return "broken"
        if streamed and answer.status_code == 200:
            return _stream_outcome(answer.text)
        content = answer.json()
        if answer.status_code == 200:
            return "answer" if content["choices"][0]["finish_reason"] else f"cut off: {answer.text[:200]}"
        return _error_outcome(content) or answer.text[:200]


def _stream_outcome(text: str) -> str:
    events = [data for _, data in server_sent_events(iter(text.split("\n")))]
    if events and events[-1] == "[DONE]":
        return "answer"
    if events and (error := _error_outcome(json.loads(events[-1]))):
        return error
    return "broken"  # ended without a last word; httpx doesn't raise if the server closed in good order


def _error_outcome(content: dict[str, Any]) -> str | None:
    error = content.get("error", {})
    return f"error {error['code']}" if set(error) >= {"message", "type", "code"} else None
