"""Speed, memory and error beside peers, all in one run: ratios count, not the milliseconds.

    python tests/bench.py loss      the fused loss beside whole logits, PyTorch's own and Liger's
    python tests/bench.py train     the loop beside transformers' model in a plain loop
    python tests/bench.py decode    the sampler beside transformers' generate; what forcing costs
    python tests/bench.py plan      what train.py --plan says of Qwen2.5, with no file at hand

A peer that is not installed is left out, and a line says so. `pip install transformers` (and
liger-kernel on a CUDA machine) into an environment of its own. Times are medians of rounds in which
each contestant runs once, so that a slow moment of the machine meets them all.
"""
import argparse
import gc
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from budget_force import Budget
from model import Config, FusedLinearCrossEntropy, Transformer
from sample import Sampler

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def machine():
    """What this run is measured on, as a line."""
    if CUDA:
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")),
                    platform.processor())
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def table(head, rows):
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(row, widths)) + " |")
    print(flush=True)


def medians(contestants, rounds):
    """{name: median seconds} of functions that run one after the other, round by round."""
    times = {name: [] for name in contestants}
    for round_ in range(rounds + 1):                    # the first round warms up
        for name, function in contestants.items():
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


# ---- The loss -------------------------------------------------------------------------------


def losses(vocabulary):
    """{name: function of (hidden, weight, targets) that returns the summed loss}."""
    def plain(hidden, weight, targets):
        return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")

    def plain_float32(hidden, weight, targets):
        return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")

    def ours(compiled):
        def loss(hidden, weight, targets):
            FusedLinearCrossEntropy.compiled = compiled
            rows = (targets != -100).nonzero()[:, 0]
            return FusedLinearCrossEntropy.apply(hidden[rows], weight, targets[rows])
        return loss

    found = {"plain": plain, "plain, float32 logits": plain_float32,
             "ours": ours(False), "ours, --compile": ours(True)}
    if hasattr(F, "linear_cross_entropy"):
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

        def own(chunk):
            options = LinearCrossEntropyOptions(batch_chunk_size=chunk) if chunk else None
            return lambda hidden, weight, targets: F.linear_cross_entropy(
                hidden, weight, targets, reduction="sum", options=options,
                ignore_index=-100 if (targets == -100).any() else None)     # it is slower with one
        for chunk in (None, 256, 512, 1024, 2048):
            found[f"PyTorch's, {f'chunk {chunk}' if chunk else 'automatic'}"] = own(chunk)
    else:
        print(f"torch {torch.__version__} has no F.linear_cross_entropy: left out")
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum", ignore_index=-100)
        found["Liger's"] = lambda hidden, weight, targets: liger(weight, hidden, targets)
    except ImportError:
        print("liger-kernel is not installed: left out")
    return found


def problem(N, C, V, unsupervised=0.0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(V, C, generator=generator) * 2 / C ** 0.5).to(DEVICE, dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < unsupervised] = -100
    return hidden, weight.requires_grad_(), targets.to(DEVICE)


def once(function, hidden, weight, targets):
    hidden.grad = weight.grad = None
    function(hidden, weight, targets).backward()
    return hidden.grad, weight.grad


def extra_memory(name, shape):
    """Most MB held beyond inputs and before the first call; on the CPU in a process of its own."""
    if not CUDA:
        return float(subprocess.run([sys.executable, __file__, "_memory", name, *map(str, shape)],
                                    check=True, capture_output=True, text=True).stdout.split()[-1])
    tensors = problem(*shape)
    once(losses(shape[2])[name], *tensors)
    tensors[0].grad = tensors[1].grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once(losses(shape[2])[name], *tensors)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def memory_of_one(name, *shape):
    """The child of `extra_memory`: peak resident memory over that of a run with eight rows."""
    shape = [int(number) for number in shape]
    function = losses(shape[2])[name]
    small, tensors = problem(8, shape[1], 64), problem(*shape)
    once(function, *small)                              # libraries and threads load their own
    before = Path("/proc/self/clear_refs")
    before.write_text("5")                              # reset the peak
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    once(function, *tensors)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    print((peak - resident) / 1e6)


