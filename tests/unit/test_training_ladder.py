"""What is given up when memory runs out: the order, what never changes, and the words for it. No torch."""

import errno
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from shared.training_spec import TrainerSpec, TrainingSpec
from worker.training import passes
from worker.training.data import Example
from worker.training.failures import describe, is_out_of_memory
from worker.training.ladder import SHORTEST_SEQUENCE, next_rung
from worker.training.resolve import Hardware, Needs, resolve

CPU = Hardware("cpu", is_gpu=False, computes_bf16=True)
GPU = Hardware("NVIDIA H200", is_gpu=True, computes_bf16=True)


def resolved(training: TrainingSpec, hardware: Hardware = CPU, lengths: Sequence[int] = (1,) * 100) -> dict[str, Any]:
    paths = dict.fromkeys(("base_model_dir", "training_file", "checkpoint_dir", "work_dir"), "/nowhere")
    spec = TrainerSpec.model_validate({"job_id": "ftjob-1", "base_model": "test/tiny", **paths, "training": training})
    longest = training.max_seq_length
    needs = Needs(weights=1, token=1, token_recomputed=1)
    return resolve(
        spec,
        hardware,
        lengths=lengths,
        longest=longest,
        needs=needs,
        has_validation=False,
        chat_template="chatml",
    ).shown()


def largest_pass(run: dict[str, Any], lengths: Sequence[int]) -> int:
    """Tokens of the largest pass that a step of the longest rows is cut into."""
    rows = [Example([1] * length, [1] * length, (length,)) for length in sorted(lengths)[-run["batch_size"] :]]
    chunks = passes.chunks(rows, run["micro_batch_size"], run["tokens_per_pass"])
    return max(sum(len(row.ids) for row in chunk) for chunk in chunks)


def descend(
    asked: dict[str, Any], hardware: Hardware = CPU, lengths: Sequence[int] = (1,) * 100
) -> list[dict[str, Any]]:
    """Every run down the ladder, as a supervisor makes them: resolved choices, the first one included."""
    runs = [resolved(TrainingSpec(**asked), hardware, lengths)]
    adapted: dict[str, Any] = {}
    while rung := next_rung(TrainingSpec(**{**asked, **adapted}), runs[-1]):
        adapted = rung.overrides
        runs.append(resolved(TrainingSpec(**{**asked, **adapted}), hardware, lengths))
        assert len(runs) < 30, "the ladder must end"
    return runs


def steps(runs: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(run[name] for name in names) for run in runs]


@pytest.mark.parametrize(
    ("asked", "micros"),
    [
        ({"batch_size": 16, "micro_batch_size": 16}, [16, 8, 4, 2, 1]),
        ({"batch_size": 12, "micro_batch_size": 12}, [12, 6, 3, 1]),
        ({"batch_size": 15, "micro_batch_size": 15}, [15, 5, 1]),
        ({"batch_size": 7, "micro_batch_size": 7}, [7, 1]),
        ({"micro_batch_size": 3, "gradient_accumulation_steps": 4}, [3, 1]),
        ({"micro_batch_size": 4, "gradient_accumulation_steps": 2, "batch_size": 8, "packing": "rows"}, [4, 2, 1]),
    ],
)
def test_micro_batches_shrink_first_and_the_batch_never_changes(asked: dict[str, Any], micros: list[int]) -> None:
    runs = descend(asked)
    assert [run["micro_batch_size"] for run in runs[: len(micros)]] == micros
    batch = runs[0]["batch_size"]
    assert all(run["micro_batch_size"] * run["gradient_accumulation_steps"] == run["batch_size"] for run in runs)
    assert {run["batch_size"] for run in runs} == {batch}
    assert steps(runs[len(micros) :], "micro_batch_size", "gradient_checkpointing") == [(1, "unsloth")]


@pytest.mark.parametrize("asked", [{}, {"batch_size": 23}, {"gpus": 3}, {"tokens_per_pass": 900}])
def test_where_we_chose_the_passes_each_rung_halves_their_tokens(asked: dict[str, Any]) -> None:
    lengths = [20] * 90 + [400] * 10
    runs = descend(asked, lengths=lengths)
    largest = [largest_pass(run, lengths) for run in runs]
    *halved, checkpointed = runs
    assert len(halved) >= 2
    # Each rung makes the largest pass smaller, down to the longest conversation, which has one of its own.
    assert all(after < before or after == 400 for before, after in pairwise(largest[:-1]))
    assert 2 <= largest.count(400) <= 3, "hardly a rung that changes nothing"
    assert halved[-1]["gradient_checkpointing"] is False
    assert (checkpointed["tokens_per_pass"], checkpointed["gradient_checkpointing"]) == (400, "unsloth")
    assert len({run["batch_size"] for run in runs}) == 1


