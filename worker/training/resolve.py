"""Every `auto` of a TrainingSpec made concrete, given the data and the hardware. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shared.training_spec import BASE_LEARNING_RATE, TUTORIAL_MAX_STEPS, Resolved, TrainerSpec
from worker.training.data_plan import Sizes
from worker.training.failures import UnsupportedSetting

CPU_PACKED_ROW_LENGTH = 512
"""Without a kernel that skips the pairs between conversations, attention's cost grows with the row squared."""
FAST_ENOUGH_CPU = 4096
FAST_ENOUGH_GPU = 65_536
"""Tokens of a pass beyond which a longer one is no faster."""
SHARE_FOR_ACTIVATIONS_CPU = 0.7
"""Of the memory left; the rest is for what comes and goes within a layer and for the loss."""
SHARE_FOR_ACTIVATIONS_GPU = SHARE_FOR_ACTIVATIONS_CPU / 2
"""CUDA graphs keep the memory of one pass in a pool of their own, and a pass of a new shape runs beside it."""
WHOLE_AT_ONCE = 0.4
"""Of a model in shards, in weights of 32 bits: what is whole at some moment. Of an 8B-parameter Llama's embedding and
head the weights (a sixteenth), the head's gradient in 32 bits (another), both gradients in 16 and, to be summed, in 32
(three); two layers are the rest."""
MOST_STEPS_BETWEEN_CHECKPOINTS = 500
BF16_LOSES_UPDATES_BELOW = 1e-4


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the process trains on."""

    name: str
    """`cpu`, or the GPU's name."""
    is_gpu: bool
    computes_bf16: bool
    memory_bytes: int = 2**62
    """Free for a run, of the GPU or of the host."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a base model takes, in bytes."""

    weights: int
    """One number of 32 bits for each parameter."""
    token: int
    """Kept between forward and backward pass for each token, in 16 bits, without gradient checkpointing."""
    token_recomputed: int
    """The same with it."""
    can_be_sharded: bool = False


def longest_conversation(spec: TrainerSpec, position_limit: int | None) -> int:
    """Tokens a conversation may have: what was asked for, or what the base was made for."""
    asked = spec.training.max_seq_length
    return asked if position_limit is None else min(asked, position_limit)


def packed_row_length(longest: int, hardware: Hardware) -> int:
    """Tokens of a row under `packing: rows`; a longer conversation has a row of its own."""
    return longest if hardware.is_gpu else min(longest, CPU_PACKED_ROW_LENGTH)


def resolve(
    spec: TrainerSpec,
    hardware: Hardware,
    *,
    lengths: Sequence[int],
    longest: int,
    needs: Needs,
    has_validation: bool,
    chat_template: str,
    begun_with: Sizes | None = None,
) -> Resolved:
    """What the run will really do.

    Args:
        lengths: tokens of each row a batch is made of: conversations, or packed rows.
        longest: tokens a conversation may have.
        needs: of the base model.
        has_validation: a validation file was given.
        chat_template: the template's name as chosen, never `auto`.
        begun_with: what `auto` was when a resumed run began, and stays on the same hardware.

    Raises:
        UnsupportedSetting: the hardware or the engine can't do what was asked for.
    """
    training = spec.training
    precision = _precision(spec, hardware)
    begun = begun_with if begun_with is not None and begun_with.hardware == hardware.name else None
    sharded = _sharded(spec, hardware, needs, max(lengths), precision, begun)
    held = kept_bytes(needs, training.gpus if sharded else 1)
    recompute: str | bool = training.gradient_checkpointing
    if recompute == "auto":
        recompute = begun.gradient_checkpointing if begun else _checkpointing(hardware, needs, max(lengths), held)
    asked = training.tokens_per_pass
    kept = begun.tokens_per_pass if begun else None
    fitting = kept or tokens_per_pass(hardware, needs, held, recompute=bool(recompute), precision=precision)
    most_tokens = fitting if asked == "auto" else asked
    batch, micro, accumulation = training.resolved_batch(round(most_tokens / (sum(lengths) / len(lengths))))
    is_limit = training.chooses_micro_batch or asked != "auto"
    largest = sum(sorted(lengths)[-micro:])  # so that half of the limit is less than any pass had
    steps_per_epoch = math.ceil(len(lengths) / batch)
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
            "gpus": training.gpus,
            "sharding": "on" if sharded else "off",
            "tokens_per_pass": min(most_tokens, largest) if is_limit else None,
            "longest_row": max(lengths),
            "precision": precision,
            "master_weights": training.master_weights,
            "optimizer": training.optimizer if hardware.is_gpu and not sharded else "adamw",
            "gradient_checkpointing": recompute,
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


