"""The shim in front of every process `anneal up` starts: dies with its parent, then becomes the real command.

    python -I -S cli/child.py PARENT_PID COMMAND ARGUMENT…

Asking the kernel to kill us when the parent goes (PR_SET_PDEATHSIG) has to happen in the child, after the fork and
before anything else; the wish survives exec. Doing it here rather than in `preexec_fn` keeps Python code out of the
moment between fork and exec. The kernel watches the *thread* that forked, so the parent spawns from its main thread.

Runs without site-packages: it must start in milliseconds. Never returns.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent, command = int(arguments[0]), arguments[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"cannot tie {command[0]} to its parent: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died before the line above; nobody would ever stop this process
        sys.exit(f"{command[0]} was not started: its parent {parent} is gone")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent keeps signals blocked and waits for them instead
    try:
        os.execvp(command[0], command)  # noqa: S606 - an argument list, no shell
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
