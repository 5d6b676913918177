"""`anneal worker generate` as a process: it serves SmolLM2, answers fast, ends in order, and may be killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import openai
import pytest
import redis

from shared.generation import GENERATORS
from shared.heartbeat import age
from shared.settings import Settings
from tests.generation.conftest import RunningGenerator, user
from tests.waiting import LIMIT_S, wait_until

SMOLLM2 = "smollm2-135m-instruct"


@pytest.fixture
def start(settings: Settings, broker: redis.Redis) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start a generator process and wait until it beats."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        before = broker.zcard(GENERATORS)
        process = subprocess.Popen([sys.executable, "-m", "cli.main", "worker", "generate"], env=os.environ.copy())
        started.append(process)
        wait_until(lambda: broker.zcard(GENERATORS) > before, limit_s=60)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def stream(sdk: openai.OpenAI, text: str, **options: Any) -> Any:
    return sdk.chat.completions.create(messages=user(text), stream=True, temperature=0, **options)


@pytest.mark.smollm2
@pytest.mark.timeout(180)
def test_smollm2_answers_by_its_alias(
    start: Callable[[], subprocess.Popen[bytes]], sdk: openai.OpenAI, settings: Settings
) -> None:
    process = start()
    answer = sdk.chat.completions.create(
        model=SMOLLM2, messages=user("What is the capital of France?"), temperature=0, max_tokens=20
    )
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop", "its end-of-turn token is known"
    assert answer.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert answer.usage.prompt_tokens == 37

    times_s = []
    for _ in range(5):
        started = time.monotonic()
        chunks = stream(sdk, "Count to ten.", model=SMOLLM2, max_tokens=5)
        next(iter(chunks))
        times_s.append(time.monotonic() - started)
        chunks.close()
    assert median(times_s) < 2, "a sign of life, no benchmark: tests share their cores"

    assert (age(settings, "generate") or 0) < 5
    chunks = stream(sdk, "hi", model="acme/slow", max_tokens=8000)
    next(iter(chunks))
    process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="being shut down"):
        for _ in chunks:
            pass
    assert process.wait(LIMIT_S) == 0
    assert age(settings, "generate") is None, "its heartbeat ended in good order"


@pytest.mark.timeout(120)
def test_a_killed_generator_ends_its_streams_and_another_one_goes_on(
    start: Callable[[], subprocess.Popen[bytes]],
    start_generator: Callable[..., RunningGenerator],
    sdk: openai.OpenAI,
) -> None:
    process = start()
    chunks = stream(sdk, "hi", model="acme/slow", max_tokens=8000)
    next(iter(chunks))
    process.kill()
    with pytest.raises(openai.APIError, match="died while it answered"):
        for _ in chunks:
            pass
    start_generator()
    assert sdk.chat.completions.create(model="acme/tiny", messages=user("hi"), max_tokens=3).usage.total_tokens
