"""Who takes part in `benchmarks/training.py`, and how each is told to do the same work."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, trainer_command

RIVALS = ROOT / "benchmarks" / "rivals"
WARM = "-warm"
LLAMA_FACTORY_PYTHON = "ANNEAL_LLAMA_FACTORY_PYTHON"


@dataclass(frozen=True)
class Work:
    """The work that every contender does."""

    data: Path
    model: Path
    steps: int
    micro: int
    """Conversations a forward pass, or packed rows."""
    accumulation: int
    length: int
    """Tokens a conversation may have, or of a packed row."""
    rate: float
    seed: int
    packed: bool
    checkpoints: bool = False
    """Anneal publishes the checkpoints of its defaults too, not the model alone."""

    @property
    def batch(self) -> int:
        return self.micro * self.accumulation


@dataclass(frozen=True)
class Launch:
    """What to start, and what it is told."""

    command: list[str]
    spec: dict[str, Any] | None = None
    standby: dict[str, Any] | None = None
    """Started ahead with this order, and given `spec` when it is ready."""


@dataclass(frozen=True)
class Contender:
    launch: Callable[[Work, Path, Path], Launch]
    """(work, folder for caches, folder for what is saved)"""
    packed: bool | None = None
    """Takes part where rows are packed (True), where they are not (False), or in both (None)."""
    gpu: bool | None = None
    """Runs on GPU only (True), on CPU only (False), or on both (None)."""
    missing: Callable[[], str | None] = lambda: None
    """Why it can't run in this checkout."""


def spec(work: Work, caches: Path, saved: Path, **training: Any) -> dict[str, Any]:
    """The work as Anneal's trainer is told it. What isn't said is its default."""
    return {
        "job_id": "ftjob-benchmark",
        "base_model": work.model.name,
        "base_model_dir": str(work.model),
        "training_file": str(work.data),
        "checkpoint_dir": str(saved),
        "work_dir": str(caches / "work"),
        "seed": work.seed,
        "training": {
            "max_steps": work.steps,
            "learning_rate": work.rate,
            "batch_size": work.batch,
            "max_seq_length": work.length,
            "packing": "rows" if work.packed else "none",
            **({} if work.checkpoints else {"save_steps": work.steps}),
            **training,
        },
    }


def _anneal(**training: Any) -> Any:
    return lambda work, caches, saved: Launch(trainer_command(), spec(work, caches, saved, **training))


def _standby(work: Work, caches: Path, saved: Path) -> Launch:
    order = {"folder": str(caches / "standby"), "base_model_dir": str(work.model), "leash_s": 3600.0}
    return Launch(trainer_command(), {**spec(work, caches, saved), "leash_s": 3600.0}, order)


def rival(script: str, *options: str, python: Callable[[], str] = lambda: sys.executable) -> Any:
    """How one of benchmarks/rivals is launched."""

    def launch(work: Work, caches: Path, saved: Path) -> Launch:
        command = [python(), str(RIVALS / script), "--data", str(work.data), "--model", str(work.model)]
        for name in ("steps", "micro", "accumulation", "length", "rate", "seed"):
            command += [f"--{name}", str(getattr(work, name))]
        command += ["--save", str(saved), *(["--packed"] if work.packed else []), *options]
        return Launch(command)

    return launch


def _unpacked(script: str, *options: str) -> Any:
    """Beside packed rows on CPU, where Unsloth packs nothing: as many conversations as fill about as many tokens."""
    launch = rival(script, *options)

    def as_many(work: Work, caches: Path, saved: Path) -> Launch:
        tokens = work.batch * work.length
        rounds = max(1, round(tokens / TOKENS_A_CONVERSATION / 2))
        loose = Work(work.data, work.model, work.steps, 2, rounds, work.length, work.rate, work.seed, packed=False)
        return launch(loose, caches, saved)

    return as_many


TOKENS_A_CONVERSATION = 200
"""Of Alpaca rows with the template of SmolLM2, about."""


def _llama_factory_python() -> str:
    return os.environ.get(LLAMA_FACTORY_PYTHON, str(ROOT / ".venv-llama-factory" / "bin" / "python"))


def _llama_factory_missing() -> str | None:
    if Path(_llama_factory_python()).exists():
        return None
    return f"`make setup-llama-factory` first, or name its Python in {LLAMA_FACTORY_PYTHON}"


CONTENDERS: dict[str, Contender] = {
    "anneal": Contender(_anneal()),
    "anneal-adamw": Contender(_anneal(optimizer="adamw")),
    "anneal-small": Contender(_anneal(gradient_checkpointing=True), gpu=True),
    "anneal-standby": Contender(_standby),
    "unsloth": Contender(rival("unsloth_script.py"), packed=False),
    "unsloth-fp32": Contender(rival("unsloth_script.py", "--master", "fp32"), packed=False),
    "trl": Contender(rival("trl_script.py"), packed=False),
    "trl-under-unsloth": Contender(rival("trl_script.py", "--under-unsloth"), packed=False, gpu=False),
    "trl-use-cpu": Contender(rival("trl_script.py", "--use-cpu"), packed=False, gpu=False),
    "llama-factory": Contender(
        rival("llama_factory.py", python=_llama_factory_python), packed=False, missing=_llama_factory_missing
    ),
    "unsloth-packed": Contender(rival("unsloth_script.py"), packed=True, gpu=True),
    "unsloth-packed-adamw": Contender(
        rival("unsloth_script.py", "--optimizer", "adamw_torch_fused"), packed=True, gpu=True
    ),
    "unsloth-packed-kept": Contender(
        rival("unsloth_script.py", "--optimizer", "adamw_torch_fused", "--keep"), packed=True, gpu=True
    ),
    "unsloth-fp32-packed": Contender(rival("unsloth_script.py", "--master", "fp32"), packed=True, gpu=True),
    "trl-packed": Contender(rival("trl_script.py"), packed=True, gpu=True),
    "unsloth-unpacked": Contender(_unpacked("unsloth_script.py"), packed=True, gpu=False),
    "compiled": Contender(rival("compiled.py"), packed=True, gpu=True),
    "compiled-causal": Contender(rival("compiled.py", "--attention", "causal"), packed=True, gpu=True),
}
DEFAULTS = {
    ("tutorial", False): "anneal,anneal-warm,anneal-standby,unsloth,unsloth-fp32,trl,trl-under-unsloth,llama-factory",
    ("tutorial", True): "anneal,anneal-warm,anneal-standby,unsloth,unsloth-fp32,trl",
    ("packed", False): "anneal,unsloth-unpacked",
    ("packed", True): "anneal,anneal-adamw,unsloth-packed,unsloth-packed-adamw,unsloth-packed-kept,"
    "unsloth-fp32-packed,trl-packed,compiled,compiled-causal",
}
"""(workload, on GPU): who takes part if nobody is named."""


def find(name: str) -> tuple[Contender, bool]:
    """(contender, whether it keeps the caches of its run before).

    Raises:
        KeyError: nobody is called so.
    """
    if name in CONTENDERS:
        return CONTENDERS[name], False
    return CONTENDERS[name.removesuffix(WARM)], True


def refusal(contender: Contender, *, packed: bool, on_gpu: bool) -> str | None:
    """Why it has no part in this; None if it has."""
    if contender.packed is not None and contender.packed != packed:
        return f"takes part with {'packed' if contender.packed else 'unpacked'} rows only"
    if contender.gpu is not None and contender.gpu != on_gpu:
        return f"runs on {'GPU' if contender.gpu else 'CPU'} only"
    return contender.missing()
