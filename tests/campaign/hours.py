"""Hours that pass in no time: uploads are made to look as if they had been created long ago.

There is no setting for an upload's lifetime, and needs none: a row's `expires_at` is all that the service looks at.
"""

import hashlib
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from sqlalchemy import Engine, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from shared import db
from shared.models import Upload, UploadPart, UploadStatus
from shared.settings import Settings
from tests.campaign.notebook import SentUpload

PATIENCE_S = 120
AGAIN_AFTER_S = 0.5

Result = TypeVar("Result")


def end_hour_of(database_url: str, settings: Settings, upload: SentUpload) -> list[str]:
    """Look whether a pending upload still has every part that was acknowledged; then its hour is over.

    Returns what is missing.
    """

    def work(session: Session) -> list[str]:
        row = session.get(Upload, upload.upload_id)
        if row is None or row.status != UploadStatus.PENDING:
            return [f"upload {upload.upload_id} was left alone and is {'gone' if row is None else row.status}"]
        rows = set(session.scalars(select(UploadPart.id).where(UploadPart.upload_id == row.id)))
        problems = [f"part {part_id} was acknowledged and has no row" for part_id in upload.parts.keys() - rows]
        for part_id, sha256 in upload.parts.items():
            path = settings.storage_root / "files" / part_id
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                problems.append(f"part {part_id} was acknowledged and its bytes are not there")
        row.expires_at = row.created_at
        return problems

    return _until_done(database_url, work)


def end_all_hours(database_url: str) -> None:
    """No upload has any time left: those whose creation nobody was told of too."""

    def work(session: Session) -> None:
        session.execute(update(Upload).values(expires_at=Upload.created_at))

    _until_done(database_url, work)


def _until_done(database_url: str, work: Callable[[Session], Result]) -> Result:
    """One transaction for writing, again and again while faults keep the database away."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with Session(_engine(database_url)) as session, session.begin():
                return work(session)
        except SQLAlchemyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(AGAIN_AFTER_S)


@lru_cache(maxsize=1)
def _engine(database_url: str) -> Engine:
    return db.make_engine(database_url)
