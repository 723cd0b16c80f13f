"""Fine-tune a model on reasoning traces: s1's recipe (section 4.1) as one loop, top to bottom.

    python train.py                                   the tiny base on 1,000 Countdown traces
    python train.py --model DIR --data traces.jsonl   another model, your traces
    torchrun --nproc-per-node 8 -- train.py ...       each process holds a shard of every tensor

Writes a Hugging Face model directory with metrics.jsonl (a line per step) and run.json (the command
that repeats the run). On a CPU, a repeated or a resumed run gives the same bits.
"""
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import data
from model import Transformer, read_config
from recipe import checkpoint, cli, cost, countdown, rows


def learning_rate(step: int, num_steps: int, max_lr: float, warmup: float) -> float:
    """A linear warm-up over the first share `warmup` of the steps, then a cosine towards 0."""
    warmup_steps = max(1, round(warmup * num_steps))
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return max_lr * 0.5 * (1 + math.cos(math.pi * progress))


def accumulate_gradients(model, batch: list, max_tokens: int, device: torch.device,
                         autocast=False, rank=0, world_size=1) -> tuple[torch.Tensor, int]:
    """Adds the gradient of the batch's mean loss; returns it and the capacity of its rows.

    The loss of an optimizer step is the mean over all its supervised tokens: every rank divides
    the summed loss of each of its rows by the count of the whole batch. A mean of the rows' means
    would give the tokens of short rows more weight, and depend on how the batch is packed. Under
    `torch.no_grad()` only the loss is computed.
    """
    num_supervised = sum(len(ids) - prompt_length for ids, prompt_length in batch)
    packed = data.pack_sequences(batch, max_tokens, world_size)
    # Every rank runs the same number of rows. A row of one unsupervised token adds nothing.
    packed += [[([0], 1)]] * (-len(packed) % world_size)
    loss = torch.zeros((), device=device)
    for row in map(data.collate, packed[rank::world_size]):
        ids, positions = row["ids"].to(device), row["positions"].to(device)         # (1, T)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            row_loss, _ = model(ids, positions, row["lengths"], row["labels"])      # a sum
        # fully_shard averages gradients over the ranks: times world_size makes it a sum.
        if torch.is_grad_enabled():
            (row_loss / num_supervised * world_size).backward()
        loss += row_loss.detach() / num_supervised
    if world_size > 1:
        dist.all_reduce(loss)
    return loss, sum(max(max_tokens, data.count_tokens(row)) for row in packed)


