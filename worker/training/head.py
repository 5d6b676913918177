"""The language-model head and its loss, over the positions that are trained on and no others.

The whole of the logits never exists: a chunk of positions at a time is multiplied with the head, turned into its own
gradient in place, and multiplied back, so that nothing of it is kept for the backward pass. Right answers are counted
on the way. The same cross-entropy, exactly (a test compares it with PyTorch's).
"""

from functools import lru_cache
from typing import Any

import torch

CHUNK_ROWS = 512
"""Positions whose logits are held at once."""


def loss_sum(
    hidden_nd: torch.Tensor, weight_vd: torch.Tensor, targets_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the cross-entropies in nats, number of targets that were the likeliest token).

    Products are in the number format of their factors, sums in 32 bits. Shapes: n positions, d hidden size, v tokens.
    """
    loss, correct = _HeadLoss.apply(hidden_nd, weight_vd, targets_n, torch.is_grad_enabled())
    return loss, correct


class _HeadLoss(torch.autograd.Function):  # type: ignore[misc]  # torch is not analysed
    """Both gradients are formed with the loss, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets_n: Any, with_gradients: bool) -> Any:
        d_hidden = torch.empty_like(hidden)
        d_weight = None
        several = len(hidden) > CHUNK_ROWS
        loss = torch.zeros((), dtype=torch.float32)
        correct = torch.zeros((), dtype=torch.long)
        for start in range(0, len(hidden), CHUNK_ROWS):
            h, target = hidden[start : start + CHUNK_ROWS], targets_n[start : start + CHUNK_ROWS].unsqueeze(-1)
            products, logits = (buffer[: len(h)] for buffer in _scratch(CHUNK_ROWS, len(weight), hidden.dtype))
            torch.mm(h, weight.t(), out=products)
            logits.copy_(products)
            correct += (logits.argmax(-1, keepdim=True) == target).sum()
            normaliser = logits.logsumexp(-1, keepdim=True)
            log_p_target = logits.gather(-1, target) - normaliser
            loss -= log_p_target.sum()
            if not with_gradients:
                continue
            # d loss / d logits is the softmax, less one at the target.
            logits.sub_(normaliser).exp_().scatter_(-1, target, log_p_target.expm1())
            d_logits = products.copy_(logits)
            torch.mm(d_logits, weight, out=d_hidden[start : start + CHUNK_ROWS])
            part = d_logits.t() @ h
            if d_weight is not None:
                d_weight += part
            else:
                d_weight = part.float() if several else part
        if with_gradients and d_weight is None:  # nothing is learned from
            d_weight = torch.zeros_like(weight)
        ctx.gradients = d_hidden, d_weight
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, d_loss: Any, _d_correct: Any) -> Any:
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None  # ours alone, so scaled in place
        return d_hidden.mul_(d_loss), d_weight.mul_(d_loss).to(ctx.weight_dtype), None, None


@lru_cache(maxsize=1)
def _scratch(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Buffers for logits as products come out and in 32 bits, kept for the life of the process.

    Fresh ones of a new size at each pass cut the heap into pieces: 8 GB resident after 14 steps instead of 5.
    """
    return torch.empty(rows, vocabulary, dtype=dtype), torch.empty(rows, vocabulary, dtype=torch.float32)
