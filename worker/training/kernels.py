"""Triton kernels for what a decoder's layer does between its products: read once, written once.

PyTorch's compiler makes these from the same formulas, but for any number of rows its code for joined and split halves
reaches a quarter of the memory's speed (docs/experiments.md); here it is bound by it. Sums and exponentials are in 32
bits. t tokens, d hidden size, f inner size.
"""

from typing import Any

import torch
import triton
import triton.language as tl

ROWS = 4
"""Rows one program of the element-wise kernels takes."""


def _block(size: int) -> int:
    block: int = triton.next_power_of_2(size)
    return block


# h = x + delta, y = norm(h) x weight


@triton.jit
def _add_norm_forward(x, delta, weight, h, y, scale, rows, d, eps, HAS_DELTA: tl.constexpr, R: tl.constexpr,
                      BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * d + column[None]
    inside = (row[:, None] < rows) & (column[None] < d)
    value = tl.load(x + at, inside, 0.0)
    if HAS_DELTA:
        value = value + tl.load(delta + at, inside, 0.0)  # rounded, as it is stored
        tl.store(h + at, value, inside)
    wide = value.to(tl.float32)
    s = tl.rsqrt(tl.sum(wide * wide, 1) / d + eps)
    tl.store(scale + row, s, row < rows)
    w = tl.load(weight + column, column < d, 0.0)
    normal = (wide * s[:, None]).to(value.dtype)
    tl.store(y + at, normal * w[None], inside)


@triton.jit
def _add_norm_backward(d_y, d_h, h, weight, scale, d_x, d_weight, rows, d, per_program, HAS_D_H: tl.constexpr,
                       R: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, column < d, 0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, per_program, R):
        row = program * per_program + start + tl.arange(0, R)
        at = row[:, None] * d + column[None]
        inside = (row[:, None] < rows) & (column[None] < d)
        s = tl.load(scale + row, row < rows, 0.0)
        normal = tl.load(h + at, inside, 0.0).to(tl.float32) * s[:, None]
        g = tl.load(d_y + at, inside, 0.0).to(tl.float32)
        total += tl.sum(g * normal, 0)
        g = g * w[None]
        inner = tl.sum(g * normal, 1) / d
        result = (g - normal * inner[:, None]) * s[:, None]
        if HAS_D_H:
            result += tl.load(d_h + at, inside, 0.0).to(tl.float32)
        tl.store(d_x + at, result.to(d_x.dtype.element_ty), inside)
    tl.store(d_weight + program * d + column, total, column < d)


class AddNorm(torch.autograd.Function):  # type: ignore[misc]  # torch is not analysed
    """(x, delta or None, weight, eps) → (x + delta, its norm). Last dimension d."""

    @staticmethod
    def forward(ctx: Any, x: Any, delta: Any, weight: Any, eps: float) -> Any:
        x = x.contiguous()
        d = x.shape[-1]
        rows = x.numel() // d
        y = torch.empty_like(x)
        h = x if delta is None else torch.empty_like(x)
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        _add_norm_forward[(triton.cdiv(rows, ROWS),)](
            x, x if delta is None else delta.contiguous(), weight, h, y, scale, rows, d, eps, delta is not None,
            ROWS, _block(d), num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(h, weight, scale)
        ctx.has_delta = delta is not None
        return h if ctx.has_delta else x.view_as(x), y

    @staticmethod
    def backward(ctx: Any, d_h: Any, d_y: Any) -> Any:
        h, weight, scale = ctx.saved_tensors
        d = h.shape[-1]
        rows = h.numel() // d
        programs = min(triton.cdiv(rows, ROWS), 1024)
        per_program = triton.cdiv(triton.cdiv(rows, programs), ROWS) * ROWS
        d_x = torch.empty_like(h)
        partial = torch.empty(programs, d, dtype=torch.float32, device=h.device)
        _add_norm_backward[(programs,)](
            d_y.contiguous(), d_y if d_h is None else d_h.contiguous(), h, weight, scale, d_x, partial, rows, d,
            per_program, d_h is not None, ROWS, _block(d), num_warps=4,
        )  # fmt: skip
        return d_x, d_x if ctx.has_delta else None, partial.sum(0).to(weight.dtype), None


# silu(gate) x up, of [t, 2 f]


@triton.jit
def _swiglu_forward(gate_up, out, rows, f, R: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None] < f)
    at = row[:, None] * 2 * f + column[None]
    gate = tl.load(gate_up + at, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + at + f, inside, 0.0)
    silu = (gate * tl.sigmoid(gate)).to(up.dtype)
    tl.store(out + row[:, None] * f + column[None], silu * up, inside)


@triton.jit
def _swiglu_backward(d_out, gate_up, d_gate_up, rows, f, R: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None] < f)
    at = row[:, None] * 2 * f + column[None]
    gate = tl.load(gate_up + at, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + at + f, inside, 0.0).to(tl.float32)
    g = tl.load(d_out + row[:, None] * f + column[None], inside, 0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    kind = d_gate_up.dtype.element_ty
    tl.store(d_gate_up + at, (g * up * s * (1 + gate * (1 - s))).to(kind), inside)
    tl.store(d_gate_up + at + f, (g * gate * s).to(kind), inside)


class SwiGlu(torch.autograd.Function):  # type: ignore[misc]
    """[t, 2 f] → [t, f]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Any) -> Any:
        rows, f = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, f, dtype=gate_up.dtype, device=gate_up.device)
        block = min(_block(f), 512)
        _swiglu_forward[(triton.cdiv(rows, ROWS), triton.cdiv(f, block))](gate_up, out, rows, f, ROWS, block)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Any) -> Any:
        (gate_up,) = ctx.saved_tensors
        rows, f = gate_up.shape[0], gate_up.shape[1] // 2
        d_gate_up = torch.empty_like(gate_up)
        block = min(_block(f), 512)
        _swiglu_backward[(triton.cdiv(rows, ROWS), triton.cdiv(f, block))](
            d_out.contiguous(), gate_up, d_gate_up, rows, f, ROWS, block
        )
        return d_gate_up


# Rotary embedding


@triton.jit
def _turn(source, target, cos, sin, rows, heads, turning, sign, R: tl.constexpr, HEADS: tl.constexpr,
          SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    head = tl.arange(0, HEADS)
    half = tl.arange(0, BLOCK)
    is_row = row < rows
    inside = is_row[:, None, None] & (head[None, :, None] < heads) & (half[None, None, :] < HALF)
    at = row[:, None, None] * heads * SIZE + head[None, :, None] * SIZE + half[None, None, :]
    one = tl.load(source + at, inside, 0.0).to(tl.float32)
    two = tl.load(source + at + HALF, inside, 0.0).to(tl.float32)
    angle = row[:, None] * HALF + half[None, :]
    is_angle = is_row[:, None] & (half[None, :] < HALF)
    c = tl.load(cos + angle, is_angle, 1.0).to(tl.float32)[:, None, :]
    s = tl.load(sin + angle, is_angle, 0.0).to(tl.float32)[:, None, :] * sign
    turns = head[None, :, None] < turning
    kind = target.dtype.element_ty
    tl.store(target + at, tl.where(turns, one * c - two * s, one).to(kind), inside)
    tl.store(target + at + HALF, tl.where(turns, two * c + one * s, two).to(kind), inside)


def turn(source: Any, target: Any, cos: Any, sin: Any, turning: int, *, back: bool = False) -> None:
    """Fill `target` with `source`, its first `turning` heads rotated (back); they may be the same.

    Shapes: [t, heads, size] contiguous; cos and sin [t, size / 2].
    """
    rows, heads, size = source.shape
    _turn[(triton.cdiv(rows, ROWS),)](
        source, target, cos, sin, rows, heads, turning, -1.0 if back else 1.0, ROWS, _block(heads), size, size // 2,
        _block(size // 2), num_warps=4,
    )  # fmt: skip


# bf16 copies of 32-bit weights


@triton.jit
def _round_by_thresholds(master, target, thresholds, numbers, PERIOD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(master + at, at < numbers, 0.0)
    bits = (value.to(tl.int32, bitcast=True) + tl.load(thresholds + at % PERIOD)) & -65536
    # A carry could make a number of what is none.
    rounded = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    tl.store(target + at, rounded.to(target.dtype.element_ty), at < numbers)


def round_by_thresholds(target: Any, master: Any, thresholds: Any) -> None:
    """`worker.rounding.copy` on a GPU."""
    numbers, block = master.numel(), 1024
    _round_by_thresholds[(triton.cdiv(numbers, block),)](master, target, thresholds, numbers, len(thresholds), block)
