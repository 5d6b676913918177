"""What the kernel killed for want of memory: the one death a trainer can't report itself."""

from pathlib import Path

from shared.trainer_protocol import Failed

KILLED = Failed(
    code="out_of_memory",
    message="The kernel killed the trainer because the host ran out of memory; use a smaller base model, a shorter "
    "training.max_seq_length, or a machine with more memory.",
)
"""What a trainer would have said."""


def kills(vmstat: Path = Path("/proc/vmstat")) -> int:
    """Processes that the kernel has killed for memory since the host started, in containers too; 0 if it won't say.

    A trainer that died by SIGKILL while this grew is taken for one of them. If it was another process, the price of
    the mistake is a smaller micro-batch.
    """
    try:
        lines = vmstat.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
