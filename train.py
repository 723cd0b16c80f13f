"""Fine-tune a model on a thousand traces: s1's recipe (section 4.1) as one loop, top to bottom.

In:   a model, and traces: the built-in Countdown teacher's or a file of yours.
Out:  a model directory in the Hugging Face layout, with metrics.jsonl (a line a step) and run.json
      (with the command that makes the run again, on a CPU to the same bits) in it. On the way
      checkpoints in OUT.steps, from which --resume goes on, on a CPU to the same bits too.

With no flags it fine-tunes the tiny base on 1,000 Countdown traces. The base itself was made by the
same loop, everything supervised: see assets/countdown-base/README.md. Larger models:
torchrun --nproc-per-node N -- train.py ..., each process then holds its share of every tensor.

Map:  arguments
      checkpoints  whole directories, written beside and renamed; the newest one, and back into it
      gradients    what one optimizer step learns from its sequences, over rows and processes
      the loop     what it starts from; `train`, top to bottom; a step as a line
      cost         floating-point operations, derived; what a run would take (--plan)
"""
import hashlib
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from data import (GIVE_UP, KINDS, BadInput, Chat, Parser, at_least, complaints, deal,
                  epoch_batches, load_examples, local, model_flags, pack, tokens_in, trace_flags)
from model import BadModel, Transformer, put, read_config, whole


def arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    model_flags(add, default="assets/countdown-base")
    add("--scratch", action="store_true", help="random weights: take config and tokenizer only")
    add("--data", default="countdown",
        help="countdown, or traces: a file, a directory or a hub dataset's id")
    add("--n", type=at_least(1),
        help="how many examples (default: countdown 1000, a file all)")
    add("--give-up", type=at_least(0, float, 1), default=GIVE_UP,
        help="how likely Countdown's teacher gives up when tired")
    add("--ask", nargs="+", choices=KINDS, default=[],
        help="write the length of the thinking into the question, in one of these ways each")
    trace_flags(add)
    add("--out", default="out/student", help="directory to write the result to")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--save-every", type=at_least(1), help="steps between checkpoints in OUT.steps")
    add("--resume", action="store_true", help="go on from the newest checkpoint in OUT.steps")
    add("--epochs", type=at_least(1), default=8, help="passes over the examples")
    add("--max-steps", type=at_least(1), help="optimizer steps at most")
    add("--batch-size", type=at_least(1), default=16,
        help="sequences in an optimizer step, over all processes")
    add("--tokens-per-batch", type=at_least(1), default=8192,
        help="tokens in a packed row; longer examples are dropped")
    add("--lr", type=at_least(0, float), default=2e-3, help="highest learning rate (s1, 32B: 1e-5)")
    add("--warmup", type=at_least(0, float, 1), default=0.05,
        help="share of the steps in which it rises; then a cosine to 0")
    add("--weight-decay", type=at_least(0, float), default=1e-4, help="AdamW's")
    add("--clip", type=at_least(1e-9, float), default=1.0,
        help="largest global norm of the gradient")
    add("--seed", type=int, default=0, help="of the examples, their order and random weights")
    add("--recompute", action="store_true", help="less memory: each block's forward runs twice")
    add("--compile", action="store_true", help="kernels made by torch.compile: up to minutes at "
        "the start, needs a C++ compiler (or Triton on cuda)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu, mps")
    add("--dtype", choices=("float32", "bfloat16"),
        help="to compute in, weights stay float32 (default: bfloat16 on cuda)")
    add("--save-dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the written weights")
    cost_flags(add)
    return parser.parse_args()


# ---- Checkpoints ----------------------------------------------------------------------------
# A checkpoint is a model directory with the optimizer's state beside it. Everything else of a run
# is a function of its arguments and the step: the order of the data, the learning rate.

MOMENTS = ("exp_avg", "exp_avg_sq")                 # AdamW's, of each parameter


def save(directory, model, dtype, chat, records, optimizer=None):
    """Write beside the final name, flush to the disk, then rename: whole or not at all.

    Every process takes part, for each holds a share; the first one writes.
    """
    final = Path(directory)
    draft = final.with_name(final.name + ".draft") if first_process() else None
    if draft:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    model.save(draft, dtype)
    moments = {}
    for name, p in model.named_parameters() if optimizer else ():
        for key in MOMENTS:
            moment = whole(optimizer.state[p][key])
            if draft:                               # the others only give their share
                moments[f"{key}.{name}"] = moment.cpu()
    if not draft:
        return
    if optimizer:
        safetensors.torch.save_file(moments, draft / "optimizer.safetensors")
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


