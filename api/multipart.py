"""Bodies of multipart/form-data: which fields they may have, and their file in chunks.

Starlette keeps a file up to 1 MiB in memory and spools a larger one to a nameless file, which no crash leaves behind,
in the process's temporary folder; `cli.api` keeps that on disk. The alternative, to write the body into storage as it
arrives, would save a copy, but hold a storage's connection as long as the slowest client takes, and know the fields
that come after the file too late.
"""

from collections.abc import Awaitable, Callable, Iterator
from typing import BinaryIO

from fastapi import Request

from shared import storage
from shared.errors import BadRequest


def only(*names: str) -> Callable[[Request], Awaitable[None]]:
    """A dependency that refuses any other field, and a field sent twice: ignored, it would be a broken promise."""

    async def refuse_others(request: Request) -> None:
        seen: set[str] = set()
        for name, _ in (await request.form()).multi_items():
            if name not in names:
                wanted = ", ".join(f"`{known}`" for known in names)
                raise BadRequest(f"unknown field {name[:100]!r}; send {wanted}", param=name[:100])
            if name in seen:
                raise BadRequest(f"the field {name!r} was sent twice; send it once", param=name)
            seen.add(name)

    return refuse_others


def chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(storage.COPY_CHUNK_BYTES):
        yield chunk
