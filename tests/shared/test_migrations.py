"""The migrations and the tables say the same, on both databases."""

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

import migrations
from shared import db
from shared.models import Base


@pytest.mark.usefixtures("settings")
def test_migrated_tables_are_the_models() -> None:
    with db.get_engine().connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


@pytest.mark.usefixtures("settings")
def test_the_history_can_be_undone_and_done_again() -> None:
    engine = db.get_engine()
    command.downgrade(migrations.config(engine), "base")
    migrations.upgrade(engine)
    migrations.upgrade(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