def save_step(out, done, model, optimizer, chat, run, metrics):
    """A checkpoint after `done` steps in OUT.steps, in place of the one before it."""
    checkpoint = Path(f"{out}.steps") / f"{done:08}"
    save(checkpoint, model, None, chat, {"run.json": json.dumps(
        {"run": run, "step": done, "metrics": metrics})}, optimizer)
    if first_process():
        for older in checkpoint.parent.iterdir():
            if older != checkpoint:
                shutil.rmtree(older)


def newest(out):
    """The newest whole checkpoint of OUT.steps and its run.json. BadInput where there is none."""
    found = []
    for path in sorted(Path(f"{out}.steps").glob("*")):
        if path.name.isdecimal():
            found.append(path)
        else:
            print(f"passed over {path}: half-written")
    if not found:
        raise BadInput(f"there is no checkpoint in {out}.steps to resume from")
    return found[-1], json.loads((found[-1] / "run.json").read_text(encoding="utf-8"))


def refuse_other(then, now):
    """BadInput where a run is to be resumed that was another one, saying what differs."""
    different = [f"--{key.replace('_', '-')} was {then.get(key)}, is {now[key]}" for key in now
                 if then.get(key) != now[key]]
    if different:
        raise BadInput("this is not the run that was stopped: " + "; ".join(different))


def restore(optimizer, model, path, step):
    """Put the saved moments back, each process its share."""
    with safetensors.safe_open(path / "optimizer.safetensors", framework="pt") as file:
        for name, p in model.named_parameters():
            state = optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device)}
            for key in MOMENTS:
                state[key] = torch.zeros_like(p)
                put(state[key], file.get_slice(f"{key}.{name}"))


def origin(world):
    """Where a run comes from: the command, and all else that its bits depend on."""
    def git(*words):
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return done.stdout.strip()
    try:
        changed = bool(git("status", "--porcelain", "-uno"))
        commit = git("rev-parse", "HEAD") + " and changes" * changed
    except OSError:
        commit = ""                                 # no git on this machine
    program = ["torchrun", "--nproc-per-node", str(world), "--"] if world > 1 else ["python"]
    flags = [flag for flag in sys.argv[1:] if flag != "--resume"]       # the whole run, at once
    return {"command": shlex.join([*program, "train.py", *flags]), "processes": world,
            "threads": torch.get_num_threads(), "commit": commit or "unknown",
            "versions": {"python": platform.python_version(), **{
                name: version(name) for name in ("torch", "numpy", "tokenizers", "safetensors")}}}


def first_process():
    """Is this the one of torchrun's processes that prints and writes?"""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


# ---- The gradients of a step ----------------------------------------------------------------


def gradients(model, batch, tokens_per_batch, device, autocast=False, rank=0, world=1):
    """Add the gradient of the batch's mean loss to the parameters': (that loss, lengths of rows).

    `batch`: examples (ids, first supervised). It is cut into packed rows, one forward and backward
    each, and the rows are dealt out to the processes; the gradient is the same however it is cut.
    For the loss of a step is the mean over all its supervised tokens: they are counted before the
    first row, and each row's sum is divided by that count. A mean of the rows' means would weigh
    the tokens of a short row more.
    """
    supervised = sum(len(ids) - first for ids, first in batch)
    rows, nothing = deal(batch, tokens_per_batch, world), [([0], 1)]
    total = torch.zeros((), device=device)
    # All processes take as many rows: one that has none left computes a token for nothing.
    for row in map(pack, (rows + [nothing] * (-len(rows) % world))[rank::world]):
        ids, positions = row["ids"].to(device), row["positions"].to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
            loss, _ = model(ids, positions, row["lengths"], row["targets"])
        (loss / supervised * world).backward()      # fully_shard takes the mean over processes
        total += loss.detach() / supervised
    if world > 1:
        torch.distributed.all_reduce(total)
    return total, [tokens_in(row) for row in rows]


def share(model, kind, world, autocast):
    """Deal the model's parameters out to the processes of torchrun (PyTorch's fully_shard).

    They are gathered block by block to be computed with, in bf16 under autocast; gradients are
    summed in float32. Inputs are not cast, for the angles of the positions stay float32.
    """
    options = {"mesh": torch.distributed.init_device_mesh(kind, (world,)),
               "mp_policy": MixedPrecisionPolicy(
                   param_dtype=torch.bfloat16 if autocast else None,
                   reduce_dtype=torch.float32, cast_forward_inputs=False)}
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)


