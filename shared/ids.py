"""Identifiers made by the server: the only names that become paths."""

import re
import secrets
import string

_ALPHABET = string.ascii_letters + string.digits
_VALID = re.compile(r"[a-z]+-[A-Za-z0-9]{24}")


def new_id(prefix: str) -> str:
    """`<prefix>-` and 24 random letters and digits (142 bits)."""
    return f"{prefix}-" + "".join(secrets.choice(_ALPHABET) for _ in range(24))


def is_id(value: str, prefix: str) -> bool:
    """Whether `value` could have come from `new_id(prefix)`."""
    return value.startswith(f"{prefix}-") and _VALID.fullmatch(value) is not None
