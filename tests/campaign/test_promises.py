"""The verdict on promises: nothing wrong with what was kept, and each lie that is planted is found."""

import dataclasses
from typing import Any

import pytest

from tests.campaign.evidence import Evidence, FileRow, JobRecord, Step, UploadRow
from tests.campaign.notebook import Keyed, SentFile, SentUpload, Submitted
from tests.campaign.promises import kept
from tests.campaign.recovery import recoveries
from tests.campaign.test_verdict import GOOD, PLAN, REFERENCE, events, fault, known
from tests.campaign.verdict import judge

PAUSING = dataclasses.replace(PLAN, pause_after_s=1.0)


def paused(*between: Any, late_step: float | None = None) -> JobRecord:
    """The good job, paused in its third step and resumed a minute later, with further events while it was."""
    before = ("Job claimed by worker a", "Fine-tuning job started: 6 steps", *(1, 2, "Pause requested", 3))
    before = (*before, "Checkpoint created at step 3: x", "Job paused at step 3", *between)
    after = ("Job resumed", "Job claimed by worker b, claim 2", "Resumed from step 3", *(4, 5, 6))
    ends = ("New fine-tuned model created: m", "The job has successfully completed")
    history = events(*before, *after, *ends)
    moved = tuple(dataclasses.replace(e, created_at=e.created_at + 60 * (e.sequence > len(before))) for e in history)
    steps = () if late_step is None else (Step(late_step, 1, 3, REFERENCE.losses[2]),)
    rows = (dataclasses.replace(GOOD.checkpoints[0], step=3), dataclasses.replace(GOOD.checkpoints[2], fence=2))
    return dataclasses.replace(GOOD, events=moved, last_event=len(moved), journal=steps, checkpoints=rows)


def found(job: JobRecord, **changes: Any) -> list[str]:
    facts = dataclasses.replace(known(**changes), plans={0: PAUSING})
    findings = judge(Evidence((job,), job.result_files), facts)
    return [finding.what for finding in findings if finding.check == "paused_wrong"]


def test_a_job_that_was_paused_and_went_on_is_found_well() -> None:
    assert found(paused(late_step=12.0), submitted=[Submitted(PLAN, "j", pause_answer="running")]) == []


@pytest.mark.parametrize(
    ("job", "word"),
    [
        (paused("Job claimed by worker c, claim 2"), "claimed"),
        (paused(4), "Step 4"),
        (paused("Checkpoint created at step 4: x"), "Checkpoint"),
        (paused("Job resumed", "Job paused at step 3"), "once more"),
        (paused("Job resumed", "Pause requested", "Job claimed by worker c, claim 2"), "claimed once more"),
        (paused(late_step=40.0), "computed step 3"),
    ],
)
def test_what_goes_on_while_a_job_is_paused_is_found(job: JobRecord, word: str) -> None:
    assert any(word in what for what in found(job))


def test_a_pause_that_was_promised_and_forgotten_is_found() -> None:
    assert "say nothing of it" in found(GOOD, submitted=[Submitted(PLAN, "j", pause_answer="paused")])[0]


def test_how_long_a_client_leaves_its_job_paused_is_no_recovery() -> None:
    from shared.settings import Settings

    hit = fault(1, 3.5, job_id="j", fence=1)
    assert recoveries([paused()], [hit], Settings(lease_s=4, heartbeat_s=1, trainer_silent_s=4)) == []


FILE = FileRow("file-a", "parcel-1", "hash")
UPLOAD = UploadRow("upload_a", "parcel-1", "completed", "file-a", 0)
SENT = SentUpload("upload_a", {"part_a": "hash"}, "completed", "file-a")


def lies(files: tuple[FileRow, ...] = (FILE,), uploads: tuple[UploadRow, ...] = (UPLOAD,), **told: Any) -> set[str]:
    facts = known(uploads=[SENT], files=[SentFile("file-a", "hash")], **told)
    return {finding.check for finding in kept(Evidence((GOOD,), (), files=files, uploads=uploads), facts)}


def change(row: Any, **values: Any) -> tuple[Any]:
    return (dataclasses.replace(row, **values),)


def test_what_was_kept_is_found_well() -> None:
    keyed = [
        Keyed(kind, mark, 2, {"x"}) for kind, mark in (("file", "parcel-1"), ("upload", "parcel-1"), ("job", "c0"))
    ]
    unanswered = Keyed("file", "nobody", 1)
    abandoned = SentUpload("upload_b", {}, "abandoned")
    rows = (UPLOAD, UploadRow("upload_b", "parcel-2", "expired", None, 0))
    assert lies(keyed=[*keyed, unanswered]) == set()
    assert lies(uploads=rows) == set()
    assert {f.check for f in kept(Evidence((), (), uploads=rows[1:]), known(uploads=[abandoned]))} == set()


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        (
            "key_twice",
            {"files": (FILE, *change(FILE, id="file-b")), "keyed": [Keyed("file", "parcel-1", 1, {"file-a"})]},
        ),
        ("key_twice", {"keyed": [Keyed("upload", "parcel-1", 2, {"upload_a", "upload_b"})]}),
        ("key_twice", {"keyed": [Keyed("job", "c7", 1, {"ftjob-x"})]}),
        ("file_wrong", {"files": change(FILE, sha256="other")}),
        ("file_wrong", {"files": change(FILE, sha256=None)}),
        ("file_wrong", {"files": ()}),
        ("upload_wrong", {"files": ()}),
        ("upload_wrong", {"uploads": ()}),
        ("upload_wrong", {"uploads": change(UPLOAD, status="pending")}),
        ("upload_wrong", {"uploads": change(UPLOAD, status="expired")}),
        ("upload_wrong", {"uploads": change(UPLOAD, parts=1)}),
        ("upload_wrong", {"uploads": change(UPLOAD, file_id="file-z")}),
    ],
)
def test_a_promise_that_was_not_kept_is_found(check: str, changes: dict[str, Any]) -> None:
    assert check in lies(**changes)


def test_a_file_that_was_deleted_may_be_gone_and_may_not_be_there() -> None:
    gone = [SentFile("file-a", "hash", is_deleted=True)]
    assert kept_checks(gone, ()) == set()
    assert "file_wrong" in kept_checks(gone, (FILE,))


def kept_checks(files: list[SentFile], rows: tuple[FileRow, ...]) -> set[str]:
    evidence = Evidence((), (), files=rows, uploads=(UPLOAD,))
    return {finding.check for finding in kept(evidence, known(files=files, uploads=[SENT]))}
