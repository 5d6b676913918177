"""The engine for production GPUs: vLLM's own OpenAI server, one for each loaded model, as a supervised child.

It runs in an environment of its own (`ANNEAL_VLLM_PYTHON`), whose pins differ from ours. Requests go to it nearly as
they came; this module turns its events into pieces of choices, and its errors into ours. A server that crashes, hangs
or is out of memory fails what it was answering and is started anew by the cache; nothing else falls with it.
"""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from shared.errors import AppError, BadRequest, Unavailable
from shared.generation import Choice, GenerationRequest
from shared.settings import Settings
from worker.generation.backends import has_gpu
from worker.generation.engine import (
    Send,
    Usage,
    knows_no_tools,
    refuse_too_many_scores,
    refuse_unsupported,
    room_for,
    too_long,
)
from worker.generation.planning import CachePlan, plan
from worker.generation.vllm_server import SERVED_NAME, START_LIMIT_S, Server

log = logging.getLogger(__name__)

NAME = "vllm"
SUPPORTED = frozenset(
    (
        *("messages", "prompt", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "logprobs", "top_logprobs"),
        *("frequency_penalty", "presence_penalty", "logit_bias", "echo", "response_format"),
        *("tools", "tool_choice", "parallel_tool_calls"),
    )
)
OVERHEAD_BYTES = {"cpu": 15 * 2**27, "gpu": 2 * 2**30}
"""What the processes of one server take beside weights and cache: 1.82 GiB measured on a CPU (three times Python with
torch); on GPUs, not measured, of the GPU's memory, the CUDA context and compiled graphs."""
MAX_EVENT_BYTES = 2**24
GREEDY = 1e-5
"""vLLM takes the likeliest token below this temperature."""
TEMPLATE_TOKENS = 1024
OVERFLOW = re.compile(r"maximum context length is \d+ tokens.* prompt contains (?:at least )?(\d+) (input tokens|char)")
"""A prompt far too long is not even counted in tokens."""
SAME_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What a server has read besides the weights: only if all of it is equal can it have another checkpoint's weights."""


class VllmBackend:
    """Starts a server for each model."""

    name = NAME

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._device = "gpu" if has_gpu() else "cpu"
        self._dtype = _dtype(settings.generation_dtype, self._device)

    def plan(self, folder: Path, name: str) -> "ServerPlan":
        settings = self._settings
        overhead = OVERHEAD_BYTES[self._device]
        number_bytes = 2 if self._dtype == "bfloat16" else 4
        contexts = settings.generation_sequences
        found = plan(folder, name, number_bytes, settings.generation_memory_bytes - overhead, contexts)
        return ServerPlan(found, overhead)

    def load(self, folder: Path, name: str, plan: "ServerPlan") -> "VllmEngine":
        server = Server(self._settings, folder, plan.cache, self._dtype, self._device)
        try:
            server.wait_until_ready(name)
        except BaseException:
            server.close()
            raise
        return VllmEngine(server, folder, name, plan)

    def swap(self, engine: Any, folder: Path, name: str) -> bool:
        assert isinstance(engine, VllmEngine)
        if not _same_but_for_weights(engine.folder, folder):
            return False
        engine.exchange_weights(folder, name)
        return True


class ServerPlan:
    """What one server takes."""

    def __init__(self, cache: CachePlan, overhead_bytes: int) -> None:
        self.cache = cache
        self.total_bytes = cache.total_bytes + overhead_bytes


