"""Answers that routes write themselves, described for /openapi.json: errors, events, curves, chat, health.

What a route returns as a model is described by that model; these are for the rest, and say nothing at run time.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
CSV = {"text/csv": {"schema": {"type": "string"}, "example": "step,loss\n1,2.31\n2,2.18\n"}}


def also_streams(model: Any, what: str) -> dict[int | str, dict[str, Any]]:
    """A route's 200: `model` as JSON, or with `stream` server-sent events, each of them `what`."""
    said = f"With `stream`: server-sent events, `data: ` and {what} as JSON each, `data: [DONE]` at the end."
    return {
        200: {
            "model": model,
            "description": f"The whole answer. {said}",
            "content": {"text/event-stream": {"schema": {"type": "string", "description": said}}},
        }
    }


class ErrorDetail(BaseModel):
    """What went wrong, and what to do."""

    message: str
    type: Literal[
        "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
    ]
    param: str | None = Field(description="The field at fault, dotted, if there is one.")
    code: str


class Error(BaseModel):
    """OpenAI's error body."""

    error: ErrorDetail


class JobEvent(BaseModel):
    """OpenAI's `fine_tuning.job.event`."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class JobMetrics(BaseModel):
    """A job's whole curve, one row a logged step. Which values a row has depends on the step."""

    class Row(BaseModel):
        model_config = ConfigDict(extra="allow")

        step: int

    object: Literal["list"]
    data: list[Row]
    has_more: Literal[False]


class ToolCallFunction(BaseModel):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it.")


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: ToolCallFunction


class ChatAnswer(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class ToolCalls(ChatAnswer):
    """The assistant's message when it calls tools."""

    tool_calls: list[ToolCall]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: ToolCalls | ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    """OpenAI's `chat.completion`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """OpenAI's `text_completion`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Liveness(BaseModel):
    status: Literal["ok"]


class Readiness(BaseModel):
    status: Literal["ok", "unavailable"]
    checks: dict[str, str] = Field(description="By part, `ok` or `failed: …`.")
