"""TRL's SFTTrainer under Unsloth, bent in four places: order, how a step is computed, evaluation, checkpoints.

The loop, the optimizer, the schedule and the saved state are the Trainer's. It gets one optimizer step's rows at a
time; plain decoders compute them with our own passes (`step`), all others with Unsloth's forward pass and loss.
Importing this module imports unsloth, before trl and transformers, as it must be.
"""

# isort: off
import unsloth  # noqa: F401 - patches what is imported below
# isort: on

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, disable_progress_bars
from torch.utils.data import BatchSampler, DataLoader, Sampler
from torch.utils.serialization import config as serialization
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from shared.training_spec import Resolved
from worker.training import decoder, moments, passes, sharding, step
from worker.training import model as models
from worker.training.checkpoint import RESUME_FILES
from worker.training.data import IGNORED, Example, order_of_epoch
from worker.training.data_plan import DataPlan
from worker.training.failures import is_out_of_memory
from worker.training.operations import CpuOperations
from worker.training.parallel import Alone, Together
from worker.training.sharding import ShardedStepper
from worker.training.step import Abandoned, Stepper, Sums

EVALUATION_TOKENS = 4096
"""Of one evaluation pass or batch, padding included. Halved where even that does not fit."""
OPTIMIZERS = {"adamw_8bit": "adamw_8bit", "adamw": "adamw_torch_fused"}


@dataclass(slots=True)
class Counts:
    """What has been trained on. Of the `learned` tokens, which had a label, `correct` were the likeliest."""

    tokens: int = 0
    conversations: int = 0
    learned: int = 0
    correct: Any = 0
    """On the device."""


