"""A campaign's verdict as JSON, and as some lines to read."""

import os
import platform
import sqlite3
from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

from tests.campaign import recovery
from tests.campaign.campaign import Campaign
from tests.campaign.verdict import attempts, passed_over, steps_lost

CHECKS = (
    *("lost", "finished_twice", "cancel_broken", "weights_differ", "metrics_wrong", "computed_wrong"),
    *("corrupt_checkpoint", "resume_wrong", "claims_wrong", "events_not_numbered", "stream_wrong", "work_lost"),
    *("two_trainers", "orphan", "orphan_process", "stuck", "garbage", "missing_bytes", "refused", "chat_wrong"),
    *("slow_recovery", "unknown_job", "incomplete", "internal_error"),
    *("paused_wrong", "key_twice", "file_wrong", "upload_wrong"),
    *("batch_lost", "batch_cancel_broken", "batch_counts", "batch_lines", "batch_answers", "batch_files"),
    *("line_lost", "line_twice"),
)


def verdict(campaign: Campaign) -> dict[str, Any]:
    evidence, injector = campaign.evidence, campaign.injector
    struck_s = campaign.times_s.get("struck", 0) - campaign.times_s.get("started", 0)
    found = Counter(finding.check for finding in campaign.findings)
    lost = [steps for job in evidence.jobs for steps in steps_lost(job)]
    return {
        "good": not campaign.findings,
        "options": asdict(campaign.options),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "sqlite": sqlite3.sqlite_version},
        "times_s": campaign.times_s,
        "faults": {
            "count": len(injector.faults),
            "each_second": round(len(injector.faults) / max(struck_s, 1), 2),
            "kinds": dict(sorted(Counter(f"{fault.action} {fault.role}" for fault in injector.faults).items())),
            "that_hit_a_run": sum(fault.job_id is not None for fault in injector.faults),
            "drawn_again": injector.missed,
            "checkpoints_damaged": len(injector.damages),
            "passed_over_for_an_earlier_one": sum(
                passed_over(job, damage)
                for damage in injector.damages
                for job in evidence.jobs
                if job.id == damage.job_id
            ),
            "that_locked_sqlite": sorted(injector.locking),
        },
        "jobs": {
            "count": len(evidence.jobs),
            "ends": dict(Counter(job.status for job in evidence.jobs)),
            "claims": sum(job.fence for job in evidence.jobs),
            "most_claims": max((job.fence for job in evidence.jobs), default=0),
            "resumes": sum("Resumed from step" in e.message for job in evidence.jobs for e in job.events),
            "checkpoints_registered": sum(
                e.message.startswith("Checkpoint created") for j in evidence.jobs for e in j.events
            ),
            "steps_done": sum(len(job.journal) for job in evidence.jobs),
            "attempts": sum(len(attempts(job)) for job in evidence.jobs),
        },
        "work_lost_steps": _spread([float(steps) for steps in lost]),
        "recovery_s": _recovery(campaign),
        "streams": {
            "followed": len(campaign.notebook.followed),
            "connections": sum(followed.connections for followed in campaign.notebook.followed),
            "events": sum(len(followed.numbers) for followed in campaign.notebook.followed),
        },
        "chats": _chats(campaign),
        "batches": _batches(campaign),
        "clients": _clients(campaign),
        "processes": {"samples": campaign.watch.samples, "most_trainers": campaign.watch.most_trainers},
        "bad_outcomes": {check: found.get(check, 0) for check in CHECKS}
        | {c: n for c, n in found.items() if c not in CHECKS},
        "findings": [asdict(finding) for finding in campaign.findings[:200]],
    }


