"""`make bench-serving`: tokens a second and the wait for the first one, through the whole service and on bare engines.

In turn, in one run, on the same weights: Anneal with each of its engines (one API process, one generator, a Valkey,
SQLite), and as yardsticks vLLM's own server (with the very options Anneal gives it) and `transformers serve` with
continuous batching. Clients: 1, 8 and 32 streams at once, each asking again as soon as its answer is complete; prompts
differ, answers are greedy and have 64 tokens (an answer that ends sooner counts with what it has).

    python -m benchmarks.serving [--sides anneal-transformers,anneal-vllm,vllm,transformers] [--out FILE]

vLLM's sides need ANNEAL_VLLM_PYTHON (`make setup-vllm`). On a GPU, where one process can't ask for all that comes:

    python -m benchmarks.serving --streams 1,8,32,128,512 --max-tokens 256 --memory-gib 40 --clients 4 --apis 4 \
        --models-dir FOLDER
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from shared.settings import Settings
from tests.failpoints.services import databases, running_valkey
from worker.base_models import resolve

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
STREAMS = (1, 8, 32)
SECONDS = 20.0
MAX_TOKENS = 64
SIDES = ("anneal-transformers", "transformers", "anneal-vllm", "vllm")
SUBJECTS = ("the sea", "old maps", "bread", "bicycles", "clouds", "chess", "lighthouses", "bees", "glass", "rivers")
START_LIMIT_S = 300.0
PROCESSES = (("api",), ("worker", "generate"))


@dataclass(frozen=True)
class Side:
    """A server that is up: where, by which socket if not by TCP, and what the model is called there."""

    urls: tuple[str, ...]
    """Clients take turns at them."""
    model: str
    uds: str | None = None


@dataclass(frozen=True)
class Load:
    """What clients ask for."""

    streams: int
    seconds: float
    max_tokens: int
    processes: int
    """Client processes, which share the streams."""


@dataclass
class Found:
    """What one client process saw of its streams."""

    answers: int
    tokens: float
    """Within the time; of an answer that was not whole then, its share."""
    first_ms: list[float]
    gaps_ms: list[float]
    cores: float


def main() -> int:
    options = _options()
    results: dict[str, Any] = {
        "command": "python -m benchmarks.serving " + " ".join(sys.argv[1:]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "model": MODEL,
        "max_tokens": options.max_tokens,
        "seconds_each": options.seconds,
        "rounds": options.rounds,
        "sides": {side: {} for side in options.sides},
    }
    with tempfile.TemporaryDirectory(prefix="anneal-bench-") as folder:
        for number in range(options.rounds):
            for side in options.sides:
                with _running(side, Path(folder) / f"{side}-{number}", options) as running:
                    for streams in options.streams:
                        load = Load(streams, options.seconds, options.max_tokens, min(streams, options.clients))
                        found = _measure(running, load)
                        results["sides"][side].setdefault(str(streams), []).append(found)
                        print(f"{side}, {streams} streams: {json.dumps(found)}", flush=True)
    results["ratios"] = _ratios(results["sides"])
    print(json.dumps(results["ratios"], indent=1))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=lambda text: text.split(","), default=list(SIDES))
    parser.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default=list(STREAMS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each number of streams, warm-up apart")
    parser.add_argument("--rounds", type=int, default=1, help="how often every side has its turn")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="of each answer")
    parser.add_argument("--clients", type=int, default=1, help="client processes")
    parser.add_argument("--apis", type=int, default=1, help="API processes")
    parser.add_argument("--generators", type=int, default=1, help="generator processes")
    parser.add_argument("--memory-gib", type=int, default=4, help="ANNEAL_GENERATION_MEMORY_BYTES")
    parser.add_argument("--models-dir", type=Path, help="ANNEAL_MODELS_DIR, if the model is to come from there")
    parser.add_argument("--out", type=Path, help="where the numbers go, as JSON")
    return parser.parse_args()


def _ratios(sides: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of the whole service over those of the bare engine, by streams; medians of the rounds."""
    ratios: dict[str, Any] = {}
    for engine in ("transformers", "vllm"):
        through, bare = sides.get(f"anneal-{engine}", {}), sides.get(engine, {})
        for streams in through.keys() & bare.keys():
            pair = (statistics.median(one["tokens_per_s"] for one in runs[streams]) for runs in (through, bare))
            service, engine_alone = pair
            ratios.setdefault(f"anneal-{engine} / {engine}", {})[streams] = round(service / engine_alone, 3)
    return ratios


