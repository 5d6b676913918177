"""What goes wrong, as HTTP: OpenAI's error body and the headers its SDKs obey. The one place that knows both.

    AppError                    its own status (`shared.errors` has the tree)
    a body that does not fit    400, with the field and the value
    an unknown URL              404, with what exists; a wrong method 405, with `allow`
    a database that is away     503, with `retry-after`
    Replay                      not an error: the answer a request got before
    anything else               500, by `api.envelope`

The SDKs repeat 408, 409, 429 and 5xx: `x-should-retry: false` says where that is in vain.
"""

import errno
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, params
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import iter_route_contexts
from sqlalchemy.exc import DataError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from api.idempotency import REPLAYED, Once, Replay
from shared.db import UNAVAILABLE
from shared.errors import AppError, BadRequest, NotFound, Unavailable
from shared.invalid_request import invalid_request
from shared.storage import StorageFull

log = logging.getLogger(__name__)

NO_TABLES = ("no such table", "no such column", "UndefinedTable", "UndefinedColumn")
"""SQLite's words, which has no error of its own for it, and the names of PostgreSQL's errors."""
DATABASE_RETRY_S = 2


def install(app: FastAPI) -> None:
    """Let these handlers answer for the application."""
    app.add_exception_handler(AppError, _app_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    for unavailable in (*UNAVAILABLE, PoolTimeout, ProgrammingError):
        app.add_exception_handler(unavailable, _database_error)
    app.add_exception_handler(DataError, _data_error)
    app.add_exception_handler(Replay, _replay)


def error_response(error: AppError) -> JSONResponse:
    """OpenAI's error body and the headers its SDKs obey."""
    headers = _retry_headers(error.status_code, error.should_retry)
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    return JSONResponse(error.body(), status_code=error.status_code, headers=headers)


def _retry_headers(status_code: int, should_retry: bool | None) -> dict[str, str]:
    if status_code == HTTPStatus.CONFLICT or should_retry is False:
        return {"x-should-retry": "false"}
    return {}


async def _app_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, AppError)
    return await _settled(request, error)


async def _settled(request: Request, error: AppError) -> Response:
    """The error's response, kept for the request's key if it has one."""
    once: Once | None = getattr(request.state, "once", None)
    if once is not None and once.may_keep(error):
        try:
            await run_in_threadpool(once.keep_error, error)
        except Replay as replay:
            return await _replay(request, replay)
        except AppError as reused:
            return error_response(reused)
    return error_response(error)


async def _replay(_request: Request, replay: Exception) -> Response:
    assert isinstance(replay, Replay)
    status_code = replay.kept.status_code
    headers = {REPLAYED: "true", **_retry_headers(status_code, None)}
    return Response(replay.kept.body, status_code=status_code, headers=headers, media_type="application/json")


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    return await _settled(request, _wrong_content_type(request, problems) or invalid_request(problems))


def _wrong_content_type(request: Request, problems: Any) -> BadRequest | None:
    """Said instead of the fields that seem to be missing, because they are all there, in another encoding."""
    field = getattr(request.scope.get("route"), "body_field", None)
    if field is None or problems[0]["loc"][0] != "body":
        return None
    sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = isinstance(field.field_info, params.Form)
    wanted = "multipart/form-data" if is_form else "application/json"
    if sent == wanted or (is_form and sent == "application/x-www-form-urlencoded") or sent.endswith("+json"):
        return None
    came = f"came as {sent[:100]!r}" if sent else "came without a content type"
    return BadRequest(f"the body {came}; send it as Content-Type: {wanted}", code="unsupported_content_type")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    cause = error.__cause__  # FastAPI wraps what is raised while a body is read
    if isinstance(cause, AppError):
        return error_response(cause)
    if isinstance(cause, UnicodeDecodeError):
        return error_response(BadRequest("the body is not UTF-8; encode it so"))
    if isinstance(cause, OSError):
        return _disk_error(cause)
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = (
            f"there is no {request.method} {request.url.path[:200]} here; what exists: {', '.join(_nouns(request))}"
        )
        return error_response(NotFound(f"{message}; /docs has the details", code="unknown_url"))
    answer = BadRequest(str(error.detail))
    answer.status_code = error.status_code
    if error.status_code != HTTPStatus.METHOD_NOT_ALLOWED:
        return error_response(answer)
    allowed = sorted(_methods(request))
    answer.code = "method_not_allowed"
    answer.message = (
        f"{request.method} is not allowed on {request.url.path[:200]}, {' and '.join(allowed)} is; "
        "see /docs for what exists"
    )
    response = error_response(answer)
    response.headers["allow"] = ", ".join(allowed)
    return response


def _nouns(request: Request) -> list[str]:
    """The collections and endpoints this service has, such as /v1/files and /v1/chat/completions."""
    paths = (context.path or "" for context in iter_route_contexts(request.app.routes))
    return sorted({path.partition("/{")[0] for path in paths if path.startswith("/v1/")})


def _methods(request: Request) -> set[str]:
    """The methods the request's path has. Starlette names those of the first route on a path only."""
    found: set[str] = set()
    for context in iter_route_contexts(request.app.routes):
        if context.path is not None and context.methods and compile_path(context.path)[0].match(request.url.path):
            found |= context.methods
    return found


def _disk_error(error: OSError) -> JSONResponse:
    """A file that was being received could not be spooled."""
    log.error("a body could not be received: %s", error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return error_response(StorageFull())
    return error_response(AppError("the body could not be received; the server's log says why"))


async def _database_error(_request: Request, error: Exception) -> JSONResponse:
    if any(sign in repr(error) for sign in NO_TABLES):
        log.error("the database's tables are too old: %s", error)
        outdated = AppError("the database's tables are older than this program; run `anneal migrate`")
        outdated.should_retry = False
        return error_response(outdated)
    if isinstance(error, ProgrammingError):
        raise error
    log.error("the database is out of reach: %s", error)
    away = Unavailable("the database is out of reach; try again shortly", retry_after_s=DATABASE_RETRY_S)
    return error_response(away)


async def _data_error(_request: Request, error: Exception) -> JSONResponse:
    log.warning("the database refused a value: %s", error)
    return error_response(BadRequest("a value in the request can't be stored; check it for control characters"))
