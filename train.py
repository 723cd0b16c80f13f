"""Fine-tune a model on a thousand traces: s1's recipe (section 4.1) as one loop, top to bottom.

In:   a model directory, and traces: the built-in Countdown teacher's or a file of yours.
Out:  a model directory in the Hugging Face layout, with metrics.jsonl and arguments.json beside it.

With no flags it fine-tunes the tiny base on 1,000 Countdown traces. The base itself was made by the
same loop, everything supervised: see assets/countdown-base/README.md.
"""
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import (GIVE_UP, BadInput, Chat, Parser, at_least, complaints, epoch_batches,
                  load_examples, local, model_flags, pack)
from model import BadModel, Config, Transformer


def arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    model_flags(add, default="assets/countdown-base")
    add("--scratch", action="store_true", help="random weights: take config and tokenizer only")
    add("--data", default="countdown", help="countdown, pieces (pre-training) or a file of traces")
    add("--n", type=at_least(1),
        help="how many examples (default: countdown 1000, pieces 150000, a file all)")
    add("--give-up", type=at_least(0, float, 1), default=GIVE_UP,
        help="how likely Countdown's teacher gives up when tired")
    add("--out", default="out/student", help="directory to write the result to")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--epochs", type=at_least(1), default=8, help="passes over the examples")
    add("--max-steps", type=at_least(1), help="stop after so many optimizer steps")
    add("--batch-size", type=at_least(1), default=16, help="sequences in an optimizer step")
    add("--tokens-per-batch", type=at_least(1), default=8192,
        help="tokens in a packed row; longer examples are dropped")
    add("--lr", type=at_least(0, float), default=2e-3, help="highest learning rate (s1, 32B: 1e-5)")
    add("--warmup", type=at_least(0, float, 1), default=0.05,
        help="share of the steps in which it rises; then a cosine to 0")
    add("--weight-decay", type=at_least(0, float), default=1e-4, help="AdamW's")
    add("--clip", type=at_least(0, float), default=1.0, help="largest global norm of the gradient")
    add("--seed", type=int, default=0, help="of the examples, their order and random weights")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu, mps")
    add("--dtype", choices=("float32", "bfloat16"),
        help="to compute in, weights stay float32 (default: bfloat16 on cuda)")
    add("--save-dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the written weights")
    return parser.parse_args()


def learning_rate(step, steps, highest, warmup):
    """Linear from 0 over the first share `warmup` of the steps, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return highest * (step + 1) / rising
    return highest * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def save(directory, model, dtype, chat, records):
    """Write beside the final name, flush to the disk, then rename: whole or not at all."""
    final = Path(directory)
    draft = final.with_name(final.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    model.save(draft, dtype)
    chat.save(draft)
    for name, text in records.items():
        (draft / name).write_text(text, encoding="utf-8")
    for path in [*draft.iterdir(), draft]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if final.exists():
        shutil.rmtree(final)
    draft.rename(final)


def main():
    args = arguments()
    with complaints(BadModel):
        train(args)


def train(args):
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise BadInput(f"{out} is there already: choose another --out, or --overwrite it")
    if out.exists() and not (out / "arguments.json").is_file():
        raise BadInput(f"{out} holds no run of this program, so it is not overwritten")
    out.parent.mkdir(parents=True, exist_ok=True)       # complain now, and not after the training

    # The examples: (ids, index of the first supervised token). An over-long one is dropped, never
    # cut: a trace without its end teaches to think without end (s1, section 4.1).
    source = local(args.model)
    chat = Chat(source, args.chat, args.thinking)
    examples = load_examples(args.data, chat, args.n, args.seed, args.give_up)
    config = Config.load(source)
    longest = min(args.tokens_per_batch, config.max_position_embeddings)
    kept = [example for example in examples if len(example[0]) <= longest]
    if not kept:
        raise BadInput(f"all {len(examples)} examples are longer than {longest} tokens")
    tokens = sum(len(ids) for ids, _ in kept)
    print(f"{len(kept):,} examples, {tokens:,} tokens a pass, "
          f"{len(examples) - len(kept)} dropped as longer than {longest:,}", flush=True)

    model = (Transformer(config).init_weights(args.seed) if args.scratch
             else Transformer.load(source))
    model.to(args.device).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}", flush=True)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]        # norms and biases do not decay
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

    steps = args.epochs * math.ceil(len(kept) / args.batch_size)
    steps = min(steps, args.max_steps or steps)
    batches = (batch for epoch in range(args.epochs)
               for batch in epoch_batches(kept, args.batch_size, args.seed, epoch))
    device = torch.device(args.device).type
    autocast = args.dtype == "bfloat16" or args.dtype is None and device == "cuda"
    metrics, started = [], time.perf_counter()
    bar = tqdm(range(steps), unit="step", disable=None, dynamic_ncols=True)
    for step, batch in zip(bar, batches):
        # The loss of a step is the mean over its supervised tokens. They are counted over the
        # whole step before the first micro-batch: a mean of micro-batch means would weigh the
        # tokens of a short micro-batch more.
        supervised = sum(len(ids) - first for ids, first in batch)
        total = torch.zeros((), device=args.device)
        for row in pack(batch, args.tokens_per_batch):
            row["ids"] = row["ids"].to(args.device, non_blocking=True)
            row["positions"] = row["positions"].to(args.device, non_blocking=True)
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss, _ = model(**row)
            (loss / supervised).backward()
            total += loss.detach() / supervised
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr, args.warmup)
        if not torch.isfinite(norm):
            raise BadInput(f"step {step}: the gradient is not finite; nothing was written")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        metrics.append({"step": step, "loss": total.item(), "lr": group["lr"],
                        "grad_norm": norm.item(), "tokens": sum(len(ids) for ids, _ in batch)})
        bar.set_postfix_str(f"loss {metrics[-1]['loss']:.3f}")
    seconds = time.perf_counter() - started

    seen = sum(row["tokens"] for row in metrics)
    save(args.out, model, args.save_dtype and getattr(torch, args.save_dtype), chat, {
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in metrics),
        "arguments.json": json.dumps(vars(args), indent=2) + "\n"})
    last = metrics[-max(1, len(metrics) // 20):]
    print(f"{steps} steps, {seen:,} tokens in {seconds:.0f} s ({seen / seconds:,.0f} a second), "
          f"loss {metrics[0]['loss']:.3f} -> {sum(row['loss'] for row in last) / len(last):.3f}, "
          f"written to {args.out}")


if __name__ == "__main__":
    main()
