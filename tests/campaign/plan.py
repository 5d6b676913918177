"""What a campaign does, drawn from one seed: which jobs are sent, which faults strike.

The same seed gives the same jobs and the same sequence of faults with the same waits. It can't give the same run: who
is hit in the middle of what depends on the scheduler of a real machine. One that finds nobody is passed over.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.campaign.toy_trainer import NEVER, ToyPlan

BASE_MODEL = "acme/tiny"
INLINE_VALIDATION_BYTES = 4000
"""Set low, so that larger files, which `worker batch` checks, stay cheap to make."""

VALIDATION_FILE = b'{"instruction": "reset the password", "output": "thank the printer"}\n' * 4

RETRIES = (("looks", 30), ("key", 40), ("counts", 30))
"""How a client makes sure that its job is created once: it looks for it, it sends an Idempotency-Key, or it says that
it tries again, as OpenAI's SDKs do, which is best effort."""
PAUSES = (("no", 75), ("brief", 10), ("some", 10), ("long", 5))
PAUSED_FOR_S = {"brief": (0.0, 0.5), "some": (1.0, 5.0), "long": (10.0, 20.0)}
CANCELS_WHILE_PAUSED = 0.2
LARGE_PRIORITY = 100

BEHAVIOURS = (
    ("finish", 74),
    ("slow", 4),
    ("cancel", 8),
    ("deaf", 2),
    ("poison", 3),
    ("diverge", 3),
    ("invalid", 2),
    ("flood", 2),
    ("garbage", 2),
)


@dataclass(frozen=True)
class JobPlan:
    """One job as a client sends it, and what must become of it."""

    index: int
    behaviour: str
    steps: int
    save_steps: int
    seed: int
    training_file: bytes
    has_validation_file: bool
    keep_checkpoints: int
    cancel_after_s: float | None
    """Between its creation and the client's wish to cancel it."""
    is_followed: bool
    """Somebody reads its events live."""
    training: dict[str, Any] = field(default_factory=dict, hash=False)
    """Further choices of the client."""
    variant: str = ""
    """Which undisturbed run it must end like, where those are not computed."""
    retry: str = "looks"
    pause_after_s: float | None = None
    """Between its creation and the client's wish to pause it."""
    paused_for_s: float = 0.0
    is_cancelled_paused: bool = False
    """The client cancels the job in place of resuming it."""
    is_sent_in_parts: bool = False

    @property
    def is_large(self) -> bool:
        return len(self.training_file) > INLINE_VALIDATION_BYTES

    @property
    def allowed_ends(self) -> tuple[str, ...]:
        if self.behaviour in ("poison", "diverge", "invalid"):
            return ("failed",)
        is_cancelled = self.cancel_after_s is not None or self.is_cancelled_paused
        return ("succeeded", "cancelled") if is_cancelled else ("succeeded",)

    @property
    def failure_code(self) -> str | None:
        codes = {"poison": "trainer_died", "diverge": "diverged", "invalid": "invalid_training_file"}
        return codes.get(self.behaviour)


def habits(seed: int, index: int, *, may_pause: bool, within_s: float) -> dict[str, Any]:
    """How the client of job number `index` goes about it, whatever the job: values of a `JobPlan`.

    Args:
        within_s: a pause is asked for at most so long after the creation.
    """
    draw = random.Random(f"{seed}/habits/{index}")
    retry = draw.choices([name for name, _ in RETRIES], [weight for _, weight in RETRIES])[0]
    length = draw.choices([name for name, _ in PAUSES], [weight for _, weight in PAUSES])[0]
    after_s, is_cancelled = draw.uniform(0, within_s), draw.random() < CANCELS_WHILE_PAUSED
    pauses = may_pause and length != "no"
    return {
        "retry": retry,
        "is_sent_in_parts": draw.random() < 0.3,
        "pause_after_s": after_s if pauses else None,
        "paused_for_s": draw.uniform(*PAUSED_FOR_S[length]) if pauses else 0.0,
        "is_cancelled_paused": pauses and is_cancelled,
        "training": {"priority": draw.randint(-LARGE_PRIORITY, LARGE_PRIORITY)} if draw.random() < 0.3 else {},
    }


