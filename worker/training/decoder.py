"""The forward pass of plain decoders over flat runs of tokens, from copies of their weights in the number format of
the products.

The engine's model stays what it is: its parameters are the masters, the optimizer's and the checkpoints'. `Weights`
holds what is computed with, brought up to date once a step, and carries gradients back. Masters in the products' own
format are not copied: they become views of the same memory.

    embed → (norm, q k v, rotary, attention, o, add, norm, gate up, SwiGLU, down, add) x layers → norm → head's loss

Which models are plain, and why nothing else may come here, is `can_compute`.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from worker import rounding
from worker.training.attention import Layout
from worker.training.operations import Operations

PLAIN_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose decoder is the one above; their configurations may still ask for more."""
ALIGNED = 64
"""Numbers that each master's gradient is a multiple of apart, for kernels that read several at once."""
PLAIN_ROPE = frozenset({"default", "linear", "llama3"})
"""Rotary embeddings whose angles depend on nothing but the position."""


def is_plain(model: Any) -> bool:
    """Whether this module computes what the model itself would: known architecture, no option beyond it."""
    return can_compute(model.config, {name for name, _ in model.named_parameters()})


def can_compute(config: Any, have: set[str]) -> bool:
    """The same of a model with this configuration whose parameters have these names."""
    if config.model_type not in PLAIN_TYPES or getattr(config, "hidden_act", None) != "silu":
        return False
    if getattr(config, "attention_dropout", 0) or _windowed(config) or _rope_type(config) not in PLAIN_ROPE:
        return False
    return have == set(_names(config, have))


Joined: TypeAlias = torch.Tensor | list[torch.Tensor]
"""Weights whose products stand next to each other: in one piece, or several."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights. Shapes: d hidden size, a query heads x head size, c key-value heads x head size, f inner."""

    norm_1: torch.Tensor
    qkv: Joined
    """[a + 2 c, d]"""
    qkv_bias: Joined | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    norm_2: torch.Tensor
    gate_up: Joined
    """[2 f, d]"""
    down: torch.Tensor

    def parts(self) -> list[Any]:
        """In the order of the constructor."""
        return [getattr(self, name) for name in self.__slots__]


def make_layer(have: Collection[str], leaf: Callable[..., Any], at: str = "") -> Layer:
    """The layer of the parameters whose names begin with `at`; `leaf` makes one tensor of the named ones."""
    attention, inner = f"{at}self_attn.", f"{at}mlp."

    def optional(*names: str) -> Any:
        return leaf(*names) if names[0] in have else None

    return Layer(
        norm_1=leaf(f"{at}input_layernorm.weight"),
        qkv=leaf(*(f"{attention}{part}_proj.weight" for part in "qkv")),
        qkv_bias=optional(*(f"{attention}{part}_proj.bias" for part in "qkv")),
        q_norm=optional(f"{attention}q_norm.weight"),
        k_norm=optional(f"{attention}k_norm.weight"),
        o=leaf(f"{attention}o_proj.weight"),
        norm_2=leaf(f"{at}post_attention_layernorm.weight"),
        gate_up=leaf(f"{inner}gate_proj.weight", f"{inner}up_proj.weight"),
        down=leaf(f"{inner}down_proj.weight"),
    )


