"""The verdict on what clients were promised beside their jobs' ends: pauses, keys, files, uploads in parts."""

from collections import Counter
from collections.abc import Iterator

from tests.campaign.evidence import Evidence, FileRow, JobRecord
from tests.campaign.findings import Finding, Known
from tests.campaign.notebook import Keyed, SentUpload
from tests.campaign.plan import JobPlan

ASKED, PAUSED, RESUMED = "Pause requested", "Job paused", "Job resumed"
STANDS_STILL_LEASES = 2.5
"""A trainer that was stopped, and whose job was paused meanwhile, may do one more step when it is let go on. Nobody is
stopped for longer than two leases."""
ENDS = {"completed": "completed", "cancelled": "cancelled", "abandoned": "expired"}
"""What must become of an upload, by what its client made of it."""


def paused_as_told(job: JobRecord, plan: JobPlan, known: Known) -> Iterator[str]:
    """From a pause to its end nobody claims the job, nothing of it is recorded, and soon nothing computes either."""
    asked_at: float | None = None
    paused_at: float | None = None
    last = ""
    for event in job.events:
        line = event.message
        if line.startswith(ASKED):
            asked_at = event.created_at
        elif line.startswith(PAUSED):
            if asked_at is None and last == RESUMED:
                yield "it was paused once more after it was resumed"
            asked_at, paused_at, last = None, event.created_at, PAUSED
        elif line.startswith(RESUMED):
            if paused_at is not None:
                yield from _computed_meanwhile(job, paused_at, event.created_at, known.lease_s)
            asked_at, paused_at, last = None, None, RESUMED
        elif asked_at is not None and line.startswith("Job claimed"):
            yield "it was asked to pause, and was claimed once more"
        elif paused_at is not None and (event.type == "metrics" or line.startswith(("Job claimed", "Checkpoint"))):
            yield f"it was paused, and then came {line!r}"
    answers = {submitted.pause_answer for submitted in known.submitted if submitted.job_id == job.id}
    if answers & {"paused", "running"} and not any(event.message.startswith((ASKED, PAUSED)) for event in job.events):
        yield f"its pause was answered with {answers}, and its events say nothing of it"
    if plan.pause_after_s is None and any(event.message.startswith((ASKED, PAUSED)) for event in job.events):
        yield "it was paused, and nobody asked for that"


def _computed_meanwhile(job: JobRecord, since: float, until: float, lease_s: float) -> Iterator[str]:
    late = [step for step in job.journal if since + STANDS_STILL_LEASES * lease_s < step.at < until]
    if late:
        yield f"it was paused at {since:.1f}, and computed step {late[0].step} at {late[0].at:.1f}"


def kept(evidence: Evidence, known: Known) -> Iterator[Finding]:
    """Every finding about keys, files and uploads."""
    by_name = Counter(row.filename for row in evidence.files)
    counts = {
        "job": Counter(f"c{job.number}" for job in evidence.jobs),
        "file": by_name,
        "upload": Counter(row.filename for row in evidence.uploads),
        "batch": Counter(f"b{batch.number}" for batch in evidence.batches),
    }
    for keyed in known.keyed:
        yield from _once(keyed, counts[keyed.kind][keyed.mark])
    files = {row.id: row for row in evidence.files}
    for sent in known.files:
        row = files.get(sent.file_id)
        if sent.is_deleted != (row is None):
            yield Finding("file_wrong", sent.file_id, "it was deleted" if sent.is_deleted else "it is gone")
        elif row is not None and row.sha256 != sent.sha256:
            yield Finding("file_wrong", sent.file_id, f"its bytes are {row.sha256}, sent were {sent.sha256}")
    deleted = {sent.file_id for sent in known.files if sent.is_deleted}
    yield from _uploads(evidence, known, files, deleted)


def _once(keyed: Keyed, count: int) -> Iterator[Finding]:
    """One key, one object, one id in every answer."""
    subject = f"{keyed.kind} {keyed.mark}"
    if len(keyed.answers) > 1:
        yield Finding("key_twice", subject, f"its key was answered with {sorted(keyed.answers)}")
    if count > 1 or (keyed.answers and count == 0):
        yield Finding("key_twice", subject, f"its key made {count} of them")


def _uploads(evidence: Evidence, known: Known, files: dict[str, FileRow], deleted: set[str]) -> Iterator[Finding]:
    rows = {row.id: row for row in evidence.uploads}
    for row in evidence.uploads:
        if row.status == "pending":
            yield Finding("upload_wrong", row.id, "its hour is over, and it is pending")
        elif row.parts:
            yield Finding("upload_wrong", row.id, f"it is {row.status} and has {row.parts} parts")
        if row.status == "completed" and row.file_id not in files and row.file_id not in deleted:
            yield Finding("upload_wrong", row.id, f"it is completed, and its file {row.file_id} is gone")
    for sent in known.uploads:
        row_of_it = rows.get(sent.upload_id)
        if row_of_it is None:
            yield Finding("upload_wrong", sent.upload_id, "its row is gone")
        elif sent.end in ENDS and row_of_it.status != ENDS[sent.end]:
            yield Finding("upload_wrong", sent.upload_id, f"it was {sent.end} and is {row_of_it.status}")
        elif row_of_it.file_id != _file_of(sent, row_of_it.file_id):
            yield Finding("upload_wrong", sent.upload_id, f"became {row_of_it.file_id}, answered was {sent.file_id}")


def _file_of(sent: SentUpload, found: str | None) -> str | None:
    return sent.file_id if sent.end in ENDS else found  # its client gave up before it was answered
