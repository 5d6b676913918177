"""Conversations to tokens: what is trained on is what will be served."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from shared.training_data import Conversation, read_conversations
from tests.training.tiny_llama import SMOLLM2_TEMPLATE, write_jsonl
from worker.training import data, templates
from worker.training.failures import BadTemplate, BadTrainingFile

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
MULTI_TURN = (
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "\n\nhello you"},
    {"role": "user", "content": "printer 42?"},
    {"role": "assistant", "content": "broken"},
)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def text_of(example: data.Example, tokenizer: Any) -> str:
    return tokenizer.decode(example.ids)


def trained_text(example: data.Example, tokenizer: Any) -> str:
    return tokenizer.decode([label for label in example.labels if label != data.IGNORED])


@pytest.mark.parametrize("messages", [MULTI_TURN, ({"role": "system", "content": "be kind"}, *MULTI_TURN)])
def test_chatml_is_the_models_own_text(tokenizer: Any, messages: tuple[dict[str, str], ...]) -> None:
    template = templates.choose("chatml", tokenizer)
    assert template.source == SMOLLM2_TEMPLATE
    pieces = templates.segments(Conversation(messages), template, tokenizer)
    own = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False)
    assert "".join(piece.text for piece in pieces) == own
    assert (SYSTEM in own) == (messages[0]["role"] != "system")


def test_the_loss_is_taken_over_each_answer_and_its_end(tokenizer: Any) -> None:
    template = templates.choose("auto", tokenizer)
    example = data.render(Conversation(MULTI_TURN), template, tokenizer, "assistant")
    assert trained_text(example, tokenizer) == "\n\nhello you<|im_end|>broken<|im_end|>"
    assert example.labels[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_served_prompt_has_the_tokens_of_the_trained_one(tokenizer: Any) -> None:
    """Also when the answer begins with what the tokenizer would merge with the prompt's last newline."""
    template = templates.choose("auto", tokenizer)
    first = Conversation(MULTI_TURN[:2])
    example = data.render(first, template, tokenizer, "assistant")
    served = tokenizer.apply_chat_template([dict(MULTI_TURN[0])], add_generation_prompt=True, tokenize=False)
    prompt = tokenizer.encode(served, add_special_tokens=False)
    assert example.ids[: len(prompt)] == prompt
    assert example.labels[len(prompt) - 1] == data.IGNORED
    assert example.labels[len(prompt)] != data.IGNORED


def test_training_on_everything_labels_every_token(tokenizer: Any) -> None:
    template = templates.choose("auto", tokenizer)
    example = data.render(Conversation(MULTI_TURN), template, tokenizer, "all")
    assert example.labels == example.ids
    assert text_of(example, tokenizer) == tokenizer.apply_chat_template([dict(m) for m in MULTI_TURN], tokenize=False)


def test_alpaca_rows_become_the_alpaca_format(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"instruction": "reset", "input": "printer", "output": "done"},
        {"instruction": "hello", "input": "", "output": "thank you"},
    ]
    template = templates.choose("alpaca", tokenizer)
    paired, alone = (
        data.render(row, template, tokenizer, "assistant")
        for row in read_conversations(write_jsonl(tmp_path / "rows.jsonl", rows))
    )
    assert text_of(paired, tokenizer) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nreset\n\n### Input:\nprinter\n\n### Response:\ndone<|im_end|>"
    )
    assert text_of(alone, tokenizer) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nhello\n\n### Response:\nthank you<|im_end|>"
    )
    assert trained_text(paired, tokenizer) == "done<|im_end|>"


def test_the_alpaca_template_serves_the_prompts_it_trained(tokenizer: Any, tmp_path: Path) -> None:
    template = templates.choose("alpaca", tokenizer)
    row = {"instruction": "reset", "input": "printer", "output": "done"}
    [conversation] = read_conversations(write_jsonl(tmp_path / "rows.jsonl", [row]))
    trained = text_of(data.render(conversation, template, tokenizer, "assistant"), tokenizer)
    tokenizer_as_saved = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer_as_saved.chat_template = template.source
    served = tokenizer_as_saved.apply_chat_template(
        [{"role": "system", "content": "reset"}, {"role": "user", "content": "printer"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert trained == served + "done<|im_end|>"


def test_alpaca_takes_several_turns(tokenizer: Any) -> None:
    template = templates.choose("alpaca", tokenizer)
    example = data.render(Conversation(MULTI_TURN[2:] + MULTI_TURN[2:]), template, tokenizer, "assistant")
    assert trained_text(example, tokenizer) == "broken<|im_end|>broken<|im_end|>"
    assert text_of(example, tokenizer).count("### Response:\n") == 2


def test_llama3_is_refused_when_its_tokens_would_be_spelled_in_pieces(tokenizer: Any) -> None:
    with pytest.raises(BadTemplate, match=r"<\|eot_id\|> as single tokens") as refused:
        templates.choose("llama3", tokenizer)
    assert refused.value.param == "training.chat_template"


def test_llama3_is_used_by_a_tokenizer_that_knows_it(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_special_tokens({"additional_special_tokens": list(templates.LLAMA3_TOKENS)})
    template = templates.choose("llama3", tokenizer)
    example = data.render(Conversation(MULTI_TURN), template, tokenizer, "assistant")
    assert trained_text(example, tokenizer) == "hello you<|eot_id|>broken<|eot_id|>"
    assert text_of(example, tokenizer).startswith(
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
    )


def test_a_base_without_a_template_gets_one_its_tokenizer_can_spell(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = None
    assert templates.choose("auto", tokenizer).name == "chatml"


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.length }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {{ messages | length + 1 }}\n{% endif %}"
    )
    template = templates.choose("auto", tokenizer)
    with pytest.raises(BadTemplate, match="renders earlier turns differently"):
        data.render(Conversation(MULTI_TURN), template, tokenizer, "assistant")


def test_a_template_that_never_ends_a_turn_is_refused(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    template = templates.choose("auto", tokenizer)
    with pytest.raises(BadTemplate, match="would never stop"):
        data.render(Conversation(MULTI_TURN), template, tokenizer, "assistant")


def test_long_rows_are_cut_and_counted_and_those_without_an_answer_dropped(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "hello", "completion": "printer " * 200},
        {"prompt": "printer " * 200, "completion": "hello"},
        {"prompt": "hello", "completion": "hello"},
    ]
    template = templates.choose("auto", tokenizer)
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    examples = data.load_training(file, template, tokenizer, 100, "assistant")
    assert (examples.cut, examples.dropped, len(examples.rows)) == (2, 1, 2)
    assert [len(row.ids) <= 100 for row in examples.rows] == [True, True]


def test_a_file_with_nothing_left_to_learn_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "printer " * 200, "completion": "hello"}])
    with pytest.raises(BadTrainingFile, match=r"raise training\.max_seq_length"):
        data.load_training(file, templates.choose("auto", tokenizer), tokenizer, 64, "assistant")
