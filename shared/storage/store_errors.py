"""What can go wrong while talking to an object store, in our own words.

Each library behind fsspec raises what it likes, and most of it is no OSError. Missing and existing keys pass as they
are: they are answers. Everything else is the store's fault or the operator's, never a user's, and may be gone later.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from shared.errors import AppError
from shared.storage.base import StorageFull, StorageUnavailable

_FULL = ("XMinioStorageFull", "QuotaExceeded", "InsufficientStorage", "InsufficientCapacity", "no space left")
"""What stores without room say; S3 itself never does."""


@contextmanager
def talking(action: str) -> Iterator[None]:
    """Translate errors of the store.

    Args:
        action: what is being done, for the message: "read bucket/key".

    Raises:
        StorageUnavailable: it can't be reached, or refuses.
        StorageFull: it has no room, or this host has none for a download.
        FileNotFoundError, FileExistsError: the answer was this.
    """
    try:
        yield
    except (AppError, FileExistsError, MemoryError):
        raise
    except FileNotFoundError as error:
        if "NoSuchBucket" not in _words(error):  # a missing bucket says nothing about the key
            raise
        raise _unavailable(action, error) from error
    except Exception as error:
        words = _words(error).lower()
        if _number(error) in (errno.ENOSPC, errno.EDQUOT) or any(word.lower() in words for word in _FULL):
            raise StorageFull from error
        raise _unavailable(action, error) from error


def _unavailable(action: str, error: BaseException) -> StorageUnavailable:
    detail = " ".join(str(error).split())[:300]
    return StorageUnavailable(
        f"the object store did not {action} ({type(error).__name__}: {detail}); try again, and if it stays so, "
        "check ANNEAL_STORAGE_URL, the AWS_* variables and the store itself"
    )


def _words(error: BaseException) -> str:
    return f"{error!r} {error.__cause__!r}"


def _number(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None
