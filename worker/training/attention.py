"""Attention over one flat run of tokens: a beginning shared by several conversations, then the rest of each.

The shared beginning attends to itself, each rest to the beginning and to itself, all causally; nothing else exists.
Rotary embedding is part of it, so that the gradient of q, k and v comes back as one tensor.

Short conversations of like length are attended to together, padded; of long ones, as many queries at a time as make
products of a good size, with the keys up to the last of them. PyTorch's own kernel takes twice as long at these sizes
(docs/experiments.md).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MOST_QUERIES = 256
"""Tokens of one conversation in one group."""
MOST_PADDING = 1.3
"""Within a group, the longest conversation over the shortest."""
MOST_SCORES = 2**20
"""Scores a head holds for one group of several conversations."""
MOST_KEPT = 2**20
"""Probabilities of one group that are kept for the backward pass; of more, only what they are made from."""


@dataclass(frozen=True, slots=True)
class Group:
    """Queries that are computed together: of n conversations, l each, and the k keys that each of those may see.

    Padding points at the run's first token; it comes after everything, so that no real token sees it.
    """

    rows_nl: torch.Tensor
    """Where the queries are in the run."""
    keys_nk: torch.Tensor
    """Where the keys are: the shared beginning, then the conversation's own, the queries last."""
    prefix: int
    """How many of the keys are the shared beginning's."""
    own: torch.Tensor | None
    """Indices into the flattened [n, l] that are no padding; None: all."""
    bias_lk: torch.Tensor
    """0 where a query may look, else minus infinity."""

    @property
    def places(self) -> torch.Tensor:
        """Where in the run the queries that are no padding are."""
        rows = self.rows_nl.flatten()
        return rows if self.own is None else rows[self.own]


@dataclass(frozen=True, slots=True)
class Layout:
    """Who attends to whom in one run of tokens."""

    groups: tuple[Group, ...]


def layout(prefix: int, lengths: Sequence[int]) -> Layout:
    """The layout of a pass; `lengths` ascend, so that neighbours are alike."""
    groups = list(_long(0, 0, prefix)) if prefix else []
    members: list[tuple[int, int]] = []
    start = prefix
    for length in lengths:
        if members and not _fits(members, length, prefix):
            groups.append(_short(prefix, members))
            members = []
        if length > MOST_QUERIES:
            groups += _long(prefix, start, length)
        else:
            members.append((start, length))
        start += length
    if members:
        groups.append(_short(prefix, members))
    return Layout(tuple(groups))


def _fits(members: Sequence[tuple[int, int]], length: int, prefix: int) -> bool:
    if length > MOST_QUERIES or length > members[0][1] * MOST_PADDING:
        return False
    return (len(members) + 1) * length * (prefix + length) <= MOST_SCORES


def _short(prefix: int, members: Sequence[tuple[int, int]]) -> Group:
    longest = max(length for _, length in members)
    starts = torch.tensor([start for start, _ in members])[:, None]
    lengths = torch.tensor([length for _, length in members])[:, None]
    offsets = torch.arange(longest)[None]
    real = offsets < lengths
    rows = torch.where(real, starts + offsets, 0)
    keys = torch.cat([torch.arange(prefix).expand(len(members), prefix), rows], dim=1)
    own = None if bool(real.all()) else real.flatten().nonzero().flatten()
    return Group(rows, keys, prefix, own, _bias(longest, prefix))


def _long(prefix: int, start: int, length: int) -> Iterator[Group]:
    for first in range(0, length, MOST_QUERIES):
        end = min(first + MOST_QUERIES, length)
        rows = torch.arange(start + first, start + end)[None]
        keys = torch.cat([torch.arange(prefix), torch.arange(start, start + end)])[None]
        yield Group(rows, keys, prefix, None, _bias(end - first, prefix + first))


def _bias(queries: int, before: int) -> torch.Tensor:
    """Of queries that follow `before` keys which all of them may see."""
    return torch.full((queries, before + queries), -math.inf).triu(before + 1)


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
            p = _probabilities(q, k, group.bias_lk)
            result[group.places] = _to_rows(torch.bmm(p, v), group, heads)
            kept.append(p if p.numel() <= MOST_KEPT else None)
        ctx.save_for_backward(turned, cos, sin, *kept)
        ctx.layout, ctx.heads, ctx.kv_heads = layout, heads, kv_heads
        return result

    @staticmethod
    def backward(ctx: Any, d_result: Any) -> Any:
        turned, cos, sin, *kept = ctx.saved_tensors
        heads, kv_heads = ctx.heads, ctx.kv_heads
        d_turned = torch.zeros_like(turned)
        d_q, d_k, d_v = d_turned.split((heads, kv_heads, kv_heads), dim=1)
        for group, p in zip(ctx.layout.groups, kept, strict=True):
            q, k, v = _gather(turned, group, heads, kv_heads)
            if p is None:
                p = _probabilities(q, k, group.bias_lk)
            d_out = _as_groups(d_result[group.rows_nl], kv_heads)
            if group.own is not None:
                d_out *= _is_real(group, kv_heads, heads // kv_heads, d_out.dtype)
            d_p = torch.bmm(d_out, v.transpose(1, 2))
            d_s = torch._softmax_backward_data(d_p.float(), p.float(), -1, torch.float32)
            d_s = d_s.mul_(q.shape[-1] ** -0.5).to(q.dtype)
            d_q[group.places] = _to_rows(torch.bmm(d_s, k), group, heads)
            _add_to_keys(d_k, torch.bmm(d_s.transpose(1, 2), q), group)
            _add_to_keys(d_v, torch.bmm(p.transpose(1, 2), d_out), group)
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
    rows = x.reshape(n, heads, length, x.shape[-1]).transpose(1, 2).flatten(0, 1)
    return rows if group.own is None else rows[group.own]


def _is_real(group: Group, kv_heads: int, per_kv_head: int, dtype: torch.dtype) -> Any:
    """1 for tokens, 0 for padding, shaped to multiply [n x kv_heads, per_kv_head x l, size]."""
    n, length = group.rows_nl.shape
    real = torch.zeros(n * length, dtype=dtype)
    real[group.own] = 1
    return real.view(n, 1, length).repeat(1, kv_heads, per_kv_head).view(n * kv_heads, -1, 1)


def _add_to_keys(target: Any, gradient: Any, group: Group) -> None:
    """Add [n x kv_heads, k, size] to the rows [t, kv_heads, size] that the group's keys are."""
    n = len(group.rows_nl)
    per = gradient.view(n, -1, *gradient.shape[1:]).transpose(1, 2)
    if n == 1:
        target[group.keys_nk[0]] += per[0]
        return
    if group.prefix:
        target[: group.prefix] += per[:, : group.prefix].sum(0)
    own = per[:, group.prefix :].flatten(0, 1)
    target[group.places] += own if group.own is None else own[group.own]


def _probabilities(q: Any, k: Any, bias_lk: Any) -> Any:
    """Scores are in 32 bits: a difference of theirs is a factor."""
    bias = bias_lk.repeat(q.shape[1] // len(bias_lk), 1)
    scores = torch.baddbmm(bias, q.float(), k.float().transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.softmax(scores, -1).to(q.dtype)
