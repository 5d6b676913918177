"""The verdict itself: it finds nothing wrong with a job that went well, and each lie that is planted in one."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.campaign import toy_model
from tests.campaign.chat import Chat
from tests.campaign.damage import Damage
from tests.campaign.evidence import CheckpointRow, EventRow, Evidence, JobRecord, Step
from tests.campaign.faults import Fault
from tests.campaign.findings import Finding, Known
from tests.campaign.loads import ToyLoad
from tests.campaign.notebook import Followed, Submitted
from tests.campaign.plan import JobPlan
from tests.campaign.recovery import percentile, recoveries
from tests.campaign.verdict import chats_wrong, judge, steps_lost

PLAN = JobPlan(
    index=0,
    behaviour="finish",
    steps=6,
    save_steps=2,
    seed=5,
    training_file=b"{}",
    has_validation_file=False,
    keep_checkpoints=3,
    cancel_after_s=None,
    is_followed=True,
)
REFERENCE = toy_model.reference(PLAN.seed, PLAN.training_file, PLAN.steps)


def events(*messages: Any) -> tuple[EventRow, ...]:
    """Events a second apart; a number is a step's metric."""
    rows = []
    for sequence, message in enumerate(messages, start=1):
        if isinstance(message, int):
            rows.append(
                EventRow(sequence, sequence, "metrics", f"Step {message}/6", {"step": message, "train_loss": 1})
            )
        else:
            rows.append(EventRow(sequence, sequence, "message", message, {}))
    return tuple(rows)


def checkpoint(step: int, fence: int = 1) -> CheckpointRow:
    weights = REFERENCE.weights_sha256 if step == PLAN.steps else "other"
    return CheckpointRow(step, fence, f"checkpoints/j/{fence}/{step}", step < PLAN.steps, 1, None, weights)


HISTORY = events(
    "Created fine-tuning job: j",
    "Job claimed by worker a",
    "Fine-tuning job started: 6 steps",
    *(1, 2, "Checkpoint created at step 2: x", 3),
    "The trainer was killed by SIGKILL; trying again, attempt 2 of 12",
    "Job claimed by worker b, claim 2",
    "Resumed from step 2",
    *(4, "Checkpoint created at step 4: x", 5, 6, "Checkpoint created at step 6: x"),
    "New fine-tuned model created: m",
    "The job has successfully completed",
)
GOOD = JobRecord(
    id="j",
    number=0,
    status="succeeded",
    error_code=None,
    fence=2,
    last_event=len(HISTORY),
    trained_tokens=REFERENCE.tokens[-1],
    fine_tuned_model="m",
    result_files=("file-1",),
    events=HISTORY,
    metrics={n: {"loss": REFERENCE.losses[n - 1], "tokens": REFERENCE.tokens[n - 1]} for n in range(1, 7)},
    checkpoints=(checkpoint(2), checkpoint(4, 2), checkpoint(6, 2)),
    tuned=("checkpoints/j/2/6",),
    journal=(Step(1.0, 1, 1, REFERENCE.losses[0]),),
)


def known(**changes: Any) -> Known:
    return Known(plans={0: PLAN}, references=ToyLoad(0).reference, **changes)


def found(job: JobRecord, **changes: Any) -> set[str]:
    return {finding.check for finding in judge(Evidence((job,), job.result_files), known(**changes))}


def lie(**changes: Any) -> JobRecord:
    return dataclasses.replace(GOOD, **changes)


def renamed(old: str, *new: Any) -> JobRecord:
    """The good job with one event replaced by others."""
    messages: list[Any] = []
    for event in HISTORY:
        shown: Any = event.data["step"] if event.type == "metrics" else event.message
        messages += list(new) if event.message == old else [shown]
    history = events(*messages)
    return lie(events=history, last_event=len(history))


def test_a_job_that_went_well_is_found_well() -> None:
    read = Followed("j", list(range(1, len(HISTORY) + 1)), is_complete=True)
    assert found(GOOD, followed=[read], submitted=[Submitted(PLAN, "j", last_seen="succeeded")]) == set()


