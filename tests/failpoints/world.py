"""A fresh service for one run: data folder, database, broker, a base model; and children that act in it.

Whatever touches the database runs in a forked child, because connections don't survive a fork and the run's own
process must stay without threads to fork from.
"""

import contextlib
import ctypes
import json
import logging
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import redis
from celery.exceptions import CeleryError
from kombu.exceptions import KombuError
from sqlalchemy.exc import SQLAlchemyError

from shared import db, job_creation
from shared.db import reading, transaction
from shared.errors import AppError
from shared.models import FileStatus
from shared.schemas import JobCreate
from shared.settings import Settings, get_settings
from tests.failpoints import generating, hooks, toy
from tests.failpoints.ledger import Ledger
from tests.failpoints.points import Board, Fault, Points
from tests.rows import stored_file
from worker import batches, lifecycle, supervisor

BASE = "test/tiny"
CHILD_LIMIT_S = 60.0
ORPHAN_LIMIT_S = 10.0
_PR_SET_CHILD_SUBREAPER = 36

FORGIVABLE = (SQLAlchemyError, redis.RedisError, KombuError, CeleryError, OSError, AppError)
"""What a task may raise while its database, broker or disk is broken: Celery logs it, and the worker lives."""


class Hung(Exception):
    """A child did not end in time."""


