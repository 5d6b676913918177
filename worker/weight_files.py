"""The tensors of a model's files, whatever their number and split."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open


def stored_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Name and content of each tensor in the folder's .safetensors files.

    The content is read when it is indexed: `[...]` gives the whole tensor on the CPU, a slice its rows; until then it
    tells its `get_shape()` and `get_dtype()` ("F32", "BF16"), from the file's header.

    Raises:
        OSError, SafetensorError: a file can't be read, or is none.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                yield name, stored.get_slice(name)
