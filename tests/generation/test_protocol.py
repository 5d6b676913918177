"""Who notices what between API processes and generators, over a real Valkey: deaths, repeats, gaps, losses.

The generators here are `Mailbox`es driven by the test, so that they can die at a chosen moment.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
import redis.asyncio

from shared import generation, generation_client, tasks
from shared.errors import AppError, BadRequest, ModelNotFound, TooManyRequests, Unavailable
from shared.generation import REQUESTS, Choice, Delta, Error, error_fields
from shared.generation_client import Answer, GenerationClient
from shared.redis_client import connect_async
from shared.settings import Settings
from tests.generation.conftest import RunningGenerator
from tests.waiting import LIMIT_S, wait_until
from worker.generation import mailbox
from worker.generation.mailbox import Delivery, Mailbox

BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 10,
    "temperature": 0,
    "top_p": 1,
    "n": 1,
}
FIELDS: dict[str, Any] = {"model": "acme/tiny", "location": "base:acme/tiny", "endpoint": "chat", "body": BODY}
END = {"prompt_tokens": 3, "completion_tokens": 2}


def say(delivery: Delivery, text: str) -> None:
    """Send a chunk of its own, which no later one joins."""
    delivery.delta([Choice(text=text)])
    delivery.close_delta()


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever is silent for a second is dead."""
    for module in (mailbox, generation_client):
        monkeypatch.setattr(module, "SILENT_MS", 1000)
        monkeypatch.setattr(module, "GONE_S", 0.6)
    monkeypatch.setattr(generation_client, "BEAT_S", 0.1)
    monkeypatch.setattr(generation_client, "NO_GENERATOR_WAIT_S", 2.0)
    yield


class Scripted:
    """A generator that does what the test says and beats until told to die."""

    def __init__(self, connection: redis.asyncio.Redis, name: str) -> None:
        self.mailbox = Mailbox(connection, name)
        self._tasks = [
            asyncio.create_task(self.mailbox.write_forever()),
            asyncio.create_task(self._beat()),
        ]

    async def _beat(self) -> None:
        while True:
            await self.mailbox.beat([])
            await asyncio.sleep(0.1)

    async def take(self) -> Delivery:
        while True:
            if found := await self.mailbox.take(1, wait_ms=200):
                return found[0]

    async def take_over(self) -> Delivery:
        while True:
            if found := await self.mailbox.take_over(1):
                return found[0]
            await asyncio.sleep(0.05)

    async def die(self) -> None:
        await tasks.end(self._tasks)


@asynccontextmanager
async def scene(settings: Settings, *names: str) -> AsyncIterator[tuple[GenerationClient, list[Scripted]]]:
    connection = connect_async(settings)
    async with GenerationClient(settings) as client:
        generators = [Scripted(connection, name) for name in names]
        await asyncio.sleep(0.15)  # a beat
        yield client, generators
        for one in generators:
            await one.die()
    await connection.aclose()


def play(script: Coroutine[Any, Any, None], limit_s: float = LIMIT_S) -> None:
    asyncio.run(asyncio.wait_for(script, limit_s))


async def text_of(answer: Answer) -> str:
    return "".join([choice.text async for piece in answer for choice in piece.choices])


async def error_of(answer: Answer) -> AppError:
    with pytest.raises(AppError) as caught:
        await text_of(answer)
    return caught.value


def test_an_answer_arrives_in_order_and_leaves_nothing_queued(settings: Settings, broker: redis.Redis) -> None:
    async def script() -> None:
        async with scene(settings, "a") as (client, (a,)):
            answer = await client.submit(**FIELDS)
            delivery = await a.take()
            assert delivery.request.body == BODY
            assert (delivery.attempt, delivery.age_s < 10) == (1, True)
            delivery.taken()
            for text in ("one ", "two ", "three"):
                say(delivery, text)
                await asyncio.sleep(0.01)
            delivery.end(**END)
            assert await text_of(answer) == "one two three"
            assert client.waiting_count == 0

    play(script())
    assert broker.xlen(REQUESTS["live"]) == 0
    assert broker.xpending(REQUESTS["live"], generation.GROUP)["pending"] == 0


