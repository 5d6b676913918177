#!/usr/bin/env python3
"""LLaMA-Factory's full fine-tuning, run by the Python of its own environment (`make setup-llama-factory`).

Its defaults but for what makes the work the same. Two differences stay: its templates train on the newline after an
answer too, one token a conversation, and it pads to multiples of 8.
"""

import json
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.rivals import recorder


def work(voice: recorder.Voice) -> None:
    import torch
    from transformers import AutoTokenizer, Trainer

    without_torchaudio()
    from llamafactory.train.tuner import run_exp

    train = Trainer.train

    def watched(trainer, *rest, **options):
        recorder.watch(trainer, voice, {})
        return train(trainer, *rest, **options)

    Trainer.train = watched
    tokenizer = AutoTokenizer.from_pretrained(str(args.model))
    # A conversation's text must be the same, so its system message comes from the model's own template.
    before, _, _ = recorder.rendered({"question": "?", "answer": "!"}, tokenizer)[0].partition("<|im_start|>user")
    system = before.removeprefix("<|im_start|>system\n").rstrip("\n").removesuffix("<|im_end|>")
    rows = [
        {"instruction": row["question"], "input": "", "output": row["answer"], "system": system}
        for row in recorder.rows(args.data)
    ]
    columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    Path("rows.json").write_text(json.dumps(rows), encoding="utf-8")
    Path("dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json", "columns": columns}}))
    run_exp(
        {
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "full",
            "model_name_or_path": str(args.model),
            "template": "smollm",
            "dataset": "rows",
            "dataset_dir": str(Path.cwd()),
            "cutoff_len": args.length,
            "per_device_train_batch_size": args.micro,
            "gradient_accumulation_steps": args.accumulation,
            "learning_rate": args.rate,
            "max_steps": args.steps,
            "lr_scheduler_type": "linear",
            "warmup_steps": recorder.WARMUP_STEPS,
            "weight_decay": recorder.WEIGHT_DECAY,
            "max_grad_norm": recorder.MAX_GRAD_NORM,
            "bf16": True,
            "use_cpu": not torch.cuda.is_available(),
            "seed": args.seed,
            "data_seed": args.seed,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "output_dir": str(args.save),
            "overwrite_output_dir": True,
        }
    )
    voice.saved(args.save)


def without_torchaudio() -> None:
    """LLaMA-Factory imports torchaudio for audio data, which we have none of. It exists for CUDA only.

    After transformers, which looks for the real one.
    """
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")


if __name__ == "__main__":
    args = recorder.arguments().parse_args()
    sys.exit(recorder.Voice().run(work))