def bench_loss(rounds):
    shapes = [(16384, 1536, 151936), (16384, 3584, 151936)] if CUDA else [(2048, 256, 32768)]
    for shape in shapes:
        N, C, V = shape
        print(f"{N:,} rows, width {C:,}, vocabulary {V:,}, bf16; forward and backward\n")
        found = losses(V)
        tensors, masked = problem(*shape), problem(*shape, unsupervised=0.7)
        all_, few = ({name: (lambda f=f, t=t: once(f, *t)) for name, f in found.items()}
                     for t in (tensors, masked))
        seconds, seconds_few = medians(all_, rounds), medians(few, rounds)
        # float64 on the same bf16 numbers; on CUDA a part of the rows, for the size of it.
        part = problem(min(N, 2048), C, V)
        exact = [t.detach().double().requires_grad_() for t in part[:2]]
        want = once(lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction="sum"), *exact, part[2])
        rows = []
        for name in found:
            got = once(found[name], *part)
            errors = [f"{((g.double() - e).norm() / e.norm()).item():.2e}" for g, e in
                      zip(got, want)]
            rows.append([name, f"{1000 * seconds[name]:.0f}",
                         f"{seconds['plain'] / seconds[name]:.2f}",
                         f"{seconds_few['plain'] / seconds_few[name]:.2f}",
                         f"{extra_memory(name, shape):.0f}", *errors]
                        + ([f"{6 * N * C * V / seconds[name] / 1e12:.0f}"] if CUDA else []))
        table(["way", "ms", "times the plain way", "with 70% of the rows unsupervised",
               "extra MB", "error of hidden's gradient", "of weight's"]
              + (["TFLOP/s"] if CUDA else []), rows)


# ---- Training -------------------------------------------------------------------------------


def shapes():
    """{name: (Config, tokens in a batch, scale of the lengths)}."""
    if not CUDA:
        return {"5 M": (Config(8192, 256, 704, 4, 4, 2, tie_word_embeddings=True), 4096, 1 / 8)}
    return {"0.5 B": (Config(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True), 16384, 1),
            "1.5 B": (Config(151936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True), 16384, 1)}


