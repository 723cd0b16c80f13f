"""Speed, memory and numerical error next to other implementations, measured in the same run.

    python tests/bench.py loss      fused loss: whole logits, PyTorch's own, Liger's
    python tests/bench.py train     training loop: transformers' model in a plain loop
    python tests/bench.py decode    sampler: transformers' generate; the cost of forced tokens
    python tests/bench.py cost      what train.py --cost prints for Qwen2.5; needs no files
    python tests/bench.py train decode --model DIR     of a real model, in --dtype

Implementations that are not installed are left out, with a message. Install transformers (and
liger-kernel on CUDA) in a separate environment. Times are medians over rounds in which every
implementation runs once, so that a slow moment of the machine affects all of them: compare the
ratios, not the milliseconds.
"""
import argparse
import asyncio
import contextlib
import gc
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402
import train  # noqa: E402
from budget_force import Budget  # noqa: E402
from model import Config, FusedLinearCrossEntropy, Transformer, read_config  # noqa: E402
from recipe import cost  # noqa: E402
from sample import Sampler  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TINY = "--tiny" in sys.argv             # toys of toys, by which the tests keep this file alive


def describe_machine():
    """The processor, the number of threads and the torch version."""
    if CUDA:
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")),
                    platform.processor())
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_table(head, lines):
    widths = [max(len(str(line[i])) for line in [head, *lines]) for i in range(len(head))]
    for line in [head, ["-" * width for width in widths], *lines]:
        cells = [str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


def median_seconds(functions, rounds):
    """{name: median seconds} of functions that run one after the other in each round."""
    times = {name: [] for name in functions}
    for round_ in range(rounds + 1):                    # round 0 warms up
        for name, function in functions.items():
            gc.collect()
            if CUDA:
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if CUDA:
                torch.cuda.synchronize()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


# ---- Loss -----------------------------------------------------------------------------------


def loss_functions():
    """{name: function of (hidden, weight, labels) that returns the summed loss}."""
    def plain(hidden, weight, labels):
        return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")

    def plain_float32(hidden, weight, labels):
        return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")

    def ours(compiled):
        def loss(hidden, weight, labels):
            FusedLinearCrossEntropy.compiled = compiled
            supervised = (labels != -100).nonzero()[:, 0]
            return FusedLinearCrossEntropy.apply(hidden[supervised], weight, labels[supervised])
        return loss

    functions = {"plain": plain, "plain, float32 logits": plain_float32,
                 "ours": ours(False)} | ({} if TINY else {"ours, --compile": ours(True)})
    if hasattr(F, "linear_cross_entropy"):
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

        def pytorch(chunk):
            options = LinearCrossEntropyOptions(batch_chunk_size=chunk) if chunk else None
            return lambda hidden, weight, labels: F.linear_cross_entropy(
                hidden, weight, labels, reduction="sum", options=options,
                ignore_index=-100 if (labels == -100).any() else None)  # an ignore_index is slower
        for chunk in (None, 256, 512, 1024, 2048):
            name = f"PyTorch's, {f'chunk {chunk}' if chunk else 'automatic'}"
            functions[name] = pytorch(chunk)
    else:
        print(f"torch {torch.__version__} has no F.linear_cross_entropy: left out")
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum", ignore_index=-100)
        functions["Liger's"] = lambda hidden, weight, labels: liger(weight, hidden, labels)
    except ImportError:
        print("liger-kernel is not installed: left out")
    return functions


def make_problem(N, C, V, unsupervised=0.0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(V, C, generator=generator) * 2 / C ** 0.5).to(DEVICE, dtype)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < unsupervised] = -100
    return hidden, weight.requires_grad_(), labels.to(DEVICE)


def gradients(function, hidden, weight, labels):
    hidden.grad = weight.grad = None
    function(hidden, weight, labels).backward()
    return hidden.grad, weight.grad


