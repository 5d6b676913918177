"""A trainer's surroundings: environment, descriptor, signals, estimates, words for failures. No torch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.trainer_protocol import Event, Stopped, parse
from shared.training_spec import TrainingSpec
from tests.waiting import LIMIT_S
from worker.training import memory
from worker.training.environment import trainer_environment
from worker.training.failures import Diverged, describe
from worker.training.progress import Progress, times_due
from worker.training.reporter import Reporter
from worker.training.stopping import StopRequests

LIGHT_MODULES = (
    "checkpoint",
    "data",
    "environment",
    "failures",
    "ladder",
    "leash",
    "loop",
    "progress",
    "ranks",
    "reporter",
    "resolve",
    "standby",
    "stopping",
    "templates",
    "token_cache",
)


def test_modules_that_supervisors_use_import_neither_torch_nor_the_services_libraries() -> None:
    """Also what a GPU machine without the project's requirements needs."""
    imports = "; ".join(f"import worker.training.{name}" for name in LIGHT_MODULES)
    heavy = ["torch", "transformers", "unsloth", "sqlalchemy", "celery", "redis", "pydantic_settings"]
    code = f"import sys; {imports}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_environment_is_complete_at_once() -> None:
    once = trainer_environment({"PATH": "/bin", "MALLOC_TOP_PAD_": "1", "HF_HUB_OFFLINE": "0"})
    assert trainer_environment(once) == once
    assert once["PATH"] == "/bin"
    assert once["MALLOC_TOP_PAD_"] == "1", "what the operator tuned is kept"
    assert once["HF_HUB_OFFLINE"] == "1", "but a trainer has no network"


def test_a_trainer_knows_no_secrets() -> None:
    assert not {"ANNEAL_API_KEY", "HF_TOKEN"} & trainer_environment({"ANNEAL_API_KEY": "a", "HF_TOKEN": "b"}).keys()


