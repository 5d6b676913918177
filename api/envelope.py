"""Around every request: an id, the headers of every answer, who may ask, how large a body may be, a last catch.

Plain ASGI, because streams must pass through untouched.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.deps import check_key
from api.error_handlers import error_response
from shared.errors import AppError, BadRequest, PermissionDenied, TooLarge, Unauthorized
from shared.models import DEFAULT_PROJECT
from shared.settings import Settings
from shared.uploads import MAX_PART_BYTES

log = logging.getLogger(__name__)

OPENAI_VERSION = "2020-10-01"
"""The one OpenAI's own answers carry."""
MAX_JSON_BODY_BYTES = 8 * 2**20
MULTIPART_OVERHEAD_BYTES = 2**20
UPLOAD_PATH = "/v1/files"
PART_PATH = re.compile(r"/v1/uploads/[^/]+/parts")
MAX_CLIENT_REQUEST_ID_CHARACTERS = 512
DRAIN_S = 5.0
"""How long the rest of a refused body is read and dropped before the answer closes the connection."""
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class Envelope:
    """The outermost layer of ours."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = f"req_{uuid4().hex}"
        client_id = headers.get("x-client-request-id", "")[:MAX_CLIENT_REQUEST_ID_CHARACTERS]
        # Quoted: whatever a client puts into a path or a header stays one word of one line.
        what = json.dumps(f"{scope['method']} {scope['path']}") + (
            f" of client's {json.dumps(client_id)}" * bool(client_id)
        )
        started = time.perf_counter()
        answered = False

        async def send_with_headers(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                spent_ms = round((time.perf_counter() - started) * 1000)
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", str(spent_ms).encode()),
                    (b"openai-version", OPENAI_VERSION.encode()),
                    (b"openai-organization", DEFAULT_PROJECT.encode()),
                ]
                if client_id:
                    log.info("request %s: %s answered %d in %d ms", request_id, what, message["status"], spent_ms)
            await send(message)

        async def refuse(error: AppError) -> None:
            await error_response(error)(scope, receive, send_with_headers)

        scope.setdefault("state", {})["request_id"] = request_id
        bound = self._body_bound(scope, headers)
        closes = scope["http_version"] == "1.0" or "close" in headers.get("connection", "").lower()
        try:
            if (refusal := self._refusal(scope, headers, bound)) is not None:
                if isinstance(refusal, TooLarge) and closes and "expect" not in headers:  # else it waits for our word
                    await _drain(receive)
                await refuse(refusal)
            else:
                await self._app(scope, _bounded(receive, bound, drains=closes), send_with_headers)
        except AppError as error:
            if answered:
                raise
            await refuse(error)
        except Exception:
            log.exception("request %s failed: %s", request_id, what)
            if answered:
                raise
            await refuse(AppError(f"an internal error; the server's log has it under {request_id}"))

    def _refusal(self, scope: Scope, headers: Headers, bound: int) -> AppError | None:
        """Whatever can be refused before a byte of the body is read."""
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            return BadRequest("the URL holds a NUL character; remove it")
        if scope["path"].startswith("/v1/"):
            if self._settings.api_key is None and (stranger := _stranger(headers)) is not None:
                return stranger
            try:
                check_key(self._settings, headers.get("authorization", ""))
            except Unauthorized as error:
                return error
        length = headers.get("content-length", "")
        return _too_large(bound) if length.isdecimal() and int(length) > bound else None

    def _body_bound(self, scope: Scope, headers: Headers) -> int:
        """The most bytes this request's body may have. What is not multipart is read into memory, wherever it goes."""
        if not headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return MAX_JSON_BODY_BYTES
        if scope["method"] == "POST" and scope["path"] == UPLOAD_PATH:
            return self._settings.max_upload_bytes + MULTIPART_OVERHEAD_BYTES
        if scope["method"] == "POST" and PART_PATH.fullmatch(scope["path"]):
            return MAX_PART_BYTES + MULTIPART_OVERHEAD_BYTES
        return MAX_JSON_BODY_BYTES


def _stranger(headers: Headers) -> AppError | None:
    """Without a key only this host may ask, and no web page may do it from a browser on it, neither through a name it
    controls nor with a form sent across."""
    if _host_of(f"//{headers.get('host', '')}") not in LOOPBACK_HOSTS:
        host = _host_of(f"//{headers.get('host', '')}")
        return PermissionDenied(f"without ANNEAL_API_KEY only localhost is served, not Host {host[:100]!r}")
    origin = headers.get("origin")
    if origin is not None and _host_of(origin) not in LOOPBACK_HOSTS:
        return PermissionDenied(f"without ANNEAL_API_KEY no page of {origin[:100]!r} may use this service")
    return None


def _host_of(url: str) -> str:
    """The host name in a URL or an origin, empty if there is none to find."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _too_large(bound: int) -> TooLarge:
    return TooLarge(f"the request body has more than {bound} bytes, the most allowed here")


def _bounded(receive: Receive, bound: int, *, drains: bool) -> Callable[[], Awaitable[Message]]:
    """Stop reading a body past its bound, whatever its headers say."""
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > bound:
                if drains:
                    await _drain(receive)
                raise _too_large(bound)
        return message

    return bounded


async def _drain(receive: Receive) -> None:
    """Take what a client still sends, when the connection ends with the answer: or it gets a reset in its place."""
    try:
        async with asyncio.timeout(DRAIN_S):
            while (await receive()).get("more_body", False):
                pass
    except TimeoutError:
        pass
