"""A whole Anneal for the length of the demo: `anneal up` as a child process, on a folder and a port of its own.

Owns that process. Whatever ends the demo, it ends too: by SIGTERM on every way out of `running`, and through
`cli/child.py` if the demo is killed.
"""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cli import child, commands

READY = "Anneal is ready at "
READY_LIMIT_S = 300.0
STOP_LIMIT_S = 15.0
"""After this the service is told a second time, which ends it at once: nobody needs the demo's half-trained job."""
KILL_LIMIT_S = 30.0
_OWN = ("ANNEAL_DATABASE_URL", "ANNEAL_REDIS_URL", "ANNEAL_STORAGE_URL", "ANNEAL_API_KEY", "ANNEAL_DATA")
"""Never passed on: the demo must not write into the operator's database because a shell happens to name it."""


class ServiceFailed(Exception):
    """The service can't be started, or has died. The message shows the end of what it said."""


class Service:
    """A running `anneal up`."""

    def __init__(self, url: str, process: subprocess.Popen[str], log: Path) -> None:
        self.url = url
        self._process, self._log = process, log

    def check(self) -> None:
        """Raises ServiceFailed if it has died."""
        if self._process.poll() is not None:
            raise ServiceFailed(f"the service has died ({_status(self._process)}). {_end_of(self._log)}")

    def wait(self) -> None:
        """Until it stops by itself. Raises ServiceFailed then."""
        self._process.wait()
        self.check()


@contextmanager
def running(folder: Path) -> Iterator[Service]:
    """The service on `folder`, ready to answer; stopped on the way out, whatever the reason.

    Raises:
        ServiceFailed: it did not come up.
    """
    log = folder / "run" / "logs" / "up.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            process = _start(folder, errors)
    except OSError as error:
        raise ServiceFailed(f"the service can't use the folder {folder}: {error.strerror}") from error
    try:
        yield Service(_wait_for_url(process, log), process, log)
    finally:
        _stop(process)


def _start(folder: Path, errors: IO[bytes]) -> "subprocess.Popen[str]":
    arguments = ("up", "--data", str(folder), "--host", "127.0.0.1", "--port", "0")
    shim = [sys.executable, "-I", "-S", child.__file__, str(os.getpid())]
    return subprocess.Popen(
        [*shim, *commands.anneal(*arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in _OWN},
        start_new_session=True,  # a terminal's Ctrl-C reaches us alone, and we stop it in order
    )


def _wait_for_url(process: "subprocess.Popen[str]", log: Path) -> str:
    assert process.stdout is not None
    limit = time.monotonic() + READY_LIMIT_S
    while (left := limit - time.monotonic()) > 0:
        readable, _, _ = select.select([process.stdout], [], [], min(left, 1.0))
        if not readable:
            continue
        line = process.stdout.readline()
        if line.startswith(READY):
            return line.removeprefix(READY).strip()
        if not line:
            process.wait()
            raise ServiceFailed(f"the service did not start ({_status(process)}). {_end_of(log)}")
    raise ServiceFailed(f"the service was not ready after {READY_LIMIT_S:.0f} s. {_end_of(log)}")


def _stop(process: "subprocess.Popen[str]") -> None:
    """SIGTERM, once more, SIGKILL. A further Ctrl-C meanwhile is not lost, it only comes after this."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for order, patience_s in ((signal.SIGTERM, STOP_LIMIT_S), (signal.SIGTERM, KILL_LIMIT_S)):
            if process.poll() is None:
                process.send_signal(order)
            try:
                process.wait(patience_s)
                return
            except subprocess.TimeoutExpired:
                continue
        process.kill()
        process.wait()
    finally:
        if process.stdout is not None:
            process.stdout.close()
        signal.signal(signal.SIGINT, previous)


def _status(process: "subprocess.Popen[str]") -> str:
    code = process.returncode
    return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _end_of(log: Path, lines: int = 30) -> str:
    text = "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return f"It said last:\n{text}" if text.strip() else "It said nothing."
