"""A small campaign, so that the harness works on the day it is needed; and what it promises about its seed."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

from tests.campaign import plan, procfs
from tests.campaign.toy_model import ToyModel, reference


def test_a_small_campaign_finds_nothing_wrong(tmp_path: Path) -> None:
    least = {"faults": 25, "jobs": 8, "batches": 4}
    options = {"seed": 20, "wait": 0.4, "generators": 1, "garbage-age": 20, "out": tmp_path, **least}
    command = [sys.executable, "-m", "tests.campaign"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("SEED=20\n")
    verdict = json.loads((tmp_path / "campaign_toy_sqlite.json").read_text())
    assert verdict["good"] and not any(verdict["bad_outcomes"].values())
    assert verdict["jobs"]["count"] >= 8
    assert verdict["faults"]["count"] == 25
    batches = verdict["batches"]
    assert batches["count"] >= 4 and batches["ends"]["completed"] and batches["lines_seen_recorded"]
    assert batches["questions"] >= batches["results"]["answer"]
    assert verdict["chats"]["outcomes"]["answer"]
    clients = verdict["clients"]
    assert clients["keys"] and clients["uploads"]["expired"] and clients["files_compared"] >= 8
    # Three of the first eight jobs; a slow machine sees more of both.
    assert sum(clients["pauses_answered"].values()) == clients["pauses_planned"] >= 3
    log = [json.loads(line) for line in (tmp_path / "campaign_toy_sqlite_faults.log").read_text().splitlines()]
    assert [fault["number"] for fault in log] == list(range(1, 26))
    assert {"at", "action", "role", "pid"} <= set(log[0])


def test_a_seed_gives_the_same_jobs_and_faults_again() -> None:
    assert [plan.toy_job(3, n) for n in range(20)] == [plan.toy_job(3, n) for n in range(20)]
    assert plan.toy_job(3, 1) != plan.toy_job(4, 1)

    def drawn(seed: int) -> list[plan.FaultPlan]:
        endless = plan.faults(seed, lease_s=4, mean_wait_s=1, weights=plan.FAULTS)
        return list(itertools.islice(endless, 200))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert {(fault.action, fault.role) for fault in drawn(1)} >= {("kill", "trainer"), ("stop", "supervisor")}
    assert any(fault.is_alone for fault in drawn(1))


def test_clients_have_every_habit() -> None:
    jobs = [plan.toy_job(1, number) for number in range(200)]
    assert {job.retry for job in jobs} == {"looks", "key", "counts"}
    assert {job.is_sent_in_parts for job in jobs} == {job.is_cancelled_paused for job in jobs} == {True, False}
    assert {0.5, 5.0, 20.0} == {
        next(most for _, most in sorted(plan.PAUSED_FOR_S.values()) if job.paused_for_s <= most)
        for job in jobs
        if job.pause_after_s is not None
    }
    assert any("priority" in job.training for job in jobs)
    assert all(job.cancel_after_s is None for job in jobs if job.pause_after_s is not None)


def test_a_toy_that_forgets_any_part_of_its_state_ends_elsewhere() -> None:
    undisturbed = reference(1, b"data", 10)
    for forgotten in (None, "optimizer.pt", "rng_state.pth", "trainer_state.json", "weights"):
        first = ToyModel(1, b"data")
        for _ in range(4):
            first.train_step()
        fresh = ToyModel(1, b"data")
        files = fresh.resume_files() | {n: c for n, c in first.resume_files().items() if n != forgotten}
        second = ToyModel(1, b"data")
        second.load_resume_files(files, first.tokens)
        if forgotten != "weights":
            second.load_weights(first.weights_file())
        losses = []
        for _ in range(6):
            second.train_step()
            losses.append(second.loss)
        assert (losses == undisturbed.losses[4:]) == (forgotten is None), forgotten


def test_a_process_is_told_from_another_with_the_same_number() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    seen = procfs.look(child.pid)
    assert seen is not None and procfs.runs(seen.process)
    stranger = procfs.Process(child.pid, seen.process.started_ticks - 1)
    assert not procfs.lives(stranger)
    child.send_signal(19)
    while procfs.runs(seen.process):
        pass
    assert procfs.lives(seen.process), "stopped, not gone"
    child.kill()
    child.wait()
    assert not procfs.lives(seen.process)