def test_what_libraries_print_goes_to_standard_error() -> None:
    code = (
        "import os, sys; from worker.training.reporter import open_reporter\n"
        "reporter = open_reporter(); print('from python'); os.write(1, b'from C\\n'); reporter.info('hello', n=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert parse(done.stdout) == Event(message="hello", data={"n": 1})
    assert sorted(done.stderr.splitlines()) == [b"from C", b"from python"]


@pytest.mark.parametrize(("sent", "reason"), [(signal.SIGTERM, "interrupted"), (signal.SIGUSR1, "cancelled")])
def test_a_signal_before_the_first_step_ends_the_process_with_a_word(sent: signal.Signals, reason: str) -> None:
    code = (
        "import os, time\nfrom worker.training.reporter import Reporter\n"
        "from worker.training.stopping import StopRequests\n"
        f"StopRequests(Reporter(1)).install(); os.kill(os.getpid(), {int(sent)}); time.sleep(30)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=25, check=True)
    assert parse(done.stdout) == Stopped(reason=reason, step=0)


def test_a_trainer_whose_supervisor_is_gone_does_not_start() -> None:
    environment = {**trainer_environment(os.environ), "ANNEAL_SUPERVISED_BY": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-m", "worker.training"], env=environment, input=b"{}", capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


LEASHED = (
    "import sys, time; from worker.training.leash import Leash, read_spec\n"
    "from worker.training.reporter import Reporter\n"
    "print(read_spec().decode(), file=sys.stderr); Leash(Reporter(1), 4.0).start()\n"
)


def test_a_trainer_on_a_leash_says_that_it_lives_and_ends_when_its_supervisor_is_silent() -> None:
    code = LEASHED + "time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as trainer:
        assert trainer.stdin is not None and trainer.stdout is not None and trainer.stderr is not None
        trainer.stdin.write(b"the spec\n\n")
        trainer.stdin.flush()
        assert parse(trainer.stdout.readline()).type == "alive", "from here on its imports are over"
        for _ in range(10):
            trainer.stdin.write(b"\n")
            trainer.stdin.flush()
            time.sleep(0.5)
        assert trainer.poll() is None
        assert trainer.wait(LIMIT_S) == -signal.SIGKILL
        assert {parse(line).type for line in trainer.stdout} == {"alive"}
        said = trainer.stderr.read()
    assert said.startswith(b"the spec\n")
    assert b"its supervisor has been silent for" in said


def test_a_full_pipe_does_not_hold_up_the_leash() -> None:
    """The supervisor hangs: it neither reads nor gives a sign of life, and the training thread waits in a write."""
    code = (
        LEASHED.replace("Leash(Reporter(1)", "reporter = Reporter(1); Leash(reporter")
        + "\nwhile True: reporter.info('x' * 4000)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as trainer:
        assert trainer.stdin is not None
        trainer.stdin.write(b"the spec\n")
        trainer.stdin.flush()
        assert trainer.wait(LIMIT_S) == -signal.SIGKILL


def test_an_invalid_spec_is_told_on_the_protocol() -> None:
    done = subprocess.run([sys.executable, "-m", "worker.training"], input=b"{}", capture_output=True, timeout=60)
    [failed] = [parse(line) for line in done.stdout.splitlines()]
    assert (done.returncode, failed.type) == (1, "error")
    assert "job_id" in failed.message


def test_the_estimate_converges_and_counts_what_is_due_between_steps() -> None:
    progress = Progress(first_step=1, total_steps=10, started_s=100.0)
    progress.saves_due = times_due(5, 1, 10)
    progress.stepped(30)
    assert progress.remaining_s(1) == 9 * 30, "the first, slow step is all there is to go by"
    progress.stepped(20)
    for _ in range(3):
        progress.stepped(2)
    assert progress.remaining_s(5) == 5 * 2, "warm-up steps no longer count"
    progress.saved(7)
    assert progress.remaining_s(5) == 5 * 2 + 7
    progress.saved(7)
    assert progress.remaining_s(10) == 0
    assert progress.elapsed_s(142.0) == 42


@pytest.mark.parametrize(
    ("every", "first", "total", "times"),
    [(None, 1, 10, 0), (20, 1, 60, 3), (20, 21, 60, 2), (7, 1, 10, 2), (99, 1, 10, 1)],
)
def test_how_often_something_is_still_due(every: int | None, first: int, total: int, times: int) -> None:
    assert times_due(every, first, total) == times


def test_other_errors_are_told_by_their_type() -> None:
    failed = describe(KeyError("weight"), TrainingSpec(), None)
    assert (failed.code, failed.message) == ("trainer_error", "KeyError: 'weight'")
    assert describe(Diverged("at step 3"), TrainingSpec(), None).code == "diverged"


class DistBackendError(RuntimeError):
    """As torch names what NCCL says."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("CUDA error: unspecified launch failure"), "device_error"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "device_error"),
        (RuntimeError("CUDA error: out of memory"), "out_of_memory"),
        (DistBackendError("Watchdog caught collective operation timeout"), "device_error"),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), "device_error"),
        (ValueError("CUDA error: says a user's file"), "trainer_error"),
    ],
)
def test_what_a_gpu_did_is_not_held_against_the_job(error: Exception, code: str) -> None:
    assert describe(error, TrainingSpec(), None).code == code
    wrapped = RuntimeError("a compiler gave up")
    wrapped.__cause__ = error
    assert describe(wrapped, TrainingSpec(), None).code == code


def test_once_the_last_step_is_done_nothing_stops_what_is_left() -> None:
    """Or the final evaluation would be left out of a run that is never resumed."""
    told: list[int] = []
    stops = StopRequests(Reporter(2))
    stops.pass_on = told.append
    stops.install()
    try:
        stops.stepping(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stops.requested
        stops.finishing()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert not stops.requested
        assert told == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_files_that_a_container_has_read_are_no_memory_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    unlimited = memory.available_bytes()
    assert unlimited > 50 * 2**20
    for name, content in {"memory.max": f"{100 * 2**20}", "memory.current": f"{90 * 2**20}"}.items():
        (tmp_path / name).write_text(content)
    assert memory.available_bytes() == 10 * 2**20
    (tmp_path / "memory.stat").write_text(f"anon 12345\ninactive_file {30 * 2**20}\nslab_reclaimable {2 * 2**20}\n")
    assert memory.available_bytes() == 42 * 2**20
