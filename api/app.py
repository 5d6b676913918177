"""The FastAPI application of one API process: what it serves, what it holds open, in which envelope."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from api import batches, chat, docs, error_handlers, files, fine_tuning, generation, health, job_events, models, uploads
from api.envelope import Envelope
from shared.queue import Outbox, make_celery
from shared.redis_client import connect_async
from shared.settings import Settings, get_settings


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application of one API process."""
    settings = settings or get_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.outbox = Outbox(make_celery(settings))
        app.state.redis = connect_async(settings)
        app.state.streams = job_events.Streams(connect_async(settings, max_connections=job_events.MAX_STREAMS))
        async with generation.lifespan(app, settings):
            yield
        app.state.outbox.close()
        await app.state.streams.client.aclose()
        await app.state.redis.aclose()

    app = docs.application(lifespan)
    app.state.settings = settings
    for part in (files, uploads, fine_tuning, job_events, batches, models, chat):
        app.include_router(part.router, prefix="/v1")
    app.include_router(health.router)
    error_handlers.install(app)
    app.add_middleware(Envelope, settings=settings)
    return app
