"""Bytes in storage that no row names: what killed uploads, killed saves and retired checkpoints left behind.

Bytes are written before their row and removed after it, so garbage is all a crash can leave. What is listed is
compared with rows read *after* the listing; only what is old enough that nobody can still be about to write its row
is removed. Storage that belongs to another database is left alone: a mistyped URL must not empty it.
"""

import logging
from collections.abc import Iterator
from itertools import islice

from sqlalchemy import select, union_all

from shared import storage
from shared.db import reading
from shared.models import Checkpoint, File, Job, JobStatus, Model, UploadPart
from shared.settings import Settings

log = logging.getLogger(__name__)

BATCH = 500


def collect(settings: Settings, instance: str) -> int:
    """Remove what nobody names. Returns how many files and folders that were.

    Safe in any number and at any time; a crash leaves the rest for the next pass.

    Args:
        instance: the database's name, from its sweep row.
    """
    owner = storage.owner(settings)
    if owner is None and _may_claim(settings):
        owner = storage.owned_by(settings, instance)
    if owner != instance:
        log.error(
            "the storage belongs to the database %s and not to this one (%s): nothing is collected. If the database "
            "was replaced on purpose, write this one's name into the file `.owner` of the storage",
            owner or "nobody here knows",
            instance,
        )
        return 0
    storage.clear_incoming(settings, settings.garbage_age_s)
    removed = 0
    old_files = (file_id for file_id, age_s in storage.list_files(settings) if age_s >= settings.garbage_age_s)
    while batch := list(islice(old_files, BATCH)):
        for file_id in _without_row(batch):
            if not _without_row([file_id]):
                continue  # its row came while others were removed: looked for again at the last moment
            log.info("file %s has no row and is removed", file_id)
            storage.delete_file(settings, file_id)
            removed += 1
    for location in _unregistered(settings):
        log.info("checkpoint %s is registered nowhere and is removed", location)
        storage.delete_tree(settings, location)
        removed += 1
    return removed


def _may_claim(settings: Settings) -> bool:
    """Whether a storage without a name may be this database's: it is empty, or some of what it holds is known here."""
    file_ids = [file_id for file_id, _ in storage.list_files(settings)]
    jobs = {location.split("/")[1] for location, _ in storage.list_checkpoints(settings)}
    if not file_ids and not jobs:
        return True
    batches = iter(file_ids)
    while batch := list(islice(batches, BATCH)):
        if len(_without_row(batch)) < len(set(batch)):
            return True
    with reading() as session:
        return any(session.get(Job, job_id) is not None for job_id in jobs)


def _without_row(file_ids: list[str]) -> set[str]:
    """Those that are neither a file's bytes nor those of a part of an upload."""
    with reading() as session:
        owners = (select(model.id).where(model.id.in_(file_ids)) for model in (File, UploadPart))
        known = set(session.scalars(union_all(*owners)))
    return set(file_ids) - known


def _unregistered(settings: Settings) -> Iterator[str]:
    """Folders of checkpoints that are named by no row and can't get one any more."""
    by_job: dict[str, list[str]] = {}
    for location, age_s in storage.list_checkpoints(settings):
        if age_s >= settings.garbage_age_s:
            by_job.setdefault(location.split("/")[1], []).append(location)
    for job_id, locations in by_job.items():
        with reading() as session:
            job = session.get(Job, job_id)
            named = set(session.scalars(select(Checkpoint.location).where(Checkpoint.job_id == job_id)))
            named |= set(session.scalars(select(Model.location).where(Model.job_id == job_id)))
        for location in locations:
            fence = int(location.split("/")[2])
            # The claim that runs may be about to register it; an earlier one can't.
            may_be_registered = job is not None and job.status == JobStatus.RUNNING and fence >= job.fence
            if location not in named and not may_be_registered:
                yield location
