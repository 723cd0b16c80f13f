"""Chat text, the loss mask, and packing: from traces to what `Transformer.forward` takes.

    (question, thinking, answer) --Chat.example--> (ids, prompt_length) --pack_sequences--> rows
    row --collate--> ids, positions, lengths, labels

python data.py show [FILE]    prints training examples as the model sees them
python data.py stats FILE     prints how long the examples of a file are
"""
import json
import math
import random
import re
import shutil
import sys
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2.sandbox
import tokenizers
import torch

from recipe import cli

Example = tuple[list[int], int]         # token ids, and how many at the start are not supervised

# ---- Chat text ------------------------------------------------------------------------------

# What opens and closes thinking. s1's (section 4.1) add nothing to the vocabulary: `<|im_start|>`
# is a token already, `think` and `answer` are plain text after it.
DELIMITERS = {"s1": ("<|im_start|>think\n", "<|im_start|>answer\n"),
              "think": ("<think>\n", "</think>\n\n")}
CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n"       # without a template
          "{{ message.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# Placeholders for the texts while a template is rendered: Unicode noncharacters. Where a template
# strips a text (Llama 3), it takes the gap beside the placeholder away.
SYSTEM, QUESTION, ANSWER, GAP = "\ufdd0", "\ufdd1", "\ufdd2", "\x1f"


