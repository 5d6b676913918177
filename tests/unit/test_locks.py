"""The lock files: exact, complete, the same on CPU and GPU but for torch."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "locks" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cpu.lock", "gpu.lock", "dev.lock"])
def test_every_line_is_one_exact_version(name: str) -> None:
    lines = (ROOT / "locks" / name).read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == sorted(pins, key=lambda pin: pin.partition("==")[0])
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin)] == []


def test_the_locks_meet_the_needs_of_the_project_and_of_every_package(lock: ModuleType) -> None:
    assert lock.check() == []


def test_a_missing_package_is_noticed(lock: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = lock.read_lock("cpu.lock")
    monkeypatch.setattr(lock, "read_lock", lambda name: {k: v for k, v in pins.items() if k != "kombu"})
    assert any("needs kombu" in problem for problem in lock.check())


def test_the_gpu_lock_differs_only_where_it_says(lock: ModuleType) -> None:
    cpu, gpu = lock.read_lock("cpu.lock"), lock.read_lock("gpu.lock")
    assert gpu == cpu | lock.GPU_PINS


def test_unsloth_and_trl_import_from_the_locked_versions() -> None:
    """In a process of its own: the import changes libraries for good."""
    program = "import unsloth, trl, transformers; print(unsloth.__version__, trl.__version__, transformers.__version__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].split()[1:] == ["1.15.0", "5.17.0"]
