"""`anneal migrate`: the database's tables, brought up to date."""

import sys

from migrations import TableBusy, upgrade
from shared.db import get_engine


def migrate() -> None:
    """Apply what is missing. Safe to run twice, and by two at once. Exits with 1 if a table stays locked."""
    try:
        upgrade(get_engine())
    except TableBusy as error:
        sys.exit(f"error: {error}")
