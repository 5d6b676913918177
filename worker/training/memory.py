"""A limit on the memory one trainer takes, so that several share a machine and running out can be tried for real.

    GPU   what PyTorch's caching allocator reserves: weights, gradients, optimizer state, activations. The CUDA context
          and libraries' own allocations (some hundred megabytes) come on top.
    CPU   private writable memory (VmData) mapped beyond what the process has after its imports: the same tensors, the
          threads that training starts, and the heap's own waste. Counted in address space, not in resident pages.

Beyond it PyTorch raises what it raises when the machine itself is full, and `failures` can't tell the difference.
"""

import ctypes
import resource
from pathlib import Path

M_TOP_PAD = -2  # malloc.h
CGROUP = Path("/sys/fs/cgroup")


def limit(limit_bytes: int, *, is_gpu: bool) -> None:
    """Let this process take `limit_bytes` from now on. Call it after the imports and before anything is loaded."""
    if is_gpu:
        import torch

        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(limit_bytes / total_bytes, 1.0))
        return
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)  # what imports freed would otherwise be room that is not counted
    libc.mallopt(M_TOP_PAD, 2**20)  # nor may the heap take more than it needs: `environment` lets it grow in strides
    most = mapped_bytes() + limit_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def mapped_bytes() -> int:
    """This process's private writable mappings, which RLIMIT_DATA bounds."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmData")


def available_bytes() -> int:
    """What the host, and the container this may run in, still have for this process."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        most, used = (int((CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no second version of cgroups, or "max": no limit
        return available
    return min(available, most - used + _reclaimable_bytes())


def _reclaimable_bytes() -> int:
    """Of what a container uses, what the kernel takes back when asked: files read and written lately, above all."""
    try:
        lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    stat = {name: int(number) for name, number in (line.split() for line in lines)}
    return stat.get("inactive_file", 0) + stat.get("slab_reclaimable", 0)
