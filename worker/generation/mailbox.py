"""A generator's end of the protocol in `shared.generation`: take requests, hear of cancellations, send chunks.

Owns this generator's place in the consumer group, its beat, and the chunks not written yet. Knows nothing of models.
"""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio
from pydantic import ValidationError
from redis.exceptions import RedisError, ResponseError

from shared.errors import AppError
from shared.generation import (
    CANCELS,
    GENERATORS,
    GONE_S,
    GROUP,
    KEY_TTL_S,
    MAX_CANCELS,
    MAX_REPLIES,
    REQUESTS,
    SILENT_MS,
    Choice,
    Chunk,
    Delta,
    End,
    Error,
    GenerationRequest,
    Kind,
    Taken,
    alive_key,
    cancelled_key,
    dump_chunks,
    error_fields,
    joined,
)

log = logging.getLogger(__name__)

READ_BLOCK_MS = 1_000
RETRY_S = 0.2
COALESCE_S = 0.02
"""Text of so long a moment is written together: no reader sees the difference, and hundreds of streams cost a tenth."""
MAX_PENDING = 100_000
"""Entries looked through for those of this generator; more than it can hold."""
MAX_UNSENT = 50_000
"""Chunks kept while the broker is away; past it the oldest go, and their readers see the gap."""


@dataclass(eq=False)
class Delivery:
    """One request as this generator holds it; numbers and sends its chunks."""

    mailbox: "Mailbox"
    entry_id: bytes
    request: GenerationRequest
    attempt: int
    age_s: float
    """Since its submission, when it was taken."""
    sequence: int = field(default=0)
    is_settled: bool = field(default=False)
    """Out of the queue: nobody else may start it any more."""
    unwritten: list[Choice] = field(default_factory=list)
    """Pieces that become one chunk when the mailbox writes next."""

    def taken(self) -> None:
        self._send(Taken, {})

    def delta(self, choices: list[Choice]) -> None:
        """Send the next pieces: the first ones at once, later ones together with what else comes within a moment."""
        is_first = self.sequence <= 1 and not self.unwritten
        self.unwritten += choices
        self.mailbox._has_pieces(self, is_urgent=is_first)
        self.mailbox._settle(self)

    def end(self, **fields: Any) -> None:
        self._send(End, fields)

    def error(self, error: AppError) -> None:
        self._send(Error, error_fields(error))

    def drop(self) -> None:
        """Out of the queue without a word: nobody wants it any more."""
        self.mailbox._settle(self)

    def close_delta(self) -> None:
        """Number the pieces not sent yet. From here on they may have been written, and no more join them."""
        if self.unwritten:
            pieces, self.unwritten = joined(self.unwritten), []
            self._number(Delta, {"choices": pieces})

    def _send(self, kind: type[Taken | End | Error], fields: dict[str, Any]) -> None:
        self.close_delta()
        self._number(kind, fields)
        if kind is not Taken:
            self.mailbox._settle(self)

    def _number(self, kind: type[Taken | Delta | End | Error], fields: dict[str, Any]) -> None:
        chunk = kind(
            id=self.request.id,
            generator=self.mailbox.name,
            attempt=self.attempt,
            sequence=self.sequence,
            **fields,
        )
        self.sequence += 1
        self.mailbox._queue(self.request.replies, chunk)


