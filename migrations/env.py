"""Run by Alembic for every command. One migrator at a time: an advisory lock on PostgreSQL, one writer on SQLite."""

from alembic import context
from sqlalchemy import text

from shared.db import get_engine
from shared.models import Base

MIGRATION_LOCK = 0x0A_22EA1
"""Arbitrary, ours: the advisory lock that keeps two starting nodes from migrating at once."""


def run() -> None:
    """Apply what is missing in one transaction."""
    engine = context.config.attributes.get("engine") or get_engine()
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            render_as_batch=connection.dialect.name == "sqlite",
            compare_type=True,
            transactional_ddl=True,
        )
        with context.begin_transaction():
            context.run_migrations()


run()
