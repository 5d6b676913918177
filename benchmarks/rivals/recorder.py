"""What every rival has in common: its arguments, how it renders a row, and how it tells what it did.

A rival writes JSON lines to what was its standard output, like a few of those that Anneal's trainer writes: `started`,
`metrics` after each step, `saved`, or `error`. Whatever libraries print goes to standard error. Imports nothing heavy:
unsloth must be imported before the libraries it patches.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEED = 3407
WARMUP_STEPS, WEIGHT_DECAY, MAX_GRAD_NORM = 5, 0.01, 1.0
REAL_TOKENS = "benchmark_tokens"
VERSIONS = ("torch", "transformers", "trl", "unsloth", "unsloth_zoo", "accelerate", "bitsandbytes", "datasets", "peft")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows, a JSON array")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--save", type=Path, required=True, help="folder for the tuned model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--micro", type=int, default=2, help="conversations, or packed rows, a forward pass")
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="longest conversation, or a packed row's length")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--packed", action="store_true")
    return parser


class Voice:
    """Take standard output for ourselves. Must be made before anything is imported that prints."""

    def __init__(self) -> None:
        self._stream = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._began_s = 0.0
        self._tokens = 0

    def begin(self, settings: dict[str, Any], model: Any) -> None:
        """Everything is loaded; the first step comes next."""
        import torch

        kinds: dict[str, int] = {}
        for parameter in model.parameters():
            kinds[str(parameter.dtype)] = kinds.get(str(parameter.dtype), 0) + parameter.numel()
        self._say(
            type="started",
            device=torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
            versions=versions(),
            resolved={**settings, "weights": kinds},
        )
        self._began_s = time.monotonic()

    def step(self, number: int, loss: float, grad_norm: float | None, tokens: int) -> None:
        """A step has ended, in which that many tokens were seen, padding left out."""
        elapsed_s = time.monotonic() - self._began_s
        self._tokens += tokens
        self._say(
            type="metrics",
            step=number,
            loss=loss,
            grad_norm=grad_norm,
            tokens=self._tokens,
            elapsed_s=elapsed_s,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def evaluated(self, step: int, loss: float) -> None:
        """The mean over the answers' tokens of rows that nobody trains on."""
        self._say(type="evaluation", step=step, eval_loss=loss)

    def saved(self, folder: Path) -> None:
        """The tuned model is on disk."""
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        self._say(type="saved", bytes=size, peak_memory_bytes=peak_memory_bytes())

    def run(self, work: Callable[["Voice"], None]) -> int:
        """Do the work; a failure is told. Returns the exit status."""
        try:
            work(self)
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            self._say(type="error", message=f"{type(error).__name__}: {error}"[:2000])
            return 1
        return 0

    def _say(self, **message: Any) -> None:
        self._stream.write(json.dumps(message) + "\n")


def rows(path: Path) -> list[dict[str, str]]:
    """(question, answer) of each Alpaca row."""
    found = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        question = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
        found.append({"question": question, "answer": row["output"]})
    return found


def rendered(row: dict[str, str], tokenizer: Any) -> tuple[str, str]:
    """Prompt and answer as the model's own template writes them, without the newline after the last turn."""
    turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    assert text.startswith(prompt), "this template writes the prompt differently once the answer is there"
    return prompt, text[len(prompt) :]


def watch(trainer: Any, voice: Voice, settings: dict[str, Any]) -> None:
    """Let a transformers Trainer tell each step: tokens are counted where batches are made, which waits for no GPU."""
    from transformers import TrainerCallback

    collate, training_step = trainer.data_collator, trainer.training_step
    seen = 0

    def counted(examples: Any) -> Any:
        batch = collate(examples)
        batch[REAL_TOKENS] = real_tokens(batch)
        return batch

    def stepped(model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        nonlocal seen
        seen += inputs.pop(REAL_TOKENS)
        return training_step(model, inputs, *rest, **options)

    class Recorder(TrainerCallback):
        def on_train_begin(self, *_: Any, **others: Any) -> None:
            told = {**settings, "padding_free": bool(getattr(trainer.data_collator, "padding_free", False))}
            told["padding_free"] = told["padding_free"] or bool(getattr(collate, "padding_free", False))
            voice.begin({**told, **chosen(trainer.args)}, trainer.model)

        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **others: Any) -> None:
            nonlocal seen
            if logs and "loss" in logs:
                norm = logs.get("grad_norm")
                voice.step(state.global_step, float(logs["loss"]), None if norm is None else float(norm), seen)
                seen = 0

    trainer.data_collator, trainer.training_step = counted, stepped
    trainer.add_callback(Recorder())


def real_tokens(batch: Any) -> int:
    """Tokens of conversations in a batch. Without a mask rows are concatenated, and nothing is padding."""
    mask = batch.get("attention_mask")
    return int(batch["input_ids"].numel() if mask is None else mask.count_nonzero())


def chosen(args: Any) -> dict[str, Any]:
    """The settings of a TrainingArguments that explain a result."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "bf16", "fp16")
    names += ("gradient_checkpointing", "max_length", "packing", "seed", "data_seed")
    found = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return {**found, "optim": str(getattr(args.optim, "value", args.optim))}


def peak_memory_bytes() -> int:
    """GPU: the allocator's peak. CPU: the peak resident set."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