# ---- The loop -------------------------------------------------------------------------------


def learning_rate(step, steps, highest, warmup):
    """Linear from 0 over the first share `warmup` of the steps, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return highest * (step + 1) / rising
    return highest * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def may_write(out, overwrite, resume):
    """BadInput, before the training and not after it, where `out` holds what is not to be lost."""
    if out.exists() and not overwrite:
        raise BadInput(f"{out} is there already: choose another --out, or --overwrite it")
    if out.exists() and not (out / "run.json").is_file():
        raise BadInput(f"{out} holds no run of this program, so it is not overwritten")
    if any(Path(f"{out}.steps").glob("*")) and not overwrite and not resume:
        raise BadInput(f"a run that was stopped is in {out}.steps: --resume it, or --overwrite it")
    out.parent.mkdir(parents=True, exist_ok=True)


def read_examples(args, chat, config):
    """The examples (ids, index of the first supervised token), and the number of optimizer steps.

    An over-long one is dropped, never cut: a trace without its end teaches to think without end
    (s1, section 4.1). BadInput where none is left.
    """
    examples = load_examples(args.data, chat, args.n, args.seed, args.give_up, args.ask,
                             teacher=args.teacher)
    longest = min(args.tokens_per_batch, config.max_position_embeddings)
    kept = [example for example in examples if len(example[0]) <= longest]
    if not kept:
        raise BadInput(f"all {len(examples)} examples are longer than {longest} tokens")
    steps = args.epochs * math.ceil(len(kept) / args.batch_size)
    print(f"{len(kept):,} examples, {tokens_in(kept):,} tokens a pass, "
          f"{len(examples) - len(kept)} dropped as longer than {longest:,}", flush=True)
    return kept, min(steps, args.max_steps or steps)


def start(args, config, source, device, world, autocast):
    """The model on its device, shared out over the processes, and its optimizer."""
    def prepare(model):
        model.recompute = args.recompute
        if args.compile:
            model.compile_kernels()
        if world > 1:
            share(model, torch.device(device).type, world, autocast)

    if args.scratch and not args.resume:
        model = Transformer(config).init_weights(args.seed).to(device)
        prepare(model)
    else:
        model = Transformer.load(source, device=device, prepare=prepare)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]        # norms and biases do not decay
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters on {world} x {torch.device(device).type}", flush=True)
    return model.train(), optimizer


def train(args):
    out, source = Path(args.out), local(args.model, weights=not args.plan)
    if not args.plan:
        may_write(out, args.overwrite, args.resume)
    chat, config = Chat(source, args.chat, args.thinking), read_config(source)
    chat.refuse_more_than(config.vocab_size)

    # One process, or as many as torchrun started: each with a device of its own.
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    kind = torch.device(args.device).type
    device = f"cuda:{os.environ['LOCAL_RANK']}" if kind == "cuda" and world > 1 else args.device
    if world > 1:
        torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    if rank:
        sys.stdout = open(os.devnull, "w")          # the first process speaks for all

    examples, steps = read_examples(args, chat, config)
    if args.plan:
        return plan(args, config, examples, steps)
    # What a run is a function of. Anything else may change when it is resumed.
    run = {key: value for key, value in vars(args).items() if key not in (
        "out", "overwrite", "save_every", "resume", "plan", "devices", "device_tflops",
        "device_memory_gb", "mfu", "usd_per_hour", "save_dtype")}
    run["data"] = hashlib.sha256(json.dumps(examples).encode()).hexdigest()[:16]
    done, metrics = 0, []
    if args.resume:
        source, state = newest(out)
        refuse_other(state["run"], run)
        done, metrics = state["step"], state["metrics"]
        print(f"resumed from {source}, step {done}", flush=True)
    autocast = args.dtype == "bfloat16" or args.dtype is None and kind == "cuda"
    model, optimizer = start(args, config, source, device, world, autocast)
    if args.resume:
        restore(optimizer, model, source, done)

    stop = hear_ctrl_c()
    batches = [batch for epoch in range(args.epochs)
               for batch in epoch_batches(examples, args.batch_size, args.seed, epoch)]
    bar = tqdm(range(done, steps), unit="step", disable=None if rank == 0 else True,
               initial=done, total=steps, dynamic_ncols=True)
    for step in bar:
        batch, began = batches[step], time.perf_counter()
        loss, rows = gradients(model, batch, args.tokens_per_batch, device, autocast, rank, world)
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr, args.warmup)
        if not torch.isfinite(norm + loss):
            begin = "; ".join(repr(chat.decode(ids[first:first + 12])) for ids, first in batch[:3])
            raise BadInput(f"step {step + 1}: loss {loss:.3g}, gradient {norm:.3g}; the weights "
                           f"were not touched. Its examples begin with: {begin}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        loss, norm = loss.item(), norm.item()       # waits for the device
        metrics.append({"step": step, "loss": loss, "lr": group["lr"], "grad_norm": norm,
                        "room": len(rows) * args.tokens_per_batch, "places": places(rows, world),
                        "memory_bytes": memory(kind),
                        **speed(batch, time.perf_counter() - began, config, args, world)})
        tqdm.write(line(metrics[-1], steps))        # above the bar
        sys.stdout.flush()
        stopping = anyone(bool(stop), world, device)
        if stopping or args.save_every and (step + 1) % args.save_every == 0 and step + 1 < steps:
            save_step(out, step + 1, model, optimizer, chat, run, metrics)
        if stopping:
            print(f"stopped after step {step + 1}: --resume goes on from {out}.steps")
            raise KeyboardInterrupt

    save(out, model, getattr(torch, args.save_dtype), chat, {
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in metrics),
        "run.json": json.dumps({**origin(world), "data": run["data"], "arguments": vars(args)},
                               indent=2) + "\n"})
    if rank == 0:
        shutil.rmtree(f"{out}.steps", ignore_errors=True)       # the run is whole
    summarise(args, metrics, world)


def hear_ctrl_c():
    """A list that Ctrl-C makes true: the step ends, is saved, and the run stops. A second Ctrl-C
    stops at once."""
    heard = []

    def hear(*_):
        heard.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGINT, hear)
    return heard


def anyone(heard, world, device):
    """Has one of the processes heard it? Ctrl-C does not reach those on another machine."""
    if world == 1:
        return heard
    heard = torch.tensor(float(heard), device=device)
    torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
    return bool(heard)


def speed(batch, seconds, config, args, world):
    """What a step computed, and how fast; MFU is its share of the devices' peak."""
    lengths = [len(ids) for ids, _ in batch]
    cost = flops(config, lengths, sum(len(ids) - first for ids, first in batch))
    peak = world * (args.device_tflops or 0) * 1e12
    return {"tokens": sum(lengths), "seconds": seconds, "tokens_per_second": sum(lengths) / seconds,
            "flops": cost, "mfu": cost / seconds / peak if peak else None}


