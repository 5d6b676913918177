"""When models are loaded and kept: on demand, before anybody asks, for good; and what a client hears meanwhile."""

import asyncio
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import redis
import torch
from safetensors.torch import load_file, save_file

from shared.checkpoint_files import MANIFEST
from shared.errors import Unavailable
from shared.generation import WARM_UPS
from shared.generation_client import GenerationClient
from shared.settings import Settings
from tests.generation.conftest import RunningGenerator, make_tiny_model, user
from tests.waiting import LIMIT_S, wait_until
from worker import rounding
from worker.generation.transformers_engine import TransformersBackend
from worker.generation.warm_up import recommend

TINY = "acme/tiny"


def ask(sdk: openai.OpenAI, **options: Any) -> Any:
    return sdk.chat.completions.create(
        messages=user("hi"), **{"model": TINY, "max_tokens": 5, "temperature": 0, **options}
    )


def test_a_load_that_takes_too_long_is_told_and_goes_on(
    start_generator: Callable[..., RunningGenerator], sdk: openai.OpenAI
) -> None:
    start_generator(generation_load_wait_s=0.001)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(sdk)
    assert (caught.value.status_code, caught.value.code) == (503, "model_loading")
    assert "ANNEAL_GENERATION_LOAD_WAIT_S" in caught.value.message
    assert int(caught.value.response.headers["retry-after"]) >= 1

    def is_there() -> bool:
        try:
            return bool(ask(sdk).choices)
        except openai.InternalServerError:
            return False

    wait_until(is_there)


def test_many_who_ask_at_once_wait_for_one_load(
    start_generator: Callable[..., RunningGenerator], sdk: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = start_generator().generator._models._backend
    loads: list[Path] = []
    load = backend.load

    def counted(folder: Path, name: str, plan: Any) -> Any:
        loads.append(folder)
        return load(folder, name, plan)

    monkeypatch.setattr(backend, "load", counted)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(lambda _: ask(sdk), range(8)))) == 8
    assert len(loads) == 1


def test_a_model_is_loaded_as_soon_as_its_job_has_succeeded(generator: RunningGenerator, broker: redis.Redis) -> None:
    recommend(broker, "acme/other", "base:acme/other")
    wait_until(lambda: generator.generator._models.locations == ["base:acme/other"])
    assert broker.llen(WARM_UPS) == 0


def test_a_model_that_cannot_be_warmed_up_harms_nobody(
    generator: RunningGenerator, broker: redis.Redis, sdk: openai.OpenAI
) -> None:
    recommend(broker, "gone", "checkpoints/ftjob-gone/1/2")
    recommend(broker, "acme/other", "base:acme/other")
    wait_until(lambda: generator.generator._models.locations == ["base:acme/other"])
    assert ask(sdk).choices


def test_only_the_newest_models_are_worth_warming_up(broker: redis.Redis, settings: Settings) -> None:
    for number in range(10):
        recommend(broker, f"model-{number}", f"checkpoints/{number}")
    assert broker.llen(WARM_UPS) == 4
    assert 0 < broker.ttl(WARM_UPS) <= 60


def test_pinned_models_are_there_at_once_and_stay(
    settings: Settings, start_generator: Callable[..., RunningGenerator], sdk: openai.OpenAI, tmp_path: Path
) -> None:
    assert settings.models_dir is not None
    third = f"acme/third-{tmp_path.name}"
    make_tiny_model(settings.models_dir / third)
    pinned = ("acme/none", "acme/tiny")
    running = start_generator(pinned_models=pinned, generation_memory_bytes=600_000)  # two of them fit
    models = running.generator._models
    wait_until(lambda: models.locations == ["base:acme/tiny"])
    ask(sdk, model="acme/other")
    ask(sdk, model=third)
    assert models.locations == ["base:acme/tiny", f"base:{third}"]


LARGE = 2_600_000
"""Bytes for acme/slow with its cache, for a small model beside it, and for no second one of its size."""


@pytest.fixture
def second(settings: Settings, tmp_path: Path) -> str:
    """Name of a model as large as acme/slow."""
    assert settings.models_dir is not None
    make_tiny_model(settings.models_dir / "acme" / f"second-{tmp_path.name}", layers=24, context=8192)
    return f"acme/second-{tmp_path.name}"


def test_a_model_too_large_beside_the_pinned_ones_is_refused_and_stops_nobody(
    start_generator: Callable[..., RunningGenerator], sdk: openai.OpenAI, second: str
) -> None:
    running = start_generator(pinned_models=("acme/slow",), generation_memory_bytes=LARGE)
    wait_until(lambda: running.generator._models.locations == ["base:acme/slow"])
    with pytest.raises(openai.InternalServerError, match="pinned") as refused:
        ask(sdk, model=second)
    assert refused.value.code == "model_too_large"
    assert ask(sdk, model="acme/other").choices