def train(args):
    # One process, or one for each device under torchrun.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if world_size > 1:
        if device.type == "cuda":               # before anything else touches CUDA
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # Ranks wait for the one that is slowest to save: longer than the default allows.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=2))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")      # only rank 0 prints
    out, steps = Path(args.out), Path(f"{args.out}.steps")
    checkpoint.check_output(out, steps, args.overwrite, args.resume)

    source = cli.resolve_model(args.model)
    chat, config = data.Chat(source, args.system, args.thinking), read_config(source)
    args.dtype = args.dtype or cli.default_dtype(args.device, config.extra)
    args.tokens_per_batch = args.tokens_per_batch or cost.default_row(
        config, device.type, args.dtype, args.gradient_checkpointing)
    examples = load_examples(args, chat, config)
    held_out = load_examples(args, chat, config, held_out=True) if args.val else []
    prompts = {tuple(ids[:n]) for ids, n in examples if n > 1}      # n is 1 in pre-training
    if shared := sum(tuple(ids[:n]) in prompts for ids, n in held_out):
        raise ValueError(f"{shared} of the held-out questions are trained on too")
    batches = [batch for epoch in range(args.epochs)
               for batch in data.epoch_batches(examples, args.batch_size, args.seed, epoch)]
    num_steps = min(len(batches), args.max_steps or len(batches))

    # The weights are float32. Autocast casts them to bf16 where they are multiplied.
    autocast = args.dtype == "bfloat16"
    model = load_model(args, source, device, world_size, autocast)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]        # norms and biases
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    run, first_step, metrics = identity(args, examples, world_size), 0, []
    if args.resume:
        first_step, metrics = checkpoint.load_latest(steps, run, model, optimizer, rank)

    received = install_signal_handler()
    for step in tqdm(range(first_step, num_steps), initial=first_step, total=num_steps, unit="step",
                     dynamic_ncols=True, disable=None if rank == 0 else True):
        start, batch = time.perf_counter(), batches[step]
        loss, capacity = accumulate_gradients(
            model, batch, args.tokens_per_batch, device, autocast, rank, world_size)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        norm = norm.full_tensor() if world_size > 1 else norm
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, args.lr, args.warmup)
        if not torch.isfinite(loss + norm):
            begin = [chat.decode(ids[n:n + 12]) for ids, n in batch[:3]]
            raise ValueError(f"step {step + 1}: loss {loss:.3g}, gradient norm {norm:.3g}; the "
                             f"weights were not updated. Its examples begin with {begin}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        loss, norm = loss.item(), norm.item()   # waits for the device
        seconds = time.perf_counter() - start
        flops = cost.flops(config, [len(ids) for ids, _ in batch],
                           sum(len(ids) - prompt_length for ids, prompt_length in batch))
        peak = world_size * (args.device_tflops or 0) * 1e12
        metrics.append({
            "step": step, "loss": loss, "lr": group["lr"], "grad_norm": norm, "seconds": seconds,
            "tokens": data.count_tokens(batch), "capacity": capacity,
            "flops": flops, "mfu": flops / seconds / peak if peak else None,
            "memory_bytes": cost.peak_memory(device)})
        done = step + 1
        if held_out and (done % (len(batches) // args.epochs) == 0 or done == num_steps):
            with torch.no_grad():
                val_loss, _ = accumulate_gradients(
                    model, held_out, args.tokens_per_batch, device, autocast, rank, world_size)
            if world_size > 1:
                model.reshard()                 # the backward pass does it otherwise
            metrics[-1]["val_loss"] = val_loss.item()
        tqdm.write(cost.format_step(metrics[-1], num_steps))
        sys.stdout.flush()
        stop = torch.tensor(max(received, default=0), device=device)
        if world_size > 1:
            dist.all_reduce(stop, dist.ReduceOp.MAX)    # a signal may reach only one machine
        if done < num_steps and (stop or args.save_every and done % args.save_every == 0):
            checkpoint.save(steps, done, run, metrics, model, optimizer, rank)
            if stop:
                print(f"stopped after step {done}: --resume continues from {steps}")
                sys.exit(128 + int(stop))

    draft = out.with_name(out.name + ".draft")
    if rank == 0:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        chat.save(draft)
        (draft / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        (draft / "run.json").write_text(json.dumps(run_metadata(args, run), indent=2) + "\n")
    model.save(draft if rank == 0 else None, getattr(torch, args.save_dtype))
    if rank == 0:
        checkpoint.commit(draft, out)
        shutil.rmtree(steps, ignore_errors=True)
    cost.print_summary(args, metrics, world_size)


def load_examples(args, chat, config, held_out=False) -> list:
    """The examples of --data, or of --val, that fit into a row and the model's context.

    Longer ones are dropped, not truncated: a trace without its end teaches the model to think
    without end (s1, section 4.1).
    """
    source, n, split = (args.val, args.val_n, "tune") if held_out else (args.data, args.n, "train")
    table = None if source == "countdown" else rows.read_rows(source, args.split)
    if table and "ids" in table[0][1] and not args.ask:             # pre-training
        examples = rows.token_examples(table[:n], chat.tokenizer.get_vocab_size())
    else:
        default = 100 if held_out else 1000
        traces = (rows.load_traces(source, None, args.teacher, args.columns, table) if table else
                  countdown.traces(n or default, args.seed, args.give_up, len(args.ask), split))
        if args.ask:
            traces = list(countdown.add_length_prompts(
                traces, lambda text: len(chat.encode(text)), args.ask))
        examples = [chat.example(*trace) for trace in traces[:n]]
    longest = min(args.max_seq_len or math.inf, config.max_position_embeddings)
    kept = [example for example in examples if len(example[0]) <= longest]
    if not kept:
        raise ValueError(f"all {len(examples)} examples are longer than {longest} tokens")
    print(f"{len(kept):,} {'held-out ' * held_out}examples, {data.count_tokens(kept):,} tokens per "
          f"epoch, {len(examples) - len(kept)} dropped as longer than {longest:,}", flush=True)
    return kept


def load_model(args, source: str, device: torch.device, world_size: int, autocast: bool):
    """The model in training mode. Under torchrun every rank holds a shard of each parameter."""
    def prepare(model):
        model.gradient_checkpointing = args.gradient_checkpointing
        if args.compile:
            model.compile_kernels()
        if world_size > 1:
            # Each block is gathered while it computes, in bf16 under autocast; gradients are summed
            # in float32. The rotary embedding needs inputs in float32.
            policy = MixedPrecisionPolicy(torch.bfloat16 if autocast else None, torch.float32,
                                          cast_forward_inputs=False)
            mesh = dist.init_device_mesh(device.type, (world_size,))
            for module in (*model.model.layers, model):
                fully_shard(module, mesh=mesh, mp_policy=policy)

    if args.scratch:
        model = Transformer(read_config(source)).init_weights(args.seed).to(device)
        prepare(model)
    else:
        model = Transformer.load(source, device=device, prepare=prepare)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters:,} parameters on {world_size} x {device.type}", flush=True)
    return model.train()


def install_signal_handler() -> list:
    """A list that Ctrl-C and SIGTERM add to. A second signal stops the process at once.

    Slurm and torchrun may both pass on the first one: what follows it within a second is the same.
    """
    received, times = [], []

    def handle(signum, frame):
        received.append(signum)
        times.append(time.monotonic())
        if times[-1] > times[0] + 1:
            sys.exit(128 + signum)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handle)
    return received


def identity(args, examples: list, world_size: int) -> dict:
    """What the weights depend on. A run may only be resumed with the same values."""
    other = {"out", "overwrite", "save_every", "resume", "save_dtype", "debug", "val", "val_n",
             "cost", "devices", "device_tflops", "device_memory_gb", "mfu", "usd_per_hour"}
    arguments = {key: value for key, value in vars(args).items() if key not in other}
    digest = hashlib.sha256(json.dumps(examples).encode()).hexdigest()[:16]
    return {**arguments, "data": digest, "processes": world_size}


def run_metadata(args, run: dict) -> dict:
    """What run.json holds: the command that repeats the run, and what its bits depend on."""
    n, flags = run["processes"], [flag for flag in sys.argv[1:] if flag != "--resume"]
    launcher = ["torchrun", "--nproc-per-node", str(n), "--"] if n > 1 else ["python"]
    folder = shlex.quote(str(Path(__file__).parent))
    status, commit = subprocess.getstatusoutput(f"git -C {folder} describe --always --dirty")
    return {"command": shlex.join([*launcher, "train.py", *flags]), "processes": n,
            "threads": torch.get_num_threads(), "commit": "unknown" if status else commit,
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
            "data": run["data"], "arguments": vars(args)}


def print_cost(args) -> None:
    """Prints the memory, time and price of the run on the devices that the flags describe."""
    source = cli.resolve_model(args.model, weights=False)
    config = read_config(source)
    examples = load_examples(args, data.Chat(source, args.system, args.thinking), config)
    with torch.device("meta"):
        model = Transformer(config)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers[0])]
    epoch = list(data.epoch_batches(examples, args.batch_size, args.seed, 0))
    num_steps = min(args.epochs * len(epoch), args.max_steps or math.inf)
    args.tokens_per_batch = args.tokens_per_batch or 8192
    row_lengths = [[data.count_tokens(row) for row in data.pack_sequences(
        batch, args.tokens_per_batch, args.devices)] for batch in epoch]
    args.tokens_per_batch = max(args.tokens_per_batch, max(map(max, row_lengths)))
    cost.print_memory(args, config, *sizes)
    cost.print_time(args, config, num_steps, [len(ids) for ids, _ in examples],
                    sum(len(ids) - prompt_length for ids, prompt_length in examples), row_lengths)


