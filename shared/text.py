"""Characters that can't be kept: PostgreSQL stores no NUL, and a lone surrogate is no Unicode text."""

from typing import Any


def is_storable(text: str) -> bool:
    """Whether every database and encoder here takes this text."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def storable(text: str) -> str:
    """The text with what can't be kept replaced: for what libraries print, which is not ours to refuse."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


def first_unstorable(value: Any) -> str | None:
    """A string inside parsed JSON, keys included, that can't be kept; None if all can."""
    if isinstance(value, str):
        return None if is_storable(value) else value
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return next((found for item in value if (found := first_unstorable(item)) is not None), None)
    return None
