"""Cancel against completion: the owner finishes, a client cancels, the owner obeys, all at the same instant."""

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from shared import jobs
from shared.db import reading, transaction
from shared.models import Job
from tests.contention.service import Barrier, add_file, add_jobs, at_once, problems_of

JITTER_S = 0.004


def run(count: int, seed: int) -> dict[str, Any]:
    """That many races, each about a job of its own."""
    job_ids = add_jobs(add_file(b'{"prompt": "a", "completion": "b"}\n'), count)
    with transaction() as session:
        for _ in job_ids:
            assert jobs.claim_next(session, "owner", 3600) is not None

    def contender(name: str, move: Callable[[Any, str], object]) -> Callable[[Barrier], Counter[str]]:
        def race(barrier: Barrier) -> Counter[str]:
            wait = random.Random(f"{seed}/{name}")
            results: Counter[str] = Counter()
            for job_id in job_ids:
                barrier.wait()
                time.sleep(wait.random() * JITTER_S)  # or the same one would always be first
                try:
                    with transaction() as session:
                        move(session, job_id)
                    results["moved"] += 1
                except (jobs.LeaseLost, jobs.JobConflict) as error:
                    results[type(error).__name__] += 1
            return results

        return race

    began = time.monotonic()
    results = at_once(
        contender("complete", lambda session, job_id: jobs.succeed(session, job_id, 1, fine_tuned_model="m")),
        contender("cancel", lambda session, job_id: jobs.request_cancel(session, "default", job_id)),
        contender("obey", lambda session, job_id: jobs.settle_cancelled(session, job_id, 1)),
    )
    took_s = time.monotonic() - began
    with reading() as session:
        ends = Counter(str(session.get_one(Job, job_id).status) for job_id in job_ids)
    problems = problems_of(job_ids)
    if results[0]["moved"] + results[2]["moved"] != count:
        problems.append(f"{results[0]['moved']} completions and {results[2]['moved']} cancellations of {count} jobs")
    if set(ends) != {"succeeded", "cancelled"}:
        problems.append(f"these races prove nothing, all ended alike: {dict(ends)}")
    return {
        "races": count,
        "ends": dict(ends),
        "complete": dict(results[0]),
        "cancel": dict(results[1]),
        "obey": dict(results[2]),
        "races_per_s": round(count / took_s, 1),
        "problems": problems,
    }
