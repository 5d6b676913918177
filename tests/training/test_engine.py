"""What the engine computes: exact packing, exact micro-batches, the same model in memory and on disk."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

# isort: off
from worker.training import engine, model as models
# isort: on

import torch
from safetensors.torch import load_file, save_file

from shared.training_spec import Resolved
from tests.training.conftest import MakeSpec, Outcome
from tests.training.tiny_llama import write_jsonl
from worker.training import data, decoder, head, passes, resolve, step, templates
from worker.training.attention import MOST_QUERIES
from worker.training.operations import CpuOperations
from worker.training.parallel import Alone
from worker.training.resolve import Hardware
from worker.training.sharding import ShardedStepper
from worker.training.step import Abandoned, Stepper

CPU = Hardware("cpu", is_gpu=False, computes_bf16=False)


def build(
    make_spec: MakeSpec, folder: Path, rows: list[data.Example], **training: Any
) -> tuple[engine.Engine, Resolved]:
    """An engine in fp32, so that equal means equal and not equal within bf16."""
    spec = make_spec(folder, training={"max_steps": 1, "precision": "fp32", **training})
    base = Path(spec.base_model_dir)
    resolved = resolve.resolve(
        spec,
        CPU,
        lengths=[len(row.ids) for row in rows],
        longest=512,
        needs=models.needs(base),
        has_validation=False,
        chat_template="chatml",
    )
    loaded = models.load_model(
        base, CPU, max_seq_length=512, master_weights="fp32", gradient_checkpointing=resolved.gradient_checkpointing
    )
    return engine.build(loaded, models.load_tokenizer(base), rows, resolved, folder), resolved


def test_the_engine_tells_a_model_its_length_whoever_loaded_it(
    make_spec: MakeSpec, tmp_path: Path, tiny_base: Path, rows: list[data.Example]
) -> None:
    """A standby loads for another one, and a model in shards says none: Unsloth's trainer on GPUs believes it."""
    trainer, resolved = build(make_spec, tmp_path, rows)
    for length in (256, None):
        loaded = trainer.bare_model()
        loaded.max_seq_length = length
        again = engine.build(loaded, models.load_tokenizer(tiny_base), rows, resolved, tmp_path)
        assert again.bare_model().max_seq_length == resolved.max_seq_length == 512


class Owner:
    """Stands in for the run's callback."""

    shrunk = 0

    def is_cancelled(self) -> bool:
        return False

    def shrank(self) -> None:
        self.shrunk += 1


def gradients(trainer: engine.Engine, rows: list[data.Example], micro: int) -> dict[str, torch.Tensor]:
    """Gradients of one optimizer step over the rows, in passes of `micro`."""
    trainer.model.zero_grad()
    trainer.owner = Owner()
    trainer.pass_rows = micro
    if trainer.stepper is not None:
        trainer.stepper._most = micro
    trainer.training_step(trainer.model, rows)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("own", [True, False], ids=["own passes", "unsloth's"])
def test_packed_conversations_do_not_see_each_other(
    make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example], own: bool
) -> None:
    packed = data.pack(rows, data.plan_rows(rows, 512, seed=1))
    assert len(packed) < len(rows) / 3
    trainer, _ = build(make_spec, tmp_path, packed, packing="rows")
    if not own:
        trainer.stepper = None
    together, apart = gradients(trainer, packed, 1), gradients(trainer, rows, 1)
    for name, gradient in apart.items():
        assert torch.allclose(together[name], gradient, atol=1e-5), name


def test_our_passes_compute_what_the_engine_computes(
    make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example]
) -> None:
    trainer, _ = build(make_spec, tmp_path, rows)
    assert trainer.stepper is not None
    ours = gradients(trainer, rows[:8], 8)
    trainer.stepper = None
    theirs = gradients(trainer, rows[:8], 2)
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, atol=1e-6), name