def sizes(resolved: Resolved, hardware: Hardware) -> Sizes:
    """For `resolve` when the run is resumed."""
    return Sizes(
        hardware=hardware.name,
        tokens_per_pass=(resolved.model_extra or {})["tokens_per_pass"],
        gradient_checkpointing=resolved.gradient_checkpointing,
        sharding=resolved.sharding,
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
    if resolved.sharding == "on" and spec.training.optimizer != resolved.optimizer:
        warnings.append(
            f"The model is kept in shards on {resolved.gpus} GPUs (training.sharding), for which there is no 8-bit "
            "optimizer: adamw, with 32-bit moments, is used."
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


def tokens_per_pass(hardware: Hardware, needs: Needs, kept: int, *, recompute: bool, precision: str) -> int:
    """Tokens that a forward and backward pass may hold: as many as make it fast, and no more than fit."""
    token_bytes = (needs.token_recomputed if recompute else needs.token) * (2 if precision == "fp32" else 1)
    fitting = _room(hardware, kept) // token_bytes
    return max(min(fitting, FAST_ENOUGH_GPU if hardware.is_gpu else FAST_ENOUGH_CPU), 1)


def kept_bytes(needs: Needs, shards: int = 1) -> int:
    """Masters, gradients, two moments, and the weights in 16 bits: all of them, or those at hand in one moment."""
    if shards == 1:
        return int(4.5 * needs.weights)
    return int((4 / shards + WHOLE_AT_ONCE) * needs.weights)


def _least_bytes(spec: TrainerSpec, hardware: Hardware, needs: Needs) -> int:
    """Masters, gradients and moments on one GPU, copies made when needed: no setting that was asked for takes less."""
    masters = 1.0 if spec.training.master_weights == "fp32" else 0.5
    moments = 0.5 if hardware.is_gpu and spec.training.optimizer == "adamw_8bit" else 2.0
    return int((2 * masters + moments) * needs.weights)


def _room(hardware: Hardware, kept: int) -> int:
    """Bytes for a pass's activations."""
    share = SHARE_FOR_ACTIVATIONS_GPU if hardware.is_gpu else SHARE_FOR_ACTIVATIONS_CPU
    return int(share * max(hardware.memory_bytes - kept, 0))


def _sharded(
    spec: TrainerSpec, hardware: Hardware, needs: Needs, longest_row: int, precision: str, begun: Sizes | None
) -> bool:
    """`auto`: only if the longest row would not fit otherwise, whatever else is done. A run stays what it was."""
    training = spec.training
    possible = training.gpus > 1 and needs.can_be_sharded and precision != "fp16"
    if training.sharding != "on":
        fits = longest_row * needs.token_recomputed <= _room(hardware, _least_bytes(spec, hardware, needs))
        if begun is not None and begun.sharding is not None:
            fits = begun.sharding == "off"
        return possible and training.sharding == "auto" and not fits
    if possible:
        return True
    reason = (
        "is not available with training.precision fp16"
        if needs.can_be_sharded
        else "is available for plain Llama, Mistral, Qwen 2 and Qwen 3 models only, and the base model is none"
    )
    raise UnsupportedSetting(f"training.sharding on {reason}; use auto", "training.sharding")


def _checkpointing(hardware: Hardware, needs: Needs, longest_row: int, kept: int) -> str | bool:
    """`auto`: only if the longest row would not fit otherwise."""
    return False if longest_row * needs.token <= _room(hardware, kept) else "unsloth"
