"""One contender in a process of its own: started, listened to, stopped at its time limit.

What it says, JSON lines on its standard output, is kept with the time each line came; its memory is looked at from
outside, by the same rule for everyone. Needs Python and nothing else.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "PYTHONUNBUFFERED": "1",
}
LOOK_EVERY_S = 0.2
TOLD_OF_A_FAILURE = 1500


@dataclass
class Said:
    """What a process said until it ended, and how that was."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    """Each with `at_s`, when it came: seconds since the launch, or since the spec was handed to a waiting process."""
    status: int | str = "unknown"
    wall_s: float = 0.0
    resident_peak_bytes: int = 0
    card_peak_bytes: int = 0
    """Used on the whole of its GPU (the first of several), whoever by. 0 without one, or if its driver won't say."""
    stderr: str = ""

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message.get("type") in kinds]

    @property
    def failure(self) -> str | None:
        """Why it came to nothing; None if it didn't."""
        if self.status == 0:
            return None
        told = self.of("error")
        if self.status == "timeout":
            return f"stopped at its time limit, after {self.wall_s:.0f} s"
        return str(told[0]["message"]) if told else f"{self.status}: {self.stderr[-TOLD_OF_A_FAILURE:]}"


def run(
    command: list[str],
    *,
    caches: Path,
    timeout_s: float,
    spec: dict[str, Any] | None = None,
    standby: dict[str, Any] | None = None,
    on_gpu: bool,
    gpus: int = 1,
) -> Said:
    """Run to the end or the time limit.

    Args:
        caches: compile caches and scratch of every kind go here; emptied by whoever wants a cold start.
        spec: goes to standard input as one line.
        standby: started ahead with this order (`worker.training.standby.StandbySpec`); when it is ready it gets the
            spec, and the clock starts.
    """
    caches.mkdir(parents=True, exist_ok=True)
    said = Said()
    with tempfile.TemporaryFile() as stderr:
        launched_s = began_s = time.monotonic()
        ours, theirs = socket.socketpair()
        variables = environment(caches, on_gpu, gpus)
        if standby is not None:
            (Path(standby["folder"]) / READY).unlink(missing_ok=True)  # an earlier run's
            variables[STANDBY_FD] = str(theirs.fileno())
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=caches,
            env=variables,
            pass_fds=() if standby is None else (theirs.fileno(),),
            start_new_session=True,
        )
        late, ended = threading.Event(), threading.Event()
        timer = threading.Timer(timeout_s, lambda: (late.set(), _kill(child)))
        card = Card(variables["CUDA_VISIBLE_DEVICES"]) if on_gpu else None
        watcher = threading.Thread(target=_look, args=(child.pid, said, ended, card), daemon=True)
        timer.start()
        watcher.start()
        try:
            if standby is None:
                _hand_over(child, spec)
            else:
                began_s = _hand_over_when_ready(child, ours, standby, spec)
            assert child.stdout is not None
            for line in child.stdout:
                message = _parse(line)
                if message is None:
                    continue
                said.messages.append({**message, "at_s": time.monotonic() - began_s})
            said.status = child.wait()
        finally:
            timer.cancel()
            ended.set()
            _kill(child)
            child.wait()
            watcher.join()
        if late.is_set():
            said.status = "timeout"
        said.wall_s = time.monotonic() - launched_s
        stderr.seek(0)
        said.stderr = stderr.read().decode(errors="replace")
    return said


def environment(caches: Path, on_gpu: bool, gpus: int = 1) -> dict[str, str]:
    """Ours, with what is on the Python path still found from another folder, and every cache in one place."""
    in_sight = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(str(number) for number in range(gpus))).split(",")
    named = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    path = [str(ROOT), *(str(Path(part).resolve()) for part in named)]
    return {
        **os.environ,
        **OFFLINE,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        # Of several GPUs the Trainer would use all.
        "CUDA_VISIBLE_DEVICES": ",".join(in_sight[:gpus]) if on_gpu else "",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "HF_DATASETS_CACHE": str(caches / "datasets"),
        "UNSLOTH_COMPILE_LOCATION": str(caches / "unsloth_compiled_cache"),
    }


STANDBY_FD, READY = "ANNEAL_STANDBY_FD", "ready"
"""As in `worker.training.standby`, which can't be imported without pydantic."""


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU, without importing torch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(Path("/dev").glob("nvidia[0-9]*"))


def trainer_command(*options: str) -> list[str]:
    return [sys.executable, "-m", "worker.training", *options]


def _hand_over(child: "subprocess.Popen[bytes]", spec: dict[str, Any] | None) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        if spec is not None:
            child.stdin.write(json.dumps(spec).encode() + b"\n")
        child.stdin.close()


def _hand_over_when_ready(
    child: "subprocess.Popen[bytes]", connection: socket.socket, order: dict[str, Any], spec: dict[str, Any] | None
) -> float:
    """When the job was handed over."""
    assert child.stdin is not None
    child.stdin.write(json.dumps(order).encode() + b"\n")
    child.stdin.flush()  # and stays open: its end would be the trainer's
    while not (Path(order["folder"]) / READY).exists():
        if child.poll() is not None:
            return time.monotonic()
        time.sleep(0.02)
    began_s = time.monotonic()
    with tempfile.TemporaryFile() as lock:
        socket.send_fds(connection, [json.dumps(spec).encode() + b"\n"], [lock.fileno()])
    return began_s


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and "type" in message else None


class Card:
    """A GPU as its driver sees it from outside. Asked directly: no lock of ours has a package for it.

    Args:
        in_sight: `CUDA_VISIBLE_DEVICES`; the first one is looked at.
    """

    def __init__(self, in_sight: str) -> None:
        self._handle = ctypes.c_void_p()
        self._driver: Any = None
        name = in_sight.split(",")[0].strip()
        with contextlib.suppress(OSError, AttributeError):
            driver = ctypes.CDLL("libnvidia-ml.so.1")
            handle = ctypes.byref(self._handle)
            if driver.nvmlInit_v2():
                return
            if name.isdigit():
                failed = driver.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), handle)
            else:
                failed = driver.nvmlDeviceGetHandleByUUID(name.encode(), handle)
            self._driver = None if failed else driver

    def used_bytes(self) -> int:
        """0 if the driver won't say."""
        total_free_used = (ctypes.c_ulonglong * 3)()
        if self._driver is None or self._driver.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(total_free_used)):
            return 0
        return total_free_used[2]


def _look(pid: int, said: Said, ended: threading.Event, card: Card | None) -> None:
    """The peak of the resident set, which the kernel keeps itself, as long as it can be read; and the card's."""
    while not ended.wait(LOOK_EVERY_S):
        if card is not None:
            said.card_peak_bytes = max(said.card_peak_bytes, card.used_bytes())
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
            peak = int(status.split("VmHWM:", 1)[1].split()[0]) * 1024
            said.resident_peak_bytes = max(said.resident_peak_bytes, peak)


def _kill(child: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
