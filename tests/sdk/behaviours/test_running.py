"""Pause, resume and cancel of a job that is training."""

import pytest
from openai import ConflictError, OpenAI

from tests.sdk.runs import PAUSED_STEPS, Cancellation, Pause, Runs, ours

LIMIT_S = 600


@pytest.fixture(scope="module")
def pause(runs: Runs) -> Pause:
    return runs.paused.result(LIMIT_S)


@pytest.fixture(scope="module")
def cancellation(runs: Runs) -> Cancellation:
    return runs.cancelled.result(LIMIT_S)


def test_a_pause_of_a_running_job_is_noted_at_once(pause: Pause) -> None:
    assert pause.asked.status in ("running", "paused")
    assert ours(pause.asked)["pause_requested"] or pause.asked.status == "paused"


def test_a_pause_asked_for_twice_is_one(pause: Pause, client: OpenAI) -> None:
    assert pause.asked_again.id == pause.asked.id
    messages = [event.message for event in client.fine_tuning.jobs.list_events(pause.asked.id, limit=1000)]
    assert len([message for message in messages if message.startswith("Pause requested")]) == 1


def test_it_stands_between_two_steps(pause: Pause) -> None:
    assert pause.paused.status == "paused"
    assert 5 <= pause.step < PAUSED_STEPS
    assert (pause.paused.finished_at, pause.paused.fine_tuned_model, pause.paused.error) == (None, None, None)
    assert pause.paused.estimated_finish is None


def test_pausing_a_paused_job_changes_nothing(pause: Pause) -> None:
    assert pause.asked_when_paused.status == "paused"


def test_a_resumed_job_waits_for_a_worker(pause: Pause) -> None:
    assert pause.resumed.status in ("queued", "running")
    assert pause.resumed.created_at == pause.paused.created_at


def test_a_resumed_job_goes_on_where_it_stood(pause: Pause, client: OpenAI) -> None:
    messages = [event.message for event in client.fine_tuning.jobs.list_events(pause.ended.id, limit=1000)][::-1]
    resumed = [message for message in messages if message.startswith("Resumed from step")]
    assert len(resumed) == 1
    assert int(resumed[0].split()[3].rstrip(",.;:")) >= pause.step
    paused = [index for index, message in enumerate(messages) if message.startswith("Job paused")]
    assert len(paused) == 1
    assert paused[0] < messages.index("Job resumed") < messages.index(resumed[0])


def test_a_resumed_job_ends_as_any_other(pause: Pause) -> None:
    assert (pause.ended.status, pause.ended.error) == ("succeeded", None)
    assert pause.ended.fine_tuned_model is not None
    assert ours(pause.ended)["current_step"] == PAUSED_STEPS


def test_no_step_is_missing_or_there_twice(pause: Pause, client: OpenAI) -> None:
    (file_id,) = pause.ended.result_files
    steps = [int(line.split(",")[0]) for line in client.files.content(file_id).text.splitlines()[1:]]
    assert steps == sorted(set(steps))
    assert set(range(5, PAUSED_STEPS + 1, 5)) <= set(steps)


def test_a_running_job_knows_its_step_and_its_end(cancellation: Cancellation) -> None:
    assert cancellation.running.status == "running"
    assert (cancellation.running.estimated_finish or 0) > cancellation.running.created_at


def test_a_running_job_is_cancelled(cancellation: Cancellation) -> None:
    assert cancellation.asked.status in ("running", "cancelled")
    assert ours(cancellation.asked)["cancel_requested"]
    assert (cancellation.ended.status, cancellation.ended.error) == ("cancelled", None)
    assert cancellation.ended.finished_at is not None
    assert cancellation.ended.finished_at - cancellation.ended.created_at < LIMIT_S


def test_a_cancelled_run_leaves_no_model(cancellation: Cancellation) -> None:
    assert (cancellation.ended.fine_tuned_model, cancellation.ended.result_files) == (None, [])


@pytest.mark.parametrize("act", ["cancel", "pause", "resume"])
def test_a_finished_job_takes_no_orders(act: str, runs: Runs, client: OpenAI) -> None:
    job = runs.finished.result(LIMIT_S)
    with pytest.raises(ConflictError, match="succeeded") as raised:
        getattr(client.fine_tuning.jobs, act)(job.id)
    assert raised.value.response.headers["x-should-retry"] == "false"


def test_the_next_job_runs_while_another_waits(runs: Runs) -> None:
    held = runs.held.result(LIMIT_S)
    assert held.status == "running"
    assert (held.estimated_finish or 0) > held.created_at
