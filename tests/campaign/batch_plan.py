"""The batches of a campaign, drawn from its seed: what is in each file, and what must become of each line."""

import json
import random
from dataclasses import dataclass
from typing import Any

from tests.campaign.plan import BASE_MODEL

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MAX_CONTEXT_TOKENS = 1024
"""Of the tiny Llama that can be trained; the other model has a quarter. To either's tokenizer an x is a token."""
TOO_LONG = "context_length_exceeded"
BEHAVIOURS = (("finish", 60), ("cancel", 30), ("duplicate", 5), ("unknown_model", 5))
REFUSED = {"duplicate": "duplicate_custom_id", "unknown_model": "model_not_found"}
"""Why no line of such a batch is answered."""
TOO_LONG_SHARE = 0.1
"""Of the lines."""


@dataclass(frozen=True)
class LinePlan:
    """One request of a batch."""

    custom_id: str
    text: str
    """Its prompt. No other line of the campaign has the same."""
    is_too_long: bool


@dataclass(frozen=True)
class BatchPlan:
    """One batch as a client sends it, and what must become of it."""

    index: int
    behaviour: str
    endpoint: str
    lines: tuple[LinePlan, ...]
    max_tokens: int
    cancel_after_s: float | None
    """Between its creation and the client's wish to cancel it."""
    uses_key: bool
    """Its client makes sure with an Idempotency-Key that it is created once; otherwise it says that it tries again."""
    is_sent_in_parts: bool

    @property
    def allowed_ends(self) -> tuple[str, ...]:
        if self.behaviour in REFUSED:
            return ("failed",)
        return ("completed", "cancelled") if self.behaviour == "cancel" else ("completed",)

    @property
    def input_file(self) -> bytes:
        """JSONL, as the client uploads it."""
        rows = [json.dumps(self._row(line)) for line in self.lines]
        if self.behaviour == "duplicate":
            rows.append(rows[0])
        return "".join(row + "\n" for row in rows).encode()

    def _row(self, line: LinePlan) -> dict[str, Any]:
        model = "acme/unknown" if self.behaviour == "unknown_model" else BASE_MODEL
        body: dict[str, Any] = {"model": model, "max_tokens": self.max_tokens, "temperature": 0}
        if self.endpoint == CHAT:
            body["messages"] = [{"role": "user", "content": line.text}]
        else:
            body |= {"prompt": line.text, "echo": True}  # what comes back says whose answer it is
        return {"custom_id": line.custom_id, "method": "POST", "url": self.endpoint, "body": body}


def batch(seed: int, index: int) -> BatchPlan:
    """Batch number `index` of the campaign of that seed."""
    draw = random.Random(f"{seed}/batch/{index}")
    behaviour = draw.choices([name for name, _ in BEHAVIOURS], [weight for _, weight in BEHAVIOURS])[0]
    is_cancelled = behaviour == "cancel"
    # One that is to be cancelled must last: answers take some hundredths of a second.
    lines = tuple(
        _line(index, number, draw) for number in range(draw.randint(20, 60) if is_cancelled else draw.randint(1, 40))
    )
    return BatchPlan(
        index=index,
        behaviour=behaviour,
        endpoint=draw.choice((CHAT, COMPLETIONS)),
        lines=lines,
        max_tokens=draw.randint(1, 60),
        cancel_after_s=draw.uniform(0, 2) if is_cancelled else None,
        uses_key=draw.random() < 0.6,
        is_sent_in_parts=draw.random() < 0.2,
    )


def _line(batch_index: int, number: int, draw: random.Random) -> LinePlan:
    text = f"batch {batch_index} line {number} "
    is_too_long = draw.random() < TOO_LONG_SHARE
    text += "x" * (MAX_CONTEXT_TOKENS if is_too_long else draw.randint(0, 20))
    return LinePlan(f"b{batch_index}-{number}", text, is_too_long)
