#!/usr/bin/env python3
"""No trainer at all: transformers' model and its loss under torch.compile, bf16 autocast, fused AdamW, in a loop.

Rows have one fixed length, full of conversations one after the other, so that nothing is padding and nothing compiles
twice; what doesn't fit a row goes on in the next. `--attention packed` keeps conversations apart with position ids,
from which transformers makes a mask. `--attention causal` lets each see those before it in its row, which is wrong and
as fast as such a loop gets.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.rivals import recorder

IGNORED = -100


def work(voice: recorder.Voice) -> None:
    import torch
    from torch.nn import functional
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

    def causal_only(_module, query, key, value, _mask, scaling=None, **_others):
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return mixed.transpose(1, 2).contiguous(), None

    AttentionInterface.register("causal_only", causal_only)  # no mask is made for an attention that isn't known
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = AutoModelForCausalLM.from_pretrained(
        str(args.model),
        dtype=torch.float32,
        attn_implementation="causal_only" if args.attention == "causal" else "sdpa",
    ).to(device)
    model.train()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": recorder.WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, fused=True)

    def rate(step: int) -> float:
        if step < recorder.WARMUP_STEPS:
            return step / recorder.WARMUP_STEPS
        return max(0.0, (args.steps - step) / max(1, args.steps - recorder.WARMUP_STEPS))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def loss_sum(ids, positions, targets):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    compiled = torch.compile(loss_sum)
    tokenizer = AutoTokenizer.from_pretrained(str(args.model))
    rows = fixed_rows(tokenizer, torch, device)
    settings = {name: getattr(args, name) for name in ("micro", "accumulation", "length", "rate", "attention")}
    voice.begin({**settings, "optim": "adamw_torch_fused", "gradient_checkpointing": False}, model)
    for step in range(1, args.steps + 1):
        batch = [next(rows) for _ in range(args.accumulation)]
        learned = sum((targets != IGNORED).sum() for _, _, targets in batch)
        total = 0.0
        for ids, positions, targets in batch:
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = compiled(ids, positions, targets) / learned
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recorder.MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        voice.step(step, float(total), float(norm), sum(ids.numel() for ids, _, _ in batch))
    model.save_pretrained(str(args.save))
    tokenizer.save_pretrained(str(args.save))
    voice.saved(args.save)


def fixed_rows(tokenizer, torch, device):
    """(ids, position ids, targets) of each micro-batch; conversations in the Trainer's own shuffled order."""
    examples = []
    for row in recorder.rows(args.data):
        prompt, answer = recorder.rendered(row, tokenizer)
        asked = tokenizer.encode(prompt, add_special_tokens=False)
        told = tokenizer.encode(answer, add_special_tokens=False)
        ids = (asked + told)[: args.length]
        labels = ([IGNORED] * len(asked) + told)[: args.length]
        targets = [*labels[1:], IGNORED]  # what comes next; nothing after the last
        examples.append(torch.tensor([ids, list(range(len(ids))), targets]))
    micro_batches = args.steps * args.accumulation
    shape = (3, micro_batches, args.micro, args.length)
    needed, found, parts, epoch = micro_batches * args.micro * args.length, 0, [], 0
    while found < needed:
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(args.seed + epoch))
        parts += [examples[index] for index in order.tolist()]
        found += sum(example.shape[1] for example in examples)
        epoch += 1
    whole = torch.cat(parts, dim=1)[:, :needed].reshape(shape)
    for number in range(micro_batches):
        yield tuple(part[number].to(device, non_blocking=True) for part in whole)


if __name__ == "__main__":
    parser = recorder.arguments()
    parser.add_argument("--attention", choices=("packed", "causal"), default="packed")
    args = parser.parse_args()
    sys.exit(recorder.Voice().run(work))
