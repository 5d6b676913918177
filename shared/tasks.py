"""Ending asyncio tasks for certain."""

import asyncio
from collections.abc import Collection
from typing import Any

AGAIN_AFTER_S = 0.2


async def end(tasks: Collection["asyncio.Task[Any]"]) -> None:
    """Cancel tasks, again and again, until they have ended.

    Once is not enough for those that talk to Redis: redis-py 8.1 swallows a cancellation that arrives while it cleans
    up after a command (`Pipeline.execute`, reading with a timeout), and a loop around the command goes on for ever.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_AFTER_S)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # fetched, so that nobody is told that it never was
