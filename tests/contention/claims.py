"""Claimers that all want the oldest job: each job is taken once, and nobody takes a young one before an old one."""

import time
from typing import Any

from sqlalchemy import select

from shared import jobs
from shared.db import reading, transaction
from shared.models import Job
from tests.contention.service import Barrier, add_file, add_jobs, at_once


def run(claimers: int, count: int) -> dict[str, Any]:
    """`claimers` processes that claim until nothing waits, `count` jobs for all of them together."""
    job_ids = add_jobs(add_file(b'{"prompt": "a", "completion": "b"}\n'), count)

    def claim(number: int) -> Any:
        def work(barrier: Barrier) -> tuple[list[str], int]:
            claimed = []
            barrier.wait()
            while True:
                with transaction() as session:
                    job = jobs.claim_next(session, f"claimer-{number}", 3600)
                if job is None:
                    with reading() as session:
                        return claimed, jobs.count_claimable(session)
                claimed.append(job.id)

        return work

    began = time.monotonic()
    answers: list[tuple[list[str], int]] = at_once(*[claim(number) for number in range(claimers)])
    taken = [claimed for claimed, _ in answers]
    took_s = time.monotonic() - began
    age = {job_id: number for number, job_id in enumerate(job_ids)}
    everything = [job_id for claimed in taken for job_id in claimed]
    problems = []
    if sorted(everything) != sorted(job_ids):
        problems.append(f"{len(everything)} claims, {len(set(everything))} of different jobs, {count} jobs")
    for number, claimed in enumerate(taken):
        if sorted(claimed, key=age.__getitem__) != claimed:
            problems.append(f"claimer {number} took a young job before an old one")
    for number, (_, waiting) in enumerate(answers):
        if waiting >= claimers:  # each of the others may hold one that it has not committed yet
            problems.append(f"claimer {number} was told that nothing waits while {waiting} jobs waited")
    with reading() as session:
        rows = session.execute(select(Job.id, Job.status, Job.fence, Job.worker).where(Job.id.in_(job_ids))).all()
    owner = {job_id: f"claimer-{number}" for number, claimed in enumerate(taken) for job_id in claimed}
    for job_id, status, fence, worker in rows:
        if (status, fence, worker) != ("running", 1, owner.get(job_id)):
            problems.append(f"job {job_id} is {status}, claim {fence} of {worker}; {owner.get(job_id)} claimed it")
    return {
        "claimers": claimers,
        "jobs": count,
        "claims_by_claimer": [len(claimed) for claimed in taken],
        "claims_per_s": round(count / took_s, 1),
        "problems": problems,
    }
