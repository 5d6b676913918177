"""The pieces of a decoder's layer between its matrix products, and whole passes as CUDA graphs, for NVIDIA GPUs.

Norms, rotary embedding, SwiGLU and the loss's softmax are bound by memory, and fused they read and write it once
(`kernels`); so is attention (`varlen`).

A pass is launched kernel by kernel the first time its shape comes up and recorded as a graph the second time; from
then on the whole of it is one launch, however slow the host. So that shapes repeat, sizes are padded, with tokens that
nothing is learned from. Graphs hold the memory of a pass between steps, and a pass of a new shape needs its own beside
it; where that is too much they are given up.
"""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from worker.training import decoder, kernels, step, varlen
from worker.training.data import Example
from worker.training.passes import Pass

CHUNK_ROWS = 8192
SMALL_CHUNK_ROWS = 256
"""Positions whose logits are held at once: as many as make the products fast, or few where memory is short."""
SHORT_RUN = 4096
"""Tokens up to which the head's products take no time that counts."""
MOST_GRAPHS = 64
"""Shapes whose graphs are kept. They share their memory."""
WARM_UP_VOCABULARY, WARM_UP_ROWS = 1024, 512


@dataclass(frozen=True, slots=True)
class Shape:
    """What passes have in common that one graph can run: all sizes padded."""

    tokens: int
    prefix: int
    query_tiles: int
    key_tiles: int
    learned: int
    first: bool
    """Of its step: gradients are set, not added."""


@dataclass(frozen=True, slots=True)
class GpuLayout:
    """Who attends to whom: `varlen.Tiles` on the GPU."""

    queries: Any
    keys: Any
    prefix: int


