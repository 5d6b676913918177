"""From what a training process said to numbers, and from the numbers of several runs to a table.

One rule for everyone. Tokens are those of conversations, padding left out. The steady rate leaves out the first 20
steps, or half of a short run: kernels are compiled and tuned in them. Both rates are over the wall clock from the first
step on, whatever happens between steps. "Saved" is when the tuned model was on disk, seconds from the launch. A run
with a step that had a loss and no gradient trained something else than it was asked to, and failed.

"Peak" is what the process itself says of its GPU memory, or its resident set on CPU; "card" what the driver says that
was used on the whole GPU, libraries' own memory included.
"""

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.processes import Said

STEADY_AFTER = 20
FIRST_LOSSES = 5
NUMBERS = (
    *("steady_tokens_per_second", "tokens_per_second", "steady_ms_per_step", "first_step_s", "saved_s"),
    *("peak_memory_bytes", "card_peak_bytes", "first_loss", "final_loss"),
)


def result(said: Said, *, on_gpu: bool) -> dict[str, Any]:
    """The numbers of one run, with every step; of a run that was cut off, what it has."""
    started = next(iter(said.of("started")), {})
    metrics = said.of("metrics")
    steps, before = [], 0
    for message in metrics:
        steps.append(
            {
                "step": message["step"],
                "loss": message["loss"],
                "grad_norm": message["grad_norm"],
                "tokens": message["tokens"] - before,
                "elapsed_s": round(message["elapsed_s"], 5),
            }
        )
        before = message["tokens"]
    peaks = [message["peak_memory_bytes"] for message in said.messages if "peak_memory_bytes" in message]
    if not on_gpu:
        peaks.append(said.resident_peak_bytes)
    # Our trainer publishes checkpoints, the last one is the model; a rival says `saved`.
    saved = said.of("saved", "checkpoint")
    is_done = said.status == 0 and bool(saved)
    return {
        "status": said.status,
        "failure": said.failure or without_gradient(steps),
        "wall_s": round(said.wall_s, 2),
        "first_step_s": round(metrics[0]["at_s"], 2) if metrics else None,
        "saved_s": round(saved[-1]["at_s"], 2) if is_done else None,
        **rates(steps),
        "peak_memory_bytes": max(peaks, default=None) if steps else None,
        "card_peak_bytes": said.card_peak_bytes or None,
        "first_loss": steps[0]["loss"] if steps else None,
        "final_loss": steps[-1]["loss"] if steps else None,
        "evaluations": [{"step": e["step"], "loss": e["eval_loss"]} for e in said.of("evaluation")],
        "device": started.get("device"),
        "versions": started.get("versions"),
        "settings": started.get("resolved"),
        "steps": steps,
    }


def without_gradient(steps: list[dict[str, Any]]) -> str | None:
    """Which step had a loss and no gradient; None if all had one."""
    for step in steps:
        if step["loss"] > 0 and not step["grad_norm"]:
            what = "no gradient norm" if step["grad_norm"] is None else "gradient norm 0"
            return f"{what} at step {step['step']}"
    return None


