"""The trainer's voice: protocol messages on a descriptor that no library can print to.

Must be opened before anything is imported that prints. Knows nothing of training.
"""

import os
import select
import sys
import threading

from shared.trainer_protocol import PROTOCOL_FD, Event, Message


class Reporter:
    """Writes one message a line, whole lines only, from any thread or signal handler."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.RLock()

    def send(self, message: Message) -> None:
        """Write the message.

        Raises:
            BrokenPipeError: nobody listens any more.
        """
        line = message.model_dump_json().encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._descriptor, line) :]

    def send_unless_busy(self, message: Message) -> None:
        """Write a message of less than PIPE_BUF bytes, or drop it where that would have to wait.

        For whoever must never wait for a reader: another thread may be writing, or the pipe be full.

        Raises:
            BrokenPipeError: nobody listens any more.
        """
        if not self._lock.acquire(blocking=False):
            return
        try:
            _, writable, _ = select.select([], [self._descriptor], [], 0)
            if writable:  # a pipe with room for PIPE_BUF bytes, and nobody else writes while the lock is held
                os.write(self._descriptor, message.model_dump_json().encode() + b"\n")
        finally:
            self._lock.release()

    def warn(self, text: str, **data: object) -> None:
        self.send(Event(level="warn", message=text, data=data or None))

    def info(self, text: str, **data: object) -> None:
        self.send(Event(level="info", message=text, data=data or None))


def open_reporter() -> Reporter:
    """Take the protocol's descriptor for ourselves and leave standard error to everybody who prints.

    Without `ANNEAL_PROTOCOL_FD` that is standard output: it is duplicated first, then descriptor 1 is pointed at
    standard error, because Unsloth prints banners and C libraries write to descriptor 1 directly.
    """
    named = os.environ.get(PROTOCOL_FD)
    descriptor = os.dup(1) if named is None else int(named)
    os.set_inheritable(descriptor, False)
    sys.stdout.flush()
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return Reporter(descriptor)
