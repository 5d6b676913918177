"""The environment a trainer process must be born with: settings that libraries read before any of our code runs.

`trainer_environment` is used by the supervisor, which starts trainers, and by `__main__`, which restarts itself
when it was started by hand without them. Imports nothing heavy.
"""

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
on an idle machine (199 against 238 tokens/s on two cores)."""

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}
"""A trainer reads local folders only. These win over what the operator set."""

ONE_GPU = {"CUDA_VISIBLE_DEVICES": "0"}
"""With several GPUs in sight the Trainer would split each batch among threads. The supervisor chooses the GPU."""

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


def trainer_environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base` with what a trainer needs added and what it must not know removed. Applying it twice changes nothing.

    Malloc, thread, GPU and verbosity settings already in `base` are kept, so that an operator can tune them.
    """
    dropped = (*SECRETS, *UNSAFE)
    kept = {name: value for name, value in base.items() if name not in dropped and not name.startswith(SECRET_PREFIXES)}
    return {**MALLOC, **THREADS, **QUIET, **ONE_GPU, **kept, **OFFLINE}
