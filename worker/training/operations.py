"""The pieces of a decoder's layer between its matrix products, for CPUs: few passes over memory, exact gradients.

Autograd's own chains of small operations read and write every intermediate; here forward and backward are written
out, in 32 bits where a sum or an exponential needs it. `worker.training.gpu` has the same pieces for GPUs.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F

from worker.training import attention, head
from worker.training.attention import Layout


class Operations(Protocol):
    """What `worker.training.decoder` is made of besides products. t tokens, d hidden size."""

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + delta, its root mean square norm times the weight), over the last dimension."""
        ...

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[t, 2 f] → [t, f]: silu(first half) x second half."""
        ...

    def attention(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: Layout, heads: int, groups: int
    ) -> torch.Tensor:
        """[t, heads + 2 groups, head size] → [t, heads, head size], rotary embedding included."""
        ...

    def loss_sum(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the cross-entropies in nats, number of targets that were the likeliest token)."""
        ...


class CpuOperations:
    """See the module."""

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        h = x if delta is None else x + delta
        return h, _RmsNorm.apply(h, weight, eps)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _SwiGlu.apply(gate_up)
        return result

    def attention(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: Layout, heads: int, groups: int
    ) -> torch.Tensor:
        result: torch.Tensor = attention.CpuAttention.apply(qkv, cos, sin, layout, heads, groups)
        return result

    def loss_sum(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return head.loss_sum(hidden, weight, targets)


class _RmsNorm(torch.autograd.Function):  # type: ignore[misc]  # torch is not analysed
    """x / sqrt(mean(x²) + eps), rounded to x's format, times the weight: as transformers computes it."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, eps: float) -> Any:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normal = (wide * scale).to(x.dtype)
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, d_y: Any) -> Any:
        normal, scale, weight = ctx.saved_tensors
        d_weight = (d_y * normal).flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)
        d_normal, wide = (d_y * weight).float(), normal.float()
        inner = (d_normal * wide).mean(-1, keepdim=True)
        d_x = d_normal.addcmul_(wide, inner, value=-1).mul_(scale)
        return d_x.to(d_y.dtype), d_weight, None


class _SwiGlu(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, gate_up: Any) -> Any:
        gate, up = gate_up.chunk(2, -1)
        ctx.save_for_backward(gate_up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, d_y: Any) -> Any:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, -1)
        torch.mul(d_y, F.silu(gate), out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(d_y * up, gate))
        return d_gate_up
