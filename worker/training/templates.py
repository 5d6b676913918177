"""How a conversation becomes text, and which part of it is the assistant's. No torch here.

The rule, stated once: for each assistant message, what came before is rendered exactly as it will be when the tuned
model is asked (`add_generation_prompt`), and the answer is what the full rendering adds to that, up to and with the
token that ends the turn. So the prompt a model is served with is the prompt it was trained on, by construction, and
no template needs markers. A template that rewrites earlier turns breaks the rule and is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, Protocol

from shared.training_data import Conversation
from worker.training.failures import BadTemplate

PARAM = "training.chat_template"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

Name = Literal["chatml", "alpaca", "llama3", "base"]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: Any
    eos_token: str
    all_special_tokens: list[str]

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def encode(self, text: str, **options: Any) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text and whether the assistant wrote it."""

    text: str
    answer: bool


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template under its name; `source` is Jinja and is saved with the model."""

    name: Name
    source: str
    end_of_turn: str
    """The special token that ends an assistant's turn."""


def choose(asked: str, tokenizer: Tokenizer) -> Template:
    """The template for what the client asked for.

    `auto` is the base's own, or ChatML or Alpaca (whichever the tokenizer can spell) for a base without one.

    Raises:
        BadTemplate: the tokenizer would spell the template's special tokens in pieces.
    """
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    own_is_chatml = own is not None and CHATML_TOKENS[0] in own
    if asked == "auto":
        if own is not None:
            name: Name = "chatml" if own_is_chatml else "base"
            return Template(name, own, _end_of_turn(own, tokenizer))
        asked = "chatml" if not _pieces(tokenizer, CHATML_TOKENS) else "alpaca"
    if asked == "alpaca":
        return Template("alpaca", _bundled("alpaca"), tokenizer.eos_token)
    if asked == "llama3":
        _demand(tokenizer, "llama3", LLAMA3_TOKENS)
        return Template("llama3", _bundled("llama3"), "<|eot_id|>")
    _demand(tokenizer, "chatml", CHATML_TOKENS)
    return Template("chatml", own if own is not None and own_is_chatml else _bundled("chatml"), "<|im_end|>")


def segments(conversation: Conversation, template: Template, tokenizer: Tokenizer) -> Iterator[Segment]:
    """The conversation's text in order, split where the assistant begins and ends.

    Raises:
        BadTemplate: the template renders a turn differently once another follows it, or doesn't end turns.
    """
    messages = as_messages(conversation, template)
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:index], template, tokenizer, ask=True)
        full = _render(messages[: index + 1], template, tokenizer, ask=False)
        if not prompt.startswith(done) or not full.startswith(prompt):
            raise BadTemplate(
                "this chat template renders earlier turns differently once another follows them, so training would "
                "differ from serving; use training.chat_template chatml or alpaca, or single-turn rows",
                PARAM,
            )
        answer, tail = _split_tail(full[len(prompt) :], template)
        yield Segment(prompt[len(done) :], answer=False)
        yield Segment(answer, answer=True)
        done = full[: len(full) - len(tail)]
    if tail := full[len(done) :]:
        yield Segment(tail, answer=False)


def as_messages(conversation: Conversation, template: Template) -> list[dict[str, str]]:
    """The messages to render: under `alpaca`, Instruction is the system's message and Input the user's."""
    if template.name == "alpaca" and conversation.alpaca is not None:
        instruction, extra, output = conversation.alpaca
        question = [{"role": "user", "content": instruction}]
        if extra:
            question = [{"role": "system", "content": instruction}, {"role": "user", "content": extra}]
        return [*question, {"role": "assistant", "content": output}]
    return [dict(message) for message in conversation.messages]


def _render(messages: list[dict[str, str]], template: Template, tokenizer: Tokenizer, *, ask: bool) -> str:
    text = tokenizer.apply_chat_template(
        messages, chat_template=template.source, tokenize=False, add_generation_prompt=ask
    )
    assert isinstance(text, str)
    return text


def _split_tail(answer: str, template: Template) -> tuple[str, str]:
    """(answer with its end of turn, what the template writes after it)."""
    end = answer.rfind(template.end_of_turn)
    if end < 0 or answer[end + len(template.end_of_turn) :].strip():
        raise BadTemplate(
            f"this chat template does not end the assistant's turn with {template.end_of_turn!r}: a model trained "
            "with it would never stop; use training.chat_template chatml or alpaca",
            PARAM,
        )
    end += len(template.end_of_turn)
    return answer[:end], answer[end:]


def _end_of_turn(own: str, tokenizer: Tokenizer) -> str:
    """What the base's own template ends an assistant's turn with: the last special token of a short answer."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(probe, chat_template=own, tokenize=False).rstrip()
    for token in sorted({*tokenizer.all_special_tokens, *CHATML_TOKENS, *LLAMA3_TOKENS}, key=len, reverse=True):
        if text.endswith(token):
            return token
    return tokenizer.eos_token


def _demand(tokenizer: Tokenizer, name: str, tokens: tuple[str, ...]) -> None:
    pieces = _pieces(tokenizer, tokens)
    if pieces:
        raise BadTemplate(
            f"the chat template {name} needs {', '.join(pieces)} as single tokens, and this base model's tokenizer "
            "spells them in pieces; use training.chat_template auto or alpaca, or a base model of that family",
            PARAM,
        )


def _pieces(tokenizer: Tokenizer, tokens: tuple[str, ...]) -> list[str]:
    return [token for token in tokens if len(tokenizer.encode(token, add_special_tokens=False)) != 1]


def _bundled(name: str) -> str:
    return (resources.files("worker.training") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
