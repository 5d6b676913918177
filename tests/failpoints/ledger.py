"""What a power cut would take back: bytes and folder entries that were written and not synced since.

The rule it checks: whatever a committed row names, and whatever a trainer reports as published, was synced before,
file by file and folder by folder up to the data folder. A page cache forgives a missing fsync for ever; this does not.
"""

# ruff: noqa: PTH110, PTH112, PTH116, PTH118

import os
from collections.abc import Callable
from pathlib import Path

Identity = tuple[int, int]


class Ledger:
    """The debts of one process and of the one it was forked from."""

    def __init__(self, root: Path, record: Callable[[str], None], named_paths: Callable[[], set[str]]) -> None:
        """
        Args:
            record: takes a sentence about every debt found.
            named_paths: files that committed rows name now.
        """
        self._root = root.resolve()
        self._record = record
        self._named_paths = named_paths
        self._contents: set[Identity] = set()
        self._entries: dict[Identity, set[str]] = {}
        self._seen: set[str] = set()
        self._told: set[str] = set()

    def content_changed(self, path: str) -> None:
        if (identity := _identity(path)) is not None:
            self._contents.add(identity)

    def entry_changed(self, path: str) -> None:
        """`path` was created or renamed to: its folder must be synced for it to be found again."""
        folder, name = os.path.split(path)
        if (identity := _identity(folder)) is not None:
            self._entries.setdefault(identity, set()).add(name)

    def synced(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino)
        self._contents.discard(identity)
        self._entries.pop(identity, None)

    def committed(self) -> None:
        """A transaction has committed: whatever rows name now must be on disk."""
        for path in sorted(self._named_paths() - self._seen):
            self._seen.add(path)
            if os.path.isdir(path):
                self.demand_tree(path, "is named by a committed row")
            elif os.path.exists(path):
                self._demand(path, "is named by a committed row")

    def demand_tree(self, folder: str, why: str) -> None:
        """A folder and everything in it."""
        self._demand(folder, why)
        for parent, folders, names in os.walk(folder):
            for name in (*folders, *names):
                self._demand(os.path.join(parent, name), why)

    def _demand(self, path: str, why: str) -> None:
        if _identity(path) in self._contents:
            self._tell(f"{os.path.relpath(path, self._root)} {why}, but its bytes are not synced")
        place = Path(path)
        while place != self._root and place.is_relative_to(self._root):
            if place.name in self._entries.get(_identity(str(place.parent)) or (0, 0), ()):
                entry = os.path.relpath(place, self._root)
                self._tell(f"{entry} {why} or something in it is, but its folder is not synced: a power cut removes it")
            place = place.parent

    def _tell(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            self._record(sentence)


def _identity(path: str) -> Identity | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
