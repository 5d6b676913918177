"""How much faster several GPUs train than one: tokens a second of `training.gpus` 1, 2, 4 …, and the ratios.

    python3 benchmarks/scaling.py --model FOLDER [--gpus 1,2] [--sharding on] --out FILE

Packed rows of 2048 tokens, 16 of them a step for each GPU, so that a GPU has the same to do whatever their number. The
numbers take turns, in rounds, each run in a process of its own. The rate is the median step's, the first 20 left out:
in so few steps the mean tells how many graphs were still recorded, which is the rows' doing (each step's time is in
--out). Evaluation and checkpoints there are none but the one at the end. The first step's losses differ, because the
batches do. Where there is no GPU, as many processes share the CPU, with rows of 512 tokens, which shows that it works
and no speed.

Runs from a checkout with torch and Unsloth on the Python path, needs no installation of the project.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import contenders, processes, report, training_result, training_rows
from benchmarks.training import MARGIN, base_model

ROWS_A_GPU = 16


def main() -> int:
    args = options()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="anneal-bench-") as folder:
        scratch = Path(folder)
        args.model = base_model(args, scratch)
        most = max(args.gpus) * args.rows
        needed = int(args.steps * most * MARGIN)
        rows = training_rows.enough_rows(args.data, 1000, needed * args.length)
        data = training_rows.write_rows(rows, scratch / "rows.json")
        for number in range(1, args.runs + 1):
            for gpus in args.gpus:
                runs.append(one(args, gpus, number, data, scratch))
                report.write(args.out, "python3 benchmarks/scaling.py", runs, ratios=ratios(runs))
    print("\n" + table(runs, args.rows), flush=True)
    return 0 if all(run["failure"] is None for run in runs) else 1


def one(args: argparse.Namespace, gpus: int, number: int, data: Path, scratch: Path) -> dict[str, Any]:
    caches, saved = scratch / "caches", scratch / "saved"
    work = contenders.Work(
        *(data, args.model, args.steps, args.rows * gpus, 1, args.length, args.rate, args.seed), packed=True
    )
    choices = {"sharding": args.sharding} if gpus > 1 else {}
    if args.optimizer:
        choices["optimizer"] = args.optimizer
    said = processes.run(
        processes.trainer_command(),
        caches=caches,
        timeout_s=args.timeout,
        spec=contenders.spec(work, caches, saved, gpus=gpus, **choices),
        on_gpu=args.on_gpu,
        gpus=gpus,
    )
    shutil.rmtree(saved, ignore_errors=True)
    run = {
        "contender": f"{gpus} GPU{'s' if gpus > 1 else ''}" if args.on_gpu else f"{gpus} on CPU",
        "gpus": gpus,
        "round": number,
        **training_result.result(said, on_gpu=args.on_gpu),
    }
    print(training_result.line(run), flush=True)
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
        (args.logs / f"{gpus}-{number}.stderr").write_text(said.stderr)
    return run


def ratios(runs: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """By number of GPUs: tokens/s of the median step, the runs' median, and that over the smallest number's."""
    rates: dict[int, list[float]] = {}
    for run in runs:
        if run["failure"] is None:
            rates.setdefault(run["gpus"], []).append(training_result.median_rate(run["steps"]))
    medians = {gpus: statistics.median(found) for gpus, found in sorted(rates.items())}
    return {gpus: {"rate": rate, "ratio": round(rate / medians[min(medians)], 3)} for gpus, rate in medians.items()}


def table(runs: list[dict[str, Any]], rows: int) -> str:
    lines = [f"{'GPUs':>4}  {'rows a step':>11}  {'tokens/s':>10}  {'ratio':>6}  {'of the ideal':>12}"]
    found = ratios(runs)
    for gpus, one in found.items():
        ideal = one["ratio"] * min(found) / gpus
        lines.append(f"{gpus:>4}  {rows * gpus:>11}  {one['rate']:>10.0f}  {one['ratio']:>6.2f}  {ideal:>12.0%}")
    lines += [f"{run['contender']}, run {run['round']} failed: {run['failure']}" for run in runs if run["failure"]]
    return "\n".join(lines)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    parser.add_argument("--sharding", choices=("auto", "on", "off"), default="auto", help="of several GPUs")
    parser.add_argument("--optimizer", choices=("adamw", "adamw_8bit"), help="shards have adamw whatever is said")
    parser.add_argument("--model", type=Path, help="folder; without it SmolLM2-135M-Instruct from its package")
    parser.add_argument("--data", type=Path, help="Alpaca rows; without it they are made up")
    parser.add_argument("--runs", type=int, default=3, help="of each number of GPUs")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, help=f"a step for each GPU ({ROWS_A_GPU}; on CPU 2)")
    parser.add_argument("--length", type=int, help="tokens of a row (2048; on CPU 512)")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=3407)
    parser.add_argument("--timeout", type=float, default=900, help="seconds a run may take")
    parser.add_argument("--out", type=Path, help="where the numbers go, as JSON")
    parser.add_argument("--logs", type=Path, help="folder for what each run wrote to standard error")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--model-shape", help="smollm2-1.7b, or another of benchmarks/random_model.py")
    parser.add_argument("--model-dtype", choices=("float32", "bfloat16"), default="float32", help="of --model-shape")
    args = parser.parse_args()
    args.on_gpu = processes.has_gpu() if args.device == "auto" else args.device == "gpu"
    args.rows = args.rows or (ROWS_A_GPU if args.on_gpu else 2)
    args.length = args.length or (2048 if args.on_gpu else 512)
    return args


if __name__ == "__main__":
    sys.exit(main())
