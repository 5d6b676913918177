"""The engine for production GPUs: vLLM's own OpenAI server, one for each loaded model, as a supervised child.

    generator ─ stdin ─▶ keeper ─▶ vLLM's server ─▶ its engine's processes     (one session, killed together)
        └───── HTTP over a Unix socket in a private folder ──▲

It runs in an environment of its own (`ANNEAL_VLLM_PYTHON`), whose pins differ from ours. Requests go to it nearly as
they came; this module turns its events into pieces of choices, and its errors into ours. A server that crashes, hangs
or is out of memory fails what it was answering and is started anew by the cache; nothing else falls with it.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, Any

import aiohttp
import httpx

from shared.errors import AppError, BadRequest, Unavailable
from shared.generation import Choice, GenerationRequest
from shared.settings import Settings
from worker.generation.backends import has_gpu
from worker.generation.engine import Send, Usage, refuse_unsupported, room_for, too_long
from worker.generation.planning import CachePlan, plan

log = logging.getLogger(__name__)

NAME = "vllm"
SERVED_NAME = "model"
SUPPORTED = frozenset(
    (
        *("messages", "prompt", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "logprobs", "top_logprobs"),
        *("frequency_penalty", "presence_penalty", "logit_bias", "echo", "response_format"),
        *("tools", "tool_choice", "parallel_tool_calls"),
    )
)
START_LIMIT_S = 300.0
"""The first start of a model compiles its kernels, which are kept for the next."""
POLL_S = 0.25
HEALTH_EVERY_S = 2.0
SILENT_AFTER_S = 20.0
"""A server that answers no look at its health for so long hangs."""
OVERHEAD_BYTES = {"cpu": 15 * 2**27, "gpu": 2 * 2**30}
"""What the processes of one server take beside weights and cache: 1.82 GiB measured on a CPU (three times Python with
torch); on GPUs, not measured, of the GPU's memory, the CUDA context and compiled graphs."""
STOP_LIMIT_S = 10.0
"""For an end in order; then it is killed."""
DEVICE_OPTIONS = {
    # Compiled, it starts in 86 to 117 s instead of 35, and a token takes as much of the CPU (docs/decisions/0206).
    "cpu": ("--enforce-eager",),
    # The share is given in bytes. vLLM would also refuse to start beside a trainer, for want of 92% of the GPU.
    "gpu": ("--gpu-memory-utilization", "0.01"),
}
LAST_LINES = 40
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
        if settings.vllm_python is None or not settings.vllm_python.exists():
            raise ValueError(
                f"ANNEAL_ENGINE=vllm needs ANNEAL_VLLM_PYTHON, the interpreter of an environment that has vLLM; it is "
                f"{settings.vllm_python}. `make setup-vllm` builds one in .venv-vllm"
            )
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
        server = _Server(self._settings, folder, plan.cache, self._dtype, self._device)
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

    def __init__(self, server: "_Server", folder: Path, name: str, plan: ServerPlan) -> None:
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
            raise BadRequest(
                f"the chat template of {self.name!r} knows no tools; use a model whose template does", param="tools"
            )
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


