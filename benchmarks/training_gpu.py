#!/usr/bin/env python3
"""Our trainer against a plain Unsloth script with the same settings, in turn, each in a process of its own.

    python benchmarks/training_gpu.py --data alpaca.json --model FOLDER --out FOLDER [--timeout 280] [--steps 60]
                                      [--only ours,plain-fp32,plain-bf16]

    ours        python -m worker.training with the defaults (fp32 master weights)
    plain-fp32  benchmarks/plain_unsloth.py, the same
    plain-bf16  benchmarks/plain_unsloth.py with Unsloth's default, bf16 weights

Every process has compile caches of its own, so that none profits from the one before. Runs from a checkout, needs no
installation of the project. Writes OUT/training_gpu.json and each process's output; a process that fails or runs past
its time leaves its losses so far.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEADY_AFTER = 20
"""Steps left out of the steady rate: kernels are compiled and autotuned in them."""
RUNS = ("ours", "plain-fp32", "plain-bf16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--timeout", type=float, default=280, help="seconds a process may take")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", default=",".join(RUNS), help="comma-separated")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict = {
        "command": " ".join(sys.argv),
        "machine": {"python": platform.python_version(), "cpus": os.cpu_count()},
        "steps": args.steps,
        "runs": {},
    }
    for name in args.only.split(","):
        print(f"{name} ...", flush=True)
        result = run_ours(args) if name == "ours" else run_plain(args, name.removeprefix("plain-"), name)
        report["runs"][name] = {**summary(result["steps"]), **result}
        report["loss_differences"] = differences(report["runs"])
        (args.out / "training_gpu.json").write_text(json.dumps(report, indent=1))
        print(line(name, report["runs"][name]), flush=True)
    for pair, difference in report["loss_differences"].items():
        print(f"{pair}: {difference}", flush=True)


def run_ours(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory(prefix="anneal-bench-") as scratch:
        spec = {
            "job_id": "ftjob-benchmark",
            "base_model": args.model.name,
            "base_model_dir": str(args.model.resolve()),
            "training_file": str(args.data.resolve()),
            "checkpoint_dir": f"{scratch}/checkpoints",
            "work_dir": f"{scratch}/work",
            "training": {} if args.steps == 60 else {"max_steps": args.steps},
        }
        (Path(scratch) / "spec.json").write_text(json.dumps(spec))
        ended = process([sys.executable, "-m", "worker.training"], args, "ours", scratch, stdin="spec.json")
        messages = [json.loads(text) for text in (args.out / "ours.stdout").read_text().splitlines()]
    return ours_result(messages, ended)


def ours_result(messages: list[dict], ended: dict) -> dict:
    by_type: dict[str, list[dict]] = {}
    for message in messages:
        by_type.setdefault(message["type"], []).append(message)
    started = by_type.get("started", [{}])[0]
    metrics = by_type.get("metrics", [])
    steps = []
    before = 0
    for entry in metrics:
        tokens = entry["tokens"] - before
        before = entry["tokens"]
        steps.append(
            {
                "step": entry["step"],
                "loss": entry["loss"],
                "grad_norm": entry["grad_norm"],
                "tokens": tokens,
                "seconds": tokens / entry["tokens_per_second"],
            }
        )
    done = by_type.get("done", [{}])[0]
    return {
        **ended,
        "steps": steps,
        "training_s": done.get("elapsed_s"),
        "peak_memory_bytes": metrics[-1]["peak_memory_bytes"] if metrics else None,
        "device": started.get("device"),
        "versions": started.get("versions"),
        "resolved": started.get("resolved"),
        "failure": by_type.get("error", [{}])[0].get("message"),
    }


def run_plain(args: argparse.Namespace, master: str, name: str) -> dict:
    with tempfile.TemporaryDirectory(prefix="anneal-bench-") as scratch:
        out = Path(scratch) / "result.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "plain_unsloth.py")]
        command += ["--data", str(args.data.resolve()), "--model", str(args.model.resolve())]
        command += ["--out", str(out), "--steps", str(args.steps), "--master", master]
        ended = process(command, args, name, scratch)
        found = json.loads(out.read_text()) if out.exists() else {"steps": told_steps(args.out / f"{name}.stdout")}
    return {**ended, **found}


def told_steps(log: Path) -> list[dict]:
    """What an unfinished plain script said: `step 3 loss 1.2345 0.50 s`."""
    steps = []
    for text in log.read_text().splitlines():
        if text.startswith("step ") and text.endswith(" s"):
            _, step, _, loss, seconds, _ = text.split()
            steps.append({"step": int(step), "loss": float(loss), "tokens": None, "seconds": float(seconds)})
    return steps


def process(command: list[str], args: argparse.Namespace, name: str, scratch: str, stdin: str | None = None) -> dict:
    """Run to the end or the timeout; output goes to OUT/<name>.stdout and .stderr."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        "TRITON_CACHE_DIR": f"{scratch}/triton",
    }
    began = time.perf_counter()
    with (
        (args.out / f"{name}.stdout").open("wb") as stdout,
        (args.out / f"{name}.stderr").open("wb") as stderr,
        (Path(scratch) / stdin if stdin else Path(os.devnull)).open("rb") as source,
    ):
        child = subprocess.Popen(
            command, stdin=source, stdout=stdout, stderr=stderr, cwd=scratch, env=environment, start_new_session=True
        )
        try:
            status: int | str = child.wait(args.timeout)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            child.wait()
            status = "timeout"
    return {"status": status, "wall_s": time.perf_counter() - began}


def summary(steps: list[dict]) -> dict:
    """Rates over the time inside steps; the steady one leaves out the first steps (or half of a short run)."""
    if not steps or steps[0]["tokens"] is None:
        return {"tokens_per_second": None, "steady_tokens_per_second": None}
    skip = STEADY_AFTER if len(steps) > STEADY_AFTER else len(steps) // 2
    steady = steps[skip:]
    return {
        "tokens_per_second": rate(steps),
        "steady_tokens_per_second": rate(steady),
        "steady_ms_per_step": 1000 * sum(step["seconds"] for step in steady) / len(steady),
    }


def rate(steps: list[dict]) -> float:
    return sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)


def differences(runs: dict) -> dict:
    """Largest difference of losses of every pair of runs, over the steps both have."""
    names = list(runs)
    found = {}
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            pairs = list(zip(runs[one]["steps"], runs[other]["steps"], strict=False))
            if pairs:
                gaps = [abs(a["loss"] - b["loss"]) for a, b in pairs]
                found[f"{one} - {other}"] = {
                    "first": gaps[0],
                    "first_5_max": max(gaps[:5]),
                    "max": max(gaps),
                    "steps_compared": len(gaps),
                    "same_tokens": all(a["tokens"] == b["tokens"] for a, b in pairs),
                }
    return found


def line(name: str, run: dict) -> str:
    if not run["steps"]:
        return f"{name}: no step ended (status {run['status']}, {run['wall_s']:.0f} s); see {name}.stderr"
    steady = run.get("steady_tokens_per_second")
    memory = run.get("peak_memory_bytes")
    return (
        f"{name}: {len(run['steps'])} steps, status {run['status']}, {run['wall_s']:.0f} s in all, "
        f"loss {run['steps'][0]['loss']:.4f} -> {run['steps'][-1]['loss']:.4f}, "
        f"steady {'?' if steady is None else f'{steady:.0f}'} tokens/s, "
        f"peak {'?' if memory is None else f'{memory / 2**30:.2f}'} GiB"
    )


if __name__ == "__main__":
    main()
