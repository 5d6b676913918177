"""A trainer's surroundings: environment, descriptor, signals, estimates, words for failures. No torch."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.trainer_protocol import Event, Stopped, parse
from shared.training_spec import Resolved
from worker.training.environment import trainer_environment
from worker.training.failures import Diverged, describe
from worker.training.progress import Progress, times_due

LIGHT_MODULES = (
    "checkpoint",
    "data",
    "environment",
    "failures",
    "loop",
    "progress",
    "reporter",
    "resolve",
    "stopping",
    "templates",
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
    assert (done.returncode, done.stdout) == (1, b"")


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


def make_resolved(micro: int = 1, checkpointing: str | bool = False) -> Resolved:
    return Resolved(
        method="full",
        max_steps=60,
        n_epochs=1,
        learning_rate=2e-4,
        learning_rate_multiplier=1,
        batch_size=8,
        micro_batch_size=micro,
        gradient_accumulation_steps=8 // micro,
        max_seq_length=2048,
        precision="bf16",
        master_weights="fp32",
        optimizer="adamw",
        gradient_checkpointing=checkpointing,
        chat_template="chatml",
        packing="none",
        eval_steps=None,
        save_steps=20,
    )


@pytest.mark.parametrize(
    ("micro", "checkpointing", "param", "advice"),
    [
        (4, False, "training.micro_batch_size", "micro_batch_size to 1"),
        (1, False, "training.gradient_checkpointing", "gradient_checkpointing to true"),
        (1, "unsloth", "training.max_seq_length", "max_seq_length to 1024"),
    ],
)
def test_out_of_memory_names_the_setting_that_would_fit(
    micro: int, checkpointing: str | bool, param: str, advice: str
) -> None:
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    failed = describe(error, make_resolved(micro, checkpointing))
    assert (failed.code, failed.param) == ("out_of_memory", param)
    assert advice in failed.message
    assert describe(MemoryError(), None).code == "out_of_memory"


def test_other_errors_are_told_by_their_type() -> None:
    failed = describe(KeyError("weight"), None)
    assert (failed.code, failed.message) == ("trainer_error", "KeyError: 'weight'")
    assert describe(Diverged("at step 3"), None).code == "diverged"
