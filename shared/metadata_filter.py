"""Which jobs have a key of metadata with a value, whatever characters either holds."""

from sqlalchemy import ColumnElement, func, select

from shared.db import get_engine
from shared.models import Job


def has_metadata(key: str, value: str) -> ColumnElement[bool]:
    """A condition on jobs. Both are compared as data: a path such as `$."key"` can't name a key with a quote in it,
    nor, on SQLite, one that JSON writes with an escape."""
    name = "json_each_text" if get_engine().dialect.name == "postgresql" else "json_each"
    pairs = getattr(func, name)(Job.job_metadata).table_valued("key", "value")
    return select(1).where(pairs.c.key == key, pairs.c.value == value).exists()
