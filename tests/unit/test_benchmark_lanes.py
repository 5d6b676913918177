"""Benchmarks side by side: who runs beside whom, on what, and that nothing is left of one whose time is up."""

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.lanes import read, run, shares_of
from tests.waiting import is_alive


def test_lanes_run_beside_each_other_and_their_commands_in_turn(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    show = (
        f"{sys.executable} -c 'import os; print(sorted(os.sched_getaffinity(0)), os.environ[\"CUDA_VISIBLE_DEVICES\"])'"
    )
    plan = read(
        f"""
        # both must wait for the other: neither ends alone
        0   20 one    until test -e $OUT/other.began; do sleep 0.05; done; touch $OUT/one.ended; {show}
        1b  20 other  touch $OUT/other.began; until test -e $OUT/one.ended; do sleep 0.05; done
        0   20 after  test -e $OUT/one.ended && {show}
        12  20 fails  false
        """
    )
    assert not run(plan, tmp_path, limit_s=30)
    (tmp_path / "one.ended").unlink()
    assert run(plan[:3], tmp_path, limit_s=30)
    assert [entry.gpus for entry in plan] == ["0", "1", "0", "1,2"]
    said = (tmp_path / "after.log").read_text().split()
    assert said[-1] == "0"
    assert " ".join(said[:-1]) == str(shares_of(cores, 2)[0])


def test_what_is_below_a_line_waits_for_all_above_it(tmp_path: Path) -> None:
    plan = read("0 20 slow sleep 1; touch $OUT/slow.ended\n1 20 quick true\n---\n01 20 last test -e $OUT/slow.ended")
    assert run(plan, tmp_path, limit_s=30)


def test_what_runs_late_is_killed_with_all_that_it_started_wherever_that_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = tmp_path / "away.py"
    away.write_text("import os, time\nos.setsid()\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)\n")
    plan = read(f"0 5 late cd {tmp_path}; {sys.executable} {away} & sleep 60\n0 2 next sleep 60\n0 2 never true")
    began_s = time.monotonic()
    assert not run(plan, tmp_path, limit_s=6)
    assert time.monotonic() - began_s < 15
    assert not is_alive(int((tmp_path / "pid").read_text()))
    told = capsys.readouterr().out.splitlines()
    assert [line.split(" after")[0] for line in told] == ["late: timeout", "next: timeout", "never: no time left"]


@pytest.mark.parametrize(
    "line", ["0 10 name", "a 10 name true", "0 10 twice true\n1 10 twice true", "0 soon name true"]
)
def test_a_plan_that_says_too_little_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        read(line)


def test_cores_are_shared_out_evenly() -> None:
    assert shares_of([0, 1, 2, 3, 8], 2) == [[0, 1], [2, 3]]
    assert shares_of([4], 3) == [[4]] * 3
