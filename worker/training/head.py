"""The language-model head and its loss on CPU, over the positions that are trained on and no others.

Unsloth's CPU loss multiplies the head with every position, prompts included, and forms the weight's gradient in 32
bits; this one does neither, and counts right answers on the way, which Unsloth's can't tell. The same mean
cross-entropy, exactly (a test compares it with PyTorch's). On GPUs Unsloth's own fused kernel is used.
"""

from functools import lru_cache
from typing import Any

import torch

PLAIN_HEADS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose logits are hidden states times the head's weight: no scale, no soft cap, no bias."""
CHUNK_ROWS = 256
"""Positions whose logits are held at once."""


def is_plain(model: Any) -> bool:
    """Whether `loss_sum` computes what this model's own head would."""
    head = model.get_output_embeddings()
    return model.config.model_type in PLAIN_HEADS and head is not None and head.bias is None


def loss_sum(hidden_nd: torch.Tensor, weight_vd: torch.Tensor, targets_n: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(sum of the cross-entropies in nats, number of targets that were the likeliest token).

    Products are in the number format autocast asks for, sums in 32 bits. Shapes: n positions, d hidden size, v tokens.
    """
    loss, correct = _HeadLoss.apply(hidden_nd, weight_vd, targets_n)
    return loss, int(correct)


class _HeadLoss(torch.autograd.Function):  # type: ignore[misc]  # torch is not analysed
    """Both gradients are formed with the loss, chunk by chunk, so that no logits are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_nd: Any, weight_vd: Any, targets_n: Any) -> Any:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_nd.dtype
        hidden, weight = hidden_nd.to(dtype), weight_vd.to(dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=torch.float32)
        loss = torch.zeros((), dtype=torch.float32)
        correct = torch.zeros((), dtype=torch.long)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, len(hidden), CHUNK_ROWS):
                h, target = hidden[start : start + CHUNK_ROWS], targets_n[start : start + CHUNK_ROWS].unsqueeze(-1)
                products, logits = (buffer[: len(h)] for buffer in _scratch(CHUNK_ROWS, len(weight), dtype))
                torch.mm(h, weight.t(), out=products)
                logits.copy_(products)
                correct += (logits.argmax(-1, keepdim=True) == target).sum()
                normaliser = logits.logsumexp(-1, keepdim=True)
                log_p_target = logits.gather(-1, target) - normaliser
                loss -= log_p_target.sum()
                # d loss / d logits is the softmax, less one at the target.
                logits.sub_(normaliser).exp_().scatter_(-1, target, log_p_target.expm1())
                d_logits = products.copy_(logits)
                torch.mm(d_logits, weight, out=d_hidden[start : start + CHUNK_ROWS])
                d_weight += d_logits.t() @ h
        ctx.gradients = d_hidden, d_weight
        ctx.dtypes = hidden_nd.dtype, weight_vd.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, d_loss: Any, _d_correct: Any) -> Any:
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None  # ours alone, so scaled in place
        hidden_dtype, weight_dtype = ctx.dtypes
        return d_hidden.to(hidden_dtype).mul_(d_loss), d_weight.to(weight_dtype).mul_(d_loss), None


@lru_cache(maxsize=1)
def _scratch(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Buffers for logits as products come out and in 32 bits, kept for the life of the process.

    Fresh ones of a new size at each micro-batch cut the heap into pieces: 8 GB resident after 14 steps instead of 5.
    """
    return torch.empty(rows, vocabulary, dtype=dtype), torch.empty(rows, vocabulary, dtype=torch.float32)
