"""A tiny Llama, its data, and the trainer's spec for them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.waiting import LIMIT_S

# Unsloth patches what is imported after it, so it must come before the tests' own transformers.
os.environ.update(
    HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", CUDA_VISIBLE_DEVICES="", OMP_WAIT_POLICY="PASSIVE"
)

from shared.training_spec import TrainerSpec
from tests.training import trainers
from tests.training.tiny_llama import alpaca_rows, make_tiny_llama, write_jsonl
from worker.training import data, templates

MakeSpec = Callable[..., TrainerSpec]
Outcome = trainers.Outcome


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def training_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", alpaca_rows(40))


@pytest.fixture(scope="session")
def validation_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "valid.jsonl", alpaca_rows(10, seed=9))


@pytest.fixture(scope="session")
def rows(tiny_base: Path, training_file: Path) -> list[data.Example]:
    """The training file's, whole conversations."""
    from worker.training import model

    tokenizer = model.load_tokenizer(tiny_base)
    return data.load_training(training_file, templates.choose("auto", tokenizer), tokenizer, 512, "assistant").rows


@pytest.fixture(scope="session")
def make_spec(tiny_base: Path, training_file: Path) -> MakeSpec:
    """A spec for a folder of its own; keywords replace its fields, `training` takes the client's choices."""

    def make(folder: Path, **fields: Any) -> TrainerSpec:
        values = {
            "job_id": "ftjob-test",
            "fence": 3,
            "base_model": "test/tiny",
            "base_model_dir": str(tiny_base),
            "training_file": str(training_file),
            "checkpoint_dir": str(folder / "checkpoints"),
            "work_dir": str(folder / "work"),
        }
        return TrainerSpec.model_validate({**values, **fields})

    return make


@pytest.fixture
def run_here() -> Callable[[TrainerSpec], Outcome]:
    """One attempt in this process: the same code without the cost of importing it again."""
    return trainers.run_here


@pytest.fixture(scope="session")
def alone(make_spec: MakeSpec, validation_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run of one process that several are compared with."""
    folder = tmp_path_factory.mktemp("alone")
    spec = make_spec(folder, validation_file=str(validation_file), training=trainers.TRAINING)
    outcome = trainers.run_here(spec)
    assert outcome.status == 0, outcome.last
    return outcome


@pytest.fixture
def processes() -> Iterator[list[psutil.Process]]:
    """All that a test has started; none may be left at its end."""
    found: list[psutil.Process] = []
    yield found
    assert found
    _, left = psutil.wait_procs(found, timeout=LIMIT_S)
    for process in left:
        process.kill()
    assert not left
