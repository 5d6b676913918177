"""The environment a trainer process must be born with: settings that libraries read before any of our code runs.

`trainer_environment` is used by the supervisor, which starts trainers, and by `__main__`, which restarts itself
when it was started by hand without them. Imports nothing heavy.
"""

import ctypes
from collections.abc import Mapping

MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc keeps freed activations instead of returning them to the kernel, which would zero their pages again at each
step: the difference between 290 and 360 tokens/s on two cores."""

THREADS = {"GOMP_SPINCOUNT": "100000"}
"""Waiting threads spin for some microseconds and then sleep. Spinning without end keeps the thread that is waited for
off its core when another process is busy (a step took five times as long); sleeping at once cost a sixth of the speed
on an idle machine (199 against 238 tokens/s on two cores).

They are not bound to cores (OMP_PROC_BIND). The API, the broker and the database are on the same host, and a bound
thread can't leave the core that one of them takes: all the others would wait for it at the end of each product, where
the scheduler moves it within a moment. Binding wins where one job has the whole host; there the operator may set it."""

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}
"""A trainer reads local folders only. These win over what the operator set."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""One GPU: with several in sight the Trainer would split each batch among threads."""
GPUS_IN_SIGHT = "ANNEAL_GPUS_IN_SIGHT"
"""What `VISIBLE` was for the worker, whose GPUs a job may ask for; `ALL_GPUS` if it was not set."""
ALL_GPUS = "all"

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}

SUPERVISED_BY = "ANNEAL_SUPERVISED_BY"
"""The supervisor's process id, so that a trainer can tell whether its parent is still that one."""

UNSAFE = ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",)
"""Would let the pickles of a checkpoint run code when it is resumed from."""

SECRETS = (
    *("ANNEAL_API_KEY", "ANNEAL_DATABASE_URL", "ANNEAL_REDIS_URL", "ANNEAL_STORAGE_URL"),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
)
SECRET_PREFIXES = ("AWS_", "WANDB_")
"""Nothing a trainer does needs these, so a crash dump of one can't hold them."""


CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Compiled kernels, named by what they were compiled from: the next run on this host needs not compile them again."""


def cache_environment(cache_dir: str | None) -> dict[str, str]:
    """Where kernels are kept, for `trainer_environment` to be laid over: the operator's own choice wins."""
    return {} if cache_dir is None else {name: f"{cache_dir}/{folder}" for name, folder in CACHES.items()}


def gpus_of(in_sight: str | None, count: int) -> list[str]:
    """The GPUs of a list as `VISIBLE` takes it, on a machine with `count` of them. As CUDA reads it, a number that is
    no GPU ends the list."""
    if in_sight is None or in_sight == ALL_GPUS:
        return [str(number) for number in range(count)]
    found: list[str] = []
    for name in in_sight.split(",") if count else ():
        if not name.strip() or (name.strip().lstrip("-").isdigit() and not 0 <= int(name) < count):
            break
        found.append(name.strip())
    return found


def count_gpus() -> int:
    """As the driver says: torch would take seconds to be imported, and would then keep the GPUs it saw."""
    try:
        driver = ctypes.CDLL("libnvidia-ml.so.1")
        number = ctypes.c_uint(0)
        if driver.nvmlInit_v2():
            return 0
        failed = driver.nvmlDeviceGetCount_v2(ctypes.byref(number))
        driver.nvmlShutdown()  # or it would go on saying what it has found the first time
        return 0 if failed else number.value
    except (OSError, AttributeError):
        return 0


def trainer_environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base` with what a trainer needs added and what it must not know removed. Applying it twice changes nothing.

    Malloc, thread and verbosity settings already in `base` are kept, so that an operator can tune them. Of several
    GPUs in sight the first stays; a trainer that is to use more finds them in `GPUS_IN_SIGHT`.
    """
    dropped = (*SECRETS, *UNSAFE)
    kept = {name: value for name, value in base.items() if name not in dropped and not name.startswith(SECRET_PREFIXES)}
    in_sight = base.get(GPUS_IN_SIGHT, base.get(VISIBLE, ALL_GPUS))
    one = "0" if in_sight == ALL_GPUS else in_sight.split(",")[0]
    gpus = {GPUS_IN_SIGHT: in_sight, VISIBLE: base[VISIBLE] if GPUS_IN_SIGHT in base and VISIBLE in base else one}
    return {**MALLOC, **THREADS, **QUIET, **kept, **gpus, **OFFLINE}
