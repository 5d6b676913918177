"""Endpoints that wait for the database run a few at a time, reads apart from writes."""

import asyncio
import threading
import time
from collections.abc import Callable

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel

from api import error_handlers, model_route
from api.model_route import READS_AT_ONCE, WRITES_AT_ONCE, ModelRoute
from tests.waiting import LIMIT_S


class Answer(BaseModel):
    number: int


class Busy:
    """How many are inside, and how many were at most."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.most = self.entered = 0
        self.leave = threading.Event()

    def enter(self) -> None:
        with self.lock:
            self.now += 1
            self.entered += 1
            self.most = max(self.most, self.now)
        assert self.leave.wait(LIMIT_S)
        with self.lock:
            self.now -= 1


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.fixture
def busy() -> tuple[Busy, Busy]:
    return Busy(), Busy()


@pytest.fixture
def app(busy: tuple[Busy, Busy]) -> FastAPI:
    reads, writes = busy
    router = APIRouter(route_class=ModelRoute)

    @router.get("/{number}")
    def read(number: int) -> Answer:
        """What it reads."""
        reads.enter()
        return Answer(number=number)

    @router.post("/{number}")
    def write(number: int) -> Answer:
        writes.enter()
        return Answer(number=number)

    app = FastAPI()
    app.include_router(router, prefix="/v1")
    return app


def test_a_lock_that_holds_up_writes_holds_up_no_read(app: FastAPI, busy: tuple[Busy, Busy]) -> None:
    reads, writes = busy

    async def drive() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            posts = [asyncio.create_task(client.post(f"/v1/{n}")) for n in range(WRITES_AT_ONCE + 5)]
            await until(lambda: writes.now == WRITES_AT_ONCE)
            reads.leave.set()
            assert (await asyncio.wait_for(client.get("/v1/7"), LIMIT_S)).json() == {"number": 7}
            assert writes.now == WRITES_AT_ONCE
            writes.leave.set()
            answers = await asyncio.gather(*posts)
            assert [answer.json()["number"] for answer in answers] == list(range(WRITES_AT_ONCE + 5))
            reads.leave.clear()
            gets = [asyncio.create_task(client.get(f"/v1/{n}")) for n in range(READS_AT_ONCE + 5)]
            await until(lambda: reads.now == READS_AT_ONCE)
            await asyncio.sleep(0.1)
            reads.leave.set()
            await asyncio.gather(*gets)

    asyncio.run(drive())
    assert (reads.most, writes.most) == (READS_AT_ONCE, WRITES_AT_ONCE)


def test_who_waits_too_long_for_a_turn_is_told_and_nothing_was_done(
    app: FastAPI, busy: tuple[Busy, Busy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_route, "MOST_WAIT_S", 0.2)
    error_handlers.install(app)
    _, writes = busy

    async def drive() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            posts = [asyncio.create_task(client.post(f"/v1/{n}")) for n in range(WRITES_AT_ONCE)]
            await until(lambda: writes.now == WRITES_AT_ONCE)
            late = await client.post("/v1/9")
            assert late.status_code == 503 and late.headers["retry-after"] == "2"
            assert "try again" in late.json()["error"]["message"]
            writes.leave.set()
            assert all(answer.status_code == 200 for answer in await asyncio.gather(*posts))
            assert (await client.post("/v1/9")).status_code == 200

    asyncio.run(drive())
    assert writes.entered == WRITES_AT_ONCE + 1


def test_an_option_that_would_have_no_effect_is_refused() -> None:
    router = APIRouter(route_class=ModelRoute)
    with pytest.raises(TypeError, match="status_code"):
        router.post("/", status_code=201)(lambda: None)


def test_the_schema_says_what_the_endpoint_says(app: FastAPI) -> None:
    read = app.openapi()["paths"]["/v1/{number}"]["get"]
    assert read["description"] == "What it reads."
    assert read["parameters"][0]["schema"]["type"] == "integer"
    shown = read["responses"]["200"]["content"]["application/json"]["schema"]
    assert shown == {"$ref": "#/components/schemas/Answer"}
