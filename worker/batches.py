"""Running batches: claim, check the input, let generators answer line by line, write the files. `worker batch` does it.

One event loop runs several batches side by side, so that a small one does not wait for the end of a large one; files
are checked by a thread beside it (`worker.tasks`). What blocks (database, storage, reading the input through) happens
in threads; what a batch has at stake is renewed and recorded by its `_pulse`.

Whatever ends a run early (a shutdown, a lost lease, a fault) costs the lines that were being answered, and only them:
results are rows, and whoever claims next goes on after them. A database that is away stops nothing at once: results
wait in memory, bounded, and are recorded when it is back, if the lease still holds.
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from itertools import islice
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from shared import batches, completions, files, model_registry, storage, tasks
from shared.batches import Result
from shared.chat_schema import ChatRequest
from shared.completion_schema import CompletionRequest
from shared.db import UNAVAILABLE, clock, reading, transaction
from shared.errors import AppError, ModelNotFound, TooManyRequests, Unavailable
from shared.generation import Endpoint
from shared.generation_client import GenerationClient
from shared.ids import new_id
from shared.jobs import LeaseLost
from shared.model_registry import NamedModel
from shared.models import Batch, BatchStatus, File, FileStatus
from shared.settings import Settings
from worker import batch_input, lifecycle

log = logging.getLogger(__name__)
T = TypeVar("T")

SIDE_BY_SIDE = 8
"""Batches at once. Together they fill less than a queue of generation requests has room for."""
THREADS = 3 * SIDE_BY_SIDE
TICK_S = 0.25
"""Results of so long a moment are recorded together."""
DATABASE_RETRY_S = 1.0
STORAGE_RETRY_S = 30.0
MAX_UNSAVED = 500
"""Results that wait for the database; past it no more lines are begun."""
RECORD_AT_ONCE = 200
PAGE_LINES = 20
"""Read at once while a file is written: a line may have megabytes."""
FIRST_RETRY_S = 0.5
MAX_RETRY_S = 30.0
MAX_GENERATOR_FAULTS = 5
"""Of one line: a request that takes its generators down must not do so for a day."""
CRASHED = "generator_crashed"
"""Said once several generators have died of a request."""
NOT_AT_FAULT = (TooManyRequests.code, Unavailable.code, "no_generator", "request_lost", "answer_lost", "model_loading")
"""What says nothing about the request: it is sent again until the batch expires."""
NO_LIMIT_BYTES = 2**62

ENDPOINTS: dict[str, Endpoint] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
CANCELLED = ("batch_cancelled", "This request was not executed before the batch was cancelled.")
EXPIRED = ("batch_expired", "This request could not be executed before the completion window expired.")
"""What the error file says of lines without an answer."""


async def run_all(settings: Settings, worker: str) -> None:
    """Run batches until none waits, or this worker is shut down."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="batch"))
    async with GenerationClient(settings) as client:
        running: set[asyncio.Task[None]] = set()
        while True:
            while len(running) < SIDE_BY_SIDE and not lifecycle.shutdown.is_set():
                batch = await asyncio.to_thread(_claim, settings, worker)
                if batch is None:
                    break
                log.info("claimed %s, claim %d", batch.id, batch.fence)
                running.add(asyncio.create_task(Run(batch, client, settings).run()))
            if not running:
                return
            _, running = await asyncio.wait(running, timeout=settings.poll_s, return_when=asyncio.FIRST_COMPLETED)


def _claim(settings: Settings, worker: str) -> Batch | None:
    try:
        with reading() as session:  # it is asked every second; on SQLite a writer would stand in everybody's way
            if not batches.count_claimable(session):
                return None
        with transaction() as session:
            return batches.claim_next(session, worker, settings.lease_s)
    except SQLAlchemyError as error:
        log.warning("no batch claimed, the database said: %s", error)
        return None  # the sweep sends another hint


class _Stopped(Exception):
    """This worker is being shut down."""


