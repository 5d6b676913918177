"""A job's metrics for Weights & Biases, where the job asks for it and the operator has a key.

    supervisor ──queue, bounded──▶ thread ──pipe──▶ `worker.wandb_report` ──▶ Weights & Biases, or files (offline)

A run is neither delayed nor failed by any of this: a full queue drops, a process that hangs is killed, one that dies
is told in an event. A claim after the first sends what earlier ones recorded again, so that nothing is missing but
what the last one dropped; the id of the run is the job's, and Weights & Biases takes it up.

With WANDB_MODE=offline the files are in `run_dir/jobs/<job>/wandb`, one folder a claim, the newest whole, and kept as
long as the job's logs (`worker.run_folder`); `wandb sync FOLDER` sends them later.
"""

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from shared.db import reading
from shared.models import Job, Metric
from shared.results import COLUMNS
from shared.trainer_protocol import Evaluation, Event, Message, Metrics, Started
from worker import lifecycle

log = logging.getLogger(__name__)

MOST_WAITING = 10_000
"""Messages held for a process that is slow; later ones are dropped."""
END_LIMIT_S = 120.0
"""How long the process may take to send what is left; it holds nobody up."""
SHUTDOWN_LIMIT_S = 5.0
"""How long a worker that stops waits for it."""
NAMES = {
    **{ours: openai for openai, ours in COLUMNS.items()},
    **{name: name for name in ("epoch", "learning_rate", "grad_norm", "tokens", "tokens_per_second")},
    **{name: name for name in ("samples_per_second", "peak_memory_bytes")},
}
"""What is sent of a step, and how it is called there: as in the result file where that has it."""
SECRETS = ("ANNEAL_", "AWS_", "HF_", "HUGGING_FACE_")