@dataclass(slots=True)
class Untold:
    """A step that is done, or still runs on the GPU, and is not told of yet."""

    step: int
    epoch: float | None
    learning_rate: float
    counts: Counts
    _numbers: Any = None
    _copied: Any = None

    def read(self, *numbers: Any) -> None:
        """Begin to copy what is on the device."""
        found = torch.stack([torch.as_tensor(number).detach().double().to(numbers[0].device) for number in numbers])
        if not found.is_cuda:
            self._numbers = found
            return
        self._numbers = torch.empty(len(numbers), dtype=torch.double, pin_memory=True)
        self._numbers.copy_(found, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def numbers(self) -> tuple[float, float, int]:
        """Loss, gradient norm, right answers so far; waits for the step."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, norm, correct = self._numbers.tolist()
        return loss, norm, int(correct)


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    loss: float
    accuracy: float
    tokens: int
    """Tokens the loss is taken over."""


class StepOrder(Sampler[int]):  # type: ignore[misc]  # torch is not analysed
    """The Trainer's own shuffled order, conversations of like length next to each other within a step.

    Args:
        resumed: the epoch that a checkpoint was made in, and its order.
    """

    def __init__(
        self, lengths: list[int], batch_size: int, seed: int, resumed: tuple[int, list[int]] | None = None
    ) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._shuffled = SeedableRandomSampler(range(len(lengths)), data_seed=seed)
        self._resumed = resumed
        self.epoch = 0
        self.order: list[int] = []
        """Of that epoch."""

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        if self._resumed is not None and self._resumed[0] == self.epoch:
            self.order = self._resumed[1]
        else:
            self.order = list(order_of_epoch(self._lengths, list(self._shuffled), self._batch_size))
        return iter(self.order)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._shuffled.set_epoch(epoch)


class Steps(BatchSampler):  # type: ignore[misc]
    """The rows of one optimizer step after the other."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer for an epoch that is resumed in the middle."""
        self.sampler.set_epoch(epoch)


class StepLoader(DataLoader):  # type: ignore[misc]
    """One optimizer step's rows at a time."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each other epoch."""
        self.batch_sampler.set_epoch(epoch)


class Engine(SFTTrainer):  # type: ignore[misc]  # nor is trl
    """See the module. `owner` is the run's callback: it publishes checkpoints and is told of evaluations."""

    owner: Any
    rows: list[Example]
    step_order: StepOrder
    plan: DataPlan
    counts: Counts
    stepper: Stepper | ShardedStepper | None
    """None: the model or the number format is not plain, and Unsloth's own forward and loss are used."""
    _globalstep_last_logged: int
    """The Trainer's own."""
    pass_rows: int
    pass_tokens: int | None
    group: Alone
    """The processes that compute each step together."""
    untold: deque[Untold]
    steps_untold: int
    """Steps that may be under way before the one before them is told of."""
    told_counts: Counts
    """As of the step that is being told of."""

    def get_train_dataloader(self) -> StepLoader:
        """Whole steps: how one is computed is decided in `training_step`, the order by the seed alone."""
        return StepLoader(
            range(len(self.rows)),
            batch_sampler=Steps(self.step_order, self.args.train_batch_size, drop_last=False),
            collate_fn=lambda indices: [self.rows[index] for index in indices],
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], None]:
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # nobody asks

    def training_step(self, model: Any, rows: list[Example], *args: Any, **kwargs: Any) -> Any:
        """Loss and gradients of one optimizer step.

        Raises:
            Abandoned: the run is cancelled.
        """
        self.counts.tokens += sum(len(row.ids) for row in rows)
        self.counts.conversations += sum(len(row.lengths) for row in rows)
        learned = passes.count_learned(rows)
        mine = self.group.share(rows)
        if self.stepper is not None:
            sums = self._sums(self.stepper, mine, learned)
            loss, correct = self.group.add_up(self.stepper.gradients, sums.loss, sums.correct)
            self.counts.learned += learned
            self.counts.correct += correct
            return loss / learned
        loss = 0.0
        # Without a row of our own one is computed all the same: the loss scaler wants to have seen something.
        for number, chunk in enumerate(passes.chunks(mine or rows[:1], self.pass_rows, self.pass_tokens)):
            if number and self.owner.is_cancelled():
                raise Abandoned
            inputs = self.data_collator([vars_of(row) for row in chunk])
            loss = loss + super().training_step(model, inputs, learned)
        if self.group.world == 1:
            return loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None or not mine:
                parameter.grad = torch.zeros_like(parameter)
        return self.group.add_up([parameter.grad for parameter in trained], loss if mine else loss * 0, 0)[0]

    def _sums(self, stepper: Stepper | ShardedStepper, rows: list[Example], learned: int) -> Sums:
        """Done again if memory ran out that can be had: a step's first pass replaces whatever was there."""
        try:
            return stepper.step(rows, learned, self.owner.is_cancelled)
        except Exception as error:
            if not stepper.can_shrink or not is_out_of_memory(error):
                raise
        stepper.shrink()  # only here nothing names the pass that failed and what it held
        sums = stepper.step(rows, learned, self.owner.is_cancelled)
        self.owner.shrank()
        return sums

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Takes up what a checkpoint has, however many ranks made it and with however many bits."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if sharding.is_sharded(self.model):
            sharding.keep_one_format(optimizer)
        elif self.args.optim == OPTIMIZERS["adamw_8bit"]:
            moments.take_either(optimizer)
        else:
            optimizer.register_load_state_dict_pre_hook(moments.as_torch_has_it)
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if sharding.is_sharded(self.model):
            sharding.fill(self.bare_model(), Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with serialization.patch({"load.mmap": sharding.is_sharded(self.model)}):  # needs some rows and reads no others
            super()._load_optimizer_and_scheduler(checkpoint)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return sharding.whole(super()._get_grad_norm(model, grad_norm=grad_norm))

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Any,
        grad_norm: Any,
        model: Any,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: Any,
        start_time: float,
        learning_rate: Any = None,
    ) -> None:
        """Tell of the step just done, then evaluate and save as the Trainer does.

        On a GPU a step is told of while the next one runs: to read its loss is to wait for it.
        """
        step, control = self.state.global_step, self.control
        if step > self._globalstep_last_logged:  # else the end of an epoch, which is told of already
            self.untold.append(Untold(step, self.state.epoch, learning_rate, replace(self.counts)))
            self.untold[-1].read(tr_loss, grad_norm, self.counts.correct)
            tr_loss.zero_()
            self._globalstep_last_logged = step
        last = step >= self.state.max_steps
        now = control.should_evaluate or control.should_save or control.should_training_stop or last
        self.tell(start_time, but=0 if now else self.steps_untold)
        control.should_log = False
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )

    def tell(self, start_time: float, *, but: int) -> None:
        """Log the steps that are not told of yet, all but the last `but`."""
        step, epoch = self.state.global_step, self.state.epoch
        try:
            while len(self.untold) > but:
                told = self.untold.popleft()
                self.state.global_step, self.state.epoch, self.told_counts = told.step, told.epoch, told.counts
                loss, norm, told.counts.correct = told.numbers()
                self.log({"loss": loss, "grad_norm": norm, "learning_rate": told.learning_rate}, start_time)
        finally:
            self.state.global_step, self.state.epoch = step, epoch

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Called by the training loop when the callback has asked for it."""
        self.owner.evaluate(self)
        return {}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Called by the training loop when the callback has asked for it; the Trainer's own is not atomic."""
        self.owner.publish(self, resumable=True)

    def save_resume_state(self, folder: Path) -> None:
        """optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json, data_plan.json."""
        self.plan.model_copy(update={"epoch": self.step_order.epoch, "order": self.step_order.order}).write(folder)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))
        missing = [name for name in RESUME_FILES if not (folder / name).exists()]
        assert not missing, f"the engine saved no {missing}"

    def take_part_in_saving(self, bare: Any, base: Path, *, resumable: bool) -> None:
        """What a rank that writes nothing does while rank 0 puts together a model in shards, in the same order."""
        for _ in models.whole_tensors(bare, base):
            pass
        if resumable:
            self.optimizer.state_dict()

    def bare_model(self) -> Any:
        """The model without the wrappers of the engine."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)


def configure(resolved: Resolved, work_dir: Path) -> SFTConfig:
    """Our choices as the engine's arguments. Logging is at every step; what is reported is the callback's choice."""
    extra = resolved.model_extra or {}
    mixed = resolved.precision if resolved.master_weights == "fp32" else "none"
    config = SFTConfig(
        output_dir=str(work_dir / "engine"),
        per_device_train_batch_size=resolved.batch_size,  # passes are ours, see `Engine.training_step`
        gradient_accumulation_steps=1,
        max_steps=resolved.max_steps,
        learning_rate=resolved.learning_rate,
        warmup_steps=extra["warmup_steps"],
        lr_scheduler_type=extra["lr_scheduler"],
        weight_decay=extra["weight_decay"],
        max_grad_norm=extra["max_grad_norm"],
        optim=OPTIMIZERS[resolved.optimizer],
        bf16=mixed == "bf16",
        fp16=mixed == "fp16",
        gradient_checkpointing=bool(resolved.gradient_checkpointing),
        seed=extra["seed"],
        data_seed=extra["seed"],
        max_length=None,  # rows are cut already
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    # Concatenated rows with position ids and no attention mask: exact, and no padding. Unsloth switches it off on CPU
    # while the config is built, because an all-ones mask would let conversations see each other; none is given here.
    # A collator of our own, given to the constructor, would make Unsloth switch it off on GPU.
    config.padding_free = True
    return config


def build(
    model: Any,
    tokenizer: Any,
    rows: list[Example],
    resolved: Resolved,
    work_dir: Path,
    plan: DataPlan | None = None,
    group: Alone | None = None,
) -> Engine:
    """The engine with its data, optimizer settings and counting in place; callbacks are the caller's.

    Args:
        plan: that the rows were made by, with the order of a resumed epoch.
        group: of processes that train together.
    """
    disable_progress_bars()
    # Unsloth's trainer believes what a model says, refuses longer rows, and takes 1,024 for the limit of one that says
    # nothing, which one in shards does. The length that a model was loaded for leaves no other trace in it.
    model.max_seq_length = resolved.max_seq_length
    dataset = _as_dataset(rows, resolved.max_seq_length)
    engine = Engine(
        model=model,
        args=configure(resolved, work_dir),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    for noisy in (PrinterCallback, ProgressCallback):
        engine.remove_callback(noisy)
    engine.rows = rows
    engine.group = group or Alone()
    engine.pass_rows, engine.pass_tokens = resolved.micro_batch_size, (resolved.model_extra or {})["tokens_per_pass"]
    engine.stepper = make_stepper(engine, resolved)
    packed = any(len(row.lengths) > 1 for row in rows)
    if engine.stepper is None and packed and not getattr(engine.data_collator, "padding_free", False):
        raise AssertionError("the engine turned padding-free batches off; packed conversations would see each other")
    engine.plan = plan or DataPlan(conversations_sha256="", packed=None, epoch=0, order=[])
    resumed = (engine.plan.epoch, engine.plan.order) if engine.plan.order else None
    engine.step_order = StepOrder([len(row.ids) for row in rows], resolved.batch_size, engine.args.data_seed, resumed)
    engine.counts, engine.told_counts = Counts(), Counts()
    engine.untold, engine.steps_untold = deque(), int(engine.args.device.type == "cuda")
    return engine


def make_stepper(engine: Engine, resolved: Resolved) -> Stepper | ShardedStepper | None:
    """Our own passes, where they compute what the engine's would."""
    model, on_gpu = engine.bare_model(), engine.args.device.type == "cuda"
    if resolved.precision == "fp16" or not decoder.is_plain(model):
        return None
    dtype = torch.bfloat16 if resolved.precision == "bf16" else torch.float32
    recompute, most = bool(resolved.gradient_checkpointing), engine.pass_rows
    if sharding.is_sharded(model):
        assert isinstance(engine.group, Together)
        assert engine.args.world_size == 1, "the Trainer would share the work out once more"
        if on_gpu:
            from worker.training import gpu

            chunk_rows = gpu.SMALL_CHUNK_ROWS if recompute else gpu.CHUNK_ROWS
            computes: Any = (gpu.GpuOperations(chunk_rows), gpu.arguments_of)
        else:
            computes = (CpuOperations(), step.arguments_of)
        return ShardedStepper(
            model, dtype, engine.group, *computes, recompute=recompute, most=most, most_tokens=engine.pass_tokens
        )
    kind = Stepper
    if on_gpu:
        from worker.training.gpu import GraphStepper as kind
    return kind(model, dtype, recompute=recompute, most=most, most_tokens=engine.pass_tokens)


