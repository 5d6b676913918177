"""A generator without a model: real mailbox, real Valkey, and answers that the request itself asks for."""

import asyncio
import threading
from collections import Counter
from contextlib import suppress
from typing import Any, Self

from redis.exceptions import RedisError

from shared import tasks
from shared.errors import BadRequest, Unavailable
from shared.generation import Choice
from shared.redis_client import connect_async
from shared.settings import Settings
from worker.generation.mailbox import Delivery, Mailbox

SLOTS = 64


class FakeGenerator:
    """In a thread. It echoes what it is asked, but refuses `refuse …`, stumbles once over `stumble …`, and answers
    `hold …` only once `release` is set."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.asked: Counter[str] = Counter()
        """How often it got each text."""
        self.release = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    async def _serve(self) -> None:
        connection = connect_async(self._settings)
        mailbox = Mailbox(connection, "fake")
        beside = [asyncio.create_task(mailbox.write_forever()), asyncio.create_task(self._beat(mailbox))]
        answers: set[asyncio.Task[None]] = set()
        while not self._stop.is_set():
            try:
                taken = await mailbox.take(SLOTS, "batch", wait_ms=100)
            except (RedisError, OSError):
                await asyncio.sleep(0.1)
                continue
            for delivery in taken:
                delivery.taken()
                answer = asyncio.create_task(self._answer(delivery))
                answers.add(answer)
                answer.add_done_callback(answers.discard)
        await tasks.end([*answers, *beside])
        await mailbox.leave()
        await connection.aclose()

    async def _beat(self, mailbox: Mailbox) -> None:
        while True:
            with suppress(RedisError, OSError):
                await mailbox.beat([])
            await asyncio.sleep(0.2)

    async def _answer(self, delivery: Delivery) -> None:
        body = delivery.request.body
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        self.asked[text] += 1
        if text.startswith("refuse"):
            delivery.error(BadRequest("too long a conversation", param="messages", code="context_length_exceeded"))
            return
        if text.startswith("stumble") and self.asked[text] == 1:
            delivery.error(Unavailable("the generator is being shut down; try again", code="generator_lost"))
            return
        while text.startswith("hold") and not self.release.is_set():
            await asyncio.sleep(0.02)
        delivery.delta([Choice(text=f"you said {text}")])
        await asyncio.sleep(0)
        delivery.delta([Choice(finish_reason="stop")])
        delivery.end(prompt_tokens=3, completion_tokens=4)
