"""`make bench-serving`: tokens a second and the wait for the first one, through the whole service and on bare engines.

In turn, in one run, on the same weights: Anneal with each of its engines (one API process, one generator, a Valkey,
SQLite), and as yardsticks vLLM's own server (with the very options Anneal gives it) and `transformers serve` with
continuous batching. Clients: 1, 8 and 32 streams at once, each asking again as soon as its answer is complete; prompts
differ, answers are greedy and have 64 tokens (an answer that ends sooner counts with what it has).

    python -m benchmarks.serving [--sides anneal-transformers,anneal-vllm,vllm,transformers] [--out FILE]

vLLM's sides need ANNEAL_VLLM_PYTHON (`make setup-vllm`).
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

    url: str
    model: str
    uds: str | None = None


def main() -> int:
    options = _options()
    results: dict[str, Any] = {
        "command": "python -m benchmarks.serving " + " ".join(sys.argv[1:]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "model": MODEL,
        "max_tokens": MAX_TOKENS,
        "seconds_each": options.seconds,
        "rounds": options.rounds,
        "sides": {side: {} for side in options.sides},
    }
    with tempfile.TemporaryDirectory(prefix="anneal-bench-") as folder:
        for number in range(options.rounds):
            for side in options.sides:
                with _running(side, Path(folder) / f"{side}-{number}") as running:
                    for streams in options.streams:
                        found = _measure(running, streams, options.seconds)
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
def _running(side: str, folder: Path) -> Iterator[Side]:
    folder.mkdir()
    base = resolve(MODEL, Settings(data=folder.parent / "weights")).path
    if side.startswith("anneal-"):
        with service(side.removeprefix("anneal-"), folder) as url:
            yield Side(url, MODEL)
    elif side == "vllm":
        from worker.generation.vllm_engine import VllmBackend

        backend = VllmBackend(Settings(data=folder.parent / "vllm", **_serving_options()))
        engine = backend.load(base, MODEL, backend.plan(base, MODEL))
        try:
            yield Side("http://vllm", "model", str(engine._server.socket))
        finally:
            engine.close()
    else:
        with _transformers_serve(base) as url:
            yield Side(url, str(base))


def _serving_options() -> dict[str, Any]:
    return {"generation_slots": max(STREAMS), "vllm_python": os.environ.get("ANNEAL_VLLM_PYTHON")}


@contextmanager
def service(
    engine: str, folder: Path, processes: tuple[tuple[str, ...], ...] = PROCESSES, **variables: str
) -> Iterator[str]:
    """URL of an API that is up, with a generator of that engine behind it."""
    with ExitStack() as stack:
        source = stack.enter_context(databases("sqlite", durable=True))
        redis_url = stack.enter_context(running_valkey())
        port = _free_port()
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ANNEAL_")},
            "ANNEAL_DATA": str(folder / "data"),
            "ANNEAL_DATABASE_URL": source.fresh("bench", folder),
            "ANNEAL_REDIS_URL": redis_url,
            "ANNEAL_PORT": str(port),
            "ANNEAL_ENGINE": engine,
            "ANNEAL_GENERATION_SLOTS": str(max(STREAMS)),
            "ANNEAL_GENERATION_LOAD_WAIT_S": str(START_LIMIT_S),
            "ANNEAL_VLLM_PYTHON": os.environ.get("ANNEAL_VLLM_PYTHON", ""),
            "ANNEAL_LOG_LEVEL": "warning",
            **variables,
        }
        if not environment["ANNEAL_VLLM_PYTHON"]:
            del environment["ANNEAL_VLLM_PYTHON"]
        for command in processes:
            stack.enter_context(_process((sys.executable, "-m", "cli.main", *command), environment))
        url = f"http://127.0.0.1:{port}"
        _wait_for(f"{url}/health/live")
        yield url


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


def _measure(side: Side, streams: int, seconds: float) -> dict[str, Any]:
    """In a process of its own, as clients are."""
    with multiprocessing.get_context("spawn").Pool(1) as clients:
        return dict(clients.apply(_clients, (side, streams, seconds)))


def _clients(side: Side, streams: int, seconds: float) -> dict[str, Any]:
    return asyncio.run(_drive(side, streams, seconds))


async def _drive(side: Side, streams: int, seconds: float) -> dict[str, Any]:
    connector = aiohttp.UnixConnector(side.uds) if side.uds else aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await _ready(session, side)
        first_ms: list[float] = []
        gaps_ms: list[float] = []
        spans: list[tuple[float, float, int]] = []  # when each answer was asked for, when it was whole, its tokens
        until = 0.0

        async def one(number: int) -> None:
            tokens = 0
            asked_at = last_at = time.perf_counter()
            is_first = True
            async for made in _answer(session, side, number):
                at = time.perf_counter()
                if made.get("text"):
                    (first_ms if is_first else gaps_ms).append((at - (asked_at if is_first else last_at)) * 1000)
                    is_first, last_at = False, at
                tokens = made["tokens"] or tokens
            spans.append((asked_at, at, tokens))

        async def many(number: int) -> None:
            while time.perf_counter() < until:
                await one(number)
                number += streams

        await asyncio.gather(*(one(number) for number in range(streams)))  # warm-up
        first_ms.clear()
        gaps_ms.clear()
        spans.clear()
        cpu_before, began = time.process_time(), time.perf_counter()
        until = began + seconds
        await asyncio.gather(*(many(number) for number in range(streams)))
        spent_s = time.perf_counter() - began
        # Of an answer that was not whole in time, the share that was.
        tokens = sum(made * (min(ended, until) - asked) / (ended - asked) for asked, ended, made in spans)
        return {
            "answers": len(spans),
            "tokens_per_s": round(tokens / seconds, 1),
            "first_token_ms": _percentiles(first_ms),
            "between_texts_ms": _percentiles(gaps_ms),
            "client_cores": round((time.process_time() - cpu_before) / spent_s, 2),
        }


async def _ready(session: aiohttp.ClientSession, side: Side) -> None:
    """One whole answer: by then the model is loaded."""
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            async for _ in _answer(session, side, 0):
                pass
        except (aiohttp.ClientError, ValueError, OSError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.5)
        else:
            return


async def _answer(session: aiohttp.ClientSession, side: Side, number: int) -> Any:
    """Yields what each event brought: text or not, and with the usage the tokens of the answer so far."""
    question = f"Question {number}: write a long text about {SUBJECTS[number % len(SUBJECTS)]}, with many details."
    body = {
        "model": side.model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with session.post(f"{side.url}/v1/chat/completions", json=body) as response:
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