def test_copies_that_are_made_when_needed_change_no_gradient(
    make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example]
) -> None:
    trainer, _ = build(make_spec, tmp_path, rows)
    model, found = trainer.bare_model(), []
    for recompute in (False, True):  # in 16 bits, where copies are made at all
        stepper = Stepper(model, torch.bfloat16, recompute=recompute, most=3)
        stepper.step(rows[:8], passes.count_learned(rows[:8]), lambda: False)
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert stepper.weights.open(stepper.weights.layers[0]).qkv.dtype == torch.bfloat16
    assert not isinstance(stepper.weights.layers[0].qkv, torch.Tensor)
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())


def test_the_masters_take_part_in_every_step(make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example]) -> None:
    """A change far below the last digit of the copies shows, and one that is undone is gone."""
    trainer, _ = build(make_spec, tmp_path, rows)
    model = trainer.bare_model().bfloat16().float()
    for recompute in (False, True):
        stepper = Stepper(model, torch.bfloat16, recompute=recompute, most=8)
        before = stepper.step(rows[:4], 1, lambda: False).loss
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                parameter.mul_(1 + 2**-11)
        assert stepper.step(rows[:4], 1, lambda: False).loss != before
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                parameter.copy_(parameter.div(1 + 2**-11).bfloat16())
        assert stepper.step(rows[:4], 1, lambda: False).loss == before


class Replayed(Stepper):
    """From its second pass on like a GPU's graphs: gradients are filled, and nothing of autograd runs."""

    def _pass(self, one: passes.Pass, scale: float, *, first: bool) -> tuple[Any, Any]:
        if not self.weights.gradients:
            return super()._pass(one, scale, first=first)
        for piece in self.weights.gradients:
            piece.fill_(0.5)
        return self._zero(), self._zero(torch.long)


def test_gradients_of_a_replayed_graph_are_the_models(
    make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example]
) -> None:
    trainer, _ = build(make_spec, tmp_path, rows)
    model, stepper = trainer.bare_model(), Replayed(trainer.bare_model(), torch.float32, recompute=False, most=8)
    stepper.step(rows[:4], 1, lambda: False)
    model.zero_grad()  # as the Trainer does after each step
    stepper.step(rows[:4], 1, lambda: False)
    assert all(p.grad is not None and p.grad.eq(0.5).all() for p in model.parameters())


def test_masters_may_have_several_number_formats(make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example]) -> None:
    """Unsloth keeps the norms of a 16-bit model in 32 bits on some GPUs."""
    trainer, _ = build(make_spec, tmp_path, rows)
    model = trainer.bare_model().to(torch.bfloat16)
    model.model.norm.float()
    Stepper(model, torch.bfloat16, recompute=False, most=8).step(rows[:4], 1, lambda: False)
    assert all(p.grad.dtype == p.dtype and p.grad.any() for p in model.parameters())


def test_a_cancel_is_obeyed_between_two_passes(make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example]) -> None:
    trainer, _ = build(make_spec, tmp_path, rows)
    asked: list[bool] = []
    stepper = Stepper(trainer.bare_model(), torch.float32, recompute=False, most=2)
    with pytest.raises(Abandoned):
        stepper.step(rows[:8], 1, lambda: asked.append(True) or len(asked) == 2)
    assert len(asked) == 2


class ShortOfMemory(Stepper):
    """Whose second pass runs out of memory on its way back, as long as something may be given up."""

    can_shrink = is_short = True
    error: Exception = torch.OutOfMemoryError("CUDA out of memory")

    def shrink(self) -> None:
        self.can_shrink = self.is_short = False

    def _pass(self, one: passes.Pass, scale: float, *, first: bool) -> tuple[Any, Any]:
        if self.is_short and not first:
            self.weights.leaves[0].grad = torch.ones_like(self.weights.leaves[0])  # half added up
            raise self.error
        return super()._pass(one, scale, first=first)

    def evaluate(self, rows: Any, most_tokens: int, should_stop: Any) -> Any:
        if self.is_short:
            raise self.error
        return super().evaluate(rows, most_tokens, should_stop)