def test_a_generator_that_dies_before_the_first_text_is_replaced(settings: Settings) -> None:
    async def script() -> None:
        async with scene(settings, "a", "b") as (client, (a, b)):
            answer = await client.submit(**FIELDS)
            (await a.take()).taken()
            await asyncio.sleep(0.05)
            await a.die()
            second = await b.take_over()
            assert second.attempt == 2
            second.taken()
            say(second, "from b")
            second.end(**END)
            assert await text_of(answer) == "from b"

    play(script())


def test_a_slow_generator_keeps_its_request(settings: Settings, broker: redis.Redis) -> None:
    async def script() -> None:
        async with scene(settings, "a", "b") as (client, (a, b)):
            answer = await client.submit(**FIELDS)
            delivery = await a.take()
            delivery.taken()
            await asyncio.sleep(2.5)  # loading a model, say; longer than a dead one would be waited for
            assert await b.mailbox.take_over(1) == []
            say(delivery, "at last")
            delivery.end(**END)
            assert await text_of(answer) == "at last"

    play(script())


def test_a_generator_that_dies_after_the_first_text_is_an_error(settings: Settings) -> None:
    async def script() -> None:
        async with scene(settings, "a", "b") as (client, (a, b)):
            answer = await client.submit(**FIELDS)
            say((await a.take()), "half an ans")
            pieces = aiter(answer)
            assert (await anext(pieces)).choices == [Choice(text="half an ans")]
            await a.die()
            with pytest.raises(Unavailable) as caught:
                await anext(pieces)
            assert caught.value.code == "generator_lost"
            assert await b.mailbox.take_over(1) == []

    play(script())


def test_without_a_generator_the_wait_is_bounded(settings: Settings, broker: redis.Redis) -> None:
    async def script() -> None:
        async with scene(settings) as (client, _):
            error = await error_of(await client.submit(**FIELDS))
            assert (error.status_code, error.code) == (503, "no_generator")
            assert "anneal worker generate" in error.message
            await asyncio.sleep(0.1)

    play(script())
    assert broker.xlen(REQUESTS["live"]) == 0, "nobody will be given what nobody waits for"


def test_what_a_generator_says_twice_is_heard_once(settings: Settings) -> None:
    async def script() -> None:
        async with scene(settings, "a") as (client, (a,)):
            answer = await client.submit(**FIELDS)
            delivery = await a.take()
            say(delivery, "one ")
            delivery.sequence = 0
            say(delivery, "one ")
            say(delivery, "two")
            delivery.end(**END)
            assert await text_of(answer) == "one two"

    play(script())


def test_a_lost_chunk_is_an_error_and_not_a_hole(settings: Settings) -> None:
    async def script() -> None:
        async with scene(settings, "a") as (client, (a,)):
            answer = await client.submit(**FIELDS)
            delivery = await a.take()
            say(delivery, "one ")
            delivery.sequence += 1
            say(delivery, "three")
            assert (await error_of(answer)).code == "answer_lost"

    play(script())


def test_a_generator_taken_for_dead_that_wakes_up_is_not_heard(settings: Settings) -> None:
    async def script() -> None:
        async with scene(settings, "a", "b") as (client, (a, b)):
            answer = await client.submit(**FIELDS)
            frozen = await a.take()
            await a.die()
            second = await b.take_over()
            say(second, "b speaks. ")
            await asyncio.sleep(0.1)
            awake = Scripted(a.mailbox._redis, "a")
            frozen.mailbox = awake.mailbox
            say(frozen, "a speaks. ")
            frozen.end(**END)
            await asyncio.sleep(0.1)
            say(second, "b again.")
            second.end(**END)
            assert await text_of(answer) == "b speaks. b again."
            await awake.die()

    play(script())


def test_of_two_that_answer_the_first_to_speak_is_heard(settings: Settings) -> None:
    async def script() -> None:
        async with scene(settings, "a", "b") as (client, (a, b)):
            answer = await client.submit(**FIELDS)
            frozen = await a.take()
            await a.die()
            second = await b.take_over()
            awake = Scripted(a.mailbox._redis, "a")
            frozen.mailbox = awake.mailbox
            say(frozen, "a speaks, ")
            await asyncio.sleep(0.1)
            say(second, "so does b, ")
            second.end(**END)
            await asyncio.sleep(0.1)
            say(frozen, "a ends.")
            frozen.end(**END)
            assert await text_of(answer) == "a speaks, a ends."
            await awake.die()

    play(script())


