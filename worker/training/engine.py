"""TRL's SFTTrainer under Unsloth, bent in five places: order, counting, the loss on CPU, evaluation, checkpoints.

CPU and GPU runs share every line but the loss; what else differs was decided in `resolve` and `model`.
Importing this module imports unsloth, before trl and transformers, as it must be.
"""

# isort: off
import unsloth  # noqa: F401 - patches what is imported below
# isort: on

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, disable_progress_bars
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from shared.training_spec import Resolved
from worker.training import head
from worker.training.checkpoint import RESUME_FILES
from worker.training.data import IGNORED, Example, order_of_epoch
from worker.training.failures import is_out_of_memory

TOKENS, CONVERSATIONS = "anneal_tokens", "anneal_conversations"
"""What the collator counts, carried with each micro-batch as plain numbers."""
EVALUATION_TOKENS = 4096
"""Padded tokens of one evaluation batch: bounds its logits. Halved where even that does not fit."""
OPTIMIZERS = {"adamw_8bit": "adamw_8bit", "adamw": "adamw_torch_fused"}


@dataclass(slots=True)
class Counts:
    """What has been trained on. `learned` tokens had a label, `correct` ones were the likeliest: known on CPU only."""

    tokens: int = 0
    conversations: int = 0
    learned: int = 0
    correct: int = 0


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    loss: float
    accuracy: float
    tokens: int
    """Tokens the loss is taken over."""


class StepOrder(Sampler[int]):  # type: ignore[misc]  # torch is not analysed
    """The Trainer's own shuffled order, conversations of like length next to each other within a step."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._shuffled = SeedableRandomSampler(range(len(lengths)), data_seed=seed)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        return order_of_epoch(self._lengths, list(self._shuffled), self._batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch, a resumed one included."""
        self._shuffled.set_epoch(epoch)


class PaddedCollator:
    """Rows padded on the right, without an attention mask: what comes later can't be attended to anyway.

    Exact for rows of one conversation each, and the fastest on CPU, where a mask costs more than the little padding
    that rows of like length need.
    """

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for index, row in enumerate(rows):
            ids[index, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            labels[index, : len(row["labels"])] = torch.tensor(row["labels"])
        labels[:, 0] = IGNORED  # nothing comes before it, and the engine counts labels to divide by
        return {"input_ids": ids, "labels": labels}


class CountingCollator:
    """Another collator, with what it collated counted."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self._inner(rows)
        batch[TOKENS] = sum(len(row["input_ids"]) for row in rows)
        batch[CONVERSATIONS] = sum(len(row["seq_lengths"]) for row in rows)
        return batch


class Engine(SFTTrainer):  # type: ignore[misc]  # nor is trl
    """See the module. `owner` is the run's callback: it publishes checkpoints and is told of evaluations."""

    owner: Any
    step_order: StepOrder
    counts: Counts
    own_head: bool
    """The loss is `head.loss_sum`."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.step_order

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.counts.tokens += inputs.pop(TOKENS)
        self.counts.conversations += inputs.pop(CONVERSATIONS)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self.own_head:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        bare = self.bare_model()
        targets = inputs["labels"][:, 1:]
        learned = targets != IGNORED
        with _autocast(self):
            hidden = bare.base_model(
                input_ids=inputs["input_ids"], position_ids=inputs.get("position_ids"), use_cache=False
            ).last_hidden_state
            loss, correct = head.loss_sum(
                hidden[:, :-1][learned], bare.get_output_embeddings().weight, targets[learned]
            )
        self.counts.correct += correct
        self.counts.learned += int(learned.sum())
        return loss / num_items_in_batch

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Called by the training loop when the callback has asked for it."""
        self.owner.evaluate(self)
        return {}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Called by the training loop when the callback has asked for it; the Trainer's own is not atomic."""
        self.owner.publish(self, resumable=True)

    def save_resume_state(self, folder: Path) -> None:
        """optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json."""
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))
        missing = [name for name in RESUME_FILES if not (folder / name).exists()]
        assert not missing, f"the engine saved no {missing}"

    def bare_model(self) -> Any:
        """The model without the wrappers of the engine."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)


def configure(resolved: Resolved, work_dir: Path) -> SFTConfig:
    """Our choices as the engine's arguments. Logging is at every step; what is reported is the callback's choice."""
    extra = resolved.model_extra or {}
    mixed = resolved.precision if resolved.master_weights == "fp32" else "none"
    config = SFTConfig(
        output_dir=str(work_dir / "engine"),
        per_device_train_batch_size=resolved.micro_batch_size,
        gradient_accumulation_steps=resolved.gradient_accumulation_steps,
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


def build(model: Any, tokenizer: Any, rows: list[Example], resolved: Resolved, work_dir: Path) -> Engine:
    """The engine with its data, optimizer settings and counting in place; callbacks are the caller's."""
    disable_progress_bars()
    dataset = _as_dataset(rows, resolved.max_seq_length)
    engine = Engine(
        model=model,
        args=configure(resolved, work_dir),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    for noisy in (PrinterCallback, ProgressCallback):
        engine.remove_callback(noisy)
    packed = any(len(row.lengths) > 1 for row in rows)
    if packed and not getattr(engine.data_collator, "padding_free", False):
        raise AssertionError("the engine turned padding-free batches off; packed conversations would see each other")
    engine.own_head = engine.args.device.type == "cpu" and head.is_plain(engine.bare_model())
    engine.data_collator = CountingCollator(
        PaddedCollator() if engine.own_head and not packed else engine.data_collator
    )
    engine.step_order = StepOrder([len(row.ids) for row in rows], resolved.batch_size, engine.args.data_seed)
    engine.counts = Counts()
    return engine


def add_callback(engine: Engine, callback: TrainerCallback) -> None:
    engine.owner = callback
    engine.add_callback(callback)


def evaluate(engine: Engine, rows: list[Example], should_stop: Callable[[], bool]) -> EvaluationResult | None:
    """Token-mean loss and accuracy over the rows, or None if `should_stop()` became true meanwhile.

    Padded batches with a mask, so that nothing depends on how the engine tells conversations apart; logits are made
    of the labelled positions only. Smaller batches are tried before memory counts as having run out: no choice that
    makes training fit would help here.
    """
    longest = max(len(row.ids) for row in rows)
    batch_tokens = EVALUATION_TOKENS
    while True:
        try:
            return _evaluate(engine, rows, batch_tokens, should_stop)
        except Exception as error:
            if not is_out_of_memory(error) or batch_tokens <= longest:
                raise
        batch_tokens //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _evaluate(
    engine: Engine, rows: list[Example], batch_tokens: int, should_stop: Callable[[], bool]
) -> EvaluationResult | None:
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
    return EvaluationResult(loss_sum / count, correct / count, count)


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


def _as_dataset(rows: list[Example], longest: int) -> Dataset:
    dataset = Dataset.from_dict(
        {
            "input_ids": [row.ids for row in rows],
            "labels": [row.labels for row in rows],
            "seq_lengths": [list(row.lengths) for row in rows],
        }
    )
    # Unsloth's GPU trainer keeps padding-free batches only for data that says it is cut already.
    dataset._unsloth_truncated_to = longest
    return dataset
