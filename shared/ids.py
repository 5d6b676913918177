"""Identifiers made by the server: the only names that become paths."""

import secrets
import string

_ALPHABET = string.ascii_letters + string.digits


def new_id(prefix: str, separator: str = "-") -> str:
    """`<prefix>-` and 24 random letters and digits (142 bits). OpenAI separates some of its prefixes with `_`."""
    return f"{prefix}{separator}" + "".join(secrets.choice(_ALPHABET) for _ in range(24))
