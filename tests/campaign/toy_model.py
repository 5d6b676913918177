"""A model small enough to compute by hand: integers instead of tensors, exact on every machine.

Its state has the parts a real run has (weights, an optimizer's momentum, a random generator, a step count), each step
needs all of them, and none can be guessed from another: a resume that loses one ends with other weights. Losses and
token counts follow from the state, so that what a run should have reported is known without running a process.
"""

import hashlib
import json
import struct
from dataclasses import dataclass

WORDS = 256
_MASK = 2**64 - 1
_MULTIPLIER, _INCREMENT = 6364136223846793005, 1442695040888963407  # Knuth's MMIX generator


class ToyModel:
    """Weights after `steps_done` steps on `data`; every step is a pure function of the state before it."""

    def __init__(self, seed: int, data: bytes) -> None:
        self.steps_done = 0
        self.tokens = 0
        digest = hashlib.sha256(data).digest()
        self._data = struct.unpack("<4Q", digest)
        self.random_state = (seed * _MULTIPLIER + self._data[0]) & _MASK
        self.weights = [self._random() for _ in range(WORDS)]
        self.momentum = [0] * WORDS

    def train_step(self) -> None:
        data = self._data[self.steps_done % len(self._data)]
        for index, weight in enumerate(self.weights):
            gradient = ((weight ^ data) * _MULTIPLIER + self._random()) & _MASK
            self.momentum[index] = (self.momentum[index] * 3 + gradient) & _MASK
            self.weights[index] = (weight - self.momentum[index]) & _MASK
        self.tokens += 50 + self._random() % 100
        self.steps_done += 1

    @property
    def loss(self) -> float:
        return (sum(self.weights) & _MASK) / 2**64 + 1 / (1 + self.steps_done)

    @property
    def validation_loss(self) -> float:
        return (sum(self.momentum) & _MASK) / 2**64 + 1

    def weights_file(self) -> bytes:
        """The weights as a safetensors file."""
        content = struct.pack(f"<{WORDS}Q", *self.weights)
        header = {"weights": {"dtype": "U64", "shape": [WORDS], "data_offsets": [0, len(content)]}}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        return struct.pack("<Q", len(encoded)) + encoded + content

    def load_weights(self, file: bytes) -> None:
        self.weights = list(struct.unpack(f"<{WORDS}Q", file[-8 * WORDS :]))

    def resume_files(self) -> dict[str, bytes]:
        """Everything beside the weights that the next step needs, under the names real checkpoints use."""
        return {
            "optimizer.pt": struct.pack(f"<{WORDS}Q", *self.momentum),
            "scheduler.pt": json.dumps({"last_step": self.steps_done}).encode(),
            "rng_state.pth": struct.pack("<Q", self.random_state),
            "trainer_state.json": json.dumps({"global_step": self.steps_done}).encode(),
        }

    def load_resume_files(self, files: dict[str, bytes], tokens: int) -> None:
        self.momentum = list(struct.unpack(f"<{WORDS}Q", files["optimizer.pt"]))
        (self.random_state,) = struct.unpack("<Q", files["rng_state.pth"])
        self.steps_done = int(json.loads(files["trainer_state.json"])["global_step"])
        self.tokens = tokens

    def _random(self) -> int:
        self.random_state = (self.random_state * _MULTIPLIER + _INCREMENT) & _MASK
        return self.random_state ^ (self.random_state >> 29)


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run reports."""

    weights_sha256: str
    losses: list[float]
    """Of step 1, 2, …"""
    tokens: list[int]
    """Trained on so far, after step 1, 2, …"""
    validation_losses: dict[int, float]
    """By step; of every step that could be evaluated."""


def reference(seed: int, data: bytes, steps: int) -> Reference:
    """The undisturbed run of a toy, computed here and now."""
    model = ToyModel(seed, data)
    losses, tokens, validation_losses = [], [], {}
    for _ in range(steps):
        model.train_step()
        losses.append(model.loss)
        validation_losses[model.steps_done] = model.validation_loss
        tokens.append(model.tokens)
    return Reference(hashlib.sha256(model.weights_file()).hexdigest(), losses, tokens, validation_losses)
