"""The CPUs that a trainer runs on: those of its GPU's own NUMA node.

Across nodes, every launch of a kernel and every copy goes over the link between sockets, and the kernel moves threads
there as it likes. What the operator allows (a cpuset, taskset) is only ever narrowed. Imports no torch.
"""

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Any

from worker.training.environment import VISIBLE

ALLOWED = "ANNEAL_ALLOWED_CPUS"
"""Of a run's first process at its start. Peers, who may belong to other nodes, are born with what it took of them."""
OPERATORS = ("GOMP_CPU_AFFINITY", "OMP_PLACES")
"""Who sets one of these places threads by hand; it would be at odds with ours."""
PCI_DEVICES = Path("/sys/bus/pci/devices")


def allowed() -> set[int]:
    """Those that this run may use."""
    told = os.environ.get(ALLOWED)
    return os.sched_getaffinity(0) if told is None else parse(told)


def stay_near_gpu(pci_devices: Path = PCI_DEVICES) -> None:
    """Keep this thread, and those that it starts, to the CPUs of the GPU that it has in sight.

    Nothing changes without a GPU, on one NUMA node, or where none of those CPUs is allowed. Before torch is imported,
    which starts threads.
    """
    if any(name in os.environ for name in OPERATORS):
        return
    may = allowed()
    wanted = _near(os.environ.get(VISIBLE, ""), pci_devices) & may or may
    if wanted == os.sched_getaffinity(0):
        return
    os.environ[ALLOWED] = ",".join(map(str, sorted(may)))
    with contextlib.suppress(OSError):  # what was allowed at the start is no more
        os.sched_setaffinity(0, wanted)


def parse(listed: str) -> set[int]:
    """The kernel's notation: 0-3,8."""
    found: set[int] = set()
    for part in listed.split(","):
        if part.strip():
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found


def _near(gpu: str, pci_devices: Path) -> set[int]:
    """The CPUs of a GPU's node; none if unknown."""
    try:
        address = pci_address(ctypes.CDLL("libnvidia-ml.so.1"), gpu)
        return set() if address is None else parse((pci_devices / address / "local_cpulist").read_text())
    except (OSError, AttributeError, ValueError):
        return set()


class PciInfo(ctypes.Structure):
    """nvmlPciInfo_t."""

    _fields_ = (
        ("address_legacy", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("device_id", ctypes.c_uint),
        ("subsystem_id", ctypes.c_uint),
        ("address", ctypes.c_char * 32),
    )


def pci_address(driver: Any, gpu: str) -> str | None:
    """Of the first GPU of a list as `VISIBLE` takes it, as sysfs names it; None if there is none.

    A number is the driver's. CUDA counts otherwise only where GPUs of several kinds are in one host.

    Args:
        driver: NVML.
    """
    name = gpu.split(",")[0].strip()
    handle, info = ctypes.c_void_p(), PciInfo()
    if not name or name.startswith("-") or driver.nvmlInit_v2():
        return None
    if name.isdigit():
        failed = driver.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(handle))
    else:
        failed = driver.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
    if failed or driver.nvmlDeviceGetPciInfo_v3(handle, ctypes.byref(info)):
        return None
    return f"{info.domain:04x}:{info.bus:02x}:{info.device:02x}.0"
