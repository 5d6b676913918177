"""A model in shards trains as one that is whole: the same losses, the same files, one way on from either. On CPU."""

from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.training.conftest import MakeSpec
from tests.training.test_parallel import TRAINING, alone, assert_close, assert_same, processes, start, weights  # noqa: F401
from tests.training.trainers import Outcome, run_here, run_process

pytestmark = pytest.mark.slow

SHARDED: dict[str, Any] = {**TRAINING, "gpus": 2, "sharding": "on"}


def test_try(make_spec: MakeSpec, validation_file: Path, alone: Outcome, tmp_path: Path) -> None:
    two = run_process(make_spec(tmp_path, validation_file=str(validation_file), training=SHARDED), tmp_path)
    assert two.status == 0, two.stderr[-6000:]
    assert_same(two.of("metrics"), alone.of("metrics"))
    assert_close(weights(two), weights(alone))
