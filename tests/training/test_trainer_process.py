"""The trainer as its supervisor sees it: a process, a pipe, signals, folders."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import MakeSpec
from tests.training.trainers import Outcome, TrainerProcess, run_process
from worker.training.checkpoint import MANIFEST, verify

pytestmark = pytest.mark.slow

STEPS = 7
CHOICES = {"max_steps": STEPS, "save_steps": 3, "warmup_steps": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_spec: MakeSpec, validation_file: Path) -> tuple[Path, Outcome]:
    """An undisturbed run of seven steps over 1.4 epochs, with validation."""
    folder = tmp_path_factory.mktemp("whole")
    spec = make_spec(folder, training=CHOICES, validation_file=str(validation_file))
    return folder, run_process(spec, folder)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, make_spec: MakeSpec) -> tuple[Path, Outcome]:
    """The same run, told to stop for a deploy once step 4 was reported."""
    folder = tmp_path_factory.mktemp("interrupted")
    trainer = TrainerProcess(make_spec(folder, training=CHOICES), folder)
    trainer.read_until(lambda message: message.type == "metrics" and message.step == 4)
    trainer.process.send_signal(signal.SIGTERM)
    return folder, trainer.finish()


def test_a_run_starts_reports_each_step_and_ends(whole: tuple[Path, Outcome]) -> None:
    _, outcome = whole
    assert outcome.status == 0, outcome.stderr[-3000:]
    kinds = [message.type for message in outcome.messages if message.type != "event"]
    step, both = ["metrics"], ["evaluation", "checkpoint"]
    assert kinds == ["started", *step * 3, *both, *step * 3, *both, *step, *both, "done"]
    assert [m.step for m in outcome.of("metrics")] == list(range(1, STEPS + 1))
    started = outcome.of("started")[0]
    assert (started.train_examples, started.validation_examples, started.first_step) == (40, 10, 1)
    assert started.resolved["chat_template"] == "chatml"
    assert started.device == "cpu"


def test_libraries_that_print_do_not_reach_the_protocol(whole: tuple[Path, Outcome]) -> None:
    _, outcome = whole
    assert "Unsloth" in outcome.stderr


def test_metrics_add_up(whole: tuple[Path, Outcome]) -> None:
    _, outcome = whole
    metrics = outcome.of("metrics")
    started = outcome.of("started")[0]
    assert metrics[4].tokens == started.train_tokens, "five steps of eight are one epoch of forty rows"
    assert metrics[4].epoch == pytest.approx(1.0)
    assert [m.learning_rate for m in metrics[:3]] == pytest.approx([0.0, 5e-4, 1e-3])
    assert metrics[-1].remaining_s < metrics[0].remaining_s
    assert all(m.tokens_per_second > 0 and m.samples_per_second > 0 for m in metrics)
    assert all(m.peak_memory_bytes > 50 * 2**20 for m in metrics)
    assert all(m.grad_norm > 0 for m in metrics)
    assert outcome.last.tokens == metrics[-1].tokens


def test_training_learns(whole: tuple[Path, Outcome]) -> None:
    _, outcome = whole
    losses = [e.eval_loss for e in outcome.of("evaluation")]
    assert losses[-1] < losses[0]


def test_every_checkpoint_is_whole_and_the_last_is_the_model(whole: tuple[Path, Outcome]) -> None:
    folder, outcome = whole
    for message in outcome.of("checkpoint"):
        manifest = verify(Path(message.path))
        assert (manifest.step, manifest.fence, manifest.job_id) == (message.step, 3, "ftjob-test")
        assert manifest.tokens == message.tokens
        assert manifest.resumable == (message.step < STEPS)
        assert ("optimizer.pt" in manifest.files) == manifest.resumable
        assert "training_args.bin" not in manifest.files
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["3", "6", "7"]


def test_the_saved_model_in_plain_transformers_equals_what_was_evaluated(
    whole: tuple[Path, Outcome], validation_file: Path
) -> None:
    folder, outcome = whole
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "7")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoints" / "7")
    assert model.dtype == torch.float32
    loss = count = 0.0
    for line in validation_file.read_text().splitlines():
        row = json.loads(line)
        question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        asked = tokenizer.encode(prompt, add_special_tokens=False)
        answer = tokenizer.encode(row["output"] + "<|im_end|>", add_special_tokens=False)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
        loss += torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    last = outcome.of("evaluation")[-1]
    assert last.eval_tokens == count
    assert loss / count == pytest.approx(last.eval_loss, abs=2e-3)  # bf16 products, batched differently


def test_a_deploy_leaves_a_resumable_checkpoint_of_the_running_step(interrupted: tuple[Path, Outcome]) -> None:
    _, outcome = interrupted
    assert outcome.status == 0
    assert (outcome.last.type, outcome.last.reason) == ("stopped", "interrupted")
    checkpoint = outcome.of("checkpoint")[-1]
    assert checkpoint.resumable
    assert checkpoint.step == outcome.last.step == outcome.of("metrics")[-1].step
    assert 4 <= checkpoint.step < STEPS


def test_a_resumed_run_ends_bit_equal_to_an_undisturbed_one(
    whole: tuple[Path, Outcome], interrupted: tuple[Path, Outcome], tmp_path: Path, make_spec: MakeSpec
) -> None:
    reference_folder, reference = whole
    checkpoint = interrupted[1].of("checkpoint")[-1]
    resumed = run_process(make_spec(tmp_path, training=CHOICES, resume_from=checkpoint.path), tmp_path)
    assert resumed.status == 0, resumed.stderr[-3000:]
    assert resumed.of("started")[0].first_step == checkpoint.step + 1
    told = {m.step: (m.loss, m.tokens) for m in [*interrupted[1].of("metrics"), *resumed.of("metrics")]}
    assert told == {m.step: (m.loss, m.tokens) for m in reference.of("metrics")}
    assert resumed.last.tokens == reference.last.tokens
    expected = load_file(reference_folder / "checkpoints" / "7" / "model.safetensors")
    found = load_file(tmp_path / "checkpoints" / "7" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_cancel_stops_at_once_and_publishes_nothing(tmp_path: Path, make_spec: MakeSpec) -> None:
    choices = {"max_steps": 100000, "save_steps": 100000}
    trainer = TrainerProcess(make_spec(tmp_path, training=choices), tmp_path)
    trainer.read_until(lambda message: message.type == "metrics" and message.step == 2)
    trainer.process.send_signal(signal.SIGUSR1)
    outcome = trainer.finish()
    assert outcome.status == 0
    assert (outcome.last.type, outcome.last.reason) == ("stopped", "cancelled")
    assert not outcome.of("checkpoint")
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_cancel_while_loading_stops_without_a_step(tmp_path: Path, make_spec: MakeSpec) -> None:
    trainer = TrainerProcess(make_spec(tmp_path, training={"max_steps": 3, "packing": "rows"}), tmp_path)
    while not (tmp_path / "work").exists():  # made once the handlers are in place, before the slow imports
        assert trainer.process.poll() is None, trainer.stderr()
        time.sleep(0.02)
    trainer.process.send_signal(signal.SIGUSR1)
    outcome = trainer.finish()
    assert outcome.status == 0
    assert [message.type for message in outcome.messages] == ["stopped"]
    assert outcome.last.step == 0


def test_a_manifest_names_what_supervisors_need(whole: tuple[Path, Outcome]) -> None:
    folder, _ = whole
    content = json.loads((folder / "checkpoints" / "3" / MANIFEST).read_text())
    assert content.keys() == {"job_id", "step", "fence", "base_model", "tokens", "resumable", "files"}
    assert content["files"]["model.safetensors"].keys() == {"size", "sha256"}
