"""The tasks, thin: claim, work, settle. All are safe to deliver twice, or never."""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import SQLAlchemyError

from shared import batches, files, jobs, storage, training_data
from shared.db import reading, transaction
from shared.queue import RUN_BATCHES, TRAIN, VALIDATE_FILES, send
from shared.settings import get_settings
from worker import batches as batch_runs
from worker import gpu_watch, lifecycle, run_folder, standby, supervisor
from worker.app import celery_app

log = logging.getLogger(__name__)

LOOK_FOR_FILES_S = 2.0


@celery_app.task(name=TRAIN, ignore_result=True)
def train() -> None:
    """Claim the next job, supervise it, settle it; again while any waits. A second delivery finds nothing to claim."""
    settings = get_settings()
    worker = _worker()
    run_folder.forget_old(settings)
    ahead = standby.kept()
    while not lifecycle.shutdown.is_set():
        if gone := gpu_watch.missing():
            log.critical(
                "%d of this worker's GPUs are gone; it claims no job before they are back or it restarts", gone
            )
            return
        if ahead is not None:
            ahead.start()
        with transaction() as session:
            job = jobs.claim_next(session, worker, settings.lease_s)
        if job is None:
            return
        log.info("claimed %s, claim %d", job.id, job.fence)
        supervisor.supervise(job, settings, standby=ahead)
        lifecycle.wait_out_quarantine()
    hint_if_jobs_wait()  # this worker stops; another may go on at once, without waiting for the sweep


@celery_app.task(name=VALIDATE_FILES, ignore_result=True)
def validate_files() -> None:
    """Check every file that was too large to be checked while its sender waited."""
    _check_files()


@celery_app.task(name=RUN_BATCHES, ignore_result=True)
def run_batches() -> None:
    """Run batches until none waits, which may take a day; files are checked meanwhile, for they have the same queue."""
    with _checking_files():
        asyncio.run(batch_runs.run_all(get_settings(), _worker()))
    if lifecycle.shutdown.is_set():  # as after `train`
        with reading() as session:
            waiting = batches.count_claimable(session)
        if waiting:
            send(celery_app, RUN_BATCHES)


@contextmanager
def _checking_files() -> Iterator[None]:
    """Check files as they come, in a thread."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_FOR_FILES_S):
            try:
                _check_files()
            except SQLAlchemyError as error:
                log.warning("no files checked, the database said: %s", error)
            except Exception:
                log.exception("files can't be checked for now")

    thread = threading.Thread(target=look, name="files", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _worker() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"


def _check_files() -> None:
    settings = get_settings()
    out_of_reach: set[str] = set()
    while not lifecycle.shutdown.is_set():
        with reading() as session:
            file = files.next_unchecked(session, besides=out_of_reach)
        if file is None:
            return
        try:
            summary = training_data.validate(storage.local_file(settings, file.id, sha256=file.sha256))
        except training_data.InvalidRow as error:
            with transaction() as session:
                files.settle_invalid(session, file.id, error.message)
        except (OSError, storage.StorageUnavailable):
            # A storage that is not mounted, or away, says nothing about the file; those behind it get their turn, and
            # the sweep sends the next hint.
            log.exception("file %s can't be read for now", file.id)
            out_of_reach.add(file.id)
            continue
        except (MemoryError, storage.DamagedFile) as error:
            # Settled: left alone it would be the next to check for ever, and none behind it would be.
            log.exception("file %s could not be read", file.id)
            with transaction() as session:
                reason = f"it could not be read from storage ({type(error).__name__}); upload it again"
                files.settle_invalid(session, file.id, reason)
        else:
            with transaction() as session:
                files.settle_valid(session, file.id, summary.format, summary.rows)
        hint_if_jobs_wait()


def hint_if_jobs_wait() -> None:
    """Tell the workers of queue `train` if there is anything to claim."""
    with reading() as session:
        waiting = jobs.count_claimable(session)
    if waiting:
        send(celery_app, TRAIN)