def rates(steps: list[dict[str, Any]]) -> dict[str, float | None]:
    if not steps:
        return {"tokens_per_second": None, "steady_tokens_per_second": None, "steady_ms_per_step": None}
    skip = min(STEADY_AFTER, len(steps) // 2)
    steady, began_s = steps[skip:], steps[skip - 1]["elapsed_s"] if skip else 0.0
    seconds = steps[-1]["elapsed_s"] - began_s
    return {
        "tokens_per_second": round(sum(s["tokens"] for s in steps) / steps[-1]["elapsed_s"], 1),
        "steady_tokens_per_second": round(sum(s["tokens"] for s in steady) / seconds, 1),
        "steady_ms_per_step": round(1000 * seconds / len(steady), 2),
    }


def median_rate(steps: list[dict[str, Any]]) -> float:
    """Tokens/s of the median of the steady steps."""
    skip = max(min(STEADY_AFTER, len(steps) // 2), 1)
    pairs = zip(steps[skip - 1 :], steps[skip:], strict=False)
    rates = [one["tokens"] / (one["elapsed_s"] - before["elapsed_s"]) for before, one in pairs]
    return round(statistics.median(rates), 1)


def summaries(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By contender: of each number its median, least and most over the whole runs, and the failures."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["contender"] for run in runs):
        counted = [run for run in runs if run["contender"] == name and not run.get("priming")]
        whole = [run for run in counted if run["failure"] is None]
        found[name] = {
            "runs": len(whole),
            "failures": [run["failure"] for run in counted if run["failure"] is not None],
            **{number: spread(run.get(number) for run in whole) for number in NUMBERS},
        }
    return found


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"median": statistics.median(known), "min": min(known), "max": max(known)}


def loss_differences(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Between the first runs of each two contenders: how far their losses are apart, and whether tokens are equal."""
    firsts: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run["steps"]:
            firsts.setdefault(run["contender"], run)
    found = {}
    names = list(firsts)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            pairs = list(zip(firsts[one]["steps"], firsts[other]["steps"], strict=False))
            signed = [a["loss"] - b["loss"] for a, b in pairs]
            gaps = [abs(gap) for gap in signed]
            found[f"{one} - {other}"] = {
                "first": round(gaps[0], 6),
                "first_5_max": round(max(gaps[:FIRST_LOSSES]), 6),
                "max": round(max(gaps), 6),
                "mean": round(statistics.fmean(gaps), 6),
                "mean_signed": round(statistics.fmean(signed), 6),
                "steps_compared": len(gaps),
                "same_tokens": all(a["tokens"] == b["tokens"] for a, b in pairs),
            }
    return found


def difference(pair: str, gap: dict[str, Any]) -> str:
    """One of `loss_differences` in a line."""
    text = f"{pair}: first {FIRST_LOSSES} losses at most {gap['first_5_max']:.2g} apart"
    if not gap["same_tokens"]:
        return f"{text}, other tokens in some step"
    average = f"{gap['mean']:.2g} on average (with their signs {gap['mean_signed']:+.2g})"
    rest = f"all {gap['steps_compared']} at most {gap['max']:.2g} and {average}"
    return f"{text}, {rest}, the same tokens in every step"


def line(run: dict[str, Any]) -> str:
    """One run in a line, as it ends."""
    name = f"{run['contender']}, run {run['round']}{' (priming)' if run.get('priming') else ''}"
    if not run["steps"]:
        return f"{name}: no step ended, {run['wall_s']:.0f} s: {_first_line(run['failure'])}"
    text = (
        f"{name}: {len(run['steps'])} steps, steady {run['steady_tokens_per_second']:.0f} tokens/s "
        f"({run['tokens_per_second']:.0f} over all), first step after {run['first_step_s']:.1f} s, "
        f"saved after {_shown(run['saved_s'], '.1f')} s, peak {gib(run['peak_memory_bytes'])} GiB, "
        f"loss {run['first_loss']:.4f} -> {run['final_loss']:.4f}"
    )
    return text if run["failure"] is None else f"{text}; FAILED: {_first_line(run['failure'])}"


def table(found: dict[str, dict[str, Any]]) -> str:
    """Medians, with the least and the most of the rates and of the time to the saved model."""
    heads = ("contender", "runs", "steady tokens/s", "tokens/s", "saved after s", "first step s", "peak GiB", "loss")
    rows = [heads, *(_cells(name, one) for name, one in found.items() if one["runs"])]
    if any(one["card_peak_bytes"] for one in found.values()):
        cards = [gib(_median(one["card_peak_bytes"])) for one in found.values() if one["runs"]]
        rows = [(*row[:-1], card, row[-1]) for row, card in zip(rows, ["card GiB", *cards], strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name, one in found.items():
        lines += [f"{name}: failed, {_first_line(failure)}" for failure in dict.fromkeys(one["failures"])]
    return "\n".join(lines)


def _cells(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    failed = len(one["failures"])
    return (
        name,
        f"{one['runs']} of {one['runs'] + failed}" if failed else str(one["runs"]),
        _range(one["steady_tokens_per_second"], ".0f"),
        _range(one["tokens_per_second"], ".0f"),
        _range(one["saved_s"], ".1f"),
        _shown(_median(one["first_step_s"]), ".1f"),
        gib(_median(one["peak_memory_bytes"])),
        _shown(_median(one["final_loss"]), ".4f"),
    )


def gib(size: float | None) -> str:
    return "?" if size is None else f"{size / 2**30:.2f}"


def _median(numbers: dict[str, float] | None) -> float | None:
    return None if numbers is None else numbers["median"]


def _range(numbers: dict[str, float] | None, form: str) -> str:
    if numbers is None:
        return "?"
    return f"{numbers['median']:{form}} ({numbers['min']:{form}} to {numbers['max']:{form}})"


def _shown(number: float | None, form: str) -> str:
    return "?" if number is None else f"{number:{form}}"


def _first_line(text: str | None) -> str:
    lines = [part for part in (text or "").strip().splitlines() if part.strip()]
    return lines[-1][:200] if lines else "no word"
