#!/usr/bin/env python3
"""The demo's training with several seeds: how many held-out tickets each model has right, and how long it took.

`anneal demo` trains once and tells one number. This trains with the same choices, or others, once a seed, without the
service around it, and asks each model for the most likely answer to every ticket of the test split.

    python benchmarks/tickets.py --steps N [--model FOLDER] [--seeds 3407,1,2] [--batch N] [--rate R] [--out FILE]
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import processes, report, training_result
from benchmarks.contenders import Work, spec
from benchmarks.training import base_model
from cli.demo.scoring import Score, score

TICKETS = processes.ROOT / "examples" / "tickets"
ANSWER_TOKENS = 40
AT_ONCE = 60
"""Tickets a batch of generation."""


def main() -> int:
    args = options()
    with tempfile.TemporaryDirectory(prefix="anneal-bench-") as folder:
        scratch = Path(folder)
        args.model = base_model(args, scratch)
        runs: list[dict[str, Any]] = []
        for seed in args.seeds:
            trial(args, scratch, seed, runs)
    exact = [run["score"]["exact"] for run in runs if run["score"]]
    if exact:
        print(f"right: median {statistics.median(exact)}, {min(exact)} to {max(exact)} over {len(exact)} seeds")
    return 0 if len(exact) == len(args.seeds) else 1


def trial(args: argparse.Namespace, scratch: Path, seed: int, runs: list[dict[str, Any]]) -> None:
    """Train and ask; what is found is added to the runs, and is in --out at once."""
    saved, caches = scratch / f"saved-{seed}", scratch / f"caches-{seed}"
    work = Work(args.data / "train.jsonl", args.model, args.steps, args.batch, 1, 2048, args.rate, seed, packed=False)
    choices = {"micro_batch_size": args.batch, "eval_steps": args.steps, **args.training}
    told = {**spec(work, caches, saved, **choices), "validation_file": str(args.data / "validation.jsonl")}
    said = processes.run(
        processes.trainer_command(), caches=caches, timeout_s=args.timeout, spec=told, on_gpu=args.on_gpu
    )
    run = {"seed": seed, "score": None, **training_result.result(said, on_gpu=args.on_gpu)}
    runs.append(run)
    keep(args, runs)
    if run["failure"] is None:
        tickets = [json.loads(line)["messages"] for line in (args.data / "test.jsonl").read_text().splitlines()]
        wanted = [json.loads(messages[-1]["content"]) for messages in tickets]
        answers = ask(saved / str(args.steps), [messages[:-1] for messages in tickets], args.on_gpu)
        run["score"] = asdict(score(zip(answers, wanted, strict=True)))
        run["wrong"] = wrong(tickets, answers, wanted) if args.show_wrong else []
        keep(args, runs)
    shutil.rmtree(saved, ignore_errors=True)
    print(line(run), flush=True)


def keep(args: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    choices = {"steps": args.steps, "batch": args.batch, "learning_rate": args.rate, **args.training}
    report.write(args.out, "python benchmarks/tickets.py", runs, choices=choices)


def ask(folder: Path, conversations: Sequence[Sequence[Mapping[str, str]]], on_gpu: bool) -> list[str]:
    """The most likely answers of a saved model, in 32 bits; by a process of its own, whose memory goes with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_answers, folder, conversations, on_gpu).result()


def _answers(folder: Path, conversations: Sequence[Sequence[Mapping[str, str]]], on_gpu: bool) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to("cuda" if on_gpu else "cpu")
    answers = []
    for at in range(0, len(conversations), AT_ONCE):
        some = [list(conversation) for conversation in conversations[at : at + AT_ONCE]]
        texts = tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        made = model.generate(**encoded, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(made[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def wrong(tickets: Sequence[Any], answers: Sequence[str], wanted: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    pairs = zip(tickets, answers, wanted, strict=True)
    return [
        {"ticket": messages[-2]["content"], "answer": answer, "wanted": right}
        for messages, answer, right in pairs
        if not score([(answer, right)]).exact
    ]


def line(run: Mapping[str, Any]) -> str:
    if run["score"] is None:
        return f"seed {run['seed']}: {run['failure']}"
    found = Score(**run["score"])
    keys = ", ".join(f"{key} {count}" for key, count in found.right.items())
    return (
        f"seed {run['seed']}: {found.exact} of {found.tickets} right ({keys}), {run['saved_s']:.0f} s to the model, "
        f"first step after {run['first_step_s']:.0f} s, {run['steady_ms_per_step']:.0f} ms a step, "
        f"held-out loss {run['evaluations'][-1]['loss']:.4f}"
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder; without it SmolLM2-135M-Instruct from its package")
    parser.add_argument("--data", type=Path, default=TICKETS, help="folder with train, validation and test.jsonl")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[3407])
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--training", type=json.loads, default={}, help="more of the trainer's choices, as JSON")
    parser.add_argument("--show-wrong", action="store_true", help="keep the answers that were wrong in --out")
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    args = parser.parse_args()
    args.on_gpu = processes.has_gpu() if args.device == "auto" else args.device == "gpu"
    args.model_shape = None
    return args


if __name__ == "__main__":
    sys.exit(main())