def add_cost_arguments(add):
    add("--cost", action="store_true", help="print memory, time and price of the run, and stop")
    add("--devices", type=cli.at_least(1), default=1, help="for --cost: how many")
    add("--device-tflops", type=cli.at_least(1e-6, float), help="peak of a device (MFU, --cost)")
    add("--device-memory-gb", type=cli.at_least(0, float), default=80, help="for --cost")
    add("--mfu", type=cli.at_least(0.001, float, 1), default=0.4, help="--cost: share of the peak")
    add("--usd-per-hour", type=cli.at_least(0, float), help="price of a device")


def main():
    parser = cli.ArgumentParser(description=__doc__.split("\n")[0])
    add, at_least = parser.add_argument, cli.at_least
    positive, share = at_least(1), at_least(0, float, 1)
    data.add_model_arguments(add, default="assets/countdown-base")
    add("--scratch", action="store_true", help="random weights; take config and tokenizer only")
    add("--data", default="countdown", help="countdown, or traces: a file, folder or hub dataset")
    rows.add_trace_arguments(add)
    add("--n", type=positive, help="number of examples (default: 1000 of countdown, else all)")
    add("--val", help="held-out traces like --data; their loss is printed after each epoch")
    add("--val-n", type=positive, help="number of them (default: 100 of countdown, else all)")
    add("--give-up", type=share, default=countdown.GIVE_UP, help="how often its teacher gives up")
    add("--ask", nargs="+", choices=list(countdown.LENGTH_PROMPTS), default=[],
        help="kinds of length limits to write into the questions")
    add("--out", default="out/student", help="directory of the result")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--save-every", type=positive, help="steps between checkpoints in OUT.steps")
    add("--resume", action="store_true", help="continue from the newest checkpoint in OUT.steps")
    add("--epochs", type=positive, default=8, help="passes over the examples")
    add("--max-steps", type=positive, help="stop after this many optimizer steps")
    add("--batch-size", type=positive, default=16, help="sequences per step, over all processes")
    add("--max-seq-len", type=positive, help="drop longer examples (default: the model's context)")
    add("--tokens-per-batch", type=positive, help="length of a row (default: 8192; on a CPU less)")
    add("--lr", type=at_least(0, float), default=2e-3, help="peak learning rate (s1, 32B: 1e-5)")
    add("--warmup", type=share, default=0.05, help="share of the steps with a rising rate")
    add("--weight-decay", type=at_least(0, float), default=1e-4, help="weight decay of matrices")
    add("--grad-clip", type=at_least(1e-9, float), default=1.0, help="largest gradient norm")
    add("--seed", type=int, default=0, help="of the examples, their order and random weights")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--compile", action="store_true", help="torch.compile: half a minute at the start")
    cli.add_device_arguments(add)
    add("--save-dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    add_cost_arguments(add)
    args = parser.parse_args()
    if args.val_n and not args.val:
        parser.error("--val-n needs --val")
    with cli.exit_on_user_error(args.debug):
        print_cost(args) if args.cost else train(args)


if __name__ == "__main__":
    main()