def _clients(campaign: Campaign) -> dict[str, Any]:
    """What they did beside waiting for their jobs."""
    told, evidence = campaign.notebook, campaign.evidence
    twice = {number for number, count in Counter(job.number for job in evidence.jobs).items() if count > 1}
    events = [event.message for job in evidence.jobs for event in job.events]
    return {
        "jobs_sent": dict(Counter(submitted.plan.retry for submitted in told.submitted)),
        "jobs_created_twice": dict(Counter(campaign.plans[number].retry for number in twice)),
        "pauses_planned": sum(one.plan.pause_after_s is not None for one in told.submitted),
        "pauses_answered": dict(Counter(one.pause_answer for one in told.submitted if one.pause_answer)),
        "pauses": sum(message.startswith("Job paused") for message in events),
        "resumes": sum(message.startswith("Job resumed") for message in events),
        "keys": len(told.keyed),
        "uploads": dict(Counter(row.status for row in evidence.uploads)),
        "parts_acknowledged": sum(len(upload.parts) for upload in told.uploads),
        "files_compared": sum(not sent.is_deleted for sent in told.files),
    }


def _recovery(campaign: Campaign) -> dict[str, Any]:
    by_kind = defaultdict(list)
    found = campaign.recoveries()
    for one in found:
        by_kind[f"{one.fault.action} {one.fault.role}"].append(one.seconds)
    limit = recovery.LIMIT_LEASES * campaign.options.lease_s
    slow = [one for one in found if one.seconds >= one.limit_s and one.is_undisturbed]
    return {
        "limit": limit,
        "undisturbed": _spread([one.seconds for one in found if one.is_undisturbed]),
        "all": _spread([one.seconds for one in found]),
        "left_out_because_away": dict(Counter(one.disturbed_by for one in found if one.disturbed_by)),
        "waited_for_a_worker": _spread([one.waited_s for one in found if one.waited_s]),
        **{kind: _spread(values) for kind, values in sorted(by_kind.items())},
        "over_the_limit": [{"fault": one.fault.number, "seconds": round(one.seconds, 2)} for one in slow],
    }


def _spread(values: list[float]) -> dict[str, float]:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {"count": len(values)} | {n: round(recovery.percentile(values, share), 3) for n, share in shares.items()}


def _chats(campaign: Campaign) -> dict[str, Any]:
    chats = campaign.chats
    return {
        "outcomes": dict(Counter(chat.outcome for chat in chats)),
        "took_s": _spread([chat.took_s for chat in chats if chat.outcome == "answer"]),
    }


def _batches(campaign: Campaign) -> dict[str, Any]:
    batches, watch = campaign.evidence.batches, campaign.lines
    cancelled = [batch for batch in batches if batch.status == "cancelled"]
    return {
        "count": len(batches),
        "ends": dict(Counter(batch.status for batch in batches)),
        "claims": sum(batch.fence for batch in batches),
        "most_claims": max((batch.fence for batch in batches), default=0),
        "lines": sum(len(batch.rows) for batch in batches),
        "results": dict(Counter(row.code or "answer" for batch in batches for row in batch.rows)),
        "cancelled_with_partial_results": sum(bool(batch.output) for batch in cancelled),
        "questions": len({question.request_id for question in campaign.evidence.asked}),
        "lines_seen_recorded": len(watch.recorded),
        "looks": watch.looks,
    }


def summary(result: dict[str, Any]) -> str:
    """What a person wants to know."""
    faults, jobs, recovered = result["faults"], result["jobs"], result["recovery_s"]
    lines = [
        f"{faults['count']} faults ({faults['each_second']} each second) on {jobs['count']} jobs, "
        f"{jobs['claims']} claims, {jobs['resumes']} resumes, {jobs['checkpoints_registered']} checkpoints",
        f"clients: {result['clients']}",
        f"ends: {jobs['ends']}; chats: {result['chats'].get('outcomes')}; streams: {result['streams']}",
        f"batches: {result['batches']}",
        *(
            f"recovery, {which}: p50 {found['p50']} s, p99 {found['p99']} s of {found['count']}"
            for which in ("undisturbed", "all")
            for found in [recovered[which]]
        ),
        "bad outcomes: " + (", ".join(f"{k} {v}" for k, v in result["bad_outcomes"].items() if v) or "none"),
    ]
    lines += [f"  {f['check']}: {f['subject']}: {f['what']}" for f in result["findings"][:40]]
    return "\n".join(lines)