@pytest.mark.parametrize(
    ("check", "job"),
    [
        ("lost", lie(status="running")),
        ("lost", lie(status="failed", error_code="trainer_died")),
        ("finished_twice", lie(tuned=("checkpoints/j/2/6", "checkpoints/j/2/6"))),
        ("finished_twice", lie(result_files=("file-1", "file-2"))),
        ("finished_twice", renamed("The job has successfully completed")),
        ("finished_twice", renamed("The job has successfully completed", *["The job has successfully completed"] * 2)),
        ("finished_twice", renamed("The job has successfully completed", "The job has successfully completed", "More")),
        ("events_not_numbered", lie(last_event=99)),
        ("events_not_numbered", lie(events=HISTORY[:5] + HISTORY[6:])),
        ("weights_differ", lie(tuned=("checkpoints/j/2/4",))),
        ("weights_differ", lie(checkpoints=(dataclasses.replace(checkpoint(6, 2), weights_sha256="wrong"),))),
        ("weights_differ", lie(trained_tokens=REFERENCE.tokens[-1] + 1)),
        ("metrics_wrong", lie(metrics={n: values for n, values in GOOD.metrics.items() if n != 3})),
        ("metrics_wrong", lie(metrics={**GOOD.metrics, 3: {"loss": 0.5, "tokens": REFERENCE.tokens[2]}})),
        ("metrics_wrong", lie(metrics={**GOOD.metrics, 3: {"loss": REFERENCE.losses[2], "tokens": 1}})),
        ("metrics_wrong", renamed("Step 4/6", 3, 4)),
        ("computed_wrong", lie(journal=(Step(1.0, 1, 2, 0.5),))),
        ("corrupt_checkpoint", lie(checkpoints=(*GOOD.checkpoints, dataclasses.replace(checkpoint(5), damage="cut")))),
        ("resume_wrong", renamed("Resumed from step 2", "Resumed from step 3")),
        ("resume_wrong", renamed("Resumed from step 2", "Resumed from step 2", "Resumed from step 2")),
        ("resume_wrong", renamed("Resumed from step 2")),
        ("claims_wrong", lie(fence=3)),
        ("claims_wrong", lie(checkpoints=(checkpoint(2), checkpoint(4, 1), checkpoint(6, 2)))),
        ("work_lost", renamed("Resumed from step 2", "Fine-tuning job started: 6 steps")),
        ("unknown_job", lie(number=7)),
    ],
)
def test_a_lie_is_found(check: str, job: JobRecord) -> None:
    assert check in found(job)


def test_a_job_nobody_has_any_more_is_lost() -> None:
    assert found(GOOD, submitted=[Submitted(PLAN, "another")]) == {"lost"}


def test_a_broken_promise_to_a_client_is_found() -> None:
    assert found(GOOD, submitted=[Submitted(PLAN, "j", cancel_answer="cancelled")]) == {"cancel_broken"}
    assert found(GOOD, submitted=[Submitted(PLAN, "j", last_seen="failed")]) == {"cancel_broken"}


@pytest.mark.parametrize("spoil", [lambda n: n[:3] + n[4:], lambda n: n[:3] + n[2:], lambda n: n[:-1]])
def test_a_gap_and_a_repeat_in_a_live_stream_are_found(spoil: Callable[[list[int]], list[int]]) -> None:
    read = Followed("j", spoil(list(range(1, len(HISTORY) + 1))), is_complete=True)
    assert found(GOOD, followed=[read]) == {"stream_wrong"}


def test_a_resume_from_a_spoiled_checkpoint_is_found() -> None:
    registered, claimed = 6, 9  # the seconds of those events
    spoiled = Damage(registered + 1, "j", 2, "checkpoints/j/1/2", "optimizer.pt", Path("x"), b"")
    assert found(GOOD, damages=[spoiled]) == {"resume_wrong"}
    after = dataclasses.replace(spoiled, at=claimed + 5)
    assert found(GOOD, damages=[after]) == set(), "it was spoiled after it had been used"


def test_garbage_and_rows_without_bytes_and_leftover_processes_are_found() -> None:
    evidence = Evidence((GOOD,), ("file-1", "file-9"), ("files/a",), ("files/b",), ("process 1",))
    checks = {finding.check for finding in judge(evidence, known())}
    assert checks == {"finished_twice", "missing_bytes", "garbage", "orphan_process"}


def test_a_question_that_ends_late_or_in_no_known_way_is_found() -> None:
    chats = [Chat(0, 1, "answer"), Chat(0, 1, "error x"), Chat(0, 1, "broken"), Chat(0, 99, "answer"), Chat(0, 1, "?")]
    assert [type(finding) for finding in chats_wrong(chats, 30)] == [Finding, Finding]


def test_work_lost_is_what_was_recorded_past_the_step_resumed_from() -> None:
    assert steps_lost(GOOD) == [1]


def fault(number: int, at: float, action: str = "kill", role: str = "trainer", **changes: Any) -> Fault:
    return Fault(number, at, action, role, "x", 1, **changes)