class Run:
    """One claim of one batch."""

    def __init__(self, batch: Batch, client: GenerationClient, settings: Settings) -> None:
        self._batch = batch
        self._client = client
        self._settings = settings
        self._endpoint = ENDPOINTS[batch.endpoint]
        self._unsaved: list[Result] = []
        self._has_room = asyncio.Event()
        self._recording = asyncio.Lock()
        self._reading = asyncio.Lock()
        self._halt = asyncio.Event()
        """Set with any of the next four: no more lines are to be done."""
        self._is_lost = self._is_shut_down = self._is_cancelled = self._has_expired = False
        self._expires_at = float("inf")
        """By this process's monotonic clock."""

    async def run(self) -> None:
        """Bring the batch to its end, or give the claim back. Raises nothing."""
        batch = self._batch
        pulse = asyncio.create_task(self._pulse())
        try:
            await self._advance()
        except LeaseLost:
            log.warning("lost the claim %d of %s", batch.fence, batch.id)
        except _Stopped:
            log.info("%s is given back", batch.id)
            await self._try(batches.give_back, batch.id, batch.fence)
        except (Unavailable, storage.StorageFull) as error:
            log.warning("%s waits for the storage: %s", batch.id, error.message)
            await self._try(batches.give_back, batch.id, batch.fence, STORAGE_RETRY_S)
        except Exception as error:
            log.exception("%s can't go on for now", batch.id)
            with suppress(SQLAlchemyError, LeaseLost, _Stopped):
                await self._save_rest()
            reason, delay_s = f"{type(error).__name__}: {error}"[:300], self._settings.retry_delay_s
            await self._try(batches.postpone_or_fail, batch.id, batch.fence, reason, self._settings.max_faults, delay_s)
        finally:
            await tasks.end([pulse])

    async def _try(self, verb: Callable[..., object], *values: Any) -> None:
        """End the claim; if that is impossible, its lease does."""
        with suppress(SQLAlchemyError, LeaseLost, _Stopped):
            await self._write(verb, *values)

    async def _advance(self) -> None:
        batch = self._batch
        self._expires_at = time.monotonic() + batch.expires_at - await self._read(clock)
        self._look_at(batch.status)
        row = await self._read(lambda session: session.get(File, batch.input_file_id))
        try:
            stream = await asyncio.to_thread(self._open, row)
        except (FileNotFoundError, storage.DamagedFile) as error:
            log.error("%s has no input: %s", batch.id, error)
            message = f"the bytes of file {batch.input_file_id} are missing or damaged in storage; upload it again"
            await self._write(batches.fail, batch.id, batch.fence, [batch_input.error_of("file_missing", message)])
            return
        with stream:
            if batch.status == BatchStatus.VALIDATING:
                await self._validate(stream)
            if self._batch.status in (BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING) and self._batch.total:
                await self._run_lines(stream)
        if self._batch.status != BatchStatus.FAILED:
            await self._finish()

    def _open(self, row: File | None) -> BinaryIO:
        """The input file; while it is open it stays readable, whatever a cache evicts."""
        if row is None:
            raise FileNotFoundError("the file has no row")
        return storage.local_file(self._settings, row.id, sha256=row.sha256).open("rb")

    async def _validate(self, stream: BinaryIO) -> None:
        """validating → in_progress or failed; neither if something halts it."""
        batch = self._batch
        try:
            summary, model = await asyncio.to_thread(self._check, stream)
        except batch_input.Interrupted:
            self._demand_claim()
        except batch_input.InvalidInput as invalid:
            self._batch = await self._write(batches.fail, batch.id, batch.fence, invalid.errors)
            log.info("%s is not valid: %d errors", batch.id, len(invalid.errors))
        else:
            self._batch = await self._write(batches.begin, batch.id, batch.fence, summary.total, model.id)
            self._look_at(self._batch.status)

    def _check(self, stream: BinaryIO) -> tuple[batch_input.Summary, NamedModel]:
        summary = batch_input.check(stream, self._batch.endpoint, self._halt.is_set)
        try:
            with reading() as session:
                return summary, model_registry.find(session, self._batch.project_id, summary.model)
        except ModelNotFound as error:
            problem = batch_input.error_of(error.code, error.message, param="body.model")
            raise batch_input.InvalidInput([problem]) from error

    async def _run_lines(self, stream: BinaryIO) -> None:
        """Get every line its result. If something halts this before, lines without one get that as theirs."""
        if not self._halt.is_set():
            done = await self._read(lambda session: batches.finished_lines(session, self._batch.id))
            model = await self._read(self._model)
            waiting = self._requests(stream, done)
            feeders = {asyncio.create_task(self._feed(waiting, model)) for _ in range(self._settings.batch_requests)}
            halt = asyncio.create_task(self._halt.wait())
            busy = set(feeders)
            try:
                while busy and not halt.done():
                    ended, _ = await asyncio.wait({*busy, halt}, return_when=asyncio.FIRST_COMPLETED)
                    busy -= ended
                    for feeder in feeders & ended:
                        feeder.result()
            finally:
                await tasks.end([*feeders, halt])
        await self._save_rest()
        if self._is_cancelled or self._has_expired:
            await self._give_up(stream)

    def _requests(self, stream: BinaryIO, done: set[int]) -> Iterator[batch_input.Request]:
        stream.seek(0)
        return batch_input.read_requests(stream, self._batch.endpoint, done)

    async def _next_of(self, waiting: Iterator[T], count: int = 1) -> list[T]:
        """Read in a thread, by one at a time: a line of megabytes must not hold up the others' answers."""
        async with self._reading:
            return await asyncio.to_thread(lambda: list(islice(waiting, count)))

    def _model(self, session: Session) -> NamedModel | ModelNotFound:
        """The batch's model, or the result of every line that is left: it may have been deleted meanwhile."""
        try:
            return model_registry.find(session, self._batch.project_id, self._batch.model or "")
        except ModelNotFound as error:
            return error

    async def _feed(self, waiting: Iterator[batch_input.Request], model: NamedModel | ModelNotFound) -> None:
        while found := await self._next_of(waiting):
            self._unsaved.append(await self._result_of(found[0], model))
            if len(self._unsaved) >= MAX_UNSAVED:
                self._has_room.clear()
                await self._has_room.wait()

    async def _result_of(self, request: batch_input.Request, model: NamedModel | ModelNotFound) -> Result:
        try:
            if isinstance(model, ModelNotFound):
                raise model
            spec = await asyncio.to_thread(batch_input.parse_body, request.body, self._batch.endpoint)
            body = await self._answer(spec, model)
        except AppError as error:
            return _result(request, response=_response(error.status_code, error.body()), is_error=True)
        except Exception:
            # One line's matter, and not the other lines'.
            log.exception("line %d of %s can't be answered", request.line, self._batch.id)
            failure = AppError("this request could not be processed; the worker's log has the details")
            return _result(request, response=_response(failure.status_code, failure.body()), is_error=True)
        usage = body["usage"]
        return _result(request, response=_response(200, body))._replace(
            input_tokens=usage["prompt_tokens"], output_tokens=usage["completion_tokens"]
        )

    async def _answer(self, spec: ChatRequest | CompletionRequest, model: NamedModel) -> dict[str, Any]:
        """OpenAI's JSON of a whole answer. Tries again while it is not the request's fault that there is none.

        Raises:
            AppError: the request can't be answered.
        """
        faults, delay_s = 0, FIRST_RETRY_S
        while True:
            whole = completions.Whole(self._endpoint, model.id, spec.n or 1)
            try:
                for prompt_index, body in enumerate(completions.split(spec)):
                    await self._follow(whole, prompt_index, body, model)
                return whole.body()
            except AppError as error:
                faults += error.code not in NOT_AT_FAULT
                may_succeed = error.status_code >= 500 or isinstance(error, TooManyRequests)
                if not may_succeed or error.code == CRASHED or faults >= MAX_GENERATOR_FAULTS:
                    raise
                log.info("a line of %s is tried again: %s", self._batch.id, error.message)
            await asyncio.sleep(random.uniform(0.5, 1) * delay_s)  # noqa: S311 - so that many don't come at once
            delay_s = min(2 * delay_s, MAX_RETRY_S)

    async def _follow(
        self, whole: completions.Whole, prompt_index: int, body: dict[str, Any], model: NamedModel
    ) -> None:
        answer = await self._client.submit(
            model=model.id,
            location=model.location,
            endpoint=self._endpoint,
            body=body,
            kind="batch",
            deadline_s=max(1.0, self._expires_at - time.monotonic()),
        )
        try:
            async for piece in answer:
                whole.add(piece, prompt_index)
        finally:
            answer.cancel()  # without effect on one that is complete

    async def _give_up(self, stream: BinaryIO) -> None:
        """Give every line that has no result the one that says why."""
        code, message = CANCELLED if self._is_cancelled else EXPIRED
        done = await self._read(lambda session: batches.finished_lines(session, self._batch.id))
        waiting = self._requests(stream, done)
        while found := await self._next_of(waiting, RECORD_AT_ONCE):
            error = {"code": code, "message": message}
            self._unsaved += [_result(request, error=error, is_error=True) for request in found]
            if len(self._unsaved) >= MAX_UNSAVED:
                await self._save_rest()
        await self._save_rest()

    async def _finish(self) -> None:
        """Write the files and end, in the way that what happened demands."""
        self._demand_claim()
        batch = self._batch
        if batch.status == BatchStatus.IN_PROGRESS and not self._halt.is_set():
            self._batch = batch = await self._write(batches.begin_finalizing, batch.id, batch.fence)
        in_time = batch.status == BatchStatus.FINALIZING or not self._has_expired
        ended = await self._patiently(self._end, BatchStatus.COMPLETED if in_time else BatchStatus.EXPIRED)
        log.info("%s has ended: %s", ended.id, ended.status)

    def _end(self, to: BatchStatus) -> Batch:
        """Write the files that have lines; register them and end the batch in one transaction."""
        with reading() as session:
            row = session.get_one(Batch, self._batch.id)
        kinds = (("output", row.completed), ("error", row.failed))
        written: dict[str, tuple[str, storage.Stored, int]] = {}
        with ExitStack() as stack:
            for kind, lines in kinds:
                if lines:
                    file_id = new_id("file")
                    stack.enter_context(files.row_follows(self._settings, file_id))
                    chunks = self._lines_of(is_error=kind == "error")
                    stored = storage.save_file(self._settings, file_id, chunks, max_bytes=NO_LIMIT_BYTES)
                    written[kind] = (file_id, stored, lines)
            with transaction() as session:
                for kind, (file_id, stored, lines) in written.items():
                    files.create(
                        session,
                        file_id=file_id,
                        project_id=row.project_id,
                        filename=f"{row.id}_{kind}.jsonl",
                        purpose=files.BATCH_OUTPUT_PURPOSE,
                        size_bytes=stored.bytes,
                        sha256=stored.sha256,
                        status=FileStatus.PROCESSED,
                        rows=lines,
                        expires_after_s=row.output_expires_after_s,
                    )
                ids = {f"{kind}_file_id": file_id for kind, (file_id, _, _) in written.items()}
                return batches.finish(session, row.id, self._batch.fence, to, **ids)

    def _lines_of(self, *, is_error: bool) -> Iterator[bytes]:
        after = 0
        while True:
            with reading() as session:
                page = batches.next_results(session, self._batch.id, is_error=is_error, after=after, limit=PAGE_LINES)
            for row in page:
                after = row.line
                yield row.body.encode() + b"\n"
            if len(page) < PAGE_LINES:
                return

    async def _pulse(self) -> None:
        """Record results, renew the lease, notice what halts the run: as long as there is one."""
        batch_id, fence = self._batch.id, self._batch.fence
        renewed_at = looked_at = time.monotonic()
        while not self._is_lost:
            await asyncio.sleep(min(TICK_S, self._settings.poll_s))
            began = time.monotonic()
            self._look_at(None)
            try:
                if self._unsaved:
                    await self._record()
                    renewed_at = began
                elif began - renewed_at >= self._settings.heartbeat_s:
                    lease_s = self._settings.lease_s
                    self._look_at(
                        await asyncio.to_thread(_on, transaction, batches.renew_lease, batch_id, fence, lease_s)
                    )
                    renewed_at = began
                elif began - looked_at >= self._settings.poll_s:
                    self._look_at(await asyncio.to_thread(_on, reading, batches.look, batch_id, fence))
                    looked_at = began
            except LeaseLost:
                self._is_lost = True
                self._halt.set()
            except SQLAlchemyError as error:
                log.warning("%s waits for the database: %s", batch_id, type(error).__name__)

    def _look_at(self, status: BatchStatus | None) -> None:
        """Note what halts the run."""
        self._is_cancelled |= status == BatchStatus.CANCELLING
        self._has_expired |= time.monotonic() >= self._expires_at
        self._is_shut_down |= lifecycle.shutdown.is_set()
        if self._is_cancelled or self._has_expired or self._is_shut_down:
            self._halt.set()

    def _demand_claim(self) -> None:
        """Go on only as the one who may.

        Raises:
            LeaseLost: somebody else has the batch, or nobody.
            _Stopped: this worker ends.
        """
        if self._is_lost:
            raise LeaseLost(f"batch {self._batch.id} is no longer run by claim {self._batch.fence}")
        if self._is_shut_down:
            raise _Stopped

    async def _save_rest(self) -> None:
        """Record all results. A worker that is being shut down tries once."""
        while self._unsaved and not self._is_lost:
            try:
                await self._record()
            except SQLAlchemyError as error:
                log.warning("%s waits for the database: %s", self._batch.id, type(error).__name__)
                self._demand_claim()
                await asyncio.sleep(DATABASE_RETRY_S)
        self._demand_claim()

    async def _record(self) -> None:
        async with self._recording:
            if results := self._unsaved[:RECORD_AT_ONCE]:
                lease_s = self._settings.lease_s
                batch = await asyncio.to_thread(
                    _on, transaction, batches.record, self._batch.id, self._batch.fence, results, lease_s
                )
                del self._unsaved[: len(results)]
                self._has_room.set()
                self._look_at(batch.status)

    async def _read(self, ask: Callable[[Session], T]) -> T:
        return await self._patiently(_on, reading, ask)

    async def _write(self, verb: Callable[..., T], *values: Any) -> T:
        return await self._patiently(_on, transaction, verb, *values)

    async def _patiently(self, work: Callable[..., T], *values: Any) -> T:
        """Do what needs the database, in a thread; one that is away is waited for as long as the claim holds. What has
        taken effect unnoticed is not done twice: the claim is over then, or it makes no difference."""
        while True:
            try:
                return await asyncio.to_thread(work, *values)
            except UNAVAILABLE as error:
                log.warning("%s waits for the database: %s", self._batch.id, type(error).__name__)
                self._demand_claim()
            await asyncio.sleep(DATABASE_RETRY_S)


def _on(opened: Callable[[], AbstractContextManager[Session]], verb: Callable[..., T], *values: Any) -> T:
    """A verb, on a session of its own."""
    with opened() as session:
        return verb(session, *values)


def _response(status_code: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status_code, "request_id": f"req_{uuid4().hex}", "body": body}


def _result(
    request: batch_input.Request,
    *,
    response: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
    is_error: bool = False,
) -> Result:
    """What becomes of a line, in OpenAI's shape."""
    said = {"id": new_id("batch_req", "_"), "custom_id": request.custom_id, "response": response, "error": error}
    return Result(request.line, is_error, json.dumps(said))
