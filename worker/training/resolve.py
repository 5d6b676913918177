"""Every `auto` of a TrainingSpec made concrete, given the data and the hardware. Imports no torch."""

import math
from dataclasses import dataclass

from shared.training_spec import BASE_LEARNING_RATE, TUTORIAL_MAX_STEPS, Resolved, TrainerSpec
from worker.training.failures import UnsupportedSetting

CPU_PACKED_ROW_LENGTH = 512
"""Without a kernel that skips the pairs between conversations, attention's cost grows with the row squared."""
MOST_STEPS_BETWEEN_CHECKPOINTS = 500
BF16_LOSES_UPDATES_BELOW = 1e-4


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the process trains on."""

    name: str
    """`cpu`, or the GPU's name."""
    is_gpu: bool
    computes_bf16: bool


def longest_conversation(spec: TrainerSpec, position_limit: int | None) -> int:
    """Tokens a conversation may have: what was asked for, or what the base was made for."""
    asked = spec.training.max_seq_length
    return asked if position_limit is None else min(asked, position_limit)


def packed_row_length(longest: int, hardware: Hardware) -> int:
    """Tokens of a row under `packing: rows`; a longer conversation has a row of its own."""
    return longest if hardware.is_gpu else min(longest, CPU_PACKED_ROW_LENGTH)


def resolve(
    spec: TrainerSpec, hardware: Hardware, *, rows: int, longest: int, has_validation: bool, chat_template: str
) -> Resolved:
    """What the run will really do.

    Args:
        rows: what a batch is made of: conversations, or packed rows.
        longest: tokens a conversation may have.
        has_validation: a validation file was given.
        chat_template: the template's name as chosen, never `auto`.

    Raises:
        UnsupportedSetting: the hardware or the engine can't do what was asked for.
    """
    training = spec.training
    batch, micro, accumulation = training.resolved_batch()
    steps_per_epoch = math.ceil(rows / batch)
    max_steps = _max_steps(spec, steps_per_epoch)
    multiplier = 1.0 if spec.learning_rate_multiplier == "auto" else spec.learning_rate_multiplier
    rate = training.learning_rate
    save_steps = training.save_steps
    if save_steps == "auto":
        save_steps = min(math.ceil(max_steps / 3), MOST_STEPS_BETWEEN_CHECKPOINTS)
    eval_steps = training.eval_steps
    if eval_steps == "auto":
        eval_steps = save_steps
    return Resolved.model_validate(
        {
            "method": training.method,
            "max_steps": max_steps,
            "n_epochs": round(max_steps / steps_per_epoch, 4),
            "learning_rate": BASE_LEARNING_RATE * multiplier if rate == "auto" else rate,
            "learning_rate_multiplier": multiplier if rate == "auto" else rate / BASE_LEARNING_RATE,
            "batch_size": batch,
            "micro_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
            "max_seq_length": longest,
            "precision": _precision(spec, hardware),
            "master_weights": training.master_weights,
            "optimizer": training.optimizer if hardware.is_gpu else "adamw",
            "gradient_checkpointing": _checkpointing(spec, hardware),
            "chat_template": chat_template,
            "packing": training.packing,
            "eval_steps": eval_steps if has_validation else None,
            "save_steps": save_steps,
            "warmup_steps": training.warmup_steps,
            "lr_scheduler": training.lr_scheduler,
            "weight_decay": training.weight_decay,
            "max_grad_norm": training.max_grad_norm,
            "logging_steps": training.logging_steps,
            "keep_checkpoints": training.keep_checkpoints,
            "train_on": training.train_on,
            "on_oom": training.on_oom,
            "seed": spec.seed,
        }
    )


def advice(spec: TrainerSpec, resolved: Resolved, rows: int) -> list[str]:
    """Warnings about choices that are legal but probably not meant."""
    warnings = []
    if resolved.max_seq_length < spec.training.max_seq_length and "max_seq_length" in spec.training.model_fields_set:
        warnings.append(
            f"training.max_seq_length {spec.training.max_seq_length} is more than the {resolved.max_seq_length} "
            f"tokens the base model was made for; {resolved.max_seq_length} is used."
        )
    if spec.training.max_steps is None and spec.n_epochs == "auto":
        seen = min(resolved.max_steps * resolved.batch_size / rows, 1)
        warnings.append(
            f"Neither n_epochs nor training.max_steps was given: training stops after {resolved.max_steps} steps, "
            f"which sees {seen:.0%} of the {rows} training rows. Set n_epochs to 1 to see each row once."
            if seen < 1
            else f"Neither n_epochs nor training.max_steps was given: training stops after {resolved.max_steps} steps, "
            f"which sees 100% of the {rows} training rows, {resolved.n_epochs:g} times."
        )
    if resolved.master_weights == "bf16" and resolved.learning_rate < BF16_LOSES_UPDATES_BELOW:
        warnings.append(
            f"training.master_weights is bf16 and the learning rate {resolved.learning_rate:g} is below "
            f"{BF16_LOSES_UPDATES_BELOW:g}: most updates are too small for bf16 weights and get lost. "
            "Use fp32 master weights (the default) or a higher learning rate."
        )
    return warnings


def _max_steps(spec: TrainerSpec, steps_per_epoch: int) -> int:
    if spec.training.max_steps is not None:
        return spec.training.max_steps
    if spec.n_epochs == "auto":
        return TUTORIAL_MAX_STEPS
    return max(math.ceil(spec.n_epochs * steps_per_epoch), 1)


def _precision(spec: TrainerSpec, hardware: Hardware) -> str:
    asked = spec.training.precision
    if asked == "fp16" and not hardware.is_gpu:
        raise UnsupportedSetting("training.precision fp16 needs a GPU; use bf16 or fp32 here", "training.precision")
    if asked == "bf16" and not hardware.computes_bf16:
        raise UnsupportedSetting(
            f"training.precision bf16 is not computed by {hardware.name}; use auto", "training.precision"
        )
    if asked == "fp32" and hardware.is_gpu:
        raise UnsupportedSetting(
            "training.precision fp32 is available on CPU only: on GPUs the engine computes in 16 bits over fp32 "
            "master weights; use bf16 or auto",
            "training.precision",
        )
    chosen: str = asked
    if asked == "auto":
        narrow = "fp16" if hardware.is_gpu else "fp32"
        chosen = "bf16" if hardware.computes_bf16 else narrow
    if chosen != "bf16" and spec.training.master_weights == "bf16":
        raise UnsupportedSetting(
            f"training.master_weights bf16 needs training.precision bf16, and it is {chosen} here; use fp32",
            "training.master_weights",
        )
    return chosen


def _checkpointing(spec: TrainerSpec, hardware: Hardware) -> str | bool:
    asked = spec.training.gradient_checkpointing
    if asked == "auto":
        return "unsloth" if hardware.is_gpu else False
    return asked
