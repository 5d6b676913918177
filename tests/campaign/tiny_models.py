"""The base model of a campaign, in the layout of `ANNEAL_MODELS_DIR`.

python -m tests.campaign.tiny_models FOLDER [trainable]      (in a process of its own: it imports torch)
"""

import json
import subprocess
import sys
from pathlib import Path

from tests.campaign.plan import BASE_MODEL


def make(folder: Path, *, loadable: bool, trainable: bool = False) -> None:
    """Put the base model into `folder`: a tiny Llama, or, quicker, a folder that only looks like one.

    Args:
        trainable: a Llama that speaks ChatML, made by Unsloth; otherwise one that only generates.
    """
    if loadable:
        kind = ["trainable"] if trainable else []
        command = [sys.executable, "-m", "tests.campaign.tiny_models", str(folder), *kind]
        subprocess.run(command, check=True, capture_output=True)
        return
    target = folder / BASE_MODEL
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    (target / "tokenizer.json").write_text("{}")
    (target / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


if __name__ == "__main__":
    target = Path(sys.argv[1]) / BASE_MODEL
    if "trainable" in sys.argv[2:]:
        from tests.training.tiny_llama import make_tiny_llama

        make_tiny_llama(target)
    else:
        from tests.generation.conftest import make_tiny_model

        make_tiny_model(target)
