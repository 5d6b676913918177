#!/usr/bin/env python3
"""`make bench-precision`: does keeping 32-bit weights and computing in bf16 learn what 32 bits learn?

Anneal's trainer on the same rows in the same order, 200 steps at 2e-5 and at 2e-4, each a process of its own:

    default       fp32 master weights, bf16 products; on a GPU 8-bit AdamW
    adamw         the same with AdamW in 32 bits, which on CPU is the default
    fp32          32 bits throughout: `training.precision: fp32`, which is for CPUs; on a GPU TRL's trainer on
                  transformers' model, 8 conversations a pass, AdamW in 32 bits
    bf16-master   weights kept in bf16 too (`training.master_weights: bf16`)
    seed          the default with another seed, so other rows in each step: how far two runs are apart anyway
    untrained     one step with next to no learning rate, once: the loss before any training

Compared is the loss over rows that nobody trains on, before the differences of training losses, which are noisier.

    python benchmarks/precision.py [--model FOLDER] [--data alpaca.json] [--steps 200] [--rates 2e-5,2e-4] [--out FILE]
                                   [--only default,adamw,fp32,bf16-master,seed,untrained] [--resume]
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import processes, training_result, training_rows
from benchmarks.contenders import Launch, Work, rival, spec
from benchmarks.training import base_model, command, processor

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "adamw": {"optimizer": "adamw"},
    "fp32": {"precision": "fp32"},
    "bf16-master": {"master_weights": "bf16"},
    "seed": {},
}
SEED, OTHER_SEED = 3407, 3408
HELD_OUT = 100
EVALUATIONS = 5
UNTRAINED, UNTRAINED_RATE = "untrained", 1e-12


def main() -> int:
    args = options()
    with tempfile.TemporaryDirectory(prefix="anneal-bench-") as folder:
        scratch = Path(folder)
        args.model = base_model(args, scratch)
        bench = Bench(args, scratch)
        bench.run()
        print(bench.verdict(), flush=True)
    return 0 if any(run["failure"] is None for run in bench.runs) else 1


class Bench:
    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self._args = args
        self._scratch = scratch
        self.runs: list[dict[str, Any]] = []
        if args.resume and args.out and args.out.exists():
            self.runs = json.loads(args.out.read_text())["runs"]

    def run(self) -> None:
        args = self._args
        needed = args.steps * args.batch + HELD_OUT
        rows = training_rows.read_rows(args.data) if args.data else training_rows.make_rows(needed)
        train = training_rows.write_rows(rows[:-HELD_OUT], self._scratch / "train.json")
        valid = training_rows.write_rows(rows[-HELD_OUT:], self._scratch / "valid.json")
        planned = [(name, rate) for rate in args.rates for name in args.only if name != UNTRAINED]
        planned += [(UNTRAINED, UNTRAINED_RATE)] * (UNTRAINED in args.only)
        for name, rate in planned:
            if any(run["variant"] == name and run["rate"] == rate for run in self.runs):
                continue
            steps = 1 if name == UNTRAINED else args.steps
            seed = OTHER_SEED if name == "seed" else SEED
            work = Work(train, args.model, steps, 2, args.batch // 2, args.length, rate, seed, packed=False)
            caches, saved = self._scratch / "caches", self._scratch / "saved"
            if name == "fp32" and args.on_gpu:
                launch = rival("trl_script.py", "--pure", "--valid", str(valid))(whole(work), caches, saved)
            else:
                told = spec(work, caches, saved, eval_steps=max(1, steps // EVALUATIONS), **VARIANTS.get(name, {}))
                launch = Launch(processes.trainer_command(), {**told, "validation_file": str(valid)})
            said = processes.run(
                launch.command, caches=caches, timeout_s=args.timeout, spec=launch.spec, on_gpu=args.on_gpu
            )
            shutil.rmtree(saved, ignore_errors=True)
            run = {"variant": name, "rate": rate, **training_result.result(said, on_gpu=args.on_gpu)}
            self.runs.append(run)
            print(line(run), flush=True)
            if args.out:
                self._write(args.out)

    def comparisons(self) -> list[dict[str, Any]]:
        return [found for rate in self._args.rates if (found := compared(self.runs, rate))]

    def verdict(self) -> str:
        text = []
        for found in self.comparisons():
            text.append(f"\nlearning rate {found['rate']:g}, held-out loss before {shown(found['before'])}")
            for name, one in found["variants"].items():
                text.append(
                    f"  {name:12} held-out {shown(one['held_out'])}, {shown(one['minus_reference'], '+.4f')} from "
                    f"{found['reference']}; training losses differ by {shown(one['mean_gap'])} on average, "
                    f"{shown(one['largest_gap'])} at most"
                )
        return "\n".join(text)

    def _write(self, out: Path) -> None:
        report = {
            "command": command("python benchmarks/precision.py"),
            "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "machine": {"cpus": os.cpu_count(), "processor": processor(), "python": platform.python_version()},
            "device": next((run["device"] for run in self.runs if run["device"]), None),
            "data": self._args.data.name if self._args.data else "made up (benchmarks/training_rows.py)",
            "model": self._args.model_shape or self._args.model.name,
            "comparisons": self.comparisons(),
            "runs": self.runs,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        new = out.with_name(out.name + ".new")
        new.write_text(json.dumps(report, indent=1) + "\n")
        new.replace(out)


def whole(work: Work) -> Work:
    """A step in one pass: the same gradients, sooner."""
    return replace(work, micro=work.batch, accumulation=1)


def compared(runs: list[dict[str, Any]], rate: float) -> dict[str, Any] | None:
    """Every variant at this rate beside pure fp32, or beside the default where there is no fp32 run."""
    whole = {run["variant"]: run for run in runs if run["rate"] == rate and run["failure"] is None}
    if not whole:
        return None
    reference = next((name for name in ("fp32", "default") if name in whole), next(iter(whole)))
    untrained = next((run for run in runs if run["variant"] == UNTRAINED), None)
    variants = {}
    for name, run in whole.items():
        gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(run["steps"], whole[reference]["steps"], strict=False)]
        variants[name] = {
            "held_out": held_out(run),
            "minus_reference": minus(held_out(run), held_out(whole[reference])),
            "curve": run["evaluations"],
            "same_rows": [s["tokens"] for s in run["steps"]] == [s["tokens"] for s in whole[reference]["steps"]],
            "mean_gap": sum(gaps) / len(gaps),
            "largest_gap": max(gaps),
        }
    failures = {run["variant"]: run["failure"] for run in runs if run["rate"] == rate and run["failure"] is not None}
    before = held_out(untrained) if untrained else None
    return {"rate": rate, "reference": reference, "before": before, "variants": variants, "failures": failures}


def held_out(run: dict[str, Any]) -> float | None:
    return run["evaluations"][-1]["loss"] if run["evaluations"] else None


def minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def line(run: dict[str, Any]) -> str:
    name = f"{run['variant']}, {run['rate']:g}"
    if run["failure"] is not None:
        return f"{name}: {len(run['steps'])} steps, then {run['failure'].strip().splitlines()[-1][:200]}"
    return f"{name}: {len(run['steps'])} steps in {run['wall_s']:.0f} s, held-out loss {shown(held_out(run))}"


def shown(number: float | None, form: str = ".4f") -> str:
    return "?" if number is None else f"{number:{form}}"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder; without it SmolLM2-135M-Instruct from its package")
    parser.add_argument("--model-shape", help="random weights, another of benchmarks/random_model.py")
    parser.add_argument("--model-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--data", type=Path, help=f"Alpaca rows, the last {HELD_OUT} are held out; or they are made up")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="conversations a step, an even number")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rates", type=lambda text: [float(part) for part in text.split(",")], default=[2e-5, 2e-4])
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"of {', '.join(VARIANTS)}, {UNTRAINED}")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds a process may take")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the runs that are in --out, do the others")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    args = parser.parse_args()
    args.on_gpu = processes.has_gpu() if args.device == "auto" else args.device == "gpu"
    # On CPU `adamw` is the default itself.
    args.only = args.only or [name for name in (*VARIANTS, UNTRAINED) if args.on_gpu or name != "adamw"]
    if unknown := set(args.only) - {*VARIANTS, UNTRAINED}:
        parser.error(f"no variant is called {', '.join(sorted(unknown))}")
    return args


if __name__ == "__main__":
    sys.exit(main())
