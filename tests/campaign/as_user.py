"""Become another user, die with the parent, run a command: `python -I -S as_user.py PARENT_PID USER COMMAND ARGUMENT…`

PostgreSQL refuses to run as root. The interpreter may be in a folder of root's that the other user can't read, so the
change comes after it has started; and the kernel forgets the wish to die with the parent when the user changes, so
that comes after the change.
"""

import ctypes
import os
import pwd
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent_pid: int, name: str, command: list[str]) -> None:
    user = pwd.getpwnam(name)
    os.setgroups([])
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    os.chdir("/")
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit("its parent is gone")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
