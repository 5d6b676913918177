"""The database's history. `upgrade()` brings any database to the newest revision; safe to call at every start."""

import logging
import time
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
LOCK_TRIES = 20
LOCK_PAUSE_S = 1.0


class TableBusy(Exception):
    """A migration could not get a lock: somebody holds a table for long. Nothing was changed."""


def config(engine: Engine) -> Config:
    """Alembic's settings, without an ini file: the engine is ours."""
    settings = Config()
    settings.set_main_option("script_location", str(FOLDER))
    settings.set_main_option("path_separator", "os")
    settings.attributes["engine"] = engine
    return settings


def upgrade(engine: Engine, tries: int = LOCK_TRIES) -> None:
    """Bring the database of `engine` to the newest revision, all of it or nothing.

    A table's lock is waited for briefly and asked for again: a migration that stands in the queue for a lock blocks
    everybody behind it, readers too.

    Raises:
        TableBusy: no lock after `tries` times.
    """
    for left in reversed(range(tries)):
        try:
            command.upgrade(config(engine), "head")
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != "55P03":  # lock_not_available
                raise
            if not left:
                raise TableBusy(
                    "the migrations got no lock on a table: another session holds it. Find it in pg_stat_activity, "
                    "end it, and run `anneal migrate` again; nothing was changed"
                ) from error
            log.warning("a table is locked; the migrations try again in %.0f s", LOCK_PAUSE_S)
            time.sleep(LOCK_PAUSE_S)
        else:
            return
