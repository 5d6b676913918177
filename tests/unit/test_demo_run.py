"""What the demo does around its numbers: following a job, showing it, and ending clearly. The SDK is the real one."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from rich.console import Console

from cli.demo import report, work
from cli.demo.progress import progress
from cli.demo.service import ServiceFailed, running
from shared.trainer_protocol import Metrics
from tests.waiting import LIMIT_S, wait_until
from worker.recorder import step_data

JOB = {
    "id": "ftjob-1", "object": "fine_tuning.job", "created_at": 1, "error": None, "fine_tuned_model": None,
    "finished_at": None, "hyperparameters": {}, "model": work.BASE_MODEL, "organization_id": "default",
    "result_files": [], "seed": 3407, "status": "running", "trained_tokens": None, "training_file": "file-1",
    "validation_file": None,
}  # fmt: skip


def event(number: int, kind: str, message: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
    base = {"id": f"ftevent-{number}", "object": "fine_tuning.job.event", "created_at": number, "level": "info"}
    return {**base, "type": kind, "message": message, "data": data}


def recorded(step: int, loss: float) -> dict[str, Any]:
    """The data of the event that the recorder really makes of a step."""
    message = Metrics(
        step=step,
        total_steps=2,
        epoch=1.0,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=1.0,
        tokens=10,
        tokens_per_second=1.0,
        samples_per_second=1.0,
        peak_memory_bytes=1,
        elapsed_s=1.0,
        remaining_s=1.0,
    )
    return step_data(message, message.model_dump(exclude={"type", "step"}, exclude_none=True))


def client_of(answer: Callable[[httpx.Request], dict[str, Any]]) -> openai.OpenAI:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=answer(request)))
    return openai.OpenAI(base_url="http://test/v1", api_key="x", http_client=httpx.Client(transport=transport))


def test_a_job_is_followed_to_its_model_and_each_event_is_passed_on_once_in_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(work, "POLL_S", 0.0)
    metrics = [event(n, "metrics", "step", recorded(n, 2.0 / n)) for n in (1, 2)]
    pages = [[event(0, "message", "loaded")], [metrics[0], event(0, "message", "loaded")], [*metrics[::-1]]]
    states = [JOB, JOB, {**JOB, "status": "succeeded", "fine_tuned_model": "ft:x"}]

    def answer(request: httpx.Request) -> dict[str, Any]:
        if request.url.path.endswith("/events"):
            return {"object": "list", "data": pages.pop(0), "has_more": False}
        return states.pop(0)

    losses, messages = [], []
    job = work.follow(client_of(answer), "ftjob-1", lambda step: losses.append(step["loss"]), messages.append)
    assert (job.fine_tuned_model, losses, messages) == ("ft:x", [2.0, 1.0], ["loaded"])


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_job_without_a_model_ends_the_demo_with_the_jobs_own_reason(status: str):
    ended = {**JOB, "status": status, "error": {"code": "diverged", "message": "the loss is not finite", "param": None}}
    empty = {"object": "list", "data": [], "has_more": False}
    client = client_of(lambda request: empty if request.url.path.endswith("/events") else ended)
    with pytest.raises(work.JobFailed, match=f"ftjob-1 {status}: the loss is not finite"):
        work.follow(client, "ftjob-1", lambda _: None, lambda _: None)


def test_answers_come_back_under_the_number_of_their_question():
    def answer(request: httpx.Request) -> dict[str, Any]:
        body = json.loads(request.content)
        assert (body["temperature"], body["max_tokens"]) == (0, 48)
        message = {"role": "assistant", "content": body["messages"][0]["content"].upper()}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}

    asked = [[{"role": "user", "content": word}] for word in ("one", "two", "three")]
    assert dict(work.answer_all(client_of(answer), "m", asked, 48)) == {0: "ONE", 1: "TWO", 2: "THREE"}


def test_without_a_terminal_progress_is_plain_lines_and_the_last_one_is_always_there():
    out = io.StringIO()
    with progress(Console(file=out, width=100), "Training", 60) as update:
        for step in range(1, 61):
            update(step, f"loss {1 / step:.3f}")
    assert out.getvalue().splitlines() == ["Training 1/60 loss 1.000", "Training 60/60 loss 0.017"]


def test_the_report_counts_the_held_out_tickets_and_cannot_be_made_to_steer_the_terminal():
    tickets = work.held_out_tickets()
    right = [json.dumps(dict(ticket.wanted)) for ticket in tickets]
    before = report.Answers(work.BASE_MODEL, ["[bold]\x1b[31mno"] * len(tickets), ["a", "b", "c"])
    after = report.Answers("ft:x", ["{}", *right[1:]], ["{}", "{}", "{}"])
    run = report.Run(
        tickets, before, after, [{"step": 1, "loss": 2.0, "tokens_per_second": 100.0}], {"training": 100.0}
    )
    out = io.StringIO()
    report.show(Console(file=out, width=130), run)
    shown = out.getvalue()
    assert f"{(len(tickets) - 1) / len(tickets):.1%} ({len(tickets) - 1})" in shown
    assert "[bold]" in shown
    assert "\x1b" not in shown
    scores = json.loads(report.as_json(run))["scores"]
    assert (scores["before"]["exact"], scores["after"]["exact"]) == (0, len(tickets) - 1)


def test_the_curl_line_survives_a_shell():
    ticket = work.Ticket([{"role": "user", "content": 'It\'s "broken" $HOME `x`'}], {})
    line = report.curl_line("http://127.0.0.1:1", "ft:x", ticket).replace("curl -s", "printf '%s\\n'", 1)
    printed = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout.splitlines()
    assert json.loads(printed[-1])["messages"] == ticket.messages


def test_a_service_that_cannot_start_is_an_error_that_shows_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ANNEAL_LEASE_S", "soon")
    with pytest.raises(ServiceFailed, match=r"exit status 1(.|\n)*soon"), running(tmp_path):
        pass


def test_a_folder_that_is_none_is_named(tmp_path: Path):
    (tmp_path / "data").write_text("a file, not a folder")
    with pytest.raises(ServiceFailed, match="data: Not a directory"), running(tmp_path / "data"):
        pass


def test_a_killed_demo_takes_its_service_with_it(tmp_path: Path):
    program = (
        "import sys, pathlib; from cli.demo.service import running\nwith running(pathlib.Path(sys.argv[1])): input()"
    )
    demo = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, env=dict(os.environ))
    family = wait_until(lambda: psutil.Process(demo.pid).children(recursive=True))
    demo.kill()
    demo.wait()
    _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
    assert not alive
