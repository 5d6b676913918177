"""Orders to stop, which arrive as signals because a trainer deep in a kernel reads nothing.

    SIGTERM  interrupt: publish a checkpoint at the end of the running step, then stop
    SIGUSR1  cancel: stop within one micro-batch and publish nothing

Before the first step there is nothing to publish and no loop that looks, so the handler itself says `stopped`
and ends the process.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType

from shared.trainer_protocol import Stopped
from worker.training.reporter import Reporter


class StopRequests:
    """What has been asked for so far. A cancel wins over an interrupt."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._stepping = self._finishing = False
        self.last_step = 0
        self.cancelled = False
        self.interrupted = False
        self.pass_on: Callable[[int], None] = lambda _number: None
        """Hands an interrupt to the other processes of the run, which abandon an evaluation for it."""

    def install(self) -> None:
        """Listen. Call it from the main thread, first thing."""
        signal.signal(signal.SIGTERM, self._interrupt)
        signal.signal(signal.SIGUSR1, self._cancel)

    def follow(self) -> None:
        """Listen as one of several processes of which another one decides. From the main thread."""
        self._stepping = True
        signal.signal(signal.SIGTERM, self._interrupt)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def stepping(self, last_step: int) -> None:
        """From here on the training loop looks at the flags itself; `last_step` steps are done already."""
        self.last_step = last_step
        self._stepping = True

    def finishing(self) -> None:
        """The last step is done: what is left is short and better finished than thrown away. Nothing is heard now."""
        self._finishing = True
        self.cancelled = self.interrupted = False

    @property
    def requested(self) -> bool:
        return self.cancelled or self.interrupted

    @property
    def message(self) -> Stopped:
        return Stopped(reason="cancelled" if self.cancelled else "interrupted", step=self.last_step)

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self._finishing:
            return
        self.interrupted = True
        self.pass_on(signal.SIGTERM)
        self._leave_unless_stepping()

    def _cancel(self, _signal: int, _frame: FrameType | None) -> None:
        if self._finishing:
            return
        self.cancelled = True
        self._leave_unless_stepping()

    def _leave_unless_stepping(self) -> None:
        if not self._stepping:
            self._reporter.send(self.message)
            os._exit(0)  # imports and model loading hold locks that an orderly exit would wait for
