"""Loaded models under one memory budget: the least recently used one that is idle makes room for the next.

Owns engines from loading to closing. Never evicts a model that is answering; a request for which there is no room
waits until there is, up to its own deadline.
"""

import asyncio
import functools
import gc
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from shared import storage
from shared.checkpoint_files import CorruptCheckpoint
from shared.errors import AppError, ModelNotFound, Unavailable
from shared.model_registry import BASE_LOCATION
from shared.settings import Settings
from worker.base_models import resolve
from worker.generation.engine import Engine, pick_device, pick_dtype, plan

log = logging.getLogger(__name__)


class Loaded:
    """An engine and how many requests use it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.users = 0


class ModelCache:
    """Used on one event loop; loading and closing happen in threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._dtype = pick_dtype(settings.generation_dtype, pick_device())
        self._models: OrderedDict[str, Loaded] = OrderedDict()
        """By location, least recently used first."""
        self._loading = asyncio.Lock()
        """One load at a time: two at once would compete for memory neither has yet."""
        self._freed = asyncio.Event()
        self._loads: dict[str, asyncio.Task[None]] = {}

    @property
    def locations(self) -> list[str]:
        """What is loaded, least recently used first."""
        return list(self._models)

    @asynccontextmanager
    async def use(self, location: str, name: str) -> AsyncIterator[Engine]:
        """The engine of a model, loaded if need be, and kept at least until the block ends.

        Raises:
            ModelNotFound: nothing is at that location.
            BadRequest: what is there can't be served.
            Unavailable: it is larger than the whole budget.
        """
        while (loaded := self._ready(location)) is None:
            # Shielded: whoever asked first may leave, and a load in a thread can't be called back.
            await asyncio.shield(self._load_once(location, name))
        loaded.users += 1
        self._models.move_to_end(location)
        try:
            yield loaded.engine
        finally:
            loaded.users -= 1
            self._freed.set()

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
        async with self._loading:
            await self._load_alone(location, name)

    async def _load_alone(self, location: str, name: str) -> None:
        if location in self._models:  # its thread died; whoever it was answering has been told
            await self._evict(location)
        started = time.monotonic()
        folder = await asyncio.to_thread(self._folder, location, name)
        layout = await asyncio.to_thread(plan, folder, name, self._dtype, self._settings.generation_memory_bytes)
        await self._make_room(layout.total_bytes)
        try:
            engine = await asyncio.to_thread(
                Engine, folder, name, layout, dtype=self._dtype, slots=self._settings.generation_slots
            )
        except AppError:
            raise
        except Exception as error:
            log.exception("the model at %s could not be loaded", location)
            raise Unavailable(
                f"the model {name!r} could not be loaded ({type(error).__name__}: {error}); "
                "the generator's log has the details",
                code="model_load_failed",
            ) from error
        self._models[location] = Loaded(engine)
        log.info("loaded %s in %.1f s: %.2f GiB", location, time.monotonic() - started, engine.memory_bytes / 2**30)

    async def _make_room(self, needed_bytes: int) -> None:
        while sum(model.engine.memory_bytes for model in self._models.values()) + needed_bytes > (
            self._settings.generation_memory_bytes
        ):
            self._freed.clear()
            idle = next((location for location, model in self._models.items() if model.users == 0), None)
            if idle is None:
                await self._freed.wait()
            else:
                await self._evict(idle)

    async def _evict(self, location: str) -> None:
        engine = self._models.pop(location).engine
        log.info("evicting %s", location)
        await asyncio.to_thread(engine.close)
        del engine
        gc.collect()  # models are full of reference cycles, and their memory is counted as free from here on

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
