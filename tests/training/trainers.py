"""Ways to run the trainer: in a process of its own, as its supervisor does, or in ours, which saves the imports."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from shared.trainer_protocol import Message, parse
from shared.training_spec import TrainerSpec
from worker.training.loop import Run
from worker.training.reporter import Reporter
from worker.training.stopping import StopRequests


@dataclass
class Outcome:
    """What a trainer said and how it ended."""

    messages: list[Message]
    status: int
    stderr: str = ""

    def of(self, kind: str) -> list[Any]:
        return [message for message in self.messages if message.type == kind]

    @property
    def last(self) -> Any:
        return self.messages[-1]


class TrainerProcess:
    """`python -m worker.training` with its protocol on a pipe of its own."""

    def __init__(self, spec: TrainerSpec, folder: Path) -> None:
        reading, writing = os.pipe()
        self._stderr = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "worker.training"],
            stdin=subprocess.PIPE,
            stdout=self._stderr,
            stderr=self._stderr,
            pass_fds=[writing],
            env={**os.environ, "ANNEAL_PROTOCOL_FD": str(writing), "ANNEAL_SUPERVISED_BY": str(os.getpid())},
        )
        os.close(writing)
        self._pipe = os.fdopen(reading, "rb")
        assert self.process.stdin is not None
        self.process.stdin.write(spec.model_dump_json().encode() + b"\n")
        self.process.stdin.flush()
        if spec.leash_s is None:
            self.process.stdin.close()
        self.messages: list[Message] = []

    def read_until(self, wanted: Callable[[Message], bool]) -> Message:
        for line in self._pipe:
            self.messages.append(parse(line))
            if wanted(self.messages[-1]):
                return self.messages[-1]
        raise AssertionError(f"the trainer ended first: {self.messages[-3:]}\n{self.stderr()[-3000:]}")

    def finish(self) -> Outcome:
        self.messages += [parse(line) for line in self._pipe]
        return Outcome(self.messages, self.process.wait(60), self.stderr())

    def stderr(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()


def run_process(spec: TrainerSpec, folder: Path) -> Outcome:
    return TrainerProcess(spec, folder).finish()


class Killed(BaseException):
    """Ends a run in this process where SIGKILL would end it: no handler of the trainer's catches it."""


class MortalReporter(Reporter):
    """Says what it is told, until it is told `last_word`: then it says that, or just fails to, and the run is dead."""

    def __init__(self, descriptor: int, last_word: Callable[[Message], bool], *, said: bool) -> None:
        super().__init__(descriptor)
        self._last_word = last_word
        self._said = said

    def send(self, message: Message) -> None:
        dies = self._last_word(message)
        if self._said or not dies:
            super().send(message)
        if dies:
            raise Killed


def run_here(
    spec: TrainerSpec,
    *,
    last_word: Callable[[Message], bool] | None = None,
    said: bool = True,
    stops: Callable[[StopRequests, Message], None] = lambda _stops, _message: None,
) -> Outcome:
    """One attempt in this process.

    Args:
        last_word: the message at which the trainer dies.
        said: whether it is heard before.
        stops: called with each message that is sent; may ask for a stop, as a signal would.
    """
    Path(spec.work_dir).mkdir(parents=True, exist_ok=True)
    said_file = Path(spec.work_dir) / "said.jsonl"
    before = Path.cwd()
    status = -9
    with said_file.open("wb") as stream:
        reporter = MortalReporter(stream.fileno(), last_word or (lambda _: False), said=said)
        requests = StopRequests(reporter)
        send = reporter.send

        def send_and_stop(message: Message) -> None:
            send(message)
            stops(requests, message)

        reporter.send = send_and_stop  # type: ignore[method-assign]
        try:
            status = Run(spec, reporter, requests).attempt()
        except Killed:
            pass
        finally:
            os.chdir(before)  # the trainer moves to its work_dir
    return Outcome([parse(line) for line in said_file.read_bytes().splitlines()], status)


# What several processes are compared by.

STEPS = 7
TRAINING: dict[str, Any] = {"max_steps": STEPS, "precision": "fp32", "learning_rate": 1e-3, "save_steps": 3}
"""Five steps an epoch; a batch of 8 to be shared."""


def start(
    processes: list[psutil.Process], spec: TrainerSpec, folder: Path, until: Callable[[Any], bool]
) -> TrainerProcess:
    """A trainer that has said so much, and the processes that it consists of."""
    trainer = TrainerProcess(spec, folder)
    leader = psutil.Process(trainer.process.pid)
    processes.append(leader)
    trainer.read_until(until)
    processes += leader.children(recursive=True)
    return trainer


def at_step(step: int) -> Callable[[Any], bool]:
    return lambda message: message.type == "metrics" and message.step == step


def assert_same(found: list[Any], expected: list[Any]) -> None:
    """Metrics of the same steps."""
    for one, other in zip(found, expected, strict=True):
        assert (one.step, one.tokens, one.learning_rate) == (other.step, other.tokens, other.learning_rate)
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert one.mean_token_accuracy == pytest.approx(other.mean_token_accuracy, abs=0.02)


def weights(outcome: Outcome, number: int = -1) -> dict[str, torch.Tensor]:
    return load_file(Path(outcome.of("checkpoint")[number].path) / "model.safetensors")


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=2e-4), name
