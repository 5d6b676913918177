"""The estimated end of a run against its real end, on runs whose every second is known."""

import random
from dataclasses import dataclass

import pytest

from worker.training.progress import Progress, times_due


@dataclass(frozen=True)
class Plan:
    """A run. Times in seconds."""

    steps: int = 200
    first: int = 1
    step_s: float = 1.0
    noise: float = 0.2
    slow_first_s: tuple[float, ...] = (30.0, 10.0)
    save_steps: int = 50
    save_s: float = 8.0
    eval_steps: int | None = 25
    eval_s: float = 4.0
    slower_from: int = 10**9
    """From this step on everything takes twice as long, as if a second job had come."""


def estimates(plan: Plan) -> tuple[dict[int, float], float]:
    """({step: the end as estimated then}, the end). In the trainer's order: step, report, evaluate, save."""
    generator = random.Random(5)
    now_s = 0.0
    progress = Progress(plan.first, plan.steps, now_s)
    progress.saves_due = times_due(plan.save_steps, plan.first, plan.steps)
    progress.evaluations_due = times_due(plan.eval_steps, plan.first, plan.steps)
    told: dict[int, float] = {}
    for number, step in enumerate(range(plan.first, plan.steps + 1)):
        factor = 2 if step >= plan.slower_from else 1
        slow = plan.slow_first_s[number] if number < len(plan.slow_first_s) else plan.step_s
        step_s = factor * slow * generator.uniform(1 - plan.noise, 1 + plan.noise)
        now_s += step_s
        progress.stepped(step_s)
        told[step] = now_s + progress.remaining_s(step)
        last = step == plan.steps
        if plan.eval_steps is not None and (last or step % plan.eval_steps == 0):
            now_s += factor * plan.eval_s
            progress.evaluated(factor * plan.eval_s)
        if last or step % plan.save_steps == 0:
            now_s += factor * plan.save_s
            progress.saved(factor * plan.save_s)
    return told, now_s


def worst(told: dict[int, float], end: float, first: int, last: int) -> float:
    """The largest error of the estimates between two steps, as a share of the whole time."""
    return max(abs(told[step] - end) for step in range(first, last + 1)) / end


@pytest.mark.parametrize(
    "plan",
    [
        Plan(),
        Plan(eval_steps=None, save_steps=500),
        Plan(noise=0.6),
        Plan(first=101, steps=300),
        Plan(eval_steps=10, eval_s=20),
    ],
    ids=["plain", "nothing between steps", "noisy", "resumed", "evaluation takes most of it"],
)
def test_the_estimated_finish_converges(plan: Plan) -> None:
    told, end = estimates(plan)
    middle, late, last = (plan.first + (plan.steps - plan.first) * part // 8 for part in (4, 7, 8))
    assert worst(told, end, middle, last) < 0.08, "half-way it is a few percent off at most"
    assert worst(told, end, late, last) < 0.05
    unseen_s = plan.save_s if plan.save_steps >= plan.steps else 0  # how long a save takes, nobody knows before one
    assert abs(told[last] - end) <= unseen_s + 1e-6, "what follows the last step has been measured"


def test_an_estimate_follows_a_machine_that_became_slower() -> None:
    plan = Plan(steps=400, slower_from=150)
    told, end = estimates(plan)
    assert told[149] < 0.75 * end, "nobody could know"
    assert worst(told, end, 300, 400) < 0.05
