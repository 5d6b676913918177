#!/usr/bin/env python3
"""Kill a run at every point, resume it, and compare with the run nobody killed: bit-equal, or this exits with 1.

    python benchmarks/exact_resume.py [--only "fp32, packed"] [--processes every|none] [OUT=FOLDER]

For each of fp32, bf16 and bf16 master weights, unpacked and packed, with validation on (real Unsloth, a tiny Llama,
CPU, eleven steps over more than two epochs, a checkpoint and an evaluation every second one):

    killed     SIGKILL at every step, in processes of their own: each attempt lives one step longer
    dies       inside one process: at every step, between an evaluation and its save, after a save that was heard of and
               after one that was not, at every second step, each resumed at once
    deployed   stopped at the end of every step, as SIGTERM does, evaluations that are due abandoned

Compared are each step's loss, gradient norm, learning rate, token count, accuracy and epoch, each evaluation, the
checkpoints' token counts and the SHA-256 of the final weights' file. Prints a line for each part as it ends and writes
OUT/exact_resume_cpu.json.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(
    HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", CUDA_VISIBLE_DEVICES="", OMP_WAIT_POLICY="PASSIVE"
)
os.environ["PYTHONPATH"] = sys.path[0]  # for the processes of their own

from shared.trainer_protocol import Message
from tests.training import exact_resume as exact
from tests.training.exact_resume import CASES, SAVE_STEPS, Case, Job, Parts
from tests.training.trainers import run_here, run_process
from worker.training.loop import versions
from worker.training.stopping import StopRequests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one combination by its name")
    parser.add_argument("--processes", choices=("every", "none"), default="every")
    parser.add_argument("out", nargs="?", default="", help="OUT=FOLDER")
    args = parser.parse_args()
    parts_of_the_proof: list[tuple[str, Callable[[Parts, Case, Path], Iterator[Job]]]] = [
        ("dies", dying),
        ("deployed", deployed),
    ]
    if args.processes == "every":
        parts_of_the_proof.insert(0, ("killed", killed))
    report: dict[str, Any] = {
        "command": " ".join(["python benchmarks/exact_resume.py", *sys.argv[1:]]).split(" OUT=")[0],
        "machine": {"python": platform.python_version(), "cpus": os.cpu_count()},
        "versions": versions(),
        "combinations": {},
        "verdict": "bit-equal",
    }
    with tempfile.TemporaryDirectory(prefix="anneal-exact-") as scratch, quiet():
        parts = Parts.make(Path(scratch) / "parts")
        for case in CASES:
            if args.only not in (None, case.name):
                continue
            folder = Path(scratch) / case.name.replace(", ", "-").replace(" ", "-")
            expected = exact.undisturbed(parts, case, folder / "undisturbed", run_here)
            found = report["combinations"][case.name] = {"training": case.training(), "weights": expected["weights"]}
            for name, prove in parts_of_the_proof:
                found[name] = tally(prove(parts, case, folder / name), expected)
                if found[name]["unequal"]:
                    report["verdict"] = "not equal"
                say(f"{case.name}: {name}: " + ", ".join(f"{value} {key}" for key, value in found[name].items()))
    say(f"verdict: {report['verdict']}")
    if args.out.startswith("OUT="):
        target = Path(args.out.removeprefix("OUT="))
        target.mkdir(parents=True, exist_ok=True)
        (target / "exact_resume_cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0 if report["verdict"] == "bit-equal" else 1


def killed(parts: Parts, case: Case, folder: Path) -> Iterator[Job]:
    job = Job(parts, case.training(), folder)
    for step in range(1, case.steps + 1):
        job.attempt(functools.partial(exact.killed_process, exact.at_metrics(step), folder))
    job.attempt(lambda spec: run_process(spec, folder))
    yield job


def dying(parts: Parts, case: Case, folder: Path) -> Iterator[Job]:
    saves = range(SAVE_STEPS, case.steps + 1, SAVE_STEPS)
    deaths: list[dict[str, Any]] = [{"last_word": exact.at_metrics(step)} for step in range(1, case.steps + 1)]
    deaths += [{"last_word": exact.at_evaluation(step)} for step in saves]
    deaths += [{"last_word": exact.at_checkpoint(step)} for step in saves]
    deaths += [{"last_word": exact.at_checkpoint(step), "said": False} for step in saves]
    for number, death in enumerate(deaths):
        job = Job(parts, case.training(), folder / str(number))
        job.attempt(functools.partial(run_here, **death))
        job.attempt(run_here)
        yield job


def deployed(parts: Parts, case: Case, folder: Path) -> Iterator[Job]:
    def stop(step: int, requests: StopRequests, message: Message) -> None:
        # Heard after the step was told and before it is evaluated: the same place as a signal during the evaluation.
        if exact.at_metrics(step)(message):
            requests.interrupted = True

    for step in range(1, case.steps):
        job = Job(parts, case.training(), folder / str(step))
        job.attempt(functools.partial(run_here, stops=functools.partial(stop, step)))
        job.attempt(run_here)
        yield job


def tally(jobs: Iterator[Job], expected: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    runs = attempts = resumes = unequal = 0
    while True:
        try:
            job = next(jobs)
        except StopIteration:
            break
        except AssertionError as error:  # told differently the second time
            say(f"  unequal: {error}")
            unequal += 1
            break
        runs += 1
        attempts += job.attempts
        resumes += sum(1 for step in job.first_steps if step > 1)
        if job.result() != expected:
            unequal += 1
    seconds = round(time.monotonic() - began, 1)
    return {"runs": runs, "attempts": attempts, "resumes": resumes, "unequal": unequal, "seconds": seconds}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries print into nothing, ourselves to where standard output was."""
    global _told
    _told = os.fdopen(os.dup(1), "w", buffering=1)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    yield


_told = sys.stdout


def say(text: str) -> None:
    print(text, file=_told, flush=True)


if __name__ == "__main__":
    sys.exit(main())
