"""POST /v1/chat/completions: a request for a generator, and its answer in OpenAI's shapes, whole or as SSE.

Owns HTTP's side of generation. Never tokenises, renders a template or waits on the broker in a thread: that is the
generator's work, and `shared.generation_client` follows it on the event loop.

An error before the first text is an HTTP error; after it the status line is long gone, and the error is an event.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from api.answer_schemas import ChatCompletion, also_streams
from api.chat_schema import ChatRequest
from api.deps import Caller
from shared import model_registry
from shared.db import reading
from shared.errors import AppError
from shared.generation import End, Message
from shared.generation_client import Answer, GenerationClient, Piece
from shared.ids import new_id
from shared.model_registry import NamedModel
from shared.settings import Settings

router = APIRouter(tags=["chat"])

DEFAULT_TEMPERATURE = 1.0
DEFAULT_TOP_P = 1.0


@asynccontextmanager
async def lifespan(app: FastAPI, settings: Settings) -> AsyncIterator[None]:
    """Keep this process's one reader of answers running."""
    async with GenerationClient(settings) as client:
        app.state.generation = client
        yield


@router.post("/chat/completions", response_model=None, responses=also_streams(ChatCompletion, "a chunk"))
async def create_chat_completion(spec: ChatRequest, caller: Caller, request: Request) -> Response:
    """Let a model answer a conversation. `stream=true`: server-sent events, one for each piece of text, to `[DONE]`."""
    client: GenerationClient = request.app.state.generation
    model = await run_in_threadpool(_find, caller.project_id, spec.model)
    answer = await client.submit(
        model=model.id,
        location=model.location,
        messages=[Message(role=message.role, content=message.text) for message in spec.messages],
        max_tokens=spec.answer_tokens,
        temperature=DEFAULT_TEMPERATURE if spec.temperature is None else spec.temperature,
        top_p=DEFAULT_TOP_P if spec.top_p is None else spec.top_p,
        seed=spec.seed,
        stop=spec.stop_strings,
    )
    completion = _Completion(model.id, answer, request)
    return await completion.streamed(spec.wants_usage) if spec.stream else await completion.whole()


def _find(project_id: str, name: str) -> NamedModel:
    with reading() as session:
        return model_registry.find(session, project_id, name)


class _Completion:
    """One answer on its way to one client."""

    def __init__(self, model: str, answer: Answer, request: Request) -> None:
        self._answer = answer
        self._head = {"id": f"chatcmpl-{new_id('x')[2:]}", "created": int(time.time()), "model": model}
        self._watch = asyncio.create_task(self._cancel_when_gone(request))

    async def whole(self) -> Response:
        text, end = [], None
        try:
            async for piece in self._answer:
                text.append(piece.text)
                end = piece.end
        finally:
            self._leave()
        assert end is not None
        message = {"role": "assistant", "content": "".join(text), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.finish_reason}
        return JSONResponse({**self._head, "object": "chat.completion", "choices": [choice], "usage": _usage(end)})

    async def streamed(self, wants_usage: bool) -> Response:
        """The response once the first text is there: until then an error can still be a status code."""
        pieces = aiter(self._answer)
        try:
            first = await anext(pieces)
        except BaseException:
            self._leave()
            raise
        return StreamingResponse(
            self._events(first, pieces, wants_usage),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    async def _events(self, first: Piece, pieces: AsyncIterator[Piece], wants_usage: bool) -> AsyncIterator[bytes]:
        extra = {"usage": None} if wants_usage else {}
        try:
            yield self._chunk({"role": "assistant", "content": "", "refusal": None}, **extra) + self._piece(
                first, extra
            )
            end = first.end
            if end is None:
                async for piece in pieces:
                    yield self._piece(piece, extra)
                    end = piece.end
            assert end is not None
            if wants_usage:
                yield self._event(choices=[], usage=_usage(end))
            yield b"data: [DONE]\n\n"
        except AppError as error:
            yield _data(error.body())
        finally:
            self._leave()

    def _piece(self, piece: Piece, extra: dict[str, Any]) -> bytes:
        events = self._chunk({"content": piece.text}, **extra) if piece.text else b""
        if piece.end is not None:
            events += self._chunk({}, piece.end.finish_reason, **extra)
        return events

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **extra: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._event(choices=[choice], **extra)

    def _event(self, **fields: Any) -> bytes:
        return _data({**self._head, "object": "chat.completion.chunk", **fields})

    async def _cancel_when_gone(self, request: Request) -> None:
        """The client's going is noticed even while nothing is being sent to it."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._answer.cancel()

    def _leave(self) -> None:
        """Free whatever is still held. Must not wait: this may run while the request's task is being cancelled."""
        self._watch.cancel()
        self._answer.cancel()


def _usage(end: End) -> dict[str, int]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }


def _data(content: dict[str, Any]) -> bytes:
    # In ASCII: some clients take U+2028 inside an event for the end of a line.
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
