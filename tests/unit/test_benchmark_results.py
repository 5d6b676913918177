"""What the training benchmark makes of what its contenders said: who failed, how far losses are apart, what it took."""

import ctypes
from pathlib import Path
from typing import Any

import pytest

from benchmarks import processes, training_result
from benchmarks.contenders import DEFAULTS, Work, find, refusal
from benchmarks.processes import Card, Said
from worker.training.environment import MALLOC, THREADS


def said(losses: list[float], norms: list[float | None], **fields: Any) -> Said:
    metrics = [
        {"type": "metrics", "step": n, "loss": loss, "grad_norm": norm, "tokens": 10 * n, "elapsed_s": n, "at_s": n}
        for n, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
    ]
    return Said([*metrics, {"type": "saved", "at_s": 9.0}], status=0, **fields)


def run(name: str, losses: list[float], on_gpu: bool = False, **fields: Any) -> dict[str, Any]:
    heard = said(losses, [1.0] * len(losses), **fields)
    return {"contender": name, "round": 1, **training_result.result(heard, on_gpu=on_gpu)}


@pytest.mark.parametrize(
    ("losses", "norms", "failure"),
    [
        ([2.0, 1.0, 1.0], [1.0, 1.0, 1.0], None),
        ([2.0, 1.0, 1.0], [1.0, 1.0, 0.0], "gradient norm 0 at step 3"),
        ([2.0, 1.0, 1.0], [1.0, None, 0.0], "no gradient norm at step 2"),
        ([2.0, 0.0, 0.0], [1.0, 0.0, None], None),
    ],
)
def test_a_run_that_trained_nothing_in_some_step_failed(
    losses: list[float], norms: list[float | None], failure: str | None
) -> None:
    found = training_result.result(said(losses, norms), on_gpu=True)
    assert found["failure"] == failure
    summary = training_result.summaries([{"contender": "one", **found}])["one"]
    assert (summary["runs"], summary["failures"]) == ((1, []) if failure is None else (0, [failure]))


def test_why_a_process_failed_comes_before_what_it_computed() -> None:
    heard = said([1.0], [0.0])
    heard.status = "timeout"
    assert "time limit" in training_result.result(heard, on_gpu=False)["failure"]


def test_gaps_of_all_losses_are_told_not_of_the_first_alone() -> None:
    runs = [run("one", [1.0] * 8), run("other", [1.0] * 6 + [0.9, 1.3])]
    [(pair, gap)] = training_result.loss_differences(runs).items()
    assert (gap["first_5_max"], gap["max"], gap["mean_signed"]) == (0, 0.3, pytest.approx(-0.025))
    line = training_result.difference(pair, gap)
    assert "first 5 losses at most 0 apart, all 8 at most 0.3 and 0.05 on average" in line
    assert "-0.025), the same tokens" in line
    runs[1]["steps"][7]["tokens"] += 1
    [(pair, gap)] = training_result.loss_differences(runs).items()
    assert training_result.difference(pair, gap).endswith("at most 0 apart, other tokens in some step")


def test_what_was_used_on_the_card_is_a_column_where_there_is_one() -> None:
    on_gpu = training_result.summaries(
        [run("one", [1.0], on_gpu=True, card_peak_bytes=3 * 2**30), run("other", [1.0], on_gpu=True)]
    )
    heads, one, other = training_result.table(on_gpu).splitlines()
    assert heads.split()[-4:] == ["GiB", "card", "GiB", "loss"]
    assert (one.split()[-2], other.split()[-2]) == ("3.00", "?")
    on_cpu = training_result.summaries([run("one", [1.0], resident_peak_bytes=2**30)])
    assert "card" not in training_result.table(on_cpu)


class Driver:
    """Stands in for NVIDIA's management library, on a host with two GPUs."""

    def __init__(self) -> None:
        self.used = {0: 5, 1: 7}

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = 100 + index.value
        return 0 if index.value in self.used else 2

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        handle._obj.value = 101
        return 0 if name == b"GPU-5a" else 2

    def nvmlDeviceGetMemoryInfo(self, handle: Any, found: Any) -> int:
        found._obj[:] = [80, 80 - self.used[handle.value - 100], self.used[handle.value - 100]]
        return 0


@pytest.mark.parametrize(("in_sight", "used"), [("0", 5), ("1,0", 7), ("GPU-5a", 7), ("6", 0), ("", 0)])
def test_the_card_looked_at_is_the_first_in_sight(in_sight: str, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Driver())
    assert Card(in_sight).used_bytes() == used


def test_a_host_without_the_driver_says_nothing_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert Card("0").used_bytes() == 0


def test_the_peak_of_the_card_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = iter([3, 9, 4])
    monkeypatch.setattr(processes, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(Card, "used_bytes", lambda self: next(looked, 1))
    command = ["sleep", "0.3"]
    assert processes.run(command, caches=tmp_path, timeout_s=10, on_gpu=True).card_peak_bytes == 9
    assert processes.run(command, caches=tmp_path, timeout_s=10, on_gpu=False).card_peak_bytes == 0


WORK = Work(Path("rows.json"), Path("model"), 60, 2, 4, 2048, 2e-4, 1, packed=False)


def launched(name: str) -> list[str]:
    contender, _ = find(name)
    assert refusal(contender, packed=False, on_gpu=False) is None
    assert refusal(contender, packed=False, on_gpu=True) == "runs on CPU only"
    return contender.launch(WORK, Path("caches"), Path("saved")).command


@pytest.mark.parametrize("name", ["unsloth", "unsloth-fp32"])
def test_a_tuned_rival_is_the_same_under_our_malloc_and_threads(name: str) -> None:
    plain = find(name)[0].launch(WORK, Path("caches"), Path("saved")).command
    ours = [f"{variable}={value}" for variable, value in {**MALLOC, **THREADS}.items()]
    assert launched(f"{name}-tuned") == ["env", *ours, *plain]


def test_trl_may_keep_its_activations() -> None:
    assert launched("trl-kept-under-unsloth") == [*launched("trl-under-unsloth"), "--keep"]


@pytest.mark.parametrize("key", DEFAULTS)
def test_who_takes_part_by_default_may(key: tuple[str, bool]) -> None:
    workload, on_gpu = key
    names = DEFAULTS[key].split(",")
    assert ("unsloth-fp32-tuned" in names) == (key == ("tutorial", False))
    for name in names:
        found = find(name)[0]
        assert found.packed in (None, workload == "packed")
        assert found.gpu in (None, on_gpu)
