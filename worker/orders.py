"""What the trainer of a run is told while it runs: save and stop, or stop at once. And how long it may take to obey.

    cancel           SIGUSR1, then `trainer_stop_s`
    deploy, pause    SIGTERM, then `deploy_stop_s`; a cancel that comes later still counts

A trainer that was told to stop has stopped for good: a pause withdrawn after the signal sends the job to the queue.
"""

import signal
import time

from shared.settings import Settings
from worker import lifecycle
from worker.lease import LeaseKeeper
from worker.trainer_process import TrainerProcess


class Orders:
    """Of one attempt. `pass_on` is called between reads of the trainer's pipe."""

    def __init__(self, trainer: TrainerProcess, lease: LeaseKeeper, settings: Settings) -> None:
        self._trainer = trainer
        self._lease = lease
        self._settings = settings
        self._cancelled = self.given = False
        self._deadline = float("inf")
        trainer.watch(lifecycle.shutdown.fileno())
        self._watching = True

    def pass_on(self) -> None:
        """Tell the trainer what was asked for since the last time."""
        if self._watching and lifecycle.shutdown.is_set():
            self.close()  # it stays readable; do not spin on it
            self._interrupt()
        if self._lease.pause_requested.is_set():
            self._interrupt()
        if self._lease.cancel_requested.is_set() and not self._cancelled:
            self._cancelled = True
            self._give(signal.SIGUSR1, self._settings.trainer_stop_s)

    @property
    def overdue(self) -> bool:
        """Whether the trainer has had its time to obey."""
        return time.monotonic() > self._deadline

    def close(self) -> None:
        """Stop listening for a shutdown of the worker."""
        if self._watching:
            self._trainer.unwatch(lifecycle.shutdown.fileno())
            self._watching = False

    def _interrupt(self) -> None:
        if not self.given:
            self._give(signal.SIGTERM, self._settings.deploy_stop_s)

    def _give(self, order: signal.Signals, obeyed_within_s: float) -> None:
        self.given = True
        self._trainer.send(order)
        self._deadline = min(self._deadline, time.monotonic() + obeyed_within_s)
