"""Which engine serves: `ANNEAL_ENGINE`. Imports one only when it was chosen."""

from pathlib import Path

from shared.settings import Settings
from worker.generation.engine import Backend


def make_backend(settings: Settings) -> Backend:
    """The backend the operator chose.

    Raises:
        ValueError: it can't run here (`Settings.engine_problem`).
    """
    if (problem := settings.engine_problem) is not None:
        raise ValueError(problem)
    if settings.engine == "vllm" or (settings.engine == "auto" and settings.vllm_python and has_gpu()):
        from worker.generation.vllm_engine import VllmBackend

        return VllmBackend(settings)
    from worker.generation.transformers_engine import TransformersBackend

    return TransformersBackend(settings)


def has_gpu() -> bool:
    """Whether this host has an NVIDIA GPU, found out without torch."""
    return Path("/dev/nvidiactl").exists()