def extra_memory(name, shape):
    """Peak memory in MB beyond the inputs. On the CPU a new process measures it."""
    if not CUDA:
        command = [sys.executable, __file__, "_memory", name, *map(str, shape)]
        return float(subprocess.run(command, check=True, capture_output=True,
                                    text=True).stdout.split()[-1])
    tensors = make_problem(*shape)
    gradients(loss_functions()[name], *tensors)
    tensors[0].grad = tensors[1].grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(loss_functions()[name], *tensors)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def print_cpu_memory(name, *shape):
    """Prints the peak of resident memory over that before the call, in MB."""
    shape = [int(number) for number in shape]
    function = loss_functions()[name]
    small, tensors = make_problem(8, shape[1], 64), make_problem(*shape)
    gradients(function, *small)                         # loads libraries and starts threads
    Path("/proc/self/clear_refs").write_text("5")       # resets the peak
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    gradients(function, *tensors)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    print((peak - resident) / 1e6)


def relative_errors(found, exact):
    return [f"{((a.double() - b).norm() / b.norm()).item():.2e}"
            for a, b in zip(found, exact, strict=True)]


def bench_loss(rounds):
    shapes = [(16384, 1536, 151936), (16384, 3584, 151936)] if CUDA else [(2048, 256, 32768)]
    for shape in [(64, 16, 500)] if TINY else shapes:
        N, C, V = shape
        print(f"{N:,} rows, width {C:,}, vocabulary {V:,}, bf16; forward and backward\n")
        functions = loss_functions()
        seconds, seconds_masked = (
            median_seconds({name: (lambda f=f, t=tensors: gradients(f, *t))
                            for name, f in functions.items()}, rounds)
            for tensors in (make_problem(*shape), make_problem(*shape, unsupervised=0.7)))
        # The reference is float64 on the same bf16 numbers. On CUDA it covers 2,048 rows.
        part = make_problem(min(N, 2048), C, V)
        exact = gradients(lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction="sum"),
                          *(t.detach().double().requires_grad_() for t in part[:2]), part[2])
        lines = []
        for name, function in functions.items():
            tflops = [f"{6 * N * C * V / seconds[name] / 1e12:.0f}"] if CUDA else []
            lines.append([name, f"{1000 * seconds[name]:.0f}",
                          f"{seconds['plain'] / seconds[name]:.2f}",
                          f"{seconds_masked['plain'] / seconds_masked[name]:.2f}",
                          "" if TINY and name != "ours" else f"{extra_memory(name, shape):.0f}",
                          *relative_errors(gradients(function, *part), exact), *tflops])
        print_table(["loss", "ms", "speed of plain = 1", "with 70% unsupervised", "extra MB",
                     "error of hidden's gradient", "of weight's"] + ["TFLOP/s"] * CUDA, lines)


# ---- Training -------------------------------------------------------------------------------


def model_shapes():
    """{name: (Config, tokens in a packed row, scale of the lengths)}."""
    if TINY:
        return {"0.1 M": (Config(500, 32, 64, 2, 2, 1, tie_word_embeddings=True), 256, 1 / 99)}
    if not CUDA:
        return {"5 M": (Config(8192, 256, 704, 4, 4, 2, tie_word_embeddings=True), 4096, 1 / 8)}
    return {"0.5 B": (Config(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True), 16384, 1),
            "1.5 B": (Config(151936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True), 16384, 1)}


def s1_like_examples(n, scale, max_tokens, vocab_size, rng):
    """Examples with the lengths of s1K (4,700 tokens on average, some three times as many), times
    `scale`. The first tenth of each is the question."""
    examples = []
    while len(examples) < n:
        T = round(scale * rng.lognormvariate(8.25, 0.62))
        if 16 <= T <= max_tokens:
            examples.append(([rng.randrange(vocab_size) for _ in range(T)], max(1, T // 10)))
    return examples


def our_step(source, batches, max_tokens, bf16, compiled=False):
    model = Transformer.load(source, device=DEVICE).train()
    FusedLinearCrossEntropy.compiled = False
    if compiled:
        model.compile_kernels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    remaining = iter(batches * 99)

    def step():
        FusedLinearCrossEntropy.compiled = compiled
        loss, _ = train.accumulate_gradients(model, next(remaining), max_tokens,
                                             torch.device(DEVICE), bf16)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step.losses.append(loss.item())
    step.losses = []
    return step


def load_transformers_model(source, dtype=torch.float32):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(DEVICE)


def transformers_step(source, batches, bf16, micro):
    """transformers' model in a plain loop: padded micro-batches of `micro` examples, its own loss
    and attention."""
    model = load_transformers_model(source).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    remaining = iter(batches * 99)

    def step():
        batch = next(remaining)
        supervised = sum(len(ids) - prompt_length for ids, prompt_length in batch)
        total = 0.0
        for start in range(0, len(batch), micro):
            part = batch[start:start + micro]
            T = max(len(ids) for ids, _ in part)
            ids = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in part])
            mask = torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids, _ in part])
            labels = torch.tensor([[-100] * n + ids[n:] + [-100] * (T - len(ids))
                                   for ids, n in part])
            with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
                loss = model(input_ids=ids.to(DEVICE), attention_mask=mask.to(DEVICE),
                             labels=labels.to(DEVICE), num_items_in_batch=supervised).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step.losses.append(total)
    step.losses = []
    return step


