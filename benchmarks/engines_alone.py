"""Tokens a second of an engine by itself: no service, no HTTP, no stream; so many answers at once.

    python -m benchmarks.engines_alone --engine vllm|transformers --model FOLDER [--streams 1,8,32,128,512]
                                       [--tokens 256] [--memory-gib 40] [--out FILE]

`vllm` runs `vllm.LLM` and must be called with the interpreter that has vLLM, `transformers` is the built-in engine
behind the protocol that the generator speaks to it. Answers are greedy, and vLLM's don't end early; the built-in
engine's end where the model does, which in this conversation is seldom. After a warm-up of the same size, three runs of
each; the number is the median's, all three beside it.
"""

import argparse
import asyncio
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUNS = 3
CONTEXT_TOKENS = 2048


def main() -> int:
    options = _options()
    generate = (_vllm if options.engine == "vllm" else _transformers)(options)
    results: dict[str, Any] = {
        "command": "python -m benchmarks.engines_alone " + " ".join(sys.argv[1:]),
        "machine": platform.machine(),
        "engine": options.engine,
        "streams": {},
    }
    for streams in options.streams:
        generate(streams)
        rates = []
        for _ in range(RUNS):
            began = time.perf_counter()
            tokens = generate(streams)
            rates.append(round(tokens / (time.perf_counter() - began), 1))
        results["streams"][streams] = {"tokens_per_s": statistics.median(rates), "runs": rates}
        print(f"{options.engine} alone, {streams} streams: {results['streams'][streams]}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines_alone", description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("vllm", "transformers"), required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument(
        "--streams", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32, 128, 512]
    )
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--memory-gib", type=int, default=40)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _messages(number: int) -> list[Any]:
    return [{"role": "user", "content": f"Question {number}: write a long text about the sea, with many details."}]


def _vllm(options: argparse.Namespace) -> Callable[[int], int]:
    from vllm import LLM, SamplingParams

    model = LLM(
        str(options.model),
        dtype="bfloat16",
        max_model_len=CONTEXT_TOKENS,
        max_num_seqs=max(options.streams),
        gpu_memory_utilization=0.01,
        kv_cache_memory_bytes=options.memory_gib * 2**29,
        disable_log_stats=True,
    )
    sampling = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)

    def generate(streams: int) -> int:
        outputs = model.chat([_messages(number) for number in range(streams)], sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def _transformers(options: argparse.Namespace) -> Callable[[int], int]:
    from shared.generation import GenerationRequest
    from shared.settings import Settings
    from worker.generation.transformers_engine import TransformersBackend

    settings = Settings(
        generation_memory_bytes=options.memory_gib * 2**30, generation_slots=max(options.streams), data=Path("unused")
    )
    backend = TransformersBackend(settings)
    engine = backend.load(options.model, "model", backend.plan(options.model, "model"))
    loop = asyncio.new_event_loop()

    async def answer(number: int) -> int:
        body = {"messages": _messages(number), "max_tokens": options.tokens, "temperature": 0.0, "top_p": 1.0, "n": 1}
        request = GenerationRequest(
            id=str(number),
            replies="",
            model="model",
            location="",
            endpoint="chat",
            body=body,
            deadline_s=600,
        )
        return (await engine.answer(request, 1, lambda pieces: None)).completion_tokens

    async def all_of(streams: int) -> int:
        return sum(await asyncio.gather(*(answer(number) for number in range(streams))))

    return lambda streams: loop.run_until_complete(all_of(streams))


if __name__ == "__main__":
    sys.exit(main())