class Mailbox:
    """Used by one generator on one event loop."""

    def __init__(self, connection: redis.asyncio.Redis, name: str) -> None:
        self._redis = connection
        self.name = name
        self._pending: dict[Kind, dict[bytes, Delivery]] = {kind: {} for kind in REQUESTS}
        """Taken, and redelivered to others if this generator dies now."""
        self._with_pieces: dict[Delivery, None] = {}
        self._unsent: dict[str, list[Chunk]] = defaultdict(list)
        self._settled: dict[Kind, list[bytes]] = {kind: [] for kind in REQUESTS}
        self._has_unsent = asyncio.Event()
        self._is_urgent = asyncio.Event()
        self._next_write_at = 0.0
        self._last_cancel = "0"
        self._cancelled: dict[str, None] = {}
        """Ids heard of, oldest first: while the broker is asked about a request, its cancellation may come by."""
        self._missing_since: dict[str, float] = {}
        """Readers without a sign of life, as long as the broker has been reachable."""

    async def take(self, count: int, kind: Kind = "live", wait_ms: int = READ_BLOCK_MS) -> list[Delivery]:
        """Up to `count` requests that nobody has yet; an empty list after `wait_ms`.

        Raises:
            RedisError, OSError: the broker is away.
        """
        try:
            found: Any = await self._redis.xreadgroup(
                GROUP, self.name, {REQUESTS[kind]: ">"}, count=count, block=wait_ms
            )
        except ResponseError as error:
            # The first request ever, or the stream expired, possibly while this was waiting for it.
            if not any(sign in str(error) for sign in ("NOGROUP", "UNBLOCKED")):
                raise
            await self._make_group(kind)
            return []
        entries = found[0][1] if found else []
        return await self._accept(kind, [(entry_id, fields, 1) for entry_id, fields in entries])

    async def take_over(self, count: int, kind: Kind = "live") -> list[Delivery]:
        """Requests of generators that died before they sent any text."""
        try:
            mine = self._pending[kind]
            cursor = b"0-0"
            entries: list[tuple[bytes, dict[bytes, bytes]]] = []
            while len(entries) < count:  # one call looks at ten entries for each it may take, whoever has them
                found: Any = await self._redis.xautoclaim(
                    REQUESTS[kind], GROUP, self.name, SILENT_MS, start_id=cursor, count=count - len(entries)
                )
                cursor = found[0]
                entries += [(entry_id, fields) for entry_id, fields in found[1] if fields and entry_id not in mine]
                if cursor == b"0-0":
                    break
            if not entries:
                return []
            times: Any = await self._pending_here(kind)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            return []
        delivered = {item["message_id"]: item["times_delivered"] for item in times}
        return await self._accept(
            kind, [(entry_id, fields, delivered.get(entry_id, 2)) for entry_id, fields in entries]
        )

    async def _pending_here(self, kind: Kind) -> Any:
        return await self._redis.xpending_range(REQUESTS[kind], GROUP, "-", "+", MAX_PENDING, consumername=self.name)

    async def _accept(self, kind: Kind, entries: list[tuple[bytes, dict[bytes, bytes], int]]) -> list[Delivery]:
        if not entries:
            return []
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.time()
        requests = [_parse(fields) for _, fields, _ in entries]
        for request in requests:
            pipeline.exists(cancelled_key(request.id) if request else "")
        (seconds, microseconds), *cancelled = await pipeline.execute()
        now_ms = seconds * 1000 + microseconds // 1000
        accepted = []
        for (entry_id, _, attempt), request, is_cancelled in zip(entries, requests, cancelled, strict=True):
            if request is None or is_cancelled or request.id in self._cancelled:
                self._settled[kind].append(entry_id)
                self._wake()
                continue
            age_s = (now_ms - int(entry_id.split(b"-")[0])) / 1000
            delivery = Delivery(self, entry_id, request, attempt, age_s)
            self._pending[kind][entry_id] = delivery
            accepted.append(delivery)
        return accepted

    async def cancellations(self) -> list[str]:
        """Ids cancelled since the last call; waits up to a second for one.

        Those from before this generator's time come first: their requests may be in the queue still.
        """
        streams: Any = await self._redis.xread({CANCELS: self._last_cancel}, count=1000, block=READ_BLOCK_MS)
        ids = []
        for _, entries in streams:
            for entry_id, fields in entries:
                self._last_cancel = entry_id.decode()
                ids.append(fields[b"id"].decode())
        self._cancelled |= dict.fromkeys(ids)
        while len(self._cancelled) > MAX_CANCELS:
            del self._cancelled[next(iter(self._cancelled))]
        return ids

    async def beat(self, readers: Iterable[str]) -> set[str]:
        """Say that this generator lives and still has what it took; return the reply streams nobody reads any more.

        A reader is gone that has been silent for `GONE_S` while the broker was there: one that forgot everything, or
        was away, has lost the signs of life of those who live.

        Raises:
            RedisError, OSError: the broker is away.
        """
        try:
            missing = await self._beat(readers)
        except (RedisError, OSError):
            self._missing_since.clear()
            raise
        now = time.monotonic()
        self._missing_since = {key: self._missing_since.get(key, now) for key in missing}
        return {key for key, since in self._missing_since.items() if now - since >= GONE_S}

    async def _beat(self, readers: Iterable[str]) -> set[str]:
        keys = sorted(set(readers))  # first: what they are read from may change during any wait
        seconds, microseconds = await self._redis.time()
        now_ms = seconds * 1000 + microseconds // 1000
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.zadd(GENERATORS, {self.name: now_ms})
        pipeline.zremrangebyscore(GENERATORS, "-inf", now_ms - KEY_TTL_S * 1000)
        pipeline.expire(GENERATORS, KEY_TTL_S)
        for key in keys:
            pipeline.exists(alive_key(key))
        _, _, _, *alive = await pipeline.execute()
        for kind in REQUESTS:
            with contextlib.suppress(ResponseError):  # the stream expired: its requests are past their deadlines
                await self._renew(kind)
        return {key for key, is_alive in zip(keys, alive, strict=True) if not is_alive}

    async def _renew(self, kind: Kind) -> None:
        if not self._pending[kind]:
            return
        # Only what is still ours: after a long freeze somebody else has the rest, and must keep it.
        mine = await self._pending_here(kind)
        ids: Any = [item["message_id"] for item in mine if item["message_id"] in self._pending[kind]]
        if ids:
            await self._redis.xclaim(REQUESTS[kind], GROUP, self.name, 0, ids, idle=0, justid=True)

    async def leave(self) -> None:
        """Write what is left, and let others take over at once what was not begun."""
        with contextlib.suppress(RedisError, OSError):
            await self._write()
            for kind, deliveries in self._pending.items():
                if deliveries:
                    with contextlib.suppress(ResponseError):
                        ids: Any = list(deliveries)
                        await self._redis.xclaim(REQUESTS[kind], GROUP, self.name, 0, ids, idle=SILENT_MS, justid=True)
            await self._redis.zrem(GENERATORS, self.name)

    async def write_forever(self) -> None:
        """Write chunks as they come, those of one moment together."""
        while True:
            await self._has_unsent.wait()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_urgent.wait(), self._next_write_at - time.monotonic())
            self._next_write_at = time.monotonic() + COALESCE_S
            try:
                await self._write()
            except (RedisError, OSError) as error:
                log.warning("chunks can't be written: %s", error)
                await asyncio.sleep(RETRY_S)
            except Exception:
                log.exception("chunks can't be written")
                await asyncio.sleep(RETRY_S)

    async def _write(self) -> None:
        self._has_unsent.clear()
        self._is_urgent.clear()
        for delivery in self._with_pieces:
            delivery.close_delta()
        self._with_pieces.clear()
        unsent, self._unsent = self._unsent, defaultdict(list)
        settled, self._settled = self._settled, {kind: [] for kind in REQUESTS}
        pipeline = self._redis.pipeline(transaction=True)
        for key, chunks in unsent.items():
            pipeline.xadd(key, {"chunks": dump_chunks(chunks)}, maxlen=MAX_REPLIES, approximate=True)
            pipeline.expire(key, KEY_TTL_S)
        for kind, ids in settled.items():
            if ids:
                pipeline.xdel(REQUESTS[kind], *ids)
        try:
            await pipeline.execute()
            for kind, ids in settled.items():
                if ids:
                    with contextlib.suppress(ResponseError):  # the group went with its stream
                        await self._redis.xack(REQUESTS[kind], GROUP, *ids)
        except BaseException:
            for key, chunks in unsent.items():  # readers drop what arrives twice
                self._unsent[key][:0] = chunks
                del self._unsent[key][:-MAX_UNSENT]
            for kind, ids in settled.items():
                self._settled[kind][:0] = ids
            self._wake()
            raise

    def _has_pieces(self, delivery: Delivery, *, is_urgent: bool) -> None:
        self._with_pieces[delivery] = None
        self._has_unsent.set()
        if is_urgent:
            self._is_urgent.set()

    def _queue(self, replies: str, chunk: Chunk) -> None:
        self._unsent[replies].append(chunk)
        self._wake()

    def _settle(self, delivery: Delivery) -> None:
        if not delivery.is_settled:
            delivery.is_settled = True
            kind = delivery.request.kind
            self._pending[kind].pop(delivery.entry_id, None)
            self._settled[kind].append(delivery.entry_id)
            self._wake()

    def _wake(self) -> None:
        self._has_unsent.set()
        self._is_urgent.set()

    async def _make_group(self, kind: Kind) -> None:
        try:
            await self._redis.xgroup_create(REQUESTS[kind], GROUP, id="0", mkstream=True)
            await self._redis.expire(REQUESTS[kind], KEY_TTL_S)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise


def _parse(fields: dict[bytes, bytes]) -> GenerationRequest | None:
    try:
        return GenerationRequest.model_validate_json(fields[b"request"])
    except (KeyError, ValidationError) as error:
        log.error("a request is not of this protocol and was dropped: %s", error)
        return None
