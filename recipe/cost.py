"""What fine-tuning costs: floating-point operations, memory, minutes and dollars.

`train.py --cost` prints the estimate, which needs neither weights nor a GPU.

In the comments: C hidden size, H query heads, K key-value heads, D head width, L layers, T tokens.
"""
import os
import sys

import torch


def flops(config, lengths: list[int], num_supervised: int) -> int:
    """Returns the floating-point operations of one forward and backward pass over sequences.

    A weight matrix with n elements costs 2n operations per token in the forward pass and twice as
    many in the backward pass. The output layer only sees supervised tokens. Attention multiplies
    (T, D) by (D, T) and (T, T) by (T, D) in each head, which is 4 T^2 D forward; the causal mask
    needs half of it, so forward and backward together cost 6 T^2 D per head and layer.
    """
    C, D, L = config.hidden_size, config.head_dim, config.num_hidden_layers
    H, K = config.num_attention_heads, config.num_key_value_heads
    block = 2 * C * H * D + 2 * C * K * D + 3 * C * config.intermediate_size
    matrices = 6 * L * block * sum(lengths)
    output = 6 * C * config.vocab_size * num_supervised
    attention = 6 * L * H * D * sum(T * T for T in lengths)
    return matrices + output + attention


def token_slots(row_lengths: list[int], num_processes: int) -> int:
    """Returns how many tokens all processes could have computed in the time of one step.

    The processes take one row each, round by round, and a round lasts as long as its longest row.
    """
    rounds = range(0, len(row_lengths), num_processes)
    return num_processes * sum(max(row_lengths[i:i + num_processes]) for i in rounds)


def activation_bytes(config, dtype: str, gradient_checkpointing: bool) -> int:
    """Returns the bytes that the backward pass of a token needs from the forward pass."""
    C, L, width = config.hidden_size, config.num_hidden_layers, 2 if dtype == "bfloat16" else 4
    # What a block keeps, per token. Six tensors of width C: its input, the output of attention,
    # and the rows of both norms before and after scaling. Then q, k, v and the output of the
    # heads; then the MLP's gate, silu(gate), up and their product.
    heads = config.num_attention_heads + config.num_key_value_heads
    per_block = width * (6 * C + 2 * heads * config.head_dim + 4 * config.intermediate_size)
    # With gradient checkpointing all blocks keep their input, and one at a time keeps the rest.
    return L * width * C + per_block if gradient_checkpointing else L * per_block


