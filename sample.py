"""Turn prompts into tokens: many rows at once, each free to be steered.

In:   a model, and prompts as lists of token ids.
Out:  rows as they finish: their tokens, which of them were forced, and why they ended.

The engine in one sentence: admit waiting prompts into free slots, let `steer` look at the token
each row would take, retire the finished rows, decode one token for every slot.

    slot 0  prompt a a a a a a . prompt d d d d d          . = finished, the next prompt moves in
    slot 1  prompt b b . prompt c c c c c c c c

It streams one answer to a terminal: python sample.py "Use 3, 5 and 2 with + - * to make 16."
"""
import sys
import zlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from data import BadInput, Chat, Parser, at_least, complaints, escape, local, model_flags
from model import BadModel, KVCache, Transformer


@dataclass
class Row:
    """One prompt on its way. A `steer` may keep what it likes in `memory`, and put token ids that
    the next draw must not give into `banned`."""
    index: int
    prompt: list
    tokens: list = field(default_factory=list)      # what went in behind the prompt
    forced: list = field(default_factory=list)      # for each token: did we put it in?
    finish: str | None = None                       # "stop", "max_new_tokens" or "length"
    banned: set = field(default_factory=set)
    memory: Any = None
    queue: deque = field(default_factory=deque)     # forced tokens that still have to go in
    generator: torch.Generator | None = None


class Sampler:
    """`slots` rows side by side, each of at most `max_length` tokens with its prompt.

    sampler = Sampler(model, slots=2, max_length=64)
    for row in sampler.generate([[5, 6], [7]], stops={0}): row.index, row.tokens, row.finish
    """

    def __init__(self, model, slots=64, max_length=1024):
        self.model, self.slots, self.max_length = model.eval(), slots, max_length
        weight = model.model.embed_tokens.weight
        self.device = weight.device
        self.cache = KVCache.empty(model.config, slots, max_length, weight.dtype, weight.device)
        self.computed = 0                           # tokens that went through the model

    def generate(self, prompts, steer=None, max_new_tokens=None, temperature=0.0, seed=0, stops=()):
        """Yield a Row for each prompt (a list of ids), in the order in which they finish.

        steer(row, token) sees each token that was drawn before it goes in, and returns the tokens
        that go in instead; those it returns beyond [token] count as forced, and go in one a step.
        temperature 0 is greedy; the draws of a row depend on `seed` and its index alone.
        BadInput where a prompt leaves no room for a single token.
        """
        prompts = list(prompts)
        for prompt in prompts:
            if not 0 < len(prompt) < self.max_length:
                raise BadInput(f"a prompt of {len(prompt)} tokens does not fit into "
                               f"{self.max_length}")
        waiting = deque(Row(index, prompt) for index, prompt in enumerate(prompts))
        rows = [None] * self.slots
        logits = torch.zeros(self.slots, self.model.config.vocab_size, device=self.device)
        while True:
            for slot in range(self.slots):
                if rows[slot] is None and waiting:
                    row = rows[slot] = waiting.popleft()
                    key = zlib.crc32(f"{seed} {row.index}".encode())
                    row.generator = torch.Generator().manual_seed(key)
                    logits[slot] = self.prefill(slot, row.prompt)
            if not any(rows):
                return
            for slot, token in enumerate(self.draw(logits, rows, temperature)):
                row = rows[slot]
                if row is None:
                    continue
                self.take(row, token, steer)
                if row.tokens[-1] in stops:
                    row.finish = "stop"
                elif len(row.tokens) == max_new_tokens:
                    row.finish = "max_new_tokens"
                elif len(row.prompt) + len(row.tokens) == self.max_length:
                    row.finish = "length"
                if row.finish:
                    rows[slot] = None
                    yield row
            if any(rows):
                logits = self.decode(rows)

    def take(self, row, token, steer):
        """Put the next token behind the row: a queued one, or what `steer` makes of the drawn."""
        if row.queue:
            row.tokens.append(row.queue.popleft())
            row.forced.append(True)
            return
        row.banned = set()
        instead = list(steer(row, token)) if steer else [token]
        row.tokens.append(instead[0])
        row.forced.append(instead[0] != token)
        row.queue.extend(instead[1:])

    def draw(self, logits, rows, temperature):
        """The token each slot would take next: logits (slots, V) to a list of ids."""
        for slot, row in enumerate(rows):
            if row and row.banned:
                logits[slot, list(row.banned)] = -torch.inf
        tokens = logits.argmax(-1).tolist()
        if temperature > 0:
            chances = (logits.float() / temperature).softmax(-1).cpu()
            for slot, row in enumerate(rows):
                if row and not row.queue:
                    token = torch.multinomial(chances[slot], 1, generator=row.generator)
                    tokens[slot] = token.item()
        return tokens

    @torch.no_grad()
    def prefill(self, slot, prompt):
        """Read a whole prompt into a slot; the logits (V,) behind its last token."""
        self.cache.filled[slot] = 0
        self.computed += len(prompt)
        ids = torch.tensor([prompt], device=self.device)
        return self.model(ids, cache=self.cache.slot(slot))[0, -1]

    @torch.no_grad()
    def decode(self, rows):
        """Read the last token of every row; the logits (slots, V). Free slots idle at place 0."""
        for slot, row in enumerate(rows):
            if row is None:
                self.cache.filled[slot] = 0
        self.computed += sum(row is not None for row in rows)
        ids = torch.tensor([[row.tokens[-1] if row else 0] for row in rows], device=self.device)
        return self.model(ids, cache=self.cache)[:, 0]


