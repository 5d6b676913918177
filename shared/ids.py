"""Identifiers made by the server: the only names that become paths."""

import secrets
import string

_ALPHABET = string.ascii_letters + string.digits
_LENGTH = 24


def new_id(prefix: str, separator: str = "-") -> str:
    """`<prefix>-` and 24 random letters and digits (142 bits). OpenAI separates some of its prefixes with `_`."""
    number = secrets.randbelow(len(_ALPHABET) ** _LENGTH)  # at once: each draw asks the kernel
    letters = []
    for _ in range(_LENGTH):
        number, index = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[index])
    return f"{prefix}{separator}{''.join(letters)}"
