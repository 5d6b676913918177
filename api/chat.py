"""Placeholder by the lead; the generation engineer replaces this file.

api/app.py uses exactly two names of it: `router` (mounted under /v1) and `lifespan(app, settings)`, an async context
manager entered once a process (start and stop the reply reader there; keep state on app.state).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI

from shared.settings import Settings

router = APIRouter()


@asynccontextmanager
async def lifespan(app: FastAPI, settings: Settings) -> AsyncIterator[None]:
    yield
