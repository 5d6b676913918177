"""What a batch costs those who wait: a live client's latencies without and with a batch at work on the same generator.

One client asks for answers of 32 tokens, one after the other, with a pause between them as people make; then a batch
of some thousand lines is created, and once it is under way the same again.

    python -m benchmarks.batch_beside_live [--engine transformers|vllm] [--seconds 60] [--out FILE]
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai

from benchmarks.serving import MODEL, service

LINES = 3000
MOST_RATIO = 1.5


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_beside_live", description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="transformers", choices=("transformers", "vllm"))
    parser.add_argument("--seconds", type=float, default=60, help="of each of the two parts")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="anneal-bench-") as name:
        processes = (("api",), ("worker", "generate"), ("worker", "batch"))
        with service(options.engine, Path(name), processes, ANNEAL_GENERATION_SLOTS="8") as (url,):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
            _ask(client, 0)
            idle = _live(client, options.seconds)
            batch = _begin_batch(client)
            beside = _live(client, options.seconds)
            done = client.batches.retrieve(batch.id).request_counts
            client.batches.cancel(batch.id)
    ratio = round(beside["p95_ms"] / idle["p95_ms"], 3)
    result = {
        "command": "python -m benchmarks.batch_beside_live " + " ".join(sys.argv[1:]),
        "machine": f"{os.cpu_count()} cores",
        "idle": idle,
        "beside_a_batch": beside,
        "p95_ratio": ratio,
        "at_most": MOST_RATIO,
        "lines_answered_meanwhile": None if done is None else done.completed,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if ratio <= MOST_RATIO else 1


def _ask(client: openai.OpenAI, number: int) -> None:
    question: Any = [{"role": "user", "content": f"Write about the number {number}, with many details."}]
    client.chat.completions.create(model=MODEL, messages=question, max_tokens=32, temperature=0)


def _live(client: openai.OpenAI, seconds: float) -> dict[str, Any]:
    draw, until, latencies_ms = random.Random(1), time.monotonic() + seconds, []
    while time.monotonic() < until:
        began = time.perf_counter()
        _ask(client, draw.randrange(10**6))
        latencies_ms.append((time.perf_counter() - began) * 1000)
        time.sleep(draw.uniform(0, 1))
    hundredths = statistics.quantiles(latencies_ms, n=100)
    return {"answers": len(latencies_ms), "p50_ms": round(hundredths[49]), "p95_ms": round(hundredths[94])}


def _begin_batch(client: openai.OpenAI) -> Any:
    rows = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": MODEL,
                "messages": [{"role": "user", "content": f"Tell a long story about {number} ships."}],
                "max_tokens": 64,
            },
        }
        for number in range(LINES)
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = client.files.create(file=("lines.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    while not (counts := client.batches.retrieve(batch.id).request_counts) or not counts.completed:
        time.sleep(0.5)
    return batch


if __name__ == "__main__":
    sys.exit(main())
