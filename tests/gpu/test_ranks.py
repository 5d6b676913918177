"""Two GPUs train as one does, as equal ranks and in shards. `make test-gpu`."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip("needs two NVIDIA GPUs", allow_module_level=True)
# Asked again: by the time that they run, other tests may have hidden the GPUs from this process.
pytestmark = pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two NVIDIA GPUs")

from shared.training_spec import TrainerSpec  # noqa: E402
from tests.training.tiny_llama import WORDS, alpaca_rows, make_tiny_llama, write_jsonl  # noqa: E402
from tests.training.trainers import Outcome, TrainerProcess  # noqa: E402

STEPS, SAVED = 6, 3
ONE: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 1e-3, "save_steps": SAVED, "eval_steps": SAVED}
SHARDS: dict[str, Any] = {**ONE, "gpus": 2, "sharding": "on"}
ADAMW: dict[str, Any] = {"optimizer": "adamw"}
"""In 32 bits, as shards always have it."""
WAYS: dict[str, dict[str, Any]] = {
    "one": {**ONE, **ADAMW},
    "equal": {**ONE, **ADAMW, "gpus": 2, "sharding": "off"},
    "shards": SHARDS,
    "small shards": {**SHARDS, "gradient_checkpointing": True, "micro_batch_size": 1},
    "8 bits": ONE,
}
LIMIT_S = 250
"""A rank that waits for another waits for hours."""
LOSS, NORM = 5e-3, 5e-2
"""Relative, of bf16 products added up in another order, over six steps (docs/decisions/0104)."""

Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("ranks")
    base = make_tiny_llama(folder / "base", max_position_embeddings=2048)
    long = {"instruction": " ".join(WORDS * 100), "output": "yes"}
    data = write_jsonl(folder / "rows.jsonl", [long, *alpaca_rows(47)])
    valid = write_jsonl(folder / "valid.jsonl", alpaca_rows(10, seed=9))

    def run(name: str, training: dict[str, Any], **fields: Any) -> Outcome:
        mine = folder / name.replace(" ", "-")
        mine.mkdir()
        values = {
            "job_id": "ftjob-test",
            "base_model": "test/tiny",
            "base_model_dir": str(base),
            "training_file": str(data),
            "validation_file": str(valid),
            "checkpoint_dir": str(mine / "checkpoints"),
            "work_dir": str(mine / "work"),
            "training": training,
            **fields,
        }
        trainer = TrainerProcess(TrainerSpec.model_validate(values), mine)
        timer = threading.Timer(LIMIT_S, trainer.process.kill)
        timer.start()
        try:
            return trainer.finish()
        finally:
            timer.cancel()

    return run


@pytest.fixture(scope="module")
def outcomes(run: Run) -> dict[str, Outcome]:
    """All at once: most of their time is imports."""
    with ThreadPoolExecutor(len(WAYS)) as pool:
        return dict(zip(WAYS, pool.map(lambda way: run(way, WAYS[way]), WAYS), strict=True))


@pytest.mark.parametrize("way", ["equal", "shards", "small shards"])
def test_two_gpus_learn_what_one_learns(outcomes: dict[str, Outcome], way: str) -> None:
    one, two = outcomes["one"], outcomes[way]
    assert one.status == 0, one.stderr[-3000:]
    assert two.status == 0, two.stderr[-3000:]
    resolved = two.of("started")[0].resolved
    assert (resolved["sharding"], resolved["optimizer"]) == (WAYS[way]["sharding"], "adamw")
    assert resolved["longest_row"] > 1024, "what Unsloth's trainer takes for the limit of a model that says nothing"
    assert_alike(two, one, first=1)
    assert sizes(two) == sizes(one)


def test_shards_go_on_from_one_gpus_checkpoint(outcomes: dict[str, Outcome], run: Run) -> None:
    """Whose moments have 8 bits."""
    one = outcomes["8 bits"]
    assert one.status == 0, one.stderr[-3000:]
    two = run("resumed", SHARDS, resume_from=one.of("checkpoint")[0].path)
    assert two.status == 0, two.stderr[-3000:]
    assert_alike(two, one, first=SAVED + 1)


def assert_alike(two: Outcome, one: Outcome, *, first: int) -> None:
    for found, expected in zip(two.of("metrics"), one.of("metrics")[first - 1 :], strict=True):
        assert (found.step, found.tokens) == (expected.step, expected.tokens)
        assert found.loss == pytest.approx(expected.loss, rel=LOSS)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=NORM)
    assert two.of("evaluation")[-1].eval_loss == pytest.approx(one.of("evaluation")[-1].eval_loss, rel=LOSS)


def sizes(outcome: Outcome) -> list[dict[str, int]]:
    """Of each checkpoint's weights."""
    folders = [Path(message.path) for message in outcome.of("checkpoint")]
    return [{file.name: file.stat().st_size for file in folder.glob("*.safetensors")} for folder in folders]
