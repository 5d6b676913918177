"""What an engine is to the rest of a generator: one model that is loaded and answers OpenAI's requests.

    Backend.plan ─▶ Backend.load ─▶ Engine.answer* ─▶ Engine.close
                                     └─ Backend.swap: other weights of the same shape, while it answers nobody

An engine takes a request as JSON and sends pieces of choices; which library decodes is its own matter. What it can't
do it refuses (`refuse_unsupported`): a parameter that is ignored gives wrong answers that look right.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shared.errors import BadRequest
from shared.generation import Choice, GenerationRequest

MAX_SCORES = 400_000
"""Log-probabilities of one request: some 250 MB where they are added up to one answer."""

Send = Callable[[list[Choice]], None]
"""Takes the next pieces of an answer; never waits. To be called on the event loop."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int


class Plan(Protocol):
    """What a model will take; made before it is loaded."""

    @property
    def total_bytes(self) -> int: ...


class Engine(Protocol):
    """A loaded model. Used from one event loop, but for `close`, which blocks."""

    memory_bytes: int

    @property
    def is_alive(self) -> bool:
        """False once it can't answer any more; whoever it was answering has been told so."""

    async def answer(self, request: GenerationRequest, attempt: int, send: Send) -> Usage:
        """Answer one request; each choice's last piece has its `finish_reason`. Cancelling the call frees the slot.

        Raises:
            BadRequest: the request asks for what the model or the engine can't do, or is too long.
            Unavailable: the engine has failed.
        """

    def close(self) -> None:
        """Stop, whatever is being answered, and give the memory back. Blocks for some seconds at most."""


class Backend(Protocol):
    """Makes engines of one library."""

    name: str

    def plan(self, folder: Path, name: str) -> Plan:
        """What the model in that folder will take. Blocks.

        Raises:
            BadRequest: it can't be served safely.
            Unavailable: it is larger than the whole budget.
        """

    def load(self, folder: Path, name: str, plan: Any) -> Engine:
        """Load it, as `plan` has said. Blocks for seconds to a minute."""

    def swap(self, engine: Engine, folder: Path, name: str) -> bool:
        """Put the weights of that folder into an engine that answers nobody, if nothing else of it would differ.

        Returns whether it was done; if not, the engine is as before. Blocks.

        Raises:
            Exception: it failed halfway; the engine must be closed.
        """


def refuse_unsupported(request: GenerationRequest, engine: str, supported: Collection[str]) -> None:
    """Refuse a request for what this engine has not.

    Raises:
        BadRequest: with the first parameter that is not supported.
    """
    for key, value in request.body.items():
        if key not in supported:
            raise unsupported(key, value, engine)


def room_for(request: GenerationRequest, prompt_tokens: int, context_tokens: int) -> int:
    """How many tokens the answer may have.

    Raises:
        BadRequest: prompt and answer don't fit the context together.
    """
    max_tokens: int | None = request.body.get("max_tokens")
    left = context_tokens - prompt_tokens
    if left < (max_tokens if max_tokens is not None else 1):
        raise too_long(request, prompt_tokens, context_tokens)
    room = left if max_tokens is None else max_tokens
    refuse_too_many_scores(request, room)
    return room


def refuse_too_many_scores(request: GenerationRequest, tokens: int) -> None:
    """Log-probabilities are a thousand times the size of their tokens, and all of an answer's are in memory at once.

    Raises:
        BadRequest: all choices together, of so many tokens each, may have more than `MAX_SCORES`.
    """
    body = request.body
    logprobs = body.get("logprobs")
    if logprobs is None or logprobs is False:
        return
    top = body.get("top_logprobs") or 0 if logprobs is True else int(logprobs)
    if (scores := body["n"] * tokens * (1 + top)) > MAX_SCORES:
        raise BadRequest(
            f"{body['n']} choices of up to {tokens} tokens with {1 + top} log-probabilities each are {scores} in all; "
            f"up to {MAX_SCORES} are possible: ask for fewer tokens (max_tokens), choices (n) or logprobs",
            param="top_logprobs" if top else "logprobs",
        )


def too_long(request: GenerationRequest, prompt_tokens: int, context_tokens: int) -> BadRequest:
    """The error of a prompt and an answer that don't fit a context."""
    max_tokens = request.body.get("max_tokens")
    asked = "" if max_tokens is None else f" and {max_tokens} tokens were asked for the answer"
    prompt = "messages" if request.endpoint == "chat" else "prompt"
    return BadRequest(
        f"{request.model!r} has a context of {context_tokens} tokens; the prompt takes {prompt_tokens}{asked}. Send "
        "less, or lower max_tokens",
        param=prompt if prompt_tokens >= context_tokens else "max_tokens",
        code="context_length_exceeded",
    )


def knows_no_tools(name: str) -> BadRequest:
    """The error of tools for a model whose chat template would leave them out of the prompt."""
    return BadRequest(f"the chat template of {name!r} knows no tools; use a model whose template does", param="tools")


def unsupported(key: str, value: Any, engine: str) -> BadRequest:
    """The error of a parameter, or of a value of one, that an engine can't honour."""
    return BadRequest(
        f"{key}={str(value)[:100]} is not supported by the engine {engine!r} that serves this model; leave it out, or "
        "ask the operator for another engine (docs/serving.md has the table)",
        param=key,
        code="unsupported_parameter",
    )
