"""What `POST /v1/chat/completions` accepts, in OpenAI's shapes; `shared.completion_schema` has the older endpoint.

Every parameter OpenAI has is known here. Those that some engine honours have a field, and an engine that doesn't
honour one refuses it; the others are refused here with a message of their own, unless they are null or say what
happens anyway (`modalities: ["text"]`). A parameter that OpenAI does not have is refused as unknown: a misspelt
`temprature` must not be ignored silently.
"""

import json
import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    field_validator,
    model_validator,
)

from shared.errors import BadRequest

DEFAULT_TEMPERATURE = 1.0
DEFAULT_TOP_P = 1.0
MAX_MESSAGES = 2048
MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 256
MAX_METADATA = 16

MAX_TOOLS = 128
MAX_PARTS = 4096
"""Of the content of all messages."""
MAX_JSON_DEPTH = 64
MAX_BIASES = 1024
MAX_TOKEN_ID_DIGITS = 10
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI's parameters that no engine honours, with the values that ask for nothing (null always does)."""


def _encodable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and can't be written anywhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair, which is no Unicode text") from error
    return text


Unicode = Annotated[StrictStr, AfterValidator(_encodable)]


def _is_json(value: dict[str, Any]) -> dict[str, Any]:
    """What clients send as JSON may hold what can't be sent on as JSON."""
    left: list[tuple[Any, int]] = [(value, 1)]
    while left:
        item, depth = left.pop()
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"nested more than {MAX_JSON_DEPTH} deep")
        if isinstance(item, str):
            _encodable(item)
        elif isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"{item} is not JSON")
        elif isinstance(item, dict):
            left += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            left += [(part, depth + 1) for part in item]
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_is_json)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: Unicode


def _branch(value: object) -> str:
    return "list" if isinstance(value, list) else "str"


Content = Annotated[
    Annotated[Unicode, Tag("str")] | Annotated[list[TextPart], Field(min_length=1), Tag("list")],
    Discriminator(_branch),  # so that a wrong part is reported as that part, not as "no string"
]


class FunctionCall(_Strict):
    name: Annotated[Unicode, Field(min_length=1, max_length=64)]
    arguments: Unicode


class ToolCall(_Strict):
    id: Annotated[Unicode, Field(min_length=1, max_length=128)]
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(_Strict):
    """One turn. Content is text, or a list of text parts; an assistant that calls tools may have none."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[Unicode, Field(max_length=128)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_extras(cls, value: Any) -> Any:
        """The SDK's own answers come back as history: their null and empty fields say nothing."""
        if not isinstance(value, dict):
            return value
        if value.get("role") == "developer":
            value = {**value, "role": "system"}  # OpenAI's newer word for the same thing
        extras = {"name", "refusal", "audio", "function_call", "tool_calls", "annotations", "reasoning_content"}
        return {key: item for key, item in value.items() if key not in extras or item not in (None, [], "")}

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls belong to the assistant, not to the role {self.role!r}")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id is what a message of the role tool has, and no other")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing; only an assistant's message with tool_calls may have none")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def as_dict(self) -> dict[str, Any]:
        """As a chat template takes it."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class Function(_Strict):
    name: Annotated[Unicode, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Unicode | None = None
    parameters: JsonObject | None = None
    strict: StrictBool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(_Strict):
    name: Unicode


class NamedTool(_Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(_Strict):
    name: Annotated[Unicode, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Unicode | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: StrictBool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema is needed for the type json_schema, and for no other")
        return self


class StreamOptions(_Strict):
    include_usage: StrictBool | None = False
    include_obfuscation: StrictBool | None = None
    """Padding against traffic analysis; accepted, and never added."""


class GenerationParameters(_Strict):
    """What both endpoints have."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]]

    model: Annotated[Unicode, Field(min_length=1, max_length=512)]
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=True)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Unicode | list[Unicode] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, strict=True)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, strict=True)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, strict=True)]] | None = None
    """By token id."""
    user: Annotated[StrictStr, Field(max_length=512)] | None = None
    """Changes nothing about an answer; accepted, checked, not kept."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_honoured(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {}
        for key, item in value.items():
            if key not in cls.neutral:
                kept[key] = item
            elif item is not None and not any(_same(item, neutral) for neutral in cls.neutral[key]):
                raise BadRequest(
                    f"{key}={json.dumps(item, default=str)[:100]} is not supported; {_remedy(cls.neutral[key])}",
                    param=key,
                    code="unsupported_parameter",
                )
        return kept

    @field_validator("stop")
    @classmethod
    def _bounded_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        strings = [value] if isinstance(value, str) else value or []
        if len(strings) > MAX_STOP_STRINGS:
            raise ValueError(f"{len(strings)} stop strings; up to {MAX_STOP_STRINGS} are possible")
        for text in strings:
            if not text or len(text) > MAX_STOP_CHARACTERS:
                raise ValueError(f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters, one has {len(text)}")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _of_token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if len(value or {}) > MAX_BIASES:
            raise ValueError(f"{len(value or {})} biases; up to {MAX_BIASES} are possible")
        for key in value or {}:
            if not key.isascii() or not key.isdecimal() or len(key) > MAX_TOKEN_ID_DIGITS:
                raise ValueError(f'{key[:20]!r} is no token id; the keys are ids, such as "198"')
        return value

    @model_validator(mode="after")
    def _streams_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_body(self) -> dict[str, Any]:
        """What both endpoints have of a `GenerationRequest.body`."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        optional = {
            "seed": self.seed,
            "stop": stop or None,
            "frequency_penalty": self.frequency_penalty or None,
            "presence_penalty": self.presence_penalty or None,
            "logit_bias": self.logit_bias or None,
        }
        return {
            "temperature": DEFAULT_TEMPERATURE if self.temperature is None else self.temperature,
            "top_p": DEFAULT_TOP_P if self.top_p is None else self.top_p,
            "n": self.n or 1,
            **{key: value for key, value in optional.items() if value is not None},
        }


