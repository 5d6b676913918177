"""A trainer that was started before there is a job: imports and weights first, the spec when it comes.

    stdin     StandbySpec on one line, then the leash, as every trainer's
    socket    file descriptor `ANNEAL_STANDBY_FD`: the job's TrainerSpec on one line with the descriptor of the job's
              lock; answered with TAKEN by a thread, whatever the imports are busy with

From the hand-over on it is a trainer like any other. On CPU what it did ahead changes no bit of what it does then, on
a GPU as little as kernels compiled earlier do: a model is used only for a job that would load the very same one.
Imports no torch before it is told to.
"""

import dataclasses
import gc
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict

from shared.training_spec import TrainerSpec, TrainingSpec
from worker.training.leash import Leash, read_spec
from worker.training.reporter import Reporter

STANDBY_FD = "ANNEAL_STANDBY_FD"
TAKEN = b"!"
READY = "ready"
"""The file in its folder that says that it waits."""
LOADED_AHEAD = "the model was loaded ahead"
READ_BYTES = 2**16
SMALL_SHARE = 0.02
"""Of the GPU's free memory: what a model may take that waits there for its job."""


class StandbySpec(BaseModel):
    """What a standby is told at birth: one JSON object on one line, paths absolute."""

    model_config = ConfigDict(extra="forbid")

    folder: str
    """Its scratch folder until its end; a job's own comes with the job."""
    base_model_dir: str | None
    """The base model that the next job probably starts from. None: nothing is loaded ahead."""
    leash_s: float


class Warm:
    """What is there before the job is. The default: nothing."""

    def __init__(self) -> None:
        self._model: Any = None
        self._files: list[tuple[object, ...]] = []

    def hardware(self, limit_bytes: int | None, processes: int = 1) -> Any:
        """`model.hardware`, with the memory counted as free that the model takes which was loaded ahead.

        It is the job's either way; without, a run would be cut into other passes than after a fresh start.
        """
        from worker.training import model

        found = model.hardware(limit_bytes, processes)
        tensors = [] if self._model is None else list(self._model.parameters())
        held_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return dataclasses.replace(found, memory_bytes=found.memory_bytes + held_bytes)

    def load_model(self, folder: Path, hardware: Any, **choices: Any) -> Any:
        """`model.load_model`, with the model that was loaded ahead if it is the same; the other one is dropped."""
        from worker.training import model

        ahead, self._model = self._model, None
        same = {**choices, "max_seq_length": None} == {**_usual(folder), "max_seq_length": None}
        if ahead is not None and same and self._files == _state_of(folder):
            sys.stderr.write(f"{LOADED_AHEAD}\n")
            return ahead
        if ahead is not None:
            del ahead
            gc.collect()
        return model.load_model(folder, hardware, **choices)

    def load_ahead(self, folder: Path) -> None:
        """Load what a job with the usual choices would load: the model, and for a GPU the kernels.

        The GPU's memory belongs to the job that runs meanwhile: of a model that is not small beside it only the files
        are read, into the page cache.
        """
        from worker.training import model

        hardware = model.hardware()
        files = _state_of(folder)
        model.load_tokenizer(folder)  # for what is imported on the way
        if hardware.is_gpu:
            from worker.training import gpu

            gpu.warm_up(folder)
            if model.needs(folder).weights > SMALL_SHARE * hardware.memory_bytes:
                for path in folder.glob("*.safetensors"):
                    _read(path)
                return
        if model.position_limit(folder) is not None:  # without, Unsloth's rotary embedding depends on the length
            self._model, self._files = model.load_model(folder, hardware, **_usual(folder)), files

    def forget(self) -> None:
        self._model = None


class Receiver(threading.Thread):
    """Takes the job at once, so that the supervisor learns within a moment whether there is anybody to take it."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(name="receiver", daemon=True)
        self._connection = connection
        self.spec: Future[bytes] = Future()
        self.lock: list[int] = []
        """The job's, open until this process ends."""

    def run(self) -> None:
        try:
            self.spec.set_result(self._receive())
        except OSError:
            os._exit(1)

    def _receive(self) -> bytes:
        content = b""
        while b"\n" not in content:
            chunk, descriptors, _, _ = socket.recv_fds(self._connection, READ_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            self.lock += descriptors
            if not chunk:
                os._exit(0)  # the supervisor wants it no more
            content += chunk
        if not self.lock:
            raise OSError("a job without its lock")
        self._connection.sendall(TAKEN)
        return content


def wait_for_job(reporter: Reporter, prepare: Callable[[str], None]) -> tuple[TrainerSpec, Warm]:
    """Warm up and wait; the leash is held meanwhile.

    Args:
        prepare: makes a folder the current one, with the libraries' caches inside it.

    Raises:
        ValidationError: the job's spec is not valid.
    """
    connection = socket.socket(fileno=int(os.environ.pop(STANDBY_FD)))
    connection.set_inheritable(False)
    receiver = Receiver(connection)
    receiver.start()  # first: a job may come before the order does, and its sender's patience has begun
    order = StandbySpec.model_validate_json(read_spec())
    Leash(reporter, order.leash_s).start()
    warm = Warm()
    try:
        prepare(order.folder)
        from worker.training import engine  # noqa: F401, isort: skip - imports unsloth, which must come first
        from worker.training import callbacks, model  # noqa: F401 - callbacks too

        is_gpu = model.hardware().is_gpu
        if is_gpu:
            import torch

            torch.zeros(1, device="cuda")  # makes the context
    except Exception:
        # Half imported, or without its GPU, which the job that runs now may have filled: no job is to inherit that.
        _die_of_it()
    try:
        if order.base_model_dir is not None:
            warm.load_ahead(Path(order.base_model_dir))
        (Path(order.folder) / READY).touch()
    except Exception:
        traceback.print_exc(file=sys.stderr)  # the job will meet the same, and say it; or it needs nothing of this
        warm.forget()
        if is_gpu:
            _look_for_sticky_errors()
    spec = TrainerSpec.model_validate_json(receiver.spec.result())
    if spec.memory_limit_bytes is not None:
        warm.forget()  # its limit counts what it loads itself
    return spec, warm


def _die_of_it() -> NoReturn:
    traceback.print_exc(file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def _look_for_sticky_errors() -> None:
    """After some errors everything fails that a process asks of its GPU."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        _die_of_it()


def _usual(folder: Path) -> dict[str, Any]:
    """The choices for `model.load_model` of a job that makes none."""
    from worker.training import model

    training = TrainingSpec()
    limit = model.position_limit(folder) or training.max_seq_length
    return {
        "max_seq_length": min(training.max_seq_length, limit),
        "master_weights": training.master_weights,
        "gradient_checkpointing": False,
    }


def _state_of(folder: Path) -> list[tuple[object, ...]]:
    """Tells the files of a folder from others put in their place."""
    states = ((path.name, path.stat()) for path in sorted(folder.iterdir()))
    return [(str(folder.resolve()), name, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in states]


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as stream:
        while stream.read(2**22):
            pass
