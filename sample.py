"""Continuous batching: generate many sequences side by side, each open to a controller.

The engine in one sentence: admit waiting sequences to free slots, run the model for one token per
slot, append the tokens that the controller returns, and evict the sequences that have finished.

    slot 0  prompt a a a a a a . prompt d d d d d       . = finished: the next prompt starts here,
    slot 1  prompt b b . prompt c c c c c c c c         or the last slot's sequence moves here

`python sample.py "QUESTION"` prints an answer as it is generated.
"""
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch

import data
from model import KVCache, Transformer, read_config
from recipe import cli


@dataclass
class Sequence:
    """One sample of one prompt, and all that is known about it."""
    index: int                                          # of its prompt among those given
    prompt: list[int]
    sample: int = 0                                     # its number among the prompt's samples
    tokens: list[int] = field(default_factory=list)     # what follows the prompt
    forced: list[bool] = field(default_factory=list)    # per token: forced, not sampled?
    queue: deque[int] = field(default_factory=deque)    # forced tokens that are still to come
    banned: set[int] = field(default_factory=set)       # tokens that may not be drawn next
    state: object = None                                # for the controller's own use
    finish_reason: str | None = None                    # see check_finished
    rng: random.Random | None = None                    # of its draws
    prefix: list = field(default_factory=list)          # see Sampler.prefill
    ngram_counts: Counter = field(default_factory=Counter)

    def append_token(self, token: int, controller: Callable | None = None) -> None:
        """Append the next queued token, or what the controller returns for a sampled `token`."""
        if self.queue:
            first, forced = self.queue.popleft(), True
        else:
            self.banned, length = set(), len(self.tokens)
            first, *rest = controller(self, token) if controller else [token]
            forced = first != token or len(self.tokens) < length        # changed or rolled back
            self.queue.extend(rest)
        self.tokens.append(first)
        self.forced.append(forced)

    def rollback(self, n: int) -> None:
        """Remove the last n tokens. Later tokens overwrite their cache entries."""
        del self.tokens[len(self.tokens) - n:], self.forced[len(self.forced) - n:]

    def is_repeating(self, times: int, n: int = 20) -> bool:
        """Whether the last n tokens have now occurred `times` times. Call it once per token."""
        ngram = hash(tuple(self.tokens[-n:]))
        self.ngram_counts[ngram] += len(self.tokens) >= n
        return self.ngram_counts[ngram] >= times > 0


def make_sequences(prompts: list[list[int]], samples: int, seed: int,
                   max_seq_len: int) -> deque[Sequence]:
    """`samples` Sequences of each prompt; ValueError if a prompt does not fit."""
    sequences = deque()
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < max_seq_len:
            raise ValueError(f"a prompt of {len(prompt)} tokens does not fit: "
                             f"1 to {max_seq_len - 1} are possible")
        prefix = []
        for sample in range(samples):
            rng = random.Random(f"{seed} {prompt} {sample}")
            sequences.append(Sequence(index, prompt, sample, rng=rng, prefix=prefix))
    return sequences


def check_finished(seq: Sequence, stop_ids: Container[int], max_new_tokens: int | None,
                   max_seq_len: int, repeats: int) -> str | None:
    """Why a sequence ends with its last token; None where it continues."""
    if seq.tokens[-1] in stop_ids:
        return "stop"
    if len(seq.tokens) == max_new_tokens:
        return "max_new_tokens"
    if len(seq.prompt) + len(seq.tokens) == max_seq_len:
        return "length"
    return "repetition" if repeats and seq.is_repeating(repeats) else None


MAX_PREFILL = 2 ** 13       # tokens of prompts in one forward pass, padding included


