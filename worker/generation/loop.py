"""`worker generate`: takes requests from Redis into free slots, decodes them, streams the answers back.

    take ─▶ taken ─▶ model loaded ─▶ engine: delta* ─▶ end
              └────────────┴────────────┴──▶ error | cancelled (its slot is free at once)

Owns the generator's life and one task per request. Never holds up the event loop: loading and tokenising happen in
threads, decoding in each engine's own, or in its process. Reads the database once, for the names of pinned models.

Requests of a batch have slots of their own, so that they never keep a live one waiting; while live ones are answered,
only one of a batch's goes on at a time beside those that have begun.
"""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable

from redis.exceptions import RedisError

from shared import tasks
from shared.errors import AppError, Unavailable
from shared.generation import BEAT_S, MAX_ATTEMPTS, REQUESTS, Kind
from shared.generation_client import deadline_passed
from shared.heartbeat import Heartbeat
from shared.ids import new_id
from shared.redis_client import connect_async
from shared.settings import Settings
from worker.generation.mailbox import Delivery, Mailbox
from worker.generation.warm_up import WarmUps

log = logging.getLogger(__name__)

RETRY_S = 1.0
DRAIN_S = 5.0
"""How long running answers may go on after SIGTERM."""
CLOSE_LIMIT_S = 2.0
"""How long the engines may take to stop after that."""


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then end this process."""
    _configure_threads()
    asyncio.run(_serve_and_leave(settings))


def _configure_threads() -> None:
    """Before torch is imported: its thread pool reads these once.

    Passive waiting: beside a trainer on the same cores, threads that spin at every barrier make one token three times
    slower than threads that sleep (measured on 2 cores, docs/decisions/0204-generation-threads.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


async def _serve_and_leave(settings: Settings) -> None:
    await _serve(settings)
    # An engine's thread may be deep in a forward pass, and an orderly exit would wait for it longer than the operator
    # waits for us. Nothing is left to save, and the memory goes with the process.
    logging.shutdown()
    os._exit(0)


async def _serve(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
    await Generator(settings).serve(stop)


class Generator:
    """One generator process. `serve` runs until `stop` is set."""

    def __init__(self, settings: Settings) -> None:
        # Here, after the threads are configured: this imports torch, before the first request would.
        from worker.generation.backends import make_backend
        from worker.generation.cache import ModelCache

        self._settings = settings
        self._redis = connect_async(settings)
        self._mailbox = Mailbox(self._redis, new_id("generator"))
        self._models = ModelCache(settings, make_backend(settings))
        self._warm_ups = WarmUps(self._redis, settings)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._deliveries: dict[str, Delivery] = {}
        self._slot_freed = asyncio.Event()
        self._taking: dict[Kind, asyncio.Lock] = {kind: asyncio.Lock() for kind in REQUESTS}
        """Who counts free slots fills them before anybody else counts."""

    async def serve(self, stop: asyncio.Event) -> None:
        with Heartbeat(self._settings, "generate", every_s=None) as heartbeat:
            loops = [
                asyncio.create_task(self._heart(heartbeat)),
                asyncio.create_task(self._persistently(self._hear_cancellations)),
                asyncio.create_task(self._mailbox.write_forever()),
            ]
            taking = [
                asyncio.create_task(self._persistently(self._take)),
                asyncio.create_task(self._persistently(self._take_of_batches)),
                asyncio.create_task(self._persistently(self._take_over)),
                asyncio.create_task(self._warm_ups.pin(self._models)),
                asyncio.create_task(self._persistently(functools.partial(self._warm_ups.obey, self._models))),
            ]
            try:
                await stop.wait()
                await tasks.end(taking)
                await self._drain()
                await self._mailbox.leave()
            finally:
                await tasks.end([*taking, *loops, *self._running.values()])
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._models.close(), CLOSE_LIMIT_S)
                await self._redis.aclose()

    def _running_of(self, kind: Kind) -> int:
        return sum(delivery.request.kind == kind for delivery in self._deliveries.values())

    @property
    def free_slots(self) -> int:
        """How many more live requests may be answered at once."""
        return self._settings.generation_slots - self._running_of("live")

    @property
    def free_batch_slots(self) -> int:
        """How many more requests of batches may: beside live ones a single one, so that batches never stand still."""
        allowed = 1 if self._running_of("live") else self._settings.generation_batch_slots
        return max(0, allowed - self._running_of("batch"))

    async def _take(self) -> None:
        while self.free_slots <= 0:
            await self._slot()
        async with self._taking["live"]:
            if (free := self.free_slots) > 0:
                for delivery in await self._mailbox.take(free):
                    self._begin(delivery)

    async def _take_of_batches(self) -> None:
        while self.free_batch_slots <= 0:
            await self._slot()
        async with self._taking["batch"]:
            # One at a time: live requests may have come before the next.
            for delivery in await self._mailbox.take(1, "batch") if self.free_batch_slots > 0 else ():
                self._begin(delivery)

    async def _slot(self) -> None:
        """Until a slot has been freed."""
        await self._slot_freed.wait()

    async def _take_over(self) -> None:
        await asyncio.sleep(2 * BEAT_S)
        for kind in REQUESTS:
            async with self._taking[kind]:
                if (free := self.free_slots if kind == "live" else self.free_batch_slots) > 0:
                    for delivery in await self._mailbox.take_over(free, kind):
                        self._begin(delivery)

    async def _hear_cancellations(self) -> None:
        for request_id in await self._mailbox.cancellations():
            self._cancel(request_id)

    async def _heart(self, heartbeat: Heartbeat) -> None:
        """Beats for `anneal up` even while the broker is away: this process is not what hangs then."""
        while True:
            heartbeat.beat()
            try:
                gone = await self._mailbox.beat(delivery.request.replies for delivery in self._deliveries.values())
                for delivery in list(self._deliveries.values()):
                    if delivery.request.replies in gone:
                        # Whoever lives after all must not wait for an answer that nobody makes.
                        delivery.error(
                            Unavailable("the process that asked was not heard of for too long", code="answer_lost")
                        )
                        self._running[delivery.request.id].cancel()
            except (RedisError, OSError) as error:
                log.warning("no beat, the broker said: %s", error)
            except Exception:
                log.exception("a beat failed")  # the next may not; without beats this process is taken for dead
            await asyncio.sleep(BEAT_S)

    async def _persistently(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except (RedisError, OSError) as error:
                log.warning("%s: the broker said: %s", _name(step), error)
                await asyncio.sleep(RETRY_S)
            except Exception:
                log.exception("%s failed", _name(step))
                await asyncio.sleep(RETRY_S)

    def _begin(self, delivery: Delivery) -> None:
        request_id = delivery.request.id
        task = asyncio.create_task(self._answer(delivery))
        self._running[request_id] = task
        self._deliveries[request_id] = delivery
        task.add_done_callback(functools.partial(self._finished, request_id))

    def _finished(self, request_id: str, task: asyncio.Task[None]) -> None:
        del self._running[request_id], self._deliveries[request_id]
        # Everybody who waits looks again, and then waits for the next one.
        self._slot_freed.set()
        self._slot_freed = asyncio.Event()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("request %s failed", request_id, exc_info=error)

    def _cancel(self, request_id: str) -> None:
        if task := self._running.get(request_id):
            self._deliveries[request_id].drop()
            task.cancel()

    async def _answer(self, delivery: Delivery) -> None:
        left_s = delivery.request.deadline_s - delivery.age_s
        try:
            if delivery.attempt > MAX_ATTEMPTS:
                raise AppError(
                    f"this request was given up after {MAX_ATTEMPTS} generators died of it", code="generator_crashed"
                )
            delivery.taken()
            async with asyncio.timeout(left_s):
                await self._decode(delivery)
        except TimeoutError:
            delivery.error(deadline_passed(delivery.request.deadline_s))
        except AppError as error:
            delivery.error(error)
        except Exception:
            delivery.error(AppError("the generator failed on this request; its log has the details"))
            raise

    async def _decode(self, delivery: Delivery) -> None:
        request = delivery.request
        wait_s = self._settings.generation_load_wait_s if request.kind == "live" else None
        async with self._models.use(request.location, request.model, wait_s) as engine:
            usage = await engine.answer(request, delivery.attempt, delivery.delta)
        delivery.end(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)

    async def _drain(self) -> None:
        """Let running answers end, then tell the clients of those that did not."""
        if self._running:
            await asyncio.wait(list(self._running.values()), timeout=DRAIN_S)
        for request_id, task in list(self._running.items()):
            delivery = self._deliveries[request_id]
            if delivery.is_settled:
                delivery.error(Unavailable("the generator is being shut down; try again", code="generator_lost"))
            task.cancel()


def _name(step: Callable[..., object]) -> str:
    return step.func.__name__ if isinstance(step, functools.partial) else step.__name__


if __name__ == "__main__":
    from shared import logs
    from shared.settings import get_settings

    logs.configure(get_settings().log_level)
    run(get_settings())
