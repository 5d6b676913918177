"""A model of somebody's shape with random weights, to measure what a size costs without having its files.

    python -m benchmarks.random_model --shape smollm2-1.7b --like FOLDER --dtype float32 --out FOLDER

`--like` is a folder of a smaller model of the same family: its tokenizer and template are taken, and of its
configuration what isn't a matter of size.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {  # to prove a program in seconds
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 128,
        "head_dim": 32,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "smollm2-1.7b": {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 8192,
        "rope_theta": 130000,
    },
}
COMMON = {"vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192, "head_dim": 64}
TAKEN = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "generation_config.json"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--like", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    count = make(options.shape, options.like, options.dtype, options.out)
    print(f"{options.out}: {count / 1e6:.1f} million parameters, {options.dtype}")
    return 0


def make(shape: str, like: Path, dtype: str, out: Path, seed: int = 7) -> int:
    """Write the folder. Returns the number of parameters."""
    import torch
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    for name in TAKEN:
        if (like / name).exists():
            shutil.copyfile(like / name, out / name)
    sizes = {**COMMON, **SHAPES[shape]}
    config = {**json.loads((like / "config.json").read_text(encoding="utf-8")), **sizes, "dtype": dtype}
    config.pop("torch_dtype", None)
    if isinstance(config.get("rope_parameters"), dict) and "rope_theta" in sizes:
        config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": sizes["rope_theta"]}
    torch.manual_seed(seed)
    wanted = getattr(torch, dtype)
    tensors = {}
    for name, dimensions in parameters(sizes).items():
        if len(dimensions) == 1:
            tensors[name] = torch.ones(dimensions, dtype=wanted)
        else:
            tensors[name] = torch.empty(dimensions, dtype=torch.float32).normal_(0, 0.02).to(wanted)
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return sum(math.prod(dimensions) for dimensions in parameters(sizes).values())


def parameters(sizes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's weights; the output layer is the embedding."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    queries, keys = (sizes[name] * sizes["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes["vocab_size"], hidden)}
    for layer in range(sizes["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        found |= {
            f"{name}.self_attn.q_proj.weight": (queries, hidden),
            f"{name}.self_attn.k_proj.weight": (keys, hidden),
            f"{name}.self_attn.v_proj.weight": (keys, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, queries),
            f"{name}.mlp.gate_proj.weight": (inner, hidden),
            f"{name}.mlp.up_proj.weight": (inner, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, inner),
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
        }
    return {**found, "model.norm.weight": (hidden,)}


if __name__ == "__main__":
    sys.exit(main())
