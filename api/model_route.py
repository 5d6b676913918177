"""Routes whose endpoints wait for the database: few run at a time, and each writes its answer where it made it.

FastAPI would start as many as forty in threads of their own, which then compete for the one interpreter; and it would
send the model that one returns to a second thread, to validate again what its type says already. With sixteen clients
both together cost a quarter of the throughput, and most of the time that the slowest waited.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from anyio import CapacityLimiter, WouldBlock, fail_after, to_thread
from anyio.lowlevel import RunVar
from fastapi import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel

from shared.errors import Unavailable

READS_AT_ONCE = 4
WRITES_AT_ONCE = 8
"""More than reads, because these wait for a disk, and for each other; apart from them, so that reads don't wait for
the locks of writes."""
MOST_WAIT_S = 10.0
"""For a turn. In a day's work it is milliseconds; if the database stands still, nobody waits for those before him."""


class ModelRoute(APIRoute):
    """For `APIRouter(route_class=...)`: endpoints stay as they are, and so does what the schema says of them.

    A DELETE is left to FastAPI's own threads: it may remove files from an object store, which can take minutes.

    Raises:
        TypeError: the route has an option that changes the answer beside its model.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if not inspect.iscoroutinefunction(endpoint) and "DELETE" not in (options.get("methods") or ()):
            reads = set(options.get("methods") or ()) <= {"GET"}
            endpoint = _in_turn(endpoint, _reads if reads else _writes)
        super().__init__(path, endpoint, **options)
        if self.status_code or self.response_model_exclude_none or self.response_model_exclude_unset:
            raise TypeError(f"{path}: status_code and response_model_exclude_... have no effect on a ModelRoute")


class _Turns:
    """So many at a time, in order of arrival. One limiter for each event loop, as anyio wants it."""

    def __init__(self, name: str, at_once: int) -> None:
        self._at_once = at_once
        self._limiters: RunVar[tuple[CapacityLimiter, CapacityLimiter]] = RunVar(name)

    async def run(self, work: Callable[[], Any]) -> Any:
        """`work` in a thread.

        Raises:
            Unavailable: it was not its turn for too long, and it has not begun.
        """
        try:
            turns, threads = self._limiters.get()
        except LookupError:
            turns, threads = CapacityLimiter(self._at_once), CapacityLimiter(self._at_once)
            self._limiters.set((turns, threads))
        me = object()
        try:
            turns.acquire_on_behalf_of_nowait(me)
        except WouldBlock:
            await self._wait(turns, me)
        try:
            return await to_thread.run_sync(work, limiter=threads)  # a thread is free: it has its turn
        finally:
            turns.release_on_behalf_of(me)

    async def _wait(self, turns: CapacityLimiter, me: object) -> None:
        try:
            with fail_after(MOST_WAIT_S):
                await turns.acquire_on_behalf_of(me)
        except TimeoutError:
            raise Unavailable(
                f"the database has kept {self._at_once} other requests waiting for {MOST_WAIT_S:.0f} s; try again",
                retry_after_s=2,
            ) from None


_reads = _Turns("reads", READS_AT_ONCE)
_writes = _Turns("writes", WRITES_AT_ONCE)


def _in_turn(endpoint: Callable[..., Any], turns: _Turns) -> Callable[..., Any]:
    def answer(arguments: dict[str, Any]) -> Any:
        found = endpoint(**arguments)
        if isinstance(found, BaseModel):
            return Response(found.model_dump_json(), media_type="application/json")
        return found

    @functools.wraps(endpoint)
    async def in_turn(**arguments: Any) -> Any:
        return await turns.run(functools.partial(answer, arguments))

    return in_turn