class _Server:
    """The process, its socket, its log; a thread looks after its health."""

    def __init__(self, settings: Settings, folder: Path, cache: CachePlan, dtype: str, device: str) -> None:
        self._settings = settings
        self._folder = tempfile.TemporaryDirectory(prefix="anneal-vllm-")  # short: a socket's path has a limit
        self.socket = Path(self._folder.name) / "http.sock"
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._failure: str | None = None
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[str]]] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._asked = 0
        self._heard_at = 0.0
        command = (
            *(sys.executable, "-m", "worker.generation.keeper"),
            *(str(settings.vllm_python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(folder), "--served-model-name", SERVED_NAME, "--uds", str(self.socket)),
            *("--dtype", dtype, "--max-model-len", str(cache.context_tokens)),
            *("--max-num-seqs", str(settings.generation_sequences), "--kv-cache-memory-bytes", str(cache.cache_bytes)),
            # What OpenAI takes when nothing is said, not what a checkpoint's author preferred.
            *("--generation-config", "vllm", "--max-logprobs", "20"),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            *("--scheduling-policy", "priority", "--disable-uvicorn-access-log", "--disable-log-stats"),
            *("--worker-extension-cls", "anneal_exchange.WeightExchange"),
            *DEVICE_OPTIONS[device],
        )
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(settings, self._folder.name),
        )
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), name="vllm-log", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        return self._failure is None and not self._has_ended()

    def _has_ended(self) -> bool:
        """Looks without reaping: as long as the keeper's number is taken, so is that of its group."""
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _kill(self) -> None:
        """Whatever is left of the group; the keeper itself may have been killed."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def client(self, timeout_s: float) -> httpx.Client:
        """A client for single calls."""
        transport = httpx.HTTPTransport(uds=str(self.socket))
        return httpx.Client(transport=transport, base_url="http://vllm", timeout=timeout_s)

    def wait_until_ready(self, name: str) -> None:
        """Block until it answers.

        Raises:
            Unavailable: it ended, or needs too long.
        """
        deadline = time.monotonic() + START_LIMIT_S
        with self.client(timeout_s=5) as client:
            while True:
                if self._has_ended():
                    raise self._not_loaded(name, "ended")
                if time.monotonic() > deadline:
                    raise self._not_loaded(name, f"was not ready after {START_LIMIT_S:.0f} s")
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/health").status_code == 200:
                        break
                time.sleep(POLL_S)
        threading.Thread(target=self._look_after, name="vllm-health", daemon=True).start()

    async def failure(self) -> str:
        """Why it failed, once it has."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[str] = loop.create_future()
        with self._lock:
            if self._failure is not None:
                return self._failure
            self._waiting.append((loop, future))
        try:
            return await future
        finally:
            with self._lock:
                self._waiting.remove((loop, future))

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[Callable[[], None]]:
        """While the block lasts, the server must say something to somebody in time; what is given notes that it has."""
        if self._asked == 0:
            self._hear()
        self._asked += 1
        try:
            yield self._hear
        finally:
            self._asked -= 1

    def _hear(self) -> None:
        self._heard_at = time.monotonic()

    def close(self) -> None:
        """End all of its processes."""
        self._closed.set()
        self._fail("it was stopped")
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        deadline = time.monotonic() + STOP_LIMIT_S
        while not self._has_ended() and time.monotonic() < deadline:
            time.sleep(0.05)
        self._kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._folder.cleanup()

    def _look_after(self) -> None:
        heard_at = time.monotonic()
        with self.client(timeout_s=HEALTH_EVERY_S) as client:
            while not self._closed.wait(HEALTH_EVERY_S):
                if self._has_ended():
                    self._kill()
                    self._fail("its process ended")
                    return
                try:
                    status = client.get("/health").status_code
                except httpx.HTTPError:
                    status = 0
                stalled_s = time.monotonic() - self._heard_at
                if self._asked and stalled_s > self._settings.generation_stall_s:
                    # Its front answers, but whoever decodes does not.
                    self._fail(f"it gave no token for {stalled_s:.0f} s (ANNEAL_GENERATION_STALL_S)")
                    return
                if status == 200:
                    heard_at = time.monotonic()
                elif status >= 500 or time.monotonic() - heard_at > SILENT_AFTER_S:
                    self._fail("it reports that it is broken" if status else "it hangs")
                    return

    def _fail(self, why: str) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure = why
            for loop, future in self._waiting:
                with contextlib.suppress(RuntimeError):  # that loop is closed
                    loop.call_soon_threadsafe(_settle, future, why)
        if not self._closed.is_set():
            log.error("vLLM failed: %s; its last words:\n%s", why, "\n".join(self._lines))

    def _read(self, output: IO[bytes]) -> None:
        for line in output:
            text = line.decode(errors="replace").rstrip()
            self._lines.append(text)
            log.debug("vllm: %s", text)

    def _not_loaded(self, name: str, how: str) -> Unavailable:
        log.error("vLLM %s while it loaded %s; its last words:\n%s", how, name, "\n".join(self._lines))
        return Unavailable(
            f"the model {name!r} could not be loaded: vLLM {how}; the generator's log has the details",
            code="model_load_failed",
        )


def _settle(future: "asyncio.Future[str]", why: str) -> None:
    if not future.done():
        future.set_result(why)


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


def _environment(settings: Settings, folder: str) -> dict[str, str]:
    """Ours without what belongs to our interpreter; no reports, no downloads."""
    # VLLM_CPU_KVCACHE_SPACE would override the plan.
    foreign = ("ANNEAL_", "PYTHON", "OMP_", "VLLM_CPU_KVCACHE_SPACE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {
        **kept,
        "PYTHONPATH": str(Path(__file__).parent / "inside_vllm"),
        "TMPDIR": folder,  # its processes' sockets and files, which it leaves behind when it is killed
        "VLLM_RPC_BASE_PATH": folder,
        "VLLM_SERVER_DEV_MODE": "1",  # for the exchange of weights; the socket is in a folder of this user alone
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(settings.data / "cache" / "vllm"),  # compiled kernels, for the next start
        "VLLM_LOGGING_LEVEL": "WARNING" if settings.log_level != "debug" else "INFO",
    }