def toy_job(seed: int, index: int) -> JobPlan:
    """Job number `index` of the campaign of that seed."""
    draw = random.Random(f"{seed}/job/{index}")
    behaviour = draw.choices([name for name, _ in BEHAVIOURS], [weight for _, weight in BEHAVIOURS])[0]
    steps, save_steps = draw.randint(5, 60), draw.randint(1, 7)
    if behaviour == "poison":
        save_steps = NEVER  # it dies in its second step; a checkpoint of the first would be progress
    if behaviour == "deaf":
        steps = 400
    toy = ToyPlan(
        steps=steps,
        save_steps=save_steps,
        step_s=round(draw.uniform(0.02, 0.1), 3),
        behaviour=behaviour if behaviour not in ("cancel", "invalid") else "finish",
    )
    rows = [{"prompt": "plan", "completion": json.dumps(asdict(toy))}]
    rows += [{"prompt": f"row {number}", "completion": "x" * 50} for number in range(7)]
    large = behaviour == "invalid" or draw.random() < 0.15
    if large:
        rows += [{"prompt": "padding", "completion": "y" * 200} for _ in range(INLINE_VALIDATION_BYTES // 200)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if behaviour == "invalid":
        content += b'{"prompt": "no completion"}\n'
    return JobPlan(
        index=index,
        behaviour=behaviour,
        steps=steps,
        save_steps=save_steps,
        seed=draw.randrange(2**31),
        training_file=content,
        has_validation_file=draw.random() < 0.25,
        keep_checkpoints=draw.randint(1, 4),
        cancel_after_s=draw.uniform(0, 4) if behaviour in ("cancel", "deaf") else None,
        is_followed=index % 4 == 0,
        **habits(seed, index, may_pause=behaviour in ("finish", "slow", "flood", "garbage"), within_s=4),
    )


@dataclass(frozen=True)
class FaultPlan:
    """One fault: after `wait_s`, do `action` to a process of `role`; `choice` picks which of several."""

    wait_s: float
    action: str
    role: str
    choice: float
    hold_s: float
    """How long a stopped process stays stopped."""
    restart_s: float
    """How long its orchestrator takes to start a killed process again."""
    is_alone: bool = False
    """Strikes when everything is well again, and nothing else does until the service has gone on: how long that takes
    can only be told of a fault that is not followed by others."""


Weights = dict[tuple[str, str], int]

OF_GENERATION = ("generate", "runner")
"""Roles that only a campaign with generators has. A runner is the process of `worker batch` that runs batches."""
FAULTS: Weights = {
    ("kill", "trainer"): 24,
    ("stop", "trainer"): 9,
    ("kill", "supervisor"): 9,
    ("stop", "supervisor"): 6,
    ("kill", "worker"): 5,
    ("stop", "worker"): 3,
    ("freeze", "worker"): 4,
    ("deploy", "worker"): 3,
    ("kill", "api"): 4,
    ("stop", "api"): 3,
    ("kill", "generate"): 4,
    ("stop", "generate"): 4,
    ("deploy", "generate"): 2,
    ("kill", "sweep"): 4,
    ("stop", "sweep"): 4,
    ("kill", "batch"): 3,
    ("stop", "batch"): 2,
    ("deploy", "batch"): 2,
    ("kill", "runner"): 7,
    ("stop", "runner"): 5,
    ("kill", "valkey"): 1,
    ("wipe", "valkey"): 3,
    ("stop", "valkey"): 1,
    ("damage", "checkpoint"): 5,
}
STANDBY_FAULTS: Weights = {("kill", "standby"): 6, ("stop", "standby"): 4}
"""Of a trainer started ahead, waiting or, still in its imports, a job's already."""
POSTGRESQL_FAULTS: Weights = {("kill", "postgres"): 2, ("kill", "connection"): 2}
ALONE: Weights = {
    ("kill", "trainer"): 2,
    ("stop", "trainer"): 2,
    ("kill", "supervisor"): 3,
    ("stop", "supervisor"): 3,
    ("kill", "worker"): 3,
    ("freeze", "worker"): 2,
}
"""What ends a run; a stop lasts too long for it to go on."""
STORM_EVERY = 20
STORM_FAULTS = (3, 6)
ALONE_EVERY = 30


def faults(seed: int, *, lease_s: float, mean_wait_s: float, weights: Weights) -> Iterator[FaultPlan]:
    """The endless sequence of faults: one by one, now and then a storm of several at once, now and then one alone."""
    draw = random.Random(f"{seed}/faults")
    in_storm = 0
    for number in range(1, 10**9):
        is_alone = number % ALONE_EVERY == ALONE_EVERY // 2
        if number % STORM_EVERY == 0:
            in_storm = draw.randint(*STORM_FAULTS)
        wait_s = 0.0 if in_storm else min(draw.expovariate(1 / mean_wait_s), 4 * mean_wait_s)
        in_storm = max(0, in_storm - 1)
        among = ALONE if is_alone else weights
        action, role = draw.choices(list(among), list(among.values()))[0]
        yield FaultPlan(
            wait_s=wait_s,
            action=action,
            role=role,
            choice=draw.random(),
            hold_s=draw.uniform(1.8 if is_alone else 0.05, 2) * lease_s,
            restart_s=draw.uniform(0.1, 1),
            is_alone=is_alone,
        )
