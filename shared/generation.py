"""The protocol between API processes and generators: generation is pulled, through Redis Streams, as JSON.

    API                                   Redis                                   generator
    submit ───────────── XADD ──▶ requests (one, bounded) ──── XREADGROUP, as many as it has free slots
      ▲                                                                              │ taken, text*, end | error
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
- an API process keeps `replies:<api>:alive`; when it is gone, generators cancel what that process had asked for.

All ages are measured by Redis's clock: hosts may disagree about the time.
"""

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

PREFIX = "anneal:generation:"
REQUESTS = f"{PREFIX}requests"
GENERATORS = f"{PREFIX}generators"
CANCELS = f"{PREFIX}cancels"
GROUP = "generators"

BEAT_S = 1.0
"""How often both sides say that they live, and look after the other."""
SILENT_MS = 10_000
"""A generator or an API process that has said nothing for this long is taken for dead."""
MAX_ATTEMPTS = 3
"""Generators that may die of one request before its client gets an error."""
KEY_TTL_S = 60
"""Lifetime of what is renewed every `BEAT_S`."""
MAX_REPLIES = 20_000
"""Entries of a reply stream; its reader trims what it has read."""
MAX_CANCELS = 10_000


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


class Message(_Wire):
    """One turn of a conversation."""

    role: str
    content: str


class GenerationRequest(_Wire):
    """What a generator must do. Its age is that of its stream entry."""

    id: str
    replies: str
    """Key of the stream that takes the answer."""
    model: str
    """The name the client used, for messages."""
    location: str
    """`base:<hub id>`, or a folder relative to storage."""
    messages: list[Message]
    max_tokens: int | None
    """None: up to the end of the model's context."""
    temperature: float
    top_p: float
    seed: int | None
    """None: the generator draws one."""
    stop: list[str]
    deadline_s: float
    """Seconds after submission at which nobody waits any more."""


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


class Text(_Chunk):
    """The next piece of the answer."""

    type: Literal["text"] = "text"
    text: str


class End(_Chunk):
    """The answer is complete."""

    type: Literal["end"] = "end"
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


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


Chunk = Annotated[Taken | Text | End | Error, Field(discriminator="type")]

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
