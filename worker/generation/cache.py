"""Loaded models under one memory budget: the least recently used one that is idle makes room for the next.

Owns engines from loading to closing. Never evicts a model that is answering; a request for which there is no room
waits until there is, up to its own deadline.
"""

import asyncio
import functools
import gc
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from shared import storage
from shared.checkpoint_files import CorruptCheckpoint
from shared.errors import AppError, ModelNotFound, Unavailable
from shared.model_registry import BASE_LOCATION
from shared.settings import Settings
from worker.base_models import resolve
from worker.generation.engine import Backend, Engine, Plan

log = logging.getLogger(__name__)


RETRY_AFTER_S = 5.0
"""What a client is told to wait for a model that is still being loaded."""


class Loaded:
    """An engine, how many requests use it, and whether it may go."""

    def __init__(self, engine: Engine, *, is_pinned: bool) -> None:
        self.engine = engine
        self.is_pinned = is_pinned
        self.users = 0

    @property
    def may_go(self) -> bool:
        return self.users == 0 and not self.is_pinned


class ModelCache:
    """Used on one event loop; loading and closing happen in threads."""

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self._settings = settings
        self._backend = backend
        self._pinned: set[str] = set()
        self._models: OrderedDict[str, Loaded] = OrderedDict()
        """By location, least recently used first."""
        self._loading = asyncio.Lock()
        """One load at a time: two at once would compete for memory neither has yet."""
        self._freed = asyncio.Event()
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._waiting: Counter[str] = Counter()
        """How many wait for each load."""

    @property
    def locations(self) -> list[str]:
        """What is loaded, least recently used first."""
        return list(self._models)

    @asynccontextmanager
    async def use(self, location: str, name: str, wait_s: float | None = None) -> AsyncIterator[Engine]:
        """The engine of a model, loaded if need be, and kept at least until the block ends.

        Args:
            wait_s: how long to wait for a load; it goes on when nobody waits for it any more.

        Raises:
            ModelNotFound: nothing is at that location.
            BadRequest: what is there can't be served.
            Unavailable: it is larger than the whole budget, or takes longer than `wait_s` to load.
        """
        while (loaded := self._ready(location)) is None:
            load = self._load_once(location, name)
            # Not waited for itself: whoever asked first may leave, and a load in a thread can't be called back.
            self._waiting[location] += 1
            try:
                await asyncio.wait([load], timeout=wait_s)
            finally:
                self._waiting[location] -= 1
            if not load.done():
                raise Unavailable(
                    f"the model {name!r} is still being loaded after {wait_s:g} s (ANNEAL_GENERATION_LOAD_WAIT_S); try "
                    "again shortly",
                    code="model_loading",
                    retry_after_s=RETRY_AFTER_S,
                )
            load.result()
        loaded.users += 1
        self._models.move_to_end(location)
        try:
            yield loaded.engine
        finally:
            loaded.users -= 1
            self._freed.set()

    async def warm_up(self, location: str, name: str, wait_s: float | None = None) -> None:
        """Load a model before anybody asks for it.

        Raises:
            AppError: as `use`.
        """
        async with self.use(location, name, wait_s):
            pass

    async def pin(self, location: str, name: str) -> None:
        """Load a model and never evict it.

        Raises:
            AppError: as `use`.
        """
        self._pinned.add(location)
        await self.warm_up(location, name)

    async def close(self) -> None:
        """Stop every engine, busy or not."""
        for task in list(self._loads.values()):
            task.cancel()
        for location in self.locations:
            await self._evict(location)

    def _ready(self, location: str) -> Loaded | None:
        loaded = self._models.get(location)
        return loaded if loaded is not None and loaded.engine.is_alive else None

    def _load_once(self, location: str, name: str) -> asyncio.Task[None]:
        """The load of this model that is under way, begun if there is none."""
        task = self._loads.get(location)
        if task is None:
            task = self._loads[location] = asyncio.create_task(self._load(location, name))
            task.add_done_callback(functools.partial(self._load_ended, location))
        return task

    def _load_ended(self, location: str, task: asyncio.Task[None]) -> None:
        del self._loads[location]
        if not task.cancelled():
            task.exception()  # fetched, for when everybody who waited for it has left

    async def _load(self, location: str, name: str) -> None:
        while True:
            async with self._loading:
                if await self._load_alone(location, name):
                    return
                self._freed.clear()
            # Without the lock: others' models may fit where this one does not.
            await self._freed.wait()
            if not +self._waiting[location]:
                raise Unavailable(
                    f"there was no room for the model {name!r} as long as somebody waited for it; try again",
                    code="model_loading",
                    retry_after_s=RETRY_AFTER_S,
                )

    async def _load_alone(self, location: str, name: str) -> bool:
        """Whether it is loaded now; if not, there is no room as long as all the others answer."""
        if location in self._models:  # its thread died; whoever it was answering has been told
            await self._evict(location)
        started = time.monotonic()
        folder = await asyncio.to_thread(self._folder, location, name)
        plan = await asyncio.to_thread(self._backend.plan, folder, name)
        self._refuse_beside_pinned(plan, location, name)
        try:
            engine = await self._exchanged(plan, folder, name)
            how = "exchanged the weights for those of"
            if engine is None:
                if not await self._make_room(plan.total_bytes):
                    return False
                engine = await asyncio.to_thread(self._backend.load, folder, name, plan)
                how = "loaded"
        except AppError:
            raise
        except Exception as error:
            log.exception("the model at %s could not be loaded", location)
            raise Unavailable(
                f"the model {name!r} could not be loaded ({type(error).__name__}: {error}); "
                "the generator's log has the details",
                code="model_load_failed",
            ) from error
        self._models[location] = Loaded(engine, is_pinned=location in self._pinned)
        took_s, size_gib = time.monotonic() - started, engine.memory_bytes / 2**30
        log.info("%s %s in %.1f s: %.2f GiB", how, location, took_s, size_gib)
        return True

    def _refuse_beside_pinned(self, plan: Plan, location: str, name: str) -> None:
        """
        Raises:
            Unavailable: what is pinned never makes room for it.
        """
        pinned = sum(m.engine.memory_bytes for at, m in self._models.items() if m.is_pinned and at != location)
        if pinned + plan.total_bytes > self._settings.generation_memory_bytes:
            raise Unavailable(
                f"the model {name!r} needs {plan.total_bytes / 2**30:.2f} GiB, and beside the pinned models "
                f"({pinned / 2**30:.2f} GiB) there is no room for it in ANNEAL_GENERATION_MEMORY_BYTES="
                f"{self._settings.generation_memory_bytes}",
                code="model_too_large",
            )

    def _fits(self, needed_bytes: int) -> bool:
        taken_bytes = sum(model.engine.memory_bytes for model in self._models.values())
        return taken_bytes + needed_bytes <= self._settings.generation_memory_bytes

    def _idle(self) -> str | None:
        """The least recently used model that may go."""
        return next((location for location, model in self._models.items() if model.may_go), None)

    async def _exchanged(self, plan: Plan, folder: Path, name: str) -> Engine | None:
        """The engine of a model that would be evicted, with this one's weights, if it can have them."""
        idle = self._idle()
        if idle is None or self._fits(plan.total_bytes):
            return None
        model = self._models.pop(idle)  # nobody may begin to use it meanwhile
        try:
            swapped = model.engine.is_alive and await asyncio.to_thread(self._backend.swap, model.engine, folder, name)
        except BaseException:
            await self._close(model.engine)
            raise
        if swapped:
            return model.engine
        self._models[idle] = model
        self._models.move_to_end(idle, last=False)
        return None

    async def _make_room(self, needed_bytes: int) -> bool:
        """Evict until it fits; False if what is left answers somebody."""
        while not self._fits(needed_bytes):
            if (idle := self._idle()) is None:
                return False
            await self._evict(idle)
        return True

    async def _evict(self, location: str) -> None:
        log.info("evicting %s", location)
        await self._close(self._models.pop(location).engine)
        gc.collect()  # models are full of reference cycles, and their memory is counted as free from here on

    async def _close(self, engine: Engine) -> None:
        await asyncio.to_thread(engine.close)

    def _folder(self, location: str, name: str) -> Path:
        if location.startswith(BASE_LOCATION):
            return resolve(location.removeprefix(BASE_LOCATION), self._settings).path
        try:
            folder = storage.local_checkpoint(self._settings, location)
        except (CorruptCheckpoint, ValueError) as error:
            log.warning("the model %s is not served: %s", location, error)
            raise _gone(name) from error
        return folder


def _gone(name: str) -> ModelNotFound:
    return ModelNotFound(f"the files of the model {name!r} are gone; it was probably deleted", param="model")
