"""The trainer as a child process: started fresh or ahead (`worker.standby`), heard through two pipes, stopped for sure.

    stdin     the spec on one line (a secret never stands in an argument or the environment), then a newline every
              second: the leash (`worker.training.leash`)
    pipe      protocol lines, `shared.trainer_protocol`
    stdout,   what libraries print, kept in a capped log file; the last lines explain a death
    stderr

The child leads a session of its own, so that everything it starts is stopped with it.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from shared.trainer_protocol import PROTOCOL_FD
from shared.training_spec import TrainerSpec
from worker.host_lock import HostLock
from worker.training.environment import SUPERVISED_BY, cache_environment, trainer_environment
from worker.training.leash import ALIVE_EVERY_S

MAX_LOG_BYTES = 10 * 2**20
MAX_LINE_BYTES = 2**20
TRAINER = (sys.executable, "-m", "worker.training")
KILL_LIMIT_S = 30.0
LAST_LINES = 25
READ_BYTES = 2**16


class TrainerSurvives(Exception):
    """A trainer can't be killed. Nobody may be given its GPU until its process group is gone."""

    def __init__(self, message: str, group: int) -> None:
        super().__init__(message)
        self.group = group


def environment_for(cache_dir: str | None) -> dict[str, str]:
    """What a trainer started now is born with, but for the numbers of its descriptors."""
    return {**cache_environment(cache_dir), **trainer_environment(os.environ)}


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):  # gone, or the number is a stranger's by now
        return False
    return True


