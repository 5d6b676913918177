"""What compilers keep between runs, within a bound.

They only ever add, and every new model, library or shape does. A cache that has grown past the bound goes as a whole:
its entries name each other's files, so parts can't be judged by age, and what is missing is compiled again. Not while a
trainer lives on this host, which may be reading. One that is just being started imports for seconds before it looks.
"""

import contextlib
import logging
import shutil
from pathlib import Path

from shared.settings import Settings
from worker import host_lock, run_folder
from worker.training.environment import CACHES

log = logging.getLogger(__name__)

MOST_BYTES = 4 * 2**30
"""Of each compiler."""


def bound(settings: Settings, most_bytes: int = MOST_BYTES) -> None:
    """Remove what has become too large. Safe in any number; a crash leaves the rest for the next one.

    Where the operator has the compilers write elsewhere (`CACHES`), that is left alone.
    """
    for name in CACHES.values():
        folder = run_folder.caches(settings) / name
        doomed = folder.with_name(f".{name}-removed")
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(OSError):  # another worker was first
            if _bytes_in(folder) <= most_bytes or _trainer_lives(settings):
                continue
            folder.rename(doomed)  # so that nobody finds half of it
            log.info("the compiled kernels of %s took more than %d bytes and are removed", name, most_bytes)
            shutil.rmtree(doomed)


def _bytes_in(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def _trainer_lives(settings: Settings) -> bool:
    """Whether somebody holds a job's lock or a standby's folder."""
    held = (*(settings.run_dir / "jobs").glob("*/lock"), *run_folder.standbys(settings).glob("*"))
    return any(host_lock.is_locked(path) for path in held)
