"""What a model will take before it is loaded, from its headers alone. Imports no torch."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from shared.errors import Unavailable
from worker.base_models import check_folder

BLOCK_TOKENS = 64
"""Tokens in one block of the key-value cache: small enough to waste little, large enough to keep the tables short."""
SMALLEST_CONTEXT_TOKENS = 256
"""A model whose cache would hold less than this does not fit."""
CACHE_SHARE = 0.5
"""Most of the memory left beside the weights that one model's cache takes, so that several models fit."""
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class CachePlan:
    """What a model will take, and how long a text it can then hold."""

    weights_bytes: int
    cache_tokens: int
    cache_bytes: int
    context_tokens: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes


def plan(folder: Path, name: str, number_bytes: int, budget_bytes: int, contexts: int = 2) -> CachePlan:
    """Work out what a model needs whose weights and cache have numbers of so many bytes.

    The cache holds so many of the model's contexts, if memory allows; a model with a huge context is served with a
    shorter one rather than not at all.

    Raises:
        BadRequest: the folder can't be served safely (`check_folder`).
        Unavailable: the model is too big for the budget.
    """
    check_folder(folder, name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = _weight_count(folder) * number_bytes
    heads = config["num_attention_heads"]
    head_width = config.get("head_dim") or config["hidden_size"] // heads
    token_bytes = 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * head_width * number_bytes
    context: int = config["max_position_embeddings"]
    affordable = int((budget_bytes - weights) * CACHE_SHARE) // token_bytes
    tokens = min(contexts * context, affordable) // BLOCK_TOKENS * BLOCK_TOKENS
    if tokens < min(SMALLEST_CONTEXT_TOKENS, context):
        raise Unavailable(
            f"the model {name!r} needs {weights / 2**30:.2f} GiB for its weights and at least as much again as "
            f"{SMALLEST_CONTEXT_TOKENS} tokens take, more than ANNEAL_GENERATION_MEMORY_BYTES="
            f"{budget_bytes} allows; raise it to serve this model",
            code="model_too_large",
        )
    return CachePlan(weights, tokens, tokens * token_bytes, min(context, tokens))


def _weight_count(folder: Path) -> int:
    """Numbers in the files of weights, by their headers: a length, and JSON of that length (safetensors' format)."""
    count = 0
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as content:
            (length,) = _LENGTH.unpack(content.read(_LENGTH.size))
            tensors = json.loads(content.read(length))
        count += sum(math.prod(tensor["shape"]) for name, tensor in tensors.items() if name != "__metadata__")
    return count
