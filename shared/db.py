"""The engine and the transaction: one sync data layer for SQLite and PostgreSQL.

`transaction()` for anything that writes, `reading()` for anything that doesn't; the block's shape is the
transaction's. No I/O of any other kind happens inside one: a process stopped inside a SQLite transaction locks
everybody out.
"""

import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Connection, Engine, Float, create_engine, event, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DisconnectionError, InterfaceError, InternalError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from shared.settings import get_settings

SQLITE_SAFE_WAL = (3, 51, 3)
"""SQLite before this can corrupt a database when a write-ahead log is reset; older ones get a rollback journal."""
POOL: dict[str, Any] = {"pool_size": 20, "max_overflow": 40, "pool_use_lifo": True}
"""More than an API process has threads that may want one at once."""
PROBED_AFTER_S = 1.0
SQLITE_BUSY_TIMEOUT_S = 20
SQLITE_LOOK_EVERY_S = 0.002
SQLITE_CACHE_KIB = 256
"""Of each connection. SQLite's own 2 MiB fills as the database grows, times the connections of a pool: 15 MiB in half
an hour of load. The kernel caches the same pages once, and each write by another process empties this cache anyway."""
NETWORK_FILE_SYSTEMS = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "smbfs", "sshfs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs", "afs")
)

UNAVAILABLE = (OperationalError, InterfaceError, InternalError)
"""What a database that is away, starting, out of locks or read-only raises: the same write may succeed later.

InternalError is here for two of PostgreSQL's: a transaction it ended because its client stood still, and a standby
that refuses writes in the middle of a fail-over.
"""


class now(FunctionElement[float]):
    """The database's clock: seconds since 1970, as a double. Leases compare with this one, never with a host's."""

    type = Float()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: SQLCompiler, **kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"  # 3.40 has no unixepoch('subsec')


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: SQLCompiler, **kw: Any) -> str:
    return "extract(epoch from clock_timestamp())::float8"


