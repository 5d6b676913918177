"""What the suite trains, in the background, one after another, while everything else is tested.

All of it is created before the first test, so it is older than any job of a test and the one worker takes it first:

    finished   trained to its end, with a validation file and three checkpoints
    paused     paused while it runs, resumed, trained to its end
    broken     fails: every row is longer than the run allows
    cancelled  cancelled while it runs
    real       two steps of SmolLM2-135M-Instruct
    held       runs until the suite is over: its trainer stands still, and costs nothing

So a job that a test creates stays queued for as long as the suite lasts. What follows the pause must end by itself: the
resumed job waits for it.
"""

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import psutil
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from tests.integration.test_up import Up
from tests.sdk.data import SHORT, SMOLLM2, TINY, chat_rows, jsonl

LIMIT_S = 600
ENDED = ("succeeded", "failed", "cancelled")
EPOCHS = 2
TRAIN_ROWS, VALIDATION_ROWS = 6, 4
FINISHED_STEPS = TRAIN_ROWS * EPOCHS // SHORT["batch_size"]
PAUSED_STEPS = 400


@dataclass
class Pause:
    """A job's way through a pause; each as the service answered."""

    asked: FineTuningJob
    """To the pause."""
    asked_again: FineTuningJob
    paused: FineTuningJob
    asked_when_paused: FineTuningJob
    resumed: FineTuningJob
    """To the resume."""
    step: int
    """At which it stood."""
    ended: FineTuningJob


@dataclass
class Cancellation:
    running: FineTuningJob
    asked: FineTuningJob
    ended: FineTuningJob


@dataclass
class Runs:
    """Ids at once, outcomes as they come: `runs.finished.result()`."""

    client: OpenAI
    service: Up
    training_file: str = ""
    validation_file: str = ""
    ids: dict[str, str] = field(default_factory=dict)
    finished: "Future[FineTuningJob]" = field(default_factory=Future)
    seen_running: "Future[list[FineTuningJob]]" = field(default_factory=Future)
    paused: "Future[Pause]" = field(default_factory=Future)
    real: "Future[FineTuningJob]" = field(default_factory=Future)
    broken: "Future[FineTuningJob]" = field(default_factory=Future)
    cancelled: "Future[Cancellation]" = field(default_factory=Future)
    held: "Future[FineTuningJob]" = field(default_factory=Future)
    _trainer: psutil.Process | None = None
    _stopping: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Create every job, then see them through in a thread."""
        self.training_file = self._upload(chat_rows(TRAIN_ROWS))
        self.validation_file = self._upload(chat_rows(VALIDATION_ROWS, seed=1))
        long_row = {"messages": [{"role": "user", "content": "hello " * 500}, {"role": "assistant", "content": "hi"}]}
        self._create(
            "finished",
            TINY,
            {"save_steps": 2, "eval_steps": 2},
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": EPOCHS}}},
            validation_file=self.validation_file,
            suffix="done",
            seed=42,
            metadata={"suite": "finished"},
        )
        self._create("paused", TINY, {"max_steps": PAUSED_STEPS, "save_steps": 1000, "logging_steps": 5})
        self._create("broken", TINY, {"max_steps": 2}, training_file=self._upload([long_row] * 4))
        self._create("cancelled", TINY, {"max_steps": 10**6, "save_steps": 10**6, "logging_steps": 5})
        self._create("real", SMOLLM2, {"max_steps": 2}, suffix="real")
        self._create("held", TINY, {"max_steps": 10**6, "save_steps": 10**6, "logging_steps": 5})
        threading.Thread(target=self._see_through, daemon=True).start()

    def end(self) -> None:
        """Let the trainer that stands still go on, so that it can obey the order to stop."""
        self._stopping.set()
        if self._trainer is not None:
            self._trainer.resume()

    def _upload(self, rows: list[Any]) -> str:
        return self.client.files.create(file=("rows.jsonl", jsonl(rows)), purpose="fine-tune").id

    def _create(self, name: str, model: str, training: dict[str, Any], **choices: Any) -> None:
        choices.setdefault("training_file", self.training_file)
        job = self.client.fine_tuning.jobs.create(model=model, extra_body={"training": SHORT | training}, **choices)
        self.ids[name] = job.id

    def _see_through(self) -> None:
        """In the order in which the worker takes them; what fails is told to whoever waits for it."""
        scenes: list[tuple[Future[Any], Callable[[], Any]]] = [
            (self.seen_running, self._watch_the_first),
            (self.finished, lambda: self._wait("finished", is_ended)),
            (self.paused, self._pause_and_resume),
            (self.broken, lambda: self._wait("broken", is_ended)),
            (self.cancelled, self._cancel_while_it_runs),
            (self.real, lambda: self._wait("real", is_ended)),
            (self.held, self._hold),
        ]
        for future, scene in scenes:
            try:
                future.set_result(scene())
            except BaseException as error:
                future.set_exception(error)

    def _watch_the_first(self) -> list[FineTuningJob]:
        """Every state in which the first run was seen, until it has ended."""
        seen: list[FineTuningJob] = []
        while not seen or not is_ended(seen[-1]):
            seen.append(self.client.fine_tuning.jobs.retrieve(self.ids["finished"]))
            time.sleep(0.1)
        return seen

    def _pause_and_resume(self) -> Pause:
        jobs, job_id = self.client.fine_tuning.jobs, self.ids["paused"]
        self._wait("paused", lambda job: step_of(job) >= 5)
        asked, asked_again = jobs.pause(job_id), jobs.pause(job_id)
        paused = self._wait("paused", lambda job: job.status == "paused" or is_ended(job))
        asked_when_paused = jobs.pause(job_id)
        resumed = jobs.resume(job_id)
        ended = self._wait("paused", is_ended)
        return Pause(asked, asked_again, paused, asked_when_paused, resumed, step_of(paused), ended)

    def _cancel_while_it_runs(self) -> Cancellation:
        running = self._wait("cancelled", lambda job: step_of(job) >= 5)
        asked = self.client.fine_tuning.jobs.cancel(self.ids["cancelled"])
        return Cancellation(running, asked, self._wait("cancelled", is_ended))

    def _hold(self) -> FineTuningJob:
        held = self._wait("held", lambda job: step_of(job) >= 5)
        trainer = self.service.find("worker.training")
        assert trainer is not None
        trainer.send_signal(signal.SIGSTOP)
        self._trainer = trainer
        return held

    def _wait(self, name: str, condition: Callable[[FineTuningJob], bool]) -> FineTuningJob:
        deadline = time.monotonic() + LIMIT_S
        while True:
            job = self.client.fine_tuning.jobs.retrieve(self.ids[name])
            if condition(job):
                return job
            assert not is_ended(job), f"{name} has {job.status}: {job.error}"
            assert not self._stopping.is_set(), "the suite is over"
            assert time.monotonic() < deadline, f"{name} is still {job.status}"
            time.sleep(0.1)


def is_ended(job: FineTuningJob) -> bool:
    return job.status in ENDED


def step_of(job: FineTuningJob) -> int:
    """How far a job is; 0 before its first step."""
    return ours(job).get("current_step") or 0


def ours(thing: Any) -> dict[str, Any]:
    """What an answer holds beyond OpenAI's fields."""
    extra: dict[str, Any] = (thing.model_extra or {}).get("anneal") or {}
    return extra