def test_a_load_that_waits_for_room_keeps_no_smaller_one_waiting(
    start_generator: Callable[..., RunningGenerator], sdk: openai.OpenAI, second: str
) -> None:
    running = start_generator(generation_memory_bytes=LARGE)
    models = running.generator._models

    async def busy() -> None:
        async with models.use("base:acme/slow", "acme/slow"):
            with pytest.raises(Unavailable, match="still being loaded"):
                async with models.use(f"base:{second}", second, 0.5):
                    raise AssertionError("there was room for both")
            async with models.use("base:acme/other", "acme/other", 10):
                assert models._loads, "the large one still waits for room"

    assert running._loop is not None
    asyncio.run_coroutine_threadsafe(busy(), running._loop).result(30)
    wait_until(lambda: not models._loads)
    assert f"base:{second}" not in models.locations, "nobody waits for it any more"
    assert ask(sdk, model=second, max_tokens=3).choices, "now there is room"


def test_a_model_whose_files_go_while_it_answers_finishes_its_streams(
    settings: Settings, start_generator: Callable[..., RunningGenerator], sdk: openai.OpenAI, tmp_path: Path
) -> None:
    name = f"acme/mortal-{tmp_path.name}"
    assert settings.models_dir is not None
    folder = make_tiny_model(settings.models_dir / name, layers=8, context=2048)
    start_generator()
    stream = ask(sdk, model=name, stream=True, max_tokens=300, stream_options={"include_usage": True})
    next(iter(stream))
    shutil.rmtree(folder)
    last = list(stream)[-1]
    assert last.usage.completion_tokens == 300 or last.usage.completion_tokens > 0
    with pytest.raises(openai.NotFoundError):
        ask(sdk, model=name)


def batch_body(tokens: int) -> dict[str, Any]:
    return {"messages": user("hi"), "max_tokens": tokens, "temperature": 0, "top_p": 1, "n": 1}


def test_a_batch_never_keeps_a_live_request_waiting(
    start_generator: Callable[..., RunningGenerator], settings: Settings, sdk: openai.OpenAI
) -> None:
    """The batch has its own slots; while somebody waits for an answer it gets one."""
    running = start_generator(generation_slots=1, generation_batch_slots=3).generator
    begun, over = threading.Event(), threading.Event()

    async def batch() -> None:
        async with GenerationClient(settings) as client:
            fields: dict[str, Any] = {"model": "acme/slow", "location": "base:acme/slow", "endpoint": "chat"}
            answers = [await client.submit(**fields, body=batch_body(8000), kind="batch") for _ in range(5)]
            await anext(aiter(answers[0]))
            begun.set()
            await asyncio.to_thread(over.wait, 4 * LIMIT_S)
            for answer in answers:
                answer.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(batch()))
    thread.start()
    try:
        assert begun.wait(LIMIT_S)
        wait_until(lambda: running._running_of("batch") == 3)
        live = ask(sdk, model="acme/slow", stream=True, max_tokens=8000)
        next(iter(live))
        assert running.free_slots == 0
        assert running.free_batch_slots == 0
        live.close()
        wait_until(lambda: running.free_slots == 1, limit_s=20)
    finally:
        over.set()
        thread.join(LIMIT_S)
    wait_until(lambda: not running._running, limit_s=20)
    assert running.free_batch_slots == 3


@pytest.mark.parametrize("is_checkpoint", [True, False])
def test_a_checkpoint_in_32_bits_is_served_as_its_passes_saw_it(tmp_path: Path, is_checkpoint: bool) -> None:
    """Masters a third of a digit or less away from numbers in bf16: to nearest, nothing of that would be left."""
    folder = make_tiny_model(tmp_path / "tuned")
    base = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    masters = {name: tensor.float() * (1 + 2**-8 / 3) for name, tensor in base.items()}
    save_file(masters, folder / "model.safetensors", metadata={"format": "pt"})
    if is_checkpoint:
        (folder / MANIFEST).touch()
    backend = TransformersBackend(Settings(data=tmp_path / "data", generation_dtype="bfloat16"))
    engine = backend.load(folder, "tuned", backend.plan(folder, "tuned"))
    try:
        served = dict(engine._manager.model.named_parameters())
    finally:
        engine.close()
    for name, nearest in base.items():
        copy = torch.empty_like(nearest)
        rounding.copy(copy, masters[name])
        assert torch.equal(served[name], copy if is_checkpoint else nearest), name
        assert nearest.numel() < 500 or not torch.equal(copy, nearest)
