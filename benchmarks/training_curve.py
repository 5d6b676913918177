"""Anneal's memory and speed against the batch and the length, with and without gradient checkpointing.

Every conversation is longer than the length and cut to it, so a step has exactly batch x length tokens, in one forward
pass. Each point is a process of its own.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.contenders import Work, spec
from benchmarks.training_result import gib

BATCHES, LENGTHS = (1, 2, 4, 8, 16, 32), (512, 1024, 2048, 4096)
BATCH_OF_LENGTHS, LENGTH_OF_BATCHES = 8, 1024
"""Where one is varied, the other is this."""


def points(args: argparse.Namespace) -> list[tuple[int, int, bool]]:
    """(batch, length, gradient checkpointing) of every point that was asked for, each once."""
    batches, lengths = args.batches or BATCHES, args.lengths or LENGTHS
    if args.grid or args.batches or args.lengths:
        pairs = [(batch, length) for length in lengths for batch in batches]
    else:
        pairs = [(batch, LENGTH_OF_BATCHES) for batch in batches] + [(BATCH_OF_LENGTHS, length) for length in lengths]
    switches = {"on": [True], "off": [False], "both": [True, False]}[args.checkpointing]
    return [(*pair, switch) for pair in dict.fromkeys(pairs) for switch in switches]


def name(batch: int, length: int, checkpointing: bool) -> str:
    return f"{batch} x {length}, {'recomputed' if checkpointing else 'kept'}"


def told(
    point: tuple[int, int, bool], args: argparse.Namespace, data: Path, caches: Path, saved: Path
) -> dict[str, Any]:
    """The spec of one point."""
    batch, length, checkpointing = point
    work = Work(data, args.model, args.steps, batch, 1, length, args.rate, args.seed, packed=False)
    # "unsloth" is what a GPU run does by default: activations wait in the host's memory.
    way = ("unsloth" if args.on_gpu else True) if checkpointing else False
    return spec(work, caches, saved, gradient_checkpointing=way, on_oom="fail", master_weights=args.master_weights)


def table(runs: list[dict[str, Any]]) -> str:
    return "\n".join(_lines(runs))


def _lines(runs: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'conversations x tokens, activations':36}  {'GiB':>7}  {'tokens/s':>9}  {'ms/step':>9}"
    for run in runs:
        if run["failure"] is not None:
            yield f"{run['contender']:36}  {run['failure'].strip().splitlines()[-1][:120]}"
            continue
        speed, step = run["steady_tokens_per_second"], run["steady_ms_per_step"]
        yield f"{run['contender']:36}  {gib(run['peak_memory_bytes']):>7}  {speed:>9.0f}  {step:>9.1f}"
