"""Why a run can't go on, in words for its user.

    TrainingFailed             code
    ├── BadTrainingFile        invalid_training_file
    ├── BadValidationFile      invalid_validation_file
    ├── BadBaseModel           invalid_base_model
    ├── BadTemplate            incompatible_chat_template
    ├── UnsupportedSetting     unsupported_setting
    ├── Diverged               diverged
    ├── NoGradient             trainer_error
    └── DiskFull               disk_full

Everything else becomes `out_of_memory`, `device_error` or `trainer_error` in `describe`.
"""

import errno
from collections.abc import Iterator
from typing import Any

from shared.trainer_protocol import Failed
from shared.training_spec import Resolved, TrainingSpec
from worker.training import ladder

OUT_OF_MEMORY_SIGNS = (
    "out of memory",  # CUDA's and the driver's own words
    "can't allocate memory",  # PyTorch's CPU allocator
    "cannot allocate memory",  # the kernel, to whoever maps a file
    "not enough memory",
    "defaultcpuallocator",
    "std::bad_alloc",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "could not create a primitive",  # oneDNN, whose only word it is: its primitives hold buffers
    "could not create a memory object",
)


DEVICE_KINDS = ("AcceleratorError", "DistBackendError", "DistNetworkError")
"""PyTorch's exceptions of GPUs and of what connects them."""
DEVICE_SIGNS = ("cuda error", "nccl error", "gloo/transport", "connection closed by peer")


class TrainingFailed(Exception):
    """Base of the tree. The message names the value at fault and what to change."""

    code = "trainer_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class BadTrainingFile(TrainingFailed):
    code = "invalid_training_file"


class BadValidationFile(TrainingFailed):
    code = "invalid_validation_file"


class BadBaseModel(TrainingFailed):
    code = "invalid_base_model"


class BadTemplate(TrainingFailed):
    code = "incompatible_chat_template"


class UnsupportedSetting(TrainingFailed):
    code = "unsupported_setting"


class NoGradient(TrainingFailed):
    """A loss without a gradient: the run would look well and learn nothing."""


class Diverged(TrainingFailed):
    code = "diverged"


class DiskFull(TrainingFailed):
    code = "disk_full"


def describe(error: BaseException, training: TrainingSpec, resolved: Resolved | None) -> Failed:
    """The message that ends the protocol for this exception.

    Args:
        training: the client's choices.
        resolved: what they came to; None while the model was not loaded yet.
    """
    if isinstance(error, TrainingFailed):
        return Failed(code=error.code, message=error.message, param=error.param)
    if is_out_of_memory(error):
        advice, param = _what_would_fit(training, {} if resolved is None else resolved.shown())
        return Failed(
            code="out_of_memory", message=f"The accelerator or host ran out of memory: {advice}.", param=param
        )
    code = "device_error" if is_device_error(error) else "trainer_error"
    return Failed(code=code, message=f"{type(error).__name__}: {error}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this exception, or one that led to it, says that memory ran out, of a GPU or of the host.

    PyTorch has an exception of its own for its GPU allocator only. Its CPU allocator, cuBLAS, oneDNN and driver calls
    raise RuntimeErrors told apart by their text, and compilers and engines wrap what they catch.
    """
    return any(map(_says_out_of_memory, _chain(error)))


def is_device_error(error: BaseException) -> bool:
    """Whether it was a GPU, or what connects several processes, that failed: another attempt may find a sound one."""
    return any(
        any(kind.__name__ in DEVICE_KINDS for kind in type(one).__mro__)
        or (isinstance(one, RuntimeError) and any(sign in str(one).lower() for sign in DEVICE_SIGNS))
        for one in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """It and those that led to it."""
    chain: BaseException | None = error
    seen: set[int] = set()
    while chain is not None and id(chain) not in seen:
        yield chain
        seen.add(id(chain))
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY_SIGNS)


def _what_would_fit(training: TrainingSpec, resolved: dict[str, Any]) -> tuple[str, str | None]:
    """(what the user can do, the setting it is about): the rung of the ladder that was not taken."""
    if not resolved:
        return "the model itself does not fit; use a smaller base model or a machine with more memory", None
    rung = ladder.below(training, resolved)
    if rung is None:
        return (
            f"training.micro_batch_size is 1, gradient checkpointing is on and training.max_seq_length is "
            f"{resolved['max_seq_length']}: no setting is left that would fit; use a smaller base model or a machine "
            "with more memory",
            None,
        )
    if training.on_oom == "fail":
        return f"{rung.advice}. training.on_oom is fail, so nothing was tried; adapt would do it unasked", rung.param
    if rung.param == "training.max_seq_length" and training.on_oom == "adapt":
        return (
            "training.micro_batch_size is 1 and gradient checkpointing is on already; "
            f"{rung.advice}. training.on_oom: truncate would do it unasked",
            rung.param,
        )
    return rung.advice, rung.param
