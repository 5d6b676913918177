"""A batch's input file: JSONL, each line a request for the batch's endpoint. Streamed, never held whole.

    {"custom_id": "…", "method": "POST", "url": "/v1/chat/completions", "body": {…}}

`check` reads all of it once, before anything is generated; `read_requests` again, while it is.
"""

import hashlib
import json
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydantic import ValidationError

from shared.chat_schema import ChatRequest
from shared.completion_schema import CompletionRequest
from shared.errors import BadRequest
from shared.invalid_request import invalid_request
from shared.text import storable

MAX_BYTES = 200 * 10**6
MAX_LINES = 50_000
"""Both are OpenAI's."""
MAX_LINE_BYTES = 8 * 2**20
"""As much as a request's body may have."""
MAX_CUSTOM_ID_CHARACTERS = 512
MAX_ERRORS = 100
"""Told of one file."""
MAX_ERROR_CHARACTERS = 500
KEYS = ("custom_id", "method", "url", "body")

SCHEMAS: dict[str, type[ChatRequest | CompletionRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}


class InvalidInput(Exception):
    """The file is not a batch's input. `errors` are OpenAI's: code, line, message, param."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__(f"{len(errors)} errors")
        self.errors = errors


class Interrupted(Exception):
    """Nobody wants to know any more."""


@dataclass(frozen=True, slots=True)
class Request:
    """One line."""

    line: int
    custom_id: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a valid file is: how many requests, for which model, by the name they use."""

    total: int
    model: str


def error_of(code: str, message: str, line: int | None = None, param: str | None = None) -> dict[str, Any]:
    """One of OpenAI's `batch.errors`."""
    return {"code": code, "line": line, "message": storable(message[:MAX_ERROR_CHARACTERS]), "param": param}


def check(stream: BinaryIO, endpoint: str, is_interrupted: Callable[[], bool]) -> Summary:
    """Read the whole file, which may take a minute.

    Raises:
        InvalidInput: with everything that is wrong, up to a bound.
        Interrupted: `is_interrupted` became true.
    """
    errors: list[dict[str, Any]] = []
    size_bytes = stream.seek(0, 2)
    stream.seek(0)
    if size_bytes > MAX_BYTES:
        message = f"the file has {size_bytes} bytes; up to {MAX_BYTES} are possible, so make several batches"
        raise InvalidInput([error_of("file_too_large", message)])
    seen: dict[bytes, int] = {}
    model: tuple[str, int] | None = None
    total = 0
    for number, line in _lines(stream):
        total += 1
        if is_interrupted():
            raise Interrupted
        if total > MAX_LINES:
            errors.append(error_of("too_many_lines", f"more than {MAX_LINES} requests; make several batches", number))
            break
        if len(errors) >= MAX_ERRORS:
            break
        try:
            request = _parse(number, line, endpoint)
            digest = hashlib.sha256(request.custom_id.encode(errors="surrogatepass")).digest()
            first = seen.setdefault(digest, number)
            if first != number:
                raise BadRequest(
                    f"custom_id={request.custom_id[:100]!r} is that of line {first} too; give each line its own",
                    param="custom_id",
                    code="duplicate_custom_id",
                )
            name = parse_body(request.body, endpoint).model
            model = model or (name, number)
            if name != model[0]:
                raise BadRequest(
                    f"model={name[:100]!r} is not that of line {model[1]}, {model[0][:100]!r}; a batch has one model",
                    param="body.model",
                    code="mismatched_model",
                )
        except BadRequest as error:
            errors.append(error_of(error.code, error.message, number, error.param))
    if not total:
        errors.append(error_of("empty_file", "the file has no requests; each line is one"))
    if errors or model is None:
        raise InvalidInput(errors)
    return Summary(total, model[0])


def read_requests(stream: BinaryIO, endpoint: str, done: Container[int] = ()) -> Iterator[Request]:
    """The requests of a file that was valid, without those of the lines that are done."""
    for number, line in _lines(stream):
        if number not in done:
            yield _parse(number, line, endpoint)


def parse_body(body: dict[str, Any], endpoint: str) -> ChatRequest | CompletionRequest:
    """A line's body, as the endpoint would take it, but for streaming.

    Raises:
        BadRequest: it would refuse it.
    """
    try:
        spec = SCHEMAS[endpoint].model_validate(body)
    except ValidationError as problems:
        error = invalid_request(problems.errors())
        raise BadRequest(error.message, param=_in_body(error.param), code=error.code) from problems
    except BadRequest as error:
        raise BadRequest(error.message, param=_in_body(error.param), code=error.code) from error
    if spec.stream:
        raise BadRequest("stream is not possible in a batch; leave it out", param="body.stream", code="invalid_value")
    return spec


def _in_body(param: str | None) -> str:
    return f"body.{param}" if param else "body"


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(number, content) of the lines that hold anything; of one that is too long, only its beginning."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        rest = line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_LINE_BYTES + 1)
        if line.strip():
            yield number, line


def _parse(number: int, line: bytes, endpoint: str) -> Request:
    if len(line) > MAX_LINE_BYTES:
        raise BadRequest(f"longer than {MAX_LINE_BYTES} bytes", code="line_too_long")
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not JSON: {error}; each line is one object", code="invalid_json_line") from error
    if not isinstance(value, dict):
        raise BadRequest("not a JSON object; each line is one", code="invalid_json_line")
    for key in KEYS:
        if key not in value:
            raise BadRequest(f"{key} is required", param=key, code="missing_required_parameter")
    if unknown := next((key for key in value if key not in KEYS), None):
        raise BadRequest(f"unknown key {unknown[:100]!r}; remove it", param=unknown[:100], code="unknown_parameter")
    custom_id, method, url, body = (value[key] for key in KEYS)
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARACTERS:
        raise BadRequest(
            f"custom_id={custom_id!r:.100} must be a string of 1 to {MAX_CUSTOM_ID_CHARACTERS} characters",
            param="custom_id",
            code="invalid_custom_id",
        )
    if method != "POST":
        raise BadRequest(f"method={method!r:.100} must be 'POST'", param="method", code="invalid_method")
    if url != endpoint:
        raise BadRequest(
            f"url={url!r:.100} must be {endpoint!r}, the batch's endpoint", param="url", code="invalid_url"
        )
    if not isinstance(body, dict):
        raise BadRequest("body must be a JSON object", param="body", code="invalid_value")
    return Request(number, custom_id, body)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
