"""A model in shards trains as one that is whole: the same losses, the same files, one way on from either. On CPU."""

import functools
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.training.conftest import MakeSpec
from tests.training.trainers import (
    STEPS,
    TRAINING,
    Outcome,
    assert_close,
    assert_same,
    run_here,
    run_process,
    start,
    weights,
)
from worker.training import moments
from worker.training.checkpoint import verify

pytestmark = pytest.mark.slow

SHARDED: dict[str, Any] = {**TRAINING, "gpus": 2, "sharding": "on", "micro_batch_size": 1}
"""Several passes a step, not as many for one rank as for the other: of 8 conversations some have 3, others 2 or 5."""


def shapes(state: Any) -> Any:
    """The state with each tensor's shape and number format in its place."""
    if isinstance(state, dict):
        return {name: shapes(value) for name, value in state.items()}
    return (tuple(state.shape), state.dtype) if isinstance(state, torch.Tensor) else state


def optimizer(outcome: Outcome, number: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(Path(outcome.of("checkpoint")[number].path) / "optimizer.pt", weights_only=True)
    return found


def test_shards_train_as_the_whole_does_and_one_process_goes_on(
    make_spec: MakeSpec, validation_file: Path, alone: Outcome, processes: list[psutil.Process], tmp_path: Path
) -> None:
    """Interrupted in the fourth step or the fifth."""
    common = {"validation_file": str(validation_file)}
    (tmp_path / "two").mkdir()
    spec = make_spec(tmp_path / "two", training=SHARDED, **common)
    trainer = start(processes, spec, tmp_path / "two", lambda message: message.type == "checkpoint")
    trainer.process.send_signal(signal.SIGTERM)
    two = trainer.finish()
    assert (two.status, two.last.type, two.last.reason) == (0, "stopped", "interrupted"), two.stderr[-3000:]
    done = two.last.step
    assert 3 <= done < STEPS
    [started] = two.of("started")
    assert (started.resolved["sharding"], started.resolved["optimizer"]) == ("on", "adamw")
    assert started.parameters == alone.of("started")[0].parameters
    assert [event.message for event in two.of("event") if "8-bit" in event.message]
    assert_same(two.of("metrics"), alone.of("metrics")[:done])
    assert two.of("evaluation")[0].eval_loss == pytest.approx(alone.of("evaluation")[0].eval_loss, abs=1e-5)
    assert two.of("evaluation")[0].eval_tokens == alone.of("evaluation")[0].eval_tokens

    assert shapes(weights(two, 0)) == shapes(weights(alone, 0))
    assert_close(weights(two, 0), weights(alone, 0))
    found, expected = optimizer(two, 0), optimizer(alone, 0)
    assert shapes(found) == shapes(expected)
    for index, state in expected["state"].items():
        assert torch.allclose(found["state"][index]["exp_avg"], state["exp_avg"], atol=1e-5)
    newest = Path(two.of("checkpoint")[-1].path)
    assert verify(newest).files.keys() == verify(Path(alone.of("checkpoint")[0].path)).files.keys()
    from transformers import AutoModelForCausalLM

    _, loading = AutoModelForCausalLM.from_pretrained(newest, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]

    one = run_here(make_spec(tmp_path / "one", training=TRAINING, resume_from=str(newest), **common))
    assert one.status == 0, one.last
    assert one.of("started")[0].first_step == done + 1
    assert_same(one.of("metrics"), alone.of("metrics")[done:])
    assert_close(weights(one), weights(alone))


def test_shards_go_on_from_a_checkpoint_of_one(make_spec: MakeSpec, alone: Outcome, tmp_path: Path) -> None:
    """Three of them, whose parts differ in size, with activations computed twice."""
    training = {**SHARDED, "gpus": 3, "gradient_checkpointing": True}
    three = run_process(make_spec(tmp_path, training=training, resume_from=alone.of("checkpoint")[0].path), tmp_path)
    assert three.status == 0, three.stderr[-3000:]
    assert_same(three.of("metrics"), alone.of("metrics")[3:])
    assert_close(weights(three), weights(alone))


def test_a_run_of_a_gpu_goes_on_without_one(
    make_spec: MakeSpec, validation_file: Path, alone: Outcome, tmp_path: Path
) -> None:
    """Its optimizer's state is bitsandbytes' own, which keeps small moments in 32 bits: nothing changes."""
    begun = tmp_path / "begun"
    shutil.copytree(alone.of("checkpoint")[0].path, begun)
    saved = torch.load(begun / "optimizer.pt", weights_only=True)
    for index, state in saved["state"].items():
        packed = {"state1": state["exp_avg"], "state2": state["exp_avg_sq"]}
        saved["state"][index] = {"step": int(state["step"]), moments.WRAPPED: packed}
    torch.save(saved, begun / "optimizer.pt")
    common = {"validation_file": str(validation_file), "training": TRAINING}
    one = run_here(make_spec(tmp_path / "one", resume_from=str(begun), **common))
    assert one.status == 0, one.last
    assert_same(one.of("metrics"), alone.of("metrics")[one.of("started")[0].first_step - 1 :])
    assert_close(weights(one), weights(alone))


def test_moments_of_8_bits_become_32_and_back(tmp_path: Path) -> None:
    from bitsandbytes.optim import AdamW8bit

    def make(kind: Any) -> tuple[list[torch.nn.Parameter], Any]:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 128), (64,))]
        return parameters, kind(parameters, lr=1e-2)

    parameters, wide = make(torch.optim.AdamW)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        wide.step()
    _, narrow = make(AdamW8bit)
    moments.take_either(narrow)
    narrow.load_state_dict(wide.state_dict())
    states = narrow.state_dict()["state"]
    assert states[0][moments.WRAPPED]["state1"].dtype == torch.uint8
    for index, expected in wide.state_dict()["state"].items():
        found = moments.widened(states[index])
        assert found.keys() == expected.keys()
        assert found["step"] == 3
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(found[name], expected[name], rtol=0.1, atol=float(expected[name].abs().max()) / 50)
            assert not torch.equal(found[name], torch.zeros_like(found[name]))
    parameters, on_cpu = make(functools.partial(torch.optim.AdamW, fused=True))
    on_cpu.register_load_state_dict_pre_hook(moments.as_torch_has_it)
    on_cpu.load_state_dict(narrow.state_dict())
    assert on_cpu.param_groups[0]["fused"]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    on_cpu.step()
    assert on_cpu.state[parameters[0]]["step"] == 4
