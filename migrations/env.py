"""Run by Alembic for every command. One migrator at a time: an advisory lock on PostgreSQL, one writer on SQLite."""

from alembic import context
from sqlalchemy import text

from shared.db import get_engine
from shared.models import Base

MIGRATION_LOCK = 0x0A_22EA1
"""Arbitrary, ours: the advisory lock that keeps two starting nodes from migrating at once."""
TABLE_LOCK_S = 3
"""How long a statement may stand in the queue for a table."""


def run() -> None:
    """Apply what is missing in one transaction."""
    engine = context.config.attributes.get("engine") or get_engine()
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # The other migrator may take long and is waited for; a table that is in use is not (see upgrade()).
            connection.execute(text("set local statement_timeout = 0"))
            connection.execute(text("set local lock_timeout = 0"))
            connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
            connection.execute(text(f"set local lock_timeout = '{TABLE_LOCK_S}s'"))
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
