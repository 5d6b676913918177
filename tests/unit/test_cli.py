"""The `anneal` command: quick to answer, clear when it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli import commands


def anneal(*arguments: str, prelude: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after `prelude`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANNEAL_")}
    program = f"import sys; {prelude}\nfrom cli.main import app; sys.argv = ['anneal', *{arguments!r}]; app()"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment | settings)


def test_the_command_loads_nothing_heavy_to_show_its_help() -> None:
    program = (
        "import sys, cli.main; "
        "print([name for name in ('torch', 'fastapi', 'sqlalchemy', 'celery', 'openai') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_the_api_refuses_an_open_address_without_a_key(tmp_path: Path) -> None:
    done = anneal("api", "--host", "0.0.0.0", "--port", "0", "--data", str(tmp_path))
    assert done.returncode == 1
    assert "ANNEAL_HOST=0.0.0.0 can be reached from other machines, and ANNEAL_API_KEY is not set" in done.stderr


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    done = anneal("migrate", "--data", str(tmp_path), ANNEAL_PORT="eighty")
    assert done.returncode == 1
    assert "the settings are not valid" in done.stderr
    assert "eighty" in done.stderr


def test_a_list_that_is_no_json_is_named_by_its_variable(tmp_path: Path) -> None:
    done = anneal("up", "--data", str(tmp_path), ANNEAL_PINNED_MODELS="acme/tiny")
    assert done.returncode == 1
    assert "ANNEAL_PINNED_MODELS is not JSON" in done.stderr


@pytest.mark.parametrize("command", [("up",), ("worker", "generate")])
def test_an_engine_that_is_not_there_is_told_before_anything_starts(command: tuple[str, ...], tmp_path: Path) -> None:
    done = anneal(*command, "--data", str(tmp_path / "data"), ANNEAL_ENGINE="vllm")
    assert done.returncode == 1
    assert "make setup-vllm" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_folder_that_cannot_be_written_is_named() -> None:
    done = anneal("up", "--data", "/proc/anneal", "--port", "0")
    assert done.returncode == 1
    assert "/proc/anneal can't be written" in done.stderr


def test_the_demo_without_the_openai_package_says_what_is_missing() -> None:
    done = anneal("demo", prelude="sys.modules['openai'] = None")
    assert done.returncode == 1
    assert "openai package, which is not installed" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demos_own_options_are_shown_by_its_help() -> None:
    assert "--keep" in anneal("demo", "--help").stdout


@pytest.mark.parametrize("kind", ["train", "batch"])
def test_a_celery_worker_takes_one_queue_with_one_slot(kind: str) -> None:
    command = " ".join(commands.celery_worker(kind, "info"))
    assert f"--queues {kind} --hostname {kind}@%h --concurrency 1 --pool prefork" in command
