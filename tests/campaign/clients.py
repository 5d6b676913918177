"""The service's clients, as patient as clients should be: each repeats what failed and looks before it repeats.

Every client notes what it was told; the verdict compares that with the database. Nothing here knows of faults, except
that connections may break and answers may be late.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.campaign.plan import BASE_MODEL, VALIDATION_FILE, JobPlan

ENDED = ("succeeded", "failed", "cancelled")
REQUEST_TIMEOUT_S = 15
PATIENCE_S = 180
"""A request that is not answered for so long is given up."""
AGAIN_AFTER_S = 0.3
POLL_S = 0.4


class GaveUp(Exception):
    """The service refused, or kept failing beyond all patience."""


class Client:
    """HTTP with repetition."""

    def __init__(self, url: str, notebook: "Notebook") -> None:
        self._notebook = notebook
        self._http = httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S)

    def call(self, method: str, path: str, *, expect: tuple[int, ...] = (200,), **keywords: Any) -> httpx.Response:
        """One request, repeated until it is answered with one of `expect`.

        Raises:
            GaveUp: the answer is another 4xx, or nothing else came within `PATIENCE_S`.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = self._http.request(method, path, **keywords)
            except httpx.TransportError as error:
                problem = repr(error)
            else:
                if answer.status_code in expect:
                    return answer
                problem = f"{answer.status_code} {answer.text[:500]}"
                self.check(answer)
                if answer.status_code < 500 and answer.status_code != 429:
                    raise GaveUp(f"{method} {path}: {problem}")
            if time.monotonic() > deadline:
                raise GaveUp(f"{method} {path}: {problem}, for {PATIENCE_S} s")
            time.sleep(AGAIN_AFTER_S)

    def check(self, answer: httpx.Response) -> None:
        """An outage is answered with 503; a 500 is a mistake of ours."""
        if answer.status_code == 500:
            with self._notebook.lock:
                self._notebook.internal_errors.append(f"{answer.request.method} {answer.request.url}: {answer.text}")


@dataclass
class Submitted:
    """A job a client knows of."""

    plan: JobPlan
    job_id: str
    cancel_answer: str | None = None
    """The status in the answer to its cancellation: `conflict` if it had ended by then."""
    last_seen: str = ""


@dataclass
class Followed:
    """What somebody read on a job's live stream, over however many connections."""

    job_id: str
    numbers: list[int] = field(default_factory=list)
    is_complete: bool = False
    connections: int = 0


class Notebook:
    """What all clients were told."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.submitted: list[Submitted] = []
        self.followed: list[Followed] = []
        self.refusals: list[str] = []
        self.internal_errors: list[str] = []
        self.sent = 0


class JobClients:
    """A few clients, each with one job on its way at any time, until told to stop and at least `at_least` are sent."""

    def __init__(
        self,
        url: str,
        make_plan: Callable[[int], JobPlan],
        notebook: Notebook,
        *,
        clients: int,
        at_least: int,
        patience_s: float,
    ) -> None:
        """
        Args:
            patience_s: a job that has not ended for so long is left to the verdict; its client goes on with the next.
        """
        self._patience_s = patience_s
        self._url = url
        self._make_plan = make_plan
        self._notebook = notebook
        self._at_least = at_least
        self._enough = threading.Event()
        self.threads = [threading.Thread(target=self._run, name=f"client-{i}", daemon=True) for i in range(clients)]
        self._followers: list[threading.Thread] = []

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Send no more than `at_least`; what is on its way is seen to its end."""
        self._enough.set()

    @property
    def is_done(self) -> bool:
        return not any(thread.is_alive() for thread in [*self.threads, *self._followers])

    def _run(self) -> None:
        client = Client(self._url, self._notebook)
        while (plan := self._next()) is not None:
            try:
                self._see_through(client, plan)
            except GaveUp as error:
                if plan.failure_code is not None and plan.failure_code in str(error):
                    continue  # refused at once what would have failed later
                with self._notebook.lock:
                    self._notebook.refusals.append(f"job {plan.index}: {error}")

    def _next(self) -> JobPlan | None:
        with self._notebook.lock:
            if self._enough.is_set() and self._notebook.sent >= self._at_least:
                return None
            index = self._notebook.sent
            self._notebook.sent += 1
        return self._make_plan(index)

    def _see_through(self, client: Client, plan: JobPlan) -> None:
        submitted = submit(client, plan)
        with self._notebook.lock:
            self._notebook.submitted.append(submitted)
        created = time.monotonic()
        if plan.is_followed:
            self._follow(submitted.job_id)
        path = f"/v1/fine_tuning/jobs/{submitted.job_id}"
        while time.monotonic() - created < self._patience_s:
            if plan.cancel_after_s is not None and submitted.cancel_answer is None:
                time.sleep(max(0.0, plan.cancel_after_s - (time.monotonic() - created)))
                answer = client.call("POST", f"{path}/cancel", expect=(200, 409))
                submitted.cancel_answer = answer.json()["status"] if answer.status_code == 200 else "conflict"
            submitted.last_seen = client.call("GET", path).json()["status"]
            if submitted.last_seen in ENDED:
                return
            time.sleep(POLL_S)

    def _follow(self, job_id: str) -> None:
        followed = Followed(job_id)
        thread = threading.Thread(
            target=follow, args=(self._url, followed, self._patience_s + 60), name=f"follow-{job_id}", daemon=True
        )
        self._followers.append(thread)
        with self._notebook.lock:
            self._notebook.followed.append(followed)
        thread.start()