def test_a_rung_of_tokens_says_so() -> None:
    rung = next_rung(TrainingSpec(), resolved(TrainingSpec(), lengths=[100] * 10))
    assert rung is not None
    assert rung.overrides == {"batch_size": 8, "tokens_per_pass": 400, "gradient_checkpointing": "auto"}
    assert "tokens_per_pass 400 instead of 800. The batch stays 8, so gradients are the same" in rung.message
    assert (rung.param, rung.advice[:46]) == (
        "training.tokens_per_pass",
        "set training.tokens_per_pass to 400 (it was 80",
    )


def test_what_is_checkpointed_already_is_not_checkpointed_again() -> None:
    runs = descend({"batch_size": 2, "gradient_checkpointing": "unsloth"}, GPU)
    assert steps(runs, "micro_batch_size", "gradient_checkpointing") == [(2, "unsloth"), (1, "unsloth")]
    assert len(descend({"batch_size": 4, "gradient_checkpointing": True})) == 3


def test_sequences_are_cut_only_where_the_client_allows_it_and_not_for_ever() -> None:
    asked = {"micro_batch_size": 1, "gradient_checkpointing": True, "max_seq_length": 700}
    assert len(descend(asked)) == 1
    runs = descend({**asked, "on_oom": "truncate"})
    assert [run["max_seq_length"] for run in runs] == [700, 350, 175, SHORTEST_SEQUENCE]
    assert {run["max_steps"] for run in runs} == {60}


def test_a_run_that_must_not_be_adapted_is_not() -> None:
    assert len(descend({"on_oom": "fail", "micro_batch_size": 8})) == 1


def test_a_model_that_does_not_load_has_no_rung() -> None:
    assert next_rung(TrainingSpec(), {}) is None


def test_a_rung_says_what_is_done_and_that_gradients_stay() -> None:
    training = TrainingSpec(micro_batch_size=4)
    rung = next_rung(training, resolved(training))
    assert rung is not None
    assert rung.overrides == {
        "batch_size": 8,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": "auto",
    }
    assert "Memory ran out" in rung.message
    assert "micro_batch_size 2 instead of 4" in rung.message
    assert "The batch stays 8, so gradients are the same" in rung.message


@pytest.mark.parametrize(
    ("asked", "param", "advice"),
    [
        ({"on_oom": "fail", "micro_batch_size": 8}, "training.micro_batch_size", "micro_batch_size to 4 (it was 8)"),
        (
            {"on_oom": "fail", "micro_batch_size": 1},
            "training.gradient_checkpointing",
            "gradient_checkpointing to true",
        ),
        (
            {"micro_batch_size": 1, "gradient_checkpointing": True},
            "training.max_seq_length",
            "max_seq_length to 1024 (it was 2048); longer conversations are then cut. training.on_oom: truncate",
        ),
        (
            {"micro_batch_size": 1, "gradient_checkpointing": True, "max_seq_length": 128, "on_oom": "truncate"},
            None,
            "no setting is left",
        ),
    ],
)
def test_a_failure_names_the_setting_that_would_fit(asked: dict[str, Any], param: str | None, advice: str) -> None:
    training = TrainingSpec(**asked)
    from shared.training_spec import Resolved

    found = resolved(training)
    assert next_rung(training, found) is None, "or the run would have gone on"
    failed = describe(MemoryError(), training, Resolved.model_validate(found))
    assert (failed.code, failed.param) == ("out_of_memory", param)
    assert advice in failed.message


def test_a_model_that_does_not_load_is_told_as_that() -> None:
    failed = describe(MemoryError(), TrainingSpec(), None)
    assert (failed.code, failed.param) == ("out_of_memory", None)
    assert "the model itself does not fit" in failed.message


class OutOfMemoryError(RuntimeError):
    """Named as PyTorch's."""


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("CUDA: tried to allocate 2.00 GiB"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_running_out_of_memory_is_recognised_wherever_it_happens_and_however_it_is_wrapped(error: Exception) -> None:
    assert is_out_of_memory(error)
    try:
        try:
            raise error
        except Exception as inner:
            raise ValueError("compiling failed") from inner
    except ValueError as wrapped:
        assert is_out_of_memory(wrapped)
    try:
        try:
            raise error
        except Exception:
            {}["missing"]
    except KeyError as during:
        assert is_out_of_memory(during)


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(KeyError("out of memory"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
