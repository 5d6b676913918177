"""Models that are loaded before anybody asks: those the operator pinned, and those whose jobs have just succeeded."""

import asyncio
import logging
from typing import TYPE_CHECKING

import redis
import redis.asyncio

from shared.db import reading
from shared.errors import AppError
from shared.generation import KEY_TTL_S, MAX_WARM_UPS, WARM_UPS, Model
from shared.model_registry import find
from shared.models import DEFAULT_PROJECT
from shared.settings import Settings

if TYPE_CHECKING:
    from worker.generation.cache import ModelCache

log = logging.getLogger(__name__)

POP_WAIT_S = 1


def recommend(connection: redis.Redis, name: str, location: str) -> None:
    """Ask for a model to be loaded by some generator, if one is there within a minute. A broker away is forgiven."""
    try:
        with connection.pipeline(transaction=True) as pipeline:
            pipeline.lpush(WARM_UPS, Model(name=name, location=location).model_dump_json())
            pipeline.ltrim(WARM_UPS, 0, MAX_WARM_UPS - 1)
            pipeline.expire(WARM_UPS, KEY_TTL_S)
            pipeline.execute()
    except (redis.RedisError, OSError) as error:
        log.warning("%s is not warmed up: %s", name, error)


class WarmUps:
    """Of one generator. What can't be loaded is logged: a client that asks for it is told why."""

    def __init__(self, connection: redis.asyncio.Redis, settings: Settings) -> None:
        self._redis = connection
        self._settings = settings

    async def pin(self, models: "ModelCache") -> None:
        """Load what `ANNEAL_PINNED_MODELS` names, and keep it."""
        for name in self._settings.pinned_models:
            try:
                found = await asyncio.to_thread(self._find, name)
                await models.pin(found.location, found.name)
            except AppError as error:
                log.error("the pinned model %s is not loaded: %s", name, error)

    async def obey(self, models: "ModelCache") -> None:
        """Load one model that a worker has recommended, if one comes within a moment.

        Raises:
            RedisError, OSError: the broker is away.
        """
        popped = await self._redis.brpop([WARM_UPS], timeout=POP_WAIT_S)
        if popped is None or not self._settings.generation_warm_up:
            return
        model = Model.model_validate_json(popped[1])
        try:
            await models.warm_up(model.location, model.name, self._settings.generation_load_wait_s)
        except AppError as error:
            log.warning("%s is not warmed up: %s", model.name, error)

    def _find(self, name: str) -> Model:
        with reading() as session:
            model = find(session, DEFAULT_PROJECT, name)
            return Model(name=model.id, location=model.location)