@contextmanager
def _running(side: str, folder: Path, options: argparse.Namespace) -> Iterator[Side]:
    folder.mkdir()
    base = resolve(MODEL, Settings(data=folder.parent / "weights", models_dir=options.models_dir)).path
    sizes: dict[str, Any] = {
        "generation_slots": max(options.streams),
        "generation_queue": max(256, *options.streams),
        "generation_memory_bytes": options.memory_gib * 2**30,
    }
    if side.startswith("anneal-"):
        processes = (*(("api",),) * options.apis, *(("worker", "generate"),) * options.generators)
        variables = {f"ANNEAL_{name.upper()}": str(value) for name, value in sizes.items()}
        if options.models_dir:
            variables["ANNEAL_MODELS_DIR"] = str(options.models_dir)
        with service(side.removeprefix("anneal-"), folder, processes, **variables) as urls:
            yield Side(urls, MODEL)
    elif side == "vllm":
        from worker.generation.vllm_engine import VllmBackend

        backend = VllmBackend(Settings(data=folder.parent / "vllm", **sizes))
        engine = backend.load(base, MODEL, backend.plan(base, MODEL))
        try:
            yield Side(("http://vllm",), "model", str(engine._server.socket))
        finally:
            engine.close()
    else:
        with _transformers_serve(base) as url:
            yield Side((url,), str(base))