def default_row(config, device: str, dtype: str, gradient_checkpointing: bool) -> int:
    """Returns the tokens of a packed row: 8,192, or what needs 1 GB of activations on a CPU.

    A CPU takes long to map fresh memory, so longer rows are slower there.
    """
    per_token = activation_bytes(config, dtype, gradient_checkpointing)
    return min(8192, max(1, 10**9 // per_token)) if device == "cpu" else 8192


def memory(config, num_parameters: int, block_parameters: int, tokens_per_batch: int,
           num_devices: int, gradient_checkpointing: bool,
           dtype: str = "bfloat16") -> dict[str, float]:
    """Returns the bytes that each device needs, by what they hold.

    num_parameters counts the whole model, block_parameters one transformer block. `dtype` is that
    of the matrix products; in bfloat16 the weights are copied.
    """
    L, width = config.num_hidden_layers, 2 if dtype == "bfloat16" else 4
    output_weight = config.hidden_size * config.vocab_size
    activations = tokens_per_batch * activation_bytes(config, dtype, gradient_checkpointing)
    parts = {"weights, gradients and AdamW state, float32": 16 * num_parameters / num_devices,
             f"activations, {dtype}": activations,
             "gradient of the output weight, float32": 4 * output_weight}
    if dtype == "bfloat16":
        copied = output_weight + (L * block_parameters if num_devices == 1 else 0)
        parts["copies of weights, bfloat16"] = 2 * copied
    if num_devices > 1:
        gathered = output_weight + 2 * block_parameters
        parts[f"gathered embedding and two blocks, {dtype}"] = width * gathered
    return parts


def print_memory(args, config, num_parameters: int, block_parameters: int):
    """Prints what the memory of a device holds, and what to change where it is too small."""
    sizes = (config, num_parameters, block_parameters, args.tokens_per_batch, args.devices)
    dtype = args.dtype or "bfloat16"
    parts = memory(*sizes, args.gradient_checkpointing, dtype)
    need, capacity = sum(parts.values()), args.device_memory_gb * 1e9
    advice = "use more --devices or a smaller --tokens-per-batch"
    if sum(memory(*sizes, True, dtype).values()) <= capacity:
        advice = "--gradient-checkpointing makes it fit"
    print(f"{num_parameters:,} parameters; memory of each of {args.devices} devices:")
    for name, size in parts.items():
        print(f"  {size / 1e9:8.2f} GB  {name}")
    print(f"  {need / 1e9:8.2f} GB  of {args.device_memory_gb:g} GB: "
          + ("fits" if need <= capacity else f"does not fit, {advice}"))


def print_time(args, config, steps: int, lengths: list[int], num_supervised: int,
               row_lengths: list[list[int]]):
    """Prints the work, time and price of a run.

    lengths and num_supervised describe the examples of one epoch; row_lengths has the lengths of
    the packed rows for each step of an epoch. --mfu includes the time in which devices wait.
    """
    if not args.device_tflops:
        raise ValueError("--cost needs --device-tflops, the peak of a device, to compute the time")
    epochs = min(args.epochs, steps * args.batch_size / len(lengths))
    work = epochs * flops(config, lengths, num_supervised)
    print(f"{steps:,} steps, {epochs * sum(lengths):,.0f} tokens, {work:.3g} FLOPs")
    if args.devices > 1:
        slots = sum(token_slots(rows, args.devices) for rows in row_lengths)
        busy = sum(map(sum, row_lengths)) / slots
        print(f"devices {100 * busy:.1f}% busy; otherwise they wait for the longest row of a step")
    seconds = work / (args.devices * args.device_tflops * 1e12 * args.mfu)
    hours = args.devices * seconds / 3600
    price = f", {hours * args.usd_per_hour:,.2f} dollars" if args.usd_per_hour else ""
    print(f"{seconds / 60:,.1f} minutes at {100 * args.mfu:g}% of the peak, "
          f"{hours:,.2f} device-hours{price}")


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes that this process has held: on the GPU, or in RAM (0 if unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name != "posix":                      # Windows has no `resource`
        return 0
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def format_step(row: dict, num_steps: int) -> str:
    """Returns the line that train.py prints after a step."""
    mfu = "" if row["mfu"] is None else f"  MFU {100 * row['mfu']:.1f}%"
    val = f"  val loss {row['val_loss']:.4f}" if "val_loss" in row else ""
    minutes = (num_steps - row["step"] - 1) * row["seconds"] / 60
    return (f"step {row['step'] + 1}/{num_steps}  loss {row['loss']:.4f}{val}  "
            f"lr {row['lr']:.2e}  norm {row['grad_norm']:.3f}  "
            f"{row['tokens'] / row['seconds']:,.0f} tokens/s{mfu}  "
            f"{row['memory_bytes'] / 1e9:.2f} GB  {minutes:.1f} min left")


def print_summary(args, metrics: list, world_size: int) -> None:
    """Prints the totals of the run. Its final loss is the mean over the last 5% of the steps."""
    tokens, capacity, flops, seconds = (
        sum(row[key] for row in metrics) for key in ("tokens", "capacity", "flops", "seconds"))
    last = [row["loss"] for row in metrics[-max(1, len(metrics) // 20):]]
    hours = world_size * seconds / 3600
    price = f", {hours * args.usd_per_hour:.2f} dollars" if args.usd_per_hour else ""
    print(f"rows {100 * tokens / capacity:.1f}% full; {flops:.3g} FLOPs, "
          f"{hours:.3f} device-hours{price}")
    print(f"{len(metrics)} steps, {tokens:,} tokens in {seconds:.0f} s "
          f"({tokens / seconds:,.0f} a second), loss {metrics[0]['loss']:.3f} -> "
          f"{sum(last) / len(last):.3f}, written to {args.out}")
