"""SmolLM2's tokenizer, rebuilt from the vocabulary and merges that its GGUF file carries.

Owns the facts that a GGUF file leaves out or gets wrong for this family: which tokens are special, how text is cut
before byte-pair encoding, how ids become text again; and `load`, how every tokenizer of this service is read. Never
loads a model; imports torch and transformers in `load` only.

What a plain GGUF conversion gives instead, and what it costs: no digit splitting (every number gets ids the model
never saw), eos = bos (a tuned model never stops), byte fallback in the decoder (llama.cpp aborts on an export).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

UNKNOWN = "<|endoftext|>"
BEGIN = "<|im_start|>"
END = "<|im_end|>"
SPECIAL_IDS = range(17)
"""Ids 0 to 16 are control tokens: the three above and the markers of code repositories and notebooks."""
SPECIAL_TOKENS = {"unk_token": UNKNOWN, "bos_token": BEGIN, "eos_token": END, "pad_token": END}
EXPECTED_IDS = {UNKNOWN: 0, BEGIN: 1, END: 2}
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""The class that reads tokenizer.json as it is.

The hub's copy says GPT2Tokenizer, which transformers 5 rebuilds from vocabulary and merges alone: digit splitting is
lost and whitespace before a number ("\\n\\n1.", "x =  2") gets ids the model was not trained on.
See docs/decisions/0201-tokenizer-json-verbatim.md.
"""

SMOLLM2_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The model's own template, default system message included: it was tuned with it, and answers worse without."""


def load(folder: Path) -> Any:
    """The tokenizer of a model folder, exactly as its tokenizer.json says, whatever class the folder names.

    Returns:
        A transformers PreTrainedTokenizerFast, chat template included.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)


def build_smollm2(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """SmolLM2's tokenizer: single digits, then byte-level BPE.

    Args:
        tokens: the vocabulary, in the order of ids.
        merges: byte-pair merges, best first.

    Raises:
        ValueError: the control tokens aren't where SmolLM2 has them; this is another vocabulary.
    """
    for token, expected in EXPECTED_IDS.items():
        if tokens[expected] != token:
            raise ValueError(f"id {expected} is {tokens[expected]!r}, SmolLM2 has {token!r} there")
    tokenizer = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=list(merges),
            unk_token=UNKNOWN,
            byte_fallback=False,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tokens[index], special=True, normalized=False) for index in SPECIAL_IDS])
    return tokenizer


def save_smollm2(tokenizer: Tokenizer, folder: Path, context_length: int) -> None:
    """Write the three tokenizer files as the hub's repository has them: what transformers and TRL read."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        **SPECIAL_TOKENS,
        "add_prefix_space": False,
        "additional_special_tokens": [BEGIN, END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "tokenizer_class": TOKENIZER_CLASS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(SMOLLM2_CHAT_TEMPLATE, encoding="utf-8")