def padded(number: int) -> int:
    """A number of tokens that few different ones share: 512 apart, in long runs a thirty-second of the power of two
    below. An eighth cost 7% of the rate at 32,768 tokens a step (docs/experiments.md)."""
    stride: int = max(512, 2 ** int(math.log2(max(number, 1))) // 32)
    return -(-number // stride) * stride


def shape_of(one: Pass, tiles: varlen.Tiles, *, first: bool) -> Shape:
    """Everything but the tokens and what they begin with follows from their number, as long as it is enough."""
    tokens = padded(len(one.ids))
    query_tiles = 2 * tokens // varlen.TILE  # conversations of half a tile on average
    while query_tiles < len(tiles.queries):
        query_tiles *= 2
    # In short runs the head is cheap and a graph more is not; in long ones a sixteenth of it counts.
    learned = tokens if tokens <= SHORT_RUN else -(-len(one.targets) // (tokens // 16)) * (tokens // 16)
    return Shape(
        tokens=tokens,
        prefix=one.prefix,
        query_tiles=query_tiles,
        key_tiles=query_tiles + varlen.prefix_tiles(one.prefix, tokens),
        learned=max(learned, len(one.targets)),
        first=first,
    )


class Inputs:
    """A pass's tensors on the GPU, all in one piece of memory; filled again for the next pass of the shape."""

    def __init__(self, shape: Shape, device: Any) -> None:
        self.shape = shape
        self._sizes = [shape.tokens] * 2 + [shape.learned] * 2 + [shape.query_tiles * 4, shape.key_tiles * 5]
        self._numbers = torch.zeros(sum(self._sizes), dtype=torch.int32, device=device)
        self.ids, self.positions, self.learned, self.targets, queries, keys = self._numbers.split(self._sizes)
        self.layout = GpuLayout(queries.view(-1, 4), keys.view(-1, 5), shape.prefix)
        self.scale = torch.zeros((), device=device)

    def fill(self, one: Pass, tiles: varlen.Tiles, scale: float) -> None:
        shape = self.shape
        numbers = np.zeros(len(self._numbers), dtype=np.int32)
        at = 0
        for part, size in zip(
            (one.ids, one.positions, one.learned, one.targets, tiles.queries, tiles.keys), self._sizes, strict=True
        ):
            numbers[at : at + part.size] = part.ravel()
            at += size
        # Padding among the learned: tokens of its own each, for many gradients to one row are added one by one.
        learned, target = 2 * shape.tokens + len(one.learned), 2 * shape.tokens + shape.learned
        numbers[learned:target] = np.arange(shape.learned - len(one.learned))
        numbers[target + len(one.targets) : target + shape.learned] = step.NO_TARGET
        self._numbers.copy_(torch.from_numpy(numbers).pin_memory(), non_blocking=True)
        self.scale.fill_(scale)

    def arguments(self) -> step.Arguments:
        return self.ids, self.positions, self.layout, self.learned, self.targets


def arguments_of(one: Pass) -> step.Arguments:
    """On the GPU, for one time."""
    tiles = varlen.tiles(one.prefix, one.lengths, padded(len(one.ids)))
    inputs = Inputs(shape_of(one, tiles, first=True), torch.device("cuda"))
    inputs.fill(one, tiles, 1.0)
    return inputs.arguments()


class GpuOperations:
    """`worker.training.operations.Operations` for GPUs."""

    def __init__(self, chunk_rows: int) -> None:
        self._chunk_rows = chunk_rows

    def add_norm(self, x: Any, delta: Any, weight: Any, eps: float) -> tuple[Any, Any]:
        h, y = kernels.AddNorm.apply(x, delta, weight, eps)
        return h, y

    def swiglu(self, gate_up: Any) -> Any:
        return kernels.SwiGlu.apply(gate_up)

    def attention(self, qkv: Any, cos: Any, sin: Any, layout: GpuLayout, heads: int, groups: int) -> Any:
        return _Attention.apply(qkv, cos, sin, layout, heads, groups)

    def loss_sum(self, hidden: Any, weight: Any, targets: Any) -> tuple[Any, Any]:
        loss, correct = _HeadLoss.apply(hidden, weight, targets, self._chunk_rows, torch.is_grad_enabled())
        return loss, correct


class _Attention(torch.autograd.Function):  # type: ignore[misc]  # torch is not analysed
    """Rotary embedding and attention, [t, heads + 2 groups, size] → [t, heads, size]."""

    @staticmethod
    def forward(ctx: Any, qkv: Any, cos: Any, sin: Any, layout: GpuLayout, heads: int, groups: int) -> Any:
        turned = torch.empty_like(qkv)
        kernels.turn(qkv, turned, cos, sin, heads + groups)
        out, logsumexp = varlen.forward(turned, layout.queries, heads, groups)
        ctx.save_for_backward(turned, out, logsumexp, cos, sin)
        ctx.rest = layout, heads, groups
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Any) -> Any:
        turned, out, logsumexp, cos, sin = ctx.saved_tensors
        layout, heads, groups = ctx.rest
        d_turned = varlen.backward(
            d_out.contiguous(), turned, out, logsumexp, layout.queries, layout.keys, layout.prefix, heads, groups
        )
        kernels.turn(d_turned, d_turned, cos, sin, heads + groups, back=True)
        return d_turned, None, None, None, None, None


class _HeadLoss(torch.autograd.Function):  # type: ignore[misc]
    """`head.loss_sum` with the softmax compiled; rows without a target count for nothing."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, targets: Any, chunk_rows: int, with_gradients: bool) -> Any:
        d_hidden: Any = None
        d_weight: Any = None
        if with_gradients:
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        loss = torch.zeros((), device=weight.device)
        correct = torch.zeros((), dtype=torch.int64, device=weight.device)
        for start in range(0, len(hidden), chunk_rows):
            h, target = hidden[start : start + chunk_rows], targets[start : start + chunk_rows]
            d_logits, losses, right = _softmax_loss(h @ weight.t(), target)
            loss, correct = loss + losses, correct + right
            if with_gradients:
                torch.mm(d_logits, weight, out=d_hidden[start : start + chunk_rows])
                d_weight += d_logits.t() @ h
        ctx.gradients = d_hidden, d_weight
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, d_loss: Any, _d_correct: Any) -> Any:
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        return d_hidden.mul_(d_loss), d_weight.mul_(d_loss).to(ctx.weight_dtype), None, None, None


@torch.compile(dynamic=True, fullgraph=True)  # type: ignore[untyped-decorator]
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
    gradient = torch.where(counts[:, None], (wide - normaliser).exp() - is_target.float(), 0.0)
    return gradient.to(logits.dtype), losses, right


class GraphStepper(step.Stepper):
    """`Stepper` whose passes become CUDA graphs."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._met: set[Shape] = set()
        self._inputs_of: dict[Shape, Inputs] = {}
        self._graphs: dict[Shape, Any] = {}
        self._pool: Any = None
        self._copying: Any = None
        """The graph of `Weights.refresh`, a kernel for each parameter."""
        self._refreshes = 0
        self._may_record = True
        self._loss, self._correct = self._zero(), self._zero(torch.long)

    @property
    def can_shrink(self) -> bool:
        return self._may_record and bool(self._inputs_of)

    def shrink(self) -> None:
        """Give up all graphs, and make no more."""
        torch.cuda.synchronize()  # one of them may be at work, on another stream than its memory's
        self._may_record = False
        self._graphs.clear()
        self._inputs_of.clear()
        self._copying = self._pool = None
        gc.collect()
        torch.cuda.empty_cache()

    def _operations(self, *, recompute: bool) -> Any:
        return GpuOperations(SMALL_CHUNK_ROWS if recompute else CHUNK_ROWS)

    def _inputs(self, one: Pass) -> step.Arguments:
        return arguments_of(one)

    def _pass(self, one: Pass, scale: float, *, first: bool) -> tuple[Any, Any]:
        tiles = varlen.tiles(one.prefix, one.lengths, padded(len(one.ids)))
        shape = shape_of(one, tiles, first=first)
        graph = self._graphs.get(shape)
        inputs = self._inputs_of.get(shape) or Inputs(shape, self._device)
        inputs.fill(one, tiles, scale)
        # Not in the first step: what a graph holds could be what the optimizer's moments, not made yet, would need.
        may_record = self._may_record and self._refreshes > 1 and len(self._graphs) < MOST_GRAPHS
        if graph is None and may_record and shape in self._met:
            self._inputs_of[shape] = inputs
            graph = self._graphs[shape] = self._record(lambda: self._compute(inputs))
        self._met.add(shape)
        if graph is None:
            self._compute(inputs)
        else:
            graph.replay()
        return self._loss.clone(), self._correct.clone()

    def _refresh(self) -> None:
        self._refreshes += 1
        if self._may_record and self._refreshes == 2 and self.weights.has_copies:
            self._copying = self._record(super()._refresh)
        if self._copying is None:
            super()._refresh()
        else:
            self._copying.replay()

    def _record(self, run: Callable[[], None]) -> Any:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        self._pool = graph.pool()
        return graph

    def _compute(self, inputs: Inputs) -> None:
        loss, correct = self._decoder.loss(*inputs.arguments())
        self.weights.backward(loss * inputs.scale, first=inputs.shape.first)
        self._loss.copy_(loss.detach())
        self._correct.copy_(correct)


def warm_up(folder: Path) -> None:
    """Compile, or read from the compilers' caches, what a model of this folder's shape is computed with.

    The GPU's memory is a running job's: nothing of it is held afterwards.
    """
    _compute_a_little(folder)
    gc.collect()  # weights and their hooks name each other
    torch.cuda.empty_cache()


def _compute_a_little(folder: Path) -> None:
    """With few layers and few tokens in the vocabulary, to take little memory."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    targets = torch.zeros(WARM_UP_ROWS, dtype=torch.int32, device="cuda")
    # First and by itself: the compiler tunes it for the sizes it meets first.
    _softmax_loss(torch.zeros(WARM_UP_ROWS, config.vocab_size, dtype=torch.bfloat16, device="cuda"), targets)
    config.num_hidden_layers = 1
    config.vocab_size = WARM_UP_VOCABULARY
    config.pad_token_id = None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).cuda()
    if decoder.is_plain(model):
        rows = [Example([5] * 20 + [own] * 20, [5] * 40, (40,)) for own in (6, 7)]
        stepper = GraphStepper(model, torch.bfloat16, recompute=False, most=2)
        for count in (1, 2, 2):  # with a shared beginning and without; as a graph
            stepper.step(rows[:count], 40, lambda: False)
        torch.cuda.synchronize()
