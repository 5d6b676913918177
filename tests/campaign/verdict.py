"""The verdict on a campaign: what must hold for every job, whatever struck.

Each check yields findings; a campaign is good when there are none. Checks read `Evidence` only, so that tests can hand
them evidence with a lie in it and see that it is found.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from tests.campaign import batch_verdict, promises
from tests.campaign.chat import LEFT, Chat
from tests.campaign.clients import ENDED
from tests.campaign.damage import Damage
from tests.campaign.evidence import EventRow, Evidence, JobRecord
from tests.campaign.findings import Finding, Known
from tests.campaign.notebook import Submitted
from tests.campaign.plan import JobPlan

ENDINGS = ("The job has successfully completed", "The job was cancelled", "The job failed: ")
SUCCESS = ENDINGS[0]
RESUMED = re.compile(r"Resumed from step (\d+)")
STARTED = "Fine-tuning job started"
CLAIMED = "Job claimed by worker"
REGISTERED = re.compile(r"Checkpoint created at step (\d+)")


def judge(evidence: Evidence, known: Known) -> list[Finding]:
    """Every finding of every check."""
    findings = []
    for job in evidence.jobs:
        plan = known.plans.get(job.number)
        if plan is None:
            findings.append(Finding("unknown_job", job.id, f"nobody sent job number {job.number}"))
            continue
        for name, check in JOB_CHECKS.items():
            findings += [Finding(name, f"job {job.number} ({job.id})", what) for what in check(job, plan, known)]
    findings += [
        Finding("lost", f"job {s.plan.index}", f"{s.job_id} is not in the database") for s in _gone(evidence, known)
    ]
    findings += _result_files(evidence)
    findings += _streams(evidence, known)
    findings += promises.kept(evidence, known)
    findings += batch_verdict.judge(evidence, known)
    findings += [
        Finding("missing_bytes", path, "its row names bytes that are not there") for path in evidence.rows_without_bytes
    ]
    findings += [Finding("garbage", path, "no row names it") for path in evidence.bytes_without_rows]
    findings += [Finding("orphan_process", who, "it outlived the service") for who in evidence.leftovers]
    return findings


def _lost(job: JobRecord, plan: JobPlan, known: Known) -> Iterator[str]:
    if job.status not in ENDED:
        yield f"it is still {job.status}"
    elif job.status not in plan.allowed_ends:
        yield f"it is {job.status} ({job.error_code}), expected {' or '.join(plan.allowed_ends)} ({plan.behaviour})"
    elif job.status == "failed" and job.error_code != plan.failure_code:
        yield f"it failed with {job.error_code}, expected {plan.failure_code}"


def _finished_once(job: JobRecord, plan: JobPlan, known: Known) -> Iterator[str]:
    endings = [event.message for event in job.events if event.message.startswith(ENDINGS)]
    if len(endings) != (1 if job.status in ENDED else 0):
        yield f"it is {job.status} and has {len(endings)} last events: {endings}"
    succeeded = sum(message == SUCCESS for message in endings)
    expected = 1 if job.status == "succeeded" else 0
    for what, count in (
        ("success events", succeeded),
        ("tuned models", len(job.tuned)),
        ("result files", len(job.result_files)),
        ("model names", int(job.fine_tuned_model is not None)),
    ):
        if count != expected:
            yield f"it is {job.status} and has {count} {what}"
    if endings and not job.events[-1].message.startswith(ENDINGS):
        yield f"its last event is {job.events[-1].message!r}, after its end"


def _cancelled_as_told(job: JobRecord, plan: JobPlan, known: Known) -> Iterator[str]:
    for submitted in known.submitted:
        if submitted.job_id != job.id:
            continue
        if submitted.cancel_answer == "cancelled" and job.status != "cancelled":
            yield f"its cancellation was answered with `cancelled`, and it is {job.status}"
        if submitted.last_seen in ENDED and submitted.last_seen != job.status:
            yield f"a client saw it {submitted.last_seen}, and it is {job.status}"


def _events_numbered(job: JobRecord, plan: JobPlan, known: Known) -> Iterator[str]:
    numbers = [event.sequence for event in job.events]
    if numbers != list(range(1, job.last_event + 1)):
        yield f"its events are numbered {numbers}, its counter is {job.last_event}"


def _weights(job: JobRecord, plan: JobPlan, known: Known) -> Iterator[str]:
    if job.status != "succeeded":
        return
    reference = known.references(plan)
    final = {row.location: row for row in job.checkpoints}
    for location in job.tuned:
        row = final.get(location)
        if row is None:
            yield f"its model is at {location}, which is no checkpoint of it"
        elif row.step != plan.steps:
            yield f"its model is of step {row.step} of {plan.steps}"
        elif row.weights_sha256 != reference.weights_sha256:
            yield "its weights differ from the reference"
    if job.trained_tokens != reference.tokens[-1]:
        yield f"it counts {job.trained_tokens} trained tokens, the reference {reference.tokens[-1]}"


def _metrics(job: JobRecord, plan: JobPlan, known: Known) -> Iterator[str]:
    steps = sorted(job.metrics)
    if steps != list(range(1, len(steps) + 1)) or (job.status == "succeeded" and len(steps) != plan.steps):
        yield f"it has metrics of steps {steps}, expected 1 to {plan.steps}"
    if plan.behaviour == "invalid":
        return
    reference = known.references(plan)
    for step, values in job.metrics.items():
        if step > len(reference.losses):
            yield f"step {step} is beyond its end"
        elif values.get("loss") != reference.losses[step - 1]:
            yield f"step {step} has loss {values.get('loss')}, the reference {reference.losses[step - 1]}"
        elif values.get("tokens") != reference.tokens[step - 1]:
            yield f"step {step} has {values.get('tokens')} tokens, the reference {reference.tokens[step - 1]}"
        elif "eval_loss" in values and values["eval_loss"] != reference.validation_losses.get(step):
            yield f"step {step} has validation loss {values['eval_loss']}, not {reference.validation_losses.get(step)}"
    if job.status == "succeeded" and plan.has_validation_file:
        due = {*range(plan.save_steps, plan.steps, plan.save_steps), plan.steps}
        if missing := sorted(step for step in due if "eval_loss" not in job.metrics.get(step, {})):
            yield f"steps {missing} were never evaluated"
    told = Counter(event.data.get("step") for event in job.events if _is_training_metric(event))
    repeated = sorted(step for step, count in told.items() if count > 1)
    if repeated or sorted(told) != steps:
        yield f"its metric events are of steps {sorted(told)} (repeated: {repeated}), its metrics of {steps}"


def _is_training_metric(event: EventRow) -> bool:
    return event.type == "metrics" and "train_loss" in event.data


def _journal(job: JobRecord, plan: JobPlan, known: Known) -> Iterator[str]:
    """Every step that was ever computed, by whatever attempt, had the reference's loss."""
    if not job.journal:
        return
    reference = known.references(plan)
    for step in job.journal:
        expected = reference.losses[step.step - 1]
        if step.loss != expected:
            yield f"claim {step.fence} computed loss {step.loss} at step {step.step}, not {expected}"
            return


