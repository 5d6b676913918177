"""The vLLM engine for real: its server as a child, SmolLM2 in 32-bit on the CPU.

`make setup-vllm` builds the environment; without it there is nothing to test.
"""

import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shared.checkpoint_files import MANIFEST
from shared.errors import AppError, BadRequest, Unavailable
from shared.generation import Choice, GenerationRequest
from shared.settings import Settings
from tests.generation.parameter_table import ROWS, Row
from tests.generation.parameter_table import answered as put_to
from tests.generation.trained_prompt import TURNS, trained_prompt
from tests.waiting import wait_until
from worker import rounding, tokenizers
from worker.base_models import resolve
from worker.generation.backends import make_backend
from worker.generation.engine import Usage
from worker.generation.vllm_engine import VllmBackend, VllmEngine

PYTHON = Path(os.environ.get("ANNEAL_VLLM_PYTHON") or Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python")
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONVERSATION = [{"role": "user", "content": "What is the capital of France?"}]

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no {PYTHON}; `make setup-vllm` builds it"),
]


@pytest.fixture(scope="module")
def vllm_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        data=tmp_path_factory.mktemp("data"),
        engine="vllm",
        vllm_python=PYTHON,
        generation_dtype="float32",
        generation_memory_bytes=4 * 2**30,
    )


@pytest.fixture(scope="module")
def folder(vllm_settings: Settings) -> Path:
    return resolve(NAME, vllm_settings).path


@pytest.fixture(scope="module")
def backend(vllm_settings: Settings) -> VllmBackend:
    backend = make_backend(vllm_settings)
    assert isinstance(backend, VllmBackend)
    return backend


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def shared_engine(backend: VllmBackend, folder: Path) -> Iterator[list[VllmEngine]]:
    """In a list: a test that kills it puts a new one there."""
    holder = [backend.load(folder, NAME, backend.plan(folder, NAME))]
    yield holder
    holder[0].close()


@pytest.fixture
def engine(shared_engine: list[VllmEngine], backend: VllmBackend, folder: Path) -> VllmEngine:
    if not shared_engine[0].is_alive:
        shared_engine[0].close()
        shared_engine[0] = backend.load(folder, NAME, backend.plan(folder, NAME))
    return shared_engine[0]


Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture
def run(loop: asyncio.AbstractEventLoop) -> Run:
    return lambda work: loop.run_until_complete(asyncio.wait_for(work, 120))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return tokenizers.load(folder)


def answered(engine: VllmEngine, **body: Any) -> Coroutine[Any, Any, tuple[list[Choice], Usage]]:
    spoken = {} if "prompt" in body else {"messages": CONVERSATION}
    return put_to(engine, {"max_tokens": 12, **spoken, **body})


def asked(**body: Any) -> GenerationRequest:
    body = {"max_tokens": 12, "temperature": 0.0, "top_p": 1.0, "n": 1, **body}
    endpoint: Any = "completion" if "prompt" in body else "chat"
    if endpoint == "chat":
        body.setdefault("messages", CONVERSATION)
    return GenerationRequest(
        id="gen-1", replies="x", model=NAME, location=f"base:{NAME}", endpoint=endpoint, body=body, deadline_s=100
    )


def greedy(reference: Any, ids: list[int], count: int) -> list[int]:
    with torch.no_grad():
        output = reference.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=2)
    return list(output[0, len(ids) :].tolist())


def test_greedy_answers_are_those_of_plain_transformers(
    engine: VllmEngine, run: Run, reference: Any, tokenizer: Any
) -> None:
    (choice,), usage = run(answered(engine))
    prompt = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    expected = greedy(reference, ids, 12)
    assert choice.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert usage == Usage(len(ids), len(expected))
    assert choice.finish_reason == ("stop" if expected[-1] == tokenizer.eos_token_id else "length")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.shown)
def test_the_engine_does_what_the_table_says(engine: VllmEngine, run: Run, row: Row) -> None:
    choices, usage = run(put_to(engine, row.body))
    assert len(choices) == row.body.get("n", 1)
    assert all(choice.finish_reason for choice in choices)
    assert usage.completion_tokens > 0
    assert all((choice.logprobs is not None) == ("logprobs" in row.body) for choice in choices)


@pytest.mark.parametrize("messages", TURNS)
def test_the_served_prompt_is_the_one_that_was_trained(
    engine: VllmEngine, tokenizer: Any, messages: list[dict[str, str]]
) -> None:
    with engine._server.client(timeout_s=30) as client:
        served = client.post("/tokenize", json={"model": "model", "messages": messages}).json()["tokens"]
    assert served == trained_prompt(tokenizer, messages)


