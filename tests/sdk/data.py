"""Training data and base models of the suite: small, real, and the same every time."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.training.tiny_llama import make_tiny_llama, sentence

TINY = "test/tiny"
"""A two-layer Llama that trains in milliseconds a step."""
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORT = {"max_seq_length": 128, "batch_size": 2, "micro_batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-3}
"""`training` of every run here."""


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of varying length, none of which is cut at 128 tokens."""
    draw = random.Random(seed)
    return [
        {
            "messages": [
                {"role": "user", "content": sentence(draw, draw.randint(1, 4))},
                {"role": "assistant", "content": sentence(draw, draw.randint(1, 4))},
            ]
        }
        for _ in range(count)
    ]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def make_models(folder: Path) -> None:
    """Put the tiny base model below `folder`, in a process of its own: it imports torch."""
    subprocess.run([sys.executable, "-m", "tests.sdk.data", str(folder / TINY)], check=True, capture_output=True)


if __name__ == "__main__":
    make_tiny_llama(Path(sys.argv[1]))
