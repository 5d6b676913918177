"""What the sweep removes when its time has come, and what it leaves."""

import threading
import time
from typing import Any

import pytest
from sqlalchemy import event, func, insert, select, text, update
from sqlalchemy.orm import Session

from shared import answers, files, job_creation, storage, uploads
from shared.db import clock, get_engine, now, reading, transaction
from shared.errors import NotFound, Unavailable
from shared.ids import new_id
from shared.models import Answer, Creation, File, FileStatus, Job, Upload, UploadPart, UploadStatus
from shared.schemas import JobCreate
from shared.settings import Settings
from shared.upload_schemas import UploadCreate
from tests.rows import file_row, stored_file
from worker import expiry, garbage
from worker.sweeper import Sweeper

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DAY_S = 86_400


def make_file(settings: Settings, *, expires_after_s: int | None = 3600) -> str:
    return stored_file(settings, b"x", expires_after_s=expires_after_s)


def make_upload(settings: Settings, parts: int) -> tuple[str, list[str]]:
    request = UploadCreate(filename="a", purpose="user_data", bytes=parts, mime_type="text/plain")
    part_ids = [new_id("part", "_") for _ in range(parts)]
    with transaction() as session:
        upload_id = uploads.create(session, "default", request).id
    for part_id in part_ids:
        stored = storage.save_file(settings, part_id, [b"x"], max_bytes=1)
        with transaction() as session:
            uploads.add_part(session, "default", upload_id, part_id, stored)
    return upload_id, part_ids


def pass_by(session: Session, model: type[File] | type[Upload], *object_ids: str) -> None:
    session.execute(update(model).where(model.id.in_(object_ids)).values(expires_at=now() - 1))


def submit(session: Session, file_id: str, **more: str) -> str:
    return job_creation.submit(session, "default", JobCreate(model=MODEL, training_file=file_id, **more)).id


def ids(model: type[File] | type[UploadPart]) -> set[str]:
    with reading() as session:
        return set(session.scalars(select(model.id)))


def stored_files(settings: Settings) -> set[str]:
    return {file_id for file_id, _ in storage.list_files(settings)}


def test_an_expired_file_goes_with_its_bytes_and_no_other(settings: Settings) -> None:
    expired, young, eternal = make_file(settings), make_file(settings), make_file(settings, expires_after_s=None)
    assert expiry.remove_expired(settings) == 0
    with transaction() as session:
        pass_by(session, File, expired)
    assert expiry.remove_expired(settings) == 1
    assert ids(File) == stored_files(settings) == {young, eternal}


@pytest.mark.parametrize("status", ["validating_files", "queued", "running", "paused"])
@pytest.mark.parametrize("key", ["training_file", "validation_file"])
def test_an_expired_file_stays_while_a_live_job_needs_it(settings: Settings, status: str, key: str) -> None:
    needed, other = make_file(settings), make_file(settings, expires_after_s=None)
    with transaction() as session:
        job_id = submit(session, needed) if key == "training_file" else submit(session, other, validation_file=needed)
        session.execute(update(Job).values(status=status))
        pass_by(session, File, needed)
    assert expiry.remove_expired(settings) == 0
    assert ids(File) == stored_files(settings) == {needed, other}
    with transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(status="cancelled"))
    assert expiry.remove_expired(settings) == 1
    assert ids(File) == stored_files(settings) == {other}


def test_a_file_that_expires_while_a_job_is_created_with_it_is_kept(settings: Settings) -> None:
    """The sweep comes after the expiry and before the job is committed."""
    file_id = make_file(settings)
    with transaction() as session:
        session.execute(update(File).values(expires_at=now() + 1.5))
    swept = threading.Thread(target=sweep_repeatedly, args=([file_id], 2.5))
    with transaction() as session:
        submit(session, file_id)
        swept.start()
        time.sleep(2)
    swept.join()
    assert ids(File) == {file_id}


