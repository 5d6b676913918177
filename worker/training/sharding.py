"""One model over several GPUs: each rank holds a part of the masters, their gradients and moments.

    optimizer ─ masters, 1/N in 32 bits ─ gathered layer by layer, in the products' format ─▶ forward, backward
        ▲                                                                                         │
        └──────────────────── gradients, 1/N, summed in 32 bits as each layer is done ◀───────────┘

PyTorch's FSDP2 does the sending; what a layer computes is `decoder`'s, as everywhere. The Trainer sees a model whose
parameters are DTensors, each rank having some rows of each. Files know nothing of it: they are read row by row, and
written from tensors that rank 0 puts together one after the other.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from worker.training import decoder, passes
from worker.training.data import Example
from worker.training.failures import BadBaseModel
from worker.training.moments import as_torch_has_it
from worker.training.operations import Operations
from worker.training.parallel import Alone, Together
from worker.training.step import Abandoned, Arguments, Sums
from worker.weight_files import stored_tensors

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NOTHING = Example([0, 0], [0, 0], (2,))
"""What a rank computes while others have a pass and it has none: every pass is everybody's."""


def load_model(folder: Path, group: Together, *, precision: str, master_weights: str) -> Any:
    """The base model in shards; no process ever holds the whole of it.

    Raises:
        BadBaseModel: the files are missing or broken.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        found = AutoModelForCausalLM.from_config(config, dtype=_DTYPES[master_weights])
    mesh = group.mesh()
    policy = MixedPrecisionPolicy(param_dtype=_DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*found.model.layers, found):
        fully_shard(part, mesh=mesh, mp_policy=policy)
        part.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all ranks already
        part.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else
    found.to_empty(device=mesh.device_type)
    filled = fill(found, folder)
    missing = [name for name, _ in found.named_parameters() if name not in filled]
    if missing:
        raise BadBaseModel(f"the base model's files hold no {missing[0]}", "model")
    return found


def is_sharded(found: Any) -> bool:
    return isinstance(next(found.parameters()), DTensor)


def fill(found: Any, folder: Path) -> set[str]:
    """Read this rank's rows of every tensor of the files; returns the tensors' names."""
    parameters = dict(found.named_parameters())
    names: set[str] = set()
    with torch.no_grad():
        for name, content in stored_tensors(folder):
            if name in parameters:
                parameters[name].to_local().copy_(content[_rows(parameters[name])])
                names.add(name)
    return names


def whole(tensor: Any) -> Any:
    """All of a tensor, on every rank: all must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Any) -> Any:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def keep_one_format(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer hand out and take whole moments, as one that is not sharded does.

    All ranks must ask for its state together; rank 0 gets it, on the CPU.
    """

    def put_together(_optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        found: dict[int, dict[str, Any]] = {}
        for index, moments in state["state"].items():
            found[index] = {}
            for name, moment in moments.items():
                complete = whole(moment)
                found[index][name] = complete.cpu() if torch.distributed.get_rank() == 0 else None
        return {**state, "state": found}

    def take_apart(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        return as_torch_has_it(optimizer, state, _part_of)

    optimizer.register_state_dict_post_hook(put_together)
    optimizer.register_load_state_dict_pre_hook(take_apart)


class ShardedStepper:
    """What `step.Stepper` does, on a model in shards. All ranks run as many passes as the one that has most.

    Args:
        most: conversations per pass.
        most_tokens: tokens per pass, of more than one conversation.
    """

    gradients: Sequence[torch.Tensor] = ()
    """None are left to be summed."""
    can_shrink = False

    def __init__(
        self,
        found: Any,
        dtype: torch.dtype,
        group: Alone,
        operations: Operations,
        arguments_of: Callable[[passes.Pass], Arguments],
        *,
        recompute: bool,
        most: int,
        most_tokens: int | None = None,
    ) -> None:
        self._model = found
        self._group = group
        self._arguments_of = arguments_of
        self._most, self._most_tokens = most, most_tokens
        weights = _Weights(found, dtype)
        found.loss_of_pass = _Decoder(weights, operations, recompute=recompute).loss
        register_fsdp_forward_method(found, "loss_of_pass")

    def shrink(self) -> None:
        """Nothing is held but what is needed."""

    def step(self, rows: Sequence[Example], learned: int, should_stop: Callable[[], bool]) -> Sums:
        """As `Stepper.step`; gradients are summed over the ranks already, the loss is not."""
        loss, correct = 0.0, 0
        for number, one in enumerate(self._plan(rows, self._most, self._most_tokens)):
            if number and should_stop():
                raise Abandoned
            found = self._model.loss_of_pass(*self._arguments_of(one or _NOTHING))
            (found[0] * (1 / learned if one else 0.0)).backward()
            if one:
                loss, correct = loss + found[0].detach(), correct + found[1]
        return Sums(loss, correct, learned)

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not analysed
    def evaluate(self, rows: Sequence[Example], most_tokens: int, should_stop: Callable[[], bool]) -> Sums | None:
        """As `Stepper.evaluate`; all ranks stop if rank 0 does."""
        loss, correct, learned = 0.0, 0, 0
        try:
            for one in self._plan(rows, len(rows), most_tokens):
                if self._group.agree(should_stop(), False)[0]:
                    return None
                found = self._model.loss_of_pass(*self._arguments_of(one or _NOTHING))
                if one:
                    loss, correct, learned = loss + found[0], correct + found[1], learned + len(one.targets)
        finally:
            self._model.reshard()  # no backward pass has done so
        return Sums(loss, correct, learned)

    def _plan(self, rows: Sequence[Example], most: int, most_tokens: int | None) -> list[passes.Pass | None]:
        mine = list(passes.plan(rows, most, most_tokens))
        return [*mine, *[None] * (self._group.most(len(mine)) - len(mine))]


_NOTHING = passes.join([NOTHING])


class _Weights:
    """What `Decoder` reads, as it is in the moment: whole while FSDP says so."""

    def __init__(self, found: Any, dtype: torch.dtype) -> None:
        self.config = found.config
        self.layers = list(found.model.layers)
        self.head_size = decoder.head_size(found.config)
        self.padding_id = found.get_input_embeddings().padding_idx
        self.rotary = decoder.Rotary(found.config, dtype, own(found.model.norm.weight).device)
        self._model = found

    @property
    def embedding(self) -> torch.Tensor:
        weight: torch.Tensor = self._model.get_input_embeddings().weight
        return weight

    @property
    def norm(self) -> torch.Tensor:
        weight: torch.Tensor = self._model.model.norm.weight
        return weight

    @property
    def head(self) -> torch.Tensor:
        weight: torch.Tensor = self._model.get_output_embeddings().weight
        return weight

    def open(self, layer: Any) -> decoder.Layer:
        parameters = dict(layer.named_parameters())

        def leaf(*names: str) -> Any:
            found = [parameters[name] for name in names]
            return found if len(found) > 1 else found[0]

        return decoder.make_layer(parameters, leaf)


class _Decoder(decoder.Decoder):
    """`Decoder` whose layers are gathered while they are computed."""

    def __init__(self, weights: _Weights, operations: Operations, *, recompute: bool) -> None:
        super().__init__(weights, operations, recompute=recompute)
        for layer in weights.layers:
            layer.run = super()._run  # inside of what gathers, so that a second computation finds it gathered
            register_fsdp_forward_method(layer, "run")

    def _run(self, function: Callable[..., decoder.Hidden], *arguments: Any) -> decoder.Hidden:
        kept: decoder.Hidden = arguments[-1].run(function, *arguments)
        return kept


def _rows(parameter: Any) -> slice:
    """Which rows of a parameter are this rank's: as `torch.chunk` cuts."""
    mesh = parameter.device_mesh
    size = -(-len(parameter) // mesh.size())
    start = min(mesh.get_local_rank() * size, len(parameter))
    return slice(start, start + len(parameter.to_local()))


def _part_of(moment: Any, parameter: Any) -> Any:
    """A whole moment's part that belongs to this rank's part of the parameter; other state is everybody's."""
    if not isinstance(moment, torch.Tensor) or moment.shape != parameter.shape:
        return deepcopy(moment)
    part = moment[_rows(parameter)].to(parameter.device, copy=True)
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
