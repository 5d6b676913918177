"""A two-layer Llama with a small real tokenizer, and rows to train it on. Also what benchmarks on any machine use."""

import json
import random
from pathlib import Path
from typing import Any

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


def make_tiny_llama(folder: Path, **configuration: Any) -> Path:
    """config.json, model.safetensors and tokenizer files of a Llama that speaks ChatML."""
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
    choices = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**choices, **configuration}))
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder
