"""Every `auto` becomes a number, the tutorial's where the client said nothing."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.training_spec import Resolved, TrainerSpec, TrainingSpec
from worker.training import data_plan
from worker.training.failures import UnsupportedSetting
from worker.training.resolve import (
    FAST_ENOUGH_CPU,
    Hardware,
    Needs,
    advice,
    kept_bytes,
    longest_conversation,
    packed_row_length,
    resolve,
    sizes,
    tokens_per_pass,
)

CPU = Hardware("cpu", is_gpu=False, computes_bf16=True)
OLD_CPU = Hardware("cpu", is_gpu=False, computes_bf16=False)
GPU = Hardware("NVIDIA H200", is_gpu=True, computes_bf16=True)
OLD_GPU = Hardware("Tesla T4", is_gpu=True, computes_bf16=False)
SMALL = Needs(weights=4 * 135_000_000, token=700_000, token_recomputed=100_000)
"""A model of 135M parameters, about."""
ROW_TOKENS = 200


def make_spec(training: dict[str, Any] | None = None, **fields: Any) -> TrainerSpec:
    paths = dict.fromkeys(("base_model_dir", "training_file", "checkpoint_dir", "work_dir"), "/nowhere")
    return TrainerSpec.model_validate(
        {"job_id": "ftjob-1", "base_model": "test/tiny", **paths, "training": training or {}, **fields}
    )


def resolved(
    training: dict[str, Any] | None = None,
    hardware: Hardware = CPU,
    rows: int = 1000,
    begun_with: data_plan.Sizes | None = None,
    **fields: Any,
) -> Resolved:
    spec = make_spec(training, **fields)
    return resolve(
        spec,
        hardware,
        lengths=[ROW_TOKENS] * rows,
        longest=2048,
        needs=SMALL,
        has_validation=bool(spec.validation_file),
        chat_template="chatml",
        begun_with=begun_with,
    )


def test_nothing_said_is_the_tutorial() -> None:
    found = resolved(hardware=GPU).model_dump()
    expected = {
        "max_steps": 60,
        "batch_size": 8,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-4,
        "warmup_steps": 5,
        "lr_scheduler": "linear",
        "weight_decay": 0.01,
        "max_seq_length": 2048,
        "precision": "bf16",
        "master_weights": "fp32",
        "optimizer": "adamw_8bit",
        "gradient_checkpointing": False,
        "chat_template": "chatml",
        "packing": "none",
        "train_on": "assistant",
        "seed": 3407,
        "save_steps": 20,
        "eval_steps": None,
        "n_epochs": 0.48,
    }
    assert {key: found[key] for key in expected} == expected
    assert "auto" not in found.values()


@pytest.mark.parametrize(
    ("hardware", "precision", "optimizer", "checkpointing"),
    [(CPU, "bf16", "adamw", False), (OLD_CPU, "fp32", "adamw", False), (OLD_GPU, "fp16", "adamw_8bit", False)],
)
def test_auto_follows_the_hardware(
    hardware: Hardware, precision: str, optimizer: str, checkpointing: str | bool
) -> None:
    found = resolved(hardware=hardware)
    assert (found.precision, found.optimizer, found.gradient_checkpointing) == (precision, optimizer, checkpointing)


@pytest.mark.parametrize(
    ("training", "fields", "steps"),
    [
        ({}, {}, 60),
        ({"max_steps": 7}, {}, 7),
        ({}, {"n_epochs": 1}, 125),
        ({}, {"n_epochs": 0.001}, 1),
        ({"batch_size": 3}, {"n_epochs": 2}, 668),
        ({"max_steps": 7}, {"n_epochs": 3}, 7),
    ],
)
def test_steps(training: dict[str, Any], fields: dict[str, Any], steps: int) -> None:
    assert resolved(training, **fields).max_steps == steps


@pytest.mark.parametrize(("steps", "save"), [(1, 1), (2, 1), (10, 4), (60, 20), (100_000, 500)])
def test_checkpoints_are_a_third_of_the_run_apart_and_never_more_than_500_steps(steps: int, save: int) -> None:
    found = resolved({"max_steps": steps}, validation_file="/nowhere/valid.jsonl")
    assert (found.save_steps, found.eval_steps) == (save, save)


def test_the_multiplier_multiplies_the_base_rate_and_a_rate_wins() -> None:
    assert resolved(learning_rate_multiplier=0.5).learning_rate == pytest.approx(1e-4)
    found = resolved({"learning_rate": 1e-3}, learning_rate_multiplier=0.5)
    assert (found.learning_rate, found.learning_rate_multiplier) == (1e-3, pytest.approx(5))


@pytest.mark.parametrize(
    ("training", "hardware", "message"),
    [
        ({"precision": "fp16"}, CPU, "fp16 needs a GPU"),
        ({"precision": "bf16"}, OLD_GPU, "not computed by Tesla T4"),
        ({"precision": "fp32"}, GPU, "CPU only"),
        ({"precision": "fp32", "master_weights": "bf16"}, CPU, "needs training.precision bf16"),
        ({"master_weights": "bf16"}, OLD_GPU, "needs training.precision bf16"),
    ],
)
def test_what_the_hardware_cannot_do_is_refused(training: dict[str, Any], hardware: Hardware, message: str) -> None:
    with pytest.raises(UnsupportedSetting, match=message):
        resolved(training, hardware)


def test_the_tutorials_steps_come_with_the_share_of_rows_they_see() -> None:
    spec = make_spec()
    found = resolve(
        spec, CPU, lengths=[ROW_TOKENS] * 999, longest=2048, needs=SMALL, has_validation=False, chat_template="chatml"
    )
    [warning] = advice(spec, found, 999)
    assert "60 steps" in warning
    assert "48% of the 999 training rows" in warning
    assert not advice(make_spec(n_epochs=1), found, 999)
    assert not advice(make_spec({"max_steps": 60}), found, 999)


def test_the_tutorials_steps_on_few_rows_say_how_often_each_is_seen() -> None:
    spec = make_spec()
    found = resolve(
        spec, CPU, lengths=[ROW_TOKENS] * 80, longest=2048, needs=SMALL, has_validation=False, chat_template="chatml"
    )
    [warning] = advice(spec, found, 80)
    assert "100% of the 80 training rows, 6 times" in warning


@pytest.mark.parametrize(("rate", "warnings"), [(2e-4, 0), (2e-5, 1)])
def test_bf16_weights_warn_where_they_lose_updates(rate: float, warnings: int) -> None:
    spec = make_spec({"max_steps": 5, "master_weights": "bf16", "learning_rate": rate})
    found = resolve(
        spec, CPU, lengths=[ROW_TOKENS] * 80, longest=2048, needs=SMALL, has_validation=False, chat_template="chatml"
    )
    assert len(advice(spec, found, 80)) == warnings


def test_a_base_made_for_fewer_tokens_sets_the_limit() -> None:
    spec = make_spec({"max_steps": 5, "max_seq_length": 4096})
    longest = longest_conversation(spec, 1024)
    found = resolve(
        spec, CPU, lengths=[ROW_TOKENS] * 80, longest=longest, needs=SMALL, has_validation=False, chat_template="chatml"
    )
    assert found.max_seq_length == longest == 1024
    [warning] = advice(spec, found, 80)
    assert "1024 is used" in warning
    assert longest_conversation(spec, None) == 4096


def test_packed_rows_are_short_where_attention_costs_the_square() -> None:
    assert packed_row_length(2048, GPU) == 2048
    assert packed_row_length(2048, CPU) == 512
    assert packed_row_length(256, CPU) == 256


@pytest.mark.parametrize(
    ("gib", "rows", "batch", "micro", "checkpointing"),
    [
        (140, 2048, 16, 16, False),
        (24, 2048, 16, 6, False),
        (24, 2048, 17, 6, False),
        (3.5, 2048, 16, 2, "unsloth"),
    ],
)
def test_a_pass_holds_what_fits_whether_or_not_that_divides_the_batch(
    gib: float, rows: int, batch: int, micro: int, checkpointing: str | bool
) -> None:
    gpu = Hardware("a GPU", is_gpu=True, computes_bf16=True, memory_bytes=int(gib * 2**30))
    spec = make_spec({"batch_size": batch})
    found = resolve(
        spec, gpu, lengths=[rows] * 100, longest=2048, needs=SMALL, has_validation=False, chat_template="chatml"
    )
    assert (found.micro_batch_size, found.gradient_checkpointing) == (micro, checkpointing)
    assert found.gradient_accumulation_steps == math.ceil(batch / micro)


def test_two_passes_fit_a_gpu_at_once_for_a_graph_keeps_the_memory_of_one() -> None:
    left = SMALL.token * ROW_TOKENS * 1000
    held = kept_bytes(SMALL)
    memory = held + left
    gpu = Hardware("any", is_gpu=True, computes_bf16=True, memory_bytes=memory)
    taken = tokens_per_pass(gpu, SMALL, held, recompute=False, precision="bf16") * SMALL.token
    assert 0.6 * left < 2 * taken < 0.75 * left
    assert resolved({"batch_size": 1}, gpu).gradient_checkpointing is False
    tight = replace(gpu, memory_bytes=memory - left + 2 * SMALL.token * ROW_TOKENS)
    assert resolved({"batch_size": 1}, tight).gradient_checkpointing == "unsloth"
    assert resolved({"batch_size": 1}, replace(tight, is_gpu=False)).gradient_checkpointing is False


def test_a_batch_needs_no_divisor_that_fits() -> None:
    assert TrainingSpec(batch_size=23).resolved_batch(14) == (23, 14, 2)
    assert TrainingSpec(batch_size=23, gpus=2).resolved_batch(14) == (23, 12, 2)
    assert TrainingSpec(batch_size=23).resolved_batch() == (23, 23, 1)
    assert TrainingSpec(batch_size=12, gradient_accumulation_steps=4).resolved_batch(1) == (12, 3, 4), "the client's"


TIGHT = replace(CPU, memory_bytes=0)


def test_a_resumed_run_keeps_what_it_began_with_whatever_memory_is_free() -> None:
    began = resolved({"batch_size": 64}, rows=500)
    kept = sizes(began, CPU)
    assert resolved({"batch_size": 64}, TIGHT, rows=500) != began
    assert resolved({"batch_size": 64}, TIGHT, rows=500, begun_with=kept) == began
    assert resolved({"batch_size": 64}, replace(TIGHT, name="NVIDIA T4"), rows=500, begun_with=kept) != began


def test_a_rung_asks_a_resumed_run_for_less_than_it_began_with() -> None:
    kept = sizes(resolved({"batch_size": 64}), CPU)
    less = resolved({"batch_size": 64, "tokens_per_pass": 1000, "gradient_checkpointing": True}, begun_with=kept)
    assert less.model_dump()["tokens_per_pass"] == 1000
    assert (less.micro_batch_size, less.gradient_checkpointing) == (5, True)
    rows = resolved({"batch_size": 64, "micro_batch_size": 2}, begun_with=kept)
    assert (rows.micro_batch_size, rows.model_dump()["tokens_per_pass"]) == (2, None)


def test_a_plan_of_a_version_that_kept_no_sizes_is_a_plan(tmp_path: Path) -> None:
    whole = data_plan.DataPlan(
        conversations_sha256="ab", packed=None, epoch=1, order=[1, 0], sizes=sizes(resolved(), CPU)
    )
    whole.write(tmp_path)
    assert data_plan.read(tmp_path, "ab") == whole
    (tmp_path / data_plan.FILE).write_text(whole.model_dump_json(exclude={"sizes"}))
    older = data_plan.read(tmp_path, "ab")
    assert older is not None
    assert (older.order, older.sizes) == ([1, 0], None)


def test_passes_on_cpu_are_no_longer_than_makes_them_fast() -> None:
    found = resolved({"batch_size": 64})
    assert found.micro_batch_size * ROW_TOKENS <= FAST_ENOUGH_CPU
    assert resolved({"batch_size": 64, "micro_batch_size": 64}).micro_batch_size == 64, "the client's choice stays"


LARGE = Needs(weights=4 * 8_000_000_000, token=6_400_000, token_recomputed=930_000, can_be_sharded=True)
"""A model of 8B parameters: 144 GB of masters, gradients, moments and copies."""
H100 = replace(GPU, memory_bytes=80 * 10**9)
H100_TWICE = replace(GPU, memory_bytes=160 * 10**9)


def sharding_of(training: dict[str, Any], hardware: Hardware, needs: Needs = LARGE) -> tuple[str, str, bool | str]:
    spec = make_spec(training)
    found = resolve(
        spec, hardware, lengths=[2048] * 99, longest=2048, needs=needs, has_validation=False, chat_template="chatml"
    )
    assert bool([text for text in advice(spec, found, 99) if "no 8-bit optimizer" in text]) == (
        found.sharding == "on" and training.get("optimizer") != "adamw"
    )
    return found.sharding, found.optimizer, found.gradient_checkpointing


@pytest.mark.parametrize(
    ("training", "hardware", "expected"),
    [
        ({"gpus": 2}, H100, ("on", "adamw", "unsloth")),
        ({"gpus": 8}, H100, ("on", "adamw", False)),
        ({"gpus": 2}, H100_TWICE, ("off", "adamw_8bit", "unsloth")),
        ({"gpus": 2, "sharding": "on", "optimizer": "adamw"}, H100_TWICE, ("on", "adamw", False)),
        ({"gpus": 2, "sharding": "off"}, H100, ("off", "adamw_8bit", "unsloth")),
        ({}, H100, ("off", "adamw_8bit", "unsloth")),
    ],
)
def test_a_model_is_kept_in_shards_where_one_gpu_has_no_room(
    training: dict[str, Any], hardware: Hardware, expected: tuple[str, str, bool | str]
) -> None:
    assert sharding_of(training, hardware) == expected


def test_shards_that_cannot_be_are_refused_and_never_chosen() -> None:
    other = replace(LARGE, can_be_sharded=False)
    assert sharding_of({"gpus": 2}, H100, other)[0] == "off"
    for training, hardware, needs, message in (
        ({"gpus": 2}, H100, other, "the base model is none"),
        ({"gpus": 2}, OLD_GPU, LARGE, "precision fp16"),
    ):
        with pytest.raises(UnsupportedSetting, match=message) as caught:
            sharding_of({**training, "sharding": "on"}, hardware, needs)
        assert caught.value.param == "training.sharding"


def test_a_model_is_not_sharded_for_moments_that_it_does_not_keep() -> None:
    """8-bit moments take a quarter of their weights; 32-bit ones twice as much as them."""
    five_billion = replace(LARGE, weights=4 * 5_000_000_000)
    assert sharding_of({"gpus": 2}, H100, five_billion)[0] == "off"
    assert sharding_of({"gpus": 2, "optimizer": "adamw"}, H100, five_billion)[0] == "on"


@pytest.mark.parametrize("began", ["on", "off"])
def test_a_resumed_run_stays_whole_or_in_shards(began: str) -> None:
    kept = data_plan.Sizes(hardware=GPU.name, tokens_per_pass=None, gradient_checkpointing=False, sharding=began)
    for memory in (10**9, 10**15):
        found = resolve(
            make_spec({"gpus": 2}),
            replace(GPU, memory_bytes=memory),
            lengths=[2048] * 99,
            longest=2048,
            needs=LARGE,
            has_validation=False,
            chat_template="chatml",
            begun_with=kept,
        )
        assert found.sharding == began
