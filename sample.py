"""Turn prompts into tokens: many rows at once, each free to be steered.

In:   a model, and prompts as lists of token ids.
Out:  rows as they finish: their tokens, which of them were forced, and why they ended.

The engine in one sentence: admit waiting rows into free slots, let `steer` look at the token
each row would take, retire the finished rows, decode one token for every slot.

    slot 0  prompt a a a a a a . prompt d d d d d          . = finished, the next prompt moves in;
    slot 1  prompt b b . prompt c c c c c c c c            with none left, the last slot's row does

Map:  Row          one sample of one prompt, and all that is known of it
      Sampler      the engine: generate, and beneath it take, draw, prefill, decode
      streaming    one answer in a terminal as it comes: python sample.py "Use 3, 5 and 2 ..."
      the program  that, or as a teacher a file of questions: --questions q.jsonl --out traces.jsonl
"""
import itertools
import random
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx.experimental import _config as shapes
from tqdm import tqdm

from data import (BadInput, Chat, Parser, at_least, complaints, escape, load_questions, local,
                  model_flags, open_traces, row_key, trace_row, write_row)
from model import BadModel, KVCache, Transformer


@dataclass
class Row:
    """One sample of one prompt on its way. A `steer` may keep what it likes in `memory`, put token
    ids that the next draw must not give into `banned`, and `withdraw` what went in last."""
    index: int                                      # of the prompt
    prompt: list
    sample: int = 0
    tokens: list = field(default_factory=list)      # what followed the prompt
    forced: list = field(default_factory=list)      # for each token: did we put it in?
    finish: str | None = None                       # why it ended, see `Sampler.ending`
    banned: set = field(default_factory=set)
    memory: Any = None
    queue: deque = field(default_factory=deque)     # forced tokens that still have to go in
    seen: Counter = field(default_factory=Counter)  # runs of tokens so far, see `repeats`
    draws: random.Random | None = None

    def withdraw(self, n):
        """Take the last n tokens back. Their places in the cache are simply written again."""
        del self.tokens[len(self.tokens) - n:], self.forced[len(self.forced) - n:]

    def repeats(self, times, n=20):
        """Have the last n tokens now occurred `times` times in this row? Call it once a token."""
        run = hash(tuple(self.tokens[-n:]))
        self.seen[run] += len(self.tokens) >= n
        return self.seen[run] >= times > 0


PREFILL = 2 ** 14                   # places, at most, of prompts that are read side by side