class Sampler:
    """Generates in `max_num_seqs` slots of `max_seq_len` tokens each, prompt included. By default
    there are as many slots as 4 GB of cache hold, 1 to 256."""

    def __init__(self, model: Transformer, max_num_seqs: int | None = None,
                 max_seq_len: int = 1024):
        self.model = model.eval()
        self.max_seq_len = min(max_seq_len, model.config.max_position_embeddings)
        self.dtype, self.device = model.output_weight.dtype, model.output_weight.device
        slot = KVCache.allocate(model.config, 1, self.max_seq_len, self.dtype, "meta").layers
        most = 4 * 10**9 // sum(k.nbytes + v.nbytes for k, v in slot)
        self.max_num_seqs = max_num_seqs or min(max(most, 1), 256)
        self.cache = KVCache.allocate(
            model.config, self.max_num_seqs, self.max_seq_len, self.dtype, self.device)
        self.lm_head = torch.nn.Linear(1, 1, bias=False)    # shares the output weight of the model
        self.lm_head.weight = model.output_weight
        if self.device.type == "cpu" and torch.backends.mkldnn.is_available() and (
                self.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            self.pack_weights()

    def pack_weights(self) -> None:
        """Converts the linear layers on a CPU to the layout in which oneDNN multiplies few rows up
        to twice as fast. The model can only generate afterwards."""
        for layer in [self.lm_head, *self.model.model.modules()]:
            if isinstance(layer, torch.nn.Linear) and not layer.weight.is_mkldnn:
                packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
                layer.weight = torch.nn.Parameter(packed, requires_grad=False)
                layer.forward = partial(torch.ops.mkldnn._linear_pointwise, W=packed, B=layer.bias,
                                        attr="none", scalars=[], algorithm="")

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], controller: Callable | None = None,
                 samples: int = 1, max_new_tokens: int | None = None, stop_ids: Container[int] = (),
                 seed: int = 0, repeats: int = 0, **sampling_params) -> Iterator[Sequence]:
        """Yields `samples` Sequences per prompt, in the order in which they finish.

        controller(sequence, token) gets each sampled token and returns a list of tokens to append
        instead. Those beyond [token] are forced, and go through the model one per step as well.
        `repeats` ends a sequence in which 20 tokens occur that often. `sampling_params` are those
        of `probabilities`. Draws depend only on the seed, the prompt and the sample number.
        """
        waiting = make_sequences(prompts, samples, seed, self.max_seq_len)
        running = []                            # running[slot]; the slots after them are free
        longest = max(map(len, prompts), default=0)
        while waiting or running:
            logits = [self.decode(running)] if running else []
            n = min(len(waiting), self.max_num_seqs - len(running), max(1, MAX_PREFILL // longest))
            if admitted := [waiting.popleft() for _ in range(n)]:
                logits.append(self.prefill(running, admitted))
            tokens = self.sample_tokens(torch.cat(logits), running, **sampling_params)
            for seq, token in zip(running, tokens, strict=True):
                seq.append_token(token, controller)
                seq.finish_reason = check_finished(
                    seq, stop_ids, max_new_tokens, self.max_seq_len, repeats)
            yield from self.evict_finished(running)

    def decode(self, running) -> torch.Tensor:
        """Feeds the last token of every running sequence; returns the next logits, (slots, V)."""
        cache = self.cache.slots(0, len(running))
        cache.lengths[:] = torch.tensor([len(seq.prompt) + len(seq.tokens) - 1 for seq in running])
        ids = torch.tensor([seq.tokens[-1:] for seq in running], device=self.device)
        x = self.model.hidden_states(ids, *cache.reserve(1), cache.layers)
        return self.lm_head(x[:, 0])

    def prefill(self, running, admitted) -> torch.Tensor:
        """Adds `admitted` to `running`; returns the logits after their prompts, (n, V). The first
        sample of a prompt computes its `prefix`, logits and cache; all samples copy it."""
        if first := [seq for seq in admitted if seq.sample == 0]:
            lengths = torch.tensor([len(seq.prompt) for seq in first])
            B, T = len(first), int(lengths.max())
            # Padding stands at the end, where no token of the prompt attends to it.
            ids = torch.tensor([seq.prompt + [0] * (T - len(seq.prompt)) for seq in first])
            cache = KVCache.allocate(self.model.config, B, T, self.dtype, self.device)
            x = self.model.hidden_states(ids.to(self.device), *cache.reserve(T), cache.layers)
            logits = self.lm_head(x[torch.arange(B), lengths - 1])
            for i, seq in enumerate(first):
                seq.prefix += [logits[i], cache.slots(i, i + 1)]
        logits = torch.stack([seq.prefix[0] for seq in admitted])
        for slot, seq in enumerate(admitted, len(running)):
            self.cache.copy(seq.prefix[1], slot)            # with padding; decode sets lengths
            seq.prefix = None                   # freed when the last sample has copied it
        running += admitted
        return logits

    def sample_tokens(self, logits, running, temperature=0.0, **filters) -> list[int]:
        """The next token of each sequence, from logits (slots, V)."""
        for slot, seq in enumerate(running):
            if seq.banned:
                logits[slot, list(seq.banned)] = -torch.inf
        if temperature == 0:
            return logits.argmax(-1).tolist()
        # Each sequence draws from its own generator, and a forced token uses up no number of it.
        u = [0.0 if seq.queue else seq.rng.random() for seq in running]
        logits = logits.cpu() if logits.device.type == "mps" else logits    # MPS has no float64
        sums = probabilities(logits, temperature, **filters).cumsum(-1, dtype=torch.float64)
        thresholds = torch.tensor(u, dtype=sums.dtype, device=sums.device)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, thresholds, right=True)[:, 0].tolist()

    def evict_finished(self, running) -> list[Sequence]:
        """Removes and returns finished sequences; the last running one moves into each gap."""
        finished = [seq for seq in running if seq.finish_reason]
        for slot in reversed(range(len(running))):
            if running[slot].finish_reason:
                self.cache.copy(self.cache.slots(len(running) - 1, len(running)), slot)
                running[slot] = running[-1]
                running.pop()
        return finished


def probabilities(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0,
                  top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """The probabilities (B, V) of logits (B, V), 0 for what a filter removes. top_k keeps the k
    likeliest tokens (0: all), top_p the likeliest whose sum reaches p (nucleus sampling, Holtzman
    et al., 2020), min_p those at least min_p times as likely as the likeliest."""
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
    p = (logits.float() / temperature).softmax(-1)
    p[p < min_p * p.amax(-1, keepdim=True)] = 0
    if top_k or top_p < 1:
        ranked, order = torch.sort(p, dim=-1, descending=True, stable=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        ranked[:, top_k or p.shape[-1]:] = 0
        p.scatter_(-1, order, ranked)
    return p


def stream(sampler: Sampler, chat: data.Chat, prompt: list[int],
           controller: Callable | None = None, max_rollback: int = 0, **options) -> Sequence:
    """Generates one sequence and prints it as it grows: forced text dim yellow, or in [ ] without
    color. The last `max_rollback` tokens wait, as the controller may still remove them."""
    before, after = ("\033[2;33m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    num_printed = 0

    def print_until(seq, end):
        nonlocal num_printed
        for forced, run in groupby(range(num_printed, end), key=seq.forced.__getitem__):
            ids = [seq.tokens[i] for i in run]
            text = cli.escape(chat.decode(ids))
            if text.endswith("\ufffd") and num_printed + len(ids) == end and not seq.finish_reason:
                break                           # part of a character; the rest is to come
            print(f"{before}{text}{after}" if forced else text, end="", flush=True)
            num_printed += len(ids)

    def print_and_control(seq, token):
        print_until(seq, len(seq.tokens) - max_rollback)
        return controller(seq, token) if controller else [token]

    if prompt[-len(chat.opening_ids):] == chat.opening_ids:
        print(f"{before}{chat.opening}{after}", end="")
    seq, = sampler.generate([prompt], print_and_control, **options)
    print_until(seq, len(seq.tokens))
    print()
    return seq


def add_sampling_arguments(add: Callable) -> None:
    add("--temperature", type=cli.at_least(0, float), default=0.0, help="0: the most likely token")
    add("--top-k", type=cli.at_least(0), default=0, help="the k most likely tokens; 0: all")
    add("--top-p", type=cli.at_least(1e-6, float, 1), default=1.0, help="nucleus sampling; 1: off")
    add("--min-p", type=cli.at_least(0, float, 1), default=0.0, help="relative to the most likely")
    add("--repeats", type=cli.at_least(0), default=0, help="of 20 tokens, to stop; 0: off")
    add("--seed", type=int, default=0, help="of the draws, and of the order of options")
    cli.add_device_arguments(add)


def sampling_params(args) -> dict:
    return {k: getattr(args, k) for k in ("temperature", "top_k", "top_p", "min_p", "seed")}


def load_chat(name: str, args) -> tuple[data.Chat, int]:
    """The chat of a directory or hub id, and how many tokens its model takes at most."""
    directory = cli.resolve_model(name)
    chat = data.Chat(directory, args.system, args.thinking)
    return chat, read_config(directory).max_position_embeddings


def load_sampler(name: str, args, max_num_seqs: int | None,
                 chat: data.Chat | None = None) -> tuple[Sampler, data.Chat]:
    """A sampler of sequences of at most `args.max_seq_len` tokens, and the model's chat."""
    chat = chat or load_chat(name, args)[0]
    dtype = args.dtype or cli.default_dtype(args.device, read_config(chat.directory).extra)
    model = Transformer.load(chat.directory, getattr(torch, dtype), args.device)
    return Sampler(model, max_num_seqs, args.max_seq_len), chat


def main() -> None:
    parser = cli.ArgumentParser(description="Answer a question.")
    add = parser.add_argument
    add("question", help="its answer is printed as it is generated")
    add("--max-new-tokens", type=cli.at_least(1), default=1024, help="tokens of an answer at most")
    add("--direct", action="store_true", help="answer without thinking")
    data.add_model_arguments(add, default="out/student")
    add_sampling_arguments(add)
    args = parser.parse_args()
    with cli.exit_on_user_error(args.debug):
        chat, _ = load_chat(args.model, args)
        prompt = chat.prompt(args.question, thinking=not args.direct)
        args.max_seq_len = len(prompt) + args.max_new_tokens
        sampler, _ = load_sampler(args.model, args, 1, chat)
        seq = stream(sampler, chat, prompt, stop_ids=chat.stop_ids, repeats=args.repeats,
                     max_new_tokens=args.max_new_tokens, **sampling_params(args))
        print(f"({len(seq.tokens)} tokens, {seq.finish_reason})", file=sys.stderr)


if __name__ == "__main__":
    main()
