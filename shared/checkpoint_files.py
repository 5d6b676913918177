"""What a checkpoint folder is: its files, its manifest, and how to tell that it is whole.

manifest.json lists every other file with size and SHA-256, and is written last. Knows files only: no torch, no
database. The trainer writes these folders (`worker.training.checkpoint`), storage moves them, the supervisor trusts
none that it did not verify.
"""

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
"""Of a folder that is being written; a crash leaves it behind, and it is garbage."""
_CHUNK_BYTES = 2**20


class CorruptCheckpoint(Exception):
    """The folder is not the checkpoint its manifest describes, or no checkpoint at all."""


class MissingCheckpoint(CorruptCheckpoint):
    """Nothing was ever published there, or it was deleted."""


class FileRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    sha256: str


class Manifest(BaseModel):
    """What a checkpoint folder holds, and where it comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str
    step: int
    fence: int
    base_model: str
    tokens: int
    """Non-padding tokens trained on so far, over all attempts."""
    resumable: bool
    files: dict[str, FileRecord]


def verify(path: Path) -> Manifest:
    """Read the manifest and compare every file with it, byte for byte.

    Raises:
        CorruptCheckpoint: a file is missing, cut, changed or unlisted, or the manifest can't be read.
    """
    manifest = verify_sizes(path)
    for name, record in manifest.files.items():
        if sha256_of(path / name) != record.sha256:
            raise CorruptCheckpoint(f"{path / name} differs from the SHA-256 in its manifest")
    return manifest


def verify_sizes(path: Path) -> Manifest:
    """Read the manifest and compare names and sizes with it: cheap, and blind to a changed byte.

    Raises:
        CorruptCheckpoint: a file is missing, cut or unlisted, or the manifest can't be read.
    """
    manifest = read_manifest(path)
    listed = {*manifest.files, MANIFEST}
    present = {entry.name for entry in path.iterdir()}
    if present != listed:
        raise CorruptCheckpoint(
            f"{path}: missing {sorted(listed - present) or 'nothing'}, unlisted {sorted(present - listed) or 'nothing'}"
        )
    for name, record in manifest.files.items():
        size = (path / name).stat().st_size
        if size != record.size:
            raise CorruptCheckpoint(f"{path / name} has {size} bytes, its manifest says {record.size}")
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, unchecked against the files.

    Raises:
        CorruptCheckpoint: there is none, or it is not a manifest.
        OSError: it can't be read just now, which says nothing about the checkpoint.
    """
    try:
        return parse_manifest((path / MANIFEST).read_bytes(), path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingCheckpoint(f"{path} has no {MANIFEST}: it was never published") from error
    except IsADirectoryError as error:
        raise CorruptCheckpoint(f"{path / MANIFEST} is a folder") from error


def parse_manifest(content: bytes, where: object) -> Manifest:
    """A manifest from the bytes of its file; names in it are plain names, so that none leads out of the folder.

    Raises:
        CorruptCheckpoint: it is not a manifest.
    """
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise CorruptCheckpoint(f"{where}/{MANIFEST} can't be read: {error}") from error
    for name in manifest.files:
        if name in ("", ".", "..", MANIFEST) or "/" in name or "\0" in name:
            raise CorruptCheckpoint(f"{where}/{MANIFEST} lists {name!r}, which is no name of a file")
    return manifest


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
