"""How fast a run goes and how long it will take. Arithmetic only: the clock is passed in."""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

WARMUP_STEPS = 2
"""Steps left out of the estimate once there are others: they compile kernels and fill allocators."""
RECENT_STEPS = 100
"""Steps the estimate looks back on."""


@dataclass
class Progress:
    """Times of one attempt at a run.

    A step's time excludes what is done between steps (evaluation, checkpoints); those are averaged apart and
    counted for as often as they are still due.
    """

    first_step: int
    total_steps: int
    started_s: float
    saves_due: int = 0
    evaluations_due: int = 0
    _warmup_s: list[float] = field(default_factory=list)
    _step_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _save_s: list[float] = field(default_factory=list)
    _evaluation_s: list[float] = field(default_factory=list)

    def stepped(self, seconds: float) -> None:
        times = self._warmup_s if len(self._warmup_s) < WARMUP_STEPS else self._step_s
        times.append(seconds)

    def saved(self, seconds: float) -> None:
        self._save_s.append(seconds)
        self.saves_due = max(self.saves_due - 1, 0)

    def evaluated(self, seconds: float) -> None:
        self._evaluation_s.append(seconds)
        self.evaluations_due = max(self.evaluations_due - 1, 0)

    def elapsed_s(self, now_s: float) -> float:
        return now_s - self.started_s

    def remaining_s(self, step: int) -> float:
        """Estimate after `step` steps of the job are done."""
        return (
            (self.total_steps - step) * _mean(self._step_s or self._warmup_s)
            + self.saves_due * _mean(self._save_s)
            + self.evaluations_due * _mean(self._evaluation_s)
        )


def times_due(every: int | None, first_step: int, total_steps: int) -> int:
    """How often something done each `every` steps, and at the last one, is still to be done."""
    if every is None:
        return 0
    regular = sum(1 for step in range(first_step, total_steps) if step % every == 0)
    return regular + 1


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values) if values else 0.0
