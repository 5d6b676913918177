"""/health/live: the process answers. /health/ready: database and broker answer too, each named."""

import asyncio
from typing import Any

import redis
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError

from api.answer_schemas import Liveness, Readiness
from shared.db import reading

router = APIRouter(prefix="/health", tags=["health"])

CHECK_TIMEOUT_S = 3


@router.get("/live")
async def live() -> Liveness:
    """Whether the process answers."""
    return Liveness(status="ok")


@router.get("/ready", response_model=None, responses={200: {"model": Readiness}, 503: {"model": Readiness}})
async def ready(request: Request) -> JSONResponse:
    """200 if jobs can be taken and followed; 503 with what is missing otherwise."""
    checks: dict[str, Any] = {
        "database": await _outcome(run_in_threadpool(_database)),
        "redis": await _outcome(_ping(request.app.state.redis)),
    }
    ok = all(value == "ok" for value in checks.values())
    return JSONResponse({"status": "ok" if ok else "unavailable", "checks": checks}, status_code=200 if ok else 503)


async def _outcome(check: Any) -> str:
    try:
        await asyncio.wait_for(check, CHECK_TIMEOUT_S)
    except (redis.RedisError, SQLAlchemyError, TimeoutError, OSError) as error:
        return f"failed: {type(error).__name__}"  # no text: it may hold a URL with a password
    return "ok"


async def _ping(client: redis.asyncio.Redis) -> None:
    await client.ping()


def _database() -> None:
    with reading() as session:
        session.execute(select(text("1")))
