#!/usr/bin/env python3
"""What a user of a running service feels, measured from outside: `anneal up`, the openai SDK, nothing else.

python benchmarks/service.py [--out FILE.json] [--repeats 20]

get_job_ms          GET of a job, one client, keep-alive
first_token_ms      chat completion, streamed: from the call to the first chunk with text, model loaded, one stream
tokens_per_second   the same streams, and eight at once (greedy, 64 tokens each)
api_rss_mib         resident memory of the API process afterwards
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = [{"role": "user", "content": "Explain in a few sentences why the sky is blue."}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="anneal-bench-") as folder:
        command = [sys.executable, "-m", "cli.main", "up", "--data", folder, "--port", "0"]
        up = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert up.stdout is not None
            url = up.stdout.readline().strip().rsplit(" ", 1)[-1]
            result = measure(url, args.repeats, up.pid)
        finally:
            up.terminate()
            up.wait(timeout=120)
    result["machine"] = {"cpus": os.cpu_count(), "processor": processor(), "python": platform.python_version()}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


def measure(url: str, repeats: int, pid: int) -> dict:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
    row = json.dumps({"prompt": "a", "completion": "b"}).encode()
    file = client.files.create(file=("a.jsonl", row), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id)
    client.fine_tuning.jobs.cancel(job.id)
    wait_until_ended(client, job.id)
    stream(client, 8)  # loads the model
    get_ms = time_gets(f"{url}/v1/fine_tuning/jobs/{job.id}", 500)
    singles = [stream(client, 64) for _ in range(repeats)]
    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        eight = list(pool.map(lambda _: stream(client, 64), range(8)))
    spent = time.perf_counter() - began
    return {
        "command": " ".join(["python", "benchmarks/service.py", *sys.argv[1:]]),
        "model": MODEL,
        "get_job_ms": percentiles(get_ms),
        "first_token_ms": percentiles([first * 1000 for first, _, _ in singles]),
        "tokens_per_second": {
            "1 stream": round(statistics.median(tokens / total for _, total, tokens in singles), 1),
            "8 streams": round(sum(tokens for _, _, tokens in eight) / spent, 1),
        },
        "first_token_ms_8_streams": percentiles([first * 1000 for first, _, _ in eight]),
        "api_rss_mib": round(api_process(pid).memory_info().rss / 2**20, 1),
    }


def wait_until_ended(client: openai.OpenAI, job_id: str) -> None:
    deadline = time.monotonic() + 120
    while client.fine_tuning.jobs.retrieve(job_id).status not in ("cancelled", "failed", "succeeded"):
        assert time.monotonic() < deadline, "the cancelled job did not end"
        time.sleep(0.5)


def stream(client: openai.OpenAI, max_tokens: int) -> tuple[float, float, int]:
    """(seconds to the first text, seconds in all, completion tokens)."""
    began = time.perf_counter()
    first = 0.0
    tokens = 0
    answer = client.chat.completions.create(
        model=MODEL,
        messages=PROMPT,
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in answer:
        if not first and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - began
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    return first, time.perf_counter() - began, tokens


def time_gets(url: str, count: int) -> list[float]:
    spent = []
    with httpx.Client() as client:
        for _ in range(count):
            began = time.perf_counter()
            client.get(url).raise_for_status()
            spent.append((time.perf_counter() - began) * 1000)
    return spent


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 2),
        "p95": round(ordered[int(0.95 * (len(ordered) - 1))], 2),
        "n": len(ordered),
    }


def api_process(up_pid: int) -> psutil.Process:
    children = psutil.Process(up_pid).children(recursive=True)
    return next(child for child in children if {"api"} & set(child.cmdline()) or "uvicorn" in " ".join(child.cmdline()))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
