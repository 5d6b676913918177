"""A route that writes its answer where it was made.

FastAPI would send a model that a sync endpoint returns to a second thread, to validate again what its type says
already, and then to the event loop to become JSON. On a busy process each such change of hands waits for its turn on
the interpreter.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from fastapi import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel


class ModelRoute(APIRoute):
    """For `APIRouter(route_class=...)`: endpoints stay as they are, and so does what the schema says of them."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint if inspect.iscoroutinefunction(endpoint) else _written(endpoint), **options)


def _written(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(endpoint)
    def written(*args: Any, **kwargs: Any) -> Any:
        answer = endpoint(*args, **kwargs)
        if isinstance(answer, BaseModel):
            return Response(answer.model_dump_json(by_alias=True), media_type="application/json")
        return answer

    return written
