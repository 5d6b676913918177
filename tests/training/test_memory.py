"""Memory that really runs out: the limit is the kernel's, the ladder is what the supervisor goes down."""

import random
from pathlib import Path
from typing import Any

import pytest

# isort: off
from worker.training import engine  # imports unsloth, which must come first
# isort: on

import torch

from shared.training_spec import TrainerSpec, TrainingSpec
from tests.training.conftest import MakeSpec
from tests.training.tiny_llama import make_tiny_llama, sentence, write_jsonl
from tests.training.trainers import Outcome, run_here, run_process
from worker.training import data, passes
from worker.training.ladder import next_rung

pytestmark = pytest.mark.slow

LIMIT_BYTES = 620 * 2**20
"""Beyond its imports a trainer with micro-batches of 8 takes about 900 MiB, with 4 about 550, with 1 about 200."""


@pytest.fixture(scope="module")
def wide_spec(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Rows of about 2,000 tokens for a model wide enough that their activations are most of what it needs."""
    folder = tmp_path_factory.mktemp("wide")
    base = make_tiny_llama(folder / "base", max_position_embeddings=4096, hidden_size=256, intermediate_size=512)
    generator = random.Random(3)
    rows = [{"prompt": sentence(generator, 5), "completion": sentence(generator, 1900)} for _ in range(8)]
    training_file = write_jsonl(folder / "rows.jsonl", rows)

    def make(name: str, training: dict[str, Any], **fields: Any) -> TrainerSpec:
        return TrainerSpec(
            job_id="ftjob-test",
            base_model="test/wide",
            base_model_dir=str(base),
            training_file=str(training_file),
            checkpoint_dir=str(folder / name / "checkpoints"),
            work_dir=str(folder / name / "work"),
            training=training,
            **fields,
        )

    return make


@pytest.mark.timeout(600)  # three trainers that compute a lot, on a machine that may be busy
def test_a_run_that_does_not_fit_goes_down_the_ladder_and_learns_the_same(wide_spec: Any, tmp_path: Path) -> None:
    asked = {
        "max_steps": 2,
        "save_steps": 2,
        "warmup_steps": 0,
        "micro_batch_size": 8,
        "max_seq_length": 4096,
        "precision": "fp32",
    }
    adapted: dict[str, Any] = {}
    outcomes: list[Outcome] = []
    while True:
        name, training = str(len(outcomes)), {**asked, **adapted}
        outcomes.append(run_process(wide_spec(name, training, memory_limit_bytes=LIMIT_BYTES), tmp_path))
        if outcomes[-1].status == 0:
            break
        failed = outcomes[-1].last
        assert (failed.code, failed.param) == ("out_of_memory", "training.micro_batch_size"), outcomes[-1].stderr[
            -2000:
        ]
        rung = next_rung(TrainingSpec(**training), outcomes[-1].of("started")[0].resolved)
        assert rung is not None
        adapted = rung.overrides
    micros = [outcome.of("started")[0].resolved["micro_batch_size"] for outcome in outcomes]
    assert micros == [8, 4, 2, 1][: len(micros)]
    assert len(micros) > 1, "8 rows at once fit; the limit is too high to show anything"
    undisturbed = run_here(wide_spec("undisturbed", asked))
    assert undisturbed.status == 0, undisturbed.last
    for found, expected in zip(outcomes[-1].of("metrics"), undisturbed.of("metrics"), strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert (found.tokens, found.learning_rate) == (expected.tokens, expected.learning_rate)


@pytest.mark.parametrize("own", [True, False], ids=["own passes", "unsloth's"])
def test_an_evaluation_that_does_not_fit_is_made_in_smaller_batches(
    make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example], monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """Nothing the ladder changes would make an evaluation smaller. The allocator's error is raised by the test."""
    from tests.training.test_engine import build

    trainer, _ = build(make_spec, tmp_path, rows)
    if not own:
        trainer.stepper = None
    whole = engine.evaluate(trainer, rows, lambda: False)
    sizes: list[int] = []
    padded, join = engine._padded, passes.join

    def no_more_than(limit: int) -> None:
        def allocate(members: list[data.Example], device: Any) -> dict[str, Any]:
            sizes.append(len(members) * max(len(row.ids) for row in members))
            if sizes[-1] > limit:
                raise torch.OutOfMemoryError("tried to allocate")
            return padded(members, device)

        def run(members: list[data.Example]) -> passes.Pass:
            sizes.append(sum(len(row.ids) for row in members))
            if sizes[-1] > limit:
                raise torch.OutOfMemoryError("tried to allocate")
            return join(members)

        monkeypatch.setattr(engine, "_padded", allocate)
        monkeypatch.setattr(passes, "join", run)

    no_more_than(1200)
    smaller = engine.evaluate(trainer, rows, lambda: False)
    assert max(sizes) > 2400
    assert whole is not None
    assert smaller is not None
    assert smaller.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (smaller.accuracy, smaller.tokens) == (whole.accuracy, whole.tokens)
    no_more_than(10)
    with pytest.raises(torch.OutOfMemoryError):
        engine.evaluate(trainer, rows, lambda: False)
