"""The bond between a trainer and its supervisor, looked after by one thread on the trainer's side.

    supervisor ─ stdin: the spec, then a newline every second ─▶ trainer
    supervisor ◀─ pipe: `alive` every second ─────────────────── trainer

PR_SET_PDEATHSIG ends a trainer whose supervisor died; the leash ends one whose supervisor was stopped, hangs or has
lost the claim, before anybody else is given the job. The other way, `alive` shows the supervisor a trainer that was
stopped or holds the interpreter's lock for ever, while one that merely computes goes on saying it. Imports no torch.
"""

import os
import select
import signal
import sys
import threading
import time

from shared.trainer_protocol import Alive
from worker.training.reporter import Reporter

ALIVE_EVERY_S = 1.0
"""How often either side shows that it runs."""
READ_BYTES = 4096
MAX_SPEC_BYTES = 16 * 2**20


def read_spec(descriptor: int = 0) -> bytes:
    """The first line of standard input: the spec, without what follows it.

    Unbuffered, byte ranges of whole reads: what comes after the line are signs of life, thrown away.
    """
    content = b""
    while b"\n" not in content and len(content) < MAX_SPEC_BYTES:
        chunk = os.read(descriptor, READ_BYTES)
        if not chunk:
            break
        content += chunk
    return content.split(b"\n", 1)[0]


class Leash(threading.Thread):
    """Say `alive`, and end this process's whole group once the supervisor has been silent for `leash_s` or is gone."""

    def __init__(self, reporter: Reporter, leash_s: float, descriptor: int = 0) -> None:
        super().__init__(name="leash", daemon=True)
        self._reporter = reporter
        self._leash_s = leash_s
        self._descriptor = descriptor

    def run(self) -> None:
        heard_at = said_at = time.monotonic()
        while True:
            readable, _, _ = select.select([self._descriptor], [], [], ALIVE_EVERY_S / 2)
            now = time.monotonic()
            if readable:
                if not os.read(self._descriptor, READ_BYTES):
                    _end("its supervisor is gone")
                heard_at = now
            elif now - heard_at > self._leash_s and not select.select([self._descriptor], [], [], 0)[0]:
                _end(f"its supervisor has been silent for {now - heard_at:.1f} s")
            if now - said_at >= ALIVE_EVERY_S:
                said_at = now
                try:
                    self._reporter.send_unless_busy(Alive())  # a full pipe must not hold up the leash
                except OSError:
                    _end("nobody reads its messages")


def _end(why: str) -> None:
    # SIGKILL, and the group: an orderly exit could wait for the GPU, and children must not live on.
    if select.select([], [2], [], 0)[1]:  # a full log must not keep us alive
        os.write(2, f"trainer ends: {why}\n".encode())
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(1)
