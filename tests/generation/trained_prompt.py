"""What the trainer makes of a conversation, up to where the assistant's next answer begins."""

from typing import Any

from shared.training_data import Conversation
from worker.training import templates
from worker.training.data import IGNORED, render

TURNS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2 = ?\n"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 1234 times 5678?"},
    ],
)


def trained_prompt(tokenizer: Any, messages: list[dict[str, str]], template: str = "auto") -> list[int]:
    """Token ids of the prompt, as a training row that goes on with an answer has them."""
    conversation = Conversation((*messages, {"role": "assistant", "content": "Yes."}))
    example = render(conversation, templates.choose(template, tokenizer), tokenizer, "assistant")
    answer = next(place for place in range(len(example.ids), 0, -1) if example.labels[place - 1] == IGNORED)
    return example.ids[:answer]
