"""A real generator, a real API's client, and a broker that dies and forgets everything: nobody waits for ever."""

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest
import redis

from shared.errors import AppError
from shared.generation_client import Answer, GenerationClient
from shared.settings import Settings
from tests.generation.conftest import RunningGenerator, user
from tests.waiting import LIMIT_S, wait_until
from tests.worker.test_batches import Broker


@pytest.fixture
def own_broker(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Settings, Broker]]:
    """A Valkey without persistence that may be killed, and settings with it."""
    mine = settings.model_copy(update={"data": tmp_path_factory.mktemp("vk"), "redis_url": None})
    for cached in ("valkey_socket", "resolved_redis_url"):
        mine.__dict__.pop(cached, None)
    broker = Broker(mine)
    broker.start()
    url = f"unix://{mine.valkey_socket}"
    yield settings.model_copy(update={"redis_url": url, "resolved_redis_url": url}), broker
    broker.kill()


@pytest.mark.parametrize("away_s", [0.0, 11.0])
def test_open_answers_end_although_the_broker_forgot_all_signs_of_life(
    own_broker: tuple[Settings, Broker], away_s: float
) -> None:
    settings, broker = own_broker
    running = RunningGenerator(settings).start(redis.Redis.from_url(settings.resolved_redis_url))
    ends: list[str] = []
    pieces: Counter[str] = Counter()

    async def follow(answer: Answer) -> None:
        try:
            async for _ in answer:
                pieces[answer.request.id] += 1
            ends.append("whole")
        except AppError as error:
            ends.append(str(error.code))

    async def script() -> None:
        async with GenerationClient(settings) as client:
            body = {"messages": user("hi"), "max_tokens": 8000, "temperature": 0, "top_p": 1, "n": 1}
            fields = {"model": "acme/slow", "location": "base:acme/slow", "endpoint": "chat", "body": body}
            answers = [await client.submit(**fields) for _ in range(3)]  # type: ignore[arg-type]
            following = [asyncio.create_task(follow(answer)) for answer in answers]
            while not all(answer.has_begun for answer in answers):
                await asyncio.sleep(0.05)
            await asyncio.to_thread(broker.kill)
            await asyncio.sleep(away_s)
            await asyncio.to_thread(broker.start)
            again = await client.submit(**{**fields, "body": {**body, "max_tokens": 3}})  # type: ignore[arg-type]
            await asyncio.wait_for(follow(again), LIMIT_S)
            assert ends[-1] == "whole"
            await asyncio.sleep(6)  # by now everybody has looked who lives
            before = pieces.copy()
            await asyncio.sleep(2)
            for answer in answers:  # they go on, unless part of them was lost, which is told
                assert answer.is_settled or pieces[answer.request.id] > before[answer.request.id]
                answer.cancel()
            await asyncio.wait_for(asyncio.gather(*following), LIMIT_S)

    try:
        asyncio.run(asyncio.wait_for(script(), 100))
        wait_until(lambda: not running.generator._running, limit_s=20)
    finally:
        running.stop()