def test_a_request_behind_many_of_the_living_is_taken_over(settings: Settings) -> None:
    """Redis looks at a few entries for each it may hand out, and begins at the oldest unless told where it was."""

    async def script() -> None:
        async with scene(settings, "a", "b", "c") as (client, (a, b, c)):
            answers = [await client.submit(**FIELDS) for _ in range(31)]
            for _ in range(30):
                (await a.take()).taken()
            lost = await b.take()
            await b.die()
            await asyncio.sleep(1.2)
            found = await c.take_over()
            assert found.request.id == lost.request.id
            for answer in answers:
                answer.cancel()

    play(script())


def test_requests_that_wait_are_bounded_in_bytes(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_client, "MAX_QUEUED_BYTES", 300_000)
    large = {**FIELDS, "body": {**BODY, "messages": [{"role": "user", "content": "x" * 100_000}]}}

    async def script() -> None:
        async with scene(settings) as (client, _):
            with pytest.raises(TooManyRequests, match="MiB"):
                for _ in range(10):
                    await client.submit(**large)
            assert 3 <= client.waiting_count <= 5

    play(script())


def test_a_reader_is_gone_only_after_some_silence(settings: Settings, broker: redis.Redis) -> None:
    async def script() -> None:
        connection = connect_async(settings)
        box = Mailbox(connection, "a")
        assert await box.beat(["nobody"]) == set()
        await asyncio.sleep(0.8)
        broker.set(generation.alive_key("somebody"), 1)
        assert await box.beat(["nobody", "somebody"]) == {"nobody"}
        broker.delete(generation.alive_key("somebody"))
        await connection.aclose()

    play(script())


