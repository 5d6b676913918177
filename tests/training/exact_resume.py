"""The proof that a run which died, wherever, ends as if it had not: what is compared, and the ways to die.

A `Case` is a run of more than two epochs that saves and evaluates every second step, one save falling on the boundary
of an epoch. A `Job` is what a supervisor sees of it over any number of attempts: each resumes from the newest
checkpoint that was reported, and what is reported twice must be the same both times. Equal means bit-equal.
"""

import hashlib
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.trainer_protocol import Checkpoint, Evaluation, Message, Metrics
from shared.training_spec import TrainerSpec
from tests.training.tiny_llama import alpaca_rows, make_tiny_llama, write_jsonl
from tests.training.trainers import Outcome, TrainerProcess
from worker.training.checkpoint import verify

NUMBERS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16 master weights": {"precision": "bf16", "master_weights": "bf16", "learning_rate": 1e-3},
}
ROWS: dict[str, dict[str, Any]] = {
    "unpacked": {"packing": "none", "max_steps": 11},
    "packed": {"packing": "rows", "batch_size": 2, "micro_batch_size": 1, "max_seq_length": 400, "max_steps": 11},
}
SAVE_STEPS = 2


@dataclass(frozen=True)
class Case:
    numbers: str
    rows: str

    @property
    def name(self) -> str:
        return f"{self.numbers}, {self.rows}"

    def training(self, **choices: Any) -> dict[str, Any]:
        common = {"save_steps": SAVE_STEPS, "warmup_steps": 2, "learning_rate": 1e-3}
        return {**common, **NUMBERS[self.numbers], **ROWS[self.rows], **choices}

    @property
    def steps(self) -> int:
        return int(ROWS[self.rows]["max_steps"])


CASES = [Case(numbers, rows) for numbers in NUMBERS for rows in ROWS]


@dataclass(frozen=True)
class Parts:
    """The base model and the data that all cases share."""

    base: Path
    training_file: Path
    validation_file: Path

    @staticmethod
    def make(folder: Path) -> "Parts":
        folder.mkdir(parents=True, exist_ok=True)
        return Parts(
            make_tiny_llama(folder / "tiny"),
            write_jsonl(folder / "train.jsonl", alpaca_rows(40)),
            write_jsonl(folder / "valid.jsonl", alpaca_rows(10, seed=9)),
        )


Attempt = Callable[[TrainerSpec], Outcome]


@dataclass
class Job:
    """One run over its attempts."""

    parts: Parts
    training: dict[str, Any]
    folder: Path
    validation: bool = True
    metrics: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    evaluations: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    newest: Checkpoint | None = None
    epoch_steps: int = 0
    attempts: int = 0
    first_steps: list[int] = field(default_factory=list)
    warnings: list[list[str]] = field(default_factory=list)

    def attempt(self, run: Attempt, **training: Any) -> Outcome:
        """Run once more, from the newest checkpoint; keywords replace choices of the client, as a rung would."""
        self.attempts += 1
        folder = self.folder / str(self.attempts)
        folder.mkdir(parents=True)
        if self.newest is not None:
            manifest = verify(Path(self.newest.path))
            assert (manifest.step, manifest.tokens) == (self.newest.step, self.newest.tokens)
        spec = TrainerSpec(
            job_id="ftjob-test",
            fence=self.attempts,
            base_model="test/tiny",
            base_model_dir=str(self.parts.base),
            training_file=str(self.parts.training_file),
            validation_file=str(self.parts.validation_file) if self.validation else None,
            checkpoint_dir=str(folder / "checkpoints"),
            work_dir=str(folder / "work"),
            resume_from=None if self.newest is None else self.newest.path,
            training={**self.training, **training},
        )
        outcome = run(spec)
        for message in outcome.messages:
            self._take(message)
        self.warnings.append([message.message for message in outcome.of("event")])
        return outcome

    def _take(self, message: Message) -> None:
        match message:
            case Metrics():
                told: tuple[Any, ...] = (message.loss, message.grad_norm, message.learning_rate, message.tokens)
                told += (message.mean_token_accuracy, message.epoch)
                assert self.metrics.setdefault(message.step, told) == told, f"step {message.step} was told differently"
            case Evaluation():
                told = (message.eval_loss, message.eval_mean_token_accuracy, message.eval_tokens)
                assert self.evaluations.setdefault(message.step, told) == told, f"evaluation {message.step} differs"
            case Checkpoint():
                self.newest = message
            case _ if message.type == "started":
                self.first_steps.append(message.first_step)
                self.epoch_steps = round(message.total_steps / message.resolved["n_epochs"])

    def result(self) -> dict[str, Any]:
        """Everything that must be the same, the weights as a digest of their file."""
        assert self.newest is not None
        assert not self.newest.resumable, "the run has not ended"
        weights = (Path(self.newest.path) / "model.safetensors").read_bytes()
        return {
            "metrics": self.metrics,
            "evaluations": self.evaluations,
            "tokens": self.newest.tokens,
            "weights": hashlib.sha256(weights).hexdigest(),
        }


def undisturbed(parts: Parts, case: Case, folder: Path, run: Attempt, **choices: Any) -> dict[str, Any]:
    """The result of the run nobody disturbed, checked to be what a case promises."""
    job = Job(parts, case.training(**choices), folder)
    outcome = job.attempt(run)
    assert outcome.status == 0, outcome.stderr[-3000:] or outcome.last
    assert case.steps > 2 * job.epoch_steps, "more than two epochs"
    assert any(step % job.epoch_steps == 0 for step in range(SAVE_STEPS, case.steps, SAVE_STEPS)), (
        "a save at a boundary"
    )
    assert sorted(job.evaluations) == [*range(SAVE_STEPS, case.steps, SAVE_STEPS), case.steps]
    return job.result()


def killed_process(last_word: Callable[[Message], bool], folder: Path, spec: TrainerSpec) -> Outcome:
    """A trainer process that gets SIGKILL once it has said that."""
    trainer = TrainerProcess(spec, folder)
    trainer.read_until(last_word)
    trainer.process.send_signal(signal.SIGKILL)
    return trainer.finish()


def at_metrics(step: int) -> Callable[[Message], bool]:
    """Dies when the step is done, before it is evaluated or saved."""
    return lambda message: isinstance(message, Metrics) and message.step == step


def at_evaluation(step: int) -> Callable[[Message], bool]:
    """Dies between an evaluation and the save that follows it."""
    return lambda message: isinstance(message, Evaluation) and message.step == step


def at_checkpoint(step: int) -> Callable[[Message], bool]:
    """Dies once the checkpoint of the step is published."""
    return lambda message: isinstance(message, Checkpoint) and message.step == step
