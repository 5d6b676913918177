"""The protocol between API processes and generators: generation is pulled, through Redis Streams, as JSON.

    API                                   Redis                                   generator
    submit ───── XADD ──▶ requests, batch_requests (bounded) ── XREADGROUP, as many as it has free slots
      ▲                                                                              │ taken, delta*, end | error
      └─ one reader ◀── XREAD ─── replies:<api> (one an API process) ◀── XADD ───────┘
    cancel ─ SET cancelled:<id>, XADD ──▶ cancels ──────────── XREAD ──▶ slot free before the next token

Owns names of keys, their lifetimes, and what is written into them. This is the one thing that lives in Redis alone,
so it is bounded everywhere: every key expires, every stream has a maximum length, every request a deadline.

Who notices what:
- a generator beats in the sorted set `generators` every second; one silent for `SILENT_MS` is taken for dead.
- a request stays pending in the group until its first text: until then another generator takes it over from a dead
  one (`attempt` + 1); after that its client gets an error, because text can't be taken back.
- chunks carry (id, attempt, sequence). The API follows the first attempt that sends text, drops repeats, and turns a
  gap into an error.
- an API process keeps `replies:<api>:alive`; when it is gone and stays so, generators end what that process had asked
  for, with an error in case it lives after all.

All ages are measured by Redis's clock: hosts may disagree about the time.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from shared.errors import (
    AppError,
    BadRequest,
    Conflict,
    ModelNotFound,
    NotFound,
    PermissionDenied,
    TooLarge,
    TooManyRequests,
    Unavailable,
)

Endpoint = Literal["chat", "completion"]
"""Which of OpenAI's two shapes a request has, and its answer."""
Kind = Literal["live", "batch"]
"""Whether somebody waits for the answer now; a batch's requests give way to those."""

PREFIX = "anneal:generation:"
REQUESTS: dict[Kind, str] = {"live": f"{PREFIX}requests", "batch": f"{PREFIX}batch_requests"}
GENERATORS = f"{PREFIX}generators"
CANCELS = f"{PREFIX}cancels"
WARM_UPS = f"{PREFIX}warm_ups"
"""A list of `Model`: those whose jobs have just succeeded. One generator takes each."""
GROUP = "generators"

BEAT_S = 1.0
"""How often both sides say that they live, and look after the other."""
SILENT_MS = 10_000
"""A generator or an API process that has said nothing for this long is taken for dead."""
GONE_S = 3.0
"""Beats that may be missing after the broker was away, before whoever did not say them is taken for dead."""
MAX_ATTEMPTS = 3
"""Generators that may die of one request before its client gets an error."""
KEY_TTL_S = 60
"""Lifetime of what is renewed every `BEAT_S`."""
MAX_REPLIES = 20_000
"""Entries of a reply stream; its reader trims what it has read."""
MAX_CANCELS = 10_000
MAX_WARM_UPS = 4
"""More have succeeded at once than anybody will ask for next; the newest count."""


def replies_key(api_id: str) -> str:
    """The stream on which one API process gets all its answers."""
    return f"{PREFIX}replies:{api_id}"


def alive_key(replies: str) -> str:
    """Exists as long as the reader of that stream lives."""
    return f"{replies}:alive"


def cancelled_key(request_id: str) -> str:
    """Set when a request is cancelled: a generator that takes it later must know."""
    return f"{PREFIX}cancelled:{request_id}"


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Wire):
    """A model to load before anybody asks for it."""

    name: str
    location: str


class GenerationRequest(_Wire):
    """What a generator must do. Its age is that of its stream entry."""

    id: str
    replies: str
    """Key of the stream that takes the answer."""
    model: str
    """The name the client used, for messages."""
    location: str
    """`base:<hub id>`, or a folder relative to storage."""
    endpoint: Endpoint
    body: dict[str, Any]
    """OpenAI's request as `shared.chat_schema` or `shared.completion_schema` has checked it, with only what asks for
    something: `temperature`, `top_p` and `n` always, `stop` as a list, the limit as `max_tokens`, one `prompt` (text or
    token ids); nothing about the model, streaming or the user."""
    kind: Kind = "live"
    deadline_s: float
    """Seconds after submission at which nobody waits any more."""


class Choice(_Wire):
    """The next piece of one of the `n` answers to a request."""

    index: int = 0
    text: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    """OpenAI's deltas: those of one `index` add up."""
    logprobs: list[dict[str, Any]] | None = None
    """One entry a token, as chat has them: token, logprob, bytes, top_logprobs. The first token of a prompt that is
    echoed has the logprob null."""
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None


def joined(choices: Iterable[Choice]) -> list[Choice]:
    """The same pieces, those of one index made into one."""
    by_index: dict[int, list[Choice]] = {}
    for choice in choices:
        by_index.setdefault(choice.index, []).append(choice)
    return [pieces[0] if len(pieces) == 1 else _join(pieces) for pieces in by_index.values()]


def _join(pieces: list[Choice]) -> Choice:
    logprobs = [entry for piece in pieces for entry in piece.logprobs or ()]
    tool_calls = [call for piece in pieces for call in piece.tool_calls or ()]
    return Choice(
        index=pieces[0].index,
        text="".join(piece.text for piece in pieces),
        tool_calls=tool_calls or None,
        logprobs=logprobs or None,
        finish_reason=next((piece.finish_reason for piece in pieces if piece.finish_reason), None),
    )


class _Chunk(_Wire):
    id: str
    generator: str
    attempt: int
    """1 for the first generator that took the request."""
    sequence: int
    """0, 1, 2 … within an attempt."""


class Taken(_Chunk):
    """A generator has the request: it loads the model if need be, then decodes."""

    type: Literal["taken"] = "taken"


class Delta(_Chunk):
    """The next pieces of the answer."""

    type: Literal["delta"] = "delta"
    choices: list[Choice]


class End(_Chunk):
    """The answer is complete: every choice has had its `finish_reason`."""

    type: Literal["end"] = "end"
    prompt_tokens: int
    completion_tokens: int
    """Of all choices together."""


class Error(_Chunk):
    """The request has failed; an `AppError` on its way to the client."""

    type: Literal["error"] = "error"
    status_code: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    def to_exception(self) -> AppError:
        """The error as the API raises it."""
        kind = ModelNotFound if self.code == ModelNotFound.code else _BY_STATUS.get(self.status_code, AppError)
        return kind(self.message, param=self.param, code=self.code, retry_after_s=self.retry_after_s)


Chunk = Annotated[Taken | Delta | End | Error, Field(discriminator="type")]

_BY_STATUS: dict[int, type[AppError]] = {
    kind.status_code: kind
    for kind in (BadRequest, PermissionDenied, NotFound, Conflict, TooLarge, TooManyRequests, Unavailable)
}
_chunks: TypeAdapter[list[Chunk]] = TypeAdapter(list[Chunk])


def dump_chunks(chunks: list[Chunk]) -> bytes:
    """Chunks of any requests, in order, as one stream entry's field."""
    return _chunks.dump_json(chunks, exclude_none=True)


def load_chunks(data: bytes) -> list[Chunk]:
    """The inverse of `dump_chunks`.

    Raises:
        ValueError: it is not JSON of this protocol.
    """
    return _chunks.validate_json(data)


def error_fields(error: AppError) -> dict[str, Any]:
    """The fields of an `Error` chunk for `error`."""
    return {
        "status_code": error.status_code,
        "message": error.message,
        "param": error.param,
        "code": error.code,
        "retry_after_s": error.retry_after_s,
    }
