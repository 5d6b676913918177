"""This host's copies of what an object store holds: whole, bounded, safe for any number of processes.

    cache/<location, '/' written as '+'>/    one file or checkpoint, renamed here once it is complete and on disk
    cache/.tmp-…/                            being filled or being removed; a crash leaves it behind, and it is garbage
    cache/.locks/                            who fills, hands out or evicts which entry

Never the only copy of anything: all of it may be deleted at any time while nothing runs.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from shared.checkpoint_files import TEMPORARY_PREFIX
from shared.disk import make_folder, sync
from shared.storage.base import StorageFull, last_change

log = logging.getLogger(__name__)

RECENT_S = 3600.0
"""An entry handed out this recently may be in use, and stays unless the disk itself is full."""
SPARE_BYTES = 64 * 2**20
"""Left free on the disk, for everybody's logs and databases."""
LOCKS = 64
"""Entries share this many lock files, so that no lock file ever has to be removed."""

Room = Callable[[int], None]
"""Makes room for that many bytes, or raises StorageFull."""


class DownloadCache:
    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._root = root
        self._limit_bytes = limit_bytes

    def obtain(
        self,
        location: str,
        *,
        fill: Callable[[Path, Room], None],
        check: Callable[[Path], object],
        keep_in: Path | None,
    ) -> Path:
        """The entry's folder, filled if there is none: by one process, while others who want it wait.

        Args:
            fill: downloads into an empty folder and raises if what came is not whole.
            check: raises if an entry from earlier can't be used; it is filled again then.
            keep_in: where to make hard links that outlive the entry; the folder returned, if given.
        """
        entry = self._entry(location)
        with self._lock(location) as lock:
            if entry.is_dir():
                try:
                    check(entry)
                except Exception as error:
                    log.warning("the cached copy of %s is fetched again: %s", location, error)
                    self._remove(entry)
            if not entry.is_dir():
                self._fill(entry, lambda folder: fill(folder, lambda needed: self._make_room(needed, lock)))
            os.utime(entry)  # used now
            return entry if keep_in is None else _link(entry, keep_in)

    def adopt(self, location: str, folder: Path) -> None:
        """Take over a folder that is already on this file system, complete and synced. Gone afterwards, either way."""
        entry = self._entry(location)
        try:
            with self._lock(location) as lock:
                if not entry.is_dir():
                    # It takes no room on the disk that it did not take before: only the budget counts.
                    self._make_room(0, lock, adopted_bytes=_size(folder))
                    folder.rename(entry)
                    os.utime(entry)
        except (OSError, StorageFull) as error:
            log.warning("%s is not kept in the cache: %s", location, error)
        shutil.rmtree(folder, ignore_errors=True)

    def drop(self, location: str) -> None:
        """Forget an entry and all below it, except what somebody is fetching at this moment."""
        name = self._entry(location).name
        for entry in self._entries():
            if entry.name == name or entry.name.startswith(f"{name}+"):
                self._evict(entry, None)

    def clear_leftovers(self, older_than_s: float) -> None:
        """Remove what fetches and removals that were cut off left behind."""
        for leftover in self._root.glob(f"{TEMPORARY_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - last_change(leftover) >= older_than_s:
                    shutil.rmtree(leftover, ignore_errors=True)

    def _fill(self, entry: Path, fill: Callable[[Path], None]) -> None:
        temporary = self._temporary()
        try:
            fill(temporary)
            for path in temporary.iterdir():
                sync(path)  # a later hit trusts the size alone, and after a power cut the size alone may be right
            sync(temporary)
            temporary.rename(entry)
            sync(entry.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _make_room(self, needed_bytes: int, held: int, *, adopted_bytes: int = 0) -> None:
        """Evict from the least recently used on: old ones for the budget, any if the disk itself is short."""
        entries = sorted(self._usage())
        total = sum(size for _, size, _ in entries) + needed_bytes + adopted_bytes
        for used_at, size, entry in entries:
            short = self._free_bytes() < needed_bytes + SPARE_BYTES
            recent = time.time() - used_at < RECENT_S
            if not short and (total <= self._limit_bytes or recent):
                break
            if self._evict(entry, held):
                total -= size
        if needed_bytes and (free := self._free_bytes()) < needed_bytes + SPARE_BYTES:
            raise StorageFull(
                f"this host needs {needed_bytes / 2**20:.0f} MiB and {SPARE_BYTES / 2**20:.0f} MiB to spare for a copy "
                f"from the object store, but only {free / 2**20:.0f} MiB are free in {self._root}"
            )

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._root).free

    def _usage(self) -> Iterator[tuple[float, int, Path]]:
        """(when it was last used, bytes, folder) of each entry."""
        for entry in self._entries():
            with contextlib.suppress(FileNotFoundError):
                yield entry.stat().st_mtime, _size(entry), entry

    def _evict(self, entry: Path, held: int | None) -> bool:
        """Remove an entry unless somebody fetches it or hands it out. `held` is the lock this process has already."""
        number = _lock_number(entry.name)
        if number == held:
            self._remove(entry)
            return True
        with (self._root / ".locks" / str(number)).open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self._remove(entry)
            return True

    def _remove(self, entry: Path) -> None:
        """Renamed away first, so that nobody finds half of it."""
        doomed = self._temporary()
        with contextlib.suppress(FileNotFoundError):
            entry.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _temporary(self) -> Path:
        make_folder(self._root)
        return Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=self._root))

    def _entries(self) -> list[Path]:
        return [path for path in self._root.glob("*") if not path.name.startswith(".")]

    def _entry(self, location: str) -> Path:
        return self._root / location.replace("/", "+")

    @contextlib.contextmanager
    def _lock(self, location: str) -> Iterator[int]:
        number = _lock_number(self._entry(location).name)
        make_folder(self._root / ".locks")
        with (self._root / ".locks" / str(number)).open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # released when the stream is closed, by a crash too
            yield number


def _lock_number(name: str) -> int:
    return hashlib.sha256(name.encode()).digest()[0] % LOCKS


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _link(entry: Path, target: Path) -> Path:
    """Fill `target` with hard links to the entry's files: no bytes are copied, and they stay when the entry goes."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in entry.iterdir():
        os.link(path, target / path.name)
    return target
