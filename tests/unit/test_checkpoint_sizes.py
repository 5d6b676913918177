"""The cheap look at a checkpoint: names and sizes, for where hashing gigabytes would take too long."""

from pathlib import Path

import pytest

from shared.checkpoint_files import CorruptCheckpoint, verify, verify_sizes
from tests.failpoints.cuts import publish


def test_a_cut_file_is_noticed_by_its_size_alone(tmp_path: Path) -> None:
    folder = publish(tmp_path / "4")
    assert verify_sizes(folder) == verify(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match="bytes, its manifest says"):
        verify_sizes(folder)
