"""The migrations and the tables say the same, on both databases."""

from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.schema import CreateIndex

import migrations
from shared import db
from shared.models import Base


def differences(connection: Connection) -> list[Any]:
    context = MigrationContext.configure(connection, opts={"compare_type": True})
    found = compare_metadata(context, Base.metadata)
    if connection.dialect.name != "sqlite":
        return found
    # Reflected, an index of SQLite's has lost the directions of its columns: its statement has them.
    statements = dict(connection.execute(text("select name, sql from sqlite_master")).tuples().all())
    indexes = {index.name: index for table in Base.metadata.tables.values() for index in table.indexes}
    same = {n for n, i in indexes.items() if str(CreateIndex(i).compile(connection)).strip() == statements.get(n)}
    return [change for change in found if change[0] not in ("add_index", "remove_index") or change[1].name not in same]


@pytest.mark.usefixtures("settings")
def test_migrated_tables_are_the_models() -> None:
    with db.get_engine().connect() as connection:
        assert differences(connection) == []


@pytest.mark.usefixtures("settings")
def test_the_history_can_be_undone_and_done_again() -> None:
    engine = db.get_engine()
    command.downgrade(migrations.config(engine), "base")
    migrations.upgrade(engine)
    migrations.upgrade(engine)
    with engine.connect() as connection:
        assert differences(connection) == []