def s1_like(n, scale, longest, vocabulary, rng):
    """Examples with lengths spread like s1K's (mean 4,700 tokens, some three times as long), times
    `scale`; the first tenth of each is the question."""
    examples = []
    while len(examples) < n:
        T = round(scale * rng.lognormvariate(8.25, 0.62))
        if 16 <= T <= longest:
            examples.append(([rng.randrange(vocabulary) for _ in range(T)], max(1, T // 10)))
    return examples


def our_step(config, state, batches, tokens, bf16, compiled=False):
    model = Transformer(config).to(DEVICE)
    model.load_state_dict(state)
    FusedLinearCrossEntropy.compiled = False
    if compiled:
        model.compile_kernels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    turn = iter(batches * 99)

    def step():
        FusedLinearCrossEntropy.compiled = compiled
        loss, _ = train.gradients(model, next(turn), tokens, DEVICE, bf16)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step.losses.append(loss.item())
    step.losses = []
    return step


def their_step(config, state, batches, tokens, bf16):
    """transformers' model in a plain loop: padded micro-batches, its own loss and attention."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    fields = {key: value for key, value in config.to_dict().items() if key != "head_dim"}
    model = Qwen2ForCausalLM(Qwen2Config(**fields)).to(DEVICE)
    model.load_state_dict(state, strict=False)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    turn = iter(batches * 99)

    def step():
        batch, micro = next(turn), 4
        supervised = sum(len(ids) - first for ids, first in batch)
        total = 0.0
        for start in range(0, len(batch), micro):
            part = batch[start:start + micro]
            T = max(len(ids) for ids, _ in part)
            ids = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in part])
            mask = torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids, _ in part])
            labels = torch.tensor([[-100] * first + ids[first:] + [-100] * (T - len(ids))
                                   for ids, first in part])
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


def matrix_product():
    """TFLOP/s of a large bf16 matrix product on this machine, now."""
    n = 8192 if CUDA else 1024
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n ** 3 / medians({"product": lambda: a @ b}, 10)["product"] / 1e12


def bench_train(rounds, peak):
    for name, (config, tokens, scale) in shapes().items():
        rng = random.Random(0)
        examples = s1_like(8 * (rounds + 1), scale, tokens, config.vocab_size, rng)
        batches = [examples[i:i + 8] for i in range(0, len(examples), 8)]
        state = Transformer(config).init_weights(0).state_dict()
        steps = {"ours": our_step(config, state, batches, tokens, False),
                 "ours, bf16": our_step(config, state, batches, tokens, True),
                 "ours, bf16, --compile": our_step(config, state, batches, tokens, True, True)}
        try:
            steps |= {"transformers": their_step(config, state, batches, tokens, False),
                      "transformers, bf16": their_step(config, state, batches, tokens, True)}
        except ImportError:
            print("transformers is not installed: left out")
        seconds = medians(steps, rounds)
        # All have taken the same batches; useful tokens, a second, of the median step.
        useful = sum(len(ids) for batch in batches[1:] for ids, _ in batch) / rounds
        cost = sum(train.flops(config, [len(ids) for ids, _ in batch],
                               sum(len(ids) - first for ids, first in batch))
                   for batch in batches[1:]) / rounds
        product = matrix_product()
        print(f"{name} parameters, 8 sequences a step, {useful / 8:,.0f} tokens each, rows of "
              f"{tokens:,}; a bf16 matrix product here: {product:.2f} TFLOP/s\n")
        slowest = seconds.get("transformers", seconds["ours"])
        theirs = seconds.get("transformers, bf16", seconds["ours"])
        table(["loop", "useful tokens/s", "times transformers", "times its bf16",
               "share of the product", "MFU", "loss, first and last step"],
              [[key, f"{useful / s:,.0f}", f"{slowest / s:.2f}", f"{theirs / s:.2f}",
                f"{100 * cost / s / 1e12 / product:.0f}%",
                f"{100 * cost / s / 1e12 / peak:.0f}%" if peak else "",
                f"{steps[key].losses[0]:.4f} {steps[key].losses[-1]:.4f}"]
               for key, s in seconds.items()])


# ---- Decoding -------------------------------------------------------------------------------


def decode_jobs(vocabulary):
    """{what: (prompts, new tokens of each)}; the last one's lengths vary as thinking does."""
    rng = random.Random(0)

    def prompts(n):
        return [[rng.randrange(1, vocabulary) for _ in range(rng.randint(16, 48))]
                for _ in range(n)]
    ragged = [round(20 * 20 ** rng.random() ** 2) for _ in range(128)]      # 20 to 400
    return {"batch 1": (prompts(1), [128]), "batch 32, equal": (prompts(32), [128] * 32),
            "128 prompts, ragged": (prompts(128), ragged)}


class Until:
    """A steer that ends each row with token 0 after its number of tokens; costs nothing else."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __call__(self, row, token):
        return [0] if len(row.tokens) + 1 == self.lengths[row.index] else [token or 1]


def our_decode(model, prompts, lengths, slots, compiled=False):
    sampler = Sampler(model, min(slots, len(prompts)), 48 + max(lengths), compiled)
    return lambda: sum(len(row.tokens) for row in
                       sampler.generate(prompts, Until(lengths), stops={0}))


def their_decode(model, prompts, lengths, slots):
    """Batches of `slots`, padded on the left; each goes on until its longest row is done."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class End(LogitsProcessor):
        """Token 0 where a row has its length, and never before."""
        def __init__(self, wanted, width):
            self.wanted, self.width = torch.tensor(wanted, device=DEVICE), width

        def __call__(self, ids, scores):
            ends = ids.shape[1] - self.width + 1 >= self.wanted
            scores[:, 0] = torch.where(ends, 1e9, -1e9)
            return scores

    def run():
        for start in range(0, len(prompts), slots):
            part, wanted = prompts[start:start + slots], lengths[start:start + slots]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part], device=DEVICE)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part],
                                device=DEVICE)
            model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max(wanted),
                           eos_token_id=0, pad_token_id=0,
                           logits_processor=LogitsProcessorList([End(wanted, width)]))
    return run


