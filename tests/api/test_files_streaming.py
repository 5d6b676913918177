"""Large files through a real API process: what they cost it in memory, and where they are until they are whole."""

import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from shared.settings import Settings
from tests.waiting import LIMIT_S, wait_until

MIB = 2**20
SIZE_BYTES = int(os.environ.get("STREAMED_MIB", "64")) * MIB
BOUND_BYTES = 24 * MIB
"""More than what the process needs for a file of any size, and less than any file here."""


class Service:
    """`anneal api` in a process of its own."""

    def __init__(self, settings: Settings) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self.spool = settings.run_dir / "spool"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "api", "--port", str(port)],
            env={**os.environ, "ANNEAL_MAX_UPLOAD_BYTES": str(2**30)},
        )
        deadline = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < deadline and self.process.poll() is None, "the API did not start"
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/files").status_code == 200
        except httpx.TransportError:
            return False

    def resident_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @contextmanager
    def growth(self) -> Iterator[list[int]]:
        """Fills in the most memory that the process had beyond what it had before, in bytes."""
        found: list[int] = []
        before = self.resident_bytes()
        with suppress(OSError):  # where it is not allowed, the mark is that since the start, and the bound stricter
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")  # the high-water mark begins anew
        yield found
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert peak is not None
        found.append(int(peak[1]) * 1024 - before)
        print(f"before {before / MIB:.1f}, peak +{found[0] / MIB:.1f}, after {self.resident_bytes() / MIB:.1f} MiB")


@pytest.fixture
def service(settings: Settings) -> Iterator[Service]:
    running = Service(settings)
    try:
        yield running
    finally:
        running.process.terminate()
        running.process.wait(LIMIT_S)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.bin"
    with path.open("wb") as stream:
        for _ in range(SIZE_BYTES // MIB):
            stream.write(os.urandom(MIB))
    return path


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # no row is as large as these files
def test_large_files_are_sent_and_read_in_little_memory(service: Service, large: Path) -> None:
    with httpx.Client(base_url=service.url, timeout=300) as client, large.open("rb") as stream:
        client.post("/files", files={"file": ("a", b"x")}, data={"purpose": "user_data"})  # loads what is loaded once
        with service.growth() as sent:
            answer = client.post("/files", files={"file": ("a", stream)}, data={"purpose": "user_data"})
        assert answer.status_code == 200, answer.text
        file_id = answer.json()["id"]
        with service.growth() as read:
            assert _digest_of_content(client, file_id) == _digest(large)
        with service.growth() as in_parts:
            body = {"filename": "a", "purpose": "user_data", "bytes": SIZE_BYTES, "mime_type": "text/plain"}
            upload_id = client.post("/uploads", json=body).json()["id"]
            part_ids = []
            stream.seek(0)
            while part := stream.read(48 * MIB):
                added = client.post(f"/uploads/{upload_id}/parts", files={"data": part})
                part_ids.append(added.json()["id"])
            done = client.post(f"/uploads/{upload_id}/complete", json={"part_ids": part_ids})
        assert _digest_of_content(client, done.json()["file"]["id"]) == _digest(large)
    assert sent[0] < BOUND_BYTES and read[0] < BOUND_BYTES and in_parts[0] < BOUND_BYTES, (sent, read, in_parts)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of_content(client: httpx.Client, file_id: str) -> str:
    digest = hashlib.sha256()
    with client.stream("GET", f"/files/{file_id}/content") as answer:
        for chunk in answer.iter_bytes():
            digest.update(chunk)
    return digest.hexdigest()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_what_is_not_whole_yet_is_on_the_disk_of_the_run_folder_and_goes_with_its_sender(service: Service) -> None:
    enough = threading.Event()

    def endless() -> Iterator[bytes]:
        boundary = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield boundary + bytes(4 * MIB)
        while not enough.wait(0.05):
            yield bytes(MIB)

    def send() -> None:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{service.url}/files", content=_broken(endless()), headers=headers)

    sender = threading.Thread(target=send)
    sender.start()
    spooled = wait_until(lambda: _open_below(service))
    assert all("(deleted)" in path for path in spooled), "a crash would leave it"
    enough.set()
    sender.join()
    wait_until(lambda: not _open_below(service))  # its sender is gone


def _broken(chunks: Iterator[bytes]) -> Iterator[bytes]:
    yield from chunks
    raise httpx.WriteError("the client is gone")


def _open_below(service: Service) -> list[str]:
    found = []
    for descriptor in Path(f"/proc/{service.process.pid}/fd").iterdir():
        try:
            found.append(str(descriptor.readlink()))
        except FileNotFoundError:
            continue
    return [path for path in found if path.startswith(str(service.spool))]