def short_of_memory(trainer: engine.Engine) -> ShortOfMemory:
    trainer.owner = Owner()
    return ShortOfMemory(trainer.bare_model(), torch.float32, recompute=False, most=4)


def test_a_step_is_done_again_with_the_memory_that_made_it_faster(
    make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example]
) -> None:
    trainer, _ = build(make_spec, tmp_path, rows)
    expected, counts = gradients(trainer, rows[:8], micro=4), replace(trainer.counts)
    assert trainer.owner.shrunk == 0
    trainer.stepper, trainer.counts = short_of_memory(trainer), engine.Counts()
    found = gradients(trainer, rows[:8], micro=4)
    assert trainer.owner.shrunk == 1
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert trainer.counts == counts


@pytest.mark.parametrize("why", ["not memory", "nothing to give up", "not enough"])
def test_a_step_that_fails_for_good_fails_once(
    make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example], why: str
) -> None:
    trainer, _ = build(make_spec, tmp_path, rows)
    trainer.stepper = stepper = short_of_memory(trainer)
    shrunk: list[bool] = []
    stepper.shrink = lambda: shrunk.append(True)
    if why == "not memory":
        stepper.error = ValueError("a fault")
    if why == "nothing to give up":
        stepper.can_shrink = False
    with pytest.raises(type(stepper.error)):
        gradients(trainer, rows[:8], micro=4)
    assert len(shrunk) == (why == "not enough")
    assert trainer.owner.shrunk == 0, "nothing goes on"


def test_an_evaluation_takes_the_memory_that_makes_steps_faster_last(
    make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example]
) -> None:
    trainer, _ = build(make_spec, tmp_path, rows)
    expected = engine.evaluate(trainer, rows[:8], lambda: False)
    trainer.stepper = stepper = short_of_memory(trainer)
    assert engine.evaluate(trainer, rows[:8], lambda: False) == expected
    assert trainer.owner.shrunk == 1
    stepper.is_short = True
    with pytest.raises(torch.OutOfMemoryError):
        engine.evaluate(trainer, rows[:8], lambda: False)


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def conversations(prefix: int, lengths: list[int]) -> list[data.Example]:
    """Tokens that all begin with, not learned, then so many of their own, of which most are."""
    shared = torch.randint(3, 600, (prefix,)).tolist()
    found = []
    for number, length in enumerate(lengths):
        own = [3 + number, *torch.randint(3, 600, (length - 1,)).tolist()]
        found.append(data.Example(shared + own, [data.IGNORED] * (prefix + 2) + own[2:], (prefix + length,)))
    return found


@pytest.mark.parametrize(
    ("kind", "rope", "prefix", "lengths"),
    [
        *((kind, "default", 20, [5, 30, 31, 40]) for kind in ("llama", "mistral", "qwen2", "qwen3")),
        ("llama", "linear", 20, [5, 30, 31, 40]),
        ("llama", "llama3", 20, [5, 30, 31, 40]),
        ("qwen3", "default", MOST_QUERIES + 20, [5, 30, 31]),  # the long path, for what is shared
        ("qwen2", "llama3", 0, [5, MOST_QUERIES + 20, 2 * MOST_QUERIES + 9]),  # and for what is not
        ("llama", "default", MOST_QUERIES + 20, [5, MOST_QUERIES + 20]),  # and for both
    ],
)
def test_plain_decoders_are_computed_as_transformers_computes_them(
    kind: str, rope: str, prefix: int, lengths: list[int]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    rows = conversations(prefix, lengths)
    config = AutoConfig.for_model(
        kind,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        num_key_value_heads=2,
        vocab_size=600,
        tie_word_embeddings=kind == "llama",
        pad_token_id=2,
        max_position_embeddings=1024,
        rope_parameters=ROPES[rope],
    )
    config.sliding_window = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # norms are born as ones and biases as zeros, which hides where they are forgotten
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.02))
    assert decoder.is_plain(model)
    loss = sum(
        torch.nn.functional.cross_entropy(
            model(input_ids=torch.tensor([row.ids])).logits[0, :-1], torch.tensor(row.labels[1:]), reduction="sum"
        )
        for row in rows
    )
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    [one] = passes.plan(rows, len(rows))
    assert one.prefix == prefix
    in_shards = ShardedStepper(  # of which there is one
        model, torch.float32, Alone(), CpuOperations(), step.arguments_of, recompute=True, most=len(rows)
    )
    for stepper in (in_shards, Stepper(model, torch.float32, recompute=False, most=len(rows))):
        model.zero_grad()
        sums = stepper.step(rows, 1, lambda: False)
        assert sums.loss.item() == pytest.approx(loss.item(), rel=1e-6)
        for (name, parameter), gradient in zip(model.named_parameters(), wanted, strict=True):
            assert gradient.any(), name
            assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max()), name