def make_engine(url: str) -> Engine:
    """An engine with this project's rules on it.

    PostgreSQL: connections that were idle are probed before use, a dead peer is noticed by TCP within half a minute,
    statements wait 10 s for a lock at most, and a client that stands still inside a transaction loses it within a
    quarter of a lease, or a process that was stopped there would hold its rows beyond their lease. SQLite: one host
    only; the journal is chosen by version, writers queue in `BEGIN IMMEDIATE`.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        idle_ms = max(1000, round(get_settings().lease_s * 1000 / 4))
        engine = create_engine(
            url,
            **POOL,
            connect_args={
                "connect_timeout": 5,
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 30_000,  # what was sent and never acknowledged, which keepalives don't cover
                "options": "-c lock_timeout=10s -c statement_timeout=30s "
                f"-c idle_in_transaction_session_timeout={idle_ms}ms",
            },
        )
        event.listen(engine, "connect", _note_use)
        event.listen(engine, "checkin", _note_use)
        event.listen(engine, "checkout", partial(_probe, engine))
        return engine
    if parsed.database and parsed.database != ":memory:":
        folder = Path(parsed.database).absolute().parent
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_network(folder)
    engine = create_engine(url, **POOL, connect_args={"timeout": SQLITE_BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _note_use(_connection: Any, record: ConnectionPoolEntry) -> None:
    record.info["used_at"] = time.monotonic()


def _probe(engine: Engine, connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
    """Look whether a connection lives before it is used, unless it was a moment ago: a busy API would pay a round trip
    more for each request. Where the server goes away within that moment, those that come first are told so."""
    if time.monotonic() - record.info["used_at"] < PROBED_AFTER_S:
        return
    try:
        engine.dialect.do_ping(connection)
    except engine.dialect.loaded_dbapi.Error as error:
        raise DisconnectionError("the connection did not outlive its idleness") from error  # the pool makes another


def _refuse_network(folder: Path) -> None:
    """SQLite's locks don't hold between the clients of a network file system: two writers would corrupt the database.

    Raises:
        ValueError: the folder is on one.
    """
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    kind = next((mounts[place] for place in (folder, *folder.parents) if place in mounts), "")
    if kind.removeprefix("fuse.") in NETWORK_FILE_SYSTEMS:
        raise ValueError(
            f"{folder} is on a network file system ({kind}), where SQLite's locks don't hold; choose a local folder "
            "with ANNEAL_DATA, or PostgreSQL with ANNEAL_DATABASE_URL"
        )


def _configure_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN is deferred; ours is in _begin_sqlite
    wal = sqlite3.sqlite_version_info >= SQLITE_SAFE_WAL
    connection.execute(f"PRAGMA journal_mode={'WAL' if wal else 'DELETE'}")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute(f"PRAGMA cache_size=-{SQLITE_CACHE_KIB}")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    # Immediate, or two readers that both turn into writers would deadlock and one fail at once.
    if connection.get_execution_options().get("reading", False):
        connection.exec_driver_sql("BEGIN")
        return
    # SQLite itself would look again ever more seldom, at last ten times a second. A process whose threads write one
    # after the other frees the database for a tenth of a millisecond in between: a sweep waited for seconds.
    driver = connection.connection.dbapi_connection
    assert isinstance(driver, sqlite3.Connection)
    deadline = time.monotonic() + SQLITE_BUSY_TIMEOUT_S
    driver.execute("PRAGMA busy_timeout=0")
    try:
        while time.monotonic() < deadline:
            try:
                driver.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    break
            else:
                return
            time.sleep(random.uniform(0.5, 1.5) * SQLITE_LOOK_EVERY_S)  # noqa: S311 - so that two don't keep step
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # what SQLite says now, as an error of SQLAlchemy's
    finally:
        driver.execute(f"PRAGMA busy_timeout={SQLITE_BUSY_TIMEOUT_S * 1000}")


@lru_cache(maxsize=1)
def get_engine() -> Engine:
    """This process's engine. Made after a fork, never before: connections don't survive one."""
    return make_engine(get_settings().resolved_database_url)


@lru_cache(maxsize=1)
def _sessions() -> sessionmaker[Session]:
    return sessionmaker(get_engine(), expire_on_commit=False)


@lru_cache(maxsize=1)
def _reading_sessions() -> sessionmaker[Session]:
    engine = get_engine()
    if engine.dialect.name == "postgresql":
        # Each statement sees what is committed when it begins, as in a transaction there, but for two round trips less.
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    sessions = sessionmaker(engine.execution_options(reading=True), expire_on_commit=False)
    event.listen(sessions, "before_flush", _refuse_flush)
    return sessions


def _refuse_flush(*_: Any) -> None:
    raise AssertionError("a session of reading() was given something to write; use transaction()")


@contextmanager
def transaction() -> Iterator[Session]:
    """A session that commits when the block ends and rolls back when it raises."""
    with _turn(), _sessions().begin() as session:
        yield session


@contextmanager
def _turn() -> Iterator[None]:
    """SQLite: wait for the other threads of this process that write.

    SQLite has one writer, and those that wait for it sleep and look again, longer each time: of 16 threads some waited
    for more than a second while others wrote ten times. A lock wakes the next one at once; SQLite's own waiting is left
    to what it is needed for, other processes.
    """
    if get_engine().dialect.name != "sqlite":
        yield
        return
    if not _writer.lock.acquire(timeout=SQLITE_BUSY_TIMEOUT_S):
        raise OperationalError("BEGIN IMMEDIATE", None, sqlite3.OperationalError("database is locked"))
    try:
        yield
    finally:
        _writer.lock.release()


class _Writer:
    """Whose turn it is to write. A forked child begins with a lock that nobody holds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        os.register_at_fork(after_in_child=self._begin_again)

    def _begin_again(self) -> None:
        self.lock = threading.Lock()


_writer = _Writer()


@contextmanager
def reading() -> Iterator[Session]:
    """A session for reading: on SQLite it takes no write lock, on PostgreSQL it has no transaction."""
    with _reading_sessions()() as session:
        yield session


def clock(session: Session) -> float:
    """Seconds since 1970 by the database's clock."""
    return float(session.execute(select(now())).scalar_one())


def has_passed(session: Session, at: float | None) -> bool:
    """Whether an instant, such as a row's `expires_at`, lies behind us by the database's clock; None never does."""
    return at is not None and at <= clock(session)


def reset() -> None:
    """Forget the engine: after a fork, and between tests."""
    if get_engine.cache_info().currsize:
        get_engine().dispose(close=False)
    for cached in (get_engine, _sessions, _reading_sessions):
        cached.cache_clear()
