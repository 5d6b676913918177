"""`anneal worker generate`, except that it notes in the campaign's journal which requests it is given.

    python -m tests.campaign.generator

The engine, the model and the protocol are the product's own. The note is made here, in the process, so that the
product needs no switch for it: that a line was asked again after its result was recorded leaves no other trace.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from shared import logs
from shared.settings import get_settings
from tests.campaign.toy_trainer import JOURNAL
from worker.generation import loop
from worker.generation.mailbox import Delivery

FILE = "asked.jsonl"


@dataclass(frozen=True)
class Asked:
    """One request of a batch, as a generator took it."""

    request_id: str
    submitted_at: float
    """Seconds since 1970, by the broker's clock."""
    reader: str
    """Whoever asked: one name for each delivery of the task that runs batches."""
    text: str
    """The prompt, or the last message."""


def asked(folder: Path) -> list[Asked]:
    """What all generators noted. A request that one took over from another is there twice."""
    path = folder / FILE
    return [Asked(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    taken = Delivery.taken

    def noted(self: Delivery) -> None:
        if self.request.kind == "batch":
            _note(self)
        taken(self)

    Delivery.taken = noted  # type: ignore[method-assign]
    settings = get_settings()
    logs.configure(settings.log_level)
    loop.run(settings)


def _note(delivery: Delivery) -> None:
    body = delivery.request.body
    note = {
        "request_id": delivery.request.id,
        "submitted_at": int(delivery.entry_id.split(b"-")[0]) / 1000,
        "reader": delivery.request.replies,
        "text": body["prompt"] if "prompt" in body else body["messages"][-1]["content"],
    }
    path = f"{os.environ[JOURNAL]}/{FILE}"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, json.dumps(note).encode() + b"\n")  # one write: lines of two processes never mix
    os.close(descriptor)


if __name__ == "__main__":
    main()
