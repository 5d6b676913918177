"""One real service for all behaviours, and the official clients on a wire to it."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob

from tests.conftest import TEMPLATE
from tests.integration.test_up import KEY, Up
from tests.sdk.data import SHORT, TINY, chat_rows, jsonl, make_models
from tests.sdk.runs import Runs
from tests.sdk.wire import Wire
from tests.waiting import LIMIT_S

MAX_UPLOAD_BYTES = 16 * 2**20
SETTINGS = {
    "ANNEAL_MAX_UPLOAD_BYTES": str(MAX_UPLOAD_BYTES),
    "ANNEAL_TRAINER_SILENT_S": "3600",  # the held trainer stands still on purpose
    "ANNEAL_TRAINER_STOP_S": "3",
    "ANNEAL_DEPLOY_STOP_S": "10",
    "ANNEAL_POLL_S": "0.2",
    "ANNEAL_LOG_LEVEL": "warning",
}
_numbers = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def database(request: pytest.FixtureRequest) -> None:
    """`make test-sdk DATABASE=postgresql`; SQLite if nothing is said."""
    if os.environ.get("SDK_DATABASE", "sqlite") == "postgresql":
        SETTINGS["ANNEAL_DATABASE_URL"] = request.getfixturevalue("postgres")(TEMPLATE)


@pytest.fixture(scope="session")
def service(database: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """`anneal up` with a small base model beside SmolLM2."""
    folder = tmp_path_factory.mktemp("sdk")
    make_models(folder / "models")
    up = Up(folder / "data", ANNEAL_MODELS_DIR=str(folder / "models"), **SETTINGS).ready()
    yield up
    up.family()
    assert up.stop(signal.SIGTERM) == 0
    assert up.survivors() == []


@pytest.fixture(scope="session", autouse=True)
def runs(service: Up) -> Iterator[Runs]:
    """What trains in the background; before every test, so that its jobs are the oldest."""
    wire = Wire(service.url)
    runs = Runs(openai(wire.url), service)
    runs.start()
    yield runs
    runs.end()
    wire.judge()
    wire.close()


@pytest.fixture(scope="session")
def _wire(service: Up) -> Iterator[Wire]:
    wire = Wire(service.url)
    yield wire
    wire.close()


@pytest.fixture(autouse=True)
def wire(_wire: Wire) -> Iterator[Wire]:
    """The wire to the service. After each test every answer it carried must have been OpenAI's, in form."""
    yield _wire
    _wire.judge()


def openai(url: str, **choices: Any) -> OpenAI:
    """A client as a user makes it: nothing but the address and the key is changed."""
    return OpenAI(base_url=url, **{"api_key": KEY} | choices)


@pytest.fixture(scope="session")
def client(_wire: Wire) -> Iterator[OpenAI]:
    with openai(_wire.url) as client:
        yield client


@pytest.fixture
def async_client(_wire: Wire) -> AsyncOpenAI:
    """For one event loop; close it there."""
    return AsyncOpenAI(base_url=_wire.url, api_key=KEY)


Upload = Callable[..., FileObject]
CreateJob = Callable[..., FineTuningJob]


@pytest.fixture(scope="session")
def upload(client: OpenAI) -> Upload:
    """Upload a training file of its own name."""

    def upload(content: bytes | None = None, purpose: Any = "fine-tune", **choices: Any) -> FileObject:
        name = f"rows-{next(_numbers)}.jsonl"
        content = jsonl(chat_rows(3)) if content is None else content
        return client.files.create(file=(name, content), purpose=purpose, **choices)

    return upload


@pytest.fixture(scope="session")
def training_file(upload: Upload) -> FileObject:
    return upload()


@pytest.fixture(scope="session")
def create_job(client: OpenAI, training_file: FileObject) -> CreateJob:
    """Create a job that stays queued."""

    def create(**choices: Any) -> FineTuningJob:
        body = {"model": TINY, "training_file": training_file.id, "extra_body": {"training": SHORT}}
        return client.fine_tuning.jobs.create(**body | choices)

    return create


@pytest.fixture
def tag() -> dict[str, str]:
    """Metadata by which a test finds its own jobs."""
    return {"tag": f"t{next(_numbers)}"}


def api_process(service: Up, log: Path, **settings: str) -> Iterator[str]:
    """One more API process on the service's folder, on a port of its own. Its address."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANNEAL_")}
    environment |= SETTINGS | {"ANNEAL_MODELS_DIR": str(service.data.parent / "models")} | settings
    command = [sys.executable, "-m", "cli.main", "api", "--data", str(service.data), "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the API process does not answer"
            try:
                httpx.get(f"{url}/health/live")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(LIMIT_S)


@pytest.fixture(scope="session")
def second_api(service: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A second API process on the same database, with the same key."""
    yield from api_process(service, tmp_path_factory.mktemp("api") / "second.log", ANNEAL_API_KEY=KEY)


@pytest.fixture(scope="session")
def open_api(service: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An API process without a key: it serves this host alone."""
    yield from api_process(service, tmp_path_factory.mktemp("api") / "open.log")


@pytest.fixture(scope="session")
def lost_api(service: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An API process whose database is out of reach."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = f"postgresql+psycopg://nobody@127.0.0.1:{probe.getsockname()[1]}/none"
        settings = {"ANNEAL_API_KEY": KEY, "ANNEAL_DATABASE_URL": nowhere}
        yield from api_process(service, tmp_path_factory.mktemp("api") / "lost.log", **settings)
