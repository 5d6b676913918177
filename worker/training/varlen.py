"""Triton kernels for attention over a flat run of tokens: many short conversations, and what all of them begin with.

PyTorch's kernel for varied lengths starts as many blocks for each sequence as the longest one needs, and wants the
shared beginning's keys again for each; on conversations of 200 tokens that is four fifths of its time
(docs/experiments.md). Here the host lists the tiles there are: a program takes one, of queries or of keys, and one
head. Keys and values of the shared beginning are read where they are.

Scores and sums are in 32 bits, products in the number format of q, k and v.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

TILE = 64
"""Queries or keys of one program."""
PREFIX_SPLIT = 512
"""Queries per program that add up the gradient of the shared beginning's keys: it is everybody's, so many take part."""
MOST_PARTIAL_SUMS = 1024
"""Of tiles of the beginning; each takes memory. With a long beginning its own tiles are programs enough."""
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Tiles:
    """What programs do, as lists of numbers: a row each.

    queries: first, end, first key of their own, length of the prefix they also see
    keys: first, end, first query that may see them, end of those, slot of a partial sum or -1
    """

    queries: npt.NDArray[np.int32]
    keys: npt.NDArray[np.int32]


def tiles(prefix: int, lengths: Sequence[int], total: int) -> Tiles:
    """Of a run of `total` tokens, of which those after the prefix and the lengths are padding."""
    queries, keys = [], []
    splits, used = prefix_splits(prefix, total), prefix + sum(lengths)
    each = -(-total // splits)
    for number, first in enumerate(range(0, prefix, TILE)):
        end = min(first + TILE, prefix)
        queries.append((first, end, 0, 0))
        for split in range(splits):
            start, until = max(split * each, first), min((split + 1) * each, used)
            keys.append((first, end, start, max(start, until), number * splits + split))
    own = prefix
    for length in lengths:
        for first in range(own, own + length, TILE):
            end = min(first + TILE, own + length)
            queries.append((first, end, own, prefix))
            keys.append((first, end, first, own + length, -1))
        own += length
    for first in range(own, total, TILE):  # padding: must be written, and be finite
        end = min(first + TILE, total)
        queries.append((first, end, first, 0))
        keys.append((first, end, first, end, -1))
    return Tiles(np.array(queries, dtype=np.int32), np.array(keys, dtype=np.int32))


def prefix_splits(prefix: int, total: int) -> int:
    """Programs that share the queries for one tile of the prefix's keys."""
    blocks = -(-prefix // TILE)
    return min(-(-total // PREFIX_SPLIT), max(MOST_PARTIAL_SUMS // max(blocks, 1), 1))


def prefix_tiles(prefix: int, total: int) -> int:
    """Tiles of keys that the prefix takes."""
    return -(-prefix // TILE) * prefix_splits(prefix, total)


@triton.jit
def _forward(qkv, out, logsumexp, queries, stride, out_stride, tokens, scale, H: tl.constexpr, K: tl.constexpr,
             D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(queries + tile * 4)
    end = tl.load(queries + tile * 4 + 1)
    own = tl.load(queries + tile * 4 + 2)
    prefix = tl.load(queries + tile * 4 + 3)
    if start < end:
        group = head // (H // K)
        m = start + tl.arange(0, M)
        d = tl.arange(0, BLOCK_D)
        is_d = d < D
        rows = m.to(tl.int64)[:, None]
        q = tl.load(qkv + rows * stride + head * D + d[None], (m < end)[:, None] & is_d[None], 0.0)
        best = tl.full((M,), -1.0e30, tl.float32)
        total = tl.zeros((M,), tl.float32)
        sums = tl.zeros((M, BLOCK_D), tl.float32)
        for first in range(0, prefix, M):
            n = first + tl.arange(0, M)
            at = n.to(tl.int64)[:, None] * stride + group * D + d[None]
            inside = (n < prefix)[:, None] & is_d[None]
            k = tl.load(qkv + at + H * D, inside, 0.0)
            v = tl.load(qkv + at + (H + K) * D, inside, 0.0)
            s = tl.where((n < prefix)[None], tl.dot(q, tl.trans(k)) * scale, -1.0e30)
            higher = tl.maximum(best, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
            shrink = tl.exp2(best - higher)
            total = total * shrink + tl.sum(p, 1)
            sums = tl.dot(p.to(v.dtype), v, sums * shrink[:, None])
            best = higher
        for first in range(own, end, M):
            n = first + tl.arange(0, M)
            at = n.to(tl.int64)[:, None] * stride + group * D + d[None]
            inside = (n < end)[:, None] & is_d[None]
            k = tl.load(qkv + at + H * D, inside, 0.0)
            v = tl.load(qkv + at + (H + K) * D, inside, 0.0)
            s = tl.where((n < end)[None] & (n[None] <= m[:, None]), tl.dot(q, tl.trans(k)) * scale, -1.0e30)
            higher = tl.maximum(best, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
            shrink = tl.exp2(best - higher)
            total = total * shrink + tl.sum(p, 1)
            sums = tl.dot(p.to(v.dtype), v, sums * shrink[:, None])
            best = higher
        result = (sums / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + rows * out_stride + head * D + d[None], result, (m < end)[:, None] & is_d[None])
        tl.store(logsumexp + head * tokens + m, best + tl.log2(total), m < end)


@triton.jit
def _backward_queries(qkv, out, d_out, logsumexp, delta, d_qkv, queries, stride, out_stride, tokens, scale, natural,
                      H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                      M: tl.constexpr):  # fmt: skip
    """`scale` is of scores in powers of two, `natural` of scores."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(queries + tile * 4)
    end = tl.load(queries + tile * 4 + 1)
    own = tl.load(queries + tile * 4 + 2)
    prefix = tl.load(queries + tile * 4 + 3)
    if start < end:
        group = head // (H // K)
        m = start + tl.arange(0, M)
        d = tl.arange(0, BLOCK_D)
        is_d = d < D
        rows = m.to(tl.int64)[:, None]
        real = (m < end)[:, None] & is_d[None]
        q = tl.load(qkv + rows * stride + head * D + d[None], real, 0.0)
        g = tl.load(d_out + rows * out_stride + head * D + d[None], real, 0.0)
        o = tl.load(out + rows * out_stride + head * D + d[None], real, 0.0)
        lse = tl.load(logsumexp + head * tokens + m, m < end, 0.0)
        inner = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta + head * tokens + m, inner, m < end)
        d_q = tl.zeros((M, BLOCK_D), tl.float32)
        for first in range(0, prefix, M):
            n = first + tl.arange(0, M)
            at = n.to(tl.int64)[:, None] * stride + group * D + d[None]
            inside = (n < prefix)[:, None] & is_d[None]
            k = tl.load(qkv + at + H * D, inside, 0.0)
            v = tl.load(qkv + at + (H + K) * D, inside, 0.0)
            p = tl.where((n < prefix)[None], tl.exp2(tl.dot(q, tl.trans(k)) * scale - lse[:, None]), 0.0)
            d_s = p * (tl.dot(g, tl.trans(v)) - inner[:, None])
            d_q = tl.dot(d_s.to(k.dtype), k, d_q)
        for first in range(own, end, M):
            n = first + tl.arange(0, M)
            at = n.to(tl.int64)[:, None] * stride + group * D + d[None]
            inside = (n < end)[:, None] & is_d[None]
            k = tl.load(qkv + at + H * D, inside, 0.0)
            v = tl.load(qkv + at + (H + K) * D, inside, 0.0)
            seen = (n < end)[None] & (n[None] <= m[:, None])
            p = tl.where(seen, tl.exp2(tl.dot(q, tl.trans(k)) * scale - lse[:, None]), 0.0)
            d_s = p * (tl.dot(g, tl.trans(v)) - inner[:, None])
            d_q = tl.dot(d_s.to(k.dtype), k, d_q)
        result = (d_q * natural).to(d_qkv.dtype.element_ty)
        tl.store(d_qkv + rows * stride + head * D + d[None], result, real)


@triton.jit
def _backward_keys(qkv, d_out, logsumexp, delta, d_qkv, partial, keys, stride, out_stride, tokens, scale, natural,
                   H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                   M: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    group = tl.program_id(1)
    start = tl.load(keys + tile * 5)
    end = tl.load(keys + tile * 5 + 1)
    first_query = tl.load(keys + tile * 5 + 2)
    end_query = tl.load(keys + tile * 5 + 3)
    slot = tl.load(keys + tile * 5 + 4)
    if start < end:
        n = start + tl.arange(0, M)
        d = tl.arange(0, BLOCK_D)
        is_d = d < D
        rows = n.to(tl.int64)[:, None]
        real = (n < end)[:, None] & is_d[None]
        k = tl.load(qkv + rows * stride + (H + group) * D + d[None], real, 0.0)
        v = tl.load(qkv + rows * stride + (H + K + group) * D + d[None], real, 0.0)
        d_k = tl.zeros((M, BLOCK_D), tl.float32)
        d_v = tl.zeros((M, BLOCK_D), tl.float32)
        for head in range(group * (H // K), (group + 1) * (H // K)):
            for first in range(first_query, end_query, M):
                m = first + tl.arange(0, M)
                at = m.to(tl.int64)[:, None]
                inside = (m < end_query)[:, None] & is_d[None]
                q = tl.load(qkv + at * stride + head * D + d[None], inside, 0.0)
                g = tl.load(d_out + at * out_stride + head * D + d[None], inside, 0.0)
                lse = tl.load(logsumexp + head * tokens + m, m < end_query, 0.0)
                inner = tl.load(delta + head * tokens + m, m < end_query, 0.0)
                seen = (m < end_query)[None] & (n < end)[:, None] & (n[:, None] <= m[None])
                p = tl.where(seen, tl.exp2(tl.dot(k, tl.trans(q)) * scale - lse[None]), 0.0)
                d_v = tl.dot(p.to(g.dtype), g, d_v)
                d_s = p * (tl.dot(v, tl.trans(g)) - inner[None])
                d_k = tl.dot(d_s.to(q.dtype), q, d_k)
        d_k = d_k * natural
        if slot < 0:
            kind = d_qkv.dtype.element_ty
            tl.store(d_qkv + rows * stride + (H + group) * D + d[None], d_k.to(kind), real)
            tl.store(d_qkv + rows * stride + (H + K + group) * D + d[None], d_v.to(kind), real)
        else:
            place = (slot.to(tl.int64) * M + tl.arange(0, M))[:, None] * (2 * K * D) + group * D + d[None]
            tl.store(partial + place, d_k, is_d[None] & (n < start + M)[:, None])
            tl.store(partial + place + K * D, d_v, is_d[None] & (n < start + M)[:, None])


def forward(qkv: Any, queries: Any, heads: int, groups: int) -> tuple[Any, Any]:
    """(what is attended to [t, heads, size], the scores' logsumexp in powers of two [heads, t]).

    Args:
        qkv: [t, heads + 2 groups, size], rotated, contiguous.
        queries: `Tiles.queries` on the GPU, in 32 bits; rows of zeros do nothing.
    """
    tokens, _, size = qkv.shape
    out = torch.empty(tokens, heads, size, dtype=qkv.dtype, device=qkv.device)
    logsumexp = torch.empty(heads, tokens, dtype=torch.float32, device=qkv.device)
    _forward[(len(queries), heads)](
        qkv, out, logsumexp, queries, qkv.stride(0), out.stride(0), tokens, size**-0.5 * LOG2_E, heads, groups, size,
        _block(size), TILE, num_warps=_warps(size),
    )  # fmt: skip
    return out, logsumexp


def backward(
    d_out: Any, qkv: Any, out: Any, logsumexp: Any, queries: Any, keys: Any, prefix: int, heads: int, groups: int
) -> Any:
    """The gradient of the rotated q, k and v."""
    tokens, _, size = qkv.shape
    d_qkv = torch.empty_like(qkv)
    delta = torch.empty_like(logsumexp)
    blocks, splits = -(-prefix // TILE), prefix_splits(prefix, tokens)
    partial = torch.empty(max(blocks, 1), splits, TILE, 2 * groups, size, dtype=torch.float32, device=qkv.device)
    scales = (size**-0.5 * LOG2_E, size**-0.5)
    rest = (heads, groups, size, _block(size), TILE)
    _backward_queries[(len(queries), heads)](
        qkv, out, d_out, logsumexp, delta, d_qkv, queries, qkv.stride(0), out.stride(0), tokens, *scales, *rest,
        num_warps=_warps(size),
    )  # fmt: skip
    _backward_keys[(len(keys), groups)](
        qkv, d_out, logsumexp, delta, d_qkv, partial, keys, qkv.stride(0), out.stride(0), tokens, *scales, *rest,
        num_warps=_warps(size),
    )  # fmt: skip
    if prefix:
        d_qkv[:prefix, heads:] = partial.sum(1).flatten(0, 1)[:prefix].to(d_qkv.dtype)
    return d_qkv


def _block(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


def _warps(size: int) -> int:
    return 4 if size <= 64 else 8
