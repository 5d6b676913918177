"""Files that are there already, for tests that begin later than an upload."""

from typing import Any

from sqlalchemy.orm import Session

from shared import files, storage
from shared.db import transaction
from shared.ids import new_id
from shared.models import FileStatus
from shared.settings import Settings


def file_row(session: Session, file_id: str | None = None, **changes: Any) -> str:
    """The row of a checked training file, with no bytes behind it unless the caller put them there. Returns its id.

    Args:
        changes: to what `shared.files.create` is told.
    """
    about = {
        "file_id": file_id or new_id("file"),
        "project_id": "default",
        "filename": "train.jsonl",
        "purpose": "fine-tune",
        "size_bytes": 1,
        "sha256": "",
        "status": FileStatus.PROCESSED,
    }
    return files.create(session, **{**about, **changes}).id


def stored_file(settings: Settings, content: bytes, **changes: Any) -> str:
    """A file with its bytes in storage, as an upload leaves it but checked. Returns its id."""
    file_id = new_id("file")
    stored = storage.save_file(settings, file_id, [content], max_bytes=len(content))
    with transaction() as session:
        return file_row(session, file_id, **{"size_bytes": stored.bytes, "sha256": stored.sha256, **changes})
