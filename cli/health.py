"""`anneal health NAME`: is that process of this host alive? For container health checks and operators.

The API is asked over HTTP; everything else is known by its heartbeat.
"""

import http.client

from cli.listener import address_of
from shared import heartbeat
from shared.settings import Settings

ASK_TIMEOUT_S = 5


def check(settings: Settings, name: str) -> str | None:
    """What is wrong with the named process; None if nothing is."""
    if name == "api":
        return _api(settings)
    try:
        age_s = heartbeat.age(settings, name)
    except ValueError as error:
        return str(error)
    if age_s is None:
        return f"{name} has no heartbeat in {settings.run_dir}: it is not running, or ANNEAL_DATA is not its folder"
    if age_s > heartbeat.SILENT_AFTER_S:
        return f"{name} has been silent for {age_s:.0f} s; more than {heartbeat.SILENT_AFTER_S:.0f} s means it hangs"
    return None


def status_of(settings: Settings, path: str, timeout_s: float = ASK_TIMEOUT_S) -> int:
    """The HTTP status the API of this host answers with.

    Raises:
        OSError, http.client.HTTPException: it doesn't answer.
    """
    connection = http.client.HTTPConnection(address_of(settings.host), settings.port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"Host": "localhost"})  # the one name always served
        return connection.getresponse().status
    finally:
        connection.close()


def _api(settings: Settings) -> str | None:
    try:
        status = status_of(settings, "/health/live")
    except (OSError, http.client.HTTPException) as error:
        said = f"the API does not answer on port {settings.port}: {error}"
        return f"{said}; if its port is another, name it with --port or ANNEAL_PORT"
    return None if status == http.HTTPStatus.OK else f"the API answers /health/live with {status}"