def submit(client: Client, plan: JobPlan) -> Submitted:
    """Upload the files and create the job. An answer that was lost is looked for before the job is created again."""
    body: dict[str, Any] = {
        "model": BASE_MODEL,
        "training_file": _upload(client, plan.training_file),
        "seed": plan.seed,
        "suffix": f"c{plan.index}",
        "metadata": {"campaign": str(plan.index)},
        "training": {"keep_checkpoints": plan.keep_checkpoints, **plan.training},
    }
    if plan.has_validation_file:
        body["validation_file"] = _upload(client, VALIDATION_FILE)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = client.call("GET", "/v1/fine_tuning/jobs", params={"metadata[campaign]": str(plan.index)}).json()
        if found["data"]:
            return Submitted(plan, found["data"][-1]["id"])
        try:
            answer = client._http.post("/v1/fine_tuning/jobs", json=body)
        except httpx.TransportError:
            answer = None
        if answer is not None:
            if answer.status_code == 200:
                return Submitted(plan, answer.json()["id"])
            client.check(answer)
            if answer.status_code < 500 and answer.status_code != 429:
                raise GaveUp(f"POST /v1/fine_tuning/jobs: {answer.status_code} {answer.text[:500]}")
        if time.monotonic() > deadline:
            raise GaveUp(f"POST /v1/fine_tuning/jobs: no answer for {PATIENCE_S} s")
        time.sleep(AGAIN_AFTER_S)


def _upload(client: Client, content: bytes) -> str:
    answer = client.call("POST", "/v1/files", files={"file": ("train.jsonl", content)}, data={"purpose": "fine-tune"})
    return str(answer.json()["id"])


def follow(url: str, followed: Followed, patience_s: float) -> None:
    """Read a job's events to the end, coming back with Last-Event-ID whenever the connection breaks."""
    deadline = time.monotonic() + patience_s
    with httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S + 5) as http:
        while time.monotonic() < deadline:
            followed.connections += 1
            headers = {"Last-Event-ID": str(followed.numbers[-1])} if followed.numbers else {}
            path = f"/v1/fine_tuning/jobs/{followed.job_id}/events"
            try:
                with http.stream("GET", path, params={"stream": "true"}, headers=headers) as answer:
                    if answer.status_code == 200:
                        for number, data in server_sent_events(answer.iter_lines()):
                            if data == "[DONE]":
                                followed.is_complete = True
                                return
                            followed.numbers.append(number)
            except httpx.TransportError:
                pass
            time.sleep(AGAIN_AFTER_S)


def server_sent_events(lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    """(number, data) of each whole event; one that was cut off is not one."""
    number, data = 0, None
    for line in lines:
        if line.startswith("id:"):
            number = int(line[3:])
        elif line.startswith("data:"):
            data = line[5:].strip()
        elif not line and data is not None:
            yield number, data
            data = None
