"""What vLLM's workers have beside their own: weights read as they were trained, and exchanged completely.

Runs in vLLM's processes, which import `worker/rounding.py` by its path and nothing else of ours.

vLLM 0.32's `reload_weights` forgets the packed copy that CPUs compute a tied output layer with: it went on with the
old embeddings, and the text was wrong without an error.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"
"""`shared.checkpoint_files.MANIFEST`: a checkpoint of ours, not anybody's model."""


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
    """Have vLLM read a checkpoint's 32-bit masters as bf16, as the passes that trained them saw them.

    It would round them to nearest (docs/experiments.md, "Precision").
    """
    from vllm.model_executor.model_loader import default_loader

    rounding = _rounding()
    read = getattr(default_loader, "safetensors_weights_iterator", None)
    if read is None:  # another vLLM than was tried
        sys.stderr.write("vLLM's reader was not found: 32-bit checkpoints are rounded to nearest\n")
        return

    def read_rounded(files: Sequence[str], *rest: Any, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        is_checkpoint = any((Path(file).parent / MANIFEST).exists() for file in files)
        for name, tensor in read(files, *rest, **options):
            if not is_checkpoint or tensor.dtype != torch.float32:
                yield name, tensor
                continue
            copy = torch.empty_like(tensor, dtype=torch.bfloat16)
            rounding.copy(copy, tensor.contiguous())
            yield name, copy

    default_loader.safetensors_weights_iterator = read_rounded


def _rounding() -> Any:
    spec = importlib.util.spec_from_file_location(
        "anneal_rounding", Path(__file__).resolve().parents[2] / "rounding.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if os.environ.get("ANNEAL_SERVED_DTYPE") == "bfloat16":
    round_as_trained()