def _checkpoints(job: JobRecord, plan: JobPlan, known: Known) -> Iterator[str]:
    spoiled = {damage.location for damage in known.damages}
    for row in job.checkpoints:
        if row.damage is not None and row.location not in spoiled:
            yield f"checkpoint {row.location} is registered and damaged: {row.damage}"
    if plan.behaviour == "diverge" and any(row.step >= 3 for row in job.checkpoints):
        yield f"it diverged in step 3 and has checkpoints of {[row.step for row in job.checkpoints]}"


def _resumes(job: JobRecord, plan: JobPlan, known: Known) -> Iterator[str]:
    """One event a resumed attempt, from a step whose checkpoint was registered and not spoiled since."""
    spoiled = [(damage.step, damage.at) for damage in known.damages if damage.job_id == job.id]
    registered: dict[int, float] = {}
    for attempt in attempts(job):
        beginnings = [e.message for e in attempt if e.message.startswith(STARTED) or RESUMED.match(e.message)]
        if len(beginnings) > 1:
            yield f"one attempt began {len(beginnings)} times: {beginnings}"
        if not beginnings and any(_is_training_metric(e) or REGISTERED.match(e.message) for e in attempt):
            yield f"an attempt recorded progress and no beginning: {attempt[0].message}"
        for event in attempt:
            if match := REGISTERED.match(event.message):
                registered[int(match[1])] = event.created_at
            if match := RESUMED.match(event.message):
                step = int(match[1])
                if step not in registered:
                    yield f"it resumed from step {step}, which was never registered"
                elif any(s == step and registered[step] < at < event.created_at for s, at in spoiled):
                    yield f"it resumed from the spoiled checkpoint of step {step}"


