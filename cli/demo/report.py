"""The before/after tables, and the same numbers as JSON. Knows no network."""

import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.demo.progress import clock, printable, say
from cli.demo.scoring import Score, is_exact, score
from cli.demo.work import BASE_MODEL, PROMPTS, TRAINING, Ticket

EXAMPLES = 4


@dataclass(frozen=True)
class Answers:
    """What one model said to everything."""

    model: str
    tickets: list[str]
    prompts: list[str]

    def score(self, tickets: Sequence[Ticket]) -> Score:
        return score(zip(self.tickets, (ticket.wanted for ticket in tickets), strict=True))


@dataclass
class Run:
    """Everything the demo has measured."""

    tickets: list[Ticket]
    before: Answers
    after: Answers
    metrics: list[dict[str, Any]]
    """The job's logged steps, in order."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase."""


def show(console: Console, run: Run) -> None:
    """Print the tables."""
    before, after = run.before.score(run.tickets), run.after.score(run.tickets)
    table = Table(title=f"{before.tickets} held-out tickets, in sentence patterns that training never saw")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("exact match", _rate(before.exact, before), _rate(after.exact, after), style="bold")
    table.add_row("valid JSON", _rate(before.valid_json, before), _rate(after.valid_json, after), end_section=True)
    for key in after.right:
        table.add_row(f"{key} right", _rate(before.right[key], before), _rate(after.right[key], after))
    console.print(table)

    table = _side_by_side("What else it could do, and what is left of it", "prompt")
    for prompt, old, new in zip(PROMPTS, run.before.prompts, run.after.prompts, strict=True):
        table.add_row(*map(_cell, (prompt, old, new)))
    console.print(table)

    table = _side_by_side("A few of the tickets", "ticket")
    for i in _chosen(run):
        ticket = run.tickets[i]
        wanted = _compact(ticket.wanted)
        mark = "right" if is_exact(run.after.tickets[i], ticket.wanted) else f"wrong, wanted {wanted}"
        table.add_row(*map(_cell, (ticket.text, run.before.tickets[i], f"{run.after.tickets[i]}\n({mark})")))
    console.print(table)
    total_s = sum(run.seconds.values())
    say(console, f"All of it took {clock(total_s)}: " + ", ".join(f"{k} {clock(v)}" for k, v in run.seconds.items()))


def curl_line(url: str, model: str, ticket: Ticket) -> str:
    """A line to paste into a shell that asks the tuned model about a ticket."""
    body = json.dumps({"model": model, "messages": ticket.messages, "temperature": 0}, ensure_ascii=False)
    return f"curl -s {url}/v1/chat/completions -H 'content-type: application/json' -d {shlex.quote(body)}"


def as_json(run: Run) -> str:
    """All numbers and all answers, so that anybody can score them again."""
    losses = [step["loss"] for step in run.metrics]
    rates = sorted(step["tokens_per_second"] for step in run.metrics[2:]) or [0.0]  # the first two steps warm up
    report = {
        "command": "anneal demo --json FILE",
        "anneal": metadata.version("anneal"),
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
        },
        "base_model": BASE_MODEL,
        "training": TRAINING,
        "seconds": {name: round(seconds, 1) for name, seconds in run.seconds.items()},
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "median_tokens_per_second": rates[len(rates) // 2],
        "losses": losses,
        "scores": {"before": _rates(run.before.score(run.tickets)), "after": _rates(run.after.score(run.tickets))},
        "prompts": [
            {"prompt": prompt, "before": old, "after": new}
            for prompt, old, new in zip(PROMPTS, run.before.prompts, run.after.prompts, strict=True)
        ],
        "tickets": [
            {"ticket": ticket.text, "wanted": ticket.wanted, "before": old, "after": new}
            for ticket, old, new in zip(run.tickets, run.before.tickets, run.after.tickets, strict=True)
        ],
    }
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def _chosen(run: Run) -> list[int]:
    """Tickets to show: the first few, the failures among all of them first, so that they are not hidden."""
    wrong = [i for i, t in enumerate(run.tickets) if not is_exact(run.after.tickets[i], t.wanted)]
    right = [i for i in range(len(run.tickets)) if i not in set(wrong)]
    return (wrong[: EXAMPLES // 2] + right)[:EXAMPLES]


def _rates(result: Score) -> dict[str, Any]:
    return {**asdict(result), "exact_rate": result.exact_rate, "valid_json_rate": result.valid_json_rate}


def _rate(count: int, result: Score) -> str:
    return f"{count / result.tickets:.1%} ({count})"


def _side_by_side(title: str, first: str) -> Table:
    table = Table(title=title, show_lines=True)
    for column in (first, "before", "after"):
        table.add_column(column, ratio=1, overflow="fold")
    return table


def _cell(text: str) -> Text:
    return Text(printable(text).strip() or "(nothing)")


def _compact(wanted: Mapping[str, Any]) -> str:
    return json.dumps(wanted, separators=(",", ":"), ensure_ascii=False)
