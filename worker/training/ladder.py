"""What to give up, in which order, when a run does not fit the memory it has. Imports no torch.

    passes halved ─► of one conversation ─► gradient checkpointing ─► max_seq_length halved ─► nothing
    └───────────── gradients stay the same ──────────────────────┘   only with `on_oom: truncate`

Passes are halved in what chose their size: conversations where the client did (micro-batch halved, accumulation
doubled), else tokens, for half as many conversations may be as many tokens.

The supervisor goes down one rung at a time and resumes from the last checkpoint; the trainer only reports, and names
the rung that the user could take. The first rungs change speed and memory, never what is learnt: a step still sees
the same conversations. Shorter sequences change the data, so nobody does that unasked.
"""

from dataclasses import dataclass
from typing import Any

from shared.training_spec import TrainingSpec

SHORTEST_SEQUENCE = 128
"""Tokens below which sequences are not halved: little of a conversation would be left."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One step down."""

    overrides: dict[str, Any]
    """Replace these keys of the client's `training`. Complete: holds what earlier rungs changed too."""
    message: str
    """For the user: what ran out, what is done about it, what that changes."""
    param: str
    """The setting that does it."""
    advice: str
    """The same as something the user could do: an imperative, without its full stop."""


def next_rung(training: TrainingSpec, resolved: dict[str, Any]) -> Rung | None:
    """The rung below a run that ran out of memory, or None if the client allows no further one or none is left.

    Args:
        training: the choices of the run that did not fit, earlier rungs' overrides included.
        resolved: what they came to, as in `Started`; empty if the trainer never got that far, and then the model
            alone is too large.
    """
    rung = below(training, resolved)
    if rung is None or training.on_oom == "fail":
        return None
    if rung.param == "training.max_seq_length" and training.on_oom != "truncate":
        return None
    return rung


def below(training: TrainingSpec, resolved: dict[str, Any]) -> Rung | None:
    """The rung below, whether the client allows it or not."""
    if not resolved:
        return None
    batch, micro, tokens = resolved["batch_size"], resolved["micro_batch_size"], resolved.get("tokens_per_pass")
    checkpointing = training.gradient_checkpointing
    if training.chooses_micro_batch and tokens is not None:
        kept = {"batch_size": batch, "tokens_per_pass": tokens, "gradient_checkpointing": checkpointing}
        # A longer conversation has a pass of its own, so below the longest one no limit helps.
        fewer = max(tokens // 2, resolved.get("longest_row", 1))
        smallest = f"training.tokens_per_pass {tokens}"
        if fewer < tokens:
            return Rung(
                {**kept, "tokens_per_pass": fewer},
                f"Memory ran out: training goes on with training.tokens_per_pass {fewer} instead of {tokens}. The "
                f"batch stays {batch}, so gradients are the same; steps may take longer.",
                "training.tokens_per_pass",
                f"set training.tokens_per_pass to {fewer} (it was {tokens}), which changes no gradient",
            )
    else:
        kept = {
            "batch_size": batch,
            "micro_batch_size": micro,
            "gradient_accumulation_steps": batch // micro,
            "gradient_checkpointing": checkpointing,
        }
        smallest = "training.micro_batch_size 1"
        if micro > 1:
            smaller = max(size for size in range(1, micro // 2 + 1) if batch % size == 0)
            return Rung(
                {**kept, "micro_batch_size": smaller, "gradient_accumulation_steps": batch // smaller},
                f"Memory ran out: training goes on with training.micro_batch_size {smaller} instead of {micro} and "
                f"gradient_accumulation_steps {batch // smaller} instead of {batch // micro}. The batch stays {batch}, "
                "so gradients are the same; steps may take longer.",
                "training.micro_batch_size",
                f"set training.micro_batch_size to {smaller} (it was {micro}) and gradient_accumulation_steps to "
                f"{batch // smaller} (it was {batch // micro}), which changes no gradient",
            )
    if resolved["gradient_checkpointing"] is False:
        return Rung(
            {**kept, "gradient_checkpointing": "unsloth"},
            f"Memory ran out with {smallest}: training goes on with gradient checkpointing, which computes activations "
            f"twice instead of keeping them. The batch stays {batch}, so gradients are the same; steps take about a "
            "third longer.",
            "training.gradient_checkpointing",
            "set training.gradient_checkpointing to true (it was off), which changes no gradient",
        )
    longest = resolved["max_seq_length"]
    if longest <= SHORTEST_SEQUENCE:
        return None
    shorter = max(longest // 2, SHORTEST_SEQUENCE)
    return Rung(
        # Cut rows may be dropped, and then an epoch is shorter; the run must not end earlier for it.
        {**kept, "max_seq_length": shorter, "max_steps": resolved["max_steps"]},
        f"Memory ran out with {smallest} and gradient checkpointing: training goes on with "
        f"training.max_seq_length {shorter} instead of {longest}, as on_oom: truncate asks. The batch stays {batch}, "
        "but longer conversations are cut.",
        "training.max_seq_length",
        f"set training.max_seq_length to {shorter} (it was {longest}); longer conversations are then cut",
    )
