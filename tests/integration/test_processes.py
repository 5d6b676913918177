"""Supervision with small programs in the place of the service's: what happens when they die, hang, multiply or talk."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli import processes
from cli.processes import Child, ChildSpec, GaveUp, rotate
from tests.waiting import is_alive, wait_until

SHIM = Path(processes.__file__).with_name("child.py")


@pytest.fixture
def make_child(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    made: list[Child] = []

    def make(program: str, *, heartbeat: Path | None = None, stop_s: float = 5) -> Child:
        log = tmp_path / f"{len(made)}.log"
        child = Child(ChildSpec(f"child-{len(made)}", [sys.executable, "-c", program], log, stop_s, heartbeat))
        made.append(child)
        child.start()
        return child

    yield make
    for child in made:
        child.kill()


def read_pid(log: Path) -> int:
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
    return int(log.read_text().split()[-1])


def test_a_child_that_dies_is_started_again(make_child: Callable[..., Child]) -> None:
    child = make_child("import time; time.sleep(60)")
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    events: list[str] = []
    wait_until(lambda: events.append(child.tend() or "") or (child.pid not in (None, first)))
    assert "killed by SIGKILL; starting again in 0.5 s" in "".join(events)


def test_a_child_that_keeps_dying_is_given_up_with_the_end_of_its_log(
    make_child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "FIRST_BACKOFF_S", 0.001)
    child = make_child("raise SystemExit('the model folder is empty')")
    with pytest.raises(GaveUp, match=r"died 5 times within 60 s.*exit status 1(?s:.*)the model folder is empty"):
        wait_until(lambda: child.tend() and False)


def test_a_stopped_process_is_killed_and_started_again(
    make_child: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SILENT_AFTER_S", 0.5)
    beat = tmp_path / "beat"
    child = make_child(
        f"import pathlib, time\nwhile True: pathlib.Path({str(beat)!r}).touch(); time.sleep(0.02)", heartbeat=beat
    )
    wait_until(lambda: child.tend() or beat.exists())
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    events: list[str] = []
    wait_until(lambda: events.append(child.tend() or "") or (child.pid not in (None, first)))
    assert "said nothing for" in "".join(events)
    assert not is_alive(first)


def test_our_own_pause_is_not_held_against_the_children(
    make_child: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-Z on `anneal up`, or a laptop that slept: the children's beats stood still because everything did."""
    monkeypatch.setattr(processes, "SILENT_AFTER_S", 2.0)
    beat = tmp_path / "beat"
    beat.touch()
    child = make_child("import time; time.sleep(60)", heartbeat=None)
    child.spec = ChildSpec("slept", child.spec.command, child.spec.log, 5, beat)
    first = child.pid
    child.tend()
    child._looked_at -= 3600
    assert child.tend() is None
    assert child.pid == first


def test_a_kill_reaches_grandchildren_in_sessions_of_their_own(make_child: Callable[..., Child]) -> None:
    child = make_child(
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    grandchild = read_pid(child.spec.log)
    child.kill()
    wait_until(lambda: not is_alive(grandchild))


def test_what_a_dead_child_leaves_is_adopted_and_ended(tmp_path: Path) -> None:
    """In a process of its own: being the parent of orphans is for life."""
    program = f"""
import sys, time, pathlib
from cli.processes import Child, ChildSpec, adopt_orphans, kill_orphans
adopt_orphans()
log = pathlib.Path({str(tmp_path / "log")!r})
inner = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']," \\
        " start_new_session=True); print(p.pid, flush=True)"
child = Child(ChildSpec("leaver", [sys.executable, "-c", inner], log, 5))
child.start()
while not child.has_exited(): time.sleep(0.02)
found = kill_orphans([child])
time.sleep(0.2)
print(found, kill_orphans([child]), kill_orphans([child]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split()[0] == "1"
    assert done.stdout.split()[-1] == "0"
    assert not is_alive(int((tmp_path / "log").read_text()))


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = f"""
import sys, time, pathlib
from cli.processes import Child, ChildSpec
child = Child(ChildSpec("c", [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"],
                        pathlib.Path({str(tmp_path / "log")!r}), 5))
child.start()
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    pid = read_pid(tmp_path / "log")
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_alive(pid), 5)


def test_the_shim_does_not_start_a_command_whose_parent_is_gone() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SHIM), "1", "echo", "started"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "its parent 1 is gone" in done.stderr


def test_a_child_gets_its_signals_unblocked(make_child: Callable[..., Child]) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    try:
        child = make_child("import signal; print(len(signal.pthread_sigmask(signal.SIG_BLOCK, [])), flush=True)")
        assert read_pid(child.spec.log) == 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_log_is_cut_while_its_writer_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"old" * 1000 + b"newest")
        rotate(log, limit_bytes=1000)
        writer.write(b"after")
    assert log.read_bytes() == b"after"
    kept = (tmp_path / "api.log.1").read_bytes()
    assert len(kept) == 1000
    assert kept.endswith(b"newest")
