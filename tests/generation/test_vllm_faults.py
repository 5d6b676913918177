"""What becomes of a vLLM server that dies, hangs, or loses its generator: real processes, each struck for real."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from shared.errors import Unavailable
from shared.generation import Choice, GenerationRequest
from shared.settings import Settings
from tests.waiting import is_alive, wait_until
from worker.base_models import resolve
from worker.generation.backends import make_backend
from worker.generation.vllm_engine import VllmBackend, VllmEngine

PYTHON = Path(os.environ.get("ANNEAL_VLLM_PYTHON") or Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python")
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
STALL_S = 5.0

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"there is no {PYTHON}; `make setup-vllm` builds it"),
]


@pytest.fixture(scope="module")
def vllm_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(data=tmp_path_factory.mktemp("data"), engine="vllm", vllm_python=PYTHON, generation_stall_s=STALL_S)


@pytest.fixture
def engine(vllm_settings: Settings) -> Iterator[VllmEngine]:
    """A server of its own for each test."""
    backend = make_backend(vllm_settings)
    assert isinstance(backend, VllmBackend)
    folder = resolve(NAME, vllm_settings).path
    engine = backend.load(folder, NAME, backend.plan(folder, NAME))
    yield engine
    engine.close()


def members(session: int) -> list[psutil.Process]:
    """The living processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def is_of_vllm(process: psutil.Process) -> bool:
    """Whether it is one that the server itself has started; vLLM names those."""
    try:
        return "VLLM::" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def struck_while_it_answers(engine: VllmEngine, strike: Callable[[], None]) -> Unavailable:
    """What a client hears whose engine is struck after its first text."""

    async def ask() -> Unavailable:
        pieces: list[Choice] = []
        body = {"prompt": "Once upon a time", "max_tokens": 4000, "temperature": 1.0, "top_p": 1.0, "n": 1}
        request = GenerationRequest(
            id="gen-1", replies="x", model=NAME, location="x", endpoint="completion", body=body, deadline_s=100
        )
        answer = asyncio.ensure_future(engine.answer(request, 1, pieces.extend))
        while not pieces:
            await asyncio.sleep(0.01)
        strike()
        with pytest.raises(Unavailable) as caught:
            await asyncio.wait_for(answer, 60)
        return caught.value

    return asyncio.run(ask())


def the_one_that_decodes(engine: VllmEngine) -> psutil.Process:
    """vLLM names its processes; on one GPU the engine's process decodes itself."""
    processes = members(engine._server._process.pid)
    for name in ("VLLM::Worker", "VLLM::EngineCore"):
        for process in processes:
            if name in " ".join(process.cmdline()):
                return process
    raise AssertionError(f"nobody decodes: {processes}")


def test_a_killed_decoder_as_by_the_kernel_short_of_memory_takes_down_its_server_alone(engine: VllmEngine) -> None:
    session = engine._server._process.pid
    error = struck_while_it_answers(engine, the_one_that_decodes(engine).kill)
    assert error.code == "engine_failed"
    wait_until(lambda: not engine.is_alive)
    wait_until(lambda: not members(session))


def test_a_decoder_that_hangs_behind_a_front_that_answers_is_noticed(engine: VllmEngine) -> None:
    began = time.monotonic()
    error = struck_while_it_answers(engine, the_one_that_decodes(engine).suspend)
    assert error.code == "engine_failed"
    assert "ANNEAL_GENERATION_STALL_S" in error.message
    assert time.monotonic() - began < 30
    assert not engine.is_alive
    engine.close()
    wait_until(lambda: not members(engine._server._process.pid))


def test_nothing_outlives_a_generator_that_is_killed(vllm_settings: Settings) -> None:
    """Killed in the middle of a load, when the server has only begun to start processes."""
    program = (
        "import sys\n"
        "from shared.settings import Settings\n"
        "from worker.base_models import resolve\n"
        "from worker.generation.backends import make_backend\n"
        "settings = Settings.model_validate_json(sys.argv[1])\n"
        "backend, folder = make_backend(settings), resolve(sys.argv[2], settings).path\n"
        "backend.load(folder, sys.argv[2], backend.plan(folder, sys.argv[2]))\n"
    )
    generator = subprocess.Popen([sys.executable, "-c", program, vllm_settings.model_dump_json(), NAME])
    try:
        parent = psutil.Process(generator.pid)
        wait_until(lambda: any(map(is_of_vllm, parent.children(recursive=True))), limit_s=120)
        children = parent.children(recursive=True)
    finally:
        os.kill(generator.pid, signal.SIGKILL)
        generator.wait()
    wait_until(lambda: not any(is_alive(child) for child in children))