def add_callback(engine: Engine, callback: TrainerCallback) -> None:
    engine.owner = callback
    engine.add_callback(callback)


def evaluate(engine: Engine, rows: list[Example], should_stop: Callable[[], bool]) -> EvaluationResult | None:
    """Token-mean loss and accuracy over the rows, or None if `should_stop()` became true meanwhile on any rank.

    By our own passes where steps are computed by them, else in padded batches with a mask, so that nothing depends on
    how the engine tells conversations apart; logits are made of the labelled positions only. Smaller passes or batches,
    and then what the stepper can give up, are tried before memory counts as having run out: no choice that makes
    training fit would help here.
    """
    sums = engine.group.total(_evaluate_share(engine, engine.group.share(rows), should_stop))
    if sums is None:
        return None
    loss, correct, learned = sums
    return EvaluationResult(loss / learned, correct / learned, int(learned))


EvaluationSums = tuple[float, float, float]
"""Losses, right answers, tokens that were learned."""


def _evaluate_share(engine: Engine, rows: list[Example], should_stop: Callable[[], bool]) -> EvaluationSums | None:
    longest = max((len(row.ids) for row in rows), default=0)
    batch_tokens, shrunk = EVALUATION_TOKENS, False
    while True:
        try:
            sums = _evaluate(engine, rows, batch_tokens, should_stop)
            if shrunk:
                engine.owner.shrank()
            return sums
        except Exception as error:
            alone = not isinstance(engine.stepper, ShardedStepper)  # else other ranks would not try again with us
            if not alone or not is_out_of_memory(error):
                raise
            if batch_tokens <= longest and (engine.stepper is None or not engine.stepper.can_shrink):
                raise
        if batch_tokens > longest:
            batch_tokens //= 2
        elif engine.stepper is not None:
            engine.stepper.shrink()
            shrunk = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _evaluate(
    engine: Engine, rows: list[Example], batch_tokens: int, should_stop: Callable[[], bool]
) -> EvaluationSums | None:
    if engine.stepper is not None:
        sums = engine.stepper.evaluate(rows, batch_tokens, should_stop)
        if sums is None:
            return None
        return float(sums.loss), int(sums.correct), sums.learned
    model = engine.bare_model()
    was_training = model.training
    model.eval()
    loss_sum, correct, count = 0.0, 0, 0
    try:
        for batch in _evaluation_batches(rows, batch_tokens, engine.args.device):
            if should_stop():
                return None
            with torch.no_grad(), _autocast(engine):
                hidden = model.base_model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                ).last_hidden_state
                targets = batch["labels"][:, 1:]
                learned = targets != IGNORED
                logits = model.get_output_embeddings()(hidden[:, :-1][learned]).float()
            wanted = targets[learned]
            loss_sum += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
            correct += int((logits.argmax(-1) == wanted).sum().item())
            count += wanted.numel()
    finally:
        model.train(was_training)
    return loss_sum, correct, count