@contextmanager
def service(
    engine: str, folder: Path, processes: tuple[tuple[str, ...], ...] = PROCESSES, **variables: str
) -> Iterator[tuple[str, ...]]:
    """URLs of APIs that are up, with generators of that engine behind them."""
    with ExitStack() as stack:
        source = stack.enter_context(databases("sqlite", durable=True))
        redis_url = stack.enter_context(running_valkey())
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ANNEAL_")},
            "ANNEAL_DATA": str(folder / "data"),
            "ANNEAL_DATABASE_URL": source.fresh("bench", folder),
            "ANNEAL_REDIS_URL": redis_url,
            "ANNEAL_ENGINE": engine,
            "ANNEAL_GENERATION_SLOTS": str(max(STREAMS)),
            "ANNEAL_GENERATION_LOAD_WAIT_S": str(START_LIMIT_S),
            "ANNEAL_PINNED_MODELS": json.dumps([MODEL]),  # every generator is to have it before anybody measures
            **{name: os.environ[name] for name in ("ANNEAL_VLLM_PYTHON", "ANNEAL_VLLM_OPTIONS") if name in os.environ},
            "ANNEAL_LOG_LEVEL": "warning",
            **variables,
        }
        urls = []
        for command in processes:
            port = _free_port()
            stack.enter_context(
                _process((sys.executable, "-m", "cli.main", *command), {**environment, "ANNEAL_PORT": str(port)})
            )
            if command == ("api",):
                urls.append(f"http://127.0.0.1:{port}")
        for url in urls:
            _wait_for(f"{url}/health/live")
        yield tuple(urls)


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@contextmanager
def _transformers_serve(base: Path) -> Iterator[str]:
    port = _free_port()
    command = (
        *(str(Path(sys.executable).with_name("transformers")), "serve", str(base), "--continuous-batching"),
        *("--cb-block-size", "64", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "512", "--dtype", "bfloat16"),
        *("--attn-implementation", "sdpa", "--host", "127.0.0.1", "--port", str(port)),
    )
    with _process(command, {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _process(command: tuple[str, ...], environment: dict[str, str]) -> Iterator[None]:
    process = subprocess.Popen(command, env=environment)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _measure(side: Side, load: Load) -> dict[str, Any]:
    """In processes of their own, as clients are, which begin together."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(load.processes)
    with context.Pool(load.processes, _begin_with, (barrier,)) as clients:
        shares = [range(number, load.streams, load.processes) for number in range(load.processes)]
        found: list[Found] = clients.starmap(_clients, [(side, load, share) for share in shares], chunksize=1)
    return {
        "answers": sum(one.answers for one in found),
        "tokens_per_s": round(sum(one.tokens for one in found) / load.seconds, 1),
        "first_token_ms": _percentiles([value for one in found for value in one.first_ms]),
        "between_texts_ms": _percentiles([value for one in found for value in one.gaps_ms]),
        "client_cores": round(sum(one.cores for one in found), 2),
    }


def _begin_with(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


_barrier: Any = None
"""Of this client process and its siblings."""


def _clients(side: Side, load: Load, share: range) -> Found:
    return asyncio.run(_drive(side, load, share))


async def _drive(side: Side, load: Load, share: range) -> Found:
    connector = aiohttp.UnixConnector(side.uds, limit=0) if side.uds else aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2**18) as session:
        await _ready(session, side)
        first_ms: list[float] = []
        gaps_ms: list[float] = []
        spans: list[tuple[float, float, int]] = []  # when each answer was asked for, when it was whole, its tokens
        until = 0.0

        async def one(number: int) -> None:
            tokens = 0
            asked_at = last_at = time.perf_counter()
            is_first = True
            async for made in _answer(session, side, number, load.max_tokens):
                at = time.perf_counter()
                if made.get("text"):
                    (first_ms if is_first else gaps_ms).append((at - (asked_at if is_first else last_at)) * 1000)
                    is_first, last_at = False, at
                tokens = made["tokens"] or tokens
            spans.append((asked_at, at, tokens))

        async def many(number: int) -> None:
            while time.perf_counter() < until:
                await one(number)
                number += load.streams

        await asyncio.gather(*(one(number) for number in share))  # warm-up
        first_ms.clear()
        gaps_ms.clear()
        spans.clear()
        await asyncio.to_thread(_barrier.wait)
        cpu_before, began = time.process_time(), time.perf_counter()
        until = began + load.seconds
        await asyncio.gather(*(many(number) for number in share))
        spent_s = time.perf_counter() - began
        tokens = sum(made * (min(ended, until) - asked) / (ended - asked) for asked, ended, made in spans)
        return Found(len(spans), tokens, first_ms, gaps_ms, (time.process_time() - cpu_before) / spent_s)


async def _ready(session: aiohttp.ClientSession, side: Side) -> None:
    """One whole answer: by then the model is loaded."""
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            async for _ in _answer(session, side, 0, MAX_TOKENS):
                pass
        except (aiohttp.ClientError, ValueError, OSError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.5)
        else:
            return


async def _answer(session: aiohttp.ClientSession, side: Side, number: int, max_tokens: int) -> Any:
    """Yields what each event brought: text or not, and with the usage the tokens of the answer so far."""
    question = f"Question {number}: write a long text about {SUBJECTS[number % len(SUBJECTS)]}, with many details."
    body = {
        "model": side.model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with session.post(f"{side.urls[number % len(side.urls)]}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise ValueError(f"{response.status}: {await response.text()}")
        rest = b""
        async for content in response.content.iter_any():
            *events, rest = (rest + content).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in events:
                if not event.startswith(b"data: {"):
                    continue
                data = json.loads(event.removeprefix(b"data: "))
                if "error" in data:
                    raise ValueError(str(data["error"]))
                text = any((choice["delta"].get("content") or "") for choice in data["choices"])
                usage = data.get("usage") or {}
                yield {"text": text, "tokens": usage.get("completion_tokens", 0)}


def _percentiles(values_ms: list[float]) -> dict[str, float]:
    if len(values_ms) < 2:
        return {"p50": round(values_ms[0], 1)} if values_ms else {}
    hundredths = statistics.quantiles(values_ms, n=100)
    return {f"p{number}": round(hundredths[number - 1], 1) for number in (50, 95, 99)}


if __name__ == "__main__":
    sys.exit(main())