def test_a_decoder_that_asks_for_more_is_not_plain() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "vocab_size": 64}
    for kind, more in (
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"attention_dropout": 0.1}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        ("mistral", {"sliding_window": 16}),
        ("mistral", {"sliding_window": 16, "layer_types": ["full_attention"]}),
        ("qwen3", {"sliding_window": 16, "layer_types": ["sliding_attention"]}),
        ("gemma", {"head_dim": 16}),
    ):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, **more), dtype=torch.float32)
        assert not decoder.is_plain(model), (kind, more)


def test_the_size_of_a_micro_batch_changes_no_gradient(
    make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example]
) -> None:
    trainer, _ = build(make_spec, tmp_path, rows)
    alone, pairs, at_once = (gradients(trainer, rows[:8], micro) for micro in (1, 2, 8))
    for name, gradient in alone.items():
        assert torch.allclose(gradient, pairs[name], atol=1e-6), name
        assert torch.allclose(gradient, at_once[name], atol=1e-6), name


@pytest.mark.parametrize("rows", [256, 3])
def test_the_head_computes_pytorchs_cross_entropy(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", rows)
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 64, requires_grad=True), torch.randn(400, 64, requires_grad=True)
    targets = torch.randint(400, (7,))
    logits = hidden @ weight.t()
    targets[0] = logits[0].argmax()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    wanted = torch.autograd.grad(expected / 3, (hidden, weight))
    loss, correct = head.loss_sum(hidden, weight, targets)
    (loss / 3).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert correct == (logits.argmax(-1) == targets).sum()
    assert torch.allclose(hidden.grad, wanted[0], atol=1e-5)
    assert torch.allclose(weight.grad, wanted[1], atol=1e-5)


def test_a_pass_without_anything_learned_has_gradients_of_zero(
    make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example]
) -> None:
    trainer, _ = build(make_spec, tmp_path, rows)
    nothing = [replace(row, labels=[data.IGNORED] * len(row.labels)) for row in rows[:2]]
    sums = Stepper(trainer.bare_model(), torch.float32, recompute=False, most=1).step(nothing, 1, lambda: False)
    assert (sums.loss, sums.correct) == (0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in trainer.bare_model().parameters())


def test_recomputed_activations_change_no_gradient(
    make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example]
) -> None:
    kept, _ = build(make_spec, tmp_path, rows, gradient_checkpointing=False)
    recomputed, _ = build(make_spec, tmp_path, rows, gradient_checkpointing="unsloth")
    one, other = gradients(kept, rows[:4], 2), gradients(recomputed, rows[:4], 2)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_a_step_holds_the_same_conversations_as_the_engines_own_order(rows: list[data.Example]) -> None:
    from accelerate.data_loader import SeedableRandomSampler

    ours = engine.StepOrder([len(row.ids) for row in rows], batch_size=8, seed=3407)
    own = SeedableRandomSampler(range(len(rows)), data_seed=3407)
    for epoch in range(2):
        ours.set_epoch(epoch)
        own.set_epoch(epoch)
        a, b = list(ours), list(own)
        assert a != b
        assert [set(a[i : i + 8]) for i in range(0, 40, 8)] == [set(b[i : i + 8]) for i in range(0, 40, 8)]


