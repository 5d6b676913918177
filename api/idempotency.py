"""POSTs that may be sent again: each takes effect once and is answered alike.

With an `Idempotency-Key` the first final answer is replayed for a day, errors that are about the request included;
what may be different next time (408, 429, 5xx) is not kept, and the key is free. Without one, a request that says it is
a retry (`x-stainless-retry-count` of OpenAI's SDKs) is told once a try what the same request created within the last
minute: best effort, for nobody can tell whether the answer before was lost.

Nothing is locked or leased: the answer commits with the object (`shared.answers`). Two requests with one key that
arrive together both do the work; the second to commit rolls back and replays what the first was answered.

A route takes `once: OnceDep` and calls `keep` as the last thing in its transaction. One whose body is multipart calls
`same_content` as soon as it knows what came, because two encodings of the same form differ.
"""

import hashlib
import json
import logging
from typing import Annotated, TypeVar

from fastapi import Depends, Header, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from sqlalchemy.orm import Session

from api.deps import Caller
from shared import answers
from shared.answers import Kept, KeyReused
from shared.db import UNAVAILABLE, reading, transaction
from shared.errors import AppError, BadRequest, ModelNotFound

log = logging.getLogger(__name__)
Shown = TypeVar("Shown", bound=BaseModel)

MAX_KEY_CHARACTERS = 255
MAX_ROUTE_CHARACTERS = 256
RETRY_COUNT = "x-stainless-retry-count"
REPLAYED = "idempotent-replayed"
NOT_FINAL = (408, 429)
MAX_RETRY_DIGITS = 3
FORMS = ("multipart/", "application/x-www-form-urlencoded")

KEY_HELP = (
    "Names this request, in 1 to 255 printable ASCII characters: sent again with the same key within a day, it does "
    "nothing and is answered as it was before, with the header `idempotent-replayed: true`."
)


class Replay(Exception):
    """The request was answered before; give that answer again."""

    def __init__(self, kept: Kept) -> None:
        super().__init__("this request was answered before")
        self.kept = kept


class Once:
    """What one POST needs to take effect once. For one request; not thread-safe."""

    def __init__(self, project_id: str, method: str, path: str, key: str | None, retries: int | None) -> None:
        self._project_id = project_id
        self._route = f"{method} {path}"
        self._key = key
        self._retries = retries
        """How often the client has tried before; None if it never says, and so never asks."""
        self._sha256: str | None = None

    @property
    def is_retry(self) -> bool:
        """Whether the client says that it has sent this request before."""
        return bool(self._retries)

    def identify(self, *what: str) -> bool:
        """Say what the request asks for, beside its method and path. Returns whether to `replay`."""
        if self._key is None and self._retries is None:
            return False
        self._sha256 = hashlib.sha256(json.dumps([self._route, *what]).encode()).hexdigest()
        return self._key is not None or self.is_retry

    def replay(self) -> None:
        """Stop here if the request was answered before. Reads or writes the database: not inside a transaction.

        Raises:
            Replay: it was.
            KeyReused: its key was used for something else.
        """
        assert self._sha256 is not None
        if self._key is not None:
            with reading() as session:
                kept = answers.find(session, self._keyed(self._key))
        else:
            with transaction() as session:
                body = answers.tell_again(session, self._project_id, self._sha256, self._retries or 0)
            kept = None if body is None else Kept(200, body)
        if kept is not None:
            raise Replay(kept)

    def same_content(self, *what: str) -> None:
        """Both, for a route that learns what the request asks for while it works on it.

        Raises:
            Replay, KeyReused: as `replay`.
        """
        if self.identify(*what):
            self.replay()

    def keep(self, session: Session, object_id: str | None, answer: Shown) -> Shown:
        """Keep the answer in the transaction that makes it true. Returns it.

        Args:
            object_id: of what the request created, for a retry without a key; None if doing it twice does no harm.

        Raises:
            Replay: a request with the same key was faster; this transaction must roll back.
        """
        if self._sha256 is None:
            return answer
        if self._key is not None:
            request = self._keyed(self._key)
            if not answers.keep(session, request, 200, answer.model_dump_json()):
                raise Replay(_winner(session, request))
        elif object_id is not None:
            body = answer.model_dump_json()
            answers.remember_creation(session, self._project_id, self._sha256, object_id, body, self._retries or 0)
        return answer

    def may_keep(self, error: AppError) -> bool:
        """Whether an error is the final answer to a request with a key."""
        if self._key is None or self._sha256 is None:
            return False
        # A model that isn't there may be the one that another job is about to finish.
        will_stay = error.status_code < 500 and error.status_code not in NOT_FINAL
        return will_stay and not isinstance(error, KeyReused | ModelNotFound)

    def keep_error(self, error: AppError) -> None:
        """Keep a final error as the answer, after the transaction that raised it has rolled back.

        Raises:
            Replay: a request with the same key was faster.
        """
        assert self._key is not None
        request = self._keyed(self._key)
        body = json.dumps(error.body(), ensure_ascii=False, separators=(",", ":"))  # as it is sent the first time
        try:
            with transaction() as session:
                if not answers.keep(session, request, error.status_code, body):
                    raise Replay(_winner(session, request))
        except UNAVAILABLE as unavailable:
            log.warning(
                "the answer to key %s is not kept: %s", self._key, unavailable
            )  # it did nothing, nor will again

    def _keyed(self, key: str) -> answers.Request:
        assert self._sha256 is not None
        return answers.Request(self._project_id, self._route[:MAX_ROUTE_CHARACTERS], key, self._sha256)


def _winner(session: Session, request: answers.Request) -> Kept:
    kept = answers.find(session, request)
    assert kept is not None, "what stood in the way a moment ago is kept for a day"
    return kept


async def _once(
    request: Request, caller: Caller, idempotency_key: Annotated[str | None, Header(description=KEY_HELP)] = None
) -> Once:
    if idempotency_key is not None:
        _check(idempotency_key)
    retries = request.headers.get(RETRY_COUNT, "")
    once = Once(
        caller.project_id,
        request.method,
        request.url.path,
        idempotency_key,
        int(retries) if retries.isdecimal() and len(retries) <= MAX_RETRY_DIGITS else None,
    )
    request.state.once = once
    is_form = request.headers.get("content-type", "").lower().startswith(FORMS)
    if not is_form and once.identify(hashlib.sha256(await request.body()).hexdigest()):
        await run_in_threadpool(once.replay)
    return once


def _check(key: str) -> None:
    if not 1 <= len(key) <= MAX_KEY_CHARACTERS:
        raise BadRequest(
            f"the Idempotency-Key has {len(key)} characters; send 1 to {MAX_KEY_CHARACTERS}", param="Idempotency-Key"
        )
    if not (key.isascii() and key.isprintable()):
        raise BadRequest(f"the Idempotency-Key {key!a} must be printable ASCII, as a UUID is", param="Idempotency-Key")


OnceDep = Annotated[Once, Depends(_once)]
