"""`python -m worker.training < spec.json`: train one model, tell it on the protocol's pipe, exit.

Exit status 0: done or stopped as ordered. 1: failed, and the last message says why.
"""

import ctypes
import os
import signal
import sys

from pydantic import ValidationError

from shared.trainer_protocol import Failed
from shared.training_spec import TrainerSpec
from worker.training.environment import trainer_environment
from worker.training.loop import Run
from worker.training.reporter import open_reporter
from worker.training.stopping import StopRequests

SUPERVISED_BY = "ANNEAL_SUPERVISED_BY"
_PR_SET_PDEATHSIG = 1


def main() -> int:
    die_with_parent()
    wanted = trainer_environment(os.environ)
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)  # noqa: S606 - ourselves again
    reporter = open_reporter()
    stops = StopRequests(reporter)
    stops.install()
    try:
        spec = TrainerSpec.model_validate_json(sys.stdin.buffer.read())
    except ValidationError as error:
        reporter.send(Failed(code="trainer_error", message=f"the spec on standard input is not valid: {error}"))
        return 1
    return Run(spec, reporter, stops).attempt()


def die_with_parent() -> None:
    """Never outlive whoever started us: a trainer without a supervisor holds a GPU and its checkpoints are orphans.

    The parent may have died before the first line ran, hence the look at who it is now.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    supervisor = os.environ.get(SUPERVISED_BY)
    if supervisor is not None and os.getppid() != int(supervisor):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