class ChatRequest(GenerationParameters):
    """The parameters that are honoured, and in `NEUTRAL` those that are not."""

    neutral = NEUTRAL

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    safety_identifier: Annotated[StrictStr, Field(max_length=512)] | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[StrictStr, Field(max_length=512)]] | None = None
    """`safety_identifier` and `metadata` change nothing about an answer; accepted, checked, not kept."""

    @field_validator("messages", mode="before")
    @classmethod
    def _bounded_parts(cls, value: Any) -> Any:
        """Before each is looked at, which takes its time."""
        messages = value if isinstance(value, list) else []
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        parts = sum(len(content) for content in contents if isinstance(content, list))
        if parts > MAX_PARTS:
            raise ValueError(f"{parts} parts of content; up to {MAX_PARTS} are possible, and each may be long")
        return value

    @field_validator("metadata")
    @classmethod
    def _bounded_metadata(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is not None and len(value) > MAX_METADATA:
            raise ValueError(f"{len(value)} keys; up to {MAX_METADATA} are possible")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError(
                f"max_tokens={both[0]} and max_completion_tokens={both[1]} differ; they are two names of one limit"
            )
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: required needs tools")
        return self

    def generation_body(self) -> dict[str, Any]:
        """`GenerationRequest.body`."""
        limit = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        has_format = self.response_format is not None and self.response_format.type != "text"
        choice = self.tool_choice.model_dump() if isinstance(self.tool_choice, NamedTool) else self.tool_choice
        optional = {
            "max_tokens": limit,
            "logprobs": self.logprobs or None,
            "top_logprobs": self.top_logprobs or None,
            "response_format": self.response_format.model_dump(by_alias=True, exclude_none=True)
            if self.response_format is not None and has_format
            else None,
            "tools": [tool.model_dump(exclude_none=True) for tool in self.tools] if self.tools else None,
            "tool_choice": choice if self.tools else None,
            "parallel_tool_calls": self.parallel_tool_calls if self.tools else None,
        }
        return {
            "messages": [message.as_dict() for message in self.messages],
            **self.sampling_body(),
            **{key: value for key, value in optional.items() if value is not None},
        }


def _remedy(neutral: tuple[Any, ...]) -> str:
    values = " or ".join(json.dumps(value) for value in neutral)
    return f"leave it out, or send {values}" if values else "leave it out"


def _same(value: object, neutral: object) -> bool:
    """Equal, but True is no 1 and False is no 0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
