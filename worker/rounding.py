"""32-bit weights as bf16 copies that show small changes too.

Rounding to nearest hides every change below half of a weight's last digit. Fine-tuning starts from numbers that are
bf16 already and moves them by less than that for dozens of steps: at a learning rate of 2e-5 runs learned visibly less
than in 32 bits throughout (docs/experiments.md). Here each weight has a threshold of its own, fixed and evenly spread:
of many weights that have moved by a third of a digit, a third shows it. What is bf16 already stays as it is, and the
same masters give the same copies, in every process, after a resumption, and where the model is served.
"""

from functools import lru_cache

import numpy as np
import torch

PERIOD = 2**18
"""Thresholds there are; numbers that CPUs compute at once, whose scratch stays in their caches."""
HIDDEN_BITS = 16
"""Of 32 bits, those that bf16 hasn't got."""


def copy(target: torch.Tensor, master: torch.Tensor) -> None:
    """Fill `target` from a master of its shape, both contiguous. Anything but bf16 from 32 bits is just copied."""
    if target.dtype != torch.bfloat16 or master.dtype != torch.float32:
        target.copy_(master)
    elif master.is_cuda:
        from worker.training import kernels

        kernels.round_by_thresholds(target, master, thresholds(master.device))
    else:
        _copy(target.view(-1), master.detach().view(-1).view(torch.int32))


@lru_cache
def thresholds(device: torch.device) -> torch.Tensor:
    """[PERIOD], whole numbers from 0 to 65,535, which a carry out of the hidden bits decides by.

    Source: the integer hash of Chris Wellons, github.com/skeeto/hash-prospector (lowbias32).
    """
    x = np.arange(PERIOD, dtype=np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    return torch.from_numpy((x & np.uint32(2**HIDDEN_BITS - 1)).astype(np.int32)).to(device)


def _copy(target_n: torch.Tensor, bits_n: torch.Tensor) -> None:
    # A CPU's NaN, 0x7FC00000 or its negative, stays one whatever is added; one of a GPU never gets into a checkpoint.
    carries, scratch = thresholds(bits_n.device), torch.empty(PERIOD, dtype=torch.int32)
    for start in range(0, len(bits_n), PERIOD):
        bits = bits_n[start : start + PERIOD]
        sums = torch.add(bits, carries[: len(bits)], out=scratch[: len(bits)]).bitwise_and_(-(2**HIDDEN_BITS))
        target_n[start : start + PERIOD].copy_(sums.view(torch.float32))