class Chat:
    r"""The tokenizer and the chat template of a model directory.

    A training example with Qwen2.5's template and s1's delimiters:

        <|im_start|>system\n{system}<|im_end|>\n
        <|im_start|>user\n{question}<|im_end|>\n
        <|im_start|>assistant\n
        <|im_start|>think\n{thinking}\n<|im_start|>answer\n{answer}<|im_end|>\n
        `------------------------- supervised -----------------------------------'

    `system` None takes the template's own system prompt. `thinking` is a key of DELIMITERS; None
    takes what the model was trained with here (chat.json), else what suits its tokenizer.
    """

    def __init__(self, directory: str | Path, system: str | None = None,
                 thinking: str | None = None):
        self.directory = Path(directory)
        self.tokenizer, self.plain_tokenizer, self.control_ids = load_tokenizer(self.directory)
        controls = sorted(self.control_ids, key=len, reverse=True)
        self.control_pattern = re.compile(f"({'|'.join(map(re.escape, controls))})")
        self.template, special_tokens = load_template(self.directory, self.control_ids)
        saved = read_object(self.directory / "chat.json")
        self.system = saved.get("system") if system is None else system
        is_chatml = "<|im_start|>" in self.control_ids and "</think>" not in self.template
        style = thinking or saved.get("thinking") or ("s1" if is_chatml else "think")
        if style not in list(DELIMITERS) or not isinstance(self.system, str | None):
            raise ValueError(f"{self.directory}/chat.json: unknown thinking {style!r} or system "
                             f"prompt {self.system!r}")
        self.settings = {"thinking": style, "system": self.system}
        self.opening, self.closing = DELIMITERS[style]
        self.prompt_text, self.end_text = self.render_template(special_tokens)
        self.opening_ids = self.encode_template(self.opening)
        self.closing_ids = self.encode_template(self.closing)

        self.end_id = self.encode_template(self.end_text)[0]
        self.stop_ids, vocab_size = {self.end_id}, self.tokenizer.get_vocab_size()
        for name in ("config.json", "generation_config.json"):
            config = read_object(self.directory / name)
            named = config.get("eos_token_id")
            self.stop_ids |= {i for i in (named if isinstance(named, list) else [named])
                              if type(i) is int and 0 <= i < vocab_size}
            if isinstance(size := config.get("vocab_size"), int) and size < vocab_size:
                raise ValueError(f"{self.directory}: the tokenizer has {vocab_size} tokens, "
                                 f"and the model has {size}")
        # What ends the thinking: a control token when it is sampled, or the delimiter as text.
        control = set(self.closing_ids[:1]) & set(self.control_ids.values())
        self.end_ids = self.stop_ids | control
        self.closing_text = "" if control else self.closing.rstrip("\n")
        # s1's delimiters begin like a turn, which an answer must not.
        self.turn_ids = control & set(self.opening_ids[:1])

    def render_template(self, special_tokens: dict) -> tuple[str, str]:
        """The text up to the assistant's turn and the text after it, by the rules of transformers,
        except that no date is given: a prompt is the same every day."""
        sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        messages = [{"role": "system", "content": GAP + SYSTEM + GAP}] * (self.system is not None)
        messages += [{"role": "user", "content": GAP + QUESTION + GAP}]
        reply = {"role": "assistant", "content": ANSWER}
        try:
            render = sandbox.from_string(self.template).render
            head = render(messages=messages, add_generation_prompt=True, **special_tokens)
            turn = render(messages=[*messages, reply], **special_tokens)
        except Exception as error:              # a template can raise anything
            raise ValueError(f"{self.directory}: the chat template fails: {error}") from None
        _, _, tail = turn.rpartition(ANSWER)
        if any(message["content"].strip() not in head for message in messages):
            raise ValueError(f"{self.directory}: the chat template drops a message")
        if not tail.startswith(tuple(self.control_ids)):
            raise ValueError(f"{self.directory}: the chat template ends an answer without a token")
        return head.removesuffix(self.opening), tail        # some templates open the thinking

    def encode_template(self, text: str, question: str = "") -> list[int]:
        """Token ids of template text: control tokens by their names, everything else as text."""
        def fill(place):
            value = question if place[2] == QUESTION else self.system or ""
            value = value if place[1] else value.lstrip()
            return value if place[3] else value.rstrip()

        ids = []
        for part in self.control_pattern.split(text):
            filled = re.sub(f"({GAP}?)([{SYSTEM}{QUESTION}])({GAP}?)", fill, part)
            ids += [self.control_ids[part]] if part in self.control_ids else self.encode(filled)
        return ids

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; `<|im_end|>` in it does not become the control token."""
        return self.plain_tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def prompt(self, question: str, thinking: bool = True) -> list[int]:
        """Token ids up to the first token of the thinking, or without thinking of the answer."""
        opening = self.opening
        if not thinking:
            # A model with a `<think>` token answers at once after an empty thought.
            has_token = self.opening.strip() in self.control_ids
            opening = f"{self.opening}\n{self.closing}" if has_token else ""
        return self.encode_template(self.prompt_text, question) + self.encode_template(opening)

    def example(self, question: str, thinking: str | None, answer: str) -> Example:
        """A training example; thinking None trains a direct answer."""
        answer = answer.strip() if "Answer:" in answer else f"Answer: {answer.strip()}"
        reply = self.encode(answer) + self.encode_template(self.end_text)
        if thinking is None:
            prompt = self.prompt(question, thinking=False)
        else:
            prompt = self.encode_template(self.prompt_text, question)
            closed = self.encode_template(f"{QUESTION}\n{self.closing}", thinking.strip())
            reply = self.opening_ids + closed + reply
        return prompt + reply, len(prompt)

    def save(self, directory: Path) -> None:
        """Copy the tokenizer's files; write the template, the stop tokens and chat.json."""
        for pattern in ("*token*.json", "vocab.json", "merges.txt"):
            for path in self.directory.glob(pattern):
                shutil.copy(path, directory)
        Path(directory, "chat_template.jinja").write_text(self.template, encoding="utf-8")
        generation = read_object(self.directory / "generation_config.json")
        generation["eos_token_id"] = sorted(self.stop_ids)
        for name, value in (("generation_config.json", generation), ("chat.json", self.settings)):
            Path(directory, name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(directory: Path) -> tuple[Any, Any, dict[str, int]]:
    """The tokenizer, the same without its added tokens, and the added tokens as {text: id}."""
    try:
        text = (directory / "tokenizer.json").read_text(encoding="utf-8")
        tokenizer, raw = tokenizers.Tokenizer.from_str(text), json.loads(text)
        control = {token["content"]: tokenizer.token_to_id(token["content"])
                   for token in raw["added_tokens"] if token["content"]}
        plain = tokenizers.Tokenizer.from_str(json.dumps({**raw, "added_tokens": []}))
        plain.no_truncation()
        plain.no_padding()
    except KeyboardInterrupt:
        raise
    except BaseException as error:              # a panic in Rust is not an Exception
        raise ValueError(f"{directory}/tokenizer.json cannot be read: {error}") from None
    return tokenizer, plain, control


def load_template(directory: Path, control: dict[str, int]) -> tuple[str, dict[str, str]]:
    """The chat template of a model directory, and the special tokens that it may name."""
    config = read_object(directory / "tokenizer_config.json")
    template = config.get("chat_template")
    if isinstance(template, list):              # several, by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    if (path := directory / "chat_template.jinja").is_file():
        template = path.read_text(encoding="utf-8")
    if template is None and {"<|im_start|>", "<|im_end|>"} <= control.keys():
        template = CHATML
    if not isinstance(template, str):
        raise ValueError(f"{directory} has no chat template (chat_template.jinja)")
    tokens = {name: token.get("content") if isinstance(token, dict) else token
              for name, token in config.items() if name.endswith("_token")}
    return template, tokens


def read_object(path: Path) -> dict:
    """The object in a JSON file; {} where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


# ---- Loss mask and packing ------------------------------------------------------------------


def shift_labels(ids: list[int], prompt_length: int) -> list[int]:
    """The loss mask: the token to predict at each position, -100 where none is supervised.

    ids [5, 6, 7, 8] with prompt_length 2: [-100, 7, 8, -100]. prompt_length is at least 1.
    """
    return [-100] * (prompt_length - 1) + ids[prompt_length:] + [-100]


def count_tokens(examples: list[Example]) -> int:
    return sum(len(ids) for ids, _ in examples)


def best_fit(examples: list[Example], capacity: int) -> list[list[Example]]:
    """Rows of at most `capacity` tokens: the longest example first, each into the fullest row
    that still has space for it. A longer example gets a row of its own."""
    rows = []                                   # each: [number of tokens, example, example, ...]
    for example in sorted(examples, key=lambda example: -len(example[0])):
        fits = [row for row in rows if row[0] + len(example[0]) <= capacity]
        row = max(fits, key=lambda row: row[0], default=None)
        if row is None:
            rows.append(row := [0])
        row[0] += len(example[0])
        row.append(example)
    return [row for _, *row in rows]


def pack_sequences(examples: list[Example], max_tokens: int, num_processes: int = 1) -> list:
    """Rows of examples with at most `max_tokens` tokens each, packed by best fit.

    Several processes compute one row each and wait for the longest. Their rows are as short as the
    number of rounds allows, and rows of similar length share a round.
    """
    rows = best_fit(examples, max_tokens)
    if num_processes > 1:
        num_rows = math.ceil(len(rows) / num_processes) * num_processes
        # A binary search for a small capacity that needs no more rows than that.
        capacities = range(math.ceil(count_tokens(examples) / num_rows), max_tokens)
        i = bisect_left(capacities, True, key=lambda n: len(best_fit(examples, n)) <= num_rows)
        rows = best_fit(examples, capacities.start + i)
        rows.sort(key=count_tokens, reverse=True)
    return rows


def collate(row: list[Example]) -> dict[str, Any]:
    """A row as `forward` takes it: ids, positions and labels (1, T), and the documents' lengths.

        ids        a a a a b b b c c
        positions  0 1 2 3 0 1 2 0 1
        lengths    4, 3, 2
    """
    lengths = [len(ids) for ids, _ in row]
    return {"ids": torch.tensor([[i for ids, _ in row for i in ids]]),
            "positions": torch.cat([torch.arange(n) for n in lengths])[None],
            "lengths": lengths,
            "labels": torch.tensor([[i for example in row for i in shift_labels(*example)]])}


def epoch_batches(examples: list, batch_size: int, seed: int, epoch: int) -> Iterator[list]:
    """The batches of an epoch; their order is a function of (seed, epoch)."""
    order = list(range(len(examples)))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    for start in range(0, len(order), batch_size):
        yield [examples[i] for i in order[start:start + batch_size]]


# ---- Command line ---------------------------------------------------------------------------


def add_model_arguments(add, **options) -> None:
    add("--model", help="directory or hub id (owner/name, owner/name@revision)", **options)
    add("--system", help="system prompt; the chat template's own by default")
    add("--thinking", choices=DELIMITERS, help="delimiters; those of the model by default")


def main() -> None:
    from recipe import countdown, rows

    parser = cli.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("command", choices=("show", "stats"))
    add("data", nargs="?", default="countdown", help="countdown, or traces: a file or hub dataset")
    add_model_arguments(add, default="assets/countdown-base")
    rows.add_trace_arguments(add)
    add("--n", type=cli.at_least(1), default=1, help="how many examples to show")
    args = parser.parse_args()
    with cli.exit_on_user_error(args.debug):
        chat = Chat(cli.resolve_model(args.model, weights=False), args.system, args.thinking)
        traces = (countdown.traces(1000, seed=0) if args.data == "countdown" else
                  rows.load_traces(args.data, args.split, args.teacher, args.columns))
        examples = [chat.example(*trace) for trace in traces]
        if args.command == "stats":
            lengths = sorted(len(ids) for ids, _ in examples)
            print(f"{len(lengths):,} examples, {sum(lengths):,} tokens: "
                  f"median {lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,}")
            return
        # What is supervised is green in a terminal, and in brackets elsewhere.
        before, after = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
        for ids, length in examples[:args.n]:
            prompt, reply = (cli.escape(chat.decode(part)) for part in (ids[:length], ids[length:]))
            print(f"{prompt}{before}{reply}{after}")


if __name__ == "__main__":
    main()