class VllmEngine:
    """One running server."""

    def __init__(self, server: Server, folder: Path, name: str, plan: ServerPlan) -> None:
        self.name = name
        self.folder = folder
        self.memory_bytes = plan.total_bytes
        self.context_tokens = plan.cache.context_tokens
        self._server = server
        self._knows_tools = _knows_tools(folder)
        self._http: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_alive(self) -> bool:
        return self._server.is_alive

    async def answer(self, request: GenerationRequest, attempt: int, send: Send) -> Usage:
        refuse_unsupported(request, NAME, SUPPORTED)
        if request.body.get("tools") and not self._knows_tools:
            raise knows_no_tools(self.name)
        await self._check_room(request)
        path = "/v1/chat/completions" if request.endpoint == "chat" else "/v1/completions"
        extra: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "model": SERVED_NAME}
        if request.kind == "batch":
            extra["priority"] = 1  # after those that have none
        body = {**request.body, **extra}
        alike = 1
        if body["temperature"] < GREEDY:
            # vLLM refuses to make several of what can only be one.
            alike, body["n"] = body["n"], 1
        answering = asyncio.ensure_future(self._follow(request, path, body, _to_all(send, alike)))
        failing = asyncio.ensure_future(self._server.failure())
        try:
            await asyncio.wait((answering, failing), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise self._failed(failing.result())
            usage = answering.result()
            return Usage(usage.prompt_tokens, usage.completion_tokens * alike)
        finally:
            answering.cancel()  # the stream's closing frees its slot
            failing.cancel()

    async def _check_room(self, request: GenerationRequest) -> None:
        """vLLM shortens an answer that has no room instead of refusing it. Tokens are counted only if they may be many.

        Raises:
            BadRequest: prompt and answer don't fit the context together.
        """
        body = request.body
        if isinstance(body.get("prompt"), list):
            room_for(request, len(body["prompt"]), self.context_tokens)
            return
        # A token is a byte at least; what a template adds is short.
        most = len(json.dumps(body.get("prompt") or [body["messages"], body.get("tools")]).encode()) + TEMPLATE_TOKENS
        if most + (body.get("max_tokens") or 1) <= self.context_tokens:
            refuse_too_many_scores(request, body.get("max_tokens", self.context_tokens))
            return
        asked = {key: body[key] for key in ("prompt", "messages", "tools") if key in body}
        try:
            async with self._session().post("http://vllm/tokenize", json={"model": SERVED_NAME, **asked}) as response:
                content = await response.read()
        except (aiohttp.ClientError, ConnectionError) as error:
            raise self._failed(f"{type(error).__name__}: {error}") from error
        if response.status != 200:
            raise self._refused(request, response.status, content)
        room_for(request, json.loads(content)["count"], self.context_tokens)

    async def _follow(self, request: GenerationRequest, path: str, body: dict[str, Any], send: Send) -> Usage:
        shape = _chat_choice if request.endpoint == "chat" else _completion_choice
        usage = Usage(0, 0)
        try:
            async with (
                self._server.watched() as heard,
                self._session().post(f"http://vllm{path}", json=body) as response,
            ):
                if response.status != 200:
                    raise self._refused(request, response.status, await response.read())
                async for event in _events(response):
                    heard()
                    if "error" in event:
                        raise self._refused(request, int(event["error"].get("code") or 500), json.dumps(event).encode())
                    if event.get("usage"):
                        # For an answer of no tokens vLLM makes one and hides it.
                        made = event["usage"]["completion_tokens"] if body.get("max_tokens") != 0 else 0
                        usage = Usage(event["usage"]["prompt_tokens"], made)
                    if pieces := [piece for choice in event["choices"] if (piece := shape(choice)) is not None]:
                        send(pieces)
        except (aiohttp.ClientError, ConnectionError) as error:
            raise self._failed(f"{type(error).__name__}: {error}") from error
        return usage

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._loop = asyncio.get_running_loop()
            self._http = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(self._server.socket), limit=0),
                timeout=aiohttp.ClientTimeout(total=None),  # a request's deadline is the loop's
                read_bufsize=2**18,
            )
        return self._http

    def _failed(self, why: str) -> Unavailable:
        return Unavailable(f"the engine failed ({why}); it is being restarted, try again", code="engine_failed")

    def _refused(self, request: GenerationRequest, status: int, content: bytes) -> AppError:
        """vLLM's error as ours."""
        try:
            error = json.loads(content)["error"]
            message, param = str(error["message"]), error.get("param")
        except (ValueError, KeyError, TypeError):
            message, param = content.decode(errors="replace")[:500], None
        if status >= 500:
            log.error("vLLM said %d: %s", status, message)
            return self._failed(message[:500])
        if (overflow := OVERFLOW.search(message)) is not None:
            is_counted = overflow[2] == "input tokens"
            return too_long(request, int(overflow[1]) if is_counted else self.context_tokens + 1, self.context_tokens)
        return BadRequest(
            f"{self.name!r} can't answer this: {message}", param=param if isinstance(param, str) else None
        )

    def exchange_weights(self, folder: Path, name: str) -> None:
        """Load other weights into the running server, which answers nobody, and forget what the old ones had cached.

        Raises:
            httpx.HTTPError, RuntimeError: the server could not.
        """
        with self._server.client(timeout_s=START_LIMIT_S) as client:
            exchange = {"method": "exchange_weights", "args": [str(folder)]}
            client.post("/collective_rpc", json=exchange).raise_for_status()
            reset = client.post("/reset_prefix_cache").raise_for_status()
            if not reset.json()["success"]:
                raise RuntimeError(f"vLLM keeps what the weights of {self.name!r} have cached")
        self.folder, self.name = folder, name

    def close(self) -> None:
        self._server.close()
        if self._http is not None and self._loop is not None and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._http.close(), self._loop)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event, to `[DONE]`."""
    rest = b""
    async for content in response.content.iter_any():
        *events, rest = (rest + content).split(b"\n\n")
        for event in events:
            if event == b"data: [DONE]":
                return
            yield json.loads(event[len(b"data: ") :])
        if len(rest) > MAX_EVENT_BYTES:
            raise aiohttp.ClientPayloadError("an event without end")
    raise aiohttp.ClientPayloadError("the stream ended before the answer did")


def _to_all(send: Send, count: int) -> Send:
    """Sends the pieces of one choice as those of so many."""
    if count == 1:
        return send
    return lambda pieces: send(
        [piece.model_copy(update={"index": index}) for index in range(count) for piece in pieces]
    )


def _chat_choice(choice: dict[str, Any]) -> Choice | None:
    delta = choice["delta"]
    logprobs = (choice.get("logprobs") or {}).get("content")
    return _piece(choice, delta.get("content") or "", delta.get("tool_calls") or None, logprobs)


def _completion_choice(choice: dict[str, Any]) -> Choice | None:
    logprobs = choice.get("logprobs")
    return _piece(choice, choice["text"], None, None if logprobs is None else _entries(logprobs))


def _piece(choice: dict[str, Any], text: str, tool_calls: Any, logprobs: Any) -> Choice | None:
    reason = choice.get("finish_reason")
    if not (text or tool_calls or logprobs or reason):
        return None
    return Choice(
        index=choice["index"], text=text, tool_calls=tool_calls, logprobs=logprobs or None, finish_reason=reason
    )


def _entries(logprobs: dict[str, Any]) -> list[dict[str, Any]]:
    """The older endpoint's log-probabilities in the shape that chat has."""
    tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    return [
        {**_shown(token, logprob), "top_logprobs": [_shown(*top) for top in (tops_here or {}).items()]}
        for token, logprob, tops_here in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True)
    ]


def _shown(token: str, logprob: float | None) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode(errors="replace"))}


def _same_but_for_weights(one: Path, other: Path) -> bool:
    return all(_content(one / name) == _content(other / name) for name in SAME_FILES)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _knows_tools(folder: Path) -> bool:
    template = _content(folder / "chat_template.jinja")
    if template is None:
        template = str(json.loads(_content(folder / "tokenizer_config.json") or b"{}").get("chat_template")).encode()
    return b"tools" in template


def _dtype(choice: str, device: str) -> str:
    if choice != "auto":
        return choice
    return "bfloat16" if device == "gpu" or "avx512_bf16" in Path("/proc/cpuinfo").read_text() else "float32"