def test_an_answer_nobody_fetches_is_kept_as_few_pieces(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    # Thousands of pieces at once keep the loop busy, and beats late: not what this is about.
    for module in (mailbox, generation_client):
        monkeypatch.setattr(module, "SILENT_MS", 10_000)
        monkeypatch.setattr(module, "GONE_S", 5.0)

    async def script() -> None:
        async with scene(settings, "a") as (client, (a,)):
            answer = await client.submit(**FIELDS)
            delivery = await a.take()
            for count in range(3_000):
                say(delivery, "x")
                if not count % 100:
                    await asyncio.sleep(0)  # for the generator's beats: after a second without one it counts as gone
            delivery.end(**END)
            while not answer.is_settled:
                assert len(answer._choices) <= generation_client.MAX_PIECES
                await asyncio.sleep(0.01)
            assert await text_of(answer) == "x" * 3_000

    play(script())


def test_a_slow_client_holds_up_nobody_and_costs_no_more_than_its_text(settings: Settings) -> None:
    async def script() -> None:
        async with scene(settings, "a") as (client, (a,)):
            slow, quick = await client.submit(**FIELDS), await client.submit(**FIELDS)
            first, second = await a.take(), await a.take()
            for _ in range(5_000):
                first.delta([Choice(text="x")])
            first.end(**END)
            say(second, "y")
            second.end(**END)
            assert await text_of(quick) == "y"
            pieces = [piece async for piece in slow]
            assert [len(choice.text) for piece in pieces for choice in piece.choices] == [5_000], "merged into one"

    play(script())


def test_a_broker_that_lost_its_data_ends_the_wait(settings: Settings, broker: redis.Redis) -> None:
    async def script() -> None:
        async with scene(settings, "a") as (client, (a,)):
            lost = await client.submit(**FIELDS)
            await asyncio.to_thread(broker.flushall)
            assert (await error_of(lost)).code == "request_lost"
            answer = await client.submit(**FIELDS)
            delivery = await a.take()
            delivery.end(**END)
            assert await text_of(answer) == ""

    play(script())


def test_a_cancelled_request_is_heard_of_and_never_given_out_again(settings: Settings, broker: redis.Redis) -> None:
    async def script() -> None:
        async with scene(settings, "a", "b") as (client, (a, b)):
            hearing = asyncio.create_task(a.mailbox.cancellations())
            await asyncio.sleep(0.05)
            answer = await client.submit(**FIELDS)
            delivery = await a.take()
            answer.cancel()
            assert await hearing == [delivery.request.id]
            await a.die()
            await asyncio.sleep(1.5)
            assert await b.mailbox.take_over(1) == []

    play(script())


def test_a_cancellation_heard_while_its_request_is_being_taken_is_obeyed(
    settings: Settings, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody had cancelled it when the broker was asked, and nobody has begun it when the cancellation comes."""

    async def script() -> None:
        connection = connect_async(settings)
        box = Mailbox(connection, "taking")
        async with scene(settings, "alive") as (client, _):
            assert await box.take(1, wait_ms=1) == [], "makes the group"
            answer = await client.submit(**FIELDS)
            make = connection.pipeline

            def pipeline(**options: Any) -> Any:
                made = make(**options)
                execute = made.execute

                async def execute_and_hear() -> Any:
                    results = await execute()
                    answer.cancel()
                    while answer.request.id not in await box.cancellations():
                        pass
                    return results

                made.execute = execute_and_hear
                return made

            with monkeypatch.context() as patch:
                patch.setattr(connection, "pipeline", pipeline)
                assert await box.take(1) == []
            assert len(box._settled["live"]) == 1
        await connection.aclose()

    play(script())


@pytest.mark.parametrize(
    "error",
    [
        BadRequest("no", param="messages", code="context_length_exceeded"),
        ModelNotFound("gone", param="model"),
        TooManyRequests("later", retry_after_s=3),
        Unavailable("not now", code="model_too_large"),
        AppError("broken"),
    ],
)
def test_errors_cross_the_broker_as_they_are(error: AppError) -> None:
    chunk = Error(id="x", generator="g", attempt=1, sequence=0, **error_fields(error))
    (received,) = generation.load_chunks(generation.dump_chunks([chunk]))
    assert isinstance(received, Error)
    again = received.to_exception()
    assert type(again) is type(error)
    assert (again.body(), again.status_code, again.retry_after_s) == (
        error.body(),
        error.status_code,
        error.retry_after_s,
    )


def test_only_json_of_the_protocol_is_read() -> None:
    for data in (b"\x80\x04N.", b"{}", b'[{"type": "delta"}]', b'[{"type": "other"}]'):
        with pytest.raises(ValueError):
            generation.load_chunks(data)
    chunk = Delta(id="x", generator="g", attempt=1, sequence=0, choices=[Choice(text="\u2028 é")])
    assert generation.load_chunks(generation.dump_chunks([chunk])) == [chunk]


def test_a_request_that_is_no_json_of_ours_stops_no_generator(
    start_generator: Callable[..., RunningGenerator], settings: Settings, broker: redis.Redis
) -> None:
    start_generator()
    broker.xadd(REQUESTS["live"], {"request": "{"})
    broker.xadd(REQUESTS["live"], {"something": "else"})
    wait_until(lambda: broker.xlen(REQUESTS["live"]) == 0)

    async def script() -> None:
        async with GenerationClient(settings) as client:
            assert await text_of(await client.submit(**FIELDS))

    play(script())


def test_generators_cancel_what_a_vanished_api_process_asked_for(
    start_generator: Callable[..., RunningGenerator], settings: Settings, broker: redis.Redis
) -> None:
    running = start_generator().generator

    async def script() -> None:
        async with GenerationClient(settings) as client:
            location = {"model": "acme/slow", "location": "base:acme/slow", "body": {**BODY, "max_tokens": 8000}}
            answer = await client.submit(**{**FIELDS, **location})
            await anext(aiter(answer))
            await tasks.end(client._loops)  # as a kill -9 would
            broker.delete(generation.alive_key(client._replies))
            while running.free_slots < settings.generation_slots:
                await asyncio.sleep(0.05)

    play(script(), limit_s=25)  # its tokens would take longer


def test_a_redelivered_request_that_kills_generators_is_given_up(
    start_generator: Callable[..., RunningGenerator], settings: Settings
) -> None:
    async def script() -> None:
        async with scene(settings) as (client, _):
            answer = await client.submit(**FIELDS)
            for attempt, name in enumerate("abc", start=1):
                victim = Scripted(client._redis, name)
                delivery = await (victim.take() if attempt == 1 else victim.take_over())
                assert delivery.attempt == attempt
                await victim.die()
            start = asyncio.to_thread(start_generator)
            assert (await error_of(answer)).code == "generator_crashed" if await start else False

    play(script())
