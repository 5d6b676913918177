"""The API's end of generation: submit a request, follow its answer, cancel it.

Owns one reply stream and everything this process waits for. One reader serves all requests: it never waits for a
slow client, because an `Answer` keeps what was not fetched yet as one piece a choice.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from shared import tasks
from shared.errors import AppError, TooManyRequests, Unavailable
from shared.generation import (
    BEAT_S,
    CANCELS,
    GENERATORS,
    GONE_S,
    GROUP,
    KEY_TTL_S,
    MAX_CANCELS,
    REQUESTS,
    SILENT_MS,
    Choice,
    Chunk,
    Delta,
    End,
    Endpoint,
    Error,
    GenerationRequest,
    Kind,
    alive_key,
    cancelled_key,
    joined,
    load_chunks,
    replies_key,
)
from shared.ids import new_id
from shared.redis_client import connect_async
from shared.settings import Settings

log = logging.getLogger(__name__)

NO_GENERATOR_WAIT_S = 20.0
"""How long a request waits for a generator to appear: one that was restarted needs some seconds for its imports."""
BROKER_WAIT_S = 15.0
"""How long the broker may be away before what waits for it is given up."""
READ_BLOCK_MS = 1_000
DEADLINE_GRACE_S = 2.0
"""The generator speaks first about a passed deadline; this is for one that can't."""

MAX_PIECES = 256
"""Of an answer that nobody fetches, before they are joined."""
MAX_QUEUED_BYTES = 64 * 2**20
"""Of the requests of one kind that wait, beside the one that comes: the broker has other work, too."""

_SUBMIT = """
redis.call('SET', KEYS[2], 1, 'PX', ARGV[4])
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then return false end
if (redis.call('MEMORY', 'USAGE', KEYS[1]) or 0) > tonumber(ARGV[5]) then return false end
local id = redis.call('XADD', KEYS[1], '*', 'request', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return id
"""
"""Say that the reader lives; count and add in one step, so that API processes together keep to the bound."""


@dataclass(frozen=True)
class Piece:
    """What an `Answer` yields: the next piece of some choices, and with the last one what it all took."""

    choices: list[Choice]
    end: End | None = None


class Answer:
    """One request's answer on its way. Iterate it once; leaving early must be said with `cancel`."""

    def __init__(self, client: "GenerationClient", request: GenerationRequest) -> None:
        self.request = request
        self._client = client
        self._choices: list[Choice] = []
        self._end: End | None = None
        self._error: AppError | None = None
        self._news = asyncio.Event()
        self.entry_id = b""
        self.submitted_at = time.monotonic()
        self.generator: str | None = None
        """Who has it, as far as we know."""
        self._attempt = 0
        self._next_sequence: dict[int, int] = {}
        self.has_begun = False
        self.missing_since: float | None = None

    @property
    def is_settled(self) -> bool:
        return self._end is not None or self._error is not None

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Pieces as they come; the last one has `end`.

        Raises:
            AppError: whatever kept the answer from being complete.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            choices, self._choices = joined(self._choices), []
            if self._end is not None:
                yield Piece(choices, self._end)
                return
            if choices:
                yield Piece(choices)
            if self._error is not None:
                raise self._error

    def cancel(self) -> None:
        """Nobody wants the rest: free its slot. Without effect on an answer that is complete."""
        if not self.is_settled:
            self.fail(AppError("the request was cancelled", code="cancelled"))
            self._client._abandon(self)

    def fail(self, error: AppError) -> None:
        """End with an error, unless it has ended."""
        if not self.is_settled:
            self._error = error
            self._client._forget(self)
            self._news.set()

    def receive(self, chunk: Chunk) -> None:
        """Take one chunk; never waits."""
        if self.is_settled or chunk.attempt < self._attempt or (self.has_begun and chunk.attempt != self._attempt):
            return  # from a generator that was taken for dead, or one that repeats what another already says
        expected = self._next_sequence.get(chunk.attempt, 0)
        if chunk.sequence < expected:
            return  # written twice, because the first write's confirmation was lost
        if chunk.sequence > expected:
            self.fail(Unavailable("part of the answer was lost on its way; try again", code="answer_lost"))
            self._client._abandon(self)
            return
        self._next_sequence[chunk.attempt] = expected + 1
        self._attempt = chunk.attempt
        self.generator = chunk.generator
        if isinstance(chunk, Delta):
            self.has_begun = True
            self._choices += chunk.choices
            if len(self._choices) > MAX_PIECES:
                self._choices = joined(self._choices)
            self._news.set()
        elif isinstance(chunk, Error):
            self.fail(chunk.to_exception())
        elif isinstance(chunk, End):
            self._end = chunk
            self._client._forget(self)
            self._news.set()