def passed_over(job: JobRecord, damage: Damage) -> bool:
    """Whether the next attempt met the spoiled checkpoint and began before it."""
    for attempt in attempts(job):
        if attempt[0].created_at > damage.at:
            steps = [int(match[1]) for event in attempt if (match := RESUMED.match(event.message))]
            began = bool(steps) or any(event.message.startswith(STARTED) for event in attempt)
            if began:
                return not steps or steps[0] < damage.step
    return False


def attempts(job: JobRecord) -> list[list[EventRow]]:
    """The job's events in one list for each claim, what came before the first claim left out."""
    found: list[list[EventRow]] = []
    for event in job.events:
        if event.message.startswith(CLAIMED):
            found.append([event])
        elif found:
            found[-1].append(event)
    return found


def _claims(job: JobRecord, plan: JobPlan, known: Known) -> Iterator[str]:
    if len(attempts(job)) != job.fence:
        yield f"it was claimed {len(attempts(job))} times by its events, {job.fence} times by its fence"
    registered_by: dict[int, int] = {}
    for fence, attempt in enumerate(attempts(job), start=1):
        for event in attempt:
            if match := REGISTERED.match(event.message):
                registered_by[int(match[1])] = fence
    for row in job.checkpoints:
        if registered_by.get(row.step) != row.fence:
            yield f"claim {row.fence} registered step {row.step} while claim {registered_by.get(row.step)} held the job"


def _work_lost(job: JobRecord, plan: JobPlan, known: Known) -> Iterator[str]:
    """A resume falls back by one checkpoint interval at most, of the steps the service had recorded."""
    if any(damage.job_id == job.id for damage in known.damages):
        return
    for lost in steps_lost(job):
        if lost > plan.save_steps:
            yield f"{lost} recorded steps were done again, it saves every {plan.save_steps}"


def steps_lost(job: JobRecord) -> list[int]:
    """For each attempt after the first that began: recorded steps before it that it had to do again."""
    lost = []
    reached = 0
    for attempt in attempts(job):
        for event in attempt:
            if match := RESUMED.match(event.message):
                lost.append(max(0, reached - int(match[1])))
            elif event.message.startswith(STARTED) and reached:
                lost.append(reached)
            elif _is_training_metric(event):
                reached = max(reached, int(event.data["step"]))
    return lost


JOB_CHECKS: dict[str, Callable[[JobRecord, JobPlan, Known], Iterator[str]]] = {
    "lost": _lost,
    "finished_twice": _finished_once,
    "cancel_broken": _cancelled_as_told,
    "events_not_numbered": _events_numbered,
    "weights_differ": _weights,
    "metrics_wrong": _metrics,
    "computed_wrong": _journal,
    "corrupt_checkpoint": _checkpoints,
    "resume_wrong": _resumes,
    "claims_wrong": _claims,
    "work_lost": _work_lost,
    "paused_wrong": promises.paused_as_told,
}


def _gone(evidence: Evidence, known: Known) -> list[Submitted]:
    present = {job.id for job in evidence.jobs}
    return [submitted for submitted in known.submitted if submitted.job_id not in present]


def _result_files(evidence: Evidence) -> list[Finding]:
    named = Counter(file for job in evidence.jobs for file in job.result_files)
    wrong = [file for file in evidence.result_files if named[file] != 1] + [
        f for f in named if f not in evidence.result_files
    ]
    return [Finding("finished_twice", file, f"{named[file]} jobs name this result file") for file in wrong]


def _streams(evidence: Evidence, known: Known) -> Iterator[Finding]:
    by_id = {job.id: job for job in evidence.jobs}
    for followed in known.followed:
        job = by_id.get(followed.job_id)
        if job is None or job.status not in ENDED:
            continue
        if followed.numbers != list(range(1, job.last_event + 1)) or not followed.is_complete:
            yield Finding(
                "stream_wrong",
                followed.job_id,
                f"its reader got {len(followed.numbers)} of {job.last_event} events in {followed.connections} "
                f"connections, complete: {followed.is_complete}: {followed.numbers[:5]}…{followed.numbers[-5:]}",
            )


def chats_wrong(chats: Sequence[Chat], limit_s: float) -> list[Finding]:
    """Every question ends in time, with an answer or an error in OpenAI's shape, or with its connection."""
    return [
        Finding("chat_wrong", f"question at {chat.asked_at:.1f}", f"{chat.outcome} after {chat.took_s:.1f} s")
        for chat in chats
        if not (chat.outcome in ("answer", LEFT, "broken") or chat.outcome.startswith("error "))
        or chat.took_s > limit_s
    ]
