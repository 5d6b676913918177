"""The database going away, coming back, and being migrated while it is in use."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import psutil
import psycopg
import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import make_url

import migrations
from shared import db
from shared.models import File
from shared.settings import Settings, get_settings
from tests.campaign.postgres import Postgres
from tests.rows import file_row


def start(server: Postgres) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(server.command, user=server.user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server.wait_until_ready()
    return process


def test_a_pool_survives_the_kill_and_restart_of_postgresql() -> None:
    folder = Path(tempfile.mkdtemp(prefix="anneal-pg-"))
    server = Postgres(folder)
    process = start(server)
    try:
        server.create_database()
        engine = db.make_engine(server.url)
        with engine.begin() as connection:
            connection.execute(text("create table t (n int)"))
        with pytest.raises(db.UNAVAILABLE), engine.begin() as connection:
            connection.execute(text("insert into t values (1)"))
            process.kill()
            for _ in range(100):  # its children notice within moments
                connection.execute(text("select 1"))
                time.sleep(0.1)
        process.wait()
        with pytest.raises(db.UNAVAILABLE), engine.begin():
            pass
        process = start(server)
        with engine.begin() as connection:
            assert connection.execute(text("select count(*) from t")).scalar_one() == 0, "not committed, so gone"
        engine.dispose()
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def end_backends(url: str, *, of: str) -> None:
    admin = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity "
            "where datname = %s and pid != pg_backend_pid()",
            (of,),
        )


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_connection_that_was_idle_is_probed_and_one_just_used_is_not(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = db.get_engine()
    probes: list[object] = []
    ping = engine.dialect.do_ping
    monkeypatch.setattr(engine.dialect, "do_ping", lambda connection: (probes.append(connection), ping(connection))[1])
    name = make_url(settings.resolved_database_url).database
    assert name is not None
    for _ in range(3):
        with db.reading() as session:
            assert db.clock(session) > 0
    assert probes == []
    monkeypatch.setattr(db, "PROBED_AFTER_S", 0.0)
    end_backends(settings.resolved_database_url, of=name)
    with db.transaction() as session:  # notices, and gets another
        assert db.clock(session) > 0
    assert probes


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_connection_that_dies_right_after_login_is_an_outage_like_any_other(settings: Settings) -> None:
    url = settings.resolved_database_url
    engine = db.make_engine(url)
    event.listen(engine, "connect", lambda *_: end_backends(url, of=make_url(url).database or ""))
    with pytest.raises(db.UNAVAILABLE), engine.connect() as connection:
        connection.execute(text("select 1"))
    engine.dispose()


def test_reading_takes_no_transaction_on_postgresql_and_writes_nothing_anywhere(settings: Settings) -> None:
    with db.reading() as session:
        assert db.clock(session) > 0
        if settings.resolved_database_url.startswith("postgresql"):
            state = text("select state from pg_stat_activity where pid = :pid")
            backend = session.scalar(text("select pg_backend_pid()"))
            with db.transaction() as other:
                assert other.scalar(state, {"pid": backend}) == "idle"
    with pytest.raises(AssertionError, match="use transaction"), db.reading() as session:
        file_row(session, "file-1")
        session.flush()
    with db.reading() as session:
        assert session.get(File, "file-1") is None


def test_a_client_that_stands_still_inside_a_transaction_loses_its_locks(
    postgres: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANNEAL_LEASE_S", "4")
    monkeypatch.setenv("ANNEAL_HEARTBEAT_S", "1")
    get_settings.cache_clear()
    engine = db.make_engine(postgres("postgres"))
    get_settings.cache_clear()
    with pytest.raises(db.UNAVAILABLE), engine.begin() as connection:
        connection.execute(text("select 1"))
        time.sleep(1.5)  # a quarter of the lease is one second
        connection.execute(text("select 1"))
    engine.dispose()


def test_a_migration_does_not_stand_in_line_for_a_busy_table(
    postgres: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = postgres("postgres").replace("postgresql+psycopg://", "postgresql://", 1)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute("create database busy template anneal_template")
    engine = db.make_engine(postgres("busy"))
    from alembic import command

    command.downgrade(migrations.config(engine), "0001")
    monkeypatch.setattr(migrations, "LOCK_PAUSE_S", 0.1)
    holder = psycopg.connect(admin, dbname="busy")
    try:
        holder.execute("lock table jobs in access share mode")
        began = time.monotonic()
        with pytest.raises(migrations.TableBusy, match="pg_stat_activity"):
            migrations.upgrade(engine, tries=1)
        assert time.monotonic() - began < 8
        waiting = threading.Timer(1, holder.rollback)
        waiting.start()
        migrations.upgrade(engine, tries=5)
        waiting.join()
    finally:
        holder.close()
        engine.dispose()


def test_two_nodes_that_migrate_at_once_both_succeed(postgres: Callable[[str], str]) -> None:
    admin = postgres("postgres").replace("postgresql+psycopg://", "postgresql://", 1)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute("create database fresh")
    environment = {**os.environ, "ANNEAL_DATABASE_URL": postgres("fresh")}
    command = [sys.executable, "-m", "cli.main", "migrate"]
    nodes = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [node.wait(60) for node in nodes] == [0, 0, 0]


def test_sqlites_journal_follows_its_version(tmp_path: Path) -> None:
    engine = db.make_engine(f"sqlite:///{tmp_path / 'a.db'}")
    with engine.connect() as connection:
        mode = connection.execute(text("pragma journal_mode")).scalar_one()
        synchronous = connection.execute(text("pragma synchronous")).scalar_one()
    engine.dispose()
    assert mode == ("wal" if sqlite3.sqlite_version_info >= (3, 51, 3) else "delete")
    assert synchronous == 2, "FULL"


@pytest.mark.parametrize(("version", "mode"), [((3, 51, 2), "delete"), ((3, 51, 3), "wal"), ((3, 40, 1), "delete")])
def test_a_write_ahead_log_is_used_only_where_it_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], mode: str
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    engine = db.make_engine(f"sqlite:///{tmp_path / 'a.db'}")
    with engine.connect() as connection:
        assert connection.execute(text("pragma journal_mode")).scalar_one() == mode
    engine.dispose()


def test_sqlite_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = namedtuple("mount", "mountpoint fstype")
    mounts = [mount("/", "ext4"), mount(str(tmp_path / "share"), "nfs4")]  # mounting a real one takes a server
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    with pytest.raises(ValueError, match=r"network file system \(nfs4\).*ANNEAL_DATABASE_URL"):
        db.make_engine(f"sqlite:///{tmp_path / 'share' / 'deep' / 'a.db'}")
    db.make_engine(f"sqlite:///{tmp_path / 'a.db'}").dispose()


def test_leases_and_passes_use_the_databases_clock(settings: Settings) -> None:
    with db.reading() as session:
        first = db.clock(session)
        time.sleep(0.05)
        second = db.clock(session)
    assert 0.01 < second - first < 5
    assert abs(second - time.time()) < 60


BUSY = """
import threading, time
from sqlalchemy import text
from shared import db

def write():
    while True:
        with db.transaction() as session:
            session.execute(text("UPDATE sweeps SET last_pass_at = last_pass_at + 1"))
            time.sleep(0.004)

for _ in range(4):
    threading.Thread(target=write, daemon=True).start()
time.sleep(0.5)
print("writing", flush=True)
input()
"""


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_process_whose_threads_write_all_the_time_starves_no_other(settings: Settings) -> None:
    busy = subprocess.Popen((sys.executable, "-c", BUSY), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    waits_s = []
    try:
        assert busy.stdout is not None
        assert busy.stdout.readline() == b"writing\n"
        for _ in range(20):
            began = time.monotonic()
            with db.transaction() as session:
                session.execute(text("UPDATE sweeps SET last_pass_at = last_pass_at"))
            waits_s.append(time.monotonic() - began)
            time.sleep(0.05)
    finally:
        busy.kill()
        busy.wait()
    assert sum(waits_s) / len(waits_s) < 0.5
