"""`anneal up` with the real processes: it starts, refuses, restarts and stops, and whatever happens leaves nothing."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from cli import health, valkey
from cli.listener import CannotListen, require_key_beyond_loopback
from shared.settings import Settings
from tests.waiting import LIMIT_S, is_alive, wait_until

KEY = "a-secret-that-must-not-show-4711"
READY_LIMIT_S = 120
PROCESSES = ("api", "train", "batch", "generate", "sweep")


class Up:
    """One `anneal up`, on a port of its own."""

    def __init__(self, data: Path, *arguments: str, **settings: str) -> None:
        self.data = data
        self.output = data.with_name(f"{data.name}-{time.monotonic_ns()}.err")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ANNEAL_")}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", "up", "--data", str(data), "--port", "0", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                # A shell's background job, which the tests may be part of, ignores Ctrl-C, and so would this.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                env=environment | {"ANNEAL_HUB_OFFLINE": "1", "ANNEAL_API_KEY": KEY} | settings,
            )
        self.line = ""
        self.met: dict[int, psutil.Process] = {}

    def ready(self) -> "Up":
        """Wait for the one line."""
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert self.line, f"it ended before it was ready: {self.output.read_text()}"
        return self

    @property
    def url(self) -> str:
        return self.line.split()[-1]

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)

    def settings(self) -> Settings:
        return Settings(data=self.data, port=int(self.url.rpartition(":")[2]))

    def family(self) -> list[psutil.Process]:
        """Everything below it, remembered so that a survivor is known after it has lost its parents."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.met.update((member.pid, member) for member in family)
        return family

    def find(self, *words: str) -> psutil.Process | None:
        """The process of the tree whose command line has all the words; the one nearest to the root."""
        for member in self.family():
            try:
                line = member.cmdline()
            except psutil.Error:
                continue
            if all(any(word in part for part in line) for word in words):
                return member
        return None

    def survivors(self) -> list[psutil.Process]:
        return [member for member in self.met.values() if is_alive(member)]

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=100)


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Up]]:
    launched: list[Up] = []

    def start(data: Path, *arguments: str, **settings: str) -> Up:
        launched.append(Up(data, *arguments, **settings))
        return launched[-1]

    yield start
    for up in launched:
        if up.process.poll() is None:
            up.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def service(launch: Callable[..., Up], tmp_path_factory: pytest.TempPathFactory) -> Up:
    """One service for the tests that leave it running. The space in the folder's name is meant."""
    return launch(tmp_path_factory.mktemp("up") / "my data").ready()


def test_the_one_line_on_standard_output_is_the_address(service: Up) -> None:
    assert re.fullmatch(r"Anneal is ready at http://127\.0\.0\.1:\d+\n", service.line)
    assert service.client.get("/health/ready").status_code == 200
    assert "CPU" in service.output.read_text() or "GPU" in service.output.read_text()


def test_a_second_up_on_the_same_folder_is_refused_and_names_the_first(service: Up, launch: Callable[..., Up]) -> None:
    second = launch(service.data)
    assert second.process.wait(LIMIT_S) == 1
    assert f"is in use by another `anneal up`, process {service.process.pid}" in second.output.read_text()


def test_a_taken_port_is_refused_before_anything_starts(service: Up, launch: Callable[..., Up], tmp_path: Path) -> None:
    second = launch(tmp_path / "data", "--port", service.url.rpartition(":")[2])
    assert second.process.wait(LIMIT_S) == 1
    assert "is in use by another program: choose another port" in second.output.read_text()
    assert not (tmp_path / "data" / "run" / "logs").exists()


def test_without_a_key_only_loopback_is_served() -> None:
    for address in ("127.0.0.1", "::1", "127.8.8.8"):
        require_key_beyond_loopback(Settings(api_key=None), address)
    for address in ("0.0.0.0", "::", "192.0.2.7"):
        with pytest.raises(CannotListen, match="ANNEAL_API_KEY is not set"):
            require_key_beyond_loopback(Settings(api_key=None), address)
        require_key_beyond_loopback(Settings(api_key=KEY), address)


def test_every_process_comes_to_life_and_beats(service: Up) -> None:
    settings = service.settings()
    for name in PROCESSES:
        wait_until(lambda name=name: health.check(settings, name) is None)


def test_valkey_opens_no_port_and_its_socket_is_private(service: Up) -> None:
    server = service.find("valkey-server")
    assert server is not None
    assert server.net_connections(kind="inet") == []
    assert service.settings().valkey_socket.stat().st_mode & 0o077 == 0


def test_a_killed_api_comes_back_on_its_address_while_clients_wait(service: Up) -> None:
    api = service.find("cli.main", "api")
    assert api is not None
    api.kill()
    assert service.client.get("/health/live").status_code == 200
    assert not is_alive(api)


