"""Kinds of storage to test, with a look behind each; checkpoints to put there; processes to use it from."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import boto3
import fsspec

from shared import storage
from shared.checkpoint_files import MANIFEST, FileRecord, Manifest
from shared.settings import Settings

ROOT = Path(__file__).parents[2]
JOB = "ftjob-1"
WEIGHTS = b"weights!" * 1000
DAY_S = 86_400


class Place:
    """One kind of storage, and a look behind it."""

    def __init__(self, kind: str, settings: Settings) -> None:
        self.kind = kind
        self.settings = settings
        self.is_folder = settings.storage_is_folder
        url = str(settings.storage_root) if self.is_folder else str(settings.storage_url)
        self._raw, self._root = fsspec.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)

    def names(self) -> list[str]:
        """Everything in storage but its housekeeping."""
        found = (path.removeprefix(self._root).lstrip("/") for path in self._raw.find(self._root))
        return sorted(key for key in found if not key.startswith("."))

    def read(self, key: str) -> bytes:
        return bytes(self._raw.cat_file(f"{self._root}/{key}"))

    def write(self, key: str, content: bytes) -> None:
        self._raw.makedirs(f"{self._root}/{key}".rpartition("/")[0], exist_ok=True)
        self._raw.pipe_file(f"{self._root}/{key}", content)

    def remove(self, key: str) -> None:
        self._raw.rm_file(f"{self._root}/{key}")

    def unfinished(self) -> list[str]:
        """What cut uploads left behind, seen or unseen."""
        if self.kind == "s3":
            listing = boto3.client("s3").list_multipart_uploads(Bucket=self._root.partition("/")[0])
            return [upload["Key"] for upload in listing.get("Uploads", ())]
        return [path for path in self._raw.find(f"{self._root}/.incoming") if self.is_folder]

    def other_host(self, tmp_path: Path) -> Settings:
        """The same storage, seen from a host that has nothing of it yet."""
        url = self.settings.storage_url or str(self.settings.storage_root)
        return Settings(data=tmp_path / "other-host", storage_url=url)


def stage(settings: Settings, step: int = 4, weights: bytes = WEIGHTS, fence: int = 2) -> Path:
    """A checkpoint as the trainer leaves it."""
    folder = storage.staging_dir(settings, JOB, fence) / str(step)
    folder.mkdir(parents=True)
    contents = {"model.safetensors": weights, "config.json": b"{}"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = {name: FileRecord(size=len(c), sha256=hashlib.sha256(c).hexdigest()) for name, c in contents.items()}
    manifest = Manifest(job_id=JOB, step=step, fence=fence, base_model="b", tokens=1, resumable=True, files=files)
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


def publish(settings: Settings, step: int = 4, weights: bytes = WEIGHTS) -> str:
    return storage.publish_checkpoint(settings, stage(settings, step, weights))


def save(settings: Settings, file_id: str = "file-1", content: bytes = b"abc") -> None:
    storage.save_file(settings, file_id, [content], max_bytes=len(content))


def start(program: str, settings: Settings) -> subprocess.Popen[str]:
    """A Python process of its own, whose `Settings()` are these."""
    environment = {
        **os.environ,
        "ANNEAL_DATA": str(settings.data),
        "ANNEAL_STORAGE_URL": settings.storage_url or str(settings.storage_root),
    }
    command = [sys.executable, "-c", program]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def run(program: str, settings: Settings) -> tuple[int, str, str]:
    """The exit status and output of such a process."""
    process = start(program, settings)
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors
