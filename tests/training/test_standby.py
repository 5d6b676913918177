"""A trainer started ahead: whom it takes a job from, that it trains the same, what becomes of it when it can't."""

import errno
import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared import job_creation
from shared.checkpoint_files import sha256_of
from shared.db import transaction
from shared.schemas import JobCreate
from shared.settings import Settings
from shared.trainer_protocol import Metrics, parse
from shared.training_spec import TrainerSpec
from tests.conftest import jsonl
from tests.rows import stored_file
from tests.training.conftest import MakeSpec
from tests.training.tiny_llama import alpaca_rows, make_tiny_llama
from tests.waiting import is_alive, wait_until
from tests.worker.steps import claim, job_of
from tests.worker.test_bonds import is_locked, spec_of
from worker import base_models, run_folder, standby, supervisor
from worker.host_lock import HostLock
from worker.standby import Standby, StandbyTrainer, clear_folders
from worker.trainer_process import TrainerProcess
from worker.training.standby import LOADED_AHEAD, READY, Warm


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    return Settings(data=tmp_path / "data", base_models=("nobody/nothing",), lease_s=60)


@pytest.fixture
def ahead(ours: Settings) -> Iterator[Standby]:
    """Not started: pytest changes the environment between a test and its fixtures."""
    kept = Standby(ours)
    yield kept
    kept.close()


def spec_for(settings: Settings, folder: Path, **fields: Any) -> TrainerSpec:
    values = {"leash_s": settings.lease_s / 2, "cache_dir": str(run_folder.caches(settings)), **fields}
    return spec_of(folder).model_copy(update=values)


def process_of(kept: Standby) -> StandbyTrainer:
    assert kept._trainer is not None
    return kept._trainer


def take(kept: Standby, settings: Settings, folder: Path, lock: HostLock, **fields: Any) -> TrainerProcess | None:
    return kept.take(spec_for(settings, folder, **fields), folder / "trainer.log", lock, threading.Event())


def test_the_lock_is_the_standbys_once_it_has_the_job(ahead: Standby, ours: Settings, tmp_path: Path) -> None:
    ahead.start()
    lock = HostLock.acquire(tmp_path / "lock")
    trainer = take(ahead, ours, tmp_path, lock)
    assert trainer is not None
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(lock.descriptor)
        assert is_locked(tmp_path / "lock")
        assert (tmp_path / "lock").read_text().split()[0] == str(trainer.pid)
        trainer.send(signal.SIGSTOP)
        HostLock.acquire(tmp_path / "lock", limit_s=5).close()  # the next claim's supervisor ends it by its number
        assert trainer.exit_status() == -signal.SIGKILL
    finally:
        trainer.close()
    assert list(run_folder.standbys(ours).iterdir()) == []


