"""`python -m worker.wandb_report`: tells Weights & Biases of one run. A process of its own, so that nothing it does,
fails to do or waits for reaches the run; `worker.wandb_feed` is the other end.

Standard input, one JSON object a line:

    {"id", "project", "entity", "name", "tags", "config"}   first
    {"step", "values"}                                      any number of times, steps never going back
    {"exit_code", "summary"}                                last; input that just ends means that the run will go on

Of a run that goes on after a crash or a pause, steps that Weights & Biases has already are left out.
"""

import json
import os
import sys
from typing import Any, TextIO

from worker.lifecycle import die_with_parent

FED_BY = "ANNEAL_SUPERVISED_BY"
INTERRUPTED = 1


def main() -> int:
    die_with_parent(int(os.environ[FED_BY]))
    lines = _own_input()
    run = _begin(json.loads(lines.readline()))
    known_before: int = run.step
    for line in lines:
        message = json.loads(line)
        if "exit_code" in message:
            run.summary.update(message["summary"])
            run.finish(exit_code=message["exit_code"])
            return 0
        if message["step"] >= known_before:
            run.log(message["values"], step=message["step"])
    run.mark_preempting()
    run.finish(exit_code=INTERRUPTED)
    return 0


def _own_input() -> TextIO:
    """Standard input under another number, which what wandb starts doesn't inherit: it would keep the pipe open."""
    lines = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return lines


def _begin(first: dict[str, Any]) -> Any:
    """The run of this id, taken up if it is there; nothing of this host is told but what was asked for."""
    import wandb  # here: it takes a second and more, and this process must be able to die by then

    return wandb.init(
        **first,
        resume="allow",
        settings=wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
