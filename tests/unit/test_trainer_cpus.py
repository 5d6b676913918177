"""A trainer stays on the CPUs of its GPU's node."""

import os
from pathlib import Path
from typing import Any

import pytest

from worker.training import cpus

NODES = {"0000:17:00.0": "0-3,8-11", "0001:ca:00.0": "4-7,12-15"}
UUID = "GPU-5aec7e8f-0000-0000-0000-000000000000"


class Driver:
    """NVML of two GPUs, one on each node."""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = 100 + index.value
        return 0 if index.value < 2 else 2

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        handle._obj.value = 101
        return 0 if uuid == UUID.encode() else 6

    def nvmlDeviceGetPciInfo_v3(self, handle: Any, info: Any) -> int:
        info._obj.domain, info._obj.bus = {100: (0, 0x17), 101: (1, 0xCA)}[handle.value]
        return 0


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """16 CPUs, two nodes. `now`: where the process runs."""
    state: dict[str, Any] = {"now": set(range(16)), "pci": tmp_path}
    for address, listed in NODES.items():
        (tmp_path / address).mkdir()
        (tmp_path / address / "local_cpulist").write_text(listed + "\n")
    for name in (cpus.ALLOWED, *cpus.OPERATORS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(state["now"]))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, wanted: state.update(now=set(wanted)))
    monkeypatch.setattr(cpus.ctypes, "CDLL", lambda _: Driver())
    # Set, so that what the code sets is taken back.
    monkeypatch.setenv(cpus.ALLOWED, "")
    monkeypatch.delenv(cpus.ALLOWED)
    return state


FIRST, SECOND = {0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15}


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0", FIRST),
        ("1", SECOND),
        ("1,0", SECOND),
        (UUID, SECOND),
        ("GPU-unknown", FIRST | SECOND),
        ("7", FIRST | SECOND),
        ("", FIRST | SECOND),
        ("-1", FIRST | SECOND),
    ],
)
def test_a_trainer_runs_on_its_gpus_node(
    visible: str, expected: set[int], host: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cpus.stay_near_gpu(host["pci"])
    assert host["now"] == expected


@pytest.mark.parametrize(
    ("may", "expected"), [({0, 1, 4, 5}, {0, 1}), ({4, 5}, {4, 5})], ids=["part of the node", "none of the node"]
)
def test_what_is_allowed_is_only_narrowed(
    may: set[int], expected: set[int], host: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    host["now"] = may
    cpus.stay_near_gpu(host["pci"])
    assert host["now"] == expected
    assert cpus.allowed() == may


@pytest.mark.parametrize(("visible", "expected"), [("1", SECOND), ("7", FIRST | SECOND)], ids=["known", "unknown"])
def test_a_peer_of_another_node_is_not_kept_to_the_firsts(
    visible: str, expected: set[int], host: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It inherits the first one's environment and CPUs."""
    for each in ("0", visible):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", each)
        cpus.stay_near_gpu(host["pci"])
    assert host["now"] == expected


@pytest.mark.parametrize("name", cpus.OPERATORS)
def test_who_places_threads_by_hand_is_left_alone(
    name: str, host: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv(name, "0-15")
    cpus.stay_near_gpu(host["pci"])
    assert host["now"] == FIRST | SECOND


def test_without_a_driver_or_the_kernels_word_nothing_changes(
    host: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    cpus.stay_near_gpu(tmp_path / "nothing")
    assert host["now"] == FIRST | SECOND

    def missing(_: str) -> Any:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(cpus.ctypes, "CDLL", missing)
    cpus.stay_near_gpu(host["pci"])
    assert host["now"] == FIRST | SECOND
