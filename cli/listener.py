"""The API's listening socket: who may be listened to without a key, and clear words when the port is taken.

`anneal up` opens it and hands it to the API, so that a restarted API keeps its port and clients wait instead of
being refused; `anneal api` on its own opens the same one.
"""

import errno
import ipaddress
import os
import socket

from shared.settings import Settings

LISTEN_FD = "ANNEAL_LISTEN_FD"
"""Environment variable with the descriptor of a socket that is already listening."""
BACKLOG = 512


class CannotListen(Exception):
    """The message tells the operator what is wrong and what to do."""


def open_listener(settings: Settings) -> socket.socket:
    """Bind and listen on `host` and `port`.

    Raises:
        CannotListen: no key for an address others can reach, the port is taken, or the address is not this machine's.
    """
    family, address = _resolve(settings.host, settings.port)
    require_key_beyond_loopback(settings, address[0])
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise CannotListen(_explain(error, settings)) from error
    return listener


def inherited_listener() -> socket.socket | None:
    """The socket `anneal up` opened for us, if it did."""
    descriptor = os.environ.pop(LISTEN_FD, None)
    return None if descriptor is None else socket.socket(fileno=int(descriptor))


def require_key_beyond_loopback(settings: Settings, address: str) -> None:
    """Refuse to serve anybody but this machine without `api_key`.

    Raises:
        CannotListen: `address` is not loopback and no key is set.
    """
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback and not settings.api_key:
        raise CannotListen(
            f"ANNEAL_HOST={settings.host} can be reached from other machines, and ANNEAL_API_KEY is not set: "
            "set a key, or listen on 127.0.0.1"
        )


def address_of(host: str) -> str:
    """Where a client on this machine finds the API: an address that means "every interface" becomes loopback."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - compared, not bound


def url(host: str, port: int) -> str:
    """The API's address for a client on this machine."""
    address = address_of(host)
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise CannotListen(f"ANNEAL_HOST={host!r} is not an address of this machine: {error.strerror}") from error
    return family, (str(address[0]), int(address[1]))


def _explain(error: OSError, settings: Settings) -> str:
    where = f"{settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use by another program: choose another port with --port (0 picks a free one)"
    if error.errno == errno.EACCES:
        return f"{where} needs more rights than this user has: choose a port above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{settings.host} is not an address of this machine: choose another with --host"
    return f"cannot listen on {where}: {error.strerror}"
