"""Keeping a claim: a thread renews the lease and reads what clients ask for; the supervisor reads its flags."""

import logging
import threading
import time
from types import TracebackType
from typing import Self

from sqlalchemy.exc import SQLAlchemyError

from shared import jobs
from shared.db import reading, transaction
from shared.settings import Settings

log = logging.getLogger(__name__)


class LeaseKeeper:
    """Renews every `heartbeat_s`, looks for a cancel or a pause every `poll_s`.

    A database out of reach changes no flag: training goes on, and whoever commits will learn whether the claim held.
    """

    def __init__(self, job_id: str, fence: int, settings: Settings) -> None:
        self.lost = threading.Event()
        """The claim is over: stop the trainer, commit nothing."""
        self.cancel_requested = threading.Event()
        self.pause_requested = threading.Event()
        """Cleared again when the request is withdrawn."""
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
            orders = jobs.renew_lease(session, self._job_id, self._fence, self._settings.lease_s)
        self._note(orders)

    def _look(self) -> None:
        with reading() as session:
            orders = jobs.orders(session, self._job_id, self._fence)
        self._note(orders)

    def _note(self, orders: jobs.Orders) -> None:
        if orders.cancel:
            self.cancel_requested.set()
        if orders.pause:
            self.pause_requested.set()
        else:
            self.pause_requested.clear()
