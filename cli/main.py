"""The `anneal` command. Each subcommand reads its settings, then hands over to the module that does the work.

Imports of the parts are inside the commands: `anneal --help` must be instant, and the API's process must not load
what only a worker needs.
"""

import importlib
import os
import re
import sys
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Never

import typer
from pydantic_settings import SettingsError

from shared import logs
from shared.settings import Settings, get_settings

app = typer.Typer(
    help="Anneal: a self-hosted, OpenAI-compatible fine-tuning service. Settings are ANNEAL_… variables (README.md).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its traces print local variables, and one of them may be a key
)

Data = Annotated[Path | None, typer.Option(help="Folder of everything this host keeps (ANNEAL_DATA).")]
Host = Annotated[str | None, typer.Option(help="Address to listen on (ANNEAL_HOST).")]
Port = Annotated[int | None, typer.Option(help="Port to listen on, 0 picks a free one (ANNEAL_PORT).")]


class WorkerName(StrEnum):
    """The kinds of worker."""

    train = "train"
    batch = "batch"
    generate = "generate"
    sweep = "sweep"


@app.command()
def up(data: Data = None, host: Host = None, port: Port = None) -> None:
    """Start the whole service on this machine and keep it running until Ctrl-C."""
    from cli.up import up as run

    settings = _settings(data, host, port)
    _demand_engine(settings)
    raise typer.Exit(run(settings))


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def demo(context: typer.Context) -> None:
    """Fine-tune SmolLM2 on support tickets through the whole service, and compare before with after."""
    try:
        from cli.demo.command import demo as run
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        _fail("the demo talks to Anneal through the openai package, which is not installed: make install")
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    program.command()(run)
    program(args=context.args, prog_name="anneal demo")


@app.command()
def api(data: Data = None, host: Host = None, port: Port = None) -> None:
    """Serve the HTTP API alone."""
    from cli.api import serve
    from cli.listener import CannotListen

    settings = _settings(data, host, port)
    try:
        serve(settings)
    except CannotListen as error:
        _fail(str(error))


@app.command()
def worker(kind: WorkerName, data: Data = None) -> None:
    """Run one worker: train, batch, generate or sweep."""
    from cli import commands

    settings = _settings(data)
    if kind.value in commands.CELERY_KINDS:
        command = commands.celery_worker(kind.value, settings.log_level)
        os.execv(command[0], command)  # noqa: S606 - so that the process id is the worker's own
    if kind is WorkerName.generate:
        _demand_engine(settings)
    logs.configure(settings.log_level)
    # By name: the command has no part in what a worker imports, torch above all.
    module = "worker.generation.loop" if kind is WorkerName.generate else "worker.sweeper"
    importlib.import_module(module).run(settings)


@app.command()
def migrate(data: Data = None) -> None:
    """Bring the database's tables up to date. Safe to run twice, and by two at once."""
    _settings(data)
    from cli.migrate import migrate as run

    run()


@app.command()
def health(
    name: Annotated[str, typer.Argument(help="api, train, batch, generate or sweep")],
    data: Data = None,
    port: Annotated[int | None, typer.Option(help="The API's port (ANNEAL_PORT).")] = None,
) -> None:
    """Exit with 0 if the named process of this host is alive, 1 if not."""
    from cli.health import check

    problem = check(_settings(data, port=port), name)
    if problem is not None:
        _fail(problem)


@app.command()
def version() -> None:
    """Print the version."""
    print(metadata.version("anneal"))


def _demand_engine(settings: Settings) -> None:
    """Before anything is started: a generator that can't would be started again and again."""
    if (problem := settings.engine_problem) is not None:
        _fail(problem)


def _settings(data: Path | None = None, host: str | None = None, port: int | None = None) -> Settings:
    """This process's settings, options first. Options become variables, so that child processes see them too."""
    for name, value in (("DATA", data), ("HOST", host), ("PORT", port)):
        if value is not None:
            os.environ[f"ANNEAL_{name}"] = str(value)
    try:
        return get_settings()
    except SettingsError as error:
        field = re.search(r'field "(\w+)"', str(error))
        name = f"ANNEAL_{field[1].upper()}" if field else "a setting"
        _fail(f'{name} is not JSON; lists are written like ["one", "two"], in quotes for the shell')
    except ValueError as error:
        _fail(f"the settings are not valid: {error}")


def _fail(message: str) -> Never:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