def places(lengths, world):
    """What all processes could have computed in the time: of each round the longest row's tokens,
    times the processes."""
    return world * sum(max(lengths[i:i + world]) for i in range(0, len(lengths), world))


def memory(device):
    """The most memory this process has held, in bytes: of the GPU, else its resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def line(row, steps):
    """A step as a line."""
    mfu = "" if row["mfu"] is None else f"  MFU {100 * row['mfu']:.1f}%"
    left = (steps - row["step"] - 1) * row["seconds"]
    return (f"step {row['step'] + 1}/{steps}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
            f"norm {row['grad_norm']:.3f}  {row['tokens_per_second']:,.0f} tokens/s{mfu}  "
            f"{row['memory_bytes'] / 1e9:.2f} GB  {left / 60:.1f} min left")


def summarise(args, metrics, world):
    """What the run took and came to; the last loss is the mean of the last twentieth of it."""
    total = {key: sum(row[key] for row in metrics)
             for key in ("tokens", "room", "places", "flops", "seconds")}
    hours, last = total["seconds"] * world / 3600, metrics[-max(1, len(metrics) // 20):]
    busy, full = (100 * total["tokens"] / total[key] for key in ("places", "room"))
    print((f"rows {full:.1f}% full" if world == 1 else f"devices {busy:.1f}% busy, the rest of the "
           "time they wait for the longest row") +
          f"; {total['flops']:.3g} FLOPs, {hours:.3f} device-hours"
          + (f", {hours * args.usd_per_hour:.2f} dollars" if args.usd_per_hour else ""))
    print(f"{len(metrics)} steps, {total['tokens']:,} tokens in {total['seconds']:.0f} s "
          f"({total['tokens'] / total['seconds']:,.0f} a second), loss {metrics[0]['loss']:.3f} -> "
          f"{sum(row['loss'] for row in last) / len(last):.3f}, written to {args.out}")


# ---- Cost -----------------------------------------------------------------------------------


def flops(config, lengths, supervised):
    """Floating-point operations of a forward and backward pass over documents of these lengths.

    A matrix of n numbers costs 2n a token forward and twice that backward: 6n; the head only for
    supervised tokens, as the loss drops the others. Attention in a document of T tokens multiplies
    (T, D) by (D, T) and (T, T) by (T, D) in each head, 4 T^2 D; causality needs half of it, and
    backward is twice forward: 6 T^2 D for each head of each layer.
    """
    C, D, L = config.hidden_size, config.head_dim, config.num_hidden_layers
    H, K = config.num_attention_heads, config.num_key_value_heads
    layer = 2 * C * H * D + 2 * C * K * D + 3 * C * config.intermediate_size
    return (6 * L * layer * sum(lengths) + 6 * C * config.vocab_size * supervised
            + 6 * L * H * D * sum(T * T for T in lengths))


def cost_flags(add):
    add("--plan", action="store_true", help="compute what the run would take, and stop")
    add("--devices", type=at_least(1), default=1, help="for --plan: how many")
    add("--device-tflops", type=at_least(1e-6, float), help="a device's peak, for MFU and --plan")
    add("--device-memory-gb", type=at_least(0, float), default=80, help="for --plan")
    add("--mfu", type=at_least(0.001, float, 1), default=0.4, help="for --plan: share of the peak")
    add("--usd-per-hour", type=at_least(0, float), help="price of a device")


def plan(args, config, examples, steps):
    """Print memory, time and price of the run on the machine that the flags describe. It takes the
    --mfu to be the share of all devices' peak, their waiting for the longest row included."""
    if not args.device_tflops:
        raise BadInput("--plan needs --device-tflops for the time")
    with torch.device("meta"):
        model = Transformer(config)
    parameters = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    C, T, head = config.hidden_size, args.tokens_per_batch, config.hidden_size * config.vocab_size
    # What a block keeps for backward, a token, in bf16. Of width C: its input, what follows the
    # attention, and each norm's rows before and after they are scaled; q, k, v and the attention's
    # output; gate, its silu, up and their product. With --recompute the input alone, and one
    # block's whole share at a time.
    heads = config.num_attention_heads + config.num_key_value_heads
    kept = 2 * (6 * C + 2 * heads * config.head_dim + 4 * config.intermediate_size)
    layers = config.num_hidden_layers
    activations = {False: T * layers * kept, True: T * (layers * 2 * C + kept)}
    parts = {"weights, gradients and AdamW, float32": 16 * parameters / args.devices,
             "the head, bf16": 2 * head,
             "activations": activations[args.recompute],
             "gradient of the head, float32": 4 * head}
    if args.devices > 1:
        parts["the embedding and two blocks gathered, bf16"] = 2 * (head + 2 * block)
    need, room = sum(parts.values()), args.device_memory_gb * 1e9
    print(f"{parameters:,} parameters; memory of each of {args.devices} devices:")
    for name, size in parts.items():
        print(f"  {size / 1e9:8.2f} GB  {name}")
    saved = activations[False] - activations[True]
    advice = ("" if need <= room else ": --recompute makes it fit"
              if not args.recompute and need - saved <= room else
              ": more --devices, or a smaller --tokens-per-batch")
    print(f"  {need / 1e9:8.2f} GB  of {args.device_memory_gb:g}: "
          f"it {'fits' if need <= room else 'does not fit'}{advice}")
    count = min(steps * args.batch_size, args.epochs * len(examples))
    share = count / len(examples)
    tokens = share * tokens_in(examples)
    total = share * sum(flops(config, [len(ids)], len(ids) - first) for ids, first in examples)
    print(f"{steps:,} steps, {tokens:,.0f} tokens, {total:.3g} FLOPs")
    if args.devices > 1:
        batches = [[tokens_in(row) for row in deal(batch, T, args.devices)]
                   for batch in epoch_batches(examples, args.batch_size, args.seed, 0)]
        busy = sum(map(sum, batches)) / sum(places(rows, args.devices) for rows in batches)
        print(f"devices {100 * busy:.1f}% busy: the rest of the time they wait for the longest row")
    seconds = total / (args.devices * args.device_tflops * 1e12 * args.mfu)
    price = args.devices * seconds / 3600 * (args.usd_per_hour or 0)
    print(f"{seconds / 60:,.1f} minutes at {100 * args.mfu:g}% of the peak, "
          f"{args.devices * seconds / 3600:,.2f} device-hours"
          + (f", {price:,.2f} dollars" if args.usd_per_hour else ""))


def main():
    args = arguments()
    with complaints(BadModel, safetensors.SafetensorError):
        train(args)


if __name__ == "__main__":
    main()
