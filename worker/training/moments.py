"""AdamW's moments in 32 bits and in 8, so that a checkpoint goes on with either.

A model in shards has 32 bits (bitsandbytes knows no shards), so has a CPU; one GPU has 8 unless told otherwise.
"""

from collections.abc import Callable
from typing import Any

import torch

WRAPPED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes' saved state has its moments."""
NAMES = (("1", "exp_avg"), ("2", "exp_avg_sq"))
BLOCK = 256
"""Numbers that share a scale: bitsandbytes' own choice for its optimizers."""


def widened(moments: dict[str, Any]) -> dict[str, Any]:
    """One parameter's saved state as torch's AdamW has it."""
    packed = moments.get(WRAPPED, moments)
    if "state1" not in packed:
        return moments
    wide = {name: _wide(packed, number) for number, name in NAMES}
    return {"step": torch.tensor(float(moments["step"])), **wide}


def as_torch_has_it(
    optimizer: Any, state: dict[str, Any], part_of: Callable[[Any, Any], Any] = lambda moment, _parameter: moment
) -> dict[str, Any]:
    """A saved state of either kind as this optimizer, torch's AdamW, takes it.

    Args:
        part_of: what of a whole moment belongs to this parameter.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    found = {}
    for index, parameter in zip(indices, parameters, strict=True):
        moments = widened(state["state"].get(index, {}))
        found[index] = {name: part_of(moment, parameter) for name, moment in moments.items()}
    groups = [
        {name: saved.get(name, value) for name, value in own.items()} | {"params": saved["params"]}
        for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    return {"state": {index: moments for index, moments in found.items() if moments}, "param_groups": groups}


def take_either(optimizer: Any) -> None:
    """Have an optimizer of bitsandbytes take 32-bit moments too."""
    load = optimizer.load_state_dict

    def load_either(state: dict[str, Any]) -> None:
        if any("exp_avg" in moments for moments in state["state"].values()):
            _narrow(optimizer, state)
        else:
            load(state)

    optimizer.load_state_dict = load_either


def _wide(packed: dict[str, Any], number: str) -> torch.Tensor:
    from bitsandbytes import functional

    moment: torch.Tensor = packed[f"state{number}"]
    if moment.dtype != torch.uint8:  # small ones and embeddings are kept in 32 bits
        return moment
    code, scales = packed[f"qmap{number}"].to(moment.device), packed[f"absmax{number}"].to(moment.device)
    wide: torch.Tensor = functional.dequantize_blockwise(moment, absmax=scales, code=code, blocksize=BLOCK)
    return wide


def _narrow(optimizer: Any, state: dict[str, Any]) -> None:
    from bitsandbytes import functional

    optimizer.check_overrides()
    for at, (group, saved) in enumerate(zip(optimizer.param_groups, state["param_groups"], strict=True)):
        group.update({name: value for name, value in saved.items() if name in group and name != "params"})
        for index, (parameter, number) in enumerate(zip(group["params"], saved["params"], strict=True)):
            optimizer.init_state(group, parameter, at, index)
            own, moments = optimizer.state[parameter], state["state"][number]
            own["step"] = int(moments["step"])
            for which, name in NAMES:
                wide, place = moments[name].to(parameter.device), own[f"state{which}"]
                if place.dtype == torch.uint8:
                    scales, code = own[f"absmax{which}"], own[f"qmap{which}"]
                    functional.quantize_blockwise(wide, code=code, absmax=scales, out=place, blocksize=BLOCK)
                else:
                    place.copy_(wide)
