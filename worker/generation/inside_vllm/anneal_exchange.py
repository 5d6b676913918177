"""What vLLM's workers have beside their own: weights read as they were trained, and exchanged completely.

Runs in vLLM's processes, which import `worker/rounding.py` by its path and nothing else of ours.

vLLM 0.32's `reload_weights` forgets the packed copy that CPUs compute a tied output layer with: it went on with the
old embeddings, and the text was wrong without an error.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"
"""`shared.checkpoint_files.MANIFEST`: a checkpoint of ours, not anybody's model."""

WARNING = "anneal_exchange:"
"""How a line begins that the generator logs as a warning."""


class WeightExchange:
    """Mixed into vLLM's worker (`--worker-extension-cls`)."""

    reload_weights: Any
    model_runner: Any

    def exchange_weights(self, folder: str) -> None:
        """Put the weights of that checkpoint in the place of those that are loaded."""
        self.reload_weights(weights_path=folder)
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        if head is not None:
            head.quant_method.process_weights_after_loading(head)  # packs it anew on CPUs, does nothing on GPUs


def round_as_trained() -> None:
    """Have vLLM, computing in bf16, read a checkpoint's 32-bit masters as the passes that trained them saw them.

    It would round them to nearest (docs/experiments.md, "Precision"). Loads and exchanges read by the same method.
    """
    try:
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        read = DefaultModelLoader.get_all_weights
    except (ImportError, AttributeError) as error:
        sys.stderr.write(
            f"{WARNING} checkpoints in 32 bits are rounded to nearest, for this vLLM is another: {error}\n"
        )
        return
    rounding = _rounding()

    def read_rounded(loader: Any, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        rounds = model_config.dtype == torch.bfloat16 and (Path(model_config.model) / MANIFEST).exists()
        for name, tensor in read(loader, model_config, model):
            if rounds and tensor.dtype == torch.float32 and tensor.device.type == "cpu":
                master, tensor = tensor, torch.empty_like(tensor, dtype=torch.bfloat16)
                rounding.copy(tensor, master.contiguous())
            yield name, tensor

    DefaultModelLoader.get_all_weights = read_rounded


def _rounding() -> Any:
    spec = importlib.util.spec_from_file_location(
        "anneal_rounding", Path(__file__).resolve().parents[2] / "rounding.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


round_as_trained()
