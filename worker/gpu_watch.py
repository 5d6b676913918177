"""Whether this worker still has the GPUs that it began with.

A container can lose them while it runs (its rules for devices are written anew, a card falls off the bus), and PyTorch
then trains on the CPU without a word. Such a worker claims nothing: another one may have GPUs.
"""

import os

from worker.training.environment import VISIBLE, count_gpus, gpus_of

_began_with = 0


def begin() -> None:
    """Note what is there. Before the fork, so that a pool child born later knows it, too."""
    global _began_with
    _began_with = _in_sight()


def missing() -> int:
    """How many are gone."""
    return max(0, _began_with - _in_sight())


def _in_sight() -> int:
    return len(gpus_of(os.environ.get(VISIBLE), count_gpus()))
