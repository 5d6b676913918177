"""The pieces of a decoder's layer between its matrix products, and whole passes as CUDA graphs, for NVIDIA GPUs.

Norms, rotary embedding, SwiGLU and the loss's softmax are bound by memory, and fused they read and write it once
(`kernels`). Attention is PyTorch's kernel for sequences of varied lengths.

A pass is launched kernel by kernel the first time its shape comes up and recorded as a graph the second time; from
then on the whole of it is one launch, however slow the host. So that shapes repeat, token counts are padded, with
sequences of their own that nothing is learned from.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from worker.training import kernels, step
from worker.training.passes import Pass

CHUNK_ROWS = 8192
"""Positions whose logits are held at once."""
PADDING_SEQUENCE = 128
"""Tokens of one sequence of padding: no longer than what a block of the attention kernel takes."""
MOST_GRAPHS = 64
"""Shapes whose graphs are kept. They share their memory."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What passes have in common that one graph can run: all sizes padded."""

    tokens: int
    prefix: int
    sequences: int
    """Including the prefix and the padding."""
    keys: int
    longest: int
    learned: int
    first: bool


class GpuLayout:
    """Who attends to whom, as the kernel for varied lengths takes it.

    Queries are the run's tokens; keys are, for each conversation, the prefix again and then its own tokens.
    """

    def __init__(self, shape: Shape, device: Any) -> None:
        def integers(*sizes: int, dtype: torch.dtype = torch.int64) -> Any:
            return torch.zeros(sizes, dtype=dtype, device=device)

        self.shape = shape
        self.query_ends = integers(shape.sequences + 1, dtype=torch.int32)
        self.key_ends = integers(shape.sequences + 1, dtype=torch.int32)
        self.key_rows = integers(shape.keys)
        """Of each key, its token."""
        self.own_keys = integers(shape.tokens)
        """Of each token, its key in its own conversation."""
        self.prefix_keys = integers(shape.prefix, shape.sequences)
        """Of each token of the prefix, its keys in all conversations; where there is none, any."""
        self.is_other_key = torch.zeros(shape.prefix, shape.sequences, dtype=torch.bool, device=device)

        self.tokens = torch.arange(shape.tokens, device=device)


