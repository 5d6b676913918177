"""Effects on files: what the product does below the data folder, through `os`, `open` and `shutil`.

A buffered file passes a point at every write(2); what a library writes without Python is not seen.
"""

# ruff: noqa: PTH100, PTH110, PTH115, PTH118

import builtins
import errno
import io
import json
import os
from collections.abc import Callable
from typing import Any

from shared.trainer_protocol import PROTOCOL_FD
from tests.failpoints.ledger import Ledger
from tests.failpoints.points import Points

_open, _os_open, _os_write = io.open, os.open, os.write


def _no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _broken_device() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


NEEDS_SPACE: dict[str, Callable[[], BaseException]] = {
    "no space": _no_space,  # once: somebody makes room at once
    "disk full": _no_space,  # for a while
    "device error": _broken_device,
}
NEEDS_DEVICE: dict[str, Callable[[], BaseException]] = {"device error": _broken_device}


def install(points: Points, ledger: Ledger) -> None:
    """Replace them in this process and its forked children."""
    _install_paths(points, ledger)
    _install_opening(points, ledger)
    _install_writing(points, ledger)


def path_of(path: Any, dir_fd: int | None = None) -> str:
    """Absolute, without following a last link; a descriptor's own path."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    text = os.fsdecode(path)
    if dir_fd is not None:
        return os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
    return os.path.abspath(text)


def _install_paths(points: Points, ledger: Ledger) -> None:
    def one_path(name: str, errors: dict[str, Callable[[], BaseException]], note: Callable[[str], None]) -> None:
        real = getattr(os, name)

        def hooked(path: Any, *args: Any, **kwargs: Any) -> Any:
            full = path_of(path, kwargs.get("dir_fd"))
            if not points.covers(full):
                return real(path, *args, **kwargs)

            def perform() -> Any:
                result = real(path, *args, **kwargs)
                note(full)
                return result

            return points.at(name, points.shown(full), perform, errors=errors)

        setattr(os, name, hooked)

    def two_paths(name: str) -> None:
        real = getattr(os, name)

        def hooked(source: Any, target: Any, **kwargs: Any) -> Any:
            after = path_of(target, kwargs.get("dst_dir_fd"))
            if not points.covers(after):
                return real(source, target, **kwargs)

            def perform() -> Any:
                result = real(source, target, **kwargs)
                ledger.entry_changed(after)
                return result

            return points.at(name, points.shown(after), perform, errors=NEEDS_SPACE | NEEDS_DEVICE)

        setattr(os, name, hooked)

    one_path("mkdir", NEEDS_SPACE, ledger.entry_changed)
    for name in ("unlink", "remove", "rmdir"):
        one_path(name, NEEDS_DEVICE, lambda path: None)
    for name in ("truncate",):
        one_path(name, NEEDS_DEVICE, ledger.content_changed)
    for name in ("rename", "replace", "link"):
        two_paths(name)
    for name in ("fsync", "fdatasync"):
        _hook_sync(points, ledger, name)


def _hook_sync(points: Points, ledger: Ledger, name: str) -> None:
    real = getattr(os, name)

    def hooked(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        full = path_of(number)
        if not points.covers(full):
            real(descriptor)
            return

        def perform() -> None:
            real(descriptor)
            ledger.synced(number)

        points.at(name, points.shown(full), perform, errors=NEEDS_DEVICE)

    setattr(os, name, hooked)


def _install_opening(points: Points, ledger: Ledger) -> None:
    class Watched(io.FileIO):
        """A file whose every write(2) is a point."""

        def write(self, data: Any, /) -> Any:
            content = bytes(data)
            path = path_of(self.fileno())

            def perform() -> Any:
                written = io.FileIO.write(self, content)
                ledger.content_changed(path)
                return written

            return points.at(
                "write",
                points.shown(path),
                perform,
                errors=NEEDS_SPACE,
                tear=lambda: io.FileIO.write(self, content[: len(content) // 2]),
            )

    def hooked(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        plain = not set(mode) & set("wax+")
        path = "" if plain else path_of(file)
        if plain or not points.covers(path):
            return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)

        def perform() -> Watched:
            is_new = not os.path.exists(path)
            raw = Watched(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if is_new:
                ledger.entry_changed(path)
            if "w" in mode:
                ledger.content_changed(path)
            return raw

        if isinstance(file, int):
            raw = perform()
        else:
            raw = points.at("create", points.shown(path), perform, errors=NEEDS_SPACE)
        if buffering == 0:
            return raw
        size = io.DEFAULT_BUFFER_SIZE if buffering < 2 else buffering
        buffered = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
        text.mode = mode  # type: ignore[misc] # as open() does
        return text

    def hooked_os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        full = path_of(path, dir_fd) if flags & os.O_CREAT else ""
        if not points.covers(full):
            return _os_open(path, flags, mode, dir_fd=dir_fd)

        def perform() -> int:
            is_new = not os.path.exists(full)
            descriptor = _os_open(path, flags, mode, dir_fd=dir_fd)
            if is_new:
                ledger.entry_changed(full)
            return descriptor

        return points.at("create", points.shown(full), perform, errors=NEEDS_SPACE)

    io.open = hooked  # type: ignore[assignment]
    builtins.open = hooked  # type: ignore[assignment]
    os.open = hooked_os_open


def _install_writing(points: Points, ledger: Ledger) -> None:
    def target_of(descriptor: int) -> str | None:
        """What a bare write touches: a file of ours, or the protocol's pipe."""
        if str(descriptor) == os.environ.get(PROTOCOL_FD) and points.role == "trainer":
            return ""
        path = path_of(descriptor)
        return points.shown(path) if points.covers(path) else None

    def hooked_write(descriptor: int, data: Any, /) -> int:
        content = bytes(data)
        target = target_of(descriptor)
        if target is None or content.startswith(b'{"type":"alive"'):
            return _os_write(descriptor, content)
        is_message = target == ""
        if is_message:
            _demand_durable(points, ledger, content)

        def perform() -> int:
            written = _os_write(descriptor, content)
            if not is_message:
                ledger.content_changed(path_of(descriptor))
            return written

        return points.at(
            "report" if is_message else "write",
            _kind(content) if is_message else target,
            perform,
            errors={} if is_message else NEEDS_SPACE,
            tear=lambda: _os_write(descriptor, content[: len(content) // 2]),
        )

    real_pwrite = os.pwrite

    def hooked_pwrite(descriptor: int, data: Any, offset: int, /) -> int:
        path = path_of(descriptor)
        if not points.covers(path):
            return real_pwrite(descriptor, data, offset)
        return points.at(
            "write",
            points.shown(path),
            lambda: real_pwrite(descriptor, data, offset),
            errors=NEEDS_SPACE,
            tear=lambda: real_pwrite(descriptor, bytes(data)[: len(data) // 2], offset),
        )

    os.write = hooked_write
    os.pwrite = hooked_pwrite


def _kind(line: bytes) -> str:
    try:
        return str(json.loads(line)["type"])
    except (ValueError, KeyError, TypeError):
        return "something"


def _demand_durable(points: Points, ledger: Ledger, line: bytes) -> None:
    """A trainer that reports a checkpoint in its final place says that a power cut can't take it back."""
    if _kind(line) == "checkpoint":
        path = str(json.loads(line)["path"])
        if path.startswith(f"{points.root}storage{os.sep}"):  # elsewhere it is staged, to be uploaded
            ledger.demand_tree(path, "is reported as published")