def test_logprobs_are_those_of_the_model(engine: VllmEngine, run: Run, reference: Any, tokenizer: Any) -> None:
    (choice,), _ = run(answered(engine, prompt="The capital of France is", logprobs=2, max_tokens=4))
    ids = tokenizer("The capital of France is")["input_ids"]
    assert choice.logprobs is not None
    for entry in choice.logprobs:
        with torch.no_grad():
            expected = reference(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
        (token_id,) = tokenizer(entry["token"])["input_ids"]
        assert entry["logprob"] == pytest.approx(float(expected[token_id]), abs=1e-3)
        tops = sorted((top["logprob"] for top in entry["top_logprobs"]), reverse=True)
        assert tops == pytest.approx(expected.topk(2).values.tolist(), abs=1e-3)
        ids.append(token_id)


def test_echo_scores_a_text(engine: VllmEngine, run: Run, reference: Any, tokenizer: Any) -> None:
    text = "The capital of France is Paris."
    (choice,), usage = run(answered(engine, prompt=text, logprobs=1, echo=True, max_tokens=0))
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        scores = reference(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    assert choice.text == text
    assert usage == Usage(len(ids), 0)
    assert choice.logprobs is not None
    assert choice.logprobs[0]["logprob"] is None
    expected = [float(scores[place, token_id]) for place, token_id in enumerate(ids[1:])]
    assert [entry["logprob"] for entry in choice.logprobs[1:]] == pytest.approx(expected, abs=1e-3)


def test_token_ids_are_a_prompt_too(engine: VllmEngine, run: Run, tokenizer: Any) -> None:
    (by_text,), _ = run(answered(engine, prompt="Once upon a time"))
    (by_ids,), _ = run(answered(engine, prompt=tokenizer("Once upon a time")["input_ids"]))
    assert by_ids.text == by_text.text


def test_choices_seeds_and_company(engine: VllmEngine, run: Run) -> None:
    async def alone_and_together() -> None:
        options = {"temperature": 1.0, "max_tokens": 16}
        (alone,), _ = await answered(engine, seed=7, **options)
        together = await asyncio.gather(*(answered(engine, seed=seed, **options) for seed in (1, 7, 2, 3, 7, 4)))
        texts = [choices[0].text for choices, _ in together]
        assert texts[1] == texts[4] == alone.text
        assert len(set(texts)) == 5
        several, usage = await answered(engine, n=3, seed=7, **options)
        assert [choice.index for choice in several] == [0, 1, 2]
        assert len({choice.text for choice in several}) == 3
        assert usage.completion_tokens <= 48

    run(alone_and_together())


def test_stop_strings_end_the_answer_across_tokens(engine: VllmEngine, run: Run) -> None:
    (whole,), _ = run(answered(engine, max_tokens=20))
    stop = whole.text[8:13]
    (choice,), _ = run(answered(engine, max_tokens=20, stop=[stop]))
    assert (choice.text, choice.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")


def test_penalties_and_biases_are_honoured(engine: VllmEngine, run: Run, tokenizer: Any) -> None:
    (token_id,) = tokenizer(" Paris")["input_ids"]
    (choice,), _ = run(answered(engine, prompt="Say", logit_bias={str(token_id): 100}, max_tokens=3))
    assert choice.text == " Paris Paris Paris"
    (plain,), _ = run(answered(engine, prompt="1 1 1 1 1 1 1 1", max_tokens=24))
    (varied,), _ = run(answered(engine, prompt="1 1 1 1 1 1 1 1", max_tokens=24, frequency_penalty=2.0))
    assert varied.text != plain.text


def test_a_schema_is_kept(engine: VllmEngine, run: Run) -> None:
    schema = {
        "type": "object",
        "properties": {"capital": {"enum": ["Paris", "Rome"]}, "letters": {"type": "integer", "maximum": 9}},
        "required": ["capital", "letters"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    (choice,), _ = run(answered(engine, response_format=shape, max_tokens=60))
    said = json.loads(choice.text)
    assert said["capital"] in ("Paris", "Rome")
    assert isinstance(said["letters"], int)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": "x " * 9000}, "prompt", "context_length_exceeded"),
        ({"prompt": [504] * 8185}, "max_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x " * 9000}]}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x " * 4000}], "max_tokens": 6000}, "max_tokens", None),
        ({"prompt": [99_999_999]}, None, None),
        ({"logit_bias": {"99999999": 1.0}}, "logit_bias", None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}},
            None,
            None,
        ),
    ],
)
def test_what_cannot_be_is_a_bad_request(
    engine: VllmEngine, run: Run, body: dict[str, Any], param: str | None, code: str | None
) -> None:
    with pytest.raises(BadRequest) as caught:
        run(answered(engine, **body))
    assert caught.value.param == param
    if code:
        assert caught.value.code == code
        assert "8192" in caught.value.message
    assert engine.is_alive


def running_requests(engine: VllmEngine) -> float:
    with engine._server.client(timeout_s=10) as client:
        lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


