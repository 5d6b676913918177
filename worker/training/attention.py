"""Attention over one flat run of tokens: a beginning shared by several conversations, then the rest of each.

The shared beginning attends to itself, each rest to the beginning and to itself, all causally; nothing else exists.
Rotary embedding is part of it, so that the gradient of q, k and v comes back as one tensor.

On CPU short conversations are attended to in padded groups with plain products, where PyTorch's kernel takes four
times as long; long ones one by one through that kernel, which never holds their scores. Source: docs/experiments.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

LONGEST_IN_GROUPS = 256
"""Tokens of a conversation up to which plain products win."""
MOST_PADDING = 1.3
"""Within a group, the longest conversation over the shortest."""
MOST_GROUP_SCORES = 2**20
"""Scores a head holds for one group: bounds what is kept for the backward pass."""


@dataclass(frozen=True, slots=True)
class Group:
    """Conversations that are attended to together: n of them, padded to l tokens, p tokens of prefix before each.

    Padding points at the run's first token; it comes after everything, so that no real token sees it.
    """

    rows_nl: torch.Tensor
    """Where their tokens are."""
    keys_nk: torch.Tensor
    """Where what they attend to is: the prefix, then themselves; k = p + l."""
    own: torch.Tensor
    """Indices into the flattened [n, l] that are no padding."""
    places: torch.Tensor
    """Where those are in the run."""
    prefix: int
    bias_lk: torch.Tensor | None
    """0 where a token may look, else minus infinity; None for conversations of one, which go through the kernel."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Who attends to whom in one run of tokens."""

    groups: tuple[Group, ...]


def layout(prefix: int, lengths: Sequence[int]) -> Layout:
    """The layout of a pass; `lengths` ascend, so that neighbours are alike."""
    groups = [_group(0, [(0, prefix)])] if prefix else []
    members: list[tuple[int, int]] = []
    start = prefix
    for length in lengths:
        if members and not _fits(members, length, prefix):
            groups.append(_group(prefix, members))
            members = []
        members.append((start, length))
        start += length
    groups.append(_group(prefix, members))
    return Layout(tuple(groups))


def _fits(members: Sequence[tuple[int, int]], length: int, prefix: int) -> bool:
    if length > LONGEST_IN_GROUPS or length > members[0][1] * MOST_PADDING:
        return False
    return (len(members) + 1) * length * (prefix + length) <= MOST_GROUP_SCORES


def _group(prefix: int, members: Sequence[tuple[int, int]]) -> Group:
    longest = max(length for _, length in members)
    starts = torch.tensor([start for start, _ in members])[:, None]
    lengths = torch.tensor([length for _, length in members])[:, None]
    offsets = torch.arange(longest)[None]
    real = offsets < lengths
    rows = torch.where(real, starts + offsets, 0)
    keys = torch.cat([torch.arange(prefix).expand(len(members), prefix), rows], dim=1)
    own = real.flatten().nonzero().flatten()
    bias = None
    if len(members) > 1 or longest <= LONGEST_IN_GROUPS:
        bias = torch.full((longest, prefix + longest), -math.inf).triu(prefix + 1)
    return Group(rows, keys, own, rows.flatten()[own], prefix, bias)


