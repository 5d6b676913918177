"""What routes ask for: the caller, the settings, the outbox. Async, or FastAPI would run each in a thread."""

import hmac
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from shared.errors import Unauthorized
from shared.models import DEFAULT_PROJECT
from shared.queue import Outbox
from shared.settings import Settings


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is asking."""

    project_id: str


async def get_settings_of(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


SettingsDep = Annotated[Settings, Depends(get_settings_of)]


def check_key(settings: Settings, authorization: str) -> None:
    """Let the right bearer token pass; without a configured key everybody (on loopback) does.

    Raises:
        Unauthorized: no token, or another one.
    """
    if settings.api_key is None:
        return
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthorized("no API key was sent; send `Authorization: Bearer <ANNEAL_API_KEY>`")
    # As the bytes that came (headers are decoded as latin-1): compare_digest refuses non-ASCII strings.
    if not hmac.compare_digest(token.strip().encode("latin-1"), settings.api_key.encode()):
        raise Unauthorized("the API key is not valid here; use the value of ANNEAL_API_KEY")


async def _identify(request: Request) -> Identity:
    """The project behind the bearer token, which `api.envelope.Envelope` has checked before the body was read."""
    check_key(request.app.state.settings, request.headers.get("authorization", ""))
    return Identity(DEFAULT_PROJECT)


Caller = Annotated[Identity, Depends(_identify)]


async def _outbox(request: Request) -> Outbox:
    outbox: Outbox = request.app.state.outbox
    return outbox


OutboxDep = Annotated[Outbox, Depends(_outbox)]
