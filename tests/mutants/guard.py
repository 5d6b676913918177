"""A guard: where it stands, what is left of the code without it, and the check that must notice.

A text that is no longer in its file once is reported before anything runs: the list follows the code.
"""

from dataclasses import dataclass

from tests.mutants.checks import Check


@dataclass(frozen=True)
class Change:
    """One replacement in a copy of a file."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Guard:
    """Something that must be there. `changes` take it away."""

    name: str
    changes: tuple[Change, ...]
    check: Check


def guard(name: str, file: str, old: str, new: str, check: Check) -> Guard:
    return Guard(name, (Change(file, old, new),), check)
