"""Loading a base model for full fine-tuning through Unsloth, and writing the tuned one as plain transformers files.

Unsloth is imported here, first of all libraries that it patches. What is saved never depends on how an engine
wrapped the model in memory: names and shapes are those of the base's own files, checked, and the tokenizer's files
are the base's with the chat template that was trained on.
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker import tokenizers
from worker.training import memory
from worker.training.failures import BadBaseModel
from worker.training.resolve import Hardware, Needs
from worker.training.templates import Template
from worker.weight_files import stored_tensors

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a base model's files."""

    name: str
    shape: tuple[int, ...]


def hardware(limit_bytes: int | None = None, processes: int = 1) -> Hardware:
    """What this process can train on, with the memory that is free now or what it may take. Imports unsloth.

    Args:
        limit_bytes: of the GPU that this process has to itself, or of the host.
        processes: the run's, which share the host.
    """
    import torch
    import unsloth

    if torch.cuda.is_available():
        name, computes_bf16 = torch.cuda.get_device_name(0), torch.cuda.is_bf16_supported()
        free_bytes, _ = torch.cuda.mem_get_info(0)
    else:
        name, computes_bf16 = "cpu", bool(unsloth.is_bfloat16_supported())
        free_bytes = memory.available_bytes()
    if limit_bytes is not None:
        free_bytes = min(free_bytes, limit_bytes)
    if not torch.cuda.is_available():
        free_bytes //= processes
    return Hardware(name, torch.cuda.is_available(), computes_bf16, free_bytes)


def needs(folder: Path) -> Needs:
    """What training the base takes, from its configuration and the headers of its files."""
    from transformers import AutoConfig

    from worker.training import decoder

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        weights = list_weights(folder)
        return Needs(
            weights=4 * sum(math.prod(weight.shape) for weight in weights),
            can_be_sharded=decoder.can_compute(config, {weight.name for weight in weights}),
            token=decoder.activation_bytes(config, recompute=False),
            token_recomputed=decoder.activation_bytes(config, recompute=True),
        )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BadBaseModel(f"the base model's configuration can't be read: {error}", "model") from error


def load_tokenizer(folder: Path) -> Any:
    """The base's tokenizer as its files say, which Unsloth's own loading may alter.

    Raises:
        BadBaseModel: the files are missing or broken.
    """
    try:
        tokenizer = tokenizers.load(folder)  # as the generator reads it: what was trained is what is served
    except (OSError, ValueError, KeyError) as error:
        raise BadBaseModel(f"the tokenizer of the base model can't be loaded: {error}", "model") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: labels are kept apart from ids
    return tokenizer


def position_limit(folder: Path) -> int | None:
    """Tokens the base was made for, if its configuration says.

    Raises:
        BadBaseModel: there is no readable config.json.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadBaseModel(f"the base model has no readable config.json: {error}", "model") from error
    limit = config.get("max_position_embeddings")
    return limit if isinstance(limit, int) else None


def load_model(
    folder: Path, hardware: Hardware, *, max_seq_length: int, master_weights: str, gradient_checkpointing: str | bool
) -> Any:
    """The base model with every parameter trainable, in the master weights' number format.

    Raises:
        BadBaseModel: the files are missing or broken, or no causal language model.
    """
    import torch
    from unsloth import FastLanguageModel

    list_weights(folder)  # before Unsloth, which would look for other formats
    full_precision = master_weights == "fp32"
    options: dict[str, Any] = {"dtype": torch.float32 if full_precision else torch.bfloat16}
    if hardware.is_gpu:
        # On GPUs 32-bit master weights with 16-bit products are a switch of their own, and the dtype is the products'.
        options = {"dtype": None, "float32_mixed_precision": full_precision}
    try:
        model, _ = FastLanguageModel.from_pretrained(
            str(folder),
            max_seq_length=max_seq_length,
            full_finetuning=True,
            load_in_4bit=False,
            use_gradient_checkpointing=gradient_checkpointing,
            local_files_only=True,
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        raise BadBaseModel(f"the base model can't be loaded: {error}", "model") from error
    _restore_exact_values(model, folder)
    return model


def list_weights(folder: Path) -> list[Weight]:
    """Names and shapes of the base's tensors, read from the files' headers.

    Raises:
        BadBaseModel: no safetensors in the folder, or a broken one.
    """
    from safetensors import SafetensorError

    try:
        weights = [Weight(name, tuple(content.get_shape())) for name, content in stored_tensors(folder)]
    except (OSError, SafetensorError) as error:
        raise BadBaseModel(
            f"a .safetensors file of the base model {folder.name} can't be read ({error}): copy it again", "model"
        ) from error
    if not weights:
        raise BadBaseModel(f"the base model's folder {folder.name} holds no .safetensors file", "model")
    return weights


def save_model(model: Any, base: Path, target: Path, template: Template) -> None:
    """Write the weights, the configuration and the tokenizer, loadable by plain transformers.

    Raises:
        BadBaseModel: the model in memory has other tensors than the base's files.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in whole_tensors(model, base)}
    save_file(tensors, str(target / WEIGHTS), metadata={"format": "pt"})
    dtype = str(max(tensors.values(), key=lambda tensor: tensor.numel()).dtype).removeprefix("torch.")
    _save_configuration(base, target, dtype, template, model.config.eos_token_id)
    _save_tokenizer(base, target, template)


