"""What a client may choose about a run (`training` on job creation), and what the trainer is told.

`TrainingSpec` is stored with the job as it was asked for; the trainer resolves every `"auto"` against the data and
the hardware and reports the result, which the job then shows. Operators' choices are `shared.settings`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator

Auto = Literal["auto"]
PositiveInt = Annotated[StrictInt, Field(ge=1, le=10**9)]

TUTORIAL_MAX_STEPS = 60
"""Steps of a run whose client names neither `max_steps` nor `n_epochs`."""
BASE_LEARNING_RATE = 2e-4
"""What `learning_rate_multiplier` multiplies, and the rate when nothing is said."""
QUANTIZED_FULL = (
    "4-bit or 8-bit weights can't be fully fine-tuned: their values have no gradient. Full fine-tuning keeps 32-bit "
    "master weights with an 8-bit optimizer (`optimizer: adamw_8bit`, the default) for a similar saving; training "
    "on 4-bit weights is QLoRA, an adapter method. Remove this key to fine-tune all parameters."
)


class TrainingSpec(BaseModel):
    """The choices of one run. Defaults are the tutorial's; `"auto"` becomes a concrete value the job shows."""

    # What stands below a field is its description in /docs too.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    method: Literal["full"] = "full"
    """Every parameter is trained."""
    max_steps: PositiveInt | None = None
    """Optimizer steps. None: from `n_epochs`, or 60 if that is not given either."""
    learning_rate: Annotated[float, Field(gt=0, le=1, strict=True)] | Auto = "auto"
    """Peak learning rate. `auto`: 2e-4 times `learning_rate_multiplier`."""
    warmup_steps: Annotated[StrictInt, Field(ge=0, le=10**9)] = 5
    """Steps of linear warm-up."""
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """What the learning rate does after the warm-up, over the steps of the whole run."""
    weight_decay: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.01
    """AdamW's; norms and biases have none."""
    max_grad_norm: Annotated[float, Field(gt=0, strict=True)] = 1.0
    """Gradients are scaled down to this global L2 norm."""
    batch_size: Annotated[StrictInt, Field(ge=1, le=65536)] | Auto = "auto"
    """Conversations per optimizer step (rows, with `packing: rows`). `auto`: 8."""
    micro_batch_size: PositiveInt | Auto = "auto"
    """Conversations per forward pass, at most; changes speed and memory, not gradients. `auto`: as many as are fast and
    fit, and the last pass of a step takes what is left."""
    gradient_accumulation_steps: PositiveInt | None = None
    """The same choice told as a factor: batch_size = micro_batch_size x this. Must agree if all three are given. Where
    you choose neither the job shows how many passes make a step, unless `tokens_per_pass` makes them more."""
    tokens_per_pass: PositiveInt | Auto = "auto"  # noqa: S105 - no password
    """Tokens per forward pass, at most; a longer conversation has a pass of its own. Changes speed and memory, not
    gradients. `auto`: as many as are fast and fit, and as many as come where you choose the micro-batch."""
    gpus: Annotated[StrictInt, Field(ge=1, le=64)] = 1
    """GPUs of one host that share each step: its conversations are dealt out, gradients added up. Batch, losses and
    checkpoints are those of one GPU. Fails where the worker sees fewer; where it sees none, so many processes share
    the CPU."""
    sharding: Literal["auto", "on", "off"] = "auto"
    """Whether each of several GPUs keeps a part of the weights, gradients and moments only, instead of all of them;
    for models too large for one. Slower; the optimizer is then `adamw`, and small changes show in the 16-bit copies
    later (they are rounded to nearest). `auto`: only if one GPU has no room for them."""
    max_seq_length: Annotated[StrictInt, Field(ge=32, le=131072)] = 2048
    """Tokens; longer conversations are cut and the job says how many."""
    packing: Literal["none", "rows"] = "none"
    """`rows`: several conversations share a row of `max_seq_length` (512 on CPU), each attending to itself only."""
    logging_steps: PositiveInt = 1
    """Steps of each entry of the curve, which has their mean loss."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What matrix products compute in. `auto`: bf16 where the hardware has it, else fp16 on GPU and fp32 on CPU."""
    master_weights: Literal["fp32", "bf16"] = "fp32"
    """What weights are kept in between steps. bf16 loses updates below a learning rate of about 1e-4."""
    optimizer: Literal["adamw_8bit", "adamw"] = "adamw_8bit"
    """`adamw_8bit` keeps 8-bit moments on GPU; CPU runs use 32-bit moments for either."""
    gradient_checkpointing: Literal["auto", "unsloth"] | StrictBool = "auto"
    """Recompute activations instead of keeping them. `auto`: only where they would not fit."""
    chat_template: Literal["auto", "chatml", "alpaca", "llama3"] = "auto"
    """How conversations become text. `auto`: the base model's own."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Which tokens the loss is taken over."""
    on_oom: Literal["adapt", "truncate", "fail"] = "adapt"
    """When memory runs out. `adapt`: smaller passes over the same batch, then gradient checkpointing, neither of
    which changes a gradient. `truncate`: shorter sequences after that. `fail`: end the job and name what would fit."""
    eval_steps: PositiveInt | Auto = "auto"
    """Evaluate on `validation_file` this often, and always at the end. `auto`: at every checkpoint. A checkpoint that
    falls between two evaluations shows the one before it (`valid_loss`) and none of its own (`full_valid_loss`)."""
    save_steps: PositiveInt | Auto = "auto"
    """Publish a checkpoint this often, and at the end. `auto`: a third of the run, at least every 500 steps."""
    priority: Annotated[StrictInt, Field(ge=-100, le=100)] = 0
    """Of waiting jobs the one of the highest priority starts first, among equals the oldest. A running job is never
    stopped for another."""
    keep_checkpoints: Annotated[StrictInt, Field(ge=1, le=100)] = 3
    """Newest checkpoints kept; the last one is the model."""
    load_in_4bit: StrictBool = False
    """Accepted only as false, so that recipes that spell it out run unchanged."""
    load_in_8bit: StrictBool = False
    """As `load_in_4bit`."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        micro, accumulation, batch = self.micro_batch_size, self.gradient_accumulation_steps, self.batch_size
        if accumulation is not None and micro != "auto" and batch != "auto" and micro * accumulation != batch:
            raise ValueError(
                f"batch_size={batch} differs from micro_batch_size x gradient_accumulation_steps = "
                f"{micro} x {accumulation} = {micro * accumulation}; send two of the three"
            )
        if batch != "auto" and accumulation is not None and micro == "auto" and batch % accumulation:
            raise ValueError(f"batch_size={batch} can't be divided by gradient_accumulation_steps={accumulation}")
        if batch != "auto" and micro != "auto" and batch % micro:
            raise ValueError(f"batch_size={batch} can't be divided by micro_batch_size={micro}")
        if self.sharding == "on" and self.gpus == 1:
            raise ValueError("sharding=on needs gpus of at least 2, and it is 1; leave sharding out or set gpus")
        return self

    @property
    def chooses_micro_batch(self) -> bool:
        """Whether the client leaves it to us how many conversations a pass holds."""
        return self.micro_batch_size == "auto" and self.gradient_accumulation_steps is None

    def resolved_batch(self, fitting: int = 2**31) -> tuple[int, int, int]:
        """(batch_size, micro_batch_size, gradient_accumulation_steps): the last two are at most so many conversations a
        pass, and how many passes hold the batch.

        Args:
            fitting: conversations an `auto` micro-batch may hold at most.
        """
        batch, micro, accumulation = self.batch_size, self.micro_batch_size, self.gradient_accumulation_steps
        if batch == "auto":
            if accumulation is None:
                batch = 8 if micro == "auto" or 8 % micro == 0 else micro
            else:
                batch = accumulation * (2 if micro == "auto" else micro)
        if micro == "auto":
            most = min(-(-batch // self.gpus), max(fitting, 1))  # more than its share no GPU gets
            micro = batch // accumulation if accumulation is not None else most
        return batch, micro, -(-batch // micro)


class TrainerSpec(BaseModel):
    """What `python -m worker.training` reads from standard input: one JSON object on one line, paths absolute.

    Only folders named here are touched. The trainer knows no database, broker or network.
    """

    model_config = ConfigDict(extra="forbid")

    job_id: str
    fence: int = 1
    """Claim number; goes into every checkpoint's manifest."""
    base_model: str
    """Name of what is fine-tuned, for the record."""
    base_model_dir: str
    """Its folder: config.json, model.safetensors, tokenizer files."""
    training_file: str
    validation_file: str | None = None
    checkpoint_dir: str
    """Checkpoints appear here as `<step>/`, each whole or not at all."""
    work_dir: str
    """Private scratch folder: temporary files, what is compiled for this run alone."""
    cache_dir: str | None = None
    """Folder that runs share: tokenised rows, compiled kernels. None: nothing is kept for the next run."""
    resume_from: str | None = None
    """A checkpoint folder to go on from, verified by the caller."""
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    n_epochs: float | Literal["auto"] = "auto"
    learning_rate_multiplier: float | Literal["auto"] = "auto"
    seed: int = 3407
    memory_limit_bytes: int | None = Field(default=None, gt=0)
    """Memory this trainer may take (`worker.training.memory` says what is counted). None: all there is."""
    leash_s: float | None = None
    """Silence of the supervisor on standard input after which the trainer ends itself. None: started by hand."""


class Resolved(BaseModel):
    """Every choice of a run as it is really made; shown on the job under `anneal.training`."""

    model_config = ConfigDict(extra="allow")

    method: str
    max_steps: int
    n_epochs: float
    """Passes over the training rows that `max_steps` amounts to."""
    learning_rate: float
    learning_rate_multiplier: float
    batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    max_seq_length: int
    gpus: int = 1
    sharding: str = "off"
    """`on` or `off`."""
    precision: str
    master_weights: str
    optimizer: str
    gradient_checkpointing: str | bool
    chat_template: str
    packing: str
    eval_steps: int | None
    save_steps: int

    def shown(self) -> dict[str, Any]:
        return self.model_dump()
