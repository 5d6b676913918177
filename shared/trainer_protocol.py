"""What a trainer tells its supervisor: one JSON object a line, on a pipe of its own.

    started → (metrics | evaluation | checkpoint | event)* → done | stopped | error
    alive, in between, every second: the process runs

The pipe is file descriptor `ANNEAL_PROTOCOL_FD` (standard output when the variable is missing, as in
`python -m worker.training < spec.json`); libraries that print write to standard error instead. Orders travel the
other way as signals, because a trainer deep in a kernel reads nothing:

    SIGTERM  publish a checkpoint at the end of the running step, then `stopped` (a deploy, a pause)
    SIGUSR1  stop within one micro-batch, keep what is published, then `stopped` (a cancel)
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

PROTOCOL_FD = "ANNEAL_PROTOCOL_FD"


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Alive(_Message):
    """Nothing happened, and the process runs. Never recorded."""

    type: Literal["alive"] = "alive"


class Started(_Message):
    """The model is loaded, the data rendered; the first step comes next."""

    type: Literal["started"] = "started"
    resolved: dict[str, Any]
    """`training_spec.Resolved`, dumped."""
    total_steps: int
    first_step: int
    """1, or one past the checkpoint that was resumed from."""
    train_examples: int
    validation_examples: int
    train_tokens: int
    """Non-padding tokens in one epoch."""
    device: str
    """`cpu`, or the GPU's name."""
    versions: dict[str, str]
    parameters: int
    """Trainable parameters (all of them)."""


class Event(_Message):
    """Something the user should read: rows cut, a default chosen, a warning."""

    type: Literal["event"] = "event"
    level: Literal["info", "warn", "error"] = "info"
    message: str
    data: dict[str, Any] | None = None


class Metrics(_Message):
    """One logged optimizer step."""

    type: Literal["metrics"] = "metrics"
    step: int
    total_steps: int
    epoch: float
    loss: float
    """Mean cross-entropy in nats over the tokens trained on in this step."""
    mean_token_accuracy: float | None = None
    learning_rate: float
    grad_norm: float | None
    """Global L2 norm before clipping. None: it was not finite, and fp16's loss scaler skipped the step."""
    tokens: int
    """Non-padding tokens seen since the start of the job, resumed parts included."""
    tokens_per_second: float
    """Non-padding tokens over this step's wall-clock time."""
    samples_per_second: float
    peak_memory_bytes: int
    """GPU: max_memory_allocated. CPU: peak resident set size."""
    elapsed_s: float
    """Since the first step of this attempt began."""
    remaining_s: float
    """Estimate for what is left, evaluation and checkpoints included."""


class Evaluation(_Message):
    """The validation file's loss after `step` steps."""

    type: Literal["evaluation"] = "evaluation"
    step: int
    eval_loss: float
    eval_mean_token_accuracy: float | None = None
    eval_tokens: int


class Checkpoint(_Message):
    """A checkpoint is published: the folder is whole and on disk, its manifest written last."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    """Absolute folder."""
    manifest_sha256: str
    resumable: bool
    """Holds optimizer, scheduler and random state (all but the final one)."""
    tokens: int


class Done(_Message):
    """The run is complete; the last checkpoint is the model."""

    type: Literal["done"] = "done"
    step: int
    tokens: int
    """Non-padding tokens trained on over the whole job."""
    elapsed_s: float


class Stopped(_Message):
    """The trainer obeyed a signal."""

    type: Literal["stopped"] = "stopped"
    reason: Literal["cancelled", "interrupted"]
    step: int


class Failed(_Message):
    """The run can't go on; nothing published is lost. The process exits with 1 after this."""

    type: Literal["error"] = "error"
    code: str
    """`invalid_training_file`, `invalid_validation_file`, `out_of_memory`, `diverged`, `incompatible_chat_template`,
    `invalid_base_model`, `unsupported_setting`, `disk_full`, `trainer_error`; `device_error`: try again."""
    message: str
    """For the user: what went wrong, with the value, and what to change."""
    param: str | None = None


Message = Annotated[
    Alive | Started | Event | Metrics | Evaluation | Checkpoint | Done | Stopped | Failed, Field(discriminator="type")
]
_adapter: TypeAdapter[Message] = TypeAdapter(Message)


def parse(line: bytes) -> Message:
    """One line of the pipe.

    Raises:
        ValueError: the line is no message (pydantic's ValidationError is one).
    """
    return _adapter.validate_json(line)
