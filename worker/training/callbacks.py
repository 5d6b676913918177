"""What happens around the training loop's steps: metrics out, stop requests in, evaluation and checkpoints on time.

step ends → stop asked? → log → metrics out, finite? → evaluate if due → publish if due → stop if asked
"""

import math
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from shared.trainer_protocol import Checkpoint, Evaluation, Metrics
from shared.training_spec import Resolved, TrainerSpec
from worker.training import checkpoint, engine, model, sharding
from worker.training.data import Example
from worker.training.failures import Diverged, NoGradient
from worker.training.heap import HeapTrimmer
from worker.training.parallel import Alone
from worker.training.progress import Progress, times_due
from worker.training.reporter import Reporter
from worker.training.stopping import StopRequests
from worker.training.templates import Template


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """One run's eyes and hands inside the engine's loop."""

    def __init__(
        self,
        spec: TrainerSpec,
        resolved: Resolved,
        template: Template,
        validation: list[Example],
        reporter: Reporter,
        stops: StopRequests,
        *,
        first_step: int,
        tokens_before: int,
        group: Alone | None = None,
    ) -> None:
        self._spec = spec
        self._resolved = resolved
        self._template = template
        self._validation = validation
        self._reporter = reporter
        self._heap = HeapTrimmer()
        self._stops = stops
        self._group = group or Alone()
        self._first_step = first_step
        self._tokens_before = tokens_before
        self._window: list[float] = []
        self._last_evaluated = 0
        self._logging_steps: int = (resolved.model_extra or {})["logging_steps"]
        self.started_s = self._step_began_s = time.monotonic()
        self._progress = Progress(first_step, resolved.max_steps, self.started_s)
        self._reported = engine.Counts()

    # What the loop calls, in its order.

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.started_s = self._step_began_s = time.monotonic()
        total = self._resolved.max_steps
        self._progress = Progress(self._first_step, total, self.started_s)
        self._progress.saves_due = times_due(self._resolved.save_steps, self._first_step, total)
        self._progress.evaluations_due = times_due(self._resolved.eval_steps, self._first_step, total)
        self._take_up(state)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._trainer.untold:
            self._step_began_s = time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        self._stops.last_step = step
        self._heap.after_step()
        last = step >= self._resolved.max_steps
        cancelled, interrupted = self._orders()
        if (cancelled or interrupted) and not last:
            control.should_training_stop = True
            control.should_save = not cancelled
            return
        control.should_evaluate = not last and self._evaluation_is_due(step)
        control.should_save = not last and step % self._resolved.save_steps == 0

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs is not None and "loss" in logs:
            self._report(logs, state, kwargs.get("model"))

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if any(self._orders()):
            control.should_training_stop = True

    def _orders(self) -> tuple[bool, bool]:
        """(cancelled, interrupted), the same on every rank; what comes after this is for the next look."""
        return self._group.agree(self._stops.cancelled, self._stops.interrupted)

    def _take_up(self, state: TrainerState) -> None:
        """What the attempt that saved the resumed checkpoint had still to tell.

        Losses of steps it had not reported yet (`logging_steps`), and an evaluation that its end cut off.
        """
        done = self._first_step - 1
        reported = done - done % self._logging_steps
        self._window = [entry["loss"] for entry in state.log_history if "loss" in entry and entry["step"] > reported]
        evaluated = [entry["step"] for entry in state.log_history if "eval_loss" in entry]
        self._last_evaluated = max(evaluated, default=0)
        if done and self._evaluation_is_due(done):
            self.evaluate(self._trainer)
            self._step_began_s = time.monotonic()

    def _evaluation_is_due(self, step: int) -> bool:
        return self._resolved.eval_steps is not None and step % self._resolved.eval_steps == 0

    # What the engine calls back for.

    def is_cancelled(self) -> bool:
        """Whether the step that runs need not be finished; asked between two passes."""
        return self._stops.cancelled

    def shrank(self) -> None:
        """A step or an evaluation had to be done again in less memory."""
        self._reporter.warn(
            "The GPU's memory ran out beside the CUDA graphs that make steps faster: training goes on without them. "
            "Gradients are the same; steps may take longer. Less in a pass (training.micro_batch_size, "
            "training.tokens_per_pass) would leave room for both."
        )

    def evaluate(self, trainer: engine.Engine) -> None:
        """Evaluate on the validation rows and say so; abandoned if a stop is asked for meanwhile.

        Raises:
            Diverged: the loss is not a finite number.
        """
        step = trainer.state.global_step
        if not self._validation or step == self._last_evaluated:
            return
        began_s = time.monotonic()
        result = engine.evaluate(trainer, self._validation, lambda: self._stops.requested)
        if result is None:
            trainer.control.should_training_stop = True
            trainer.control.should_save = not self._orders()[0]
            return
        if not math.isfinite(result.loss):
            raise self._diverged(step, f"the validation loss is {result.loss}")
        self._last_evaluated = step
        trainer.state.log_history.append({"step": step, "eval_loss": result.loss})  # for `_take_up`
        self._progress.evaluated(time.monotonic() - began_s)
        self._reporter.send(
            Evaluation(
                step=step,
                eval_loss=result.loss,
                eval_mean_token_accuracy=result.accuracy,
                eval_tokens=result.tokens,
            )
        )

    def publish(self, trainer: engine.Engine, *, resumable: bool) -> None:
        """Publish the checkpoint of the step just done.

        Raises:
            Diverged: a weight is not a finite number, which a loss need not show; nothing is published.
            RanksDiffer: nor where the ranks have not got the same weights.
        """
        step = trainer.state.global_step
        began_s = time.monotonic()
        bare = trainer.bare_model()
        broken = model.not_finite(bare)
        if broken is not None:
            raise self._diverged(step, f"weights of {broken} are not finite")
        sharded = sharding.is_sharded(bare)
        if not sharded:  # else no two ranks have the same weights
            self._group.demand_same(bare, step)
        if self._group.rank:
            if sharded:
                trainer.take_part_in_saving(bare, Path(self._spec.base_model_dir), resumable=resumable)
            return

        def write(folder: Path) -> None:
            model.save_model(bare, Path(self._spec.base_model_dir), folder, self._template)
            if resumable:
                trainer.save_resume_state(folder)

        folder = Path(self._spec.checkpoint_dir) / str(step)
        manifest, digest = checkpoint.publish(
            folder,
            write,
            expected_bytes=model.saved_bytes(bare, resumable=resumable),
            make_manifest=lambda files: checkpoint.Manifest(
                job_id=self._spec.job_id,
                step=step,
                fence=self._spec.fence,
                base_model=self._spec.base_model,
                tokens=self.tokens(trainer),
                resumable=resumable,
                files=files,
            ),
        )
        self._progress.saved(time.monotonic() - began_s)
        self._reporter.send(
            Checkpoint(
                step=step,
                path=str(folder),
                manifest_sha256=digest,
                resumable=resumable,
                tokens=manifest.tokens,
            )
        )

    def tokens(self, trainer: engine.Engine) -> int:
        """Non-padding tokens since the start of the job."""
        return self._tokens_before + trainer.counts.tokens

    def elapsed_s(self) -> float:
        """Since the first step of this attempt began."""
        return time.monotonic() - self.started_s

    # How a step is told.

    def meet(self) -> None:
        """Wait for rank 0: none begins, and can run out of memory, before it has said how the run began; none ends, and
        takes its GPU's part of the model along, before it has put that together. What is sent over GPUs is only
        queued when its call returns."""
        self._orders()

    def attach(self, trainer: engine.Engine) -> None:
        self._trainer = trainer

    def _report(self, logs: dict[str, Any], state: TrainerState, _model: Any) -> None:
        step = state.global_step
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        self._demand_finite(step, loss, norm)
        now_s = time.monotonic()
        seconds = max(now_s - self._step_began_s, 1e-9)
        self._progress.stepped(seconds)
        self._window.append(loss)
        self._step_began_s = now_s  # of the next one, if it is under way already
        counts = self._trainer.told_counts
        tokens = counts.tokens - self._reported.tokens
        conversations = counts.conversations - self._reported.conversations
        learned, correct = counts.learned - self._reported.learned, counts.correct - self._reported.correct
        self._reported = replace(counts)
        if step % self._logging_steps and step < self._resolved.max_steps:
            return
        accuracy = correct / learned if learned else logs.get("mean_token_accuracy")
        self._reporter.send(
            Metrics(
                step=step,
                total_steps=self._resolved.max_steps,
                epoch=round(float(state.epoch or 0.0), 6),
                loss=sum(self._window) / len(self._window),
                mean_token_accuracy=None if accuracy is None else float(accuracy),
                learning_rate=float(logs["learning_rate"]),
                grad_norm=norm if math.isfinite(norm) else None,
                tokens=self._tokens_before + counts.tokens,
                tokens_per_second=tokens / seconds,
                samples_per_second=conversations / seconds,
                peak_memory_bytes=peak_memory_bytes(),
                elapsed_s=self._progress.elapsed_s(now_s),
                remaining_s=self._progress.remaining_s(step),
            )
        )
        self._window.clear()

    def _demand_finite(self, step: int, loss: float, norm: float) -> None:
        # fp16 runs meet infinite gradients on purpose: the loss scaler looks for them and skips the step.
        norm_matters = self._resolved.precision != "fp16"
        if norm_matters and norm == 0 and loss > 0:
            raise NoGradient(
                f"the gradient of step {step} is zero though its loss is {loss:g}: nothing would be learned, which is "
                "a fault of Anneal. Checkpoints published before are kept"
            )
        if math.isfinite(loss) and (math.isfinite(norm) or not norm_matters):
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        raise self._diverged(step, what)

    def _diverged(self, step: int, what: str) -> Diverged:
        rate = self._resolved.learning_rate
        return Diverged(
            f"training diverged at step {step}: {what}. Checkpoints published before are kept. Lower "
            f"training.learning_rate (it was {rate:g}; try {rate / 10:g}) or raise training.warmup_steps.",
            "training.learning_rate",
        )


def peak_memory_bytes() -> int:
    """GPU: the allocator's peak. CPU: the peak resident set of this process's own image, not of its parent's."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
