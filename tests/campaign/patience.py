"""HTTP as a patient client does it: what failed is repeated, in one of the ways in which that creates nothing twice."""

import time
from typing import Any

import httpx

from tests.campaign.notebook import Keyed, Notebook

REQUEST_TIMEOUT_S = 15
PATIENCE_S = 180
"""A request that is not answered for so long is given up."""
AGAIN_AFTER_S = 0.3
KEY, RETRY_COUNT = "idempotency-key", "x-stainless-retry-count"


class GaveUp(Exception):
    """The service refused, or kept failing beyond all patience."""


class Client:
    """HTTP with repetition. Any number of threads may use one."""

    def __init__(self, url: str, notebook: Notebook) -> None:
        self._notebook = notebook
        self._http = httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S)

    def call(
        self,
        method: str,
        path: str,
        *,
        expect: tuple[int, ...] = (200,),
        key: str | None = None,
        counts: bool = False,
        **keywords: Any,
    ) -> httpx.Response:
        """One request, repeated until it is answered with one of `expect`.

        Args:
            key: the Idempotency-Key of every repetition.
            counts: repetitions say the how-manieth they are, as those of OpenAI's SDKs do.

        Raises:
            GaveUp: the answer is another 4xx, or nothing else came within `PATIENCE_S`.
        """
        deadline = time.monotonic() + PATIENCE_S
        retries = 0
        while True:
            answer, problem = self.try_once(method, path, key=key, retries=retries if counts else None, **keywords)
            if answer is not None:
                if answer.status_code in expect:
                    return answer
                if answer.status_code < 500 and answer.status_code != 429:
                    raise GaveUp(f"{method} {path}: {problem}")
            if time.monotonic() > deadline:
                raise GaveUp(f"{method} {path}: {problem}, for {PATIENCE_S} s")
            retries += 1
            time.sleep(AGAIN_AFTER_S)

    def try_once(
        self, method: str, path: str, *, key: str | None = None, retries: int | None = None, **keywords: Any
    ) -> tuple[httpx.Response | None, str]:
        """(the answer, or None if the connection broke; what came in words)."""
        headers = {} if key is None else {KEY: key}
        if retries is not None:
            headers[RETRY_COUNT] = str(retries)
        try:
            answer = self._http.request(method, path, headers=headers, **keywords)
        except httpx.TransportError as error:
            return None, repr(error)
        if answer.status_code == 500:  # an outage is answered with 503; a 500 is a mistake of ours
            with self._notebook.lock:
                self._notebook.internal_errors.append(f"{method} {answer.request.url}: {answer.text}")
        return answer, f"{answer.status_code} {answer.text[:500]}"

    def create_with_key(self, kind: str, path: str, mark: str, *, repeats: bool = False, **keywords: Any) -> str:
        """Create something with `mark` for its key. Returns its id.

        Args:
            repeats: ask once more when it is answered, which must change nothing.
        """
        keyed = Keyed(kind, mark)
        with self._notebook.lock:
            self._notebook.keyed.append(keyed)
        for _ in range(2 if repeats else 1):
            answer = self.call("POST", path, key=mark, **keywords)
            keyed.times += 1
            keyed.answers.add(str(answer.json()["id"]))
        return min(keyed.answers)
