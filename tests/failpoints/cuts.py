"""A published checkpoint cut at any byte is no checkpoint: its manifest at every byte, its files at many."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shared.checkpoint_files import MANIFEST, CorruptCheckpoint, FileRecord, Manifest, verify
from tests.campaign.toy_model import ToyModel
from worker.training import checkpoint

OFFSETS_PER_FILE = 16


def run_all() -> dict[str, Any]:
    """Damage one checkpoint in every way below, one way at a time. Returns how many were tried and accepted."""
    with tempfile.TemporaryDirectory(prefix="anneal-cut-") as name:
        folder = publish(Path(name) / "4")
        verify(folder)
        tried, accepted = 0, []
        for what, damage, mend in _damages(folder):
            damage()
            tried += 1
            try:
                verify(folder)
                accepted.append(what)
            except CorruptCheckpoint:
                pass
            mend()
        verify(folder)
    return {"tried": tried, "accepted": len(accepted), "accepted_which": accepted}


def publish(folder: Path) -> Path:
    """A resumable checkpoint of the toy, published by the trainer's own code."""
    model = ToyModel(1, b"data")
    model.train_step()

    def write(target: Path) -> None:
        (target / "model.safetensors").write_bytes(model.weights_file())
        for name, content in model.resume_files().items():
            (target / name).write_bytes(content)

    def manifest(files: dict[str, FileRecord]) -> Manifest:
        return Manifest(
            job_id="ftjob-1", step=4, fence=1, base_model="test/tiny", tokens=1, resumable=True, files=files
        )

    checkpoint.publish(folder, write, expected_bytes=10_000, make_manifest=manifest)
    return folder


def _damages(folder: Path) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """(what, how to do it, how to undo it)."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()

        def mend(path: Path = path, content: bytes = content) -> None:
            path.write_bytes(content)

        size = len(content)
        every = max(1, size // OFFSETS_PER_FILE)
        cuts = range(size) if path.name == MANIFEST else sorted({*range(0, size, every), size - 1})
        for length in cuts:
            yield (
                f"{path.name} cut to {length} of {size} bytes",
                lambda p=path, c=content, n=length: p.write_bytes(c[:n]),
                mend,
            )
        if path.name != MANIFEST:
            for offset in cuts:
                changed = bytearray(content)
                changed[offset] ^= 0x40
                yield f"{path.name} changed at byte {offset}", lambda p=path, c=bytes(changed): p.write_bytes(c), mend
            yield f"{path.name} longer by a byte", lambda p=path, c=content: p.write_bytes(c + b"\0"), mend
        yield f"{path.name} missing", path.unlink, mend
    unlisted = folder / "training_args.bin"
    yield "an unlisted file", lambda: unlisted.write_bytes(b"x"), unlisted.unlink
