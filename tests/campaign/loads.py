"""What is trained during a campaign: toys whose end is computed by hand, or a tiny Llama by the real trainer."""

import functools
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.trainer_protocol import Evaluation, Metrics
from shared.training_spec import TrainerSpec, TrainingSpec
from tests.campaign import plan, tiny_models, toy_model
from tests.campaign.plan import BASE_MODEL, VALIDATION_FILE, JobPlan
from tests.campaign.toy_model import Reference

Say = Callable[[str], None]


@dataclass(frozen=True)
class Pace:
    """How patient everybody must be with a trainer."""

    train_workers: int
    """One more than jobs are on their way: a recovery that waits for somebody else's job to end tells nothing."""
    trainer_silent_leases: float
    mean_wait_s: float
    """Between two faults."""
    patience_s: float
    """How long a client waits for its job."""
    ripe_s: float
    """How long most faults wait for a run that has published something: starts that take long would get them all."""
    stalled_s: float
    """Without any change for so long after the last fault, what has not ended is lost."""


class ToyLoad:
    """Jobs of `tests.campaign.toy_trainer`."""

    name = "toy"
    pace = Pace(train_workers=4, trainer_silent_leases=1, mean_wait_s=0.7, patience_s=180, ripe_s=0, stalled_s=60)

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def prepare(self, folder: Path, say: Say, *, loadable: bool) -> None:
        tiny_models.make(folder / "models", loadable=loadable)

    def job(self, index: int) -> JobPlan:
        return plan.toy_job(self._seed, index)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - one load lives as long as the campaign
    def reference(self, job: JobPlan) -> Reference:
        return toy_model.reference(job.seed, job.training_file, job.steps)


VARIANTS: tuple[dict[str, Any], ...] = (
    {"precision": "fp32", "packing": "none", "save_steps": 3},
    {"precision": "fp32", "packing": "rows", "max_seq_length": 400, "save_steps": 4},
    {"precision": "bf16", "packing": "none", "save_steps": 5},
)
"""Few, because each needs an undisturbed run to compare with."""
COMMON = {"max_steps": 30, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 2}
ROWS = 40


class UnslothLoad:
    """Jobs of the real `worker.training` on a tiny Llama, every third with a validation file."""

    name = "unsloth"
    # Importing torch holds the interpreter for seconds, longer beside another trainer that does the same.
    pace = Pace(train_workers=2, trainer_silent_leases=4, mean_wait_s=4, patience_s=1200, ripe_s=60, stalled_s=240)

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._references: dict[tuple[str, bool], Reference] = {}

    def prepare(self, folder: Path, say: Say, *, loadable: bool) -> None:
        """The base model, and one undisturbed run of each variant."""
        tiny_models.make(folder / "models", loadable=True, trainable=True)
        for number, variant in enumerate(VARIANTS):
            for validated in (False, True):
                say(f"undisturbed run {2 * number + validated + 1} of {2 * len(VARIANTS)}")
                self._references[json.dumps(variant), validated] = _run_undisturbed(
                    folder / "references" / f"{number}-{validated}", folder / "models" / BASE_MODEL, variant, validated
                )

    def job(self, index: int) -> JobPlan:
        draw = random.Random(f"{self._seed}/job/{index}")
        variant = VARIANTS[index % len(VARIANTS)]
        behaviour = draw.choices(("finish", "cancel"), (92, 8))[0]
        habits = plan.habits(self._seed, index, may_pause=behaviour == "finish", within_s=40)
        return JobPlan(
            index=index,
            behaviour=behaviour,
            steps=COMMON["max_steps"],
            save_steps=variant["save_steps"],
            seed=SEED,
            training_file=_training_file(),
            has_validation_file=draw.random() < 0.4,
            keep_checkpoints=draw.randint(1, 4),
            cancel_after_s=draw.uniform(0, 40) if behaviour == "cancel" else None,
            is_followed=index % 3 == 0,
            variant=json.dumps(variant),
            **{**habits, "training": {**COMMON, **variant, **habits["training"]}},
        )

    def reference(self, job: JobPlan) -> Reference:
        return self._references[job.variant, job.has_validation_file]


SEED = 11
Load = ToyLoad | UnslothLoad
LOADS: dict[str, type[Load]] = {"toy": ToyLoad, "unsloth": UnslothLoad}


def _training_file() -> bytes:
    from tests.training.tiny_llama import alpaca_rows

    return "".join(json.dumps(row) + "\n" for row in alpaca_rows(ROWS)).encode()


def _run_undisturbed(folder: Path, base: Path, variant: dict[str, Any], validated: bool) -> Reference:
    from tests.training.trainers import run_process

    for name in ("work", "checkpoints"):
        (folder / name).mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(_training_file())
    (folder / "valid.jsonl").write_bytes(VALIDATION_FILE)
    spec = TrainerSpec(
        job_id="ftjob-reference",
        base_model=BASE_MODEL,
        base_model_dir=str(base),
        training_file=str(folder / "train.jsonl"),
        validation_file=str(folder / "valid.jsonl") if validated else None,
        checkpoint_dir=str(folder / "checkpoints"),
        work_dir=str(folder / "work"),
        training=TrainingSpec(**COMMON, **variant),
        seed=SEED,
    )
    outcome = run_process(spec, folder)
    if outcome.status != 0:
        raise RuntimeError(f"the undisturbed run failed: {outcome.messages[-1]}\n{outcome.stderr[-2000:]}")
    steps: list[Metrics] = outcome.of("metrics")
    evaluations: list[Evaluation] = outcome.of("evaluation")
    final = Path(outcome.of("checkpoint")[-1].path) / "model.safetensors"
    return Reference(
        weights_sha256=hashlib.sha256(final.read_bytes()).hexdigest(),
        losses=[message.loss for message in steps],
        validation_losses={message.step: message.eval_loss for message in evaluations},
        tokens=[message.tokens for message in steps],
    )
