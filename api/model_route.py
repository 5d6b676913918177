"""Routes whose endpoints wait for the database: few run at a time, and each writes its answer where it made it.

FastAPI would start as many as forty in threads of their own, which then compete for the one interpreter; and it would
send the model that one returns to a second thread, to validate again what its type says already. With sixteen clients
both together cost a quarter of the throughput, and most of the time that the slowest waited.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from fastapi import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

READS_AT_ONCE = 4
WRITES_AT_ONCE = 8
"""More than reads, because these wait for a disk, and for each other; apart from them, so that no read waits for a
lock."""


class ModelRoute(APIRoute):
    """For `APIRouter(route_class=...)`: endpoints stay as they are, and so does what the schema says of them."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if not inspect.iscoroutinefunction(endpoint):
            reads = set(options.get("methods") or ()) <= {"GET"}
            endpoint = _in_turn(endpoint, _reads if reads else _writes, READS_AT_ONCE if reads else WRITES_AT_ONCE)
        super().__init__(path, endpoint, **options)


_reads: RunVar[CapacityLimiter] = RunVar("reads")
_writes: RunVar[CapacityLimiter] = RunVar("writes")


def _in_turn(endpoint: Callable[..., Any], limiters: RunVar[CapacityLimiter], at_once: int) -> Callable[..., Any]:
    def answer(arguments: dict[str, Any]) -> Any:
        found = endpoint(**arguments)
        if isinstance(found, BaseModel):
            return Response(found.model_dump_json(by_alias=True), media_type="application/json")
        return found

    @functools.wraps(endpoint)
    async def in_turn(**arguments: Any) -> Any:
        try:
            limiter = limiters.get()
        except LookupError:
            limiter = CapacityLimiter(at_once)
            limiters.set(limiter)
        return await to_thread.run_sync(answer, arguments, limiter=limiter)

    return in_turn