def _autocast(engine: Engine) -> Any:
    """What the training step computes in."""
    if engine.args.bf16 or engine.args.fp16:
        dtype = torch.bfloat16 if engine.args.bf16 else torch.float16
        return torch.autocast(engine.args.device.type, dtype=dtype)
    return contextlib.nullcontext()


def _evaluation_batches(rows: list[Example], batch_tokens: int, device: Any) -> Iterator[dict[str, Any]]:
    """Batches of like lengths, each at most `batch_tokens` with its padding (or one row)."""
    waiting: list[Example] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if waiting and (len(waiting) + 1) * len(row.ids) > batch_tokens:
            yield _padded(waiting, device)
            waiting = []
        waiting.append(row)
    if waiting:
        yield _padded(waiting, device)


def _padded(rows: list[Example], device: Any) -> dict[str, Any]:
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for index, row in enumerate(rows):
        length = len(row.ids)
        ids[index, :length] = torch.tensor(row.ids)
        labels[index, :length] = torch.tensor(row.labels)
        mask[index, :length] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def vars_of(row: Example) -> dict[str, Any]:
    """The row as the engine's collator takes it."""
    return {"input_ids": row.ids, "labels": row.labels, "seq_lengths": list(row.lengths)}


def _as_dataset(rows: list[Example], longest: int) -> Dataset:
    # A token of each row, learned: the engine looks for columns and for something to learn; rows are `StepLoader`'s.
    dataset = Dataset.from_dict(
        {
            "input_ids": [row.ids[:1] for row in rows],
            "labels": [row.ids[:1] for row in rows],
            "seq_lengths": [[1] for _ in rows],
        }
    )
    # Unsloth's GPU trainer keeps padding-free batches only for data that says it is cut already.
    dataset._unsloth_truncated_to = longest
    return dataset
