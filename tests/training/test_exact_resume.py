"""A run that died ends bit-equal to one that did not. `benchmarks/exact_resume.py` does the same at every point."""

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# isort: off
from worker.training import engine  # imports unsloth, which must come first
# isort: on

from shared.trainer_protocol import Message
from shared.training_spec import TrainerSpec
from tests.training import exact_resume as exact
from tests.training.exact_resume import CASES, Case, Job, Parts
from tests.training.trainers import run_here, run_process
from worker.training import data, data_plan, memory
from worker.training.stopping import StopRequests

pytestmark = pytest.mark.slow

FP32, PACKED_BF16 = Case("fp32", "unpacked"), Case("bf16", "packed")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Parts:
    return Parts.make(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def reference(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    @functools.cache
    def run(case: Case, **choices: Any) -> dict[str, Any]:
        return exact.undisturbed(parts, case, tmp_path_factory.mktemp("reference"), run_here, **choices)

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_that_dies_again_and_again_ends_as_if_it_had_not(
    case: Case, parts: Parts, reference: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Each attempt lives a little longer than the one before; in two cases just one step longer."""
    every = case in (FP32, PACKED_BF16)
    job = Job(parts, case.training(), tmp_path)
    for step in range(1, case.steps + 1) if every else (3, 6, 9):
        assert job.attempt(functools.partial(run_here, last_word=exact.at_metrics(step))).status == -9
    assert job.attempt(run_here).status == 0
    assert job.first_steps == ([1, 1, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11] if every else [1, 3, 5, 9])
    assert job.result() == reference(case)


@pytest.mark.parametrize("case", [FP32, PACKED_BF16], ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("death", "resumes_at"),
    [
        ({"last_word": exact.at_evaluation(10)}, 9),
        ({"last_word": exact.at_checkpoint(10)}, 11),
        ({"last_word": exact.at_checkpoint(10), "said": False}, 9),
    ],
    ids=["between evaluation and save", "right after the save", "after a save nobody heard of"],
)
def test_a_run_that_dies_around_a_save_at_an_epochs_end_is_exact(
    case: Case,
    death: dict[str, Any],
    resumes_at: int,
    parts: Parts,
    reference: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    job = Job(parts, case.training(), tmp_path)
    assert job.attempt(functools.partial(run_here, **death)).status == -9
    assert job.attempt(run_here).status == 0
    assert job.first_steps == [1, resumes_at]
    assert job.result() == reference(case)


@pytest.mark.parametrize("step", [5, 6, 10], ids=["where nothing is due", "while evaluating", "at an epoch's end"])
def test_a_deploy_is_exact_and_skips_no_evaluation(
    step: int, parts: Parts, reference: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The stop arrives when the step is done: an evaluation due now is abandoned, saved without and made up for."""

    def stop(requests: StopRequests, message: Message) -> None:
        if exact.at_metrics(step)(message):
            requests.interrupted = True

    job = Job(parts, FP32.training(), tmp_path)
    outcome = job.attempt(functools.partial(run_here, stops=stop))
    assert outcome.last.type == "stopped"
    assert step not in job.evaluations
    assert job.attempt(run_here).status == 0
    assert job.result() == reference(FP32)


@pytest.mark.parametrize("rows", ["unpacked", "packed"])
def test_a_later_version_that_orders_differently_ends_the_epoch_as_it_was_begun(
    rows: str, parts: Parts, reference: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("fp32", rows)
    job = Job(parts, case.training(), tmp_path)
    job.attempt(functools.partial(run_here, last_word=exact.at_metrics(7)))
    plan = data_plan.DataPlan.model_validate_json((Path(job.newest.path) / data_plan.FILE).read_text())  # type: ignore[union-attr]
    assert (plan.packed is not None) == (rows == "packed")
    as_it_was = data.plan_rows
    monkeypatch.setattr(data, "plan_rows", lambda *arguments: as_it_was(*arguments)[::-1])
    monkeypatch.setattr(engine, "order_of_epoch", lambda lengths, shuffled, batch: iter(sorted(shuffled)))
    assert job.attempt(run_here).status == 0
    assert job.first_steps == [1, 7]
    wanted, ends = reference(case)["metrics"], 2 * job.epoch_steps
    assert {step: job.metrics[step] for step in range(1, ends + 1)} == {
        step: wanted[step] for step in range(1, ends + 1)
    }
    assert job.metrics[ends + 1] != wanted[ends + 1], "from the next epoch on it is the later version's own"


def test_a_run_that_is_resumed_with_less_memory_free_is_exact(
    parts: Parts, reference: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun now, it would have passes of one conversation, with gradient checkpointing."""
    expected = reference(FP32)  # before there is less
    job = Job(parts, FP32.training(), tmp_path)
    job.attempt(functools.partial(run_here, last_word=exact.at_metrics(5)))
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    assert job.attempt(run_here).status == 0
    assert job.first_steps == [1, 5]
    assert job.result() == expected


def test_a_resumed_attempt_says_nothing_a_second_time(parts: Parts, tmp_path: Path) -> None:
    training = FP32.training(max_seq_length=100, max_steps=4)
    job = Job(parts, training, tmp_path)
    job.attempt(functools.partial(run_here, last_word=exact.at_metrics(3)))
    job.attempt(run_here)
    assert job.first_steps == [1, 3]
    assert len(job.warnings[0]) == 2, "training and validation rows were cut"
    assert job.warnings[1] == []


def test_losses_that_are_told_every_few_steps_are_exact_too(
    parts: Parts, reference: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The loss told at step 5 is the mean of five, of which two were computed by an attempt that is dead."""
    job = Job(parts, FP32.training(logging_steps=5), tmp_path)
    job.attempt(functools.partial(run_here, last_word=exact.at_evaluation(4)))
    job.attempt(run_here)
    assert job.first_steps == [1, 3]
    assert list(job.metrics) == [5, 10, 11]
    assert job.result() == reference(FP32, logging_steps=5)


def test_a_resume_with_smaller_micro_batches_goes_on_with_the_same_conversations(
    parts: Parts, reference: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """What a rung of the memory ladder does in mid-epoch: 2 x 4 becomes 1 x 8."""
    job = Job(parts, FP32.training(), tmp_path)
    job.attempt(functools.partial(run_here, last_word=exact.at_metrics(7)))
    before = dict(job.metrics)
    job.metrics.pop(7)
    rung = {"batch_size": 8, "micro_batch_size": 1, "gradient_accumulation_steps": 8}
    assert job.attempt(run_here, **rung).status == 0
    assert job.first_steps == [1, 7]
    expected, found = reference(FP32), job.result()
    assert found["tokens"] == expected["tokens"]
    assert {step: found["metrics"][step] for step in range(1, 7)} == {step: before[step] for step in range(1, 7)}
    for step in range(7, FP32.steps + 1):
        (loss, norm, rate, tokens, accuracy, epoch), wanted = found["metrics"][step], expected["metrics"][step]
        assert (rate, tokens, epoch) == (wanted[2], wanted[3], wanted[5]), "the very same step"
        assert (loss, norm) == pytest.approx(wanted[:2], rel=1e-5)
        assert accuracy == pytest.approx(wanted[4], abs=0.01)


def test_a_killed_process_is_taken_up_by_another_exactly(
    parts: Parts, reference: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    job = Job(parts, PACKED_BF16.training(), tmp_path)
    assert job.attempt(functools.partial(exact.killed_process, exact.at_metrics(7), tmp_path)).status == -signal.SIGKILL
    assert job.attempt(lambda spec: run_process(spec, tmp_path)).status == 0
    assert job.first_steps in ([1, 7], [1, 9]), "it may have gone on for a moment before the signal came"
    assert job.result() == reference(PACKED_BF16)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_code_in_it_is_not_run(name: str, parts: Parts, tmp_path: Path) -> None:
    """Who can write checkpoints must not be able to run code in the trainer that resumes from one."""
    import pickle

    import torch

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    job = Job(parts, FP32.training(max_steps=5), tmp_path / "job")
    job.attempt(functools.partial(run_here, last_word=exact.at_metrics(3)))
    assert job.newest is not None
    folder = Path(job.newest.path)
    torch.save({"state": Code()}, folder / name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / name, weights_only=True)
    spec = TrainerSpec(
        job_id="ftjob-test",
        base_model="test/tiny",
        base_model_dir=str(parts.base),
        training_file=str(parts.training_file),
        checkpoint_dir=str(tmp_path / "checkpoints"),
        work_dir=str(tmp_path / "work"),
        resume_from=str(folder),
        training=FP32.training(max_steps=5),
    )
    outcome = run_here(spec)
    assert (outcome.status, outcome.last.code) == (1, "trainer_error")
    assert not (tmp_path / "executed").exists()
