"""Down the ladder through the real supervisor: what is overridden, told, and refused."""

from collections.abc import Callable

from shared.settings import Settings
from tests.campaign.toy_trainer import COMMAND
from tests.worker.steps import claim, failing, job_of, messages
from worker import memory, supervisor


def run(settings: Settings) -> None:
    supervisor.supervise(claim(settings), settings, COMMAND)


def test_each_rung_is_stored_told_and_costs_no_attempt(settings: Settings, submit: Callable[..., str]) -> None:
    job_id = submit({"batch_size": 8, "micro_batch_size": 4}, steps=6, save_steps=2, behaviour="out_of_memory")
    run(settings)
    job = job_of(job_id)
    assert (job.status, job.attempts, job.faults) == ("queued", 0, 0)
    assert job.adapted is not None
    assert (job.adapted["batch_size"], job.adapted["micro_batch_size"]) == (8, 2)
    run(settings)
    assert job_of(job_id).adapted["micro_batch_size"] == 1  # type: ignore[index]
    run(settings)
    job = job_of(job_id)
    assert job.status == "succeeded", job.error
    assert job.resolved is not None
    assert (job.resolved["batch_size"], job.resolved["micro_batch_size"]) == (8, 1)
    assert job.training["micro_batch_size"] == 4, "what the client sent stays what the client sent"
    assert sum(message.startswith("Memory ran out") for message in messages(job_id)) == 2


def test_a_client_that_refuses_adaptation_gets_the_failure(settings: Settings, submit: Callable[..., str]) -> None:
    job_id = submit({"batch_size": 8, "micro_batch_size": 4, "on_oom": "fail"}, steps=6, behaviour="out_of_memory")
    run(settings)
    job = job_of(job_id)
    assert job.status == "failed" and job.error is not None
    assert job.error["code"] == "out_of_memory"


def test_a_trainer_the_kernel_killed_for_memory_goes_down_the_ladder_too(
    settings: Settings, submit: Callable[..., str]
) -> None:
    counted = iter([7, 8])  # the kernel's own counter; making the host run out of memory would end the tests
    kills, memory.kills = memory.kills, lambda: next(counted)  # type: ignore[assignment]
    try:
        job_id = submit({"batch_size": 8, "micro_batch_size": 2}, steps=6, behaviour="kill_at_3")
        run(settings)
    finally:
        memory.kills = kills
    job = job_of(job_id)
    assert job.status == "queued" and job.adapted is not None
    assert job.adapted["micro_batch_size"] == 1


def test_the_kernels_counter_is_read() -> None:
    assert memory.kills() >= 0


def test_running_out_while_loading_takes_no_rung_of_an_earlier_attempt(
    settings: Settings, submit: Callable[..., str]
) -> None:
    job_id = submit({"batch_size": 8, "micro_batch_size": 4}, steps=6, behaviour="out_of_memory")
    run(settings)
    assert job_of(job_id).status == "queued"
    supervisor.supervise(claim(settings), settings, failing("out_of_memory", "the model itself does not fit"))
    job = job_of(job_id)
    assert job.status == "failed" and job.error is not None, "or it would be claimed again for ever"
    assert job.error["code"] == "out_of_memory"
