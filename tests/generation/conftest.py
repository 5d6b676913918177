"""A tiny real model with a byte tokenizer, a generator in a thread, and the API in front of it."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM

from shared.generation import GENERATORS, PREFIX
from shared.settings import Settings, get_settings
from tests.waiting import LIMIT_S, wait_until
from worker.generation.loop import Generator

torch.set_num_threads(1)  # tiny products: more threads only wait for each other
CONTEXT = 256
TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ':' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


def make_tiny_model(folder: Path, seed: int = 0, *, layers: int = 2, context: int = CONTEXT) -> Path:
    """A Llama of some thousand random weights, one token a byte, in the layout of a checkpoint."""
    folder.mkdir(parents=True)
    specials = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(specials + letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(specials) + len(letters),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            eos_token_id=2,
            bos_token_id=1,
            pad_token_id=0,
            initializer_range=0.3,  # large enough that the next token is not nearly a coin toss
        )
    )
    model.generation_config.eos_token_id = 2
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ANNEAL_MODELS_DIR` points to: acme/tiny, acme/other, and acme/slow, which takes long for its answers."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_model(folder / "acme" / "tiny")
    make_tiny_model(folder / "acme" / "other", seed=1)
    make_tiny_model(folder / "acme" / "slow", layers=24, context=8192)
    return folder


@pytest.fixture
def database_url(sqlite_template: Path, tmp_path: Path) -> str:
    """Generation reads one row of the database; which kind it is, others test."""
    path = tmp_path / "anneal.db"
    path.write_bytes(sqlite_template.read_bytes())
    return f"sqlite:///{path}"


@pytest.fixture
def environment(request: pytest.FixtureRequest) -> dict[str, str]:
    """Further variables of the service; parametrize it indirectly."""
    return dict(getattr(request, "param", {}))


@pytest.fixture
def settings(
    settings: Settings,
    tiny_models: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    broker: redis.Redis,
) -> Settings:
    variables = {"ANNEAL_MODELS_DIR": str(tiny_models), "ANNEAL_GENERATION_DTYPE": "float32", **environment}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    return get_settings()


@pytest.fixture
def broker(valkey: str) -> Iterator[redis.Redis]:
    """The Valkey, without what an earlier test left of generation."""
    connection = redis.Redis.from_url(valkey)
    for key in connection.scan_iter(f"{PREFIX}*"):
        connection.delete(key)
    yield connection
    connection.close()


class RunningGenerator:
    """`worker generate` in a thread of the test's process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self.generator: Any = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.generator = Generator(self._settings)
        await self.generator.serve(self._stop)

    def start(self, broker: redis.Redis) -> "RunningGenerator":
        before = broker.zcard(GENERATORS)
        self._thread.start()
        wait_until(lambda: broker.zcard(GENERATORS) > before)
        return self

    def stop(self) -> None:
        if self._thread.is_alive():
            assert self._loop is not None
            assert self._stop is not None
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(LIMIT_S)
            assert not self._thread.is_alive(), "the generator did not stop"


@pytest.fixture
def start_generator(settings: Settings, broker: redis.Redis) -> Iterator[Callable[..., RunningGenerator]]:
    """Start a generator, with other settings if wanted; all are stopped at the end."""
    started: list[RunningGenerator] = []

    def start(**changes: Any) -> RunningGenerator:
        running = RunningGenerator(settings.model_copy(update=changes))
        started.append(running)
        return running.start(broker)

    yield start
    for running in started:
        running.stop()


@pytest.fixture
def generator(start_generator: Callable[..., RunningGenerator]) -> RunningGenerator:
    return start_generator()


@pytest.fixture
def sdk(server: str) -> Iterator[openai.OpenAI]:
    """The official SDK, pointed at the API."""
    with (
        httpx.Client() as http,
        openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, http_client=http, timeout=60) as client,
    ):
        yield client


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]
