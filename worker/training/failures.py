"""Why a run can't go on, in words for its user.

    TrainingFailed             code
    ├── BadTrainingFile        invalid_training_file
    ├── BadValidationFile      invalid_validation_file
    ├── BadBaseModel           invalid_base_model
    ├── BadTemplate            incompatible_chat_template
    ├── UnsupportedSetting     unsupported_setting
    ├── Diverged               diverged
    └── DiskFull               disk_full

Everything else becomes `out_of_memory` or `trainer_error` in `describe`.
"""

from shared.trainer_protocol import Failed
from shared.training_spec import Resolved


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


class Diverged(TrainingFailed):
    code = "diverged"


class DiskFull(TrainingFailed):
    code = "disk_full"


def describe(error: BaseException, resolved: Resolved | None) -> Failed:
    """The message that ends the protocol for this exception."""
    if isinstance(error, TrainingFailed):
        return Failed(code=error.code, message=error.message, param=error.param)
    if _is_out_of_memory(error):
        advice, param = _what_would_fit(resolved)
        return Failed(code="out_of_memory", message=f"The accelerator or host ran out of memory: {advice}", param=param)
    return Failed(code="trainer_error", message=f"{type(error).__name__}: {error}")


def _is_out_of_memory(error: BaseException) -> bool:
    """PyTorch has an exception of its own for GPUs; its CPU allocator raises a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def _what_would_fit(resolved: Resolved | None) -> tuple[str, str | None]:
    if resolved is None:
        return "the model itself does not fit; use a smaller base model or a larger machine.", None
    if resolved.micro_batch_size > 1:
        return (
            f"set training.micro_batch_size to 1 (it was {resolved.micro_batch_size}); gradients stay the same.",
            "training.micro_batch_size",
        )
    if resolved.gradient_checkpointing is False:
        return "set training.gradient_checkpointing to true (it was off).", "training.gradient_checkpointing"
    shorter = max(resolved.max_seq_length // 2, 32)
    return (
        f"set training.max_seq_length to {shorter} (it was {resolved.max_seq_length}); longer rows are then cut.",
        "training.max_seq_length",
    )
