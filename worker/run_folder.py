"""What a job leaves on the host that runs it. Never the only copy of anything but logs and offline runs of wandb.

run_dir/jobs/<job>/lock                 held by the trainer that runs
run_dir/jobs/<job>/trainer-<fence>.log  what one attempt's libraries printed, capped
run_dir/jobs/<job>/wandb…               what `worker.wandb_feed` keeps: offline runs, the log of its process
run_dir/jobs/<job>/<fence>/             scratch of one claim
run_dir/standby/<name>/                 scratch of a trainer started ahead (`worker.standby`)
run_dir/caches/                         what runs share: tokenised rows, compiled kernels
"""

import shutil
import time
from contextlib import suppress
from pathlib import Path

from shared.settings import Settings
from worker.host_lock import is_locked

LOGS_KEPT_S = 7 * 86_400.0
"""How long a job's folder stays after anything in it changed: long enough to look into last week's failures."""


class RunFolder:
    """The folder of one claim."""

    def __init__(self, settings: Settings, job_id: str, fence: int) -> None:
        self._job = settings.run_dir / "jobs" / job_id
        self._fence = fence

    @property
    def job(self) -> Path:
        """Of all claims."""
        return self._job

    @property
    def lock(self) -> Path:
        return self._job / "lock"

    @property
    def trainer_log(self) -> Path:
        return self._job / f"trainer-{self._fence}.log"

    @property
    def work(self) -> Path:
        return self._job / str(self._fence)

    def clear(self) -> None:
        """Remove the scratch of this claim and of earlier ones; a later one's is not ours to touch."""
        for fence in range(1, self._fence + 1):
            shutil.rmtree(self._job / str(fence), ignore_errors=True)


def standbys(settings: Settings) -> Path:
    """Scratch folders of trainers started ahead."""
    return settings.run_dir / "standby"


def caches(settings: Settings) -> Path:
    """What the next run needs not do again. May be deleted while no trainer lives."""
    return settings.run_dir / "caches"


def forget_old(settings: Settings, kept_s: float = LOGS_KEPT_S) -> None:
    """Remove the folders of jobs that have not run here for long. One that runs may be silent for weeks."""
    for folder in (settings.run_dir / "jobs").glob("*"):
        with suppress(FileNotFoundError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - newest > kept_s and not is_locked(folder / "lock"):
                shutil.rmtree(folder, ignore_errors=True)
