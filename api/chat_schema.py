"""What `POST /v1/chat/completions` accepts and answers, in OpenAI's shapes.

Every parameter OpenAI has is known here. Those that the engine honours have a field; the others are refused with a
message of their own unless they are null or say what happens anyway (`n: 1`, `presence_penalty: 0`). A parameter
that OpenAI does not have is refused as unknown: a misspelt `temprature` must not be ignored silently.
"""

import json
from typing import Annotated, Any, Literal, Self

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

MAX_MESSAGES = 2048
MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 256
MAX_METADATA = 16

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI's parameters that this engine does not honour, with the values that ask for nothing (null always does)."""


def _encodable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and can't be written anywhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair, which is no Unicode text") from error
    return text


Unicode = Annotated[StrictStr, AfterValidator(_encodable)]


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


class ChatMessage(_Strict):
    """One turn. Content is text, or a list of text parts."""

    role: Literal["system", "user", "assistant"]
    content: Content

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

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    include_usage: StrictBool | None = False
    include_obfuscation: StrictBool | None = None
    """Padding against traffic analysis; accepted, and never added."""


class ChatRequest(_Strict):
    """The parameters that are honoured, and in `NEUTRAL` those that are not."""

    model: Annotated[Unicode, Field(min_length=1, max_length=512)]
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=True)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Unicode | list[Unicode] | None = None
    user: Annotated[StrictStr, Field(max_length=512)] | None = None
    safety_identifier: Annotated[StrictStr, Field(max_length=512)] | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[StrictStr, Field(max_length=512)]] | None = None
    """`user`, `safety_identifier` and `metadata` change nothing about an answer; accepted, checked, not kept."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_honoured(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {}
        for key, item in value.items():
            if key not in NEUTRAL:
                kept[key] = item
            elif item is not None and not any(_same(item, neutral) for neutral in NEUTRAL[key]):
                raise BadRequest(
                    f"{key}={json.dumps(item, default=str)[:100]} is not supported by this engine; {_remedy(key)}",
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
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def _remedy(key: str) -> str:
    values = " or ".join(json.dumps(value) for value in NEUTRAL[key])
    return f"leave it out, or send {values}" if values else "leave it out"


def _same(value: object, neutral: object) -> bool:
    """Equal, but True is no 1 and False is no 0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
