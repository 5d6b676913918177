"""The FastAPI application: routers, errors in OpenAI's shape, headers on every answer. Only this module knows HTTP
status codes of domain errors."""

import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import chat, files, fine_tuning, health, job_events, models
from api.deps import check_key
from shared.db import UNAVAILABLE
from shared.errors import AppError, BadRequest, NotFound, PermissionDenied, TooLarge, Unauthorized, Unavailable
from shared.queue import Outbox, make_celery
from shared.redis_client import connect_async
from shared.settings import Settings, get_settings

log = logging.getLogger(__name__)

MAX_JSON_BODY_BYTES = 8 * 2**20
MULTIPART_OVERHEAD_BYTES = 2**20
UPLOAD_PATH = "/v1/files"
UNION_BRANCHES = frozenset({"int", "float", "str", "bool", "list"})
UNION_PREFIXES = ("constrained-", "literal[", "function-", "list[")
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application of one API process."""
    settings = settings or get_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.outbox = Outbox(make_celery(settings))
        app.state.redis = connect_async(settings)
        app.state.streams = job_events.Streams(connect_async(settings, max_connections=job_events.MAX_STREAMS))
        async with chat.lifespan(app, settings):
            yield
        app.state.outbox.close()
        await app.state.streams.client.aclose()
        await app.state.redis.aclose()

    app = FastAPI(title="Anneal", version="0.1.0", lifespan=lifespan, redirect_slashes=False)
    app.state.settings = settings
    v1 = APIRouter(prefix="/v1")
    for router in (files.router, fine_tuning.router, job_events.router, models.router, chat.router):
        v1.include_router(router)
    app.include_router(v1)
    app.include_router(health.router)
    app.add_exception_handler(AppError, _app_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    for unavailable in UNAVAILABLE:
        app.add_exception_handler(unavailable, _database_error)
    app.add_exception_handler(DataError, _data_error)
    app.add_middleware(Envelope, settings=settings)
    return app


def error_response(error: AppError) -> JSONResponse:
    """OpenAI's error body and the headers its SDK obeys."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    if error.status_code == HTTPStatus.CONFLICT:
        headers["x-should-retry"] = "false"  # the SDK repeats a 409, and nothing here changes by repeating
    return JSONResponse(error.body(), status_code=error.status_code, headers=headers)


async def _app_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AppError)
    return error_response(error)


async def _validation_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return error_response(invalid_request(error.errors()))


def invalid_request(problems: Any) -> BadRequest:
    """The first of pydantic's problems as a BadRequest that names the field and the value."""
    problem = problems[0]
    if problem["type"] == "json_invalid":
        return BadRequest(f"the body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}")
    # Pydantic adds the branch of a union it tried; the user knows fields only.
    path = [str(part) for part in problem["loc"] if part not in ("body", "query", "header", "path")]
    known = [part for part in path if part not in UNION_BRANCHES and not part.startswith(UNION_PREFIXES)]
    param = ".".join(known) or None
    name = param or "the body"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return BadRequest(
            f"unknown key {name!r}; remove it or check its spelling", param=param, code="unknown_parameter"
        )
    if problem["type"] == "missing":
        return BadRequest(f"{name} is required", param=param, code="missing_required_parameter")
    if problem["type"] == "value_error":
        return BadRequest(f"{param}: {message}" if param else message, param=param, code="invalid_value")
    value = repr(problem.get("input"))
    return BadRequest(f"{name}={value[:200]} is not valid: {message}", param=param, code="invalid_value")


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, AppError):
        return error_response(error.__cause__)  # FastAPI wraps what is raised while a body is read
    if error.status_code == HTTPStatus.NOT_FOUND:
        answer: AppError = NotFound(
            f"there is no {request.method} {request.url.path}; see /docs for what exists", code="unknown_url"
        )
    else:
        answer = BadRequest(str(error.detail))
        answer.status_code = error.status_code
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            answer.message = f"{request.method} is not allowed on {request.url.path}; see /docs for what exists"
            answer.code = "method_not_allowed"
    return error_response(answer)


async def _database_error(_request: Request, error: Exception) -> JSONResponse:
    log.error("the database is out of reach: %s", error)
    if any(sign in str(error) for sign in ("no such table", "no such column")):  # SQLite has no error of its own for it
        return error_response(AppError("the database's tables are older than this program; run `anneal migrate`"))
    return error_response(Unavailable("the database is out of reach; try again shortly", retry_after_s=2))


async def _data_error(_request: Request, error: Exception) -> JSONResponse:
    log.warning("the database refused a value: %s", error)
    return error_response(BadRequest("a value in the request can't be stored; check it for control characters"))


class Envelope:
    """Around every request: an id, the time it took, bounds on its size, a guard on the Host header, a last catch.

    Plain ASGI, because streams must pass through untouched.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{uuid4().hex}"
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
                ]
            await send(message)

        scope.setdefault("state", {})["request_id"] = request_id
        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await error_response(refusal)(scope, receive, send_with_headers)
            else:
                await self._app(scope, self._bounded(scope, receive), send_with_headers)
        except AppError as error:
            if answered:
                raise
            await error_response(error)(scope, receive, send_with_headers)
        except Exception:
            log.exception("request %s failed: %s %s", request_id, scope["method"], json.dumps(scope["path"]))
            if answered:
                raise
            internal = AppError(f"an internal error; the server's log has it under {request_id}")
            await error_response(internal)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> AppError | None:
        """Whatever can be refused before a byte of the body is read."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            return BadRequest("the URL holds a NUL character; remove it")
        if not scope["path"].startswith("/v1/"):
            return None
        if self._settings.api_key is None:
            # Without a key only this host may ask, and no web page may do it from a browser on it, neither through a
            # name it controls nor with a form sent across.
            host = _host_of(f"//{headers.get('host', '')}")
            if host not in LOOPBACK_HOSTS:
                return PermissionDenied(f"without ANNEAL_API_KEY only localhost is served, not Host {host[:100]!r}")
            origin = headers.get("origin")
            if origin is not None and _host_of(origin) not in LOOPBACK_HOSTS:
                return PermissionDenied(f"without ANNEAL_API_KEY no page of {origin[:100]!r} may use this service")
        try:
            check_key(self._settings, headers.get("authorization", ""))
        except Unauthorized as error:
            return error
        return None

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Stop reading a body past its bound, whatever its headers say."""
        is_upload = scope["method"] == "POST" and scope["path"] == UPLOAD_PATH
        bound = self._settings.max_upload_bytes + MULTIPART_OVERHEAD_BYTES if is_upload else MAX_JSON_BODY_BYTES
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > bound:
                    raise TooLarge(f"the request body has more than {bound} bytes, the most allowed here")
            return message

        return bounded


def _host_of(url: str) -> str:
    """The host name in a URL or an origin, empty if there is none to find."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