class Sampler:
    """`slots` rows side by side, each of at most `max_length` tokens with its prompt. `compiled`:
    decoding is one step made by torch.compile, which takes up to a minute once.

    sampler = Sampler(model, slots=2, max_length=64)
    for row in sampler.generate([[5, 6], [7]], stops={0}): row.index, row.tokens, row.finish
    """

    def __init__(self, model, slots=64, max_length=1024, compiled=False):
        self.model, self.slots, self.max_length = model.eval(), slots, max_length
        self.device, self.step, self.least = model.head.device, model.logits, 1
        self.cache = KVCache.empty(model.config, slots, max_length, model.head.dtype, self.device)
        self.prefilled = {}                         # prompts with samples left: (logits, layers)
        self.computed = 0                           # tokens that went through the model
        if compiled:
            self.step = compile_step(model)
            self.least = min(2, slots)              # a step of one row alone would be compiled anew
        elif self.device.type == "cpu":
            stand_upright(model)

    @torch.no_grad()
    def generate(self, prompts, steer=None, samples=1, max_new_tokens=None, stops=(), seed=0,
                 repeats=0, **chances):
        """Yield `samples` Rows for each prompt (a list of ids), in the order in which they finish.

        steer(row, token) sees each token that was drawn before it goes in, and returns the tokens
        that go in instead; those it returns beyond [token] count as forced, and go in one a step.
        A row ends with a token of `stops`, after max_new_tokens, where the cache is full, or when
        a run of 20 tokens has come `repeats` times (0: never mind). `chances` are those of
        `probabilities`; left out, the likeliest token is taken. What a row draws depends on the
        seed, its prompt and the number of the sample alone.
        BadInput where a prompt leaves no room for a single token.
        """
        prompts = list(prompts)
        for prompt in prompts:
            if not 0 < len(prompt) < self.max_length:
                raise BadInput(f"a prompt of {len(prompt)} tokens does not fit into "
                               f"{self.max_length}")
        waiting = deque(Row(index, prompt, sample, draws=random.Random(f"{seed} {prompt} {sample}"))
                        for index, prompt in enumerate(prompts) for sample in range(samples))
        rows, logits = [], self.model.head.new_empty(0, self.model.config.vocab_size)
        while waiting or rows:
            if new := [waiting.popleft() for _ in range(min(len(waiting), self.slots - len(rows)))]:
                logits = torch.cat([logits, self.prefill(rows, new, samples)])
            for row, token in zip(rows, self.draw(logits, rows, **chances)):
                self.take(row, token, steer)
                row.finish = self.ending(row, stops, max_new_tokens, repeats)
                if row.finish:
                    yield row
            self.retire(rows)
            logits = self.decode(rows) if rows else logits[:0]

    def ending(self, row, stops, max_new_tokens, repeats):
        """Why the row ends after its last token; None where it goes on."""
        if row.tokens[-1] in stops:
            return "stop"
        if len(row.tokens) == max_new_tokens:
            return "max_new_tokens"
        if len(row.prompt) + len(row.tokens) == self.max_length:
            return "length"                         # its places in the cache are full
        return "repetition" if repeats and row.repeats(repeats) else None

    def retire(self, rows):
        """Take out the finished rows; the last of the others moves into each gap."""
        for slot in reversed(range(len(rows))):
            if rows[slot].finish:
                last = rows.pop()
                if slot < len(rows):
                    rows[slot] = last
                    self.cache.move(len(rows), slot)

    def take(self, row, token, steer):
        """Put the next token at the row's end: a queued one, or what `steer` makes of the drawn."""
        if row.queue:
            row.tokens.append(row.queue.popleft())
            row.forced.append(True)
            return
        row.banned, before = set(), len(row.tokens)
        instead = list(steer(row, token)) if steer else [token]
        drawn_here = len(row.tokens) == before      # and not where some were withdrawn
        row.tokens.append(instead[0])
        row.forced.append(not drawn_here or instead[0] != token)
        row.queue.extend(instead[1:])

    def draw(self, logits, rows, temperature=0.0, **filters):
        """The token each slot would take next: logits (slots, V) to a list of ids."""
        for slot, row in enumerate(rows):
            if row.banned:
                logits[slot, list(row.banned)] = -torch.inf
        if temperature == 0:
            return logits.argmax(-1).tolist()
        # One number from 0 to 1 a row says where in its summed-up probabilities the draw falls.
        u = [row.draws.random() if not row.queue else 0.0 for row in rows]
        if logits.device.type == "mps":
            logits = logits.cpu()                   # there is no float64 there
        sums = probabilities(logits, temperature, **filters).cumsum(-1, dtype=torch.float64)
        places = torch.tensor(u, dtype=sums.dtype, device=sums.device)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, places, right=True)[:, 0].tolist()

    def prefill(self, rows, new, samples):
        """Give the new rows the slots after those of `rows`; the logits (n, V) after their prompts.
        The samples of a prompt come one after the other: the first reads it, the others copy it."""
        new.sort(key=lambda row: row.sample > 0)                    # the readers stand side by side
        readers, logits = [row for row in new if row.sample == 0], []
        longest = max((len(row.prompt) for row in readers), default=1)
        for start in range(0, len(readers), n := max(1, PREFILL // longest)):
            logits += self.read(len(rows) + start, readers[start:start + n])
        for slot, row in enumerate(new, len(rows)):
            self.cache.filled[slot] = len(row.prompt)               # also of what is copied
            places = [tensor[slot, :, :len(row.prompt)]
                      for tensor in itertools.chain(*self.cache.layers)]
            if row.sample > 0:
                after, kept = self.prefilled[row.index]
                logits.append(after)
                for place, old in zip(places, kept):
                    place.copy_(old)
            elif samples > 1:
                self.prefilled[row.index] = logits[slot - len(rows)], [p.clone() for p in places]
            if row.sample == samples - 1:
                self.prefilled.pop(row.index, None)
        rows += new
        return torch.stack(logits)

    def read(self, slot, rows):
        """Read the prompts of rows side by side, the first into `slot`. What is computed after the
        end of a shorter one lies in places that no token sees before they are written again."""
        cache = self.cache.rows(slot, slot + len(rows))
        cache.filled[:] = 0
        self.computed += sum(len(row.prompt) for row in rows)
        width = max(len(row.prompt) for row in rows)
        ids = torch.tensor([row.prompt + [0] * (width - len(row.prompt)) for row in rows])
        last = torch.tensor([len(row.prompt) - 1 for row in rows])
        x = self.model.hidden_states(ids.to(self.device), *cache.claim(width), cache.layers)
        return F.linear(x[torch.arange(len(rows)), last], self.model.head)     # (rows, V)

    def decode(self, rows):
        """Read the last token of every row; the logits (rows, V)."""
        cache = self.cache.rows(0, max(len(rows), self.least))
        idle = len(cache.filled) - len(rows)
        filled = [len(row.prompt) + len(row.tokens) - 1 for row in rows] + [0] * idle
        cache.filled[:] = torch.tensor(filled)
        self.computed += len(rows)
        ids = torch.tensor([[row.tokens[-1]] for row in rows] + [[0]] * idle, device=self.device)
        return self.step(ids, *cache.claim(1), cache.layers)[:len(rows), 0]


def compile_step(model):
    """`model.logits` in one piece by torch.compile, for any number of rows. On a CPU the weights
    are laid out anew, and it is tried which way to multiply is fastest."""
    if model.head.device.type == "cpu":
        from torch._inductor import config          # Dynamo does not see `options`
        config.freezing = config.max_autotune = True
        config.autotune_num_choices_displayed = 0
        config.max_autotune_report_choices_stats = False
    shapes.use_duck_shape = False                   # two sizes that agree once need not do so again
    return torch.compile(model.logits, dynamic=True)


def stand_upright(model):
    """Lay the columns of each wide matrix side by side in memory: the same numbers, but a product
    with one row, which only reads weights, is two to three times as fast by MKL."""
    for p in model.parameters():
        if p.dim() == 2 and p.shape[0] >= p.shape[1]:
            p.data = p.data.T.contiguous().T


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Of logits (B, V) the probabilities (B, V), 0 for what a filter leaves out: all but the top_k
    likeliest (0: none), what comes after the likeliest have top_p between them (nucleus sampling,
    Holtzman et al., 2020), what is less than min_p times as likely as the likeliest."""
    p = (logits.float() / temperature).softmax(-1)
    p[p < min_p * p.amax(-1, keepdim=True)] = 0
    if top_k or top_p < 1:
        ranked, order = torch.sort(p, dim=-1, descending=True, stable=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        ranked[:, top_k or len(p[0]):] = 0
        p.scatter_(-1, order, ranked)
    return p


# ---- Streaming ------------------------------------------------------------------------------


class Printer:
    """Writes a row as it comes: forced text dim and yellow, in [ and ] without colour."""

    def __init__(self, chat, colour):
        self.chat, self.written, self.pending, self.forced = chat, 0, [], False
        self.before, self.after = ("\033[2;33m", "\033[0m") if colour else ("[", "]")

    def write(self, tokens, forced):
        """A character may take several tokens: the first of them wait, while what follows is of the
        same kind."""
        if forced != self.forced:
            self.flush()
        self.pending, self.forced = self.pending + tokens, forced
        if not self.chat.decode(self.pending).endswith("\ufffd"):
            self.flush()

    def flush(self):
        text, self.pending = escape(self.chat.decode(self.pending)), []
        marked = f"{self.before}{text}{self.after}" if self.forced and text else text
        print(marked, end="", flush=True)

    def catch_up(self, row, end):
        """Write the row's tokens up to `end`, a stretch of sampled or forced ones at a time."""
        while self.written < end:
            start, forced = self.written, row.forced[self.written]
            while self.written < end and row.forced[self.written] == forced:
                self.written += 1
            self.write(row.tokens[start:self.written], forced)


def stream(sampler, chat, prompt, shown, steer=None, held=0, colour=None, **options):
    """Generate one row and print it as it comes; returns the row.

    `shown` is how many tokens at the prompt's end to print first, as forced: the opening delimiter.
    `held` is how many tokens `steer` may withdraw: they are held back.
    """
    printer = Printer(chat, sys.stdout.isatty() if colour is None else colour)

    def watch(row, token):
        instead = steer(row, token) if steer else [token]
        printer.catch_up(row, len(row.tokens) - held)
        return instead

    if shown:
        printer.write(prompt[-shown:], True)
    row, = sampler.generate([prompt], steer=watch, **options)
    printer.catch_up(row, len(row.tokens))
    printer.flush()
    print()
    return row


# ---- The program ----------------------------------------------------------------------------


def sampling_flags(add):
    """The flags of how tokens are drawn; `sampling` makes of them what `generate` takes."""
    add("--temperature", type=at_least(0, float), default=0.0, help="0 takes the likeliest token")
    add("--top-k", type=at_least(0), default=0, help="draw among the k likeliest; 0 is all")
    add("--top-p", type=at_least(0, float, 1), default=1.0,
        help="draw among the likeliest that have so much probability between them")
    add("--min-p", type=at_least(0, float, 1), default=0.0,
        help="draw among those at least this share as likely as the likeliest")
    add("--repeats", type=at_least(0), default=0,
        help="end a row in which 20 tokens came again this many times; 0 lets it")
    add("--seed", type=int, default=0, help="of the draws, and of how options are shuffled")
    add("--compile", action="store_true",
        help="decode by torch.compile: a minute to begin with, then faster")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu, mps")


def sampling(args):
    return {name: getattr(args, name)
            for name in ("temperature", "top_k", "top_p", "min_p", "seed")}


def load(name, args):
    """Model and chat by directory or hub id, in bf16 on CUDA and float32 elsewhere."""
    directory = local(name)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = Transformer.load(directory, dtype, args.device)
    chat = Chat(directory, args.chat, args.thinking)
    chat.refuse_more_than(model.config.vocab_size)
    return model, chat


def ask_all(model, chat, args):
    """Answer a file of questions, `--slots` at a time: rows as `data.py teacher` writes them, each
    as it finishes. What the file of traces already holds is not asked."""
    settings = {**sampling(args), "repeats": args.repeats, "max_new_tokens": args.max_new_tokens}
    asked = [args.model, chat.format, settings, args.direct]
    jobs = {row_key(question["question"], *asked): question
            for question in load_questions(args.questions, args.seed, graded=False)}
    file, done = open_traces(args.out)
    keys = [key for key in jobs if key not in done]
    prompts = [chat.prompt(jobs[key]["question"], thinking=not args.direct) for key in keys]
    length = min(max(map(len, prompts), default=0) + args.max_new_tokens,
                 model.config.max_position_embeddings)

    def begin(row, token):
        row.memory = row.memory or time.monotonic()
        return [token]
    sampler = Sampler(model, args.slots, length, args.compile)
    rows = sampler.generate(prompts, begin, stops=chat.stops, **settings)
    for row in tqdm(rows, total=len(prompts), unit="row", disable=None):
        key = keys[row.index]
        text = chat.decode(row.tokens[:-1] if row.finish == "stop" else row.tokens)
        thinking, _, answer = (("", "", text) if args.direct
                               else text.partition(chat.closing.rstrip("\n")))
        write_row(file, trace_row(
            jobs[key], thinking, answer, model=args.model, finish=row.finish, usage={
                "prompt_tokens": len(row.prompt), "completion_tokens": len(row.tokens)},
            seconds=round(time.monotonic() - row.memory, 3), sample=0, key=key))
    print(f"{args.out}: {len(done) + len(keys)} rows")


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("question", nargs="?", help="what to ask")
    add("--questions", help="a file of questions to answer instead, into --out")
    add("--out", help="file the traces are appended to; what is in it is not asked")
    add("--slots", type=at_least(1), default=16, help="rows side by side, for --questions")
    model_flags(add, default="out/student")
    add("--direct", action="store_true", help="answer at once: do not open the thinking")
    add("--max-new-tokens", type=at_least(1), default=1024, help="tokens of an answer at most")
    sampling_flags(add)
    args = parser.parse_args()
    with complaints(BadModel):
        if bool(args.question) == bool(args.questions) or bool(args.questions) != bool(args.out):
            raise BadInput("either a question, or --questions with --out")
        model, chat = load(args.model, args)
        if args.questions:
            return ask_all(model, chat, args)
        prompt = chat.prompt(args.question, thinking=not args.direct)
        length = min(len(prompt) + args.max_new_tokens, model.config.max_position_embeddings)
        sampler = Sampler(model, 1, length, args.compile)
        row = stream(sampler, chat, prompt, 0 if args.direct else len(chat.think),
                     stops=chat.stops, repeats=args.repeats, **sampling(args))
        if row.finish != "stop":
            print(f"(stopped after {len(row.tokens)} tokens: {row.finish})", file=sys.stderr)


if __name__ == "__main__":
    main()
