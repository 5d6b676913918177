"""Clients of `/v1/batches`: upload a file of requests, create the batch, look at it until it has ended, cancel some."""

import random
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.campaign.batch_plan import BatchPlan
from tests.campaign.clients import send_file
from tests.campaign.notebook import Notebook, SentBatch
from tests.campaign.patience import Client, GaveUp

BATCHES = "/v1/batches"
ENDED = ("completed", "failed", "cancelled", "expired")
POLL_S = 0.4


class BatchClients:
    """A few clients, each with one batch on its way, until told to stop and at least `at_least` are sent."""

    def __init__(
        self,
        url: str,
        make_plan: Callable[[int], BatchPlan],
        notebook: Notebook,
        *,
        clients: int,
        at_least: int,
        patience_s: float,
    ) -> None:
        """
        Args:
            patience_s: a batch that has not ended for so long is left to the verdict; its client goes on with the next.
        """
        self._url = url
        self._make_plan = make_plan
        self._notebook = notebook
        self._at_least = at_least
        self._patience_s = patience_s
        self._sent = 0
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._run, name=f"batches-{i}", daemon=True) for i in range(clients)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Send no more than `at_least`; what is on its way is seen to its end."""
        self._enough.set()

    @property
    def is_done(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        client = Client(self._url, self._notebook)
        while (plan := self._next()) is not None:
            try:
                self._see_through(client, plan)
            except GaveUp as error:
                with self._notebook.lock:
                    self._notebook.refusals.append(f"batch {plan.index}: {error}")

    def _next(self) -> BatchPlan | None:
        with self._notebook.lock:
            if self._enough.is_set() and self._sent >= self._at_least:
                return None
            index = self._sent
            self._sent += 1
        return self._make_plan(index)

    def _see_through(self, client: Client, plan: BatchPlan) -> None:
        sent = self._create(client, plan)
        created = time.monotonic()
        path = f"{BATCHES}/{sent.batch_id}"
        while time.monotonic() - created < self._patience_s:
            if plan.cancel_after_s is not None and sent.cancel_answer is None:
                time.sleep(max(0.0, plan.cancel_after_s - (time.monotonic() - created)))
                answer = client.call("POST", f"{path}/cancel", expect=(200, 409))
                sent.cancel_answer = answer.json()["status"] if answer.status_code == 200 else "conflict"
            sent.last_seen = client.call("GET", path).json()["status"]
            if sent.last_seen in ENDED:
                return
            time.sleep(POLL_S)

    def _create(self, client: Client, plan: BatchPlan) -> SentBatch:
        mark = f"b{plan.index}"
        file_id = send_file(
            client,
            self._notebook,
            plan.input_file,
            f"{mark}.jsonl",
            random.Random(f"{mark}/file"),
            purpose="batch",
            retry="key" if plan.uses_key else "counts",
            is_sent_in_parts=plan.is_sent_in_parts,
        )
        body: dict[str, Any] = {
            "input_file_id": file_id,
            "endpoint": plan.endpoint,
            "completion_window": "24h",
            "metadata": {"campaign": str(plan.index)},
        }
        if plan.uses_key:
            batch_id = client.create_with_key("batch", BATCHES, mark, repeats=plan.index % 3 == 0, json=body)
        else:
            batch_id = str(client.call("POST", BATCHES, counts=True, json=body).json()["id"])
        sent = SentBatch(plan, batch_id)
        with self._notebook.lock:
            self._notebook.batches.append(sent)
        return sent
