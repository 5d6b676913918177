"""The cache of tokenised rows: the same rows, or none."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shared import training_data
from shared.training_spec import TrainerSpec
from worker import tokenizers
from worker.training import data, model, templates, token_cache
from worker.training.data import IGNORED, Example, Examples
from worker.training.templates import Template

EXAMPLES = Examples(rows=[Example([1, 2, 70000], [IGNORED, 2, 70000], (3,)), Example([5], [5], (1,))], cut=2, dropped=1)
TEMPLATE = Template("chatml", "{{ messages }}", "<|im_end|>")


class Loader:
    """Stands for `data.load_training`: counts."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, *_: Any) -> Examples:
        self.asked += 1
        return EXAMPLES


@pytest.fixture
def spec(tmp_path: Path) -> TrainerSpec:
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("rows")
    return TrainerSpec(
        job_id="ftjob-1",
        base_model="b",
        base_model_dir=str(base),
        training_file=str(tmp_path / "rows.jsonl"),
        checkpoint_dir="/nowhere",
        work_dir="/nowhere",
        cache_dir=str(tmp_path / "caches"),
    )


def load(spec: TrainerSpec, loader: Loader, template: Template = TEMPLATE, longest: int = 512, on: Any = "all") -> Any:
    tokenizer: Any = None
    return token_cache.cached(spec, loader)(Path(spec.training_file), template, tokenizer, longest, on)


def entries(spec: TrainerSpec) -> list[Path]:
    return sorted((Path(str(spec.cache_dir)) / "tokens").iterdir())


def test_the_second_run_reads_the_same_rows(spec: TrainerSpec) -> None:
    loader = Loader()
    assert load(spec, loader) == EXAMPLES
    assert load(spec, loader) == EXAMPLES
    assert loader.asked == 1
    assert [path.stat().st_mode & 0o777 for path in entries(spec)] == [0o600]


def test_whatever_rows_follow_from_is_in_the_name(spec: TrainerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader()
    load(spec, loader)
    load(spec, loader, longest=511)
    load(spec, loader, on="assistant")
    load(spec, loader, template=Template("chatml", "{{ other }}", "<|im_end|>"))
    load(spec, loader, template=Template("chatml", TEMPLATE.source, "<|end|>"))
    Path(spec.training_file).write_text("other rows")
    load(spec, loader)
    (Path(spec.base_model_dir) / "tokenizer.json").write_text('{"other": 1}')
    load(spec, loader)
    (Path(spec.base_model_dir) / "tokenizer_config.json").write_text("{}")
    load(spec, loader)
    monkeypatch.setattr(token_cache, "_code", lambda: ["another version"])
    load(spec, loader)
    assert loader.asked == len(entries(spec)) == 9


@pytest.mark.parametrize(
    "module", [data, templates, training_data, tokenizers, model], ids=lambda module: module.__name__
)
def test_rows_of_other_code_are_not_taken(module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All that a row goes through, from the file's bytes and the tokenizer's files on."""
    before = token_cache._code.__wrapped__()
    (tmp_path / "changed.py").write_text("# otherwise")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "changed.py"))
    assert token_cache._code.__wrapped__() != before


@pytest.mark.parametrize("harm", ["cut", "flipped", "emptied", "of another kind"])
def test_a_damaged_entry_is_no_entry(spec: TrainerSpec, harm: str) -> None:
    loader = Loader()
    load(spec, loader)
    (entry,) = entries(spec)
    content = entry.read_bytes()
    middle = len(content) // 2
    entry.write_bytes(
        {
            "cut": content[:-4],
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "emptied": b"",
            "of another kind": json.dumps({"rows": []}).encode(),
        }[harm]
    )
    assert load(spec, loader) == EXAMPLES
    assert loader.asked == 2
    assert entry.read_bytes() == content, "it is written anew"


def test_a_template_that_writes_the_date_is_not_kept(spec: TrainerSpec) -> None:
    loader = Loader()
    dated = Template("base", "{{ strftime_now('%d %b %Y') }}", "<|im_end|>")
    load(spec, loader, template=dated)
    load(spec, loader, template=dated)
    assert loader.asked == 2


def test_without_a_folder_nothing_is_kept(spec: TrainerSpec) -> None:
    loader = Loader()
    assert token_cache.cached(spec.model_copy(update={"cache_dir": None}), loader) is loader


def test_a_cache_that_can_not_be_written_ends_no_run(spec: TrainerSpec, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = spec.model_copy(update={"cache_dir": str(tmp_path / "file")})
    assert load(nowhere, Loader()) == EXAMPLES


def test_those_not_used_for_longest_go_first(tmp_path: Path) -> None:
    for age, name in enumerate(("newest", "middle", "oldest")):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    token_cache.prune(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle", "newest"]


def test_reading_counts_as_use(spec: TrainerSpec) -> None:
    load(spec, Loader())
    (entry,) = entries(spec)
    os.utime(entry, (1, 1))
    load(spec, Loader())
    assert entry.stat().st_mtime > 1
