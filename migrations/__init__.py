"""The database's history. `upgrade()` brings any database to the newest revision; safe to call at every start."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine

FOLDER = Path(__file__).parent


def config(engine: Engine) -> Config:
    """Alembic's settings, without an ini file: the engine is ours."""
    settings = Config()
    settings.set_main_option("script_location", str(FOLDER))
    settings.set_main_option("path_separator", "os")
    settings.attributes["engine"] = engine
    return settings


def upgrade(engine: Engine) -> None:
    """Bring the database of `engine` to the newest revision."""
    command.upgrade(config(engine), "head")
