"""What this machine can compute with, for the operator to read. Asks nvidia-smi; never imports torch."""

import os
import platform
import shutil
import subprocess


def describe() -> list[str]:
    """One line per GPU, or one line about the CPU."""
    gpus = _nvidia()
    return gpus or [f"no GPU found, training on the CPU: {platform.machine()}, {_usable_cores()} cores"]


def _nvidia() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=index,name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi is there but failed ({type(error).__name__}): GPUs are unknown"]
    return [f"GPU {line.strip()}" for line in answer.stdout.splitlines() if line.strip()]


def _usable_cores() -> int:
    """Those this process may run on: a container or taskset can leave fewer than the machine has."""
    return len(os.sched_getaffinity(0))
