"""A trainer without torch: everything but the arithmetic is the real trainer's own code.

Spec, leash, protocol, orders to stop, checkpoints and resuming are `worker.training`'s; the model is `toy_model`'s.
What it does is written in the first row of the training file: {"steps", "save_steps", "step_s", …} of `ToyPlan`, as it
is or as the completion of a prompt. Where `ANNEAL_CAMPAIGN_JOURNAL` names a folder, each step done is also noted there,
whoever gets to know of it: that is how much work was really lost, and what a run that lost its claim computed.
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.checkpoint_files import Manifest, read_manifest
from shared.trainer_protocol import PROTOCOL_FD, Checkpoint, Done, Evaluation, Failed, Metrics, Started
from shared.training_spec import TrainerSpec
from tests.campaign.toy_model import ToyModel
from worker.lifecycle import die_with_parent
from worker.training import checkpoint
from worker.training.leash import Leash, read_spec
from worker.training.reporter import Reporter, open_reporter
from worker.training.stopping import StopRequests

COMMAND = (sys.executable, "-m", "tests.campaign.toy_trainer")
JOURNAL = "ANNEAL_CAMPAIGN_JOURNAL"
NEVER = 10**9
SLOW_STEP_S = 14.0
"""Longer than a trainer may outlive its supervisor, so that one that would is seen."""
SLOW_ATTEMPTS = 3
"""Later ones are not slow, or the job would never end under faults."""


@dataclass(frozen=True)
class ToyPlan:
    """What a training file asks of the toy."""

    steps: int
    save_steps: int = NEVER
    eval_steps: int | None = None
    """None: with each save."""
    step_s: float = 0.01
    behaviour: str = "finish"


def read_plan(training_file: Path) -> ToyPlan:
    with training_file.open("rb") as stream:
        row: dict[str, Any] = json.loads(stream.readline())
    return ToyPlan(**(json.loads(row["completion"]) if "completion" in row else row))


def main() -> int:
    die_with_parent(int(os.environ["ANNEAL_SUPERVISED_BY"]))
    protocol = int(os.environ[PROTOCOL_FD])
    reporter = open_reporter()
    stops = StopRequests(reporter)
    stops.install()
    spec = TrainerSpec.model_validate_json(read_spec())
    if spec.leash_s is not None:
        Leash(reporter, spec.leash_s).start()
    return _Run(spec, reporter, stops, protocol).attempt()


class _Run:
    """One attempt."""

    def __init__(self, spec: TrainerSpec, reporter: Reporter, stops: StopRequests, protocol: int) -> None:
        self._spec = spec
        self._reporter = reporter
        self._stops = stops
        self._protocol = protocol
        self._plan = read_plan(Path(spec.training_file))
        self._model = ToyModel(spec.seed, Path(spec.training_file).read_bytes())
        self._first_step = 1

    def attempt(self) -> int:
        plan, stops = self._plan, self._stops
        self._misbehave_at_first()
        self._resume()
        print("libraries print things", flush=True)
        self._reporter.send(self._started())
        self._misbehave_once_started()
        stops.stepping(self._first_step - 1)
        for step in range(self._first_step, plan.steps + 1):
            time.sleep(plan.step_s)
            failure = self._misbehave_in_step(step)
            if failure is not None:
                self._reporter.send(failure)
                return 1
            self._model.train_step()
            stops.last_step = step
            self._note(step)
            self._reporter.send(self._metrics(step))
            if step == plan.steps:
                break
            if stops.cancelled:
                self._reporter.send(stops.message)
                return 0
            saves = step % plan.save_steps == 0 or stops.interrupted
            if saves if plan.eval_steps is None else step % plan.eval_steps == 0:
                self._evaluate(step)
            if saves:
                self._publish(step, resumable=True)
            if stops.requested:
                self._reporter.send(stops.message)
                return 0
        stops.finishing()
        self._evaluate(plan.steps)
        self._publish(plan.steps, resumable=False)
        self._reporter.send(Done(step=plan.steps, tokens=self._model.tokens, elapsed_s=1))
        return 0

    def _resume(self) -> None:
        if self._spec.resume_from is None:
            return
        folder = Path(self._spec.resume_from)
        manifest = read_manifest(folder)
        self._model.load_weights((folder / "model.safetensors").read_bytes())
        files = {name: (folder / name).read_bytes() for name in checkpoint.RESUME_FILES}
        self._model.load_resume_files(files, manifest.tokens)
        self._first_step = self._model.steps_done + 1

    def _publish(self, step: int, *, resumable: bool) -> None:
        def write(folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(self._model.weights_file())
            for name, content in self._model.resume_files().items() if resumable else ():
                (folder / name).write_bytes(content)

        spec = self._spec
        path = Path(spec.checkpoint_dir) / str(step)
        _, digest = checkpoint.publish(
            path,
            write,
            expected_bytes=10_000,
            make_manifest=lambda files: Manifest(
                job_id=spec.job_id,
                step=step,
                fence=spec.fence,
                base_model=spec.base_model,
                tokens=self._model.tokens,
                resumable=resumable,
                files=files,
            ),
        )
        self._reporter.send(
            Checkpoint(
                step=step, path=str(path), manifest_sha256=digest, resumable=resumable, tokens=self._model.tokens
            )
        )

    def _evaluate(self, step: int) -> None:
        if self._spec.validation_file is not None:
            self._reporter.send(Evaluation(step=step, eval_loss=self._model.validation_loss, eval_tokens=10))

    def _started(self) -> Started:
        batch, micro, accumulation = self._spec.training.resolved_batch()
        return Started(
            resolved={
                "max_steps": self._plan.steps,
                "n_epochs": 1.0,
                "batch_size": batch,
                "micro_batch_size": micro,
                "gradient_accumulation_steps": accumulation,
                "gradient_checkpointing": self._spec.training.gradient_checkpointing,
                "max_seq_length": self._spec.training.max_seq_length,
                "learning_rate_multiplier": 1.0,
            },
            total_steps=self._plan.steps,
            first_step=self._first_step,
            train_examples=8,
            validation_examples=0,
            train_tokens=800,
            device="cpu",
            versions={},
            parameters=len(self._model.weights),
        )

    def _metrics(self, step: int) -> Metrics:
        total = self._plan.steps
        return Metrics(
            step=step,
            total_steps=total,
            epoch=step / total,
            loss=self._model.loss,
            learning_rate=1e-4,
            grad_norm=1.0,
            tokens=self._model.tokens,
            tokens_per_second=100,
            samples_per_second=8,
            peak_memory_bytes=1,
            elapsed_s=step,
            remaining_s=(total - step) * self._plan.step_s,
        )

    def _note(self, step: int) -> None:
        folder = os.environ.get(JOURNAL)
        if folder is None:
            return
        line = {"at": time.time(), "fence": self._spec.fence, "step": step, "loss": self._model.loss}
        descriptor = os.open(f"{folder}/{self._spec.job_id}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, json.dumps(line).encode() + b"\n")  # one write: lines of two processes never mix
        os.close(descriptor)

    def _misbehave_at_first(self) -> None:
        if self._plan.behaviour == "deaf":
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _misbehave_once_started(self) -> None:
        if self._plan.behaviour == "flood":
            for number in range(3000):
                self._reporter.info(f"flood {number}")
            print("x" * 3_000_000, flush=True)

    def _misbehave_in_step(self, step: int) -> Failed | None:
        match self._plan.behaviour:
            case "kill_at_3" if step == 3 and self._spec.fence == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            case "poison" if step == 2:
                print("Traceback: the last words", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            case "diverge" if step == 3:
                return Failed(code="diverged", message="the loss is nan at step 3; lower the learning rate")
            case "out_of_memory" if step == 3 and self._spec.training.resolved_batch()[1] > 1:
                return Failed(code="out_of_memory", message="the GPU's memory is full at step 3")
            case "slow" if step == 3 and self._spec.fence <= SLOW_ATTEMPTS:
                time.sleep(SLOW_STEP_S)  # like a kernel that computes: it says nothing and notices nothing
            case "garbage":
                os.write(self._protocol, b"{not a message}\n\xff\n")
        return None


if __name__ == "__main__":
    sys.exit(main())
