"""What has had its time: files and uploads that expired, answers that nobody asks for any more, results of batches.

Cheap when there is nothing to do, a handful of rows a pass otherwise, and safe in any number: each removal is a
guarded statement that skips rows which another sweep is about to take. Rows go first; bytes that a crash then leaves
behind are garbage, and collected as such.
"""

import logging

from shared import answers, batches, files, storage, uploads
from shared.db import reading, transaction
from shared.settings import Settings

log = logging.getLogger(__name__)

MOST_FILES = 100
MOST_UPLOADS = 20
MOST_ANSWERS = 1000
MOST_LINES = 1000
"""Of one pass. A pass comes every few seconds, and none of its transactions may be long."""


def remove_expired(settings: Settings) -> int:
    """Remove what has had its time. Returns how many files and parts of uploads that were."""
    with reading() as session:  # on SQLite a transaction for writing would make everybody wait, every few seconds
        file_ids = files.find_expired(session, MOST_FILES)
        upload_ids = uploads.find_overdue(session, MOST_UPLOADS)
        old_answers = answers.any_old(session)
        ended_batches = batches.find_ended_with_lines(session, limit=1)
    gone: list[str] = []
    if file_ids:
        with transaction() as session:
            gone += files.remove_expired(session, file_ids)
    if upload_ids:
        with transaction() as session:
            gone += uploads.expire(session, upload_ids)
    if old_answers:
        with transaction() as session:
            answers.remove_old(session, MOST_ANSWERS)
    for batch_id in ended_batches:
        with transaction() as session:
            batches.remove_lines(session, batch_id, MOST_LINES)
    for object_id in gone:
        log.info("%s has expired and is removed", object_id)
        storage.delete_file(settings, object_id)
    return len(gone)