def test_whoever_leaves_frees_a_slot_within_two_seconds(engine: VllmEngine, run: Run) -> None:
    async def leave() -> None:
        pieces: list[Choice] = []
        answer = asyncio.ensure_future(engine.answer(asked(max_tokens=4000, prompt="Count: 1, 2,"), 1, pieces.extend))
        while not pieces:
            await asyncio.sleep(0.01)
        answer.cancel()
        left = time.monotonic()
        while await asyncio.to_thread(running_requests, engine):
            assert time.monotonic() - left < 2
            await asyncio.sleep(0.05)

    run(leave())


def members(engine: VllmEngine) -> list[psutil.Process]:
    """The living processes of the server, as they were started."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == engine._server._process.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return sorted(found, key=lambda process: process.pid)


def test_weights_are_exchanged_faster_than_a_server_starts(
    engine: VllmEngine, backend: VllmBackend, folder: Path, run: Run, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for tensor in weights.values():
        tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    (other / MANIFEST).touch()  # a checkpoint's masters stay as they are where 32 bits are computed with
    (before,), _ = run(answered(engine))
    began = time.monotonic()
    assert backend.swap(engine, other, "other")
    took_s = time.monotonic() - began
    (changed,), _ = run(answered(engine, messages=CONVERSATION))
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    tokenizer = tokenizers.load(other)
    prompt = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert changed.text == tokenizer.decode(greedy(model, ids, 12), skip_special_tokens=True) != before.text
    assert backend.swap(engine, folder, NAME)
    (after,), _ = run(answered(engine))
    assert after.text == before.text
    assert took_s < 10
    (other / "generation_config.json").write_text("{}")
    assert not backend.swap(engine, other, "other"), "it would stop at other tokens"


@pytest.mark.parametrize("struck", ["server", "keeper"])
def test_a_server_that_dies_fails_its_requests_and_leaves_nothing(engine: VllmEngine, run: Run, struck: str) -> None:
    everybody = members(engine)
    assert len(everybody) >= 3
    keeper = engine._server._process.pid
    server = next(process for process in everybody if (process.pid == keeper) == (struck == "keeper"))

    async def die() -> AppError:
        pieces: list[Choice] = []
        answer = asyncio.ensure_future(engine.answer(asked(max_tokens=4000, prompt="Count: 1, 2,"), 1, pieces.extend))
        while not pieces:
            await asyncio.sleep(0.01)
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(Unavailable) as caught:
            await answer
        return caught.value

    assert run(die()).code == "engine_failed"
    wait_until(lambda: not members(engine))
    assert not engine.is_alive


def test_nothing_of_it_outlives_whoever_started_it(engine: VllmEngine) -> None:
    """As a kill -9 of the generator would, the end of the keeper's input ends all of it."""
    assert engine._server._process.stdin is not None
    assert engine._server.socket.exists()
    engine._server._process.stdin.close()
    wait_until(lambda: not members(engine))
    assert not engine._server.socket.parent.exists(), "not even its folder"


TEXT = "Bees live in colonies and feed on nectar and pollen. The capital of France is Paris."


def test_a_checkpoint_in_32_bits_is_served_as_its_passes_saw_it(
    vllm_settings: Settings, folder: Path, run: Run, tmp_path: Path
) -> None:
    """As the server loads it, and exchanged. Its masters are half a digit or less above the base's numbers in bf16."""
    bases = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    masters = {name: tensor.float() * (1 + 0.99 * 2**-9) for name, tensor in bases.items()}
    copies = {name: torch.empty_like(tensor) for name, tensor in bases.items()}
    for name, master in masters.items():
        assert torch.equal(master.bfloat16(), bases[name]), "rounded to nearest, nothing shows"
        rounding.copy(copies[name], master)
    contents = {"base": bases, "tuned": masters, "copies": copies}
    for name, tensors in contents.items():
        shutil.copytree(folder, tmp_path / name)
        weights = {key: tensor.float() for key, tensor in tensors.items()}
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "tuned" / MANIFEST).touch()

    def scores(engine: VllmEngine) -> list[float]:
        (choice,), _ = run(answered(engine, prompt=TEXT, logprobs=1, echo=True, max_tokens=0))
        assert choice.logprobs is not None
        return [entry["logprob"] for entry in choice.logprobs[1:]]

    backend = VllmBackend(vllm_settings.model_copy(update={"generation_dtype": "bfloat16"}))
    engine = backend.load(tmp_path / "tuned", "tuned", backend.plan(tmp_path / "tuned", "tuned"))
    try:
        loaded = scores(engine)
        found = {}
        for name in ("base", "copies", "tuned"):
            assert backend.swap(engine, tmp_path / name, name)
            found[name] = scores(engine)
    finally:
        engine.close()
    assert loaded == found["tuned"] == found["copies"] != found["base"]