class Rotary:
    """Cosines and sines of positions, [t, head size / 2] each, in the products' format."""

    def __init__(self, config: Any, dtype: torch.dtype, device: Any) -> None:
        self._dtype = dtype
        self._inverse_frequencies, self._scale = _rope(config, device)

    def __call__(self, positions_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions_t[:, None].float() * self._inverse_frequencies
        return (angles.cos() * self._scale).to(self._dtype), (angles.sin() * self._scale).to(self._dtype)


Places = list[tuple[int, tuple[int, int]]]
"""Of a leaf: its masters and their rows in it."""


class Weights:
    """What is computed with.

    Args:
        model: the engine's; its parameters are the masters.
        dtype: of the products.
        lean: keep no copies of the layers' weights; each layer makes its own, again on the way back.
    """

    def __init__(self, model: Any, dtype: torch.dtype, *, lean: bool = False) -> None:
        self.dtype = dtype
        self._lean = lean and next(model.parameters()).dtype != dtype
        self.config = model.config
        self._masters: list[torch.nn.Parameter] = []
        self._views: list[tuple[torch.Tensor, torch.nn.Parameter]] = []
        """Places in `leaves` with the masters they are of."""
        self._places: list[Places] = []
        """Of each leaf."""
        self.leaves: list[torch.Tensor] = []
        parameters = dict(model.named_parameters())
        self.embedding = self._leaf(parameters, [_EMBEDDING])
        self.padding_id = model.get_input_embeddings().padding_idx
        """A token that the model's own embedding gives no gradient as an input, even where it is no padding."""

        def leaf(*names: str) -> Any:
            return self._late(parameters, list(names)) if self._lean else self._leaf(parameters, list(names))

        layers = range(self.config.num_hidden_layers)
        self.layers = [make_layer(parameters.keys(), leaf, f"model.layers.{index}.") for index in layers]
        self.norm = self._leaf(parameters, ["model.norm.weight"])
        self.head = self._leaf(parameters, [_HEAD]) if _HEAD in parameters else self.embedding
        self.head_size = head_size(self.config)
        self.rotary = Rotary(self.config, dtype, self.embedding.device)
        self._gradients: list[torch.Tensor] = []
        """Of each master, parts of `gradients`; kept for the life of the run."""
        self.gradients: list[torch.Tensor] = []
        """All of them, those of a number format in one piece, which can be summed over processes at once; none before
        the first step."""
        self._first = True

    def refresh(self) -> None:
        """Take over what the optimizer has done to the masters."""
        with torch.no_grad():
            for view, master in self._copies():
                rounding.copy(view, master)

    @property
    def has_copies(self) -> bool:
        """Whether there is anything to refresh."""
        return bool(self._copies())

    def _copies(self) -> list[tuple[torch.Tensor, torch.nn.Parameter]]:
        return [(view, master) for view, master in self._views if view.data_ptr() != master.data_ptr()]

    def backward(self, loss: torch.Tensor, *, first: bool) -> None:
        """Add the gradients of `loss` to `gradients`; the first pass of a step replaces them.

        Each leaf's gradient is handed over as soon as it is whole, so that no two of them are held at once.
        """
        self._make_gradients()
        self._first = first
        if first:
            for leaf in self.leaves:
                leaf.grad = None  # of a pass that broke off
        loss.backward()

    def clear_gradients(self) -> None:
        """The gradients of a step without a pass."""
        self._make_gradients()
        for piece in self.gradients:
            piece.zero_()

    def show_gradients(self) -> None:
        """Make `gradients` the masters' `.grad`, which the Trainer takes away after each step.

        Not `backward`'s work: the pass that filled them may be a graph, which runs nothing of Python.
        """
        for master, gradient in zip(self._masters, self._gradients, strict=True):
            master.grad = gradient

    def _make_gradients(self) -> None:
        if self._gradients:
            return
        parts: dict[int, torch.Tensor] = {}
        for dtype in dict.fromkeys(master.dtype for master in self._masters):
            alike = [(number, master) for number, master in enumerate(self._masters) if master.dtype == dtype]
            sizes = [-(-master.numel() // ALIGNED) * ALIGNED for _, master in alike]
            piece = torch.zeros(sum(sizes), dtype=dtype, device=self.embedding.device)
            self.gradients.append(piece)
            for (number, master), part in zip(alike, piece.split(sizes), strict=True):
                parts[number] = part[: master.numel()].view(master.shape)
        self._gradients = [parts[number] for number in range(len(self._masters))]

    def open(self, layer: Layer) -> Layer:
        """The layer with its weights at hand, for the time of one computation."""
        if not self._lean:
            return layer
        return Layer(*(_Copy.apply(part, *part.masters) if isinstance(part, Late) else part for part in layer.parts()))

    def _arrived(self, index: int) -> None:
        leaf = self.leaves[index]
        gradient, leaf.grad = leaf.grad, None
        self.hand_over(self._places[index], gradient)

    def hand_over(self, places: Places, gradient: Any) -> None:
        """Add a leaf's gradient to its masters'."""
        for master, (start, end) in places:
            target, part = self._gradients[master], gradient[start:end].view(self._masters[master].shape)
            if self._first:
                target.copy_(part)
            else:
                target.add_(part)

    def _leaf(self, parameters: dict[str, Any], names: list[str]) -> torch.Tensor:
        """One tensor for the named masters, below each other."""
        masters, places = self._place(parameters, names)
        joined = torch.cat([master.detach() for master in masters]).to(self.dtype)
        for master, (_, (start, end)) in zip(masters, places, strict=True):
            view = joined[start:end]
            if master.dtype == self.dtype:
                master.data = view
            self._views.append((view, master))
        index = len(self.leaves)
        joined.requires_grad_().register_post_accumulate_grad_hook(lambda _: self._arrived(index))
        self._places.append(places)
        self.leaves.append(joined)
        return joined

    def _late(self, parameters: dict[str, Any], names: list[str]) -> "Late":
        return Late(self, *self._place(parameters, names))

    def _place(self, parameters: dict[str, Any], names: list[str]) -> tuple[list[torch.nn.Parameter], Places]:
        """The named masters, from now on ours, and where each stands in what they make together."""
        masters = [parameters[name] for name in names]
        places: Places = []
        row = 0
        for master in masters:
            places.append((len(self._masters), (row, row + len(master))))
            self._masters.append(master)
            row += len(master)
        return masters, places


@dataclass(frozen=True, slots=True)
class Late:
    """A leaf that is made when it is needed."""

    weights: Weights
    masters: list[torch.nn.Parameter]
    places: Places


class _Copy(torch.autograd.Function):  # type: ignore[misc]  # torch is not analysed
    """Masters → one leaf in the products' format; its gradient goes to the masters at once."""

    @staticmethod
    def forward(ctx: Any, late: Late, *masters: Any) -> Any:
        ctx.late = late
        joined = torch.empty(
            late.places[-1][1][1], *masters[0].shape[1:], dtype=late.weights.dtype, device=masters[0].device
        )
        for (_, (start, end)), master in zip(late.places, masters, strict=True):
            rounding.copy(joined[start:end], master)
        return joined

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        ctx.late.weights.hand_over(ctx.late.places, gradient)
        return (None,) * (1 + len(ctx.late.masters))


Hidden = tuple[torch.Tensor, torch.Tensor]
"""What a layer hands on: the residual stream, and what is still to be added to it."""


class Decoder:
    """`Weights` at work.

    Args:
        recompute: keep no activations between the layers; compute them again on the way back.
    """

    def __init__(self, weights: Any, operations: Operations, *, recompute: bool = False) -> None:
        self.weights = weights
        self._do = operations
        self._recompute = recompute

    def loss(
        self,
        ids_t: torch.Tensor,
        positions_t: torch.Tensor,
        layout: Layout,
        learned_n: torch.Tensor,
        targets_n: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the cross-entropies in nats, number of targets that were the likeliest token)."""
        weights, do = self.weights, self._do
        cos, sin = weights.rotary(positions_t)
        hidden = F.embedding(ids_t, weights.embedding, padding_idx=weights.padding_id)
        delta = None
        for layer in weights.layers:
            hidden, delta = self._run(self._layer, hidden, delta, cos, sin, layout, layer)
        assert delta is not None
        _, last = do.add_norm(hidden[learned_n], delta[learned_n], weights.norm, weights.config.rms_norm_eps)
        return do.loss_sum(last, weights.head, targets_n)

    def _run(self, function: Callable[..., Hidden], *arguments: Any) -> Hidden:
        if self._recompute and torch.is_grad_enabled():
            kept: Hidden = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
            return kept
        return function(*arguments)

    def _layer(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layout: Layout,
        layer: Any,
    ) -> Hidden:
        do, config, layer = self._do, self.weights.config, self.weights.open(layer)
        eps, size = config.rms_norm_eps, self.weights.head_size
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        hidden, normal = do.add_norm(hidden, delta, layer.norm_1, eps)
        qkv = product(normal, layer.qkv, layer.qkv_bias).view(-1, heads + 2 * groups, size)
        if layer.q_norm is not None:
            assert layer.k_norm is not None
            q, k, v = qkv.split((heads, groups, groups), dim=1)
            q, k = do.add_norm(q, None, layer.q_norm, eps)[1], do.add_norm(k, None, layer.k_norm, eps)[1]
            qkv = torch.cat((q, k, v), dim=1)
        attended = do.attention(qkv, cos, sin, layout, heads, groups)
        hidden, normal = do.add_norm(hidden, F.linear(attended.flatten(1), layer.o), layer.norm_2, eps)
        return hidden, F.linear(do.swiglu(product(normal, layer.gate_up)), layer.down)


def product(x: torch.Tensor, weight: Joined, bias: Joined | None = None) -> torch.Tensor:
    """x by each of the weights, next to each other."""
    if not isinstance(weight, list):
        return F.linear(x, weight, bias)
    biases = bias or [None] * len(weight)
    return torch.cat([F.linear(x, one, its) for one, its in zip(weight, biases, strict=True)], dim=-1)


_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _names(config: Any, have: set[str]) -> Iterator[str]:
    """The parameters a plain model has, those of its options included where `have` has them."""
    yield _EMBEDDING
    yield "model.norm.weight"
    if _HEAD in have:
        yield _HEAD
    for index in range(config.num_hidden_layers):
        at = f"model.layers.{index}."
        for part in ("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            yield f"{at}{part}.weight"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{at}self_attn.{part}.weight"
        biases = [f"{at}self_attn.{part}_proj.bias" for part in "qkv"]
        norms = [f"{at}self_attn.{part}_norm.weight" for part in "qk"]
        for group in (biases, norms):
            if all(name in have for name in group):
                yield from group


def _windowed(config: Any) -> bool:
    """Whether some layer attends to the last tokens only."""
    if config.model_type == "mistral":  # whose layers have no types, whatever its configuration says
        return config.sliding_window is not None
    return any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())


def _rope_type(config: Any) -> str:
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "partial"
    return str(parameters.get("rope_type", "default"))


def _rope(config: Any, device: torch.device) -> tuple[torch.Tensor, float]:
    """(inverse frequencies, [head size / 2]; what cosines and sines are multiplied by)."""
    kind = _rope_type(config)
    if kind == "default":
        size = head_size(config)
        powers = torch.arange(0, size, 2, dtype=torch.int64, device=device).float() / size
        return 1.0 / (config.rope_parameters["rope_theta"] ** powers), 1.0
    inverse, scale = ROPE_INIT_FUNCTIONS[kind](config, device)
    return inverse.to(device), float(scale)


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def activation_bytes(config: Any, *, recompute: bool) -> int:
    """About what one token keeps in memory between the forward and the backward pass, in 16 bits.

    Source: counted from `_layer`: its input, both norms' outputs and inputs, q k v, the attention's output, gate, up
    and their product; with `recompute` one layer of these and each other layer's input.
    """
    size = head_size(config)
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * size
    layer = 5 * config.hidden_size + 2 * qkv + config.num_attention_heads * size + 3 * config.intermediate_size
    layers = config.num_hidden_layers
    numbers: int = layers * config.hidden_size + 3 * layer if recompute else layers * layer
    return math.ceil(2 * 1.25 * numbers)
