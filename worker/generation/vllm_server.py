"""vLLM's OpenAI server as a supervised child: started, looked after, ended with all of its processes.

    generator ─ stdin ─▶ keeper ─▶ vLLM's server ─▶ its engine's processes     (one session, killed together)
        └───── HTTP over a Unix socket in a private folder ──▲

Knows nothing of requests and answers; `worker.generation.vllm_engine` does.
"""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO

import httpx

from shared.errors import Unavailable
from shared.settings import Settings
from worker.generation.planning import CachePlan

log = logging.getLogger(__name__)

SERVED_NAME = "model"
START_LIMIT_S = 300.0
"""On GPUs the first start of a model compiles its kernels, which are kept for the next."""
POLL_S = 0.25
HEALTH_EVERY_S = 2.0
SILENT_AFTER_S = 20.0
"""A server that answers no look at its health for so long hangs."""
STOP_LIMIT_S = 10.0
"""For an end in order; then it is killed."""
DEVICE_OPTIONS = {
    # Compiled, it starts in 86 to 117 s instead of 35, and a token takes as much of the CPU (docs/decisions/0206).
    "cpu": ("--enforce-eager",),
    # The share is given in bytes. vLLM would also refuse to start beside a trainer, for want of 92% of the GPU.
    "gpu": ("--gpu-memory-utilization", "0.01"),
}
LAST_LINES = 40
WARNING = "anneal_exchange:"
"""What our module in vLLM's processes begins a warning with; a worker's name may stand before it."""


class Server:
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
            *(sys.executable, "-m", "worker.generation.keeper", self._folder.name),
            *(str(settings.vllm_python), "-m", "anneal_serve"),
            *(str(folder), "--served-model-name", SERVED_NAME, "--uds", str(self.socket)),
            *("--dtype", dtype, "--max-model-len", str(cache.context_tokens)),
            *("--max-num-seqs", str(settings.generation_sequences), "--kv-cache-memory-bytes", str(cache.cache_bytes)),
            # What OpenAI takes when nothing is said, not what a checkpoint's author preferred.
            *("--generation-config", "vllm", "--max-logprobs", "20"),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            *("--scheduling-policy", "priority", "--disable-uvicorn-access-log", "--disable-log-stats"),
            *("--worker-extension-cls", "anneal_exchange.WeightExchange"),
            *DEVICE_OPTIONS[device],
            *settings.vllm_options,
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
            log.log(logging.WARNING if WARNING in text else logging.DEBUG, "vllm: %s", text)

    def _not_loaded(self, name: str, how: str) -> Unavailable:
        log.error("vLLM %s while it loaded %s; its last words:\n%s", how, name, "\n".join(self._lines))
        return Unavailable(
            f"the model {name!r} could not be loaded: vLLM {how}; the generator's log has the details",
            code="model_load_failed",
        )


def _settle(future: "asyncio.Future[str]", why: str) -> None:
    if not future.done():
        future.set_result(why)


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
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(settings.data / "cache" / "vllm"),  # compiled kernels, for the next start
        "VLLM_LOGGING_LEVEL": "WARNING" if settings.log_level != "debug" else "INFO",
    }