class GenerationClient:
    """Started once a process, on its event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._redis: redis.asyncio.Redis = connect_async(settings)
        self._replies = replies_key(new_id("api"))
        self._submit_script = self._redis.register_script(_SUBMIT)
        self._waiting: dict[str, Answer] = {}
        self._last_read = "0"
        self._reached_at = time.monotonic()
        self._generator_seen_at = time.monotonic()
        self._seen_at: dict[str, float] = {}
        """When each generator was last known to live."""
        self._back_at = 0.0
        """When the broker was last back after it had been away."""
        self._is_away = False
        self._loops: list[asyncio.Task[None]] = []
        self._errands: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "GenerationClient":
        self._loops = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for answer in list(self._waiting.values()):
            answer.cancel()
        if self._errands:
            await asyncio.wait(self._errands, timeout=2)
        await tasks.end([*self._loops, *self._errands])
        with contextlib.suppress(RedisError, OSError):
            await self._redis.delete(self._replies, alive_key(self._replies))
        await self._redis.aclose()

    @property
    def waiting_count(self) -> int:
        """Requests whose answers are not complete."""
        return len(self._waiting)

    async def submit(
        self,
        *,
        model: str,
        location: str,
        endpoint: Endpoint,
        body: dict[str, Any],
        kind: Kind = "live",
        deadline_s: float | None = None,
    ) -> Answer:
        """Queue a request; the arguments are the fields of `GenerationRequest`.

        Raises:
            TooManyRequests: `ANNEAL_GENERATION_QUEUE` requests of its kind wait already.
            Unavailable: the broker is out of reach.
        """
        deadline_s = self._settings.generation_deadline_s if deadline_s is None else deadline_s
        request = GenerationRequest(
            id=new_id("gen"),
            replies=self._replies,
            model=model,
            location=location,
            endpoint=endpoint,
            body=body,
            kind=kind,
            deadline_s=deadline_s,
        )
        answer = Answer(self, request)
        self._waiting[request.id] = answer  # before it is sent: the first chunk may be faster than the confirmation
        try:
            entry_id = await self._submit_script(
                keys=[REQUESTS[kind], alive_key(self._replies)],
                args=[
                    self._settings.generation_queue,
                    request.model_dump_json(),
                    int((deadline_s + KEY_TTL_S) * 1000),
                    SILENT_MS,
                    MAX_QUEUED_BYTES,
                ],
            )
        except (RedisError, OSError) as error:
            self._forget(answer)
            log.warning("a request could not be queued: %s", error)
            raise Unavailable(
                "the broker that generation goes through is out of reach; try again", retry_after_s=2
            ) from error
        except BaseException:
            answer.cancel()  # the client left during the submission: it may or may not be queued
            raise
        if entry_id is None:
            self._forget(answer)
            raise TooManyRequests(
                f"{self._settings.generation_queue} generation requests are waiting already "
                f"(ANNEAL_GENERATION_QUEUE), or {MAX_QUEUED_BYTES // 2**20} MiB of them; try again later",
                retry_after_s=5,
            )
        answer.entry_id = entry_id
        return answer

    async def _read(self) -> None:
        while True:
            try:
                streams: Any = await self._redis.xread({self._replies: self._last_read}, count=500, block=READ_BLOCK_MS)
            except (RedisError, OSError) as error:
                log.warning("answers can't be read: %s", error)
                await asyncio.sleep(BEAT_S / 2)
                continue
            for _, entries in streams:
                for entry_id, fields in entries:
                    self._last_read = entry_id.decode()
                    self._dispatch(fields[b"chunks"])

    def _dispatch(self, data: bytes) -> None:
        try:
            chunks = load_chunks(data)
        except ValueError as error:
            log.error("a reply is not of this protocol and was dropped: %s", error)
            return
        for chunk in chunks:
            if answer := self._waiting.get(chunk.id):
                answer.receive(chunk)

    async def _watch(self) -> None:
        while True:
            try:
                await self._look_after()
                self._reached_at = time.monotonic()
                self._is_away = False
            except (RedisError, OSError) as error:
                self._is_away = True
                log.warning("generators can't be watched: %s", error)
                if time.monotonic() - self._reached_at > BROKER_WAIT_S:
                    for answer in list(self._waiting.values()):
                        answer.fail(Unavailable("the broker that generation goes through is gone; try again"))
            except Exception:
                log.exception("a watch over generation requests failed")
            await asyncio.sleep(BEAT_S)

    async def _look_after(self) -> None:
        """Say that this process lives, and give up on requests that nobody will answer."""
        unowned = [answer for answer in self._waiting.values() if not answer.has_begun and answer.entry_id]
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.set(alive_key(self._replies), 1, px=SILENT_MS)
        pipeline.expire(self._replies, KEY_TTL_S)
        pipeline.xtrim(self._replies, minid=self._last_read, approximate=False)
        pipeline.time()
        pipeline.zrange(GENERATORS, 0, -1, withscores=True)
        for answer in unowned:
            pipeline.xrange(REQUESTS[answer.request.kind], answer.entry_id, answer.entry_id)
        _, _, _, (seconds, microseconds), beats, *entries = await pipeline.execute()
        now_ms = seconds * 1000 + microseconds // 1000
        alive = {name.decode() for name, beaten_ms in beats if now_ms - beaten_ms < SILENT_MS}
        here = time.monotonic()
        if self._is_away:
            self._back_at = here
        self._seen_at |= dict.fromkeys(alive, here)
        self._seen_at = {name: at for name, at in self._seen_at.items() if here - at < KEY_TTL_S}
        if alive:
            self._generator_seen_at = here
        lost = {answer.request.id for answer, entry in zip(unowned, entries, strict=True) if not entry}
        for answer in list(self._waiting.values()):
            self._judge(answer, is_lost=answer.request.id in lost)

    def _is_dead(self, generator: str, since: float) -> bool:
        """A broker that was away or forgot everything has lost the beats of those who live: they get time for one."""
        return time.monotonic() - max(self._seen_at.get(generator, since), self._back_at) > GONE_S

    def _judge(self, answer: Answer, *, is_lost: bool) -> None:
        age_s = time.monotonic() - answer.submitted_at
        if age_s > answer.request.deadline_s + DEADLINE_GRACE_S:
            answer.fail(deadline_passed(answer.request.deadline_s))
            self._abandon(answer)
        elif answer.has_begun and self._is_dead(answer.generator or "", answer.submitted_at):
            answer.fail(Unavailable("the generator died while it answered; try again", code="generator_lost"))
        elif not answer.has_begun and min(age_s, time.monotonic() - self._generator_seen_at) > NO_GENERATOR_WAIT_S:
            answer.fail(
                Unavailable(
                    f"no generator has been running for {NO_GENERATOR_WAIT_S:.0f} s: models can't be used at the "
                    "moment; the operator starts one with `anneal worker generate`",
                    code="no_generator",
                    retry_after_s=10,
                )
            )
            self._abandon(answer)
        elif is_lost and (answer.generator is None or self._is_dead(answer.generator, answer.submitted_at)):
            # Its first chunk may be on its way; a second look, a beat later, is sure.
            if answer.missing_since is None:
                answer.missing_since = time.monotonic()
            elif time.monotonic() - answer.missing_since > 2 * BEAT_S:
                answer.fail(Unavailable("the broker lost this request; try again", code="request_lost"))

    def _abandon(self, answer: Answer) -> None:
        """Tell the generators in the background: whoever gives up may itself be in the middle of being cancelled."""
        self._run(self._cancel(answer))

    async def _cancel(self, answer: Answer) -> None:
        queue = REQUESTS[answer.request.kind]
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.set(cancelled_key(answer.request.id), 1, ex=int(answer.request.deadline_s) + KEY_TTL_S)
        pipeline.xadd(CANCELS, {"id": answer.request.id}, maxlen=MAX_CANCELS, approximate=True)
        pipeline.expire(CANCELS, KEY_TTL_S)
        try:
            await pipeline.execute()
            if answer.entry_id and answer.generator is None:
                await self._redis.xdel(queue, answer.entry_id)  # make room in the queue at once
                with contextlib.suppress(RedisError):  # nobody may have made the group yet
                    await self._redis.xack(queue, GROUP, answer.entry_id)
        except (RedisError, OSError) as error:
            log.warning("%s could not be cancelled, its deadline will end it: %s", answer.request.id, error)

    def _forget(self, answer: Answer) -> None:
        self._waiting.pop(answer.request.id, None)

    def _run(self, errand: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(errand)
        self._errands.add(task)  # the event loop itself keeps no reference
        task.add_done_callback(self._errands.discard)


def deadline_passed(deadline_s: float) -> Unavailable:
    """The error of a request that took too long."""
    return Unavailable(
        f"the answer was not complete within {deadline_s:g} s (ANNEAL_GENERATION_DEADLINE_S); "
        "ask for fewer tokens, or try again when less is going on",
        code="deadline_exceeded",
    )