def test_a_killed_valkey_comes_back(service: Up) -> None:
    server = service.find("valkey-server")
    assert server is not None
    server.kill()
    wait_until(lambda: service.find("valkey-server") not in (None, server))
    wait_until(lambda: service.client.get("/health/ready").status_code == 200)


def test_a_killed_worker_takes_its_pool_child_along_and_comes_back(service: Up) -> None:
    worker = service.find("celery", "train")
    assert worker is not None
    pool_child = wait_until(worker.children)[0]
    worker.kill()
    wait_until(lambda: not is_alive(pool_child))
    wait_until(lambda: service.find("celery", "train") not in (None, worker, pool_child))


def test_the_key_is_known_to_the_api_alone_and_in_no_command_line_and_no_log(service: Up) -> None:
    wait_until(lambda: health.check(service.settings(), "generate") is None)
    lines, keepers = [], []
    for member in service.family():
        with contextlib.suppress(psutil.NoSuchProcess):  # one that somebody started for a moment
            lines += member.cmdline()
            keepers += [member.cmdline()[-1]] if KEY in member.environ().values() else []
    assert lines
    assert not any(KEY in part for part in lines)
    assert keepers == ["api"]
    logs = [*(service.data / "run" / "logs").iterdir(), service.output]
    assert not any(KEY in log.read_text(errors="replace") for log in logs)


def test_ctrl_c_during_the_start_leaves_nothing(launch: Callable[..., Up], tmp_path: Path) -> None:
    starting = launch(tmp_path / "data")
    wait_until(starting.family)
    assert starting.stop(signal.SIGINT) == 0
    assert starting.survivors() == []


def is_training(service: Up, job_id: str) -> bool:
    """Whether the job has a trainer; one that waits for a job works in no job's folder."""
    folder = service.data / "run" / "jobs" / job_id
    for process in service.family():
        with contextlib.suppress(psutil.Error):
            if "worker.training" in process.cmdline() and Path(process.cwd()).is_relative_to(folder):
                return True
    return False


def test_the_same_folder_starts_again_with_everything_in_it(launch: Callable[..., Up], tmp_path: Path) -> None:
    """Stopped by SIGTERM in the middle of a job, then started again, then killed in the middle of the same job."""
    settings = {"ANNEAL_MODELS_DIR": str(tmp_path / "models"), "ANNEAL_LEASE_S": "6", "ANNEAL_HEARTBEAT_S": "1"}
    settings["ANNEAL_STANDBY_TRAINER"] = "false"  # which would be through with this model before anybody looks
    make_base_model(tmp_path / "models" / "acme" / "tiny")
    first = launch(tmp_path / "data", **settings).ready()
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
    upload = {"file": ("rows.jsonl", "\n".join(map(json.dumps, rows)).encode())}
    file = first.client.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).json()
    body = {"model": "acme/tiny", "training_file": file["id"]}
    answer = first.client.post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 200, answer.text
    wait_until(lambda: is_training(first, answer.json()["id"]))

    first.family()
    assert first.stop(signal.SIGTERM) == 0
    assert first.survivors() == []

    second = launch(tmp_path / "data", **settings).ready()
    assert [row["id"] for row in second.client.get("/v1/files").json()["data"]] == [file["id"]]
    assert [row["id"] for row in second.client.get("/v1/fine_tuning/jobs").json()["data"]] == [answer.json()["id"]]
    wait_until(lambda: is_training(second, answer.json()["id"]))

    second.family()
    assert second.stop(signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: second.survivors() == [])


def test_a_folder_with_a_long_name_gets_a_short_private_socket(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / ("long" * 30))
    assert len(os.fsencode(settings.valkey_socket)) < 100
    server = subprocess.Popen(valkey.command(settings), stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: valkey.answers(settings), 20)
        assert settings.valkey_socket.parent.stat().st_mode & 0o777 == 0o700
    finally:
        server.terminate()
        server.wait()
        settings.valkey_socket.parent.rmdir()


def test_a_socket_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(valkey.ValkeyUnusable, match="belongs to another user"):
        valkey.command(Settings(data=tmp_path))


def test_an_inherited_socket_is_served_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from cli.listener import LISTEN_FD, inherited_listener

    with socket.create_server(("127.0.0.1", 0)) as opened:
        monkeypatch.setenv(LISTEN_FD, str(os.dup(opened.fileno())))
        inherited = inherited_listener()
        assert inherited is not None
        with inherited:
            assert inherited.getsockname() == opened.getsockname()
        assert LISTEN_FD not in os.environ


def make_base_model(folder: Path) -> None:
    """Enough of a model to start a trainer, which is killed before it looks closer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
