"""Which conversations come when, as a checkpoint keeps it: what is packed together, the order of the epoch under way.

Both follow from the seed, as long as nobody changes how. A run that is resumed by a later version, of us or of a
library, must not see some conversations twice and others never. How large passes are does not even follow from that.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from worker.training.data import Example

FILE = "data_plan.json"


class Sizes(BaseModel):
    """What followed from the memory that was free when a run began. With less or more of it, a step's sums would be
    rounded differently after a resumption."""

    model_config = ConfigDict(extra="forbid")

    hardware: str
    """Its name. On other hardware sums differ anyway, and something else fits."""
    tokens_per_pass: int | None
    """How many conversations a pass holds follows from it. None: from the client's choice."""
    gradient_checkpointing: str | bool
    sharding: str | None = None
    """None: of a version that had no shards, or did not keep it."""


class DataPlan(BaseModel):
    """Content of `data_plan.json`."""

    model_config = ConfigDict(extra="forbid")

    conversations_sha256: str
    """Of what the numbers below count: another file, template or length would make them mean something else."""
    packed: list[list[int]] | None
    """The conversations of each row, with `packing: rows`."""
    epoch: int
    order: list[int]
    """Rows in the order in which that epoch trains on them."""
    sizes: Sizes | None = None
    """None: of a version that did not keep them, or before they are known."""

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(self.model_dump_json(), encoding="ascii")


def read(folder: Path, conversations_sha256: str) -> DataPlan | None:
    """The plan a checkpoint was made under; None if it has none, or one of other conversations."""
    try:
        plan = DataPlan.model_validate_json((folder / FILE).read_text(encoding="ascii"))
    except (FileNotFoundError, ValidationError):
        return None
    return plan if plan.conversations_sha256 == conversations_sha256 else None


def sha256_of(conversations: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for one in conversations:
        for numbers in (one.ids, one.labels):
            digest.update(np.array([len(numbers), *numbers], dtype=np.int32).tobytes())
    return digest.hexdigest()