def bench_decode(rounds):
    config = next(iter(shapes().values()))[0] if not CUDA else shapes()["1.5 B"][0]
    dtype = torch.bfloat16 if CUDA else torch.float32
    model = Transformer(config).init_weights(0).to(DEVICE, dtype)
    theirs = None
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
        fields = {key: value for key, value in config.to_dict().items() if key != "head_dim"}
        theirs = Qwen2ForCausalLM(Qwen2Config(**fields)).to(DEVICE, dtype).eval()
        theirs.load_state_dict(model.state_dict(), strict=False)
    except ImportError:
        print("transformers is not installed: left out")
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:,.0f} M parameters, greedy, 32 slots or batches of 32\n")
    rows = []
    for what, (prompts, lengths) in decode_jobs(config.vocab_size).items():
        contestants = {"ours": our_decode(model, prompts, lengths, 32),
                       "ours, --compile": our_decode(model, prompts, lengths, 32, True)}
        if theirs:
            contestants["generate"] = their_decode(theirs, prompts, lengths, 32)
        seconds = medians(contestants, rounds)
        slowest = seconds.get("generate", seconds["ours"])
        rows += [[what, name, f"{sum(lengths) / s:,.0f}", f"{slowest / s:.2f}"]
                 for name, s in seconds.items()]
    table(["job", "who", "tokens/s", "times generate"], rows)
    bench_forcing(model, config, rounds)


def bench_forcing(model, config, rounds):
    """What a budget costs over plain sampling of as many tokens, and a Wait over none."""
    prompts, _ = decode_jobs(config.vocab_size)["batch 32, equal"]
    close, wait, n = [1, 2], [3, 4], 128
    words = list(range(10))                 # never sampled by chance: the thinking is cut or waits

    def forced(waits):
        made = Budget(n - 5, waits, close=close, wait=[wait], final=[5], newline=[6], stop=0,
                      line_ends=frozenset(), ends=frozenset({(0,)}), max_answer=1)

        def steer(row, token):              # wants to end every 30 tokens
            return made(row, 0 if waits and len(row.tokens) % 30 == 29 else max(token, len(words)))
        return steer
    samplers = {name: Sampler(model, 32, 200) for name in ("plain", "cut", "two Waits")}
    jobs = {"plain": lambda: list(samplers["plain"].generate(
                prompts, lambda row, token: [max(token, len(words))], max_new_tokens=n)),
            "cut": lambda: list(samplers["cut"].generate(prompts, forced(0), max_new_tokens=n)),
            "two Waits": lambda: list(samplers["two Waits"].generate(
                prompts, forced(2), max_new_tokens=n))}
    seconds = medians(jobs, rounds)
    again = {"plain": 0, "cut": 0, "two Waits": sum(2 * len(p) + 30 + 61 for p in prompts)}
    table(["32 rows of 128 tokens", "times plain", "tokens computed", "if a Wait reads all again"],
          [[name, f"{s / seconds['plain']:.3f}", samplers[name].computed // (rounds + 1),
            samplers[name].computed // (rounds + 1) + again[name]] for name, s in seconds.items()])


QWEN = {"7B": (4, Config(152064, 3584, 18944, 28, 28, 4)),     # H100s, and what config.json says
        "32B": (16, Config(152064, 5120, 27648, 64, 40, 8))}


# s1's fine-tuning (section 4.1), at the 20% of an H100's peak that its 26 minutes come to.
S1 = SimpleNamespace(device_tflops=989, device_memory_gb=80, mfu=0.2, usd_per_hour=2, epochs=5,
                     batch_size=16, tokens_per_batch=32768, recompute=True, seed=0)


def plans():
    """s1's fine-tuning of Qwen2.5 on 1,000 traces of 4,700 tokens on average."""
    rng = random.Random(0)
    lengths = [min(30_000, round(rng.lognormvariate(8.27, 0.62))) for _ in range(1000)]
    for name, (devices, config) in QWEN.items():
        print(f"Qwen2.5-{name}, {devices} H100")
        train.plan(SimpleNamespace(**vars(S1), devices=devices), config,
                   [([0] * n, 300) for n in lengths], 315)
        print()


def main():
    if sys.argv[1:2] == ["_memory"]:
        return memory_of_one(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("loss", "train", "decode", "plan"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device-tflops", type=float, help="the datasheet's peak, for MFU")
    args = parser.parse_args()
    if "plan" in args.what:
        plans()
    if args.what != ["plan"]:
        print(machine())
    if "loss" in args.what:
        bench_loss(args.rounds)
    if "train" in args.what:
        bench_train(args.rounds, args.device_tflops)
    if "decode" in args.what:
        bench_decode(args.rounds)


if __name__ == "__main__":
    main()
