#!/usr/bin/env python3
"""Full fine-tuning as Unsloth's own tutorials show it.

`--master bf16` is what Unsloth does by default on GPU; `fp32` is its `float32_mixed_precision=True`.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.rivals import recorder


def work(voice: recorder.Voice) -> None:
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"

    from unsloth import FastLanguageModel  # isort: skip
    from unsloth.chat_templates import train_on_responses_only  # isort: skip
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    on_gpu = torch.cuda.is_available()
    checkpointing = on_gpu and not args.keep
    if on_gpu:
        precision = {"dtype": None, "float32_mixed_precision": args.master == "fp32"}
    else:
        precision = {"dtype": torch.float32 if args.master == "fp32" else torch.bfloat16}
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(args.model),
        max_seq_length=args.length,
        load_in_4bit=False,
        full_finetuning=True,
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        **precision,
    )
    texts = ["".join(recorder.rendered(row, tokenizer)) for row in recorder.rows(args.data)]
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts}),
        args=SFTConfig(
            dataset_text_field="text",
            max_length=args.length,
            packing=args.packed,
            per_device_train_batch_size=args.micro,
            gradient_accumulation_steps=args.accumulation,
            gradient_checkpointing=checkpointing,
            warmup_steps=recorder.WARMUP_STEPS,
            max_steps=args.steps,
            learning_rate=args.rate,
            logging_steps=1,
            optim=args.optimizer,
            weight_decay=recorder.WEIGHT_DECAY,
            lr_scheduler_type="linear",
            bf16=args.master == "fp32",
            seed=args.seed,
            data_seed=args.seed,
            output_dir="outputs",
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer = train_on_responses_only(
        trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n"
    )
    recorder.watch(trainer, voice, {"master": args.master})
    trainer.train()
    trainer.save_model(str(args.save))
    voice.saved(args.save)


if __name__ == "__main__":
    parser = recorder.arguments()
    parser.add_argument("--keep", action="store_true", help="activations: no gradient checkpointing on a GPU")
    parser.add_argument("--optimizer", default="adamw_8bit")
    parser.add_argument("--master", choices=("fp32", "bf16"), default="bf16")
    args = parser.parse_args()
    sys.exit(recorder.Voice().run(work))
