"""What `POST /v1/completions` accepts, in OpenAI's shapes; `shared.chat_schema` says how parameters are treated."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, StrictBool, StrictInt, model_validator

from shared.chat_schema import MAX_CHOICES, GenerationParameters, Unicode

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""
MAX_LOGPROBS = 5
MAX_PROMPTS = 128
MAX_TOKEN_ID = 2**31 - 1

TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0, le=MAX_TOKEN_ID)]], Field(min_length=1)]


class CompletionRequest(GenerationParameters):
    """The older endpoint: text goes on, or is scored with `echo` and `logprobs`. Each prompt has answers of its own."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"best_of": (1,), "suffix": ("",)}

    prompt: (
        Unicode
        | Annotated[list[Unicode], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: StrictBool | None = False

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 needs echo: true; there would be nothing to answer")
        if len(self.prompts) * (self.n or 1) > MAX_CHOICES:
            raise ValueError(
                f"{len(self.prompts)} prompts with n={self.n or 1} are more than {MAX_CHOICES} answers; send fewer"
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each is text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # one prompt of token ids
        return list(self.prompt)

    def generation_bodies(self) -> list[dict[str, Any]]:
        """A `GenerationRequest.body` for each prompt."""
        optional = {"logprobs": self.logprobs, "echo": self.echo or None}
        shared = {
            "max_tokens": DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            **self.sampling_body(),
            **{key: value for key, value in optional.items() if value is not None},
        }
        return [{"prompt": prompt, **shared} for prompt in self.prompts]
