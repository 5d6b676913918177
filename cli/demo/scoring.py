"""What counts as a right answer. Pure functions: no network, no printing.

An answer is right when, parsed as JSON, it is exactly the object wanted: the same keys, values and types. Nothing is
repaired first: no fences are cut off, no text around the object is forgiven, because a program that reads the answers
would not forgive it either. The same rule holds for both models.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


def parsed(answer: str) -> dict[str, Any] | None:
    """The JSON object that `answer` is; None if it is anything else."""
    try:
        value = json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_exact(answer: str, wanted: Mapping[str, Any]) -> bool:
    """Whether `answer` is the object wanted, no more and no less."""
    found = parsed(answer)
    return found is not None and found.keys() == wanted.keys() and all(_same(found[k], wanted[k]) for k in wanted)


def _same(found: Any, wanted: Any) -> bool:
    return type(found) is type(wanted) and bool(found == wanted)  # to Python, 1 == True


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True)
class Score:
    """One model's result on the held-out tickets. Counts of tickets."""

    tickets: int
    exact: int
    valid_json: int
    right: Mapping[str, int]
    """Of each key wanted: how many answers have it right, whatever the rest of the answer is."""

    @property
    def exact_rate(self) -> float:
        return self.exact / self.tickets

    @property
    def valid_json_rate(self) -> float:
        return self.valid_json / self.tickets


def score(results: Iterable[tuple[str, Mapping[str, Any]]]) -> Score:
    """Count over (answer, wanted) pairs, whose wanted objects have the same keys.

    Raises:
        ValueError: there are none.
    """
    pairs = list(results)
    if not pairs:
        raise ValueError("no answers to score; the test file needs at least one ticket")
    found = [(parsed(answer) or {}, wanted) for answer, wanted in pairs]
    return Score(
        tickets=len(pairs),
        exact=sum(is_exact(answer, wanted) for answer, wanted in pairs),
        valid_json=sum(parsed(answer) is not None for answer, _ in pairs),
        right={key: sum(key in got and _same(got[key], wanted[key]) for got, wanted in found) for key in pairs[0][1]},
    )
