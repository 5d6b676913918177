"""`make test-serving` runs it: EleutherAI's lm_eval as a client gets from Anneal what it gets from the model itself.

The same two small tasks, made here: by `--model hf` on the weights, and through the service by `--model
local-completions` (which scores texts with `echo` and `logprobs`, so it needs vLLM) and `--model
local-chat-completions`. 32-bit numbers on every side. Scores of texts must agree within 1e-3, generated answers and
accuracies exactly.

    python -m benchmarks.harness [--engines vllm,transformers] [--out FILE]

ANNEAL_EVAL_PYTHON names the interpreter that has lm_eval (`make setup-eval`), ANNEAL_VLLM_PYTHON that of vLLM.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving import MODEL, service
from shared.settings import Settings
from worker.base_models import resolve

TOLERANCE = 1e-3
CAPITALS = (
    *(("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"), ("Egypt", "Cairo")),
    *(("Norway", "Oslo"), ("Greece", "Athens"), ("Austria", "Vienna"), ("Portugal", "Lisbon"), ("Ireland", "Dublin")),
    *(("Cuba", "Havana"), ("Peru", "Lima"), ("Burundi", "Gitega"), ("Bhutan", "Thimphu"), ("Palau", "Ngerulmud")),
)
SCORED = """\
task: capitals_scored
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
WRITTEN = """\
task: capitals_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "What is the capital of {{{{country}}}}? Answer with one sentence."
doc_to_target: "The capital of {{{{country}}}} is {{{{choices[answer]}}}}."
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 24, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness", description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=lambda text: text.split(","), default=["vllm", "transformers"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    python = os.environ.get("ANNEAL_EVAL_PYTHON")
    if not python:
        print(
            "ANNEAL_EVAL_PYTHON must name the interpreter of an environment with lm_eval; `make setup-eval` builds one"
        )
        return 2
    results: dict[str, Any] = {"command": "python -m benchmarks.harness", "model": MODEL, "compared": {}}
    with tempfile.TemporaryDirectory(prefix="anneal-eval-") as name:
        folder = Path(name)
        _write_tasks(folder)
        weights = resolve(MODEL, Settings(data=folder / "weights")).path
        evaluate = _Evaluation(python, folder)
        hf = f"pretrained={weights},dtype=float32"
        expected = evaluate("hf", hf, "capitals_scored", "hf-scored")
        expected_chat = evaluate("hf", hf, "capitals_written", "hf-written", "--apply_chat_template")
        for engine in options.engines:
            with _serving(engine, folder / engine) as url:
                tokenizer = f"model={MODEL},tokenizer={weights},num_concurrent=4,max_retries=3"
                if engine == "vllm":
                    arguments = f"{tokenizer},base_url={url}/v1/completions,tokenizer_backend=huggingface"
                    found = evaluate("local-completions", arguments, "capitals_scored", f"{engine}-scored")
                    results["compared"][f"{engine}, local-completions"] = _compare_scores(expected, found)
                arguments = f"{tokenizer},base_url={url}/v1/chat/completions"
                found = evaluate(
                    "local-chat-completions",
                    arguments,
                    "capitals_written",
                    f"{engine}-written",
                    "--apply_chat_template",
                )
                results["compared"][f"{engine}, local-chat-completions"] = _compare_texts(expected_chat, found)
    results["agree"] = all(one["agree"] for one in results["compared"].values())
    text = json.dumps(results, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0 if results["agree"] else 1


def _write_tasks(folder: Path) -> None:
    data = folder / "capitals.jsonl"
    cities = [city for _, city in CAPITALS]
    rows = []
    for number, (country, city) in enumerate(CAPITALS):
        choices = [city, *(cities[(number + step) % len(cities)] for step in (1, 4, 7))]
        choices = choices[number % 4 :] + choices[: number % 4]
        rows.append({"country": country, "choices": choices, "answer": choices.index(city)})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task, text in (("scored", SCORED), ("written", WRITTEN)):
        (folder / f"{task}.yaml").write_text(text.format(data=data))


class _Evaluation:
    """Runs lm_eval and reads what it found."""

    def __init__(self, python: str, folder: Path) -> None:
        self._python = python
        self._folder = folder

    def __call__(self, model: str, arguments: str, task: str, name: str, *more: str) -> dict[str, Any]:
        """{"acc": …, "samples": [responses of each row]}"""
        out = self._folder / name
        command = (
            *(self._python, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments, "--tasks", task),
            *("--include_path", str(self._folder), "--output_path", str(out), "--log_samples", "--batch_size", "4"),
            *("--device", "cpu", *more),
        )
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none", "HF_DATASETS_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"lm_eval --model {model} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        (summary,) = out.rglob("results_*.json")
        (samples,) = out.rglob("samples_*.jsonl")
        scores = json.loads(summary.read_text())["results"][task]
        rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        value = next(value for key, value in scores.items() if key.split(",")[0] in ("acc", "exact_match"))
        print(f"{name}: {value}", flush=True)
        return {"value": value, "samples": [row["resps"] for row in rows]}


def _compare_scores(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    pairs = [
        (float(one[0][0]), float(other[0][0]))
        for row, row_found in zip(expected["samples"], found["samples"], strict=True)
        for one, other in zip(row, row_found, strict=True)
    ]
    largest = max(abs(one - other) for one, other in pairs)
    agree = largest <= TOLERANCE and expected["value"] == found["value"]
    return {"agree": agree, "acc": [expected["value"], found["value"]], "texts": len(pairs), "largest_gap": largest}


def _compare_texts(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    unequal = [
        [one, other]
        for one, other in zip(expected["samples"], found["samples"], strict=True)
        if _text(one).strip() != _text(other).strip()
    ]
    agree = not unequal and expected["value"] == found["value"]
    return {"agree": agree, "exact_match": [expected["value"], found["value"]], "unequal": unequal}


def _text(responses: Any) -> str:
    return str(responses[0][0] if isinstance(responses[0], list) else responses[0])


@contextmanager
def _serving(engine: str, folder: Path) -> Iterator[str]:
    folder.mkdir()
    with service(engine, folder, ANNEAL_GENERATION_DTYPE="float32") as (url,):
        body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
        httpx.post(f"{url}/v1/completions", json=body, timeout=400).raise_for_status()  # loaded from here on
        yield url


if __name__ == "__main__":
    sys.exit(main())
