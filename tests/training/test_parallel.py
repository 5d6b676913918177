"""Several processes train as one: the same numbers, the same checkpoints, one end for all. On CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from shared.trainer_protocol import parse
from shared.training_spec import TrainingSpec
from tests.training.conftest import MakeSpec
from tests.training.test_engine import Owner, build
from tests.training.trainers import (
    STEPS,
    TRAINING,
    Outcome,
    assert_close,
    assert_same,
    at_step,
    run_here,
    start,
    weights,
)
from worker.training import data, loop, parallel, passes
from worker.training.checkpoint import verify
from worker.training.environment import GPUS_IN_SIGHT, gpus_of, trainer_environment
from worker.training.failures import UnsupportedSetting
from worker.training.loop import Run
from worker.training.ranks import Peers, Place
from worker.training.reporter import Reporter
from worker.training.stopping import StopRequests

pytestmark = pytest.mark.slow


def test_two_processes_do_what_one_does_and_any_number_goes_on(
    make_spec: MakeSpec, validation_file: Path, alone: Outcome, processes: list[psutil.Process], tmp_path: Path
) -> None:
    """Interrupted in the fourth step or the fifth, taken up by one process."""
    common = {"validation_file": str(validation_file)}
    spec = make_spec(tmp_path / "two", training={**TRAINING, "gpus": 2}, **common)
    (tmp_path / "two").mkdir()
    trainer = start(processes, spec, tmp_path / "two", lambda message: message.type == "checkpoint")
    assert len(processes) == 2
    trainer.process.send_signal(signal.SIGTERM)
    two = trainer.finish()
    assert (two.status, two.last.type, two.last.reason) == (0, "stopped", "interrupted"), two.stderr[-3000:]
    done = two.last.step
    assert 3 <= done < STEPS
    assert_same(two.of("metrics"), alone.of("metrics")[:done])
    assert [one.resolved["gpus"] for one in two.of("started")] == [2]
    assert len(two.of("started")) == 1, "one speaks for both"
    assert two.of("evaluation")[0].eval_loss == pytest.approx(alone.of("evaluation")[0].eval_loss, abs=1e-5)
    assert two.of("evaluation")[0].eval_tokens == alone.of("evaluation")[0].eval_tokens
    assert_close(weights(two, 0), weights(alone, 0))

    newest = Path(two.of("checkpoint")[-1].path)
    assert verify(newest).files.keys() == verify(Path(alone.of("checkpoint")[0].path)).files.keys()
    one = run_here(make_spec(tmp_path / "one", training=TRAINING, resume_from=str(newest), **common))
    assert one.status == 0, one.last
    assert one.of("started")[0].first_step == done + 1
    assert_same(one.of("metrics"), alone.of("metrics")[done:])
    assert_close(weights(one), weights(alone))


def test_torchruns_processes_go_on_from_a_checkpoint_of_one(
    make_spec: MakeSpec, alone: Outcome, tmp_path: Path
) -> None:
    spec = make_spec(
        tmp_path, training={**TRAINING, "gpus": 3}, resume_from=alone.of("checkpoint")[1].path, leash_s=None
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "3",
            "-m",
            "worker.training",
        ],
        input=spec.model_dump_json() + "\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = Outcome([parse(line) for line in done.stdout.splitlines()], 0, done.stderr)
    assert outcome.last.type == "done"
    assert_same(outcome.of("metrics"), alone.of("metrics")[6:])
    assert_close(weights(outcome), weights(alone))


LONG = {**TRAINING, "max_steps": 5000, "save_steps": 5000, "gpus": 2}


@pytest.mark.parametrize(
    "training", [LONG, {**LONG, "sharding": "on", "micro_batch_size": 1}], ids=["equal ranks", "shards"]
)
def test_a_killed_peer_ends_the_run_and_says_so(
    training: dict[str, Any], make_spec: MakeSpec, processes: list[psutil.Process], tmp_path: Path
) -> None:
    trainer = start(processes, make_spec(tmp_path, training=training), tmp_path, at_step(2))
    began = time.monotonic()
    processes[1].send_signal(signal.SIGKILL)
    outcome = trainer.finish()
    assert time.monotonic() - began < 60, "it is not the hours that NCCL or gloo would wait"
    assert outcome.status == -signal.SIGKILL, "as the peer died, so that lack of memory is told apart"
    assert outcome.last.type == "metrics"
    assert "rank 1 of 2 was killed by SIGKILL" in outcome.stderr


@pytest.mark.parametrize(
    ("order", "reason"), [(signal.SIGUSR1, "cancelled"), (signal.SIGKILL, None)], ids=["cancel", "death of the first"]
)
def test_one_end_for_all(
    order: signal.Signals, reason: str | None, make_spec: MakeSpec, processes: list[psutil.Process], tmp_path: Path
) -> None:
    trainer = start(processes, make_spec(tmp_path, training=LONG), tmp_path, at_step(2))
    trainer.process.send_signal(order)
    outcome = trainer.finish()
    if reason is None:
        assert outcome.status == -order
    else:
        assert (outcome.status, outcome.last.type, outcome.last.reason) == (0, "stopped", reason)
    assert not outcome.of("checkpoint")


FAULTS = {
    "out of memory": (
        "from worker.training import step\n"
        "def full(self, *a, **k): raise MemoryError('no room')\n"
        "step.Stepper.step = full\n",
        "out_of_memory",
        "training.tokens_per_pass",
    ),
    "weights differ": (
        "from worker.training import model\n"
        "import torch\n"
        "whole = model.not_finite\n"
        "def bent(bare):\n"
        "    with torch.no_grad(): next(bare.parameters())[0, 0] += 1e-3\n"
        "    return whole(bare)\n"
        "model.not_finite = bent\n",
        "trainer_error",
        "no longer the same",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_with_a_peer_is_the_runs_failure(
    fault: str,
    make_spec: MakeSpec,
    processes: list[psutil.Process],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, expected, words = FAULTS[fault]
    # Read by every interpreter at its start; what it bends is imported late, and by the peer alone.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import worker.training.ranks as ranks\n"
        "    told_spec = ranks.Place.told_spec\n"
        "    def bend(place):\n"
        "        from worker.training import engine\n"
        f"        exec({code!r}, {{}})\n"
        "        return told_spec(place)\n"
        "    ranks.Place.told_spec = bend\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    spec = make_spec(tmp_path, training={**TRAINING, "gpus": 2, "save_steps": 1})
    trainer = start(processes, spec, tmp_path, lambda message: message.type == "started")
    outcome = trainer.finish()
    assert (outcome.status, outcome.last.type, outcome.last.code) == (1, "error", expected), outcome.stderr[-3000:]
    assert words in outcome.last.message
    assert len(outcome.of("error")) == 1
    assert not outcome.of("checkpoint")


def test_more_gpus_than_there_are_is_refused(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.training import ranks

    monkeypatch.setattr(ranks, "count_gpus", lambda: 8)
    monkeypatch.setenv(GPUS_IN_SIGHT, "2,3")
    outcome = run_here(make_spec(tmp_path, training={"gpus": 4}))
    assert (outcome.status, outcome.last.code, outcome.last.param) == (1, "unsupported_setting", "training.gpus")
    assert "training.gpus is 4, and this worker sees 2 GPUs" in outcome.last.message


@pytest.mark.parametrize(
    ("in_sight", "count", "expected"),
    [
        ("all", 2, ["0", "1"]),
        ("3,1", 4, ["3", "1"]),
        ("0,7,1", 4, ["0"]),
        ("", 4, []),
        ("-1", 4, []),
        ("GPU-5a,GPU-6b", 2, ["GPU-5a", "GPU-6b"]),
        ("0", 0, []),
    ],
)
def test_a_job_may_have_the_gpus_that_its_worker_sees(in_sight: str, count: int, expected: list[str]) -> None:
    assert gpus_of(in_sight, count) == expected


def test_a_trainer_is_born_with_one_gpu_in_sight() -> None:
    for visible, one in (({"CUDA_VISIBLE_DEVICES": "2,3"}, "2"), ({}, "0"), ({"CUDA_VISIBLE_DEVICES": ""}, "")):
        born = trainer_environment(visible)
        assert born["CUDA_VISIBLE_DEVICES"] == one
        peer = {**born, "CUDA_VISIBLE_DEVICES": "3"}
        assert trainer_environment(peer) == peer, "what rank 0 chose for its peer stays"


class Echo:
    """Stands in for a group of ranks of which the others have the same numbers."""

    def allreduce(self, tensors: list[torch.Tensor]) -> Any:
        tensors[0].mul_(2)
        return self

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [2**26, 5])
def test_gradients_are_summed_in_place_whatever_their_shapes(
    dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "BUCKET_NUMBERS", most)
    group = parallel.Together.__new__(parallel.Together)
    group._gpus, group._device = Echo(), torch.device("cpu")
    gradients = [torch.arange(6.0).view(2, 3).t(), torch.ones(4), torch.ones(3, 1)]
    gradients = [gradient.to(dtype) for gradient in gradients]
    expected = [2 * gradient for gradient in gradients]
    loss, correct = group.add_up(gradients, torch.tensor(1.5), torch.tensor(3))
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))
    assert (loss.item(), correct.item(), correct.dtype) == (3.0, 6, torch.int64)


def test_a_rank_without_conversations_has_gradients_of_zero(make_spec: MakeSpec, tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    from worker.training.step import Stepper

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    stepper = Stepper(model, torch.float32, recompute=False, most=8)
    sums = stepper.step([], 10, lambda: False)
    assert (float(sums.loss), int(sums.correct)) == (0, 0)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_a_micro_batch_is_no_larger_than_a_share() -> None:
    assert TrainingSpec(batch_size=8, gpus=2).resolved_batch() == (8, 4, 2)
    assert TrainingSpec(batch_size=8, gpus=16).resolved_batch() == (8, 1, 8)
    assert TrainingSpec(batch_size=8, micro_batch_size=8, gpus=2).resolved_batch() == (8, 8, 1)


class Half(parallel.Alone):
    """One of two ranks whose sums are made by the test."""

    world = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def share(self, rows: Any) -> list[Any]:
        return passes.share(rows, self.rank, 2)


@pytest.mark.parametrize("own", [True, False], ids=["own passes", "unsloth's"])
@pytest.mark.parametrize("rows_of_step", [8, 1], ids=["a step", "a row for one of two"])
def test_shares_gradients_add_up_to_the_steps(
    own: bool, rows_of_step: int, make_spec: MakeSpec, rows: list[data.Example], tmp_path: Path
) -> None:
    trainer, _ = build(make_spec, tmp_path, rows)
    if not own:
        trainer.stepper = None
    found = []
    for group in (parallel.Alone(), Half(0), Half(1)):
        trainer.group = group
        trainer.model.zero_grad()
        trainer.owner = Owner()
        loss = trainer.training_step(trainer.model, rows[:rows_of_step])
        found.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()} | {"loss": loss})
    for name, whole in found[0].items():
        assert torch.allclose(whole, found[1][name] + found[2][name], atol=1e-5), name


def test_a_peer_that_says_no_message_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else would: who does not understand one peer watches none any more."""

    class Peer:
        def wait(self) -> int:
            return 0

    (reader, writer), (told, telling) = os.pipe(), os.pipe()
    peers, ended = Peers(Reporter(telling)), []
    monkeypatch.setattr(peers, "_end", lambda why, status: ended.append((why, status)))
    peers._processes[1], peers._pipes[1] = Peer(), reader  # type: ignore[assignment]
    os.write(writer, b"Segmentation fault\n")
    os.close(writer)
    peers._watch()
    failed = parse(os.read(told, 2**16))
    assert (failed.type, failed.code) == ("error", "trainer_error")
    assert "rank 1 said what is no message" in failed.message
    assert "Segmentation fault" in failed.message
    assert [status for _, status in ended] == [1]
    for descriptor in (reader, told, telling):
        os.close(descriptor)


def test_a_last_word_that_nobody_reads_ends_the_run_too() -> None:
    peers = Peers(Reporter(2))
    peers.settle()
    peers.settle()


@pytest.mark.parametrize(
    ("error", "place", "waits"),
    [
        (RuntimeError("Connection closed by peer"), Place(0, 2, {}), True),
        (UnsupportedSetting("no"), Place(0, 2, {}), False),
        (MemoryError(), Place(0, 2, {}), False),
        (RuntimeError("Connection closed by peer"), None, False),
    ],
)
def test_a_rank_that_lost_another_one_lets_the_reason_be_told(
    error: Exception,
    place: Place | None,
    waits: bool,
    make_spec: MakeSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_run: Run) -> None:
        raise error

    slept: list[float] = []
    monkeypatch.setattr(Run, "_run", fail)
    monkeypatch.setattr(loop.time, "sleep", slept.append)
    with (tmp_path / "said").open("wb") as stream:
        reporter = Reporter(stream.fileno())
        assert Run(make_spec(tmp_path), reporter, StopRequests(reporter), place=place).attempt() == 1
    assert bool(slept) == waits
