"""What the official SDK's types really ask of an answer. The SDK itself takes whatever comes.

`problems(type, answer)` walks a type of `openai.types` and the JSON of an answer side by side: a required field that is
missing, a field the type has not, a null where none may be, a wrong type and a value outside a Literal are each told
with their path. Three things go beyond the types, and nothing else may: the key `anneal`, the status `paused` of a job,
and the purpose `evals` of a file, which the SDK's own `FilePurpose` sends and its `FileObject` forgot.
"""

import types
from typing import Annotated, Any, Generic, Literal, Optional, TypeVar, Union, get_args, get_origin

from openai._models import BaseModel
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob

T = TypeVar("T")
OURS = "anneal"
BEYOND_THE_TYPES = {(FineTuningJob, "status"): ("paused",), (FileObject, "purpose"): ("evals",)}
JSON_TYPES: dict[Any, tuple[type, ...]] = {str: (str,), int: (int,), float: (int, float), bool: (bool,)}


class ListPage(BaseModel, Generic[T]):
    """A list as OpenAI's API reference has it; the SDK's own page classes know `data` and `has_more` only."""

    object: Literal["list"]
    data: list[T]
    has_more: bool
    first_id: Optional[str] = None  # noqa: UP045 - written as the SDK writes it
    last_id: Optional[str] = None  # noqa: UP045


class WholeList(BaseModel, Generic[T]):
    """A list that is not paged: models."""

    object: Literal["list"]
    data: list[T]


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: Optional[str]  # noqa: UP045 - required, and may be null
    code: Optional[str]  # noqa: UP045


class ErrorBody(BaseModel):
    """The body of every failure."""

    error: ErrorDetails


def problems(expected: Any, answer: Any, path: str = "$") -> list[str]:
    """Everything in which the JSON value `answer` is not what the type `expected` says; empty if nothing."""
    origin = get_origin(expected)
    if expected is Any or expected is object:
        return []
    if origin is Annotated:
        return problems(get_args(expected)[0], answer, path)
    if origin is Literal:
        return [] if answer in get_args(expected) else [f"{path}: {answer!r} is none of {get_args(expected)}"]
    if origin in (Union, types.UnionType):
        return _problems_of_union(get_args(expected), answer, path)
    if origin is list:
        if not isinstance(answer, list):
            return [_wrong(path, answer, "a list")]
        (member,) = get_args(expected)
        return [problem for index, item in enumerate(answer) for problem in problems(member, item, f"{path}[{index}]")]
    if origin is dict:
        if not isinstance(answer, dict):
            return [_wrong(path, answer, "an object")]
        _, member = get_args(expected)
        return [problem for key, item in answer.items() for problem in problems(member, item, f"{path}.{key}")]
    if isinstance(expected, type) and issubclass(expected, BaseModel):
        return _problems_of_model(expected, answer, path)
    if expected is type(None):
        return [] if answer is None else [_wrong(path, answer, "null")]
    if expected in JSON_TYPES:
        right = isinstance(answer, JSON_TYPES[expected]) and isinstance(answer, bool) == (expected is bool)
        return [] if right else [_wrong(path, answer, expected.__name__)]
    raise TypeError(f"{path}: nobody taught this module the type {expected!r}")


def _problems_of_union(members: tuple[Any, ...], answer: Any, path: str) -> list[str]:
    found = []
    for member in members:
        of_member = problems(member, answer, path)
        if not of_member:
            return []
        found.append(of_member)
    # What is nearest to fitting says most: an object with one wrong field, not "it is no null".
    return min(found, key=lambda those: (those[0].startswith(f"{path}: "), len(those)))


def _problems_of_model(expected: type[BaseModel], answer: Any, path: str) -> list[str]:
    if not isinstance(answer, dict):
        return [_wrong(path, answer, expected.__name__)]
    fields = {field.alias or name: field for name, field in expected.model_fields.items()}
    found = [f"{path}.{name}: is not in {expected.__name__}" for name in answer if name not in fields and name != OURS]
    for name, field in fields.items():
        if name not in answer:
            if field.is_required():
                found.append(f"{path}.{name}: is missing")
        elif not _is_let_through(expected, name, answer[name]):
            found += problems(field.annotation, answer[name], f"{path}.{name}")
    return found


def _is_let_through(expected: type[BaseModel], name: str, value: Any) -> bool:
    return any(
        issubclass(expected, model) and name == field and value in values
        for (model, field), values in BEYOND_THE_TYPES.items()
    )


def _wrong(path: str, answer: Any, expected: str) -> str:
    return f"{path}: {str(answer)[:60]!r} is {type(answer).__name__}, not {expected}"
