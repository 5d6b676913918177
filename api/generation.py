"""Answers of generators on their way to a client, whole or as SSE: what both generating endpoints share.

Owns HTTP's side of generation. Never tokenises, renders a template or waits on the broker in a thread: that is the
generator's work, and `shared.generation_client` follows it on the event loop.

An error before the first piece is an HTTP error; after it the status line is long gone, and the error is an event.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from shared import completions, model_registry
from shared.chat_schema import ChatRequest
from shared.completion_schema import CompletionRequest
from shared.db import reading
from shared.errors import AppError
from shared.generation import Choice, Endpoint
from shared.generation_client import Answer, GenerationClient, Piece
from shared.model_registry import NamedModel
from shared.settings import Settings


@asynccontextmanager
async def lifespan(app: FastAPI, settings: Settings) -> AsyncIterator[None]:
    """Keep this process's one reader of answers running."""
    async with GenerationClient(settings) as client:
        app.state.generation = client
        yield


async def respond(spec: ChatRequest | CompletionRequest, project_id: str, request: Request) -> Response:
    """Let generators answer a checked request, and its client follow them."""
    client: GenerationClient = request.app.state.generation
    endpoint: Endpoint = "chat" if isinstance(spec, ChatRequest) else "completion"
    model = await run_in_threadpool(_find, project_id, spec.model)
    answers: list[Answer] = []
    try:
        for body in completions.split(spec):
            answer = await client.submit(model=model.id, location=model.location, endpoint=endpoint, body=body)
            answers.append(answer)  # one by one, so that those before one that is refused can be cancelled
    except BaseException:
        for answer in answers:
            answer.cancel()
        raise
    following = _Following(endpoint, model.id, spec.n or 1, answers, request)
    return await following.streamed(spec.wants_usage) if spec.stream else await following.whole()


def _find(project_id: str, name: str) -> NamedModel:
    with reading() as session:
        return model_registry.find(session, project_id, name)


class _Following:
    """The answers to one HTTP request, one for each prompt, on their way to its client."""

    def __init__(self, endpoint: Endpoint, model: str, n: int, answers: Sequence[Answer], request: Request) -> None:
        self._endpoint: Endpoint = endpoint
        self._model = model
        self._n = n
        self._answers = answers
        self._watch = asyncio.create_task(self._cancel_when_gone(request))

    async def whole(self) -> Response:
        whole = completions.Whole(self._endpoint, self._model, self._n)
        try:
            async for prompt_index, piece in _together(self._answers):
                whole.add(piece, prompt_index)
        finally:
            self._leave()
        return JSONResponse(whole.body())

    async def streamed(self, wants_usage: bool) -> Response:
        """The response once the first piece is there: until then an error can still be a status code."""
        pieces = _together(self._answers)
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

    async def _events(
        self, first: tuple[int, Piece], pieces: AsyncIterator[tuple[int, Piece]], wants_usage: bool
    ) -> AsyncIterator[bytes]:
        kind = _ChatChunks if self._endpoint == "chat" else _CompletionChunks
        chunks: _ChatChunks | _CompletionChunks = kind(self._model, wants_usage)
        prompt_tokens = completion_tokens = 0
        try:
            async for prompt_index, piece in _after(first, pieces):
                if piece.end is not None:
                    prompt_tokens += piece.end.prompt_tokens
                    completion_tokens += piece.end.completion_tokens
                for choice in piece.choices:
                    yield b"".join(chunks.of(prompt_index * self._n + choice.index, choice))
            if wants_usage:
                yield chunks.event([], usage=completions.usage(prompt_tokens, completion_tokens))
            yield b"data: [DONE]\n\n"
        except AppError as error:
            yield _data(error.body())
        finally:
            self._leave()

    async def _cancel_when_gone(self, request: Request) -> None:
        """The client's going is noticed even while nothing is being sent to it."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._cancel()

    def _leave(self) -> None:
        """Free whatever is still held. Must not wait: this may run while the request's task is being cancelled."""
        self._watch.cancel()
        self._cancel()

    def _cancel(self) -> None:
        for answer in self._answers:
            answer.cancel()


class _Chunks:
    """Makes the events of one stream."""

    object: str

    def __init__(self, endpoint: Endpoint, model: str, wants_usage: bool) -> None:
        self._head = completions.head(endpoint, model) | {"object": self.object}
        self._extra = {"usage": None} if wants_usage else {}

    def event(self, choices: list[dict[str, Any]], **fields: Any) -> bytes:
        return _data({**self._head, "choices": choices, **self._extra, **fields})


class _ChatChunks(_Chunks):
    object = "chat.completion.chunk"

    def __init__(self, model: str, wants_usage: bool) -> None:
        super().__init__("chat", model, wants_usage)
        self._begun: set[int] = set()

    def of(self, index: int, choice: Choice) -> list[bytes]:
        events = []
        if index not in self._begun:
            self._begun.add(index)
            events.append(self._chunk(index, {"role": "assistant", "content": "", "refusal": None}))
        if choice.text or choice.logprobs:
            logprobs = None if choice.logprobs is None else {"content": choice.logprobs, "refusal": None}
            events.append(self._chunk(index, {"content": choice.text}, logprobs))
        if choice.tool_calls:
            events.append(self._chunk(index, {"tool_calls": choice.tool_calls}))
        if choice.finish_reason:
            events.append(self._chunk(index, {}, finish_reason=choice.finish_reason))
        return events

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> bytes:
        return self.event([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}])


class _CompletionChunks(_Chunks):
    object = "text_completion"

    def __init__(self, model: str, wants_usage: bool) -> None:
        super().__init__("completion", model, wants_usage)
        self._offsets = completions.Offsets()

    def of(self, index: int, choice: Choice) -> list[bytes]:
        logprobs = self._offsets.logprobs(index, choice.logprobs)
        shown = {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        return [self.event([shown])]


async def _together(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of all answers as they come, each with its answer's place.

    Raises:
        AppError: one of them failed.
    """
    if len(answers) == 1:
        async for piece in answers[0]:
            yield 0, piece
        return
    pieces = [aiter(answer) for answer in answers]
    waits = {asyncio.ensure_future(anext(pieces[index])): index for index in range(len(pieces))}
    try:
        while waits:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in done:
                index = waits.pop(wait)
                try:
                    piece = wait.result()
                except StopAsyncIteration:
                    continue
                yield index, piece
                waits[asyncio.ensure_future(anext(pieces[index]))] = index
    finally:
        for wait in waits:
            wait.cancel()


async def _after(first: tuple[int, Piece], rest: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[tuple[int, Piece]]:
    yield first
    async for item in rest:
        yield item


def _data(content: dict[str, Any]) -> bytes:
    # In ASCII: some clients take U+2028 inside an event for the end of a line.
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
