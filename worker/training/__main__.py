"""`python -m worker.training < spec.json`: train one model, tell it on the protocol's pipe, exit.

The spec is one line of JSON. Exit status 0: done or stopped as ordered. 1: failed, and the last message says why.
Under torchrun, standard input and the pipe are rank 0's.
"""

import ctypes
import os
import sys

from pydantic import ValidationError

from shared.trainer_protocol import Failed
from shared.training_spec import TrainerSpec
from worker.lifecycle import die_with_parent
from worker.training import cpus
from worker.training.environment import SUPERVISED_BY, trainer_environment
from worker.training.leash import Leash, read_spec
from worker.training.loop import Run, prepare_work_dir
from worker.training.ranks import open_peer_reporter, take_place
from worker.training.reporter import open_reporter
from worker.training.standby import STANDBY_FD, wait_for_job
from worker.training.stopping import StopRequests


def main() -> int:
    # A trainer without a supervisor holds a GPU and its checkpoints are orphans. By hand, the shell is the parent.
    die_with_parent(int(os.environ.get(SUPERVISED_BY, os.getppid())))
    wanted = trainer_environment(os.environ)
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)  # noqa: S606 - ourselves again
    # The supervisor tells Weights & Biases what is to be told. Found, trl imports it: a second for nothing.
    sys.modules["wandb"] = None  # type: ignore[assignment]
    place = take_place()
    cpus.stay_near_gpu()
    is_peer = place is not None and place.rank > 0
    reporter = open_peer_reporter() if is_peer else open_reporter()
    stops = StopRequests(reporter)
    (stops.follow if is_peer else stops.install)()
    warm = None
    try:
        if place is not None and is_peer:
            spec = place.told_spec()
        elif STANDBY_FD in os.environ:
            spec, warm = wait_for_job(reporter, prepare_work_dir)
        else:
            spec = TrainerSpec.model_validate_json(read_spec())
    except ValidationError as error:
        what = f"the spec, the first line of standard input, is not valid: {error}"
        reporter.send(Failed(code="trainer_error", message=what))
        return 1
    if spec.leash_s is not None and warm is None:
        Leash(reporter, spec.leash_s).start()  # before the imports, which take long enough to lose a supervisor
    run = Run(spec, reporter, stops, warm, place)
    status = run.attempt()
    if run.place is not None:
        run.peers.close()
    return status


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)  # what C libraries printed into a pipe
    # Everything is saved and said. An orderly exit would take libraries apart for a second, which the job's client
    # waits for, and wait for connections to ranks that are gone.
    os._exit(status)