def whole_tensors(model: Any, base: Path) -> Iterator[tuple[str, Any]]:
    """What the base's files hold, as it is now. All ranks of a model in shards must go through it together.

    Raises:
        BadBaseModel: the model in memory has other tensors than the base's files.
    """
    from worker.training import sharding

    state = model.state_dict()
    for weight in list_weights(base):
        tensor = state.get(weight.name)
        if tensor is None or tuple(tensor.shape) != weight.shape:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise BadBaseModel(f"{weight.name} is {found} after loading, its file says {weight.shape}", "model")
        yield weight.name, sharding.whole(tensor)


def not_finite(model: Any) -> str | None:
    """The name of a parameter that holds a NaN or an infinity, None if this rank has none.

    One pass over the weights that allocates nothing, with one wait for the device: the smallest and the largest
    value of a tensor are NaN if any value is.
    """
    import torch

    from worker.training import sharding

    everything = ((name, sharding.own(parameter.detach())) for name, parameter in model.named_parameters())
    named = [(name, values) for name, values in everything if values.numel()]
    extremes = torch.stack([torch.stack(torch.aminmax(values)).float() for _, values in named])
    broken = (~extremes.isfinite().all(dim=1)).nonzero()
    return named[int(broken[0])][0] if len(broken) else None


def saved_bytes(model: Any, *, resumable: bool) -> int:
    """About what a checkpoint takes on disk: the weights, and two moments in 32 bits if it is resumable."""
    weights: int = sum(p.numel() * p.element_size() for p in model.parameters())
    moments: int = 8 * sum(p.numel() for p in model.parameters()) if resumable else 0
    return weights + moments


def _restore_exact_values(model: Any, folder: Path) -> None:
    """Copy the files' values over the loaded ones, which the GPU path has rounded to 16 bits on their way to 32."""
    import torch

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, content in stored_tensors(folder):
            parameter = parameters.get(name)
            if parameter is not None and parameter.dtype == torch.float32:
                parameter.copy_(content[...])


def _save_configuration(base: Path, target: Path, dtype: str, template: Template, eos_token_id: Any) -> None:
    """The base's own configuration with the number format that was saved."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    _write_json(target / "config.json", config)
    generation = {"bos_token_id": config.get("bos_token_id"), "eos_token_id": eos_token_id}
    if (base / "generation_config.json").exists():
        generation |= json.loads((base / "generation_config.json").read_text(encoding="utf-8"))
    end = _token_id(base, template.end_of_turn)
    known = generation["eos_token_id"]
    stops = [known] if isinstance(known, int) else list(known or [])
    if end is not None and end not in stops:
        generation["eos_token_id"] = [*stops, end]
    _write_json(target / "generation_config.json", generation)


def _save_tokenizer(base: Path, target: Path, template: Template) -> None:
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, target / name)
    settings = target / "tokenizer_config.json"
    if settings.exists():
        content = json.loads(settings.read_text(encoding="utf-8"))
        if content.pop("chat_template", None) is not None:  # it would win over the file
            _write_json(settings, content)
    (target / "chat_template.jinja").write_text(template.source, encoding="utf-8")


def _token_id(base: Path, token: str) -> int | None:
    """The id of an added token according to tokenizer.json."""
    file = base / "tokenizer.json"
    if not file.exists():
        return None
    added = json.loads(file.read_text(encoding="utf-8")).get("added_tokens", [])
    return next((entry["id"] for entry in added if entry["content"] == token), None)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
