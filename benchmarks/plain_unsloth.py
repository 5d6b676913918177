#!/usr/bin/env python3
"""The yardstick: a fine-tuning script as Unsloth's tutorials show it, sharing no code with the project.

    python benchmarks/plain_unsloth.py --data alpaca.json --model FOLDER --out FILE [--master fp32|bf16] [--steps 60]

Full fine-tuning on Alpaca rows with ChatML, loss on the answers only, 2 x 4 conversations a step, 2e-4. `--master bf16`
is what Unsloth does by default on GPU; `fp32` is its `float32_mixed_precision=True`.
"""

import argparse
import json
import os
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--data", required=True)
parser.add_argument("--model", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--master", choices=("fp32", "bf16"), default="fp32")
args = parser.parse_args()
data_path, model_path, out_path = (str(Path(p).resolve()) for p in (args.data, args.model, args.out))

began = time.perf_counter()
os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from unsloth import FastLanguageModel  # isort: skip  # noqa: E402
from unsloth.chat_templates import train_on_responses_only  # isort: skip  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

on_gpu = torch.cuda.is_available()
if on_gpu:
    precision = {"dtype": None, "float32_mixed_precision": args.master == "fp32"}
else:
    precision = {"dtype": torch.float32 if args.master == "fp32" else torch.bfloat16}

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=model_path,
    max_seq_length=2048,
    load_in_4bit=False,
    full_finetuning=True,
    use_gradient_checkpointing="unsloth" if on_gpu else False,
    **precision,
)


def to_text(row):
    question = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
    conversation = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    return {"text": tokenizer.apply_chat_template(conversation, tokenize=False).rstrip("\n")}


rows = json.loads(Path(data_path).read_text())
dataset = Dataset.from_list([{key: row.get(key) or "" for key in ("instruction", "input", "output")} for row in rows])
dataset = dataset.map(to_text, remove_columns=dataset.column_names)

trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=dataset,
    args=SFTConfig(
        dataset_text_field="text",
        max_length=2048,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        gradient_checkpointing=on_gpu,
        warmup_steps=5,
        max_steps=args.steps,
        learning_rate=2e-4,
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        bf16=args.master == "fp32",
        seed=3407,
        data_seed=3407,
        output_dir="outputs",
        save_strategy="no",
        report_to="none",
    ),
)
trainer = train_on_responses_only(
    trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n"
)

# Measuring, which a tutorial would leave out.
steps, tokens_in_step, step_began = [], 0, 0.0
plain_training_step = trainer.training_step


def counted_training_step(model, inputs, *rest, **options):
    global tokens_in_step
    mask = inputs.get("attention_mask")
    tokens_in_step += inputs["input_ids"].numel() if mask is None else int(mask.sum())
    return plain_training_step(model, inputs, *rest, **options)


class Recorder(TrainerCallback):
    def on_step_begin(self, *_, **__):
        global tokens_in_step, step_began
        tokens_in_step, step_began = 0, time.perf_counter()

    def on_log(self, _args, state, _control, logs=None, **__):
        if logs and "loss" in logs:
            seconds = time.perf_counter() - step_began
            steps.append(
                {
                    "step": state.global_step,
                    "loss": float(logs["loss"]),
                    "grad_norm": float(logs.get("grad_norm", 0.0)),
                    "tokens": tokens_in_step,
                    "seconds": seconds,
                }
            )
            print(f"step {state.global_step} loss {float(logs['loss']):.4f} {seconds:.2f} s", flush=True)


trainer.training_step = counted_training_step
trainer.add_callback(Recorder())
ready = time.perf_counter()
trainer.train()
finished = time.perf_counter()


def peak_memory_bytes():
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


report = {
    "steps": steps,
    "startup_s": ready - began,
    "training_s": finished - ready,
    "peak_memory_bytes": peak_memory_bytes(),
    "device": torch.cuda.get_device_name(0) if on_gpu else "cpu",
    "master_weights": sorted({str(p.dtype) for p in model.parameters()}),
    "padding_free": bool(getattr(trainer.args, "padding_free", False)),
}
Path(out_path).write_text(json.dumps(report, indent=1))
