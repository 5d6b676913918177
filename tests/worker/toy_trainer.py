"""A trainer without torch: the real protocol and the real checkpoint code around a counter.

What it does is written in the training file, one JSON object: {"steps", "save_steps", "behaviour", "step_s"}.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from shared.trainer_protocol import (
    PROTOCOL_FD,
    Checkpoint,
    Done,
    Evaluation,
    Event,
    Failed,
    Metrics,
    Started,
    Stopped,
)
from shared.training_spec import TrainerSpec
from worker.lifecycle import die_with_parent
from worker.training.checkpoint import RESUME_FILES, Manifest, publish

orders: dict[str, bool] = {"cancel": False, "interrupt": False}


def say(message: Any) -> None:
    os.write(int(os.environ[PROTOCOL_FD]), message.model_dump_json().encode() + b"\n")


def save(spec: TrainerSpec, step: int, resumable: bool) -> None:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text(f"weights after {step} steps")
        if resumable:
            for name in RESUME_FILES:
                (folder / name).write_text(str(step))

    path = Path(spec.checkpoint_dir) / str(step)
    _, digest = publish(
        path,
        write,
        expected_bytes=100,
        make_manifest=lambda files: Manifest(
            job_id=spec.job_id,
            step=step,
            fence=spec.fence,
            base_model=spec.base_model,
            tokens=step * 100,
            resumable=resumable,
            files=files,
        ),
    )
    say(Checkpoint(step=step, path=str(path), manifest_sha256=digest, resumable=resumable, tokens=step * 100))


def metrics(step: int, total: int) -> Metrics:
    return Metrics(
        step=step,
        total_steps=total,
        epoch=step / total,
        loss=1 / step,
        learning_rate=1e-4,
        grad_norm=1.0,
        tokens=step * 100,
        tokens_per_second=100,
        samples_per_second=8,
        peak_memory_bytes=1,
        elapsed_s=step,
        remaining_s=total - step,
    )


def main() -> None:
    die_with_parent(int(os.environ["ANNEAL_SUPERVISED_BY"]))
    spec = TrainerSpec.model_validate_json(sys.stdin.read())
    plan = json.loads(Path(spec.training_file).read_text())
    behaviour, total = plan.get("behaviour", "finish"), plan["steps"]
    signal.signal(signal.SIGUSR1, lambda *_: orders.update(cancel=True))
    signal.signal(signal.SIGTERM, lambda *_: orders.update(interrupt=True))
    if behaviour == "deaf":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    first = 1
    if spec.resume_from is not None:
        first = int((Path(spec.resume_from) / "trainer_state.json").read_text()) + 1
    print("libraries print things", flush=True)
    say(
        Started(
            resolved={"max_steps": total, "n_epochs": 1.0, "batch_size": 8, "learning_rate_multiplier": 1.0},
            total_steps=total,
            first_step=first,
            train_examples=8,
            validation_examples=0,
            train_tokens=800,
            device="cpu",
            versions={},
            parameters=1,
        )
    )
    if behaviour == "flood":
        for number in range(3000):
            say(Event(message=f"flood {number}"))
        print("x" * 3_000_000, flush=True)
    for step in range(first, total + 1):
        time.sleep(plan.get("step_s", 0.01))
        if behaviour == "kill_at_3" and step == 3 and spec.fence == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "poison" and step == 2:
            print("Traceback: the last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "diverge" and step == 3:
            say(Failed(code="diverged", message="the loss is nan at step 3; lower the learning rate"))
            sys.exit(1)
        if behaviour == "garbage":
            os.write(int(os.environ[PROTOCOL_FD]), b"{not a message}\n\xff\n")
        say(metrics(step, total))
        if orders["cancel"]:
            say(Stopped(reason="cancelled", step=step))
            return
        if step == total:
            break
        if step % plan.get("save_steps", 1000) == 0 or orders["interrupt"]:
            say(Evaluation(step=step, eval_loss=0.5, eval_tokens=10))
            save(spec, step, resumable=True)
        if orders["interrupt"]:
            say(Stopped(reason="interrupted", step=step))
            return
    save(spec, total, resumable=False)
    say(Done(step=total, tokens=total * 100, elapsed_s=1))


if __name__ == "__main__":
    main()
