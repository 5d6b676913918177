"""Keeping a claim: a thread renews the lease and reads the job's cancel request; the supervisor reads its flags."""

import logging
import threading
import time
from types import TracebackType
from typing import Self

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from shared import jobs
from shared.db import reading, transaction
from shared.models import Job, JobStatus
from shared.settings import Settings

log = logging.getLogger(__name__)


class LeaseKeeper:
    """Renews every `heartbeat_s`, looks for a cancel every `poll_s`.

    A database out of reach changes no flag: training goes on, and whoever commits will learn whether the claim held.
    """

    def __init__(self, job_id: str, fence: int, settings: Settings) -> None:
        self.lost = threading.Event()
        """The claim is over: stop the trainer, commit nothing."""
        self.cancel_requested = threading.Event()
        self._job_id = job_id
        self._fence = fence
        self._settings = settings
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lease-{job_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        renewed_at = time.monotonic()  # by the clock, not by counting looks: each look may take seconds
        while not self._stop.wait(self._settings.poll_s):
            began = time.monotonic()
            try:
                if began - renewed_at >= self._settings.heartbeat_s:
                    self._renew()
                    renewed_at = began
                else:
                    self._look()
            except jobs.LeaseLost:
                log.warning("lost the claim %d of %s", self._fence, self._job_id)
                self.lost.set()
                return
            except SQLAlchemyError as error:
                log.warning("lease of %s not renewed: %s", self._job_id, type(error).__name__)

    def _renew(self) -> None:
        with transaction() as session:
            cancel = jobs.renew_lease(session, self._job_id, self._fence, self._settings.lease_s)
        if cancel:
            self.cancel_requested.set()

    def _look(self) -> None:
        with reading() as session:
            row = session.execute(
                select(Job.fence, Job.status, Job.cancel_requested_at).where(Job.id == self._job_id)
            ).one_or_none()
        if row is None or row[0] != self._fence or row[1] != JobStatus.RUNNING:
            raise jobs.LeaseLost(self._job_id)
        if row[2] is not None:
            self.cancel_requested.set()