# ---- Streaming to a terminal ----------------------------------------------------------------


def stream(sampler, chat, prompt, shown, steer=None, colour=None, **options):
    """Generate one row and print it as it comes: forced text dim and yellow, [so] without colour.

    `shown` is how many tokens at the prompt's end to print first, as forced: the opening delimiter.
    """
    colour = sys.stdout.isatty() if colour is None else colour
    before, after = ("\033[2;33m", "\033[0m") if colour else ("[", "]")

    pending = []                                    # a character may take several tokens

    def write(tokens, forced, last=False):
        pending.extend(tokens)
        text = chat.decode(pending)
        if text.endswith("\ufffd") and not last:
            return
        pending.clear()
        text = escape(text)
        print(f"{before}{text}{after}" if forced and text else text, end="", flush=True)

    def watch(row, token):
        instead = steer(row, token) if steer else [token]
        sampled = instead[:1] == [token]
        if sampled:
            write([token], False, last=len(instead) > 1)
        if instead[sampled:]:
            write([], False, last=True)
            write(instead[sampled:], True, last=True)
        return instead

    if shown:
        write(prompt[-shown:], True, last=True)
    row, = sampler.generate([prompt], steer=watch, **options)
    print()
    return row


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("question", help="what to ask")
    model_flags(add, default="out/student")
    add("--direct", action="store_true", help="answer at once: do not open the thinking")
    add("--max-new-tokens", type=at_least(1), default=1024, help="stop after so many tokens")
    add("--temperature", type=at_least(0, float), default=0.0, help="0 takes the likeliest token")
    add("--seed", type=int, default=0, help="of the draws")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu, mps")
    args = parser.parse_args()
    with complaints(BadModel):
        model, chat = load(args.model, args)
        prompt = chat.prompt(args.question, thinking=not args.direct)
        length = min(len(prompt) + args.max_new_tokens, model.config.max_position_embeddings)
        row = stream(Sampler(model, 1, length), chat, prompt, 0 if args.direct else len(chat.think),
                     stops=chat.stops, temperature=args.temperature, seed=args.seed)
        if row.finish != "stop":
            print(f"(stopped after {len(row.tokens)} tokens)", file=sys.stderr)


def load(name, args):
    """Model and chat by directory or hub id, in bf16 on CUDA and float32 elsewhere."""
    directory = local(name)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = Transformer.load(directory, dtype, args.device)
    return model, Chat(directory, args.chat, args.thinking)


if __name__ == "__main__":
    main()
