"""The order of the demo, what it prints on the way, and how it ends when something goes wrong.

    service up → base model answers → job trains → tuned model answers → tables → (--keep: wait) → service down

The base model answers before training starts: both want every core, and side by side each would be measured wrong.
"""

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import openai
import typer
from rich.console import Console

from cli.demo import report, work
from cli.demo.progress import clock, progress, say
from cli.demo.service import Service, ServiceFailed, running

PLAIN_WIDTH = 130
"""Of the tables where no terminal says how wide it is."""


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the service up afterwards, until Ctrl-C.")] = False,
    data: Annotated[Path | None, typer.Option(help="Folder to keep everything in. Default: a temporary one.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers and answers to this file.")
    ] = None,
) -> None:
    """Fine-tune SmolLM2 on support tickets through the whole service, and compare before with after."""
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGHUP, _leave)
    try:
        with _folder(data) as folder, _started(console, folder) as (service, start_s):
            try:
                run = _run(console, service, start_s)
            except openai.OpenAIError:
                service.check()  # a service that has died explains itself better than the connection it dropped
                raise
            report.show(console, run)
            if json_file is not None:
                json_file.write_text(report.as_json(run))
                say(console, f"All numbers and answers are in {json_file}.")
            _part(console, service, run, keep, data)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise typer.Exit(130) from None
    except (ServiceFailed, work.JobFailed, openai.OpenAIError, OSError) as error:
        print(f"error: the demo can't go on: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _leave(number: int, _frame: FrameType | None) -> None:
    """Turn a signal into an exit that unwinds, so that the service is stopped and the folder removed."""
    raise SystemExit(128 + number)


def _folder(data: Path | None) -> contextlib.AbstractContextManager[str | Path]:
    if data is not None:
        return contextlib.nullcontext(data.absolute())
    return tempfile.TemporaryDirectory(prefix="anneal-demo-", ignore_cleanup_errors=True)


@contextlib.contextmanager
def _started(console: Console, folder: str | Path) -> Iterator[tuple[Service, float]]:
    say(console, f"Starting the service in {folder}. The demo takes about four minutes on two idle CPU cores.")
    began = time.monotonic()
    with running(Path(folder)) as service:
        start_s = time.monotonic() - began
        say(console, f"It answers at {service.url} after {start_s:.0f} s.")
        yield service, start_s


def _run(console: Console, service: Service, start_s: float) -> report.Run:
    """Ask, train, ask again."""
    tickets = work.held_out_tickets()
    seconds = {"start": start_s}
    with work.connect(service.url) as client:
        before = _answers(console, client, work.BASE_MODEL, "Base model", tickets, seconds)
        began = time.monotonic()
        metrics: list[dict[str, Any]] = []
        tuned = _train(console, client, metrics)
        seconds["training"] = time.monotonic() - began
        after = _answers(console, client, tuned, "Tuned model", tickets, seconds)
    return report.Run(tickets, before, after, metrics, seconds)


def _answers(
    console: Console,
    client: openai.OpenAI,
    model: str,
    title: str,
    tickets: list[work.Ticket],
    seconds: dict[str, float],
) -> report.Answers:
    """Everything one model is asked. A wrong answer costs as much time as a right one."""
    began = time.monotonic()
    found: dict[int, str] = {}
    with progress(console, f"{title} answers", len(tickets)) as update:
        for index, answer in work.answer_all(client, model, [t.messages for t in tickets], work.TICKET_TOKENS):
            found[index] = answer
            update(len(found), f"{clock(time.monotonic() - began)} so far")
    prompts = work.answer_prompts(client, model)
    seconds[f"{title.lower()} answers"] = time.monotonic() - began
    return report.Answers(model, [found[i] for i in range(len(tickets))], prompts)


def _train(console: Console, client: openai.OpenAI, metrics: list[dict[str, Any]]) -> str:
    """Run the job; collect its logged steps; return the tuned model's name."""
    job = work.submit(client)
    say(console, f"Job {job.id} fine-tunes all parameters of {job.model}.")
    with progress(console, "Training", work.TRAINING["max_steps"]) as update:

        def on_metrics(step: Mapping[str, Any]) -> None:
            metrics.append(dict(step))
            update(
                step["step"],
                f"loss {step['loss']:.3f}, {step['tokens_per_second']:.0f} tokens/s, {clock(step['remaining_s'])} left",
            )

        done = work.follow(client, job.id, on_metrics, lambda message: say(console, f"  {message}", style="dim"))
    assert done.fine_tuned_model is not None
    return done.fine_tuned_model


def _part(console: Console, service: Service, run: report.Run, keep: bool, data: Path | None) -> None:
    """The last words: how to talk to the tuned model, now or later."""
    if keep:
        say(console, f"The service stays up at {service.url} until Ctrl-C. Talk to the tuned model:")
    elif data is not None:
        port = service.url.rpartition(":")[2]
        say(console, f"`anneal up --data {data} --port {port}` starts it again. Then talk to the tuned model:")
    else:
        say(console, "The service stops now, its folder goes. `make demo ARGS=--keep` does it again and leaves it up.")
        return
    say(console, report.curl_line(service.url, run.after.model, run.tickets[0]))
    if keep:
        service.wait()
