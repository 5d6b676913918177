"""Progress on a terminal as a bar, anywhere else (a pipe, a CI log) as a line now and then."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_EVERY_S = 10.0


class Update(Protocol):
    """Called with how much is done and a few words on it."""

    def __call__(self, done: int, detail: str = "") -> None: ...


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Update]:
    """Show progress towards `total` while the block runs."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(28), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, TextColumn("{task.fields[detail]}"), console=console) as bar:
            task = bar.add_task(title, total=total, detail="")

            def move(done: int, detail: str = "") -> None:
                bar.update(task, completed=done, detail=detail)

            yield move
        return
    printed_at = float("-inf")

    def line(done: int, detail: str = "") -> None:
        nonlocal printed_at
        now = time.monotonic()
        if done < total and now - printed_at < LINE_EVERY_S:
            return
        printed_at = now
        say(console, f"{title} {done}/{total} {detail}".rstrip())

    yield line


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: nothing in it is markup, and it is not broken to fit."""
    console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Without control characters: a model's answer must not steer the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def clock(seconds: float) -> str:
    """`2:05`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02d}"