def test_a_standby_that_answers_before_we_look_again_has_taken_the_job(
    ahead: Standby, ours: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_it_was = socket.send_fds

    def send_and_lose_the_core(connection: socket.socket, *what: Any) -> int:
        sent = as_it_was(connection, *what)
        assert sent == len(what[0][0])
        poller = select.poll()
        poller.register(connection, 0)  # hang-ups are always told
        assert poller.poll(30_000), "it has gone on to train"
        return sent

    monkeypatch.setattr(socket, "send_fds", send_and_lose_the_core)
    ahead.start()
    trainer = take(ahead, ours, tmp_path, HostLock.acquire(tmp_path / "lock"))
    assert trainer is not None
    trainer.close()


def test_a_cancel_right_after_the_hand_over_is_obeyed(ahead: Standby, ours: Settings, tmp_path: Path) -> None:
    ahead.start()
    trainer = take(ahead, ours, tmp_path, HostLock.acquire(tmp_path / "lock"))
    assert trainer is not None
    try:
        trainer.send(signal.SIGUSR1)
        wait_until(lambda: trainer.exit_status() is not None)
        assert trainer.exit_status() == 0
        assert b'{"type":"stopped","reason":"cancelled","step":0}' in trainer.drain()
    finally:
        trainer.close()


def test_a_claim_that_is_lost_ends_the_standby_that_took_it(ours: Settings, tmp_path: Path) -> None:
    short = ours.model_copy(update={"lease_s": 3.0, "heartbeat_s": 1.0})
    kept = Standby(short)
    kept.start()
    lost = threading.Event()
    lock = HostLock.acquire(tmp_path / "lock")
    trainer = kept.take(spec_for(short, tmp_path), tmp_path / "trainer.log", lock, lost)
    assert trainer is not None
    try:
        trainer.read_lines(2)
        assert trainer.exit_status() is None
        lost.set()
        wait_until(lambda: trainer.exit_status() is not None)
        assert trainer.exit_status() == -signal.SIGKILL
    finally:
        trainer.close()


@pytest.mark.parametrize("harm", ["killed", "stopped", "stale environment", "vanishing source", "another leash"])
def test_a_standby_that_is_no_use_is_gone_and_leaves_the_lock(
    harm: str, ahead: Standby, ours: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby, "HAND_OVER_LIMIT_S", 1.0)
    ahead.start()
    process, fields = process_of(ahead), {}
    match harm:
        case "killed":
            os.kill(process.pid, signal.SIGKILL)
            wait_until(lambda: process.exit_status() is not None)
        case "stopped":
            process.send(signal.SIGSTOP)
        case "stale environment":
            monkeypatch.setenv("OMP_NUM_THREADS", "1")
        case "vanishing source":
            monkeypatch.setattr(standby, "SOURCES", tmp_path / "sources")
            (tmp_path / "sources" / "worker").mkdir(parents=True)
            (tmp_path / "sources" / "worker" / "gone.py").symlink_to("nowhere")
        case _:
            fields = {"leash_s": 1.0}
    with HostLock.acquire(tmp_path / "lock") as lock:
        assert take(ahead, ours, tmp_path, lock, **fields) is None
        assert not is_alive(process.pid)
        assert is_locked(tmp_path / "lock"), "by us"
    assert not is_locked(tmp_path / "lock")
    assert list(run_folder.standbys(ours).iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    ahead.start()
    assert process_of(ahead).exit_status() is None, "the next job finds another"


def test_a_standby_that_could_not_be_made_is_gone_and_no_job_inherits_it(
    ahead: Standby, ours: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that the running job has filled: the next job's own trainer would find it empty."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "unsloth.py").write_text("raise RuntimeError('CUDA error: out of memory')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'broken'}:{Path.cwd()}")
    ahead.start()
    process = process_of(ahead)
    wait_until(lambda: process.exit_status() == 1)
    process.drain()
    assert "CUDA error: out of memory" in process.last_output()
    with HostLock.acquire(tmp_path / "lock") as lock:
        assert take(ahead, ours, tmp_path, lock) is None


def test_a_standby_dies_with_its_worker_even_if_it_was_stopped(ours: Settings) -> None:
    script = (
        "import sys, time; from pathlib import Path; from shared.settings import Settings\n"
        "from worker.standby import Standby\n"
        "kept = Standby(Settings(data=Path(sys.argv[1]))); kept.start()\n"
        "print(kept._trainer.pid, flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", script, str(ours.data)], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    process = int(worker.stdout.readline())
    try:
        maps = Path("/proc", str(process), "maps")
        wait_until(lambda: "libtorch" in maps.read_text())  # loaded after `die_with_parent`
        os.kill(process, signal.SIGSTOP)
        worker.kill()
        worker.wait()
        wait_until(lambda: not is_alive(process))
    finally:
        worker.kill()
        if is_alive(process):
            os.kill(process, signal.SIGKILL)
    assert len(list(run_folder.standbys(ours).iterdir())) == 1

    def is_cleared() -> bool:
        clear_folders(ours)
        return not list(run_folder.standbys(ours).iterdir())

    wait_until(is_cleared)  # the last of its threads may still be going, and the lock with it


def test_a_folder_in_use_is_not_cleared(ahead: Standby, ours: Settings) -> None:
    ahead.start()
    clear_folders(ours)
    assert len(list(run_folder.standbys(ours).iterdir())) == 1


def test_it_knows_no_secret(ahead: Standby, monkeypatch: pytest.MonkeyPatch, ours: Settings) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-that-must-not-show")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/where/the/operator/says")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # Inductor sets it where it is imported
    ahead.start()
    environment = Path(f"/proc/{process_of(ahead).pid}/environ").read_bytes().split(b"\0")
    assert not any(b"a-secret" in variable for variable in environment)
    assert f"TORCHINDUCTOR_CACHE_DIR={run_folder.caches(ours)}/inductor".encode() in environment
    assert b"TRITON_CACHE_DIR=/where/the/operator/says" in environment


def test_no_weights_are_loaded_ahead_of_a_memory_limit(
    ahead: Standby, ours: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_models, "at_hand", lambda _settings: tmp_path)
    ahead.start()
    process = process_of(ahead)
    assert process._order(ours).base_model_dir == str(tmp_path)
    assert process._order(ours.model_copy(update={"trainer_memory_bytes": 2**30})).base_model_dir is None


@pytest.mark.parametrize(("device", "cores", "started"), [("cpu", 64, 0), ("NVIDIA H100", 8, 1), ("NVIDIA H100", 2, 0)])
def test_beside_a_running_job_it_is_started_only_where_the_job_does_not_need_the_processor(
    device: str, cores: int, started: int, ours: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead:
        def exit_status(self) -> int:
            return 1

    begun: list[Dead] = []
    monkeypatch.setattr(standby, "StandbyTrainer", lambda _settings: begun.append(Dead()) or begun[-1])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    kept = Standby(ours)
    for _ in range(3):
        kept.stepping(device)
    assert len(begun) == started, "once a job, even if it dies"


def test_one_that_can_not_be_started_beside_a_job_is_tried_once_a_job(
    ours: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Settings] = []

    def full(settings: Settings) -> StandbyTrainer:
        tried.append(settings)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(standby, "StandbyTrainer", full)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    kept = Standby(ours)
    for job in (1, 2):
        with HostLock.acquire(tmp_path / "lock") as lock:
            assert take(kept, ours, tmp_path, lock) is None
        for _ in range(3):
            kept.stepping("NVIDIA H100")
        assert len(tried) == job


@pytest.mark.parametrize("step", ["open", "flock"])
def test_a_folder_that_another_worker_clears_before_it_is_locked_is_made_anew(
    step: str, ours: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {"open": os, "flock": fcntl}[step]
    as_it_was, cleared = getattr(module, step), []

    def clear_first(target: Any, how: int, *rest: Any, **named: Any) -> Any:
        if not cleared and not (step == "open" and not str(target).startswith(str(run_folder.standbys(ours)))):
            cleared.append(target)
            clear_folders(ours)
        return as_it_was(target, how, *rest, **named)

    monkeypatch.setattr(module, step, clear_first)
    folder = standby._Folder(ours)
    assert cleared
    clear_folders(ours)
    assert list(run_folder.standbys(ours).iterdir()) == [folder.path], "it is locked"
    folder.remove()


@pytest.fixture(scope="module")
def base_settings(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Settings:
    """Of a worker whose usual base is the tiny one."""
    data = tmp_path_factory.mktemp("data")
    (data / "models" / "acme").mkdir(parents=True)
    (data / "models" / "acme" / "tiny").symlink_to(tiny_base)
    return Settings(data=data, models_dir=data / "models", base_models=("acme/tiny",), lease_s=60)


@dataclass
class Ended:
    """A trainer of `worker.trainer_process` that has ended."""

    messages: list[Any]
    log: str
    model_sha256: str | None
    noted_pid: bool
    """Whether the lock named it, and was held, when it had begun."""


def run_to_end(trainer: TrainerProcess, folder: Path) -> Ended:
    messages: list[Any] = []
    noted = False
    try:
        while trainer.exit_status() is None:
            messages += [parse(line) for line in trainer.read_lines(0.2)]
            if any(message.type == "started" for message in messages) and not noted:
                noted = is_locked(folder / "lock") and (folder / "lock").read_text().split()[0] == str(trainer.pid)
        messages += [parse(line) for line in trainer.drain()]
    finally:
        trainer.close()
    weights = folder / "checkpoints" / "3" / "model.safetensors"
    sha256 = sha256_of(weights) if weights.exists() else None
    log = (folder / "trainer.log").read_text()
    return Ended([message for message in messages if message.type != "alive"], log, sha256, noted)


LIMIT_BYTES = 180 * 2**20
"""Enough to map the wide model's file, not to load it as well."""
CHOICES = {"max_steps": 3, "warmup_steps": 0, "learning_rate": 1e-3, "max_seq_length": 512}


def job_for(make_spec: MakeSpec, settings: Settings, folder: Path, **fields: Any) -> TrainerSpec:
    (folder / "work").mkdir()
    cache_dir = str(run_folder.caches(settings))
    values = {"training": CHOICES, "leash_s": settings.lease_s / 2, "cache_dir": cache_dir, **fields}
    return make_spec(folder, **values)


def run_ahead(settings: Settings, spec: TrainerSpec, folder: Path, *, ready: bool = True) -> Ended:
    kept = Standby(settings)
    kept.start()
    if ready:
        wait_until(lambda: any(run_folder.standbys(settings).glob(f"*/{READY}")), 120)
    lock = HostLock.acquire(folder / "lock")
    trainer = kept.take(spec, folder / "trainer.log", lock, threading.Event())
    assert trainer is not None
    return run_to_end(trainer, folder)


@pytest.mark.slow
def test_a_standby_trains_bit_for_bit_what_a_fresh_trainer_does(
    make_spec: MakeSpec, base_settings: Settings, tmp_path: Path
) -> None:
    """The fresh one also fills the cache of tokens that the standby reads. Another length than was loaded for."""
    folders = [tmp_path / name for name in ("fresh", "ahead")]
    for folder in folders:
        folder.mkdir()
    spec = job_for(make_spec, base_settings, folders[0])
    lock = HostLock.acquire(folders[0] / "lock")
    fresh = run_to_end(TrainerProcess(spec, folders[0] / "trainer.log", lock, threading.Event()), folders[0])
    assert len(list((run_folder.caches(base_settings) / "tokens").iterdir())) == 1
    ahead = run_ahead(base_settings, job_for(make_spec, base_settings, folders[1]), folders[1])
    assert LOADED_AHEAD in ahead.log
    assert LOADED_AHEAD not in fresh.log
    assert ahead.noted_pid
    assert [message.type for message in ahead.messages] == [message.type for message in fresh.messages]
    for one, other in zip(ahead.messages, fresh.messages, strict=True):
        for name in ("resolved", "train_tokens", "loss", "grad_norm", "learning_rate", "tokens", "message"):
            assert getattr(one, name, None) == getattr(other, name, None), name
    assert ahead.model_sha256 is not None
    assert ahead.model_sha256 == fresh.model_sha256


@pytest.mark.slow
def test_a_standby_that_is_still_importing_takes_a_job_whose_memory_is_limited(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    """The limit counts the model: nothing may have been loaded before it was set."""
    models = tmp_path / "models"
    base = make_tiny_llama(models / "acme" / "wide", hidden_size=1024, intermediate_size=4096)
    assert LIMIT_BYTES / 2 < (base / "model.safetensors").stat().st_size < LIMIT_BYTES
    settings = Settings(
        data=tmp_path / "data",
        models_dir=models,
        base_models=("acme/wide",),
        lease_s=60,
        trainer_memory_bytes=LIMIT_BYTES,
    )
    limited = {"base_model_dir": str(base), "memory_limit_bytes": settings.trainer_memory_bytes}
    as_loaded_ahead = {**CHOICES, "gradient_checkpointing": False}
    spec = job_for(make_spec, settings, tmp_path, training=as_loaded_ahead, **limited)
    ended = run_ahead(settings, spec, tmp_path, ready=False)
    assert LOADED_AHEAD not in ended.log
    assert [message.type for message in ended.messages] == ["error"]
    assert ended.messages[-1].code == "out_of_memory", ended.messages


@pytest.mark.slow
def test_what_was_loaded_ahead_is_used_for_the_same_files_and_choices_only(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.training import engine, memory, model  # noqa: F401 - unsloth first

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    usual = {"max_seq_length": 256, "master_weights": "fp32", "gradient_checkpointing": False}

    def is_used(folder: Path, choices: dict[str, Any], change: Callable[[], object] = lambda: None) -> bool:
        warm = Warm()
        warm.load_ahead(base)
        ahead = warm._model
        assert ahead is not None
        change()
        found = warm.load_model(folder, model.hardware(), **choices)
        assert warm._model is None, "never twice"
        return found is ahead

    monkeypatch.setattr(memory, "available_bytes", lambda: 10**9)
    assert Warm().hardware(None).memory_bytes == model.hardware().memory_bytes == 10**9
    warm = Warm()
    warm.load_ahead(base)
    weights = sum(parameter.numel() * 4 for parameter in warm._model.parameters())
    assert warm.hardware(None).memory_bytes == 10**9 + weights, "or a run would be cut into other passes"

    assert is_used(base, usual)
    assert not is_used(base, {**usual, "master_weights": "bf16"})
    assert not is_used(base, {**usual, "gradient_checkpointing": "unsloth"})
    assert not is_used(tiny_base, usual)
    assert not is_used(base, usual, (base / "model.safetensors").touch)


@pytest.mark.slow
@pytest.mark.parametrize(("free_bytes", "waits_there"), [(80 * 10**9, True), (10**6, False)])
def test_on_a_gpu_a_model_is_loaded_ahead_only_if_it_is_small_beside_a_job(
    free_bytes: int, waits_there: bool, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.training import engine, model  # noqa: F401 - unsloth first
    from worker.training.resolve import Hardware

    done: list[str] = []
    kernels = SimpleNamespace(warm_up=lambda folder: done.append("kernels"))
    monkeypatch.setitem(sys.modules, "worker.training.gpu", kernels)
    monkeypatch.setattr("worker.training.gpu", kernels, raising=False)
    monkeypatch.setattr(
        model, "hardware", lambda *_: Hardware("GPU", is_gpu=True, computes_bf16=True, memory_bytes=free_bytes)
    )
    monkeypatch.setattr(model, "load_model", lambda *_, **choices: done.append("model"))
    Warm().load_ahead(tiny_base)
    assert done == (["kernels", "model"] if waits_there else ["kernels"])


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_job_on_several_gpus_neither_takes_a_standby_nor_has_one_started_beside_it(
    gpus: int, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Kept(Standby):
        def stepping(self, device: str) -> None:
            asked.append("start")

        def take(self, *_: Any) -> None:
            asked.append("take")

    monkeypatch.setattr(supervisor, "TrainerProcess", lambda *_: None)
    file_id = stored_file(settings, jsonl(alpaca_rows(8)), filename="rows.jsonl")
    with transaction() as session:
        body = {"model": settings.base_models[0], "training_file": file_id, "training": {"gpus": gpus}}
        job_creation.submit(session, "default", JobCreate.model_validate(body))
    run = supervisor._Run(claim(settings), settings, None, Kept(settings))
    lease: Any = SimpleNamespace(lost=threading.Event())
    run._start(spec_of(settings.data), None, lease)  # type: ignore[arg-type]
    run._device = "NVIDIA H100"
    run._take([METRICS.model_dump_json().encode()])
    run.clean_up()
    assert asked == (["take", "start"] if gpus == 1 else [])


METRICS = Metrics(
    step=1,
    total_steps=2,
    epoch=0.5,
    loss=1.0,
    learning_rate=1e-4,
    grad_norm=1.0,
    tokens=1,
    tokens_per_second=1,
    samples_per_second=1,
    peak_memory_bytes=1,
    elapsed_s=1,
    remaining_s=1,
)


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_jobs_are_run_by_standbys_and_without_one(
    settings: Settings, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    found = base_models.BaseModelFiles(path=tiny_base, source="folder", revision=None, note=None)
    monkeypatch.setattr(base_models, "resolve", lambda *_: found)
    kept = Standby(settings)
    started: list[int] = []
    for harm in (False, True):
        kept.start()
        started.append(process_of(kept).pid)
        if harm:
            os.kill(started[-1], signal.SIGKILL)
        file_id = stored_file(settings, jsonl(alpaca_rows(8)), filename="rows.jsonl")
        with transaction() as session:
            body = {"model": settings.base_models[0], "training_file": file_id, "training": {"max_steps": 1}}
            job_id = job_creation.submit(session, "default", JobCreate.model_validate(body)).id
        supervisor.supervise(claim(settings), settings, standby=kept)
        job = job_of(job_id)
        assert job.status == "succeeded", job.error
        assert (job.attempts, job.fence) == (0, 1)
        assert not is_alive(started[-1])
        noted = (settings.run_dir / "jobs" / job_id / "lock").read_text().split()[0]
        assert (noted == str(started[-1])) is not harm
    assert list(run_folder.standbys(settings).iterdir()) == []
