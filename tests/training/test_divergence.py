"""Training that breaks: it stops, says so, and what was published before is finite."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# isort: off
from worker.training import engine  # noqa: F401 - imports unsloth, which must come first
# isort: on

import torch
from safetensors.torch import load_file, save_file

from tests.training.conftest import MakeSpec, Outcome
from tests.training.tiny_llama import make_tiny_llama
from worker.training import callbacks
from worker.training.checkpoint import verify

pytestmark = pytest.mark.slow
RunHere = Callable[..., Outcome]


def token_id(base: Path, token: str) -> int:
    return int(json.loads((base / "tokenizer.json").read_text())["model"]["vocab"][token])


def demand_finite_checkpoints(outcome: Outcome, steps: list[int]) -> None:
    """Exactly those steps are published, whole, and finite down to the optimizer's moments."""
    assert [message.step for message in outcome.of("checkpoint")] == steps
    for message in outcome.of("checkpoint"):
        folder = Path(message.path)
        assert verify(folder).step == message.step
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())
        moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        assert all(values.isfinite().all() for state in moments.values() for values in state.values())
    if steps:
        published = Path(outcome.of("checkpoint")[0].path).parent
        assert sorted(path.name for path in published.iterdir()) == [str(step) for step in steps]


@pytest.mark.parametrize(("rate", "diverges"), [(1e-5, False), (1.0, True)])
def test_a_rate_that_is_too_high_ends_the_run_and_keeps_the_finite_checkpoints(
    rate: float, diverges: bool, run_here: RunHere, make_spec: MakeSpec, tmp_path: Path, tiny_base: Path
) -> None:
    """A base whose gradients are near the end of fp32's range: large steps leave it, small ones don't.

    Every step is looked at, though only each fifth is told.
    """
    base = shutil.copytree(tiny_base, tmp_path / "near-the-edge")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"].fill_(2.7e18)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    choices = {"learning_rate": rate, "warmup_steps": 3, "max_steps": 6, "save_steps": 1, "logging_steps": 5}
    training = {**choices, "precision": "fp32"}
    outcome = run_here(make_spec(tmp_path, base_model_dir=str(base), training=training))
    if not diverges:
        assert outcome.status == 0, outcome.last
        return
    assert (outcome.status, outcome.last.code, outcome.last.param) == (1, "diverged", "training.learning_rate")
    assert "diverged at step 3: the gradient norm is inf" in outcome.last.message
    assert outcome.of("metrics") == []
    demand_finite_checkpoints(outcome, [1, 2])


def test_weights_that_overflow_under_a_finite_loss_are_not_published(
    run_here: RunHere, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding of a token that no row holds: no loss and no gradient ever shows it."""
    base = make_tiny_llama(tmp_path / "untied", tie_word_embeddings=False)
    token = token_id(base, "~")
    plain = callbacks.RunCallback.on_step_begin

    def overflow_in_step_3(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        plain(self, args, state, control, **kwargs)
        if state.global_step == 2:
            with torch.no_grad():
                kwargs["model"].get_input_embeddings().weight[token, 7] = float("inf")

    monkeypatch.setattr(callbacks.RunCallback, "on_step_begin", overflow_in_step_3)
    outcome = run_here(
        make_spec(tmp_path, base_model_dir=str(base), training={"max_steps": 6, "save_steps": 2, "precision": "fp32"})
    )
    assert [message.step for message in outcome.of("metrics")] == [1, 2, 3, 4]
    assert (outcome.status, outcome.last.code) == (1, "diverged")
    assert "diverged at step 4: weights of model.embed_tokens.weight are not finite" in outcome.last.message
    demand_finite_checkpoints(outcome, [2])


def test_a_validation_loss_that_is_not_a_number_ends_the_run_before_it_is_saved(
    run_here: RunHere, make_spec: MakeSpec, tmp_path: Path, validation_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that only the validation file holds is enough: its token's embedding has overflowed."""
    base = make_tiny_llama(tmp_path / "untied", tie_word_embeddings=False)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][token_id(base, "~")] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(validation_file.read_text() + '{"instruction": "~", "output": "hello"}\n')
    training = {"max_steps": 3, "save_steps": 2, "precision": "fp32"}
    outcome = run_here(make_spec(tmp_path, base_model_dir=str(base), validation_file=str(held_out), training=training))
    assert (outcome.status, outcome.last.code) == (1, "diverged")
    assert "diverged at step 2: the validation loss is nan" in outcome.last.message
    assert outcome.of("evaluation") == []
    demand_finite_checkpoints(outcome, [])


def test_a_broken_value_is_found_wherever_it_is(tiny_base: Path) -> None:
    from worker.training import model as models
    from worker.training.resolve import Hardware

    hardware = Hardware("cpu", is_gpu=False, computes_bf16=True)
    for numbers, value in [("fp32", "nan"), ("fp32", "-inf"), ("bf16", "inf")]:
        loaded = models.load_model(
            tiny_base, hardware, max_seq_length=64, master_weights=numbers, gradient_checkpointing=False
        )
        assert models.not_finite(loaded) is None
        with torch.no_grad():
            loaded.model.layers[1].mlp.up_proj.weight[-1, -1] = float(value)
        assert models.not_finite(loaded) == "model.layers.1.mlp.up_proj.weight"
