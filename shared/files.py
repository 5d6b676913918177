"""Files: every change of a file's row.

    create (small) ─ checked before the answer ─► processed
    create (large) ─► uploaded ─ worker batch ─► processed | error

The transaction that settles a file moves the jobs that wait for it on. An invalid small file is refused with its
line number and leaves no row.
"""

from collections.abc import Collection
from contextlib import suppress

from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from shared import jobs, storage
from shared.db import clock, reading
from shared.errors import Conflict, NotFound
from shared.models import TERMINAL, File, FileStatus, Job
from shared.settings import Settings

UPLOAD_PURPOSES = ("fine-tune", "batch", "evals", "user_data")
RESULTS_PURPOSE = "fine-tune-results"


def create(
    session: Session,
    *,
    file_id: str,
    project_id: str,
    filename: str,
    purpose: str,
    size_bytes: int,
    sha256: str,
    status: FileStatus,
    format: str | None = None,
    rows: int | None = None,
) -> File:
    """Add the row of bytes that are already whole in storage."""
    row = File(
        id=file_id,
        project_id=project_id,
        filename=filename,
        purpose=purpose,
        bytes=size_bytes,
        sha256=sha256,
        status=status,
        format=format,
        rows=rows,
        created_at=clock(session),
    )
    session.add(row)
    session.flush()
    return row


def get(session: Session, project_id: str, file_id: str, *, param: str | None = None) -> File:
    """The project's file.

    Raises:
        NotFound: there is none of this id in the project.
    """
    row = session.get(File, file_id)
    if row is None or row.project_id != project_id:
        raise NotFound(f"there is no file {file_id[:100]!r}; GET /v1/files lists yours", param=param)
    return row


def delete(session: Session, project_id: str, file_id: str) -> None:
    """Remove the row; the caller removes the bytes after the commit.

    Raises:
        Conflict: a job that has not ended needs it.
    """
    get(session, project_id, file_id)
    row = session.get_one(File, file_id, with_for_update=True)  # a job being created with it holds a shared lock
    user = session.scalar(
        select(Job.id)
        .where(
            Job.project_id == project_id,
            (Job.training_file == file_id) | (Job.validation_file == file_id),
            Job.status.not_in(TERMINAL),
        )
        .limit(1)
    )
    if user is not None:
        raise Conflict(f"file {file_id} is needed by job {user}, which has not ended; cancel the job first")
    session.delete(row)


def discard_bytes(settings: Settings, file_id: str) -> None:
    """Remove bytes whose row could not be written, unless the row is there after all.

    A commit whose confirmation was lost has taken effect; then, and while the database can't be asked, bytes stay.
    """
    try:
        with reading() as session:
            known = session.get(File, file_id) is not None
    except SQLAlchemyError:
        return
    if not known:
        with suppress(storage.StorageUnavailable):  # then it is garbage, which the sweep collects
            storage.delete_file(settings, file_id)


def next_unchecked(session: Session, besides: Collection[str] = ()) -> File | None:
    """The oldest file that waits for `worker batch`, other than these."""
    waiting = select(File).where(File.status == FileStatus.UPLOADED, File.id.not_in(besides))
    return session.scalar(waiting.order_by(File.created_at, File.id).limit(1))


def settle_valid(session: Session, file_id: str, format: str, rows: int) -> None:
    """uploaded → processed. Nothing happens if somebody settled it first."""
    if _settle(session, file_id, status=FileStatus.PROCESSED, format=format, rows=rows):
        jobs.file_settled(session, file_id, None)


def settle_invalid(session: Session, file_id: str, reason: str) -> None:
    """uploaded → error, and the jobs that waited for it fail."""
    if _settle(session, file_id, status=FileStatus.ERROR, status_details=reason[:2000]):
        jobs.file_settled(session, file_id, reason)


def _settle(session: Session, file_id: str, **values: object) -> bool:
    settled = session.scalar(
        update(File).where(File.id == file_id, File.status == FileStatus.UPLOADED).values(**values).returning(File.id)
    )
    return settled is not None
