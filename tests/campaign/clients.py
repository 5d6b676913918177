"""The service's clients, as patient as clients should be: each repeats what failed, and none creates anything twice.

Every client notes what it was told; the verdict compares that with the database. Nothing here knows of faults, except
that connections may break and answers may be late.
"""

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from tests.campaign import parcels
from tests.campaign.notebook import Followed, Notebook, SentFile, Submitted
from tests.campaign.patience import AGAIN_AFTER_S, PATIENCE_S, REQUEST_TIMEOUT_S, Client, GaveUp
from tests.campaign.plan import BASE_MODEL, VALIDATION_FILE, JobPlan

ENDED = ("succeeded", "failed", "cancelled")
POLL_S = 0.4
JOBS = "/v1/fine_tuning/jobs"


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
        submitted = submit(client, self._notebook, plan)
        with self._notebook.lock:
            self._notebook.submitted.append(submitted)
        created = time.monotonic()
        if plan.is_followed:
            self._follow(submitted.job_id)
        path = f"{JOBS}/{submitted.job_id}"
        if plan.pause_after_s is not None:
            time.sleep(plan.pause_after_s)
            _pause(client, submitted)
        while time.monotonic() - created < self._patience_s:
            if plan.cancel_after_s is not None and submitted.cancel_answer is None:
                time.sleep(max(0.0, plan.cancel_after_s - (time.monotonic() - created)))
                submitted.cancel_answer = _ask(client, path, "cancel")
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


def _pause(client: Client, submitted: Submitted) -> None:
    """Pause a job, leave it alone, and resume it, or cancel it as it is."""
    plan, path = submitted.plan, f"{JOBS}/{submitted.job_id}"
    submitted.pause_answer = _ask(client, path, "pause")
    time.sleep(plan.paused_for_s)
    if plan.is_cancelled_paused:
        submitted.cancel_answer = _ask(client, path, "cancel")
    else:
        _ask(client, path, "resume")


def _ask(client: Client, path: str, verb: str) -> str:
    """The job's status in the answer; `conflict` if it is too late for that."""
    answer = client.call("POST", f"{path}/{verb}", expect=(200, 409))
    return str(answer.json()["status"]) if answer.status_code == 200 else "conflict"


def submit(client: Client, notebook: Notebook, plan: JobPlan) -> Submitted:
    """Send the files and create the job, in the way its client has of creating it once."""
    draw = random.Random(f"{plan.seed}/{plan.index}")
    body: dict[str, Any] = {
        "model": BASE_MODEL,
        "training_file": _send(client, notebook, plan, plan.training_file, f"c{plan.index}.jsonl", draw),
        "seed": plan.seed,
        "suffix": f"c{plan.index}",
        "metadata": {"campaign": str(plan.index)},
        "training": {"keep_checkpoints": plan.keep_checkpoints, **plan.training},
    }
    if plan.has_validation_file:
        body["validation_file"] = _send(client, notebook, plan, VALIDATION_FILE, f"c{plan.index}-valid.jsonl", draw)
    if plan.retry == "key":
        job_id = client.create_with_key("job", JOBS, f"c{plan.index}", repeats=draw.random() < 0.3, json=body)
        return Submitted(plan, job_id)
    if plan.retry == "counts":
        return Submitted(plan, client.call("POST", JOBS, counts=True, json=body).json()["id"])
    return Submitted(plan, _look_and_create(client, plan, body))


def _look_and_create(client: Client, plan: JobPlan, body: dict[str, Any]) -> str:
    """An answer that was lost is looked for before the job is created again."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = client.call("GET", JOBS, params={"metadata[campaign]": str(plan.index)}).json()
        if found["data"]:
            return str(found["data"][-1]["id"])
        answer, problem = client.try_once("POST", JOBS, json=body)
        if answer is not None:
            if answer.status_code == 200:
                return str(answer.json()["id"])
            if answer.status_code < 500 and answer.status_code != 429:
                raise GaveUp(f"POST {JOBS}: {problem}")
        if time.monotonic() > deadline:
            raise GaveUp(f"POST {JOBS}: no answer for {PATIENCE_S} s")
        time.sleep(AGAIN_AFTER_S)


def _send(client: Client, notebook: Notebook, plan: JobPlan, content: bytes, mark: str, draw: random.Random) -> str:
    """Upload a file of a job. Returns its id."""
    choices: dict[str, Any] = {"retry": plan.retry, "is_sent_in_parts": plan.is_sent_in_parts}
    return send_file(client, notebook, content, mark, draw, purpose="fine-tune", **choices)


def send_file(
    client: Client,
    notebook: Notebook,
    content: bytes,
    mark: str,
    draw: random.Random,
    *,
    purpose: str,
    retry: str,
    is_sent_in_parts: bool,
) -> str:
    """Upload a file, in one request or in parts. Returns its id.

    Args:
        mark: its name, and its key if there is one.
        retry: as in `plan.RETRIES`.
    """
    if is_sent_in_parts:
        return parcels.send(client, notebook, content, mark, purpose, draw)
    form: dict[str, Any] = {"files": {"file": (mark, content)}, "data": {"purpose": purpose}}
    if retry == "key":
        file_id = client.create_with_key("file", "/v1/files", mark, repeats=draw.random() < 0.3, **form)
    else:
        file_id = str(client.call("POST", "/v1/files", counts=retry == "counts", **form).json()["id"])
    with notebook.lock:
        notebook.files.append(SentFile(file_id, hashlib.sha256(content).hexdigest()))
    return file_id


def follow(url: str, followed: Followed, patience_s: float) -> None:
    """Read a job's events to the end, coming back with Last-Event-ID whenever the connection breaks."""
    deadline = time.monotonic() + patience_s
    with httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S + 5) as http:
        while time.monotonic() < deadline:
            followed.connections += 1
            headers = {"Last-Event-ID": str(followed.numbers[-1])} if followed.numbers else {}
            path = f"{JOBS}/{followed.job_id}/events"
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
