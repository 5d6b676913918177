"""What the service says about itself: /openapi.json, and /docs, which shows it without the Internet.

Owns the document beyond what the routes declare: security, errors, headers, examples. The routes own the rest, and
`api.answer_schemas` the answers that they write themselves.
"""

from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.types import Lifespan

from api.answer_schemas import Error
from api.examples import ERROR_EXAMPLES, EXAMPLES

ASSETS = Path(fastapi_offline.__file__).parent / "static"
"""Swagger UI's files, kept as a package."""
ASSETS_URL = "/docs/assets"
VERSION = "0.1.0"
BEARER = "bearer"

DESCRIPTION = """\
A self-hosted, OpenAI-compatible fine-tuning service. Scripts written for OpenAI's API need another `base_url`, and the
name of a model that is here.

* Whatever is beyond OpenAI's API is under the one key `anneal` in answers, and in `training` when a job is created.
* Every answer has the headers `x-request-id` and `openai-processing-ms`; an `x-client-request-id` that comes is logged.
* Every failure has OpenAI's body, `{"error": {"message", "type", "param", "code"}}`. `x-should-retry: false` says that
  repeating is in vain, `retry-after` when it is not.
* A POST that changes anything takes an `Idempotency-Key`: sent again within a day it does nothing and is answered as it
  was before. Without one, a retry by OpenAI's SDKs (`x-stainless-retry-count`) within a minute is told once what the
  same request created: best effort.
"""

TAGS = {
    "files": "Training data, other input, and results.",
    "uploads": "Files that come in parts, for those too large for one request.",
    "fine-tuning": "Jobs, what happens to them, their checkpoints and curves.",
    "batches": "Files of requests that are answered when there is time, within a day.",
    "models": "Base models of the operator, tuned models and checkpoints. An id's slashes may be encoded or not.",
    "chat": "Answers by any of the models.",
    "health": "For orchestrators; needs no key.",
}


def application(lifespan: Lifespan[FastAPI]) -> FastAPI:
    """An application without routes yet, but with its documentation."""
    app = FastAPI(
        title="Anneal",
        version=VERSION,
        lifespan=lifespan,
        redirect_slashes=False,
        # Fields, and files up to a mebibyte, are held in memory; by default a thousand of them, each as large.
        form_limits={"max_files": 2, "max_fields": 16, "max_part_size": 64 * 2**10},
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=_operation_id,
    )
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    app.mount(ASSETS_URL, StaticFiles(directory=ASSETS))
    app.add_api_route("/docs", _docs, include_in_schema=False)
    app.add_api_route("/", _start, include_in_schema=False)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


def _docs() -> HTMLResponse:
    """Swagger UI from our own assets."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Anneal",
        swagger_js_url=f"{ASSETS_URL}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS_URL}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS_URL}/favicon.png",
        swagger_ui_parameters={"validatorUrl": None},  # else it may ask a validator on the Internet
    )


def _start() -> RedirectResponse:
    """Until there is more to see, the documentation."""
    return RedirectResponse("/docs")


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once."""
    if app.openapi_schema is None:
        tags = [{"name": name, "description": text} for name, text in TAGS.items()]
        document = get_openapi(
            title=app.title, version=app.version, description=DESCRIPTION, tags=tags, routes=app.routes
        )
        parts = document["components"]
        parts["securitySchemes"] = {
            BEARER: {
                "type": "http",
                "scheme": "bearer",
                "description": "ANNEAL_API_KEY. Where the operator has set none, only the host itself is served.",
            }
        }
        parts["headers"] = _HEADERS
        for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's 422, which is a 400 here
            parts["schemas"].pop(unused, None)
        error = Error.model_json_schema(ref_template="#/components/schemas/{model}")
        parts["schemas"] |= {**error.pop("$defs"), "Error": error}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _complete(path, method, operation)
        _require_what_is_always_sent(document)
        app.openapi_schema = document
    return app.openapi_schema


_HEADERS = {
    "x-request-id": {"schema": {"type": "string"}, "description": "The request's name in the server's log."},
    "openai-processing-ms": {"schema": {"type": "string"}, "description": "Milliseconds until the answer began."},
    "openai-version": {"schema": {"type": "string"}},
    "openai-organization": {"schema": {"type": "string"}, "description": "The project."},
    "x-should-retry": {"schema": {"type": "string"}, "description": "`false`: repeating is in vain."},
    "retry-after": {"schema": {"type": "string"}, "description": "Seconds to wait before trying again."},
    "idempotent-replayed": {"schema": {"type": "string"}, "description": "`true`: the answer to an earlier request."},
}
_ALWAYS = ("x-request-id", "openai-processing-ms", "openai-version", "openai-organization")


def _complete(path: str, method: str, operation: dict[str, Any]) -> None:
    """Security, headers, errors and examples of one operation."""
    answers = operation["responses"]
    answers.pop("422", None)
    if path.startswith("/v1/"):
        operation["security"] = [{BEARER: []}]
        for status in _error_statuses(path, method, operation):
            answers[str(status)] = {
                "description": ERROR_EXAMPLES[status][0],
                "content": {
                    "application/json": {
                        "schema": {"$ref": "#/components/schemas/Error"},
                        "example": {"error": ERROR_EXAMPLES[status][1]},
                    }
                },
                "headers": _refer("x-should-retry", *(["retry-after"] if status in (429, 503) else [])),
            }
    can_replay = any(parameter["name"] == "idempotency-key" for parameter in operation.get("parameters", []))
    for status, answer in answers.items():
        replayed = ["idempotent-replayed"] if can_replay and status in ("200", "400", "404", "409") else []
        answer["headers"] = {**answer.get("headers", {}), **_refer(*_ALWAYS, *replayed)}
    request, answered = EXAMPLES.get(operation["operationId"], (None, None))
    if request is not None:
        for content in operation["requestBody"]["content"].values():
            content["example"] = request
    if answered is not None:
        answers["200"]["content"]["application/json"]["example"] = answered


def _refer(*headers: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in headers}


def _error_statuses(path: str, method: str, operation: dict[str, Any]) -> list[int]:
    has_body = "requestBody" in operation
    wanted = {
        400: has_body or "parameters" in operation,
        401: True,
        403: True,
        404: has_body or "{" in path,
        409: method == "delete" or any(part["name"] == "idempotency-key" for part in operation.get("parameters", [])),
        413: has_body,
        429: any("text/event-stream" in answer.get("content", {}) for answer in operation["responses"].values()),
        500: True,
        503: True,
        507: "multipart/form-data" in operation.get("requestBody", {}).get("content", {}),
    }
    return [status for status, applies in wanted.items() if applies]


def _require_what_is_always_sent(document: dict[str, Any]) -> None:
    """A field with a default is optional in a request, but every answer has it: nothing is left out of answers."""
    schemas = document["components"]["schemas"]
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    asked = _reachable([operation.get("requestBody") for operation in operations], schemas)
    for name in _reachable([operation["responses"] for operation in operations], schemas) - asked:
        if "properties" in schemas[name]:
            schemas[name]["required"] = list(schemas[name]["properties"])


def _reachable(node: Any, schemas: dict[str, Any]) -> set[str]:
    """Names of the schemas that this part of the document refers to, directly or not."""
    found: set[str] = set()
    waiting = [node]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            name = str(part.get("$ref", "")).rpartition("/")[2]
            if name in schemas and name not in found:
                found.add(name)
                waiting.append(schemas[name])
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
    return found