def padded(number: int) -> int:
    """A size that few different numbers share: an eighth of the power of two below, at least 256, apart."""
    stride = max(256, 2 ** int(math.log2(max(number, 1))) // 8)
    return -(-number // stride) * stride


def shape_of(one: Pass, *, first: bool) -> Shape:
    tokens = padded(len(one.ids))
    padding = -(-(tokens - len(one.ids)) // PADDING_SEQUENCE)
    sequences = len(one.lengths) + bool(one.prefix) + padding
    copies = len(one.lengths) * one.prefix
    return Shape(
        tokens=tokens,
        prefix=one.prefix,
        sequences=sequences if sequences <= 16 else -(-sequences // 32) * 32,
        keys=padded(tokens + copies),
        longest=max(PADDING_SEQUENCE, 2 ** math.ceil(math.log2(one.prefix + max(one.lengths)))),
        learned=padded(len(one.targets)),
        first=first,
    )


class Inputs:
    """A pass's tensors on the GPU; the same ones are filled again for the next pass of the shape."""

    def __init__(self, shape: Shape, device: Any) -> None:
        self.shape = shape
        self.ids, self.positions = (torch.zeros(shape.tokens, dtype=torch.int64, device=device) for _ in range(2))
        self.learned, self.targets = (torch.zeros(shape.learned, dtype=torch.int64, device=device) for _ in range(2))
        self.scale = torch.zeros((), device=device)
        self.layout = GpuLayout(shape, device)

    def fill(self, one: Pass, scale: float) -> None:
        shape = self.shape
        missing = shape.tokens - len(one.ids)
        padding = [min(PADDING_SEQUENCE, missing - at) for at in range(0, missing, PADDING_SEQUENCE)]
        lengths = [*one.lengths, *padding]
        before = [one.prefix] * len(one.lengths) + [0] * len(padding)
        own_start = one.prefix  # in tokens
        query_ends, key_ends, key_rows = [0], [0], []
        own_keys: list[int] = []
        if one.prefix:
            query_ends.append(one.prefix)
            key_ends.append(one.prefix)
            key_rows += range(one.prefix)
            own_keys += range(one.prefix)
        prefix_starts = []
        for length, ahead in zip(lengths, before, strict=True):
            if ahead:
                prefix_starts.append(len(key_rows))
                key_rows += range(ahead)
            own_keys += range(len(key_rows), len(key_rows) + length)
            key_rows += range(own_start, own_start + length)
            own_start += length
            query_ends.append(own_start)
            key_ends.append(len(key_rows))
        for ends in (query_ends, key_ends):
            ends += ends[-1:] * (shape.sequences + 1 - len(ends))
        key_rows += [0] * (shape.keys - len(key_rows))
        layout = self.layout
        positions = [*one.positions, *(at for length in padding for at in range(length))]
        pairs: list[tuple[Any, list[int]]] = [
            (self.ids, one.ids + [0] * missing),
            (self.positions, positions),
            (self.learned, one.learned + [0] * (shape.learned - len(one.learned))),
            (self.targets, one.targets + [step.NO_TARGET] * (shape.learned - len(one.targets))),
            (layout.query_ends, query_ends),
            (layout.key_ends, key_ends),
            (layout.key_rows, key_rows),
            (layout.own_keys, own_keys),
        ]
        for tensor, numbers in pairs:
            tensor.copy_(torch.tensor(numbers, dtype=tensor.dtype).pin_memory(), non_blocking=True)
        if one.prefix:
            starts = torch.tensor(prefix_starts).pin_memory().to(self.ids.device, non_blocking=True)
            layout.is_other_key.zero_()
            layout.is_other_key[:, : len(prefix_starts)] = True
            layout.prefix_keys[:, : len(prefix_starts)] = (
                starts[None] + torch.arange(one.prefix, device=starts.device)[:, None]
            )
        self.scale.fill_(scale)


class GpuOperations:
    """`worker.training.operations.Operations` for GPUs."""

    def add_norm(self, x: Any, delta: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        h, y = kernels.AddNorm.apply(x, delta, weight, eps)
        return h, y

    def swiglu(self, gate_up: Any) -> Any:
        return kernels.SwiGlu.apply(gate_up)

    def attention(self, qkv: Any, cos: Any, sin: Any, layout: GpuLayout, heads: int, groups: int) -> Any:
        return _Varlen.apply(qkv, cos, sin, layout, heads, groups)

    def loss_sum(self, hidden: Any, weight: Any, targets: Any) -> tuple[Any, Any]:
        loss, correct = _HeadLoss.apply(hidden, weight, targets, torch.is_grad_enabled())
        return loss, correct


class _Varlen(torch.autograd.Function):  # type: ignore[misc]  # torch is not analysed
    """Rotary embedding and attention, [t, heads + 2 groups, size] → [t, heads, size].

    Keys and values are laid out for each conversation, the prefix repeated; its gradients are added up in a fixed
    order.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Any, cos: Any, sin: Any, layout: GpuLayout, heads: int, groups: int) -> Any:
        longest, size = layout.shape.longest, qkv.shape[-1]
        q = torch.empty_like(qkv[:, :heads], memory_format=torch.contiguous_format)
        kv = torch.empty(layout.shape.keys, 2 * groups, size, dtype=qkv.dtype, device=qkv.device)
        kernels.turn(qkv[:, :heads], q, cos, sin, heads)
        kernels.turn(qkv[:, heads:], kv, cos, sin, groups, rows=layout.key_rows, angles=layout.key_rows)
        k, v = kv[:, :groups], kv[:, groups:]
        out, logsumexp, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, layout.query_ends, layout.key_ends, longest, longest, 0.0, True, False
        )
        ctx.save_for_backward(q, k, v, out, logsumexp, state, unused, cos, sin)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Any) -> Any:
        q, k, v, out, logsumexp, state, unused, cos, sin = ctx.saved_tensors
        layout, longest = ctx.layout, ctx.layout.shape.longest
        heads, groups, size = q.shape[1], k.shape[1], q.shape[2]
        d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
            d_out.contiguous(), q, k, v, out, logsumexp, layout.query_ends, layout.key_ends, longest, longest, 0.0,
            True, state, unused,
        )  # fmt: skip
        d_qkv = torch.empty(len(q), heads + 2 * groups, size, dtype=q.dtype, device=q.device)
        kernels.turn(d_q, d_qkv[:, :heads], cos, sin, heads, back=True)
        for start, part, turning in ((heads, d_k, groups), (heads + groups, d_v, 0)):
            extra = None
            if layout.shape.prefix:
                extra = (part[layout.prefix_keys].float() * layout.is_other_key[..., None, None]).sum(1)
            kernels.turn(
                part, d_qkv[:, start : start + groups], cos, sin, turning, back=True, rows=layout.own_keys,
                angles=layout.tokens, extra=extra,
            )  # fmt: skip
        return d_qkv, None, None, None, None, None


class _HeadLoss(torch.autograd.Function):  # type: ignore[misc]
    """`head.loss_sum` with the softmax compiled; rows without a target count for nothing."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any, with_gradients: bool) -> Any:
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        loss = torch.zeros((), device=weight.device)
        correct = torch.zeros((), dtype=torch.int64, device=weight.device)
        for start in range(0, len(hidden), CHUNK_ROWS):
            h, target = hidden[start : start + CHUNK_ROWS], targets[start : start + CHUNK_ROWS]
            d_logits, losses, right = _softmax_loss(h @ weight.t(), target)
            loss, correct = loss + losses, correct + right
            if with_gradients:
                d_hidden[start : start + CHUNK_ROWS] = d_logits @ weight
                d_weight += d_logits.t() @ h
        ctx.gradients = d_hidden, d_weight
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, d_loss: Any, _d_correct: Any) -> Any:
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        return d_hidden * d_loss.to(d_hidden.dtype), (d_weight * d_loss).to(ctx.weight_dtype), None, None


@torch.compile(dynamic=True, fullgraph=True)
def _softmax_loss(logits: Any, targets: Any) -> tuple[Any, Any, Any]:
    """(gradient of the logits, sum of the losses, right answers)."""
    wide = logits.float()
    counts = targets >= 0
    normaliser = wide.logsumexp(-1, keepdim=True)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    is_target = columns[None] == targets[:, None]
    at_target = torch.where(is_target, wide, 0.0).sum(-1)
    losses = torch.where(counts, normaliser[:, 0] - at_target, 0.0).sum()
    right = (counts & (wide.argmax(-1) == targets)).sum()
    gradient = torch.where(counts[:, None], (wide - normaliser).exp() - is_target, 0.0)
    return gradient.to(logits.dtype), losses, right


class GraphStepper(step.Stepper):
    """`Stepper` whose passes become CUDA graphs."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._inputs_of: dict[Shape, Inputs] = {}
        self._graphs: dict[Shape, Any] = {}
        self._pool: Any = None
        self._loss, self._correct = self._zero(), self._zero(torch.long)

    def _operations(self) -> Any:
        return GpuOperations()

    def _inputs(self, one: Pass) -> tuple[Any, ...]:
        inputs = Inputs(shape_of(one, first=True), self._device)
        inputs.fill(one, 1.0)
        return inputs.ids, inputs.positions, inputs.layout, inputs.learned, inputs.targets

    def _pass(self, one: Pass, scale: float, *, first: bool) -> tuple[Any, Any]:
        shape = shape_of(one, first=first)
        graph = self._graphs.get(shape)
        again = shape in self._inputs_of
        if not again and len(self._inputs_of) < MOST_GRAPHS:
            self._inputs_of[shape] = Inputs(shape, self._device)
        inputs = self._inputs_of.get(shape) or Inputs(shape, self._device)
        inputs.fill(one, scale)
        if graph is None and again:
            graph = self._graphs[shape] = self._record(inputs)
        if graph is None:
            self._compute(inputs)
        else:
            graph.replay()
        return self._loss.clone(), self._correct.clone()

    def _record(self, inputs: Inputs) -> Any:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._compute(inputs)
        self._pool = graph.pool()
        return graph

    def _compute(self, inputs: Inputs) -> None:
        loss, correct = self._decoder.loss(inputs.ids, inputs.positions, inputs.layout, inputs.learned, inputs.targets)
        gradients = torch.autograd.grad(loss * inputs.scale, self.weights.leaves)
        self.weights.hand_over(list(gradients), first=inputs.shape.first)
        self._loss.copy_(loss.detach())
        self._correct.copy_(correct)
