"""`anneal migrate`: the database's tables, brought up to date."""

from migrations import upgrade
from shared.db import get_engine


def migrate() -> None:
    """Apply what is missing. Safe to run twice, and by two at once."""
    upgrade(get_engine())
