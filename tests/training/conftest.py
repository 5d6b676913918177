"""A tiny Llama with a small real tokenizer, and ways to run the trainer on it: in a process of its own, or in ours."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shared.trainer_protocol import Message, parse
from shared.training_spec import TrainerSpec

# Unsloth patches what is imported after it, so it must come before the tests' own transformers.
os.environ.update(
    HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", CUDA_VISIBLE_DEVICES="", OMP_WAIT_POLICY="PASSIVE"
)

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["ticket", "printer", "invoice", "urgent", "password", "reset", "please", "broken", "the", "thank", "hello"]


def sentence(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(words))


def alpaca_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of varying length; every third has an input."""
    generator = random.Random(seed)
    return [
        {
            "instruction": sentence(generator, generator.randint(2, 12)),
            "input": sentence(generator, 4) if index % 3 == 0 else "",
            "output": sentence(generator, generator.randint(1, 30)),
        }
        for index in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json, model.safetensors and tokenizer files of a two-layer Llama that speaks ChatML."""
    import unsloth  # noqa: F401, I001
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    generator = random.Random(1)
    text = [sentence(generator, 12) + " user assistant system 0123456789\n\n" for _ in range(200)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    wrapped.chat_template = SMOLLM2_TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    )
    folder = tmp_path_factory.mktemp("base") / "tiny"
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def training_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", alpaca_rows(40))


@pytest.fixture(scope="session")
def validation_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "valid.jsonl", alpaca_rows(10, seed=9))


MakeSpec = Callable[..., TrainerSpec]


@pytest.fixture(scope="session")
def make_spec(tiny_base: Path, training_file: Path) -> MakeSpec:
    """A spec for a folder of its own; keywords replace its fields, `training` takes the client's choices."""

    def make(folder: Path, **fields: Any) -> TrainerSpec:
        values = {
            "job_id": "ftjob-test",
            "fence": 3,
            "base_model": "test/tiny",
            "base_model_dir": str(tiny_base),
            "training_file": str(training_file),
            "checkpoint_dir": str(folder / "checkpoints"),
            "work_dir": str(folder / "work"),
        }
        return TrainerSpec.model_validate({**values, **fields})

    return make


@dataclass
class Outcome:
    """What a trainer said and how it ended."""

    messages: list[Message]
    status: int
    stderr: str = ""

    def of(self, kind: str) -> list[Any]:
        return [message for message in self.messages if message.type == kind]

    @property
    def last(self) -> Any:
        return self.messages[-1]


class TrainerProcess:
    """`python -m worker.training` with its protocol on a pipe of its own."""

    def __init__(self, spec: TrainerSpec, folder: Path) -> None:
        reading, writing = os.pipe()
        self._stderr = (folder / "stderr").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "worker.training"],
            stdin=subprocess.PIPE,
            stdout=self._stderr,
            stderr=self._stderr,
            pass_fds=[writing],
            env={**os.environ, "ANNEAL_PROTOCOL_FD": str(writing), "ANNEAL_SUPERVISED_BY": str(os.getpid())},
        )
        os.close(writing)
        self._pipe = os.fdopen(reading, "rb")
        assert self.process.stdin is not None
        self.process.stdin.write(spec.model_dump_json().encode())
        self.process.stdin.close()
        self.messages: list[Message] = []

    def read_until(self, wanted: Callable[[Message], bool]) -> Message:
        for line in self._pipe:
            self.messages.append(parse(line))
            if wanted(self.messages[-1]):
                return self.messages[-1]
        raise AssertionError(f"the trainer ended first: {self.messages[-3:]}\n{self.stderr()[-3000:]}")

    def finish(self) -> Outcome:
        self.messages += [parse(line) for line in self._pipe]
        return Outcome(self.messages, self.process.wait(60), self.stderr())

    def stderr(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()


def run_process(spec: TrainerSpec, folder: Path) -> Outcome:
    return TrainerProcess(spec, folder).finish()


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainerSpec], Outcome]:
    """One attempt in this process: the same code without the cost of importing it again."""
    from worker.training.loop import Run
    from worker.training.reporter import Reporter
    from worker.training.stopping import StopRequests

    monkeypatch.chdir(Path.cwd())  # the trainer moves to its work_dir; go back afterwards

    def run(spec: TrainerSpec) -> Outcome:
        Path(spec.work_dir).mkdir(parents=True, exist_ok=True)
        said = Path(spec.work_dir) / "said.jsonl"
        with said.open("wb") as stream:
            reporter = Reporter(stream.fileno())
            status = Run(spec, reporter, StopRequests(reporter)).attempt()
        return Outcome([parse(line) for line in said.read_bytes().splitlines()], status)

    return run