def sweep_repeatedly(file_ids: list[str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with transaction() as session:
            files.remove_expired(session, file_ids)
        time.sleep(0.01)


def test_an_upload_that_was_not_completed_within_its_hour_expires_with_its_parts(settings: Settings) -> None:
    (late, late_parts), (_, parts) = make_upload(settings, 3), make_upload(settings, 2)
    assert expiry.remove_expired(settings) == 0
    with transaction() as session:
        pass_by(session, Upload, late)
    assert expiry.remove_expired(settings) == 3
    with reading() as session:
        assert session.get_one(Upload, late).status == UploadStatus.EXPIRED
    assert ids(UploadPart) == stored_files(settings) == set(parts)
    assert not set(late_parts) & stored_files(settings)


def test_a_completed_upload_never_expires(settings: Settings) -> None:
    upload_id, _ = make_upload(settings, 1)
    with transaction() as session:
        session.execute(update(Upload).values(status=UploadStatus.COMPLETED))
        pass_by(session, Upload, upload_id)
    assert expiry.remove_expired(settings) == 0
    with transaction() as session:  # found by a sweep before it was completed
        assert uploads.expire(session, [upload_id]) == []
    with reading() as session:
        assert session.get_one(Upload, upload_id).status == UploadStatus.COMPLETED


def test_parts_of_a_pending_upload_are_no_garbage_and_lost_bytes_are(settings: Settings) -> None:
    impatient = settings.model_copy(update={"garbage_age_s": 0})
    _, parts = make_upload(settings, 2)
    sweeper = Sweeper(impatient)
    sweeper.expire_leases()
    assert sweeper.collect_garbage() == 0
    storage.save_file(settings, new_id("part", "_"), [b"its row was never written"], max_bytes=100)
    assert sweeper.collect_garbage() == 1
    assert stored_files(settings) == set(parts)


def test_a_row_that_comes_while_garbage_is_collected_keeps_its_bytes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = settings.model_copy(update={"garbage_age_s": 0})
    assert garbage.collect(impatient, "this database") == 0
    first, second = "file-1", "file-2"
    for file_id in (first, second):
        storage.save_file(settings, file_id, [b"x"], max_bytes=1)
    delete_file = storage.delete_file

    def and_meanwhile_the_other_gets_its_row(given: Settings, file_id: str) -> None:
        delete_file(given, file_id)
        other = second if file_id == first else first
        with transaction() as session:
            file_row(session, other)

    monkeypatch.setattr(storage, "delete_file", and_meanwhile_the_other_gets_its_row)
    assert garbage.collect(impatient, "this database") == 1
    assert ids(File) == stored_files(settings)


def test_answers_go_after_a_day_and_creations_after_an_hour(settings: Settings) -> None:
    ages_s = (DAY_S + 60, DAY_S - 60, 3600 + 60, 3600 - 60)
    with transaction() as session:
        for age_s in ages_s:
            answers.keep(session, answers.Request("default", "POST /v1/files", str(age_s), "0"), 200, "{}")
            session.execute(update(Answer).where(Answer.key == str(age_s)).values(created_at=now() - age_s))
            answers.remember_creation(session, "default", "0", str(age_s), "{}")
            session.execute(update(Creation).where(Creation.object_id == str(age_s)).values(created_at=now() - age_s))
    expiry.remove_expired(settings)
    with reading() as session:
        assert set(session.scalars(select(Answer.key))) == {str(age_s) for age_s in ages_s[1:]}
        assert set(session.scalars(select(Creation.object_id))) == {str(ages_s[3])}


def test_a_look_for_what_is_old_reads_no_table_from_end_to_end(settings: Settings) -> None:
    """It comes every few seconds, and there may be a million answers none of which is old."""
    kept = {"project_id": "default", "request_sha256": "0", "body": "{}"}
    with transaction() as session:
        at = clock(session)
        for n in range(0, 3000, 1000):
            rows = [{**kept, "created_at": at - i / 10} for i in range(n, n + 1000)]
            answered = [{**row, "route": "r", "key": str(i), "status_code": 200} for i, row in enumerate(rows, n)]
            session.execute(insert(Answer), answered)
            session.execute(insert(Creation), [{**row, "object_id": str(i)} for i, row in enumerate(rows, n)])
    asked: list[tuple[str, Any]] = []
    event.listen(get_engine(), "before_cursor_execute", lambda _c, _u, sql, given, *_: asked.append((sql, given)))
    with reading() as session:
        session.execute(text("analyze"))
        asked.clear()
        assert not answers.any_old(session)
        ((sql, given),) = asked
        explain = "explain " if session.get_bind().dialect.name == "postgresql" else "explain query plan "
        plan = [str(row) for row in session.connection().exec_driver_sql(explain + sql, given)]
    assert not [line for line in plan if "Seq Scan" in line or "SCAN answers" in line or "SCAN creations" in line], plan


@pytest.mark.usefixtures("settings")
def test_who_lost_an_answer_twice_is_told_of_the_same_object_and_of_nobody_elses() -> None:
    def created(object_id: str) -> None:
        with transaction() as session:
            answers.remember_creation(session, "default", "0", object_id, object_id)
        time.sleep(0.01)  # SQLite's clock counts milliseconds

    def told(retries: int) -> str | None:
        with transaction() as session:
            return answers.tell_again(session, "default", "0", retries)

    created("A")
    assert told(1) == "A"
    created("C")
    assert (told(2), told(1)) == ("A", "C")
    assert (told(2), told(3), told(1)) == ("C", "C", None)


def test_what_is_gone_before_its_client_was_answered_is_told_to_nobody(settings: Settings) -> None:
    """A process that stood still for so long before its commit that the bytes were collected as garbage."""
    asked = answers.Request("default", "POST /v1/files", "key", "0")
    other = answers.Request("default", "POST /v1/files", "other", "0")
    file_id = new_id("file")
    with pytest.raises(Unavailable), files.row_follows(settings, file_id), transaction() as session:
        session.add(
            File(
                id=file_id,
                project_id="default",
                filename="a",
                purpose="evals",
                bytes=1,
                sha256="0",
                status=FileStatus.PROCESSED,
                created_at=clock(session),
            )
        )
        answers.keep(session, asked, 200, f'{{"id":"{file_id}"}}')
        answers.keep(session, other, 200, '{"id":"file-other"}')
        answers.remember_creation(session, "default", "0", file_id, "{}")
    assert ids(File) == set()
    with transaction() as session:
        assert answers.find(session, asked) is None
        assert answers.find(session, other) is not None
        assert answers.tell_again(session, "default", "0", 1) is None


def test_a_file_deleted_twice_at_once_is_gone_and_then_unknown(settings: Settings) -> None:
    file_id = make_file(settings)
    found: list[type[Exception] | None] = []

    def delete() -> None:
        try:
            with transaction() as session:
                files.delete(session, "default", file_id)
            found.append(None)
        except Exception as error:
            found.append(type(error))

    second = threading.Thread(target=delete)
    with transaction() as session:
        files.delete(session, "default", file_id)
        session.flush()
        second.start()
        time.sleep(0.3)
    second.join()
    assert found == [NotFound]


def test_any_number_of_sweeps_remove_everything_once_in_bounded_steps(settings: Settings) -> None:
    with transaction() as session:
        for number in range(expiry.MOST_FILES + 50):
            file_row(session, f"file-{number}", expires_after_s=-1)
    assert expiry.remove_expired(settings) == expiry.MOST_FILES
    removed: list[int] = []
    threads = [threading.Thread(target=lambda: removed.append(expiry.remove_expired(settings))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(removed) == 50
    with reading() as session:
        assert session.scalar(select(func.count()).select_from(File)) == 0


def test_a_pass_of_the_sweep_removes_what_expired(settings: Settings) -> None:
    file_id = make_file(settings)
    with transaction() as session:
        pass_by(session, File, file_id)
    Sweeper(settings).sweep()
    for thread in threading.enumerate():
        if thread.name == "expiry":
            thread.join()
    assert ids(File) == stored_files(settings) == set()
