"""`worker train` as `anneal worker train` starts it, except that its trainers are toys.

    python -m tests.campaign.worker LOG_LEVEL

The one change is made here, in the process, so that the product needs no switch for it. Celery forks its pool child
from this process, and the child inherits the change.
"""

import functools
import os
import sys

from celery.__main__ import main as celery

from cli import commands
from tests.campaign import toy_trainer
from worker import supervisor


def main(log_level: str) -> None:
    os.environ["ANNEAL_STANDBY_TRAINER"] = "false"  # it would be a real one, for nobody
    supervisor.supervise = functools.partial(supervisor.supervise, trainer_command=toy_trainer.COMMAND)
    command = commands.worker("train", log_level)
    sys.argv = command[command.index("celery") :]
    celery()


if __name__ == "__main__":
    main(sys.argv[1])