def matmul_tflops(dtype):
    """TFLOP/s of a large matrix product on this machine."""
    n = 8192 if CUDA else 1024
    a, b = (torch.randn(n, n, device=DEVICE, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2 * n ** 3 / median_seconds({"matmul": lambda: a @ b}, 10)["matmul"] / 1e12


def train_jobs(model, rounds, directory):
    """Yields (name, model directory, batches, row length): toys with s1's lengths, or `model` with
    documents of 1,200 and of 200 tokens."""
    rng = random.Random(0)
    if model:
        config = read_config(model)
        row = cost.default_row(config, DEVICE, "float32", gradient_checkpointing=False)
        for n, T in ((4, 1200), (24, 200)):
            batch = [([rng.randrange(config.vocab_size) for _ in range(T)], T // 10)
                     for _ in range(n)]
            yield f"{model}, {n} documents of {T:,}", model, [batch] * 2, row
        return
    for name, (config, max_tokens, scale) in model_shapes().items():
        examples = s1_like_examples(8 * (rounds + 1), scale, max_tokens, config.vocab_size, rng)
        Transformer(config).init_weights(0).save(directory)
        batches = [examples[i:i + 8] for i in range(0, len(examples), 8)]
        yield f"{name} parameters, s1's lengths", directory, batches, max_tokens


def bench_train(rounds, peak_tflops, model, dtypes):
    with tempfile.TemporaryDirectory() as directory:
        for name, source, batches, max_tokens in train_jobs(model, rounds, directory):
            steps, config, matmul = {}, read_config(source), matmul_tflops(dtypes[-1])
            for dtype in dtypes:
                bf16 = dtype == "bfloat16"
                steps[f"ours, {dtype}"] = our_step(source, batches, max_tokens, bf16)
                if not TINY:
                    steps[f"ours, {dtype}, --compile"] = our_step(
                        source, batches, max_tokens, bf16, True)
                with contextlib.suppress(ImportError):
                    steps[f"transformers, {dtype}, one by one"] = transformers_step(
                        source, batches, bf16, 1)
                    if not model:
                        steps[f"transformers, {dtype}, padded fours"] = transformers_step(
                            source, batches, bf16, 4)
            seconds = median_seconds(steps, rounds)
            # All loops have taken the same batches. Tokens and work are means over them.
            tokens = data.count_tokens(sum(batches[1:], [])) / len(batches[1:])
            work = sum(cost.flops(config, [len(ids) for ids, _ in batch],
                                  sum(len(ids) - n for ids, n in batch))
                       for batch in batches[1:]) / len(batches[1:])
            print(f"{name}, rows of {max_tokens:,}; a {dtypes[-1]} matrix product here: "
                  f"{matmul:.2f} TFLOP/s\n")
            best = min((s for key, s in seconds.items() if key.startswith("transformers")),
                       default=seconds[f"ours, {dtypes[-1]}"])
            print_table(
                ["loop", "tokens/s", "transformers' best = 1", "of the matrix product", "MFU",
                 "loss, first and last step"],
                [[key, f"{tokens / s:,.0f}", f"{best / s:.2f}",
                  f"{100 * work / s / 1e12 / matmul:.0f}%",
                  f"{100 * work / s / 1e12 / peak_tflops:.0f}%" if peak_tflops else "",
                  f"{steps[key].losses[0]:.4f} {steps[key].losses[-1]:.4f}"]
                 for key, s in seconds.items()])


# ---- Decoding -------------------------------------------------------------------------------


def decode_jobs(vocab_size):
    """{name: (prompts, number of new tokens of each)}. In the last job the numbers vary as the
    length of thinking does."""
    rng, n = random.Random(0), 12 if TINY else 128

    def prompts(n):
        return [[rng.randrange(1, vocab_size) for _ in range(rng.randint(16, 48))]
                for _ in range(n)]
    ragged = [round(n / 6.4 * 20 ** rng.random() ** 2) for _ in range(64)]   # 20 to 400
    return {"1 sequence": (prompts(1), [n]), "16, equal": (prompts(16), [n] * 16),
            "32, equal": (prompts(32), [n] * 32), "64, ragged": (prompts(64), ragged)}


def end_at(lengths):
    """A controller that ends each sequence with token 0 at its length, and never before."""
    def controller(seq, token):
        return [0] if len(seq.tokens) + 1 == lengths[seq.index] else [token or 1]
    return controller


def our_decode(model, prompts, lengths, max_num_seqs):
    sampler = Sampler(model, min(max_num_seqs, len(prompts)), 48 + max(lengths))
    return lambda: list(sampler.generate(prompts, end_at(lengths), stop_ids={0}))


def transformers_decode(model, prompts, lengths, batch_size):
    """Batches with padding on the left; each runs until its longest sequence ends."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class EndAt(LogitsProcessor):
        """Forces token 0 where a sequence has its length, and never before."""
        def __init__(self, lengths, width):
            self.lengths, self.width = torch.tensor(lengths, device=DEVICE), width

        def __call__(self, ids, scores):
            ends = ids.shape[1] - self.width + 1 >= self.lengths
            scores[:, 0] = torch.where(ends, 1e9, -1e9)
            return scores

    def run():
        for start in range(0, len(prompts), batch_size):
            part, wanted = prompts[start:start + batch_size], lengths[start:start + batch_size]
            T = max(map(len, part))
            ids = torch.tensor([[0] * (T - len(p)) + p for p in part], device=DEVICE)
            mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in part], device=DEVICE)
            model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max(wanted),
                           eos_token_id=0, pad_token_id=0,
                           logits_processor=LogitsProcessorList([EndAt(wanted, T)]))
    return run


def vllm_decode(base_url, prompts, lengths):
    """All prompts at once on a vLLM server that serves the same model."""
    import openai

    async def ask():
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", timeout=3600) as client:
            model = (await client.models.list()).data[0].id
            await asyncio.gather(*(
                client.completions.create(model=model, prompt=prompt, max_tokens=n, temperature=0,
                                          extra_body={"ignore_eos": True})
                for prompt, n in zip(prompts, lengths, strict=True)))
    return lambda: asyncio.run(ask())


def bench_decode(rounds, source, dtypes, base_url):
    with tempfile.TemporaryDirectory() as directory:
        if not source:
            Transformer(list(model_shapes().values())[-1][0]).init_weights(0).save(directory)
        for dtype in dtypes:
            bench_decode_in(rounds, source or directory, getattr(torch, dtype), base_url)


def bench_decode_in(rounds, source, dtype, base_url):
    model, other = Transformer.load(source, dtype, DEVICE), None
    with contextlib.suppress(ImportError):
        other = load_transformers_model(source, dtype).eval()
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:,.0f} M parameters, {dtype}, greedy, 32 slots or batches of 32\n")
    lines = []
    for job, (prompts, lengths) in decode_jobs(model.config.vocab_size).items():
        functions = {"ours": our_decode(model, prompts, lengths, 32)}
        if other:
            functions["generate"] = transformers_decode(other, prompts, lengths, 32)
        if base_url:
            functions["vLLM"] = vllm_decode(base_url, prompts, lengths)
        seconds = median_seconds(functions, rounds)
        baseline = seconds.get("generate", seconds["ours"])
        lines += [[job, name, f"{sum(lengths) / s:,.0f}", f"{baseline / s:.2f}"]
                  for name, s in seconds.items()]
    print_table(["job", "sampler", "tokens/s", "generate = 1"], lines)
    bench_forcing(model, model.config, rounds)


def bench_forcing(model, config, rounds):
    """What a budget costs over plain sampling of as many tokens, and what a Wait costs."""
    prompts, _ = decode_jobs(config.vocab_size)["32, equal"]
    n, num_reserved = 128, 10           # the delimiters and "Wait"; never sampled by chance
    counts = []                         # of tokens, padding included, per forward pass
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: counts.append(inputs[0].numel()))
    computed = {}

    def budget(num_waits):
        # A toy chat; 0 ends the thinking, the other ids stand for text.
        chat = SimpleNamespace(
            closing_ids=[1, 2], closing_text="", end_ids={0}, turn_ids=set(), stop_ids={0},
            end_id=0, encode={"Wait": [3, 4], "Final Answer:": [5], "\n": [6]}.get,
            decode=lambda ids: "x")
        controller = Budget(chat, n - 5, num_waits, max_answer=1)

        def wants_to_end_every_30_tokens(seq, token):
            end = num_waits and len(seq.tokens) % 30 == 29
            return controller(seq, 0 if end else max(token, num_reserved))
        return wants_to_end_every_30_tokens

    sampler = Sampler(model, 32, 200)   # the same one for all, hence the same memory

    def generate(name, controller):
        def run():
            counts.clear()
            list(sampler.generate(prompts, controller, max_new_tokens=n))
            computed[name] = sum(counts)
        return run

    functions = {"plain": generate("plain", lambda seq, token: [max(token, num_reserved)]),
                 "cut": generate("cut", budget(0)), "two Waits": generate("two Waits", budget(2))}
    seconds = median_seconds(functions, rounds)
    again = {"plain": 0, "cut": 0, "two Waits": sum(2 * len(p) + 30 + 61 for p in prompts)}
    print_table(["32 sequences of 128 tokens", "time of plain = 1", "tokens computed, padded",
                 "if each Wait prefills again"],
                [[name, f"{s / seconds['plain']:.3f}", computed[name],
                  computed[name] + again[name]] for name, s in seconds.items()])


# ---- Cost -----------------------------------------------------------------------------------

QWEN = {"7B": (4, Config(152064, 3584, 18944, 28, 28, 4)),     # number of H100s, config.json
        "32B": (16, Config(152064, 5120, 27648, 64, 40, 8))}
# s1's fine-tuning (section 4.1), at the 20% of an H100's peak that its 26 minutes come to.
S1 = dict(device_tflops=989, device_memory_gb=80, mfu=0.2, usd_per_hour=2, epochs=5, batch_size=16,
          tokens_per_batch=32768, gradient_checkpointing=True, dtype=None)


def print_costs():
    """s1's fine-tuning of Qwen2.5 on 1,000 traces of 4,700 tokens on average."""
    rng = random.Random(0)
    lengths = [min(30_000, round(rng.lognormvariate(8.27, 0.62))) for _ in range(1000)]
    examples = [([0] * length, 300) for length in lengths]
    for name, (devices, config) in QWEN.items():
        print(f"Qwen2.5-{name}, {devices} H100")
        args = SimpleNamespace(**S1, devices=devices)
        with torch.device("meta"):
            model = Transformer(config)
        sizes = [sum(p.numel() for p in part.parameters())
                 for part in (model, model.model.layers[0])]
        rows = [[data.count_tokens(row) for row in
                 data.pack_sequences(batch, args.tokens_per_batch, devices)]
                for batch in data.epoch_batches(examples, args.batch_size, 0, 0)]
        cost.print_memory(args, config, *sizes)
        cost.print_time(args, config, 315, lengths, sum(lengths) - 300 * len(lengths), rows)
        print()


def main():
    if sys.argv[1:2] == ["_memory"]:
        return print_cpu_memory(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("loss", "train", "decode", "cost"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cuda", "cpu"), default=DEVICE)
    parser.add_argument("--tiny", action="store_true", help="sizes that only test this program")
    parser.add_argument("--device-tflops", type=float, help="peak of the device, for MFU")
    parser.add_argument("--model", help="directory of a real model, for train and decode")
    parser.add_argument("--base-url", help="of a vLLM server with the same model, for decode")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"),
                        default=["bfloat16"] if CUDA else ["float32", "bfloat16"])
    args = parser.parse_args()
    if args.device != DEVICE:
        parser.error(f"the device of this machine is {DEVICE}")
    if "cost" in args.what:
        print_costs()
    if args.what != ["cost"]:
        print(describe_machine())
    if "loss" in args.what:
        bench_loss(args.rounds)
    if "train" in args.what:
        bench_train(args.rounds, args.device_tflops, args.model, args.dtype)
    if "decode" in args.what:
        bench_decode(args.rounds, args.model, args.dtype, args.base_url)


if __name__ == "__main__":
    main()