def test_recovery_is_the_time_to_the_next_claim_and_knows_what_got_in_its_way(settings_of_4_s: Any) -> None:
    hit = fault(1, 7.5, job_id="j", fence=1)
    (one,) = recoveries([GOOD], [hit], settings_of_4_s)
    assert (one.seconds, one.is_undisturbed) == (1.5, True)
    (one,) = recoveries([GOOD], [hit, fault(2, 8.0, role="sweep", restart_s=1)], settings_of_4_s)
    assert not one.is_undisturbed
    (one,) = recoveries([GOOD], [hit, fault(2, 8.0, role="api", restart_s=1)], settings_of_4_s)
    assert one.is_undisturbed
    (one,) = recoveries([GOOD], [hit], settings_of_4_s, locking={1})
    assert not one.is_undisturbed
    stopped = fault(2, 3.0, "stop", "supervisor", hold_s=1.0, job_id="other")  # over long before
    assert recoveries([GOOD], [hit, stopped], settings_of_4_s)[0].is_undisturbed
    assert not recoveries([GOOD], [hit, stopped], settings_of_4_s, locking={2})[0].is_undisturbed  # but for its outage


def at_times(job_id: str, *told: tuple[float, str]) -> JobRecord:
    rows = tuple(EventRow(n, at, "message", message, {}) for n, (at, message) in enumerate(told, 1))
    return dataclasses.replace(GOOD, id=job_id, events=rows)


def test_the_time_in_which_no_worker_was_free_is_no_recovery(settings_of_4_s: Any) -> None:
    """Hit at 10, noticed at 14, claimed at 40; there are two workers, and the one that was hit is back at 13."""
    hit = fault(1, 10.0, "kill", "supervisor", job_id="j", fence=1, restart_s=1.0)
    job = at_times(
        "j",
        (5, "Job claimed by worker a"),
        (14, "Worker a fell silent; trying again later"),
        (14.5, "whatever is told of it in the queue"),
        (40, "Job claimed by worker b, claim 2"),
    )
    busy = [at_times(f"o{n}", (12, "Job claimed by worker x"), (39, "The job was cancelled")) for n in range(2)]
    paused = [
        at_times(f"o{n}", (12, "Job claimed by worker x"), (13.9, "Job paused at step 2"), (39, "Job resumed"))
        for n in range(2)
    ]

    def seconds(*others: JobRecord, workers: int = 2) -> float:
        one = recoveries([job, *others], [hit], settings_of_4_s, workers=workers)[0]
        assert one.seconds + one.waited_s == 30 and one.is_undisturbed
        return one.seconds

    assert seconds() == 30
    assert seconds(*busy) == 5, "4 to notice, 1 to claim"
    assert seconds(busy[0]) == 30, "the worker that was hit is back, and idle"
    assert seconds(*paused) == 30, "who runs a job that is paused is idle"
    assert seconds(*busy, workers=3) == 30
    until_20 = at_times("o", (12, "Job claimed by worker x"), (20, "The job was cancelled"))
    assert seconds(busy[0], until_20) == 24, "free at 20"
    older = at_times("p", (20.1, "Job claimed by worker x"), (39.5, "The job was cancelled"))
    assert seconds(busy[0], until_20, older) == 5, "an older one had its turn"


def test_why_a_recovery_is_left_out_is_told(settings_of_4_s: Any) -> None:
    hit = fault(1, 7.5, job_id="j", fence=1)
    for other, why in (
        (fault(2, 8.0, role="sweep", restart_s=1), "sweep"),
        (fault(2, 7.0, "stop", "trainer", hold_s=1, job_id="j", fence=1), "hit again"),
        (fault(2, 8.0, "stop", "api", hold_s=1), None),
    ):
        (one,) = recoveries([GOOD], [hit, other], settings_of_4_s)
        assert one.disturbed_by == why
    (one,) = recoveries([GOOD], [hit], settings_of_4_s, locking={1})
    assert one.disturbed_by == "SQLite locked"


def test_a_slow_recovery_is_not_excused_by_what_struck_when_it_was_late_already(settings_of_4_s: Any) -> None:
    late = renamed("Job claimed by worker b, claim 2", "x", "Job claimed by worker b, claim 2")
    moved = tuple(dataclasses.replace(e, created_at=e.created_at + 20 * (e.sequence > 9)) for e in late.events)
    hit = fault(1, 7.5, job_id="j", fence=1)
    job = dataclasses.replace(late, events=moved)
    (one,) = recoveries([job], [hit, fault(2, 20.0, role="sweep", restart_s=1)], settings_of_4_s)
    assert one.is_undisturbed
    assert one.seconds > one.limit_s


def test_a_percentile_is_a_value_that_occurred() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert percentile([3.0], 0.99) == 3
    assert percentile([], 0.99) == 0


@pytest.fixture
def settings_of_4_s() -> Any:
    from shared.settings import Settings

    return Settings(lease_s=4, heartbeat_s=1, trainer_silent_s=4)