def test_evaluation_is_the_token_mean_over_all_rows(
    make_spec: MakeSpec, tmp_path: Path, rows: list[data.Example]
) -> None:
    trainer, _ = build(make_spec, tmp_path, rows)
    own, trainer.stepper = trainer.stepper, None
    theirs = engine.evaluate(trainer, rows, lambda: False)
    trainer.stepper = own
    result = engine.evaluate(trainer, rows, lambda: False)
    losses = []
    with torch.no_grad():
        for row in rows:
            logits = trainer.bare_model()(input_ids=torch.tensor([row.ids])).logits[0, :-1]
            found = torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="none")
            losses += [loss for loss, label in zip(found.tolist(), row.labels[1:], strict=True) if label >= 0]
    assert theirs is not None
    assert theirs.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert result is not None
    assert result.tokens == len(losses)
    assert result.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert 0 <= result.accuracy <= 1
    assert engine.evaluate(trainer, rows, lambda: True) is None


def test_saved_files_are_the_base_models_with_new_values(make_spec: MakeSpec, tmp_path: Path, tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = models.load_model(tiny_base, CPU, max_seq_length=512, master_weights="fp32", gradient_checkpointing=False)
    tokenizer = models.load_tokenizer(tiny_base)
    with torch.no_grad():
        loaded.model.embed_tokens.weight.add_(0.5)
    models.save_model(loaded, tiny_base, tmp_path, templates.choose("alpaca", tokenizer))
    base, saved = load_file(tiny_base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert base.keys() == saved.keys()
    ids = torch.tensor([[5, 6, 7]])
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, loaded(input_ids=ids).logits)
    assert "### Instruction:" in AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert (tmp_path / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()


def test_packed_training_counts_every_token_and_conversation(
    run_here: Callable[..., Outcome], make_spec: MakeSpec, tmp_path: Path
) -> None:
    training = {"packing": "rows", "batch_size": 2, "micro_batch_size": 1, "save_steps": 100}
    outcome = run_here(make_spec(tmp_path, training=training, n_epochs=1.0))
    assert outcome.status == 0, outcome.last
    started, metrics = outcome.of("started")[0], outcome.of("metrics")
    assert started.train_examples == 40
    assert started.resolved["packing"] == "rows"
    assert metrics[-1].tokens == started.train_tokens == outcome.last.tokens
    assert metrics[-1].epoch == pytest.approx(1.0)


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(
    run_here: Callable[..., Outcome], make_spec: MakeSpec, tmp_path: Path, tiny_base: Path
) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_base, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("inf"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    outcome = run_here(make_spec(tmp_path, base_model_dir=str(broken), training={"max_steps": 2}))
    assert outcome.status == 1
    assert (outcome.last.type, outcome.last.code) == ("error", "diverged")
    assert "step 1" in outcome.last.message
    assert "training.learning_rate" in outcome.last.message
    assert not outcome.of("checkpoint")


def test_a_step_without_a_gradient_ends_the_run(
    run_here: Callable[..., Outcome], make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder.Weights, "show_gradients", lambda self: None)
    outcome = run_here(make_spec(tmp_path, training={"max_steps": 3}))
    assert (outcome.status, outcome.last.code) == (1, "trainer_error")
    assert "the gradient of step 1 is zero" in outcome.last.message


def test_a_bad_row_is_named(run_here: Callable[..., Outcome], make_spec: MakeSpec, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    outcome = run_here(make_spec(tmp_path, training_file=str(bad)))
    assert (outcome.status, outcome.last.code, outcome.last.param) == (1, "invalid_training_file", "training_file")
    assert "Line 2" in outcome.last.message
    outcome = run_here(make_spec(tmp_path, validation_file=str(bad)))
    assert (outcome.last.code, outcome.last.param) == ("invalid_validation_file", "validation_file")


def test_a_template_the_base_cannot_spell_is_refused(
    run_here: Callable[..., Outcome], make_spec: MakeSpec, tmp_path: Path
) -> None:
    outcome = run_here(make_spec(tmp_path, training={"chat_template": "llama3"}))
    assert (outcome.status, outcome.last.code) == (1, "incompatible_chat_template")


def test_a_folder_that_is_no_model_is_refused(
    run_here: Callable[..., Outcome], make_spec: MakeSpec, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    outcome = run_here(make_spec(tmp_path, base_model_dir=str(tmp_path / "empty")))
    assert (outcome.status, outcome.last.code) == (1, "invalid_base_model")


def test_a_file_that_was_copied_in_part_is_named(
    run_here: Callable[..., Outcome], make_spec: MakeSpec, tiny_base: Path, tmp_path: Path
) -> None:
    half = shutil.copytree(tiny_base, tmp_path / "half")
    os.truncate(half / "model.safetensors", (half / "model.safetensors").stat().st_size // 2)
    error = run_here(make_spec(tmp_path, base_model_dir=str(half))).of("error")[0]
    assert error.code == "invalid_base_model"
    assert "base model half can't be read" in error.message and "copy it again" in error.message


def test_a_full_disk_ends_the_run_and_keeps_what_was_published(
    run_here: Callable[..., Outcome], make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    published = tmp_path / "checkpoints" / "1"
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(2**40, 2**40, 0) if published.exists() else usage(2**40, 0, 2**40)
    )
    outcome = run_here(make_spec(tmp_path, training={"max_steps": 3, "save_steps": 1}))
    assert (outcome.status, outcome.last.code) == (1, "disk_full")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_choices_that_are_probably_not_meant_are_warned_about(
    run_here: Callable[..., Outcome], make_spec: MakeSpec, tmp_path: Path
) -> None:
    long_row = {"prompt": "hello", "completion": "printer " * 400}
    file = write_jsonl(tmp_path / "rows.jsonl", [long_row, *({"prompt": "a", "completion": "b"} for _ in range(7))])
    training = {
        "max_steps": 1,
        "max_seq_length": 256,
        "master_weights": "bf16",
        "learning_rate": 2e-5,
    }
    outcome = run_here(make_spec(tmp_path, training_file=str(file), training=training))
    assert outcome.status == 0, outcome.last
    cut, rate = outcome.of("event")
    assert (cut.level, cut.data["cut"], cut.data["dropped"]) == ("warn", 1, 0)
    assert "bf16" in rate.message
    saved = load_file(tmp_path / "checkpoints" / "1" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("order", "step", "saves", "stops"),
    [("cancelled", 4, False, True), ("interrupted", 5, True, True), (None, 4, True, False), (None, 5, False, False)],
)
def test_what_the_end_of_a_step_decides(
    make_spec: MakeSpec, tmp_path: Path, order: str | None, step: int, saves: bool, stops: bool
) -> None:
    """A cancel publishes nothing even where a checkpoint was due; an interrupt publishes where none was."""
    from transformers import TrainerControl, TrainerState

    from worker.training.callbacks import RunCallback
    from worker.training.reporter import Reporter
    from worker.training.stopping import StopRequests

    spec = make_spec(tmp_path, training={"max_steps": 9, "save_steps": 4})
    resolved = resolve.resolve(
        spec,
        CPU,
        lengths=[100] * 40,
        longest=512,
        needs=models.needs(Path(spec.base_model_dir)),
        has_validation=False,
        chat_template="chatml",
    )
    asked = StopRequests(Reporter(2))
    if order is not None:
        setattr(asked, order, True)
    template = templates.Template("chatml", "", "<|im_end|>")
    callback = RunCallback(spec, resolved, template, [], Reporter(2), asked, first_step=1, tokens_before=0)
    control = TrainerControl()
    callback.on_step_end(None, TrainerState(global_step=step), control)
    assert (control.should_save, control.should_training_stop) == (saves, stops)
