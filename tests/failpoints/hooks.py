"""The functions that have an effect outside of the process, replaced by ones that pass a point first.

Files: `file_hooks`. Database: every COMMIT. Broker: every hint, every copy to a live stream, every request that
generators are asked and its cancellation. Object store: every key that is written, created or removed. Installed in a
forked child, never taken back.
"""

import sqlite3
from collections.abc import Callable
from typing import Any

import psycopg
import redis
import redis.asyncio
from celery import Celery
from kombu.exceptions import OperationalError as BrokerError
from redis.commands.core import AsyncScript
from sqlalchemy.engine.default import DefaultDialect

from shared.storage import StorageUnavailable
from shared.storage.keys import Keys
from tests.failpoints import file_hooks
from tests.failpoints.ledger import Ledger
from tests.failpoints.points import Points


def install(points: Points, ledger: Ledger) -> None:
    """Put everything in place for this process and its forked children."""
    file_hooks.install(points, ledger)
    _install_database(points, ledger)
    _install_broker(points)
    _install_object_store(points)


def _install_database(points: Points, ledger: Ledger) -> None:
    real = DefaultDialect.do_commit

    def lost(dialect: DefaultDialect, connection: Any) -> Callable[[], BaseException]:
        """The connection breaks, as when the server is killed; what was not committed is rolled back."""

        def make() -> BaseException:
            raw = getattr(connection, "driver_connection", connection)
            if isinstance(raw, psycopg.Connection):
                raw.close()
                return psycopg.OperationalError("server closed the connection unexpectedly")
            raw.rollback()
            return sqlite3.OperationalError("disk I/O error")

        return make

    def hooked(self: DefaultDialect, connection: Any) -> None:
        def perform() -> None:
            real(self, connection)
            ledger.committed()

        break_off = lost(self, connection)
        points.at(
            "commit",
            "",
            perform,
            errors={"database lost before": break_off},
            late_errors={"confirmation lost": break_off},
        )

    DefaultDialect.do_commit = hooked  # type: ignore[method-assign]


def _install_broker(points: Points) -> None:
    real_send, real_execute = Celery.send_task, redis.client.Pipeline.execute
    away = {"broker lost before": lambda: BrokerError("connection refused")}
    gone = {"broker lost before": lambda: redis.ConnectionError("connection refused")}

    def hooked_send(self: Celery, name: str, *args: Any, **kwargs: Any) -> Any:
        return points.at(
            "send",
            name,
            lambda: real_send(self, name, *args, **kwargs),
            errors=away,
            late_errors={"confirmation lost": away["broker lost before"]},
        )

    def hooked_execute(self: Any, *args: Any, **kwargs: Any) -> Any:
        return points.at(
            "publish",
            "",
            lambda: real_execute(self, *args, **kwargs),
            errors=gone,
            late_errors={"confirmation lost": gone["broker lost before"]},
        )

    real_script, real_async = AsyncScript.__call__, redis.asyncio.client.Pipeline.execute

    async def hooked_script(self: AsyncScript, *args: Any, **kwargs: Any) -> Any:
        return await points.at_async(
            "publish",
            "",
            lambda: real_script(self, *args, **kwargs),
            errors=gone,
            late_errors={"confirmation lost": gone["broker lost before"]},
        )

    async def hooked_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.is_transaction:  # a beat, of which each second has one
            return await real_async(self, *args, **kwargs)
        return await points.at_async(
            "publish",
            "",
            lambda: real_async(self, *args, **kwargs),
            errors=gone,
            late_errors={"confirmation lost": gone["broker lost before"]},
        )

    Celery.send_task = hooked_send  # type: ignore[method-assign]
    redis.client.Pipeline.execute = hooked_execute  # type: ignore[method-assign]
    AsyncScript.__call__ = hooked_script  # type: ignore[method-assign]
    redis.asyncio.client.Pipeline.execute = hooked_async  # type: ignore[method-assign]


def _install_object_store(points: Points) -> None:
    def away() -> BaseException:
        return StorageUnavailable("the object store can't be reached")

    def hook(name: str) -> None:
        real = getattr(Keys, name)

        def hooked(self: Keys, key: str, *args: Any, **kwargs: Any) -> Any:
            return points.at(
                f"{name} key",
                key,
                lambda: real(self, key, *args, **kwargs),
                errors={"store lost before": away},
                late_errors={"confirmation lost": away},
            )

        setattr(Keys, name, hooked)

    for name in ("write", "create", "remove"):
        hook(name)
