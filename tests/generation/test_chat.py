"""Chat completions end to end: the official SDK, the API, Valkey, a generator, a tiny real model."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import redis

from shared.generation import PREFIX, REQUESTS
from tests.generation.conftest import CONTEXT, RunningGenerator, user
from tests.waiting import wait_until

TINY = "acme/tiny"


def ask(sdk: openai.OpenAI, text: str = "hi", **options: Any) -> Any:
    options = {"model": TINY, "max_tokens": 20, "temperature": 0, **options}
    return sdk.chat.completions.create(messages=user(text), **options)


def streamed(sdk: openai.OpenAI, text: str = "hi", **options: Any) -> str:
    chunks = ask(sdk, text, stream=True, **options)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_a_plain_answer_has_openais_shape(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    answer = ask(sdk)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == TINY
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 20
    assert answer.usage.prompt_tokens == len("user:hi") + 2 + 1 + len("assistant:")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20


def test_a_streamed_answer_is_the_plain_one_in_pieces(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    plain = ask(sdk, max_tokens=60)
    chunks = list(ask(sdk, max_tokens=60, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    *pieces, last, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == plain.choices[0].message.content
    assert last.choices[0].finish_reason == plain.choices[0].finish_reason
    assert usage.choices == []
    assert usage.usage == plain.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(pieces) > 5


def test_the_stream_ends_with_done(generator: RunningGenerator, server: str) -> None:
    body = {"model": TINY, "messages": user("hi"), "stream": True, "max_tokens": 3}
    answer = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=30)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-2])


def test_a_stop_string_ends_the_answer_and_is_never_sent(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    whole = ask(sdk, max_tokens=60).choices[0].message.content
    stop = whole[20:24]  # four tokens of this model
    for text in (
        ask(sdk, max_tokens=60, stop=stop).choices[0].message.content,
        streamed(sdk, max_tokens=60, stop=stop),
    ):
        assert text == whole[: whole.index(stop)]
    answer = ask(sdk, max_tokens=60, stop=["never said", stop, "nor this"])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 60
    wait_until(lambda: not generator.generator._running, limit_s=20)


def test_the_same_seed_gives_the_same_text_in_any_company(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    def sampled(seed: int) -> str:
        return str(ask(sdk, temperature=1.0, top_p=0.95, seed=seed, max_tokens=40).choices[0].message.content)

    alone = sampled(7)
    with ThreadPoolExecutor(8) as pool:
        company = list(pool.map(sampled, [1, 7, 2, 3, 7, 4, 5, 6]))
    assert company[1] == company[4] == alone
    assert len(set(company)) == 7


def test_more_text_than_the_cache_holds_is_decoded_all_the_same(
    generator: RunningGenerator, sdk: openai.OpenAI
) -> None:
    """The cache has room for two whole contexts; eight answers fill it several times over and push each other out."""

    def sampled(seed: int) -> str:
        answer = ask(sdk, temperature=1.0, seed=seed, max_tokens=CONTEXT - 30)
        return str(answer.choices[0].message.content)

    with ThreadPoolExecutor(8) as pool:
        company = list(pool.map(sampled, range(8)))
    assert company == [sampled(seed) for seed in range(8)]


def test_without_a_seed_answers_differ(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    assert len({ask(sdk, temperature=1.0, max_tokens=40).choices[0].message.content for _ in range(3)}) == 3


def test_eight_streams_run_at_once(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    together = threading.Barrier(8)

    def follow(index: int) -> str:
        stream = ask(sdk, f"number {index}", model="acme/slow", stream=True, max_tokens=30)
        pieces = [next(iter(stream)).choices[0].delta.content or ""]
        together.wait(timeout=30)  # every stream has begun before any goes on
        return "".join([*pieces, *(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)])

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(follow, range(8)))
    assert texts == [
        ask(sdk, f"number {index}", model="acme/slow", max_tokens=30).choices[0].message.content for index in range(8)
    ]


def test_a_client_that_leaves_frees_its_slot_within_two_seconds(
    start_generator: Callable[..., RunningGenerator], sdk: openai.OpenAI
) -> None:
    running = start_generator(generation_slots=1).generator
    stream = ask(sdk, model="acme/slow", stream=True, max_tokens=8000)
    next(iter(stream))
    assert running.free_slots == 0
    stream.close()
    left = time.monotonic()
    wait_until(lambda: running.free_slots == 1, limit_s=2)
    assert time.monotonic() - left < 2
    assert ask(sdk, max_tokens=3).usage.completion_tokens == 3


def test_a_client_that_leaves_a_plain_request_frees_its_slot_too(
    start_generator: Callable[..., RunningGenerator], server: str
) -> None:
    running = start_generator(generation_slots=1).generator
    body = {"model": "acme/slow", "messages": user("hi"), "max_tokens": 8000, "temperature": 0}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server}/v1/chat/completions", json=body, timeout=httpx.Timeout(30, read=3))
    wait_until(lambda: running.free_slots == 1, limit_s=2)


def test_a_client_that_leaves_the_queue_is_never_started(
    start_generator: Callable[..., RunningGenerator], sdk: openai.OpenAI, server: str, broker: redis.Redis
) -> None:
    start_generator(generation_slots=1)
    busy = ask(sdk, model="acme/slow", stream=True, max_tokens=8000)
    next(iter(busy))
    with pytest.raises(httpx.ReadTimeout):
        body = {"model": TINY, "messages": user("hi")}
        httpx.post(f"{server}/v1/chat/completions", json=body, timeout=httpx.Timeout(30, read=0.5))
    wait_until(lambda: broker.xlen(REQUESTS["live"]) == 0, limit_s=10)
    busy.close()


def test_the_context_cannot_be_exceeded(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(sdk, "x" * 100, max_tokens=200)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "max_tokens"
    assert all(number in caught.value.message for number in (str(CONTEXT), "200"))
    with pytest.raises(openai.BadRequestError) as caught:
        ask(sdk, "x" * 300, max_tokens=None, stream=True)
    assert caught.value.param == "messages"
    answer = ask(sdk, max_tokens=None, temperature=1, seed=3)
    assert answer.usage.total_tokens <= CONTEXT


def test_least_recently_used_models_are_evicted_under_the_budget(
    start_generator: Callable[..., RunningGenerator], sdk: openai.OpenAI
) -> None:
    models = start_generator(generation_memory_bytes=450_000).generator._models
    first = ask(sdk, model="acme/tiny").choices[0].message.content
    ask(sdk, model="acme/other")
    assert models.locations == ["base:acme/other"], "two don't fit"
    assert ask(sdk, model="acme/tiny").choices[0].message.content == first


def test_two_models_stay_loaded_when_they_fit(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    for model in ("acme/tiny", "acme/other", "acme/tiny"):
        ask(sdk, model=model)
    assert generator.generator._models.locations == ["base:acme/other", "base:acme/tiny"]


def test_a_model_too_big_for_the_budget_is_a_clear_error(
    start_generator: Callable[..., RunningGenerator], sdk: openai.OpenAI
) -> None:
    start_generator(generation_memory_bytes=100_000)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(sdk)
    assert caught.value.status_code == 503
    assert caught.value.code == "model_too_large"
    assert "ANNEAL_GENERATION_MEMORY_BYTES=100000" in caught.value.message


def test_an_unknown_model_is_not_found(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(sdk, model="gpt-4o")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("environment", [{"ANNEAL_GENERATION_QUEUE": "3"}], indirect=True)
def test_one_request_too_many_is_told_to_come_back(sdk: openai.OpenAI, broker: redis.Redis) -> None:
    for _ in range(3):
        broker.xadd(REQUESTS["live"], {"request": "{}"})
    with pytest.raises(openai.RateLimitError) as caught:
        ask(sdk)
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_every_key_expires(generator: RunningGenerator, sdk: openai.OpenAI, broker: redis.Redis) -> None:
    stream = ask(sdk, stream=True, max_tokens=200)
    next(iter(stream))
    stream.close()
    ask(sdk)
    time.sleep(1.2)  # a beat
    lifetimes = {key: broker.ttl(key) for key in broker.scan_iter(f"{PREFIX}*")}
    assert lifetimes
    assert all(lifetime > 0 for lifetime in lifetimes.values()), lifetimes


@pytest.mark.parametrize("environment", [{"ANNEAL_GENERATION_DEADLINE_S": "6"}], indirect=True)
def test_the_deadline_ends_a_stream_with_an_error_event(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    ask(sdk, model="acme/slow", max_tokens=1)  # loading it takes part of the time
    text = ""
    with pytest.raises(openai.APIError, match=r"within 6 s \(ANNEAL_GENERATION_DEADLINE_S\)"):
        for chunk in ask(sdk, model="acme/slow", stream=True, max_tokens=8000):
            text += chunk.choices[0].delta.content or ""
    assert text
    wait_until(lambda: not generator.generator._running, limit_s=20)


def test_the_sdks_helpers_work(generator: RunningGenerator, sdk: openai.OpenAI) -> None:
    stop = ask(sdk).choices[0].message.content[8:10]  # they insist on an answer that is complete
    options: dict[str, Any] = {"model": TINY, "messages": user("hi"), "max_tokens": 20, "temperature": 0, "stop": stop}
    plain = sdk.chat.completions.create(**options).choices[0].message.content
    with sdk.chat.completions.stream(**options) as events:
        assert events.get_final_completion().choices[0].message.content == plain
    assert sdk.chat.completions.parse(**options).choices[0].message.content == plain


def test_an_engine_that_fails_is_replaced(
    generator: RunningGenerator, sdk: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ask(sdk).choices[0].message.content
    engine = generator.generator._models._models["base:acme/tiny"].engine

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(engine._manager.batch_processor, "_generation_step", fail)
    with pytest.raises(openai.InternalServerError, match="out of memory, say") as caught:
        ask(sdk)
    assert caught.value.code == "engine_failed"
    assert ask(sdk).choices[0].message.content == before


def test_no_thread_of_an_engine_holds_up_a_process_that_leaves(sdk: openai.OpenAI, generator: RunningGenerator) -> None:
    ask(sdk)
    engines = [thread for thread in threading.enumerate() if "generation_loop" in thread.name]
    assert engines
    assert all(thread.daemon for thread in engines)
