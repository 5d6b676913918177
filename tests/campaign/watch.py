"""Looks at the processes all the time: never two trainers of one job at once, no trainer without its supervisor."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.campaign import procfs
from tests.campaign.faults import Fault

SAMPLE_EVERY_S = 0.05
ORPHAN_AFTER_S = 10.0
"""How long a trainer may outlive a killed supervisor."""


@dataclass
class Watch:
    """Call `look` often; what it finds is in the lists."""

    run_dir: Path
    samples: int = 0
    most_trainers: int = 0
    pairs: list[str] = field(default_factory=list)
    """Two trainers of one job that ran at the same moment."""
    orphans: list[str] = field(default_factory=list)
    _sampled_at: float = 0
    _doomed: list[tuple[float, procfs.Process, int]] = field(default_factory=list)
    _told: set[tuple[procfs.Process, procfs.Process]] = field(default_factory=set)

    def expect_gone(self, fault: Fault) -> None:
        """The trainers of a killed supervisor must be gone after `ORPHAN_AFTER_S`."""
        self._doomed += [(time.monotonic() + ORPHAN_AFTER_S, process, fault.number) for process in fault.trainers]

    def look(self) -> None:
        now = time.monotonic()
        if now - self._sampled_at < SAMPLE_EVERY_S:
            return
        self._sampled_at = now
        self.samples += 1
        by_job: dict[str, list[procfs.Trainer]] = {}
        for trainer in procfs.trainers(self.run_dir):
            by_job.setdefault(trainer.job_id, []).append(trainer)
        self.most_trainers = max(self.most_trainers, sum(map(len, by_job.values())))
        for of_one_job in by_job.values():
            self._compare(of_one_job)
        for at, process, fault in self._doomed:
            if at <= now and procfs.lives(process):
                self.orphans.append(f"trainer {process.pid} lives {ORPHAN_AFTER_S:g} s after fault {fault}")
        self._doomed = [entry for entry in self._doomed if entry[0] > now]

    def _compare(self, of_one_job: list[procfs.Trainer]) -> None:
        for index, first in enumerate(of_one_job):
            for second in of_one_job[index + 1 :]:
                # The first is looked at again after the second, so that both are known to have run at one moment.
                pair = (first.process, second.process)
                if pair in self._told or not (
                    procfs.runs(first.process) and procfs.runs(second.process) and procfs.runs(first.process)
                ):
                    continue
                self._told.add(pair)
                self.pairs.append(
                    f"{first.job_id}: trainers {first.process.pid} (claim {first.fence}) and "
                    f"{second.process.pid} (claim {second.fence}) run at {time.time():.3f}"
                )