class TrainerProcess:
    """One trainer. Start it from the main thread: it dies with the thread that started it.

    Args:
        lock: the job's, held; the trainer takes it over.
        claim_lost: once set, the trainer gets no further sign of life and ends itself, whatever we are busy with.
    """

    def __init__(
        self,
        spec: TrainerSpec,
        log_path: Path,
        lock: HostLock,
        claim_lost: threading.Event,
        command: tuple[str, ...] | None = None,
    ) -> None:
        # First: nothing may fail once the child runs.
        self._log_file: BinaryIO | None = log_path.open("ab", buffering=0)
        try:
            self._spawn(command or TRAINER, spec.work_dir, (lock.descriptor,), spec.cache_dir)
            try:
                lock.give_to(self.pid)
            except BaseException:
                self._process.kill()
                self._process.wait()
                self._close_pipes()
                raise
        except BaseException:
            self._log_file.close()
            raise
        self._leash = Leash(self._process, lambda: spec.model_dump_json().encode(), claim_lost)

    def _spawn(
        self, command: tuple[str, ...], folder: str, descriptors: tuple[int, ...], cache_dir: str | None, **more: str
    ) -> None:
        """Start the child in `folder`, with its pipes and `descriptors`. Nothing is left over if that fails."""
        protocol_reader, protocol_writer = os.pipe()
        log_reader, log_writer = os.pipe()
        environment = {**environment_for(cache_dir), **more}
        environment[PROTOCOL_FD] = str(protocol_writer)
        environment[SUPERVISED_BY] = str(os.getpid())
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log_writer,
                stderr=log_writer,
                pass_fds=(protocol_writer, *descriptors),
                env=environment,
                cwd=folder,
                start_new_session=True,
            )
        except BaseException:
            os.close(protocol_reader)
            os.close(log_reader)
            raise
        finally:
            os.close(protocol_writer)
            os.close(log_writer)
        for descriptor in (protocol_reader, log_reader):
            os.set_blocking(descriptor, False)
        self.heard_at = time.monotonic()
        """When it last said anything on the protocol's pipe."""
        self._protocol = protocol_reader
        self._log = log_reader
        self._log_bytes = 0
        self._partial = b""
        self._partial_log = b""
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._selector = selectors.DefaultSelector()
        self._selector.register(protocol_reader, selectors.EVENT_READ)
        self._selector.register(log_reader, selectors.EVENT_READ)

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self, descriptor: int) -> None:
        """Have `read_lines` return early when `descriptor` becomes readable."""
        self._selector.register(descriptor, selectors.EVENT_READ)

    def unwatch(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)

    def read_lines(self, timeout_s: float) -> list[bytes]:
        """Whole protocol lines that have come, after waiting `timeout_s` at most for anything to happen."""
        lines: list[bytes] = []
        for key, _ in self._selector.select(timeout_s):
            if key.fd == self._protocol:
                lines += self._read_protocol()
            elif key.fd == self._log:
                self._read_log()
        return lines

    def exit_status(self) -> int | None:
        """None while it runs; negative for a signal.

        Looks without reaping: as long as the dead leader is not reaped, its number, and so its group's, is nobody
        else's, and `kill` reaches the right processes.
        """
        if self._process.returncode is None:
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return None
            return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        return self._process.returncode

    def send(self, number: signal.Signals) -> None:
        """Signal the trainer itself (not what it started)."""
        if self.exit_status() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kill the whole group and wait until all of it is gone; nothing to do the second time.

        Raises:
            TrainerSurvives: something in it outlived SIGKILL, stuck in a driver: it may still hold the GPU.
        """
        if self._process.returncode is not None:
            return
        group = self._process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        deadline = time.monotonic() + KILL_LIMIT_S
        try:
            self._process.wait(timeout=KILL_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise TrainerSurvives(f"trainer {group} outlived SIGKILL for {KILL_LIMIT_S:.0f} s", group) from error
        while _group_lives(group):
            if time.monotonic() > deadline:
                raise TrainerSurvives(f"a child of trainer {group} outlived SIGKILL for {KILL_LIMIT_S:.0f} s", group)
            time.sleep(0.02)

    def drain(self) -> list[bytes]:
        """What is left in the pipes of a trainer that has exited."""
        lines: list[bytes] = []
        deadline = time.monotonic() + 5
        while self._selector_has_pipes() and time.monotonic() < deadline:
            lines += self.read_lines(0.1)
        return lines

    def last_output(self) -> str:
        """The last lines the trainer's libraries wrote."""
        tail = [self._partial_log.decode(errors="replace")] if self._partial_log else []
        return "\n".join([*self._last_lines, *tail])[-2000:]

    def close(self) -> None:
        """Make sure it is dead, and close everything."""
        try:
            self.kill()
        finally:
            self._leash.stop()
            self._close_pipes()
            if self._log_file is not None:
                self._log_file.close()

    def _close_pipes(self) -> None:
        self._selector.close()
        for descriptor in (self._protocol, self._log):
            os.close(descriptor)

    def _selector_has_pipes(self) -> bool:
        watched = {key.fd for key in self._selector.get_map().values()}
        return bool(watched & {self._protocol, self._log})

    def _read_protocol(self) -> list[bytes]:
        chunk = os.read(self._protocol, READ_BYTES)
        if not chunk:
            self._selector.unregister(self._protocol)
            return []
        self.heard_at = time.monotonic()
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        if len(self._partial) > MAX_LINE_BYTES:
            self._partial = b""  # no message of ours; never let a broken child fill our memory
        return [line for line in lines if line.strip()]

    def _read_log(self) -> None:
        chunk = os.read(self._log, READ_BYTES)
        if not chunk:
            self._selector.unregister(self._log)
            return
        if self._log_file is not None and self._log_bytes < MAX_LOG_BYTES:
            with contextlib.suppress(OSError):  # a disk too full for a log is no reason to end a run
                self._log_file.write(chunk)
            self._log_bytes += len(chunk)
        *lines, self._partial_log = (self._partial_log + chunk).split(b"\n")
        self._partial_log = self._partial_log[-MAX_LINE_BYTES:]
        self._last_lines.extend(line.decode(errors="replace")[:500] for line in lines if line.strip())


class Leash:
    """Our end: the first line, then a sign of life every second from a thread of its own, however long the database
    hangs.

    Args:
        first_line: makes what the child is told first; may take its time, for it is called in that thread.
    """

    def __init__(
        self, process: "subprocess.Popen[bytes]", first_line: Callable[[], bytes], claim_lost: threading.Event
    ) -> None:
        self._process = process
        self._claim_lost = claim_lost
        self._first_line = first_line
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"leash-{process.pid}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def ends_with(self, claim_lost: threading.Event) -> None:
        """From now on it is this claim's."""
        self._claim_lost = claim_lost

    def _run(self) -> None:
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(self._first_line() + b"\n")
            stream.flush()
            # Nobody reads before the trainer's imports; a second's newline fits the pipe for 18 hours.
            while not self._stopped.wait(ALIVE_EVERY_S) and not self._claim_lost.is_set():
                stream.write(b"\n")
                stream.flush()
        except OSError:
            return  # it died; its log will say why
        finally:
            with contextlib.suppress(OSError):
                stream.close()
