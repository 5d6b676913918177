#!/usr/bin/env python3
"""Anneal's trainer beside others on the same work: tokens a second, time to a saved model, memory, losses.

    make bench-training                                                     on CPU, the tutorial's job
    python3 benchmarks/training.py --model FOLDER [--data alpaca.json] --out FILE       on whatever is there

Each contender runs in turn in a process of its own with a time limit, in rounds, so that a slow hour meets all of them.
Same data, model, batch, steps, seed, rate and schedule; the loss is taken over the answers.

    --workload tutorial   60 steps of 8 conversations as they are, 2e-4
    --workload packed     conversations put together: 16 rows of 2048 tokens a step on GPU, 4 of 512 on CPU
    --workload curve      Anneal alone: memory and speed against batch, length and gradient checkpointing

    anneal          python -m worker.training, every cache empty
    anneal-warm     the same with the caches of the run before; any contender may be followed by -warm
    anneal-standby  a trainer that has everything imported and then gets its job; its clock starts there
    unsloth         Unsloth's tutorial script: bf16 weights, its default on GPU; unsloth-fp32: 32-bit master weights
    unsloth-tuned   the same under the malloc and thread settings that Anneal's trainer is born with (CPU), so that what
                    is left is not theirs; so is unsloth-fp32-tuned
    trl             TRL's SFTTrainer with its defaults; trl-under-unsloth: the same after `import unsloth`;
                    trl-kept-under-unsloth: that without gradient checkpointing (CPU)
    llama-factory   in an environment of its own (make setup-llama-factory)
    compiled        a plain PyTorch loop, the whole model compiled, rows of one length (--workload packed, GPU)

Without --data the rows are made up, like Alpaca's in length. --model-shape makes a model with random weights and takes
the tokenizer of --model. Results are in --out after every run; --resume goes on where they end. Runs from a checkout
with torch and the contenders on the Python path, needs no installation of the project.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import processes, report, training_curve, training_result, training_rows
from benchmarks.contenders import DEFAULTS, WARM, Work, find, refusal

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MARGIN = 1.15
"""More rows than the steps need: packing leaves some over at the end."""
SHORT_STEPS = 8
"""Of a point of the curve."""


def main() -> int:
    args = options()
    with tempfile.TemporaryDirectory(prefix="anneal-bench-") as folder:
        scratch = Path(folder)
        args.model = base_model(args, scratch)
        bench = Bench(args, scratch)
        runs = bench.curve() if args.workload == "curve" else bench.rounds()
    print(training_curve.table(runs) if args.workload == "curve" else bench.verdict(), flush=True)
    return 0 if any(run["failure"] is None for run in runs) else 1


class Bench:
    """Runs contenders and keeps --out up to date."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self._args = args
        self._scratch = scratch
        self._runs = report.runs_of(args.out) if args.resume else []

    def rounds(self) -> list[dict[str, Any]]:
        args = self._args
        work = work_of(args, self._scratch)
        names = []
        for name in args.contenders:
            why = refusal(find(name)[0], packed=work.packed, on_gpu=args.on_gpu)
            if why is None:
                names.append(name)
            else:
                print(f"{name}: left out, {why}", flush=True)
        for number in range(1, args.runs + 1):
            for name in names:
                if not self._has(name, number):
                    self._one(name, number, work)
        return self._runs

    def curve(self) -> list[dict[str, Any]]:
        args = self._args
        for point in training_curve.points(args):
            name = training_curve.name(*point)
            for number in range(1, args.runs + 1):
                if self._has(name, number):
                    continue
                batch, length, _ = point
                rows = training_rows.make_rows(max(64, batch * args.steps), words=length + 8)
                data = training_rows.write_rows(rows, self._scratch / "long.json")
                caches, saved = self._scratch / "caches" / "curve", self._scratch / "saved"
                said = processes.run(
                    processes.trainer_command(),
                    caches=caches,
                    timeout_s=args.timeout,
                    spec=training_curve.told(point, args, data, caches, saved),
                    on_gpu=args.on_gpu,
                )
                self._ended(name, number, said, batch=batch, length=length, checkpointing=point[2])
        return self._runs

    def verdict(self) -> str:
        found = training_result.summaries(self._runs)
        device = report.device(self._runs) or "no device"
        text = [f"\nmedian (least to most) of {self._args.workload}, {device}", training_result.table(found)]
        differences = training_result.loss_differences(self._runs)
        return "\n".join([*text, *(training_result.difference(pair, gap) for pair, gap in differences.items())])

    def _one(self, name: str, number: int, work: Work) -> None:
        _, warm = find(name)
        caches = self._scratch / "caches" / name.removesuffix(WARM)
        if not warm:
            shutil.rmtree(caches, ignore_errors=True)
        elif not caches.exists():
            self._start(name, number, work, caches, priming=True)
        self._start(name, number, work, caches)

    def _start(self, name: str, number: int, work: Work, caches: Path, **notes: Any) -> None:
        saved = self._scratch / "saved"
        launch = find(name)[0].launch(work, caches, saved)
        said = processes.run(
            launch.command,
            caches=caches,
            timeout_s=self._args.timeout,
            spec=launch.spec,
            standby=launch.standby,
            on_gpu=self._args.on_gpu,
        )
        self._ended(name, number, said, **notes)

    def _ended(self, name: str, number: int, said: processes.Said, **notes: Any) -> None:
        shutil.rmtree(self._scratch / "saved", ignore_errors=True)
        run = {"contender": name, "round": number, **notes, **training_result.result(said, on_gpu=self._args.on_gpu)}
        self._runs.append(run)
        print(training_result.line(run), flush=True)
        if self._args.logs:
            self._args.logs.mkdir(parents=True, exist_ok=True)
            (self._args.logs / f"{name.replace(' ', '_').replace(',', '')}-{number}.stderr").write_text(said.stderr)
        self._write()

    def _write(self) -> None:
        is_curve = self._args.workload == "curve"
        report.write(
            self._args.out,
            "python3 benchmarks/training.py",
            self._runs,
            workload=self._args.workload,
            data=self._args.data.name if self._args.data else "made up (benchmarks/training_rows.py)",
            model=self._args.model_shape or self._args.model.name,
            summary={} if is_curve else training_result.summaries(self._runs),
            loss_differences={} if is_curve else training_result.loss_differences(self._runs),
        )

    def _has(self, name: str, number: int) -> bool:
        return any(run["contender"] == name and run["round"] == number and not run.get("priming") for run in self._runs)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=("tutorial", "packed", "curve"), default="tutorial")
    parser.add_argument("--model", type=Path, help="folder; without it SmolLM2-135M-Instruct from its package")
    parser.add_argument("--data", type=Path, help="Alpaca rows; without it they are made up")
    parser.add_argument("--contenders", type=lambda text: text.split(","), help="comma-separated")
    parser.add_argument("--runs", type=int, help="of each contender (3; of the curve's points 1)")
    parser.add_argument("--steps", type=int, help=f"60; of the curve's points {SHORT_STEPS}")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a process may take")
    parser.add_argument("--out", type=Path, help="where the numbers go, as JSON")
    parser.add_argument("--logs", type=Path, help="folder for what each process wrote to standard error")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are in --out, do the others")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--micro", type=int, help="conversations or rows a forward pass")
    parser.add_argument("--accumulation", type=int)
    parser.add_argument("--length", type=int, help="tokens a conversation may have, or of a packed row")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=3407)
    parser.add_argument("--checkpoints", action="store_true", help="Anneal publishes three checkpoints, its default")
    parser.add_argument("--model-shape", help="smollm2-1.7b, or another of benchmarks/random_model.py")
    parser.add_argument("--model-dtype", choices=("float32", "bfloat16"), default="float32", help="of --model-shape")
    curve = parser.add_argument_group("--workload curve")
    numbers = {"type": lambda text: [int(part) for part in text.split(",")]}
    curve.add_argument("--batches", **numbers, help="with --lengths: every pair of them")
    curve.add_argument("--lengths", **numbers)
    curve.add_argument("--grid", action="store_true", help="every batch with every length")
    curve.add_argument("--checkpointing", choices=("on", "off", "both"), default="both")
    curve.add_argument("--master-weights", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    args.on_gpu = processes.has_gpu() if args.device == "auto" else args.device == "gpu"
    is_curve = args.workload == "curve"
    args.runs = args.runs or (1 if is_curve else 3)
    args.steps = args.steps or (SHORT_STEPS if is_curve else 60)
    if not is_curve:
        args.contenders = args.contenders or DEFAULTS[args.workload, args.on_gpu].split(",")
        for name in args.contenders:
            try:
                find(name)
            except KeyError:
                parser.error(f"nobody is called {name}")
    return args


def work_of(args: argparse.Namespace, scratch: Path) -> Work:
    """What everyone does; the data is written."""
    packed = args.workload == "packed"
    micro, accumulation, length = 2, 4, 2048
    if packed:
        micro, accumulation, length = (16, 1, 2048) if args.on_gpu else (1, 4, 512)
    micro, accumulation = args.micro or micro, args.accumulation or accumulation
    length = args.length or length
    needed = int(args.steps * micro * accumulation * MARGIN)
    if packed:
        rows = training_rows.enough_rows(args.data, 1000, needed * length)
    else:
        rows = training_rows.enough_rows(args.data, max(needed, 1000 if args.data is None else 1), 0)
    data = training_rows.write_rows(rows, scratch / "rows.json")
    return Work(
        *(data, args.model, args.steps, micro, accumulation, length, args.rate, args.seed, packed, args.checkpoints)
    )


def base_model(args: argparse.Namespace, scratch: Path) -> Path:
    if args.model:
        model: Path = args.model.resolve()
    else:
        from shared.settings import Settings  # what the service itself uses; --model needs none of it
        from worker.base_models import resolve

        model = resolve(MODEL, Settings(data=scratch / "weights")).path
    if args.model_shape:
        target = scratch / args.model_shape
        make = [sys.executable, "-m", "benchmarks.random_model", "--shape", args.model_shape, "--like", str(model)]
        make += ["--dtype", args.model_dtype, "--out", str(target)]
        subprocess.run(make, check=True, env=processes.environment(scratch, on_gpu=False))
        return target
    return model


if __name__ == "__main__":
    sys.exit(main())
