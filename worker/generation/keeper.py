"""Runs one command and sees to it that nothing of it outlives whoever holds the other end of our standard input.

    python -m worker.generation.keeper folder command …

A server such as vLLM's starts processes of its own, and its killed parent can't end those. So this one leads the
session that all of them are in, waits for its input to end (as it does when the holder dies, however it dies), or for
the command to, and then ends the session's whole group, itself included. The folder, which is the command's for
temporary files, goes before. Standard library only.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import time

GRACE_S = 5.0
"""How long the command may take to end in order."""
TIDY_S = 0.5
"""How long what outlives it may take: Python's own process that removes shared memory nobody has any more."""


def main(folder: str, *command: str) -> None:
    """Never returns."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # it is for the others of the group
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    exited = os.pidfd_open(process.pid)
    while True:
        readable, _, _ = select.select([0, exited], [], [])
        if exited in readable or not os.read(0, 4096):
            os.killpg(0, signal.SIGTERM)
            select.select([exited], [], [], GRACE_S)
            time.sleep(TIDY_S)
            shutil.rmtree(folder, ignore_errors=True)
            os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