class World:
    """One run's service. Make it in a process of its own: it changes the environment."""

    def __init__(self, folder: Path, database_url: str, redis_url: str, overrides: dict[str, str]) -> None:
        self.folder = folder
        self.journal_path = folder / "journal.jsonl"
        self.debts_path = folder / "debts.txt"
        self.log_path = folder / "log.txt"
        self.board = Board()
        self._asked_path = folder / "asked.jsonl"
        self._seen_path = folder / "results-seen.jsonl"
        self._released_path = folder / "released"
        self._generator_pid: int | None = None
        _make_base_model(folder / "models" / BASE)
        values = {
            "ANNEAL_DATA": str(folder / "data"),
            "ANNEAL_DATABASE_URL": database_url,
            "ANNEAL_REDIS_URL": redis_url,
            "ANNEAL_MODELS_DIR": str(folder / "models"),
            "ANNEAL_HUB_OFFLINE": "true",
            "ANNEAL_POLL_S": "0.1",
            "ANNEAL_LEASE_S": "60",
            "ANNEAL_HEARTBEAT_S": "25",
            "ANNEAL_RETRY_DELAY_S": "0",
            "ANNEAL_INLINE_VALIDATION_BYTES": "4096",
            **overrides,
        }
        for name in [name for name in os.environ if name.startswith("ANNEAL_")]:
            del os.environ[name]
        os.environ.update(values)
        get_settings.cache_clear()
        db.reset()
        redis.Redis.from_url(redis_url).flushall()
        (folder / "data").mkdir(parents=True)
        _adopt_orphans()

    @property
    def settings(self) -> Settings:
        return get_settings()

    @contextlib.contextmanager
    def generator(self) -> Iterator[None]:
        """While this is open there is a generator. Open it before anything is hooked."""
        with generating.generator(self.settings, self._asked_path, self._released_path) as self._generator_pid:
            yield

    def in_child(self, work: Callable[[], Any]) -> Any:
        """Run `work` in a forked child and return what it returns, which must be JSON.

        Raises:
            AssertionError: it raised something.
        """
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            with _last_words(self.log_path):
                toy.be_the_trainer_of_this_process()
                answer = json.dumps({"value": _with_own_connections(work)})
                with os.fdopen(writer, "w") as stream:
                    stream.write(answer)
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as stream:
            answer = stream.read()
        self._wait(child)
        if not answer:
            raise AssertionError(f"the harness's own step {work} failed: {self.log_path.read_text()[-3000:]}")
        return json.loads(answer)["value"]

    def act(self, work: Callable[[], None], fault: Fault | None, trace: Path | None) -> str:
        """Run `work` in a child whose effects are points. Returns how it ended: `done`, a signal, or what it raised."""
        child = os.fork()
        if child == 0:
            with _last_words(self.log_path):
                self._arm(fault, trace)
                ending = 0
                try:
                    _with_own_connections(work)
                except FORGIVABLE:
                    logging.exception("the process under test raised what it may")
                    ending = 3
                os._exit(ending)
        status = os.waitstatus_to_exitcode(self._wait(child))
        if status < 0:
            return signal.Signals(-status).name
        return {0: "done", 3: "raised"}.get(status, f"exited with {status}")

    def leftover_processes(self) -> list[str]:
        """Children of the dead that still run after the limit; they are killed then."""
        deadline = time.monotonic() + ORPHAN_LIMIT_S
        while True:
            _reap()
            children = psutil.Process().children(recursive=True)
            alive = [child for child in children if child.pid != self._generator_pid]
            if not alive:
                return []
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return [f"process {process.pid} outlived its parent by {ORPHAN_LIMIT_S:.0f} s" for process in alive]

    def note(self, **entry: Any) -> None:
        """Remember what a client saw, whatever happens to this process next."""
        descriptor = os.open(self.journal_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a") as stream:
            stream.write(json.dumps(entry) + "\n")

    def journal(self) -> list[dict[str, Any]]:
        return _rows(self.journal_path)

    def forget_journal(self) -> None:
        """What was asked for in preparation is not what the scenario is judged by."""
        self.journal_path.unlink(missing_ok=True)

    def release(self) -> None:
        """From now on the generator answers what begins with `hold`, too."""
        self._released_path.touch()

    def asked(self) -> list[dict[str, Any]]:
        """What the generator was asked: `text`, and when that was submitted, in seconds since 1970."""
        return _rows(self._asked_path)

    def remember_results(self) -> None:
        """Note which results of batches are recorded by now. Only while nobody runs one."""
        from tests.failpoints import batch_promises  # here: it needs this module

        with reading() as session:
            rows = batch_promises.see(self, session)
        with self._seen_path.open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)

    def results_seen(self) -> list[tuple[str, str, str, float]]:
        """(batch, the recorded line, its request's text, seconds since 1970) of all that were remembered."""
        return [(row["batch"], row["body"], row["text"], row["at"]) for row in _rows(self._seen_path)]

    def debts(self) -> list[str]:
        """What a power cut could have taken back although somebody relied on it."""
        return self.debts_path.read_text().splitlines() if self.debts_path.exists() else []

    # Things a scenario starts with, made by the product's own verbs.

    def add_file(self, content: bytes, status: FileStatus = FileStatus.PROCESSED) -> str:
        return stored_file(self.settings, content, status=status)

    def submit(self, file_id: str, validation_file: str | None = None, **training: Any) -> str:
        body = {"model": BASE, "training_file": file_id, "validation_file": validation_file, "training": training}
        with transaction() as session:
            return job_creation.submit(session, "default", JobCreate.model_validate(body)).id

    def add_job(self, plan: dict[str, Any], **training: Any) -> str:
        return self.submit(self.add_file(toy.rows(**plan)), **training)

    def _arm(self, fault: Fault | None, trace: Path | None) -> None:
        points = Points("service", self.folder / "data", self.board, fault, trace)
        ledger = Ledger(self.folder / "data", self._owe, self._named_paths())
        hooks.install(points, ledger)
        toy.be_the_trainer_of_this_process(lambda: points.become("trainer"))

    def _owe(self, sentence: str) -> None:
        descriptor = os.open(self.debts_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "a") as stream:
            stream.write(sentence + "\n")

    def _named_paths(self) -> Callable[[], set[str]]:
        """Where the bytes of every file, part and checkpoint row are. Asked over a connection of its own."""
        from shared.models import Checkpoint, File, UploadPart  # here: the hooks must not see an engine made earlier

        engine = db.make_engine(self.settings.resolved_database_url)
        root = self.settings.data / "storage"

        def named() -> set[str]:
            with engine.connect().execution_options(reading=True) as connection:
                ids = [*connection.execute(db.select(File.id)).scalars()]
                ids += connection.execute(db.select(UploadPart.id)).scalars()
                locations = connection.execute(db.select(Checkpoint.location)).scalars().all()
            return {str(root / "files" / file_id) for file_id in ids} | {str(root / place) for place in locations}

        return named

    def _wait(self, child: int) -> int:
        deadline = time.monotonic() + CHILD_LIMIT_S
        pause_s = 0.001
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return status
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise Hung(f"a process did not end within {CHILD_LIMIT_S:.0f} s")
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.02)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _with_own_connections(work: Callable[[], Any]) -> Any:
    db.reset()
    lifecycle.shutdown = lifecycle.Shutdown()
    supervisor.TICK_S = 0.02
    batches.TICK_S = batches.FIRST_RETRY_S = batches.DATABASE_RETRY_S = 0.02
    return work()


class _last_words:
    """Around everything a child does: its log goes to a file, and it never returns into the harness."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        logging.basicConfig(level="INFO", force=True)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        traceback.print_exception(error)
        os._exit(1)


def _make_base_model(folder: Path) -> None:
    """All that a base model must have to be accepted; the toy reads none of it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


def _adopt_orphans() -> None:
    """Processes whose parent died become children of this one, so that they can be seen."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