class WandbFeed:
    """Of one claim. Does nothing for a job without the integration.

    Args:
        folder: of the job on this host.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self._job = job
        self._folder = folder
        self._choices = next((each["wandb"] for each in job.integrations or () if each["type"] == "wandb"), None)
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_WAITING)
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._limit: threading.Timer | None = None
        """From the end of the job on."""
        self._dropped = 0
        self._troubles: queue.SimpleQueue[Event] = queue.SimpleQueue()
        if self._choices is not None and (reason := _missing(os.environ)) is not None:
            self._choices = None
            self._troubles.put(_warning(f"The metrics of this job are not sent to Weights & Biases: {reason}"))

    def take(self, message: Message) -> None:
        """Pass on what the trainer says. Call it from the main thread: the process dies with the one that starts it."""
        if self._choices is None:
            return
        match message:
            case Started():
                self._start(message, self._choices)
            case Metrics() | Evaluation():
                values = message.model_dump(exclude={"type", "step"}, exclude_none=True)
                self._put({"step": message.step, "values": _named(values)})

    def end(self, exit_code: int, **summary: Any) -> None:
        """The job has ended; 0 if well."""
        self._put({"exit_code": exit_code, "summary": summary})

    def troubles(self) -> Iterator[Event]:
        """What the job's owner should read about, each once."""
        with suppress(queue.Empty):
            while True:
                yield self._troubles.get_nowait()

    def close(self) -> None:
        """Nothing more comes. What waits is still sent, while the worker goes on with other jobs."""
        if self._process is not None and self._thread is not None and self._thread.is_alive():
            # Here and not after the last line: a process that reads no more lets the thread write for ever.
            self._limit = threading.Timer(END_LIMIT_S, self._process.kill)
            self._limit.daemon = True
            self._limit.start()
        self._put(None)
        if self._thread is not None and lifecycle.shutdown.is_set():
            self._thread.join(SHUTDOWN_LIMIT_S)

    def _put(self, message: dict[str, Any] | None) -> None:
        if self._process is None:
            return
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self._dropped += 1
            if message is None:
                self._process.kill()  # it takes nothing; the thread wakes up on a broken pipe

    def _start(self, started: Started, choices: dict[str, Any]) -> None:
        if self._process is not None:
            return
        first = _first_line(self._job, started, choices)
        try:
            with (self._folder / "wandb.log").open("ab") as output:
                self._process = subprocess.Popen(
                    (sys.executable, "-m", "worker.wandb_report"),
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=_environment(os.environ, self._folder),
                    start_new_session=True,  # a Ctrl-C at the terminal is for the worker
                )
        except OSError as error:
            self._troubles.put(_warning(f"Weights & Biases: its process could not be started ({error.strerror})"))
            return
        arguments = (self._process, first, started.first_step)
        self._thread = threading.Thread(target=self._feed, args=arguments, name=f"wandb-{self._job.id}", daemon=True)
        self._thread.start()

    def _feed(self, process: "subprocess.Popen[bytes]", first: dict[str, Any], first_step: int) -> None:
        assert process.stdin is not None
        with suppress(OSError), process.stdin as stream:  # it died: its exit status is told below
            for message in (first, *self._recorded_before(first_step)):
                stream.write(json.dumps(message).encode() + b"\n")
            stream.flush()
            while (following := self._queue.get()) is not None:
                stream.write(json.dumps(following).encode() + b"\n")
                stream.flush()
        status = process.wait()
        if self._limit is not None:
            self._limit.cancel()
        if status or self._dropped:
            log.warning("wandb process of %s: status %d, %d messages dropped", self._job.id, status, self._dropped)
        if status:
            self._troubles.put(_warning(f"Weights & Biases gets no more of this run: {self._last_words()}"))

    def _recorded_before(self, first_step: int) -> list[dict[str, Any]]:
        """What earlier claims have recorded and this one will not say again."""
        if first_step == 1:
            return []
        rows = select(Metric.step, Metric.values).where(Metric.job_id == self._job.id, Metric.step < first_step)
        try:
            with reading() as session:
                found = session.execute(rows.order_by(Metric.step)).all()
        except SQLAlchemyError as error:
            log.warning("earlier metrics of %s are not sent again: %s", self._job.id, type(error).__name__)
            return []
        return [{"step": row.step, "values": _named(row.values)} for row in found]

    def _last_words(self) -> str:
        with suppress(OSError):
            lines = (self._folder / "wandb.log").read_text(errors="replace").strip().splitlines()
            return lines[-1][-500:] if lines else "its process died"
        return "its process died"


def _missing(environment: Mapping[str, str]) -> str | None:
    """Why nothing can be sent from here."""
    mode = environment.get("WANDB_MODE", "online")
    if mode == "disabled":
        return "WANDB_MODE=disabled is set on the worker that runs it"
    if find_spec("wandb") is None:
        return "the package wandb is not installed on the worker that runs it; `pip install wandb` there"
    if mode != "offline" and not environment.get("WANDB_API_KEY"):
        return (
            "WANDB_API_KEY is not set on the worker that runs it; set it there, or WANDB_MODE=offline to keep them on "
            "its disk"
        )
    return None


def _environment(base: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The key, and no other secret; its files in the job's folder."""
    kept = {name: value for name, value in base.items() if not name.startswith(SECRETS)}
    ours = {"WANDB_DIR": str(folder), "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    return {**kept, **ours, "ANNEAL_SUPERVISED_BY": str(os.getpid())}


def _first_line(job: Job, started: Started, choices: dict[str, Any]) -> dict[str, Any]:
    tags = ("anneal/finetune", f"anneal/{job.model}"[:64], f"anneal/{job.id}", *(choices.get("tags") or ()))
    config = {
        "model": job.model,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "seed": job.seed,
        "training": started.resolved,
        "train_examples": started.train_examples,
        "parameters": started.parameters,
        "device": started.device,
    }
    return {
        "id": job.id,
        "project": choices["project"],
        "entity": choices.get("entity"),
        "name": choices.get("name") or job.id,
        "tags": list(dict.fromkeys(tags)),
        "config": config,
    }


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    return {NAMES[name]: value for name, value in values.items() if name in NAMES}


def _warning(message: str) -> Event:
    return Event(level="warn", message=message)