class CpuAttention(torch.autograd.Function):  # type: ignore[misc]  # torch is not analysed
    """[t, heads + 2 groups, head size] → [t, heads, head size]."""

    @staticmethod
    def forward(ctx: Any, qkv: Any, cos: Any, sin: Any, layout: Layout, heads: int, kv_heads: int) -> Any:
        turned = qkv.clone()
        _turn(turned[:, : heads + kv_heads], cos, sin)
        result = torch.empty_like(qkv[:, :heads])
        kept = []
        for group in layout.groups:
            q, k, v = _gather(turned, group, heads, kv_heads)
            if group.bias_lk is None:
                attended, *rest = _kernel(q, k, v, group.prefix)
            else:
                attended, *rest = _products(q, k, v, group.bias_lk)
            kept.append(rest)
            result[group.places] = _to_rows(attended, group, heads)
        ctx.save_for_backward(turned, cos, sin, *(tensor for rest in kept for tensor in rest))
        ctx.kept = [len(rest) for rest in kept]
        ctx.layout, ctx.heads, ctx.kv_heads = layout, heads, kv_heads
        return result

    @staticmethod
    def backward(ctx: Any, d_result: Any) -> Any:
        turned, cos, sin, *kept = ctx.saved_tensors
        heads, kv_heads = ctx.heads, ctx.kv_heads
        d_turned = torch.zeros_like(turned)
        d_q, d_k, d_v = d_turned.split((heads, kv_heads, kv_heads), dim=1)
        for group, count in zip(ctx.layout.groups, ctx.kept, strict=True):
            rest, kept = kept[:count], kept[count:]
            q, k, v = _gather(turned, group, heads, kv_heads)
            d_attended = _as_groups(d_result[group.rows_nl], kv_heads)
            if len(group.own) < group.rows_nl.numel():
                d_attended = d_attended * _is_real(group, heads // kv_heads, kv_heads, d_attended.dtype)
            if group.bias_lk is None:
                dq, dk, dv = _kernel_backward(d_attended, q, k, v, group.prefix, *rest)
            else:
                dq, dk, dv = _products_backward(d_attended, q, k, v, *rest)
            d_q[group.places] = _to_rows(dq, group, heads)
            for target, gradient in ((d_k, dk), (d_v, dv)):
                n = len(group.rows_nl)
                per = gradient.view(n, kv_heads, -1, gradient.shape[-1]).transpose(1, 2)
                if group.prefix:
                    target[: group.prefix] += per[:, : group.prefix].sum(0)
                target[group.places] += per[:, group.prefix :].flatten(0, 1)[group.own]
        _turn(d_turned[:, : heads + kv_heads], cos, -sin)
        return d_turned, None, None, None, None, None


def _turn(x: Any, cos: Any, sin: Any) -> None:
    """Rotate in place: x [t, heads, size], cos and sin [t, size / 2]."""
    one, two = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    first = torch.addcmul(one * cos, two, sin, value=-1)
    two.mul_(cos).addcmul_(one, sin)
    one.copy_(first)


def _gather(turned: Any, group: Group, heads: int, kv_heads: int) -> tuple[Any, Any, Any]:
    """q [n x kv_heads, heads per kv_head x l, size]; k and v [n x kv_heads, p + l, size]."""
    q = _as_groups(turned[:, :heads][group.rows_nl], kv_heads)
    k, v = turned[:, heads:][group.keys_nk].transpose(1, 2).split((kv_heads, kv_heads), dim=1)
    return q, k.flatten(0, 1), v.flatten(0, 1)


def _as_groups(x: Any, kv_heads: int) -> Any:
    """[n, l, heads, size] → [n x kv_heads, heads per kv_head x l, size]."""
    n, length, heads, size = x.shape
    x = x.view(n, length, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)
    return x.reshape(n * kv_heads, -1, size)


def _to_rows(x: Any, group: Group, heads: int) -> Any:
    """[n x kv_heads, heads per kv_head x l, size] → [tokens of the group, heads, size]."""
    n, length = group.rows_nl.shape
    x = x.reshape(n, heads, length, x.shape[-1]).transpose(1, 2)
    return x.flatten(0, 1)[group.own]


def _is_real(group: Group, per_kv_head: int, kv_heads: int, dtype: torch.dtype) -> Any:
    """1 for tokens, 0 for padding, shaped to multiply [n x kv_heads, per_kv_head x l, size]."""
    n, length = group.rows_nl.shape
    real = torch.zeros(n * length, dtype=dtype)
    real[group.own] = 1
    return real.view(n, 1, length).repeat(1, kv_heads, per_kv_head).view(n * kv_heads, -1, 1)


def _products(q: Any, k: Any, v: Any, bias_lk: Any) -> tuple[Any, Any]:
    """(what is attended to, the probabilities). Scores in 32 bits: a difference of theirs is a factor."""
    bias = bias_lk.repeat(q.shape[1] // len(bias_lk), 1)
    scores = torch.baddbmm(bias, q.float(), k.float().transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    p = torch.softmax(scores, -1).to(q.dtype)
    return torch.bmm(p, v), p


def _products_backward(d_out: Any, q: Any, k: Any, v: Any, p: Any) -> tuple[Any, Any, Any]:
    d_v = torch.bmm(p.transpose(1, 2), d_out)
    d_p = torch.bmm(d_out, v.transpose(1, 2))
    d_s = torch._softmax_backward_data(d_p.float(), p.float(), -1, torch.float32)
    d_s = d_s.mul_(q.shape[-1] ** -0.5).to(q.dtype)
    return torch.bmm(d_s, k), torch.bmm(d_s.transpose(1, 2), q), d_v


def _kernel(q: Any, k: Any, v: Any, prefix: int) -> tuple[Any, Any, Any]:
    """The same through PyTorch's kernel: (what is attended to, the same per head, the scores' logsumexp)."""
    heads, keys, values, mask = _for_kernel(q, k, v, prefix)
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        heads, keys, values, 0.0, mask is None, attn_mask=mask
    )
    return out[0].reshape(q.shape), out, logsumexp


def _kernel_backward(d_out: Any, q: Any, k: Any, v: Any, prefix: int, out: Any, logsumexp: Any) -> tuple[Any, Any, Any]:
    heads, keys, values, mask = _for_kernel(q, k, v, prefix)
    d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out.reshape(heads.shape), heads, keys, values, out, logsumexp, 0.0, mask is None, attn_mask=mask
    )
    per_kv_head = heads.shape[1] // len(k)
    shape = (len(k), per_kv_head, *k.shape[1:])
    return d_q[0].reshape(q.shape), d_k[0].view(shape).sum(1), d_v[0].view(shape).sum(1)


def _for_kernel(q: Any, k: Any, v: Any, prefix: int) -> tuple[Any, Any, Any, Any]:
    """Of one conversation, [1, heads, tokens, size] of each, and the mask if there is a prefix."""
    length = k.shape[1] - prefix
    per_kv_head = q.shape[1] // length
    heads = q.reshape(1, len(q) * per_kv_head, length, q.shape[-1])
    keys, values = (x.repeat_interleave(per_kv_head, 0)[None] for x in (k, v))
    mask = None
    if prefix:
        mask = torch.full((length, prefix + length), -math.inf, dtype=q.dtype).triu(prefix + 1)
    return heads, keys, values, mask
