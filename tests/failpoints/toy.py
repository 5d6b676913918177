"""The trainer of every scenario: the campaign's toy, forked from the supervisor instead of started from nothing.

A fork saves the interpreter's start at each of some thousand runs, and lets the trainer's own effects be points of the
same plan. All else is as in production: its own session, its parent-death signal, its pipes, its lock.
"""

# ruff: noqa: PTH208

import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

from tests.campaign import toy_trainer
from worker import supervisor

_Popen = subprocess.Popen
_supervise = supervisor.supervise


def rows(**plan: Any) -> bytes:
    """The training file that makes the toy do as told; to the service it is a file like any other."""
    first = {"prompt": "plan", "completion": json.dumps({"steps": 4, "save_steps": 1, "step_s": 0.005, **plan})}
    return "".join(json.dumps(row) + "\n" for row in (first, {"prompt": "a", "completion": "b"})).encode()


def be_the_trainer_of_this_process(on_birth: Callable[[], None] = lambda: None) -> None:
    """From now on, supervisors in this process get their trainers by a fork.

    Args:
        on_birth: called in the trainer before it does anything.
    """

    class Forked(_Popen):  # type: ignore[type-arg]
        def __init__(self, args: Any, **kwargs: Any) -> None:
            if tuple(args) != toy_trainer.COMMAND:
                super().__init__(args, **kwargs)
                return
            kept = {0, 1, 2, *kwargs["pass_fds"]}
            environment = kwargs["env"]

            def live() -> None:  # called where exec would follow, which never comes
                _live(kept, environment, on_birth)

            super().__init__(args, preexec_fn=live, **kwargs)

    subprocess.Popen = Forked  # type: ignore[misc]
    supervisor.supervise = functools.partial(_supervise, trainer_command=toy_trainer.COMMAND)


def _live(kept: set[int], environment: dict[str, str], on_birth: Callable[[], None]) -> None:
    status = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in kept:
                try:
                    os.close(int(name))
                except OSError:
                    continue
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        on_birth()
        status = toy_trainer.main()
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                continue
        os._exit(status)
