"""Text to tokens: questions, traces, answers and batches; it knows no model.

In:   files of questions and traces, or the built-in Countdown task with its teacher.
Out:  training examples as token ids, packed batches, and verdicts on answers.

Map:  Complaints        one clear line for bad input
      Chat              a family's chat text and its delimiters of thinking, as tokens
      Files             rows of questions and of traces, as others name them
      Countdown         the tiny task: questions, and a teacher that thinks in text
      Answers           find the answer in a text, say whether it is right
      Asking a teacher  questions to any chat endpoint, traces back, each line kept
      Choosing          from many traces to a thousand: s1's stages, and the paper's ablations
      Packing           the loss mask, examples in rows of tokens, the order of an epoch
      Commands          python data.py show | stats | countdown | teacher | select
"""
import argparse
import cmath
import contextlib
import email.utils
import hashlib
import http.client
import ipaddress
import itertools
import json
import math
import multiprocessing
import operator
import os
import random
import re
import shutil
import socket
import sys
import threading
import time
import typing
import urllib.parse
import zlib
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
import tokenizers
from tqdm import tqdm

# ---- Complaints -----------------------------------------------------------------------------


class BadInput(ValueError):
    """Something the user gave that cannot be used; the message is one line for a person."""


@contextlib.contextmanager
def complaints(*kinds):
    """BadInput, OSError and `kinds` become one line on standard error, exit code 2; Ctrl-C 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                     # `... | head` closed the pipe: not our trouble
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (BadInput, OSError, *kinds) as error:
        print("error:", escape(str(error)).replace("\n", " "), file=sys.stderr)
        sys.exit(2)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in --help, but none where there is nothing to say."""

    def _get_help_string(self, action):
        nothing = action.default is None or action.default is False
        return action.help if nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with the defaults in --help, and one line for a bad flag too."""

    def __init__(self, **options):
        super().__init__(formatter_class=Help, **options)

    def error(self, message):
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


def at_least(lowest, kind=int, highest=math.inf):
    """The type of a flag that takes a number from `lowest` to `highest`."""
    def number(text):
        if not lowest <= kind(text) <= highest:
            above = f" and at most {highest}" if highest < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {lowest}{above}")
        return kind(text)
    return number


# ---- Chat -----------------------------------------------------------------------------------

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class Family(typing.NamedTuple):
    """How a family of models writes a conversation. `<|...|>` and the like are control tokens."""
    sign: set                   # its control tokens, by which its tokenizer is recognised
    head: str                   # up to where the assistant's turn begins
    tail: str                   # the end of that turn
    thinking: str               # its delimiters of thinking
    direct: str = ""            # opens a turn without thinking, where it is not simply left out


# In the order in which they are looked for.
FORMATS = {
    "deepseek-r1": Family({"<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>",
                           "<｜end▁of▁sentence｜>"},
                          "<｜begin▁of▁sentence｜><｜User｜>{question}<｜Assistant｜>",
                          "<｜end▁of▁sentence｜>", "think", "<think>\n\n</think>\n\n"),
    "llama3": Family({"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                      "<|begin_of_text|>"},
                     "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{question}"
                     "<|eot_id|>"
                     "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", "think"),
    "qwen3": Family({"<|im_start|>", "<|im_end|>", "<think>"},
                    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
                    "<|im_end|>\n", "think", "<think>\n\n</think>\n\n"),
    "qwen2.5": Family({"<|im_start|>", "<|im_end|>"},
                      f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
                      "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
                      "<|im_end|>\n", "s1"),
}

# What opens the thinking and what closes it, at the beginning of a line. s1's (section 4.1 and its
# code) are no new tokens: `<|im_start|>` is one, `think` and `answer` are plain text after it.
THINKING_STYLES = {"s1": ("<|im_start|>think\n", "<|im_start|>answer\n"),
                   "think": ("<think>\n", "</think>\n\n")}


class Chat:
    r"""The tokenizer of a model directory, and the text of a conversation as tokens.

    One training example of the family qwen2.5 with s1's delimiters:

        <|im_start|>system\n{SYSTEM}<|im_end|>\n
        <|im_start|>user\n{question}<|im_end|>\n
        <|im_start|>assistant\n
        <|im_start|>think\n{thinking}\n<|im_start|>answer\n{answer}<|im_end|>\n
        `------------------------- supervised -----------------------------------'

    Templates of a downloaded model are never executed: the families are written out above. Nor does
    text from outside ever become a control token, whatever it contains.
    """

    def __init__(self, directory, family=None, thinking=None):
        """`family` and `thinking` are keys of FORMATS and THINKING_STYLES; left out, they are what
        the directory's chat.json says, else what the tokenizer shows."""
        self.directory = Path(directory)
        self.path = self.directory / "tokenizer.json"
        try:
            text = self.path.read_text(encoding="utf-8")
            self.tokenizer = tokenizers.Tokenizer.from_str(text)
            raw = json.loads(text)
            # Under the ids that the library gives them, whatever the file says; without what would
            # tear the {names} in our templates apart.
            self.control = {token["content"]: self.tokenizer.token_to_id(token["content"])
                            for token in raw["added_tokens"]
                            if token["content"] and not set("{}") & set(token["content"])}
            # The same without the added tokens, special or not, reads text as nothing but text.
            self.plain = tokenizers.Tokenizer.from_str(json.dumps({**raw, "added_tokens": []}))
            self.plain.no_truncation()
            self.plain.no_padding()
        except KeyboardInterrupt:
            raise
        except BaseException as error:          # nothing narrower: a panic in Rust is no Exception
            raise BadInput(f"{self.path} cannot be read as a tokenizer: {error}") from None
        said = read_object(self.directory / "chat.json")
        name = family or said.get("family") or next(
            (name for name, family in FORMATS.items() if family.sign <= self.control.keys()), None)
        known = isinstance(name, str) and name in FORMATS
        if not known or not FORMATS[name].sign <= self.control.keys():
            asked = name or "a known chat format"
            raise BadInput(f"{self.path}: its tokens are not those of {asked} "
                           f"(known: {', '.join(FORMATS)}; --chat chooses)")
        self.family = FORMATS[name]
        style = thinking or said.get("thinking") or self.family.thinking
        if not isinstance(style, str) or style not in THINKING_STYLES:
            raise BadInput(f"{self.directory / 'chat.json'}: thinking {style!r} is not known "
                           f"(known: {', '.join(THINKING_STYLES)})")
        self.format = {"family": name, "thinking": style}
        self.opening, self.closing = THINKING_STYLES[style]
        self.think, self.answer = self.render(self.opening), self.render(self.closing)
        self.end = self.render(self.family.tail)[0]
        self.stops = {self.end}
        for name in ("config.json", "generation_config.json"):
            self.stops |= {n for n in listed(read_object(self.directory / name).get("eos_token_id"))
                           if 0 <= n < 2**31 and self.tokenizer.id_to_token(n) is not None}
        # Drawn while thinking, these tuples want to end it. A closing of plain text may have any
        # of its newlines in its last token.
        closing = self.closing.rstrip("\n")
        closings = [self.answer[:1]] if self.answer[0] in self.control.values() else [
            self.render(closing + "\n" * n) for n in range(3)]
        self.ends = {(stop,) for stop in self.stops} | {tuple(end) for end in closings}

    def refuse_more_than(self, vocab_size):
        """BadInput where the tokenizer has more tokens than its model."""
        if (size := self.tokenizer.get_vocab_size()) > vocab_size:
            raise BadInput(f"{self.path} has {size} tokens, and the model {vocab_size}")

    def text(self, text):
        """Token ids of plain text; `<|im_end|>` written in it is eight ordinary tokens or so."""
        return self.plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def render(self, template, **texts):
        """Token ids of a template of ours: control tokens by name, {names} filled in as text."""
        ids = []
        controls = "|".join(map(re.escape, sorted(self.control, key=len, reverse=True)))
        for part in re.split(rf"(\{{\w+\}}|{controls})", template):
            ids += [self.control[part]] if part in self.control else self.text(part.format(**texts))
        return ids

    def prompt(self, question, thinking=True):
        """Ids up to where the model goes on: after the opened thinking, or where it answers."""
        opened = self.think if thinking else self.render(self.family.direct)
        return self.render(self.family.head, question=question) + opened

    def example(self, question, thinking, answer):
        """One training example: its ids, and the index of the first supervised one."""
        answer = answer.strip()
        if "Answer:" not in answer:
            answer = f"Answer: {answer}"
        if thinking is None:                    # a direct answer: the assistant's turn is all of it
            ids = self.prompt(question, thinking=False)
            return ids + self.render("{answer}" + self.family.tail, answer=answer), len(ids)
        ids = self.render(self.family.head, question=question)
        reply = f"{self.opening}{{thinking}}\n{self.closing}{{answer}}{self.family.tail}"
        return ids + self.render(reply, thinking=thinking.strip(), answer=answer), len(ids)

    def save(self, directory):
        """The tokenizer's files as they came, the stop tokens, and the format in chat.json."""
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                     "vocab.json", "merges.txt", "added_tokens.json", "chat_template.json",
                     "chat_template.jinja"):
            if (self.directory / name).is_file():
                shutil.copy(self.directory / name, directory)
        generation = read_object(self.directory / "generation_config.json")
        generation["eos_token_id"] = sorted(self.stops)
        for name, what in (("generation_config.json", generation),
                           ("chat.json", self.format)):
            Path(directory, name).write_text(json.dumps(what, indent=2) + "\n", encoding="utf-8")


def read_object(path):
    """The object in a JSON file, {} where there is no file; else BadInput."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} holds no object")
    return found


def listed(value):
    """eos_token_id as it is met: a number, a list of them, or nothing."""
    return {n for n in (value if isinstance(value, list) else [value]) if type(n) is int}


def model_flags(add, **options):
    """The flags by which programs name a model: a directory or hub id, and its chat format."""
    add("--model", help="directory or hub id (owner/name, owner/name@revision)", **options)
    add("--chat", choices=FORMATS, help="chat format (default: what the tokenizer shows)")
    add("--thinking", choices=THINKING_STYLES, help="its delimiters (default: the format's own)")


def local(name, weights=True):
    """The directory of a model. A hub id is fetched with huggingface_hub, safetensors and text
    only, or taken from its cache; whatever begins like a path here is a path."""
    return fetched(name, ["*.safetensors"] * weights + ["*.json", "*.jinja", "*.txt"])


def fetched(name, patterns, kind="model"):
    """The path itself, or the directory into which a hub id's files of these patterns come."""
    owner = Path(name).parts[:1]
    hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", name)
    if not hub_id or owner == ("out",) or Path(*owner).exists() or Path(name).suffix in ROWS:
        return name
    import huggingface_hub                      # slow to import, and not needed for a directory
    repository, _, revision = name.partition("@")
    try:
        return huggingface_hub.snapshot_download(repository, revision=revision or None,
                                                 repo_type=kind, allow_patterns=patterns)
    except Exception as error:                  # of a dozen kinds, its HTTP library's among them
        raise BadInput(f"{name} is no directory, and not to be had from the hub: "
                       f"{' '.join(str(error).split())[:200]}") from None


# ---- Files ----------------------------------------------------------------------------------

# The names under which questions, thinking and answers are met, the first that is there counts;
# {teacher} is one of s1K-1.1's two.
QUESTION = ("question", "problem", "Question")
THINKING = ("thinking", "message_thinking", "thinking_trajectories",
            "{teacher}_thinking_trajectory")
ANSWER = ("attempt", "{teacher}_attempt", "answer", "message_content")
TEACHERS = ("deepseek", "gemini")
REFERENCE = ("gtruth_answer", "answer", "Correct Answer", "solution")
ROWS = (".jsonl", ".json", ".parquet")          # how files of rows end


def read_rows(name):
    """Objects of a JSONL file, a JSON list, a parquet file, or all such files of a hub dataset, as
    (place, object); BadInput names the place of what is none."""
    path = Path(fetched(str(name), [f"*{end}" for end in ROWS], "dataset"))
    if path.is_dir():
        paths = sorted(file for file in path.rglob("*")
                       if file.suffix in ROWS and file.name != "dataset_infos.json")
        rows = [row for file in paths for row in read_rows(file)]
    else:
        rows = read_parquet(path) if path.suffix == ".parquet" else read_json(path)
    if not rows:
        raise BadInput(f"{path} is empty")
    for place, row in rows:
        if not isinstance(row, dict):
            raise BadInput(f"{place}: not an object")
    return rows


def read_parquet(path):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise BadInput(f"{path}: `pip install pyarrow` reads parquet files") from None
    try:
        return [(f"{path}, row {n}", row)
                for n, row in enumerate(parquet.read_table(path).to_pylist(), 1)]
    except (ArrowException, OSError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None


def read_json(path):
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{path} cannot be read: {reason}") from None
    number = None
    try:
        if text.lstrip().startswith("["):
            return [(f"{path}, entry {n}", row) for n, row in enumerate(json.loads(text), 1)]
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append((f"{path}, line {number}", json.loads(line)))
        return rows
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}, line {number or error.lineno}: no JSON ({error.msg})") from None
    except ValueError as error:                 # a number of more digits than Python reads
        raise BadInput(f"{path}{f', line {number}' * bool(number)}: no JSON ({error})") from None
    except RecursionError:
        raise BadInput(f"{path}: nested too deep") from None


def mended(text):
    """Half a surrogate pair is valid JSON, and no tokenizer takes it."""
    return text.encode(errors="replace").decode()


def trace_of(row, teacher="deepseek"):
    """(question, thinking, answer), strings, of a row; or a string: why it cannot be used."""
    if row.get("unfit"):                        # a teacher's reply that was cut, above all
        return f"unfit ({row['unfit']})"
    trace = []
    for names in (QUESTION, THINKING, ANSWER):
        found = (row.get(name.format(teacher=teacher)) for name in names)
        value = next((value for value in found if value), None)
        value = value[0] if isinstance(value, list) else value      # s1K's list of trajectories
        if not isinstance(value, str) or not value.strip():
            return f"no {names[0]}" if names is not ANSWER else "no answer"
        trace.append(mended(value))
    return tuple(trace)


def usable_rows(path, teacher="deepseek", verbose=False, rows=None):
    """[(row, its trace)] of the rows that can be trained on; `rows` is what read_rows gave, where
    that was asked already. The others are counted on standard error, by reason, and named if
    `verbose`. BadInput where none is left."""
    reasons, kept, first = Counter(), [], None
    for place, row in rows or read_rows(path):
        trace = trace_of(row, teacher)
        if isinstance(trace, tuple):
            kept.append((row, trace))
            continue
        reasons[trace] += 1
        first = first or f"{place}: {trace}"
        if verbose:
            print(escape(f"{place}: {trace}"), file=sys.stderr)
    if not kept:
        raise BadInput(f"{path}: no row can be used ({first})")
    if reasons:
        said = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        print(f"{path}: {reasons.total():,} of {reasons.total() + len(kept):,} rows passed over: "
              f"{escape(said)}", file=sys.stderr)
    return kept


def load_traces(path, **how):
    """(question, thinking, answer) strings of a file's rows, as `usable_rows` says."""
    return [trace for _, trace in usable_rows(path, **how)]


def reference_of(value):
    """A reference answer as `grade` takes it: a string, an object (Countdown's), or None. BadInput
    where it is another object."""
    if isinstance(value, dict):
        grade("Answer: 1", value)
    return value if isinstance(value, (dict, type(None))) else mended(str(value))


def question_of(row, seed, graded):
    """{"question", "answer"} of a row; BadInput where it has none."""
    row = {name: value for name, value in row.items() if value is not None}     # parquet fills up
    question, answer = (next((row[name] for name in names if name in row), None)
                        for names in (QUESTION, REFERENCE))
    question = mended(question) if isinstance(question, str) else ""
    answer = reference_of(answer)
    wrong = [mended(str(row[name])) for name in sorted(row) if name.startswith("Incorrect Answer")]
    solved = not wrong and not row.keys() & {"answer", "gtruth_answer"}
    if solved and isinstance(answer, str) and "\\boxed{" in answer:
        answer = extract(answer)                # in which it ends
    if not question.strip() or not answer and graded or wrong and not isinstance(answer, str):
        raise BadInput(f"no {'answer' if question.strip() else 'question'}")
    if wrong:
        options = [answer, *wrong]
        if len(options) > 8 or len({option.strip() for option in options}) < len(options):
            raise BadInput("more than 8 options, or two that are the same")
        random.Random(f"options {seed} {question}").shuffle(options)
        lines = [f"{letter}) {option.strip()}" for letter, option in zip("ABCDEFGH", options)]
        question = "\n".join([question.strip(), "", *lines])
        answer = "ABCDEFGH"[options.index(answer)]
    return {"question": question, "answer": answer}


def load_questions(path, seed=0, graded=True):
    """Rows of question and answer, as MATH500, AIME, GPQA-Diamond and s1K name them. The options of
    a multiple choice are shuffled by `seed`, and the answer is a letter. BadInput names the place
    of a row without; if not `graded`, the answer may be missing and is None."""
    questions = []
    for place, row in read_rows(path):
        try:
            questions.append(question_of(row, seed, graded))
        except BadInput as error:
            raise BadInput(f"{place}: {error}") from None
    return questions


# How long to think, as a question may ask (s1, section 3.2 and appendix D). What a trace is
# labelled with is its own length: in tokens, rounded up to a power of two; in first steps of the
# search, which its thinking then counts down, as s1's does; or its class.
SHORT = 100                         # tokens; above it thinking is long
KINDS = {"tokens": "{question} Think for up to {limit} tokens.",
         "steps": "{question} Think for up to {limit} steps.",
         "class": "{question} Think for a {limit} time."}


def ask_for(question, kind, limit):
    """The question with its limit, as KINDS[kind] words it; without a kind the question."""
    return KINDS[kind].format(question=question, limit=limit) if kind else question


def ask_for_lengths(traces, chat, kinds):
    """The traces, in turn as they are and with their length in the question in each of the ways."""
    for (question, thinking, answer), kind in zip(traces, itertools.cycle([None, *kinds])):
        tokens = len(chat.text(thinking))
        if kind == "steps":
            thinking, limit = count_down(thinking)
            if not limit:
                raise BadInput("a trace without a line that is a sum alone has no steps to ask for")
        else:
            limit = (2 ** (tokens - 1).bit_length() if kind == "tokens" else
                     "short" if tokens <= SHORT else "long")    # of its class
        yield ask_for(question, kind, limit), thinking, answer


def count_down(thinking):
    """Thinking with the number of steps that are left before each, and how many there are. A step
    begins with a line that is a sum alone: "8-3=5"."""
    steps = re.findall(r"^[-+*=\d]+$", thinking, re.M)
    left = iter(range(len(steps) - 1, -1, -1))
    counted = re.sub(r"^(?=[-+*=\d]+$)", lambda _: f"{next(left)} left\n", thinking, flags=re.M)
    return counted, len(steps)


# ---- Countdown ------------------------------------------------------------------------------
# Reach a target from a few numbers with + - *, each number used once. A position in the game is a
# list of (value, expression); joining two of them shortens it by one.

LARGEST, HIGHEST = 13, 100          # numbers from 1 to 13, targets from 1 to 100
PRODUCT = 999                       # no value passes it, so that every number is one token


def join(a, b, op):
    """The line that joins (value, expression) a and b, and the joined pair. 3, 8, "-": "8-3=5"."""
    if op == "-" and a[0] < b[0]:
        a, b = b, a                 # nothing goes below zero
    value = {"+": a[0] + b[0], "-": a[0] - b[0], "*": a[0] * b[0]}[op]
    return f"{a[0]}{op}{b[0]}={value}", (value, f"({a[1]}{op}{b[1]})")


def moves(position):
    """Every line from a position with the position it leads to, in the teacher's fixed order."""
    for i, j in itertools.combinations(range(len(position)), 2):
        rest = [pair for k, pair in enumerate(position) if k not in (i, j)]
        for op in "+-*":
            line, joined = join(position[i], position[j], op)
            yield line, [joined, *rest]


def walk(position):
    """The whole search, depth first: (line, position it leads to); a position of one is a try."""
    for line, left in moves(position):
        yield line, left
        if len(left) > 1:
            yield from walk(left)


def leaves(numbers):
    """The position at the start: each number is its own expression."""
    return [(number, str(number)) for number in numbers]


def reachable(numbers):
    """All values that the numbers can make."""
    return {left[0][0] for _, left in walk(leaves(numbers)) if len(left) == 1}


def split(numbers, target):
    """"train", "tune" or "test", a pure function of the numbers in any order and the target.

    75% of all questions are for training, 10% to try settings on, 15% are held out.
    """
    bucket = zlib.crc32(f"{sorted(numbers)} {target}".encode()) % 20
    return "train" if bucket < 15 else "tune" if bucket < 17 else "test"


def pose(numbers, target):
    """The question's text."""
    listed = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
    return f"Use {listed} with + - * to make {target}."


def countdown_keys(part, highest=HIGHEST):
    """All (numbers, target) of one part that can be solved, with targets up to `highest`."""
    return [(numbers, target)
            for numbers in itertools.combinations_with_replacement(range(1, LARGEST + 1), 3)
            if numbers[0] * numbers[1] * numbers[2] <= PRODUCT
            for target in sorted(reachable(numbers))
            if 1 <= target <= highest and split(numbers, target) == part]


def countdown_questions(part, n, seed):
    """The first n of one part's questions in the order of `seed`: rows of question and answer."""
    keys = countdown_keys(part)
    if n > len(keys):
        raise BadInput(f"there are {len(keys)} different {part} questions of Countdown, not {n}")
    rng = random.Random(f"{part} questions {seed}")
    rng.shuffle(keys)
    shown = [(rng.sample(numbers, len(numbers)), target) for numbers, target in keys]
    return [{"question": pose(numbers, target), "answer": {"numbers": numbers, "target": target}}
            for numbers, target in shown[:n]]


GIVE_UP = 0.7                       # how likely the teacher gives up when it is tired
PATIENCE = 8                        # first steps of the search after which the teacher may give up


def search_aloud(numbers, target, rng, give_up=GIVE_UP, patience=PATIENCE, hasty=0.15, doubt=0.42):
    """Think in text as people do, then answer: (thinking, answer), the answer not always right.

    The search goes in a fixed order and checks each try against the target. The teacher is
    sometimes `hasty` and takes a near miss for a hit; it rarely passes over a hit. It may `doubt` a
    hit, look again (a line with `Wait`) and write the answer again or, where it was hasty, take it
    back and go on. Now and then it pauses with a `Wait` between two steps. After `patience` of its
    nine first steps, and again at the very end, it gives up with probability `give_up` and answers
    with its last try; else it goes on after a `Wait`. So every case of what may follow is there.
    """
    lines, steps, answer = [], 0, None
    for again in range(2):                      # the second time for a hit that was passed over
        for line, left in walk(leaves(numbers)):
            if len(left) == len(numbers) - 1:
                steps += 1
                if steps == patience + 1:
                    if rng.random() < give_up:
                        return "\n".join(lines), answer
                    lines.append("Wait")
            if len(left) > 1:
                if lines and lines[-1] != "Wait" and rng.random() < 0.1:
                    lines.append("Wait")
                lines.append(line)
                continue
            value, answer = left[0][0], left[0][1][1:-1]
            right = value == target
            slip = rng.random() < (0.04 if right else hasty if abs(value - target) <= 3 else 0)
            claimed = right != slip
            lines.append(f"{line} {'ok' if claimed else 'no'}")
            if claimed:
                lines.append(f"So {answer}")
            while claimed and rng.random() < (doubt if right else 0.8):
                lines.append(f"Wait, is {value} {target}? {'ok' if right else 'no'}")
                claimed = right
                if right:
                    lines.append(f"So {answer}")
            if claimed:
                return "\n".join(lines), answer
        if again or rng.random() < give_up:
            return "\n".join(lines), answer
        lines.append("Wait")


def countdown_traces(n, seed, give_up=GIVE_UP, hurried=0):
    """n traces of the teacher: (question, thinking, answer) strings; the first n of any more.

    `hurried` times each question comes again, of a teacher whose patience is drawn by chance and
    who then surely gives up. A usual trace is as long as its question is hard, and a length that
    is written into that question tells a student nothing that it could obey.
    """
    traces = []
    for row in countdown_questions("train", -(-n // (1 + hurried)), seed):
        for haste in range(1 + hurried):
            rng = random.Random(f"teacher {seed} {row['question']}" + f" {haste}" * bool(haste))
            chances = ({"give_up": 1.0, "patience": rng.randint(1, PATIENCE)} if haste
                       else {"give_up": give_up})
            traces.append((row["question"], *search_aloud(**row["answer"], rng=rng, **chances)))
    return traces[:n]


def countdown_pool(n, seed, give_up=GIVE_UP):
    """n rows to choose from: training questions with their numbers in every order, which decides
    how long the teacher searches, and targets twice as high, which are not asked for in the end.
    The domain is what a sure teacher's answer is made of, "+*", or "high"."""
    shown = sorted((numbers, target) for key, target in countdown_keys("train", 2 * HIGHEST)
                   for numbers in set(itertools.permutations(key)))
    if n > len(shown):
        raise BadInput(f"there are {len(shown)} questions for a pool of Countdown, not {n}")
    random.Random(f"pool {seed}").shuffle(shown)
    for numbers, target in shown[:n]:
        question, answer = pose(numbers, target), {"numbers": list(numbers), "target": target}
        rng = random.Random(f"teacher {seed} {question}")
        thinking, said = search_aloud(numbers, target, rng, give_up)
        sure = search_aloud(numbers, target, rng, give_up=0, hasty=0, doubt=0)[1]
        yield {"question": question, "thinking": thinking, "answer": said, "gtruth_answer": answer,
               "correct": grade(f"Answer: {said}", answer),
               "domain": "high" if target > HIGHEST else
                         "".join(sorted(re.sub(r"[^-+*]", "", sure)))}


# ---- Answers --------------------------------------------------------------------------------


def extract(text):
    r"""The answer in the text after thinking: the last \boxed{...}, else the line that follows the
    last `Answer:`; None where there is neither."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for i in range(start + 6, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start + 7:i].strip()
    head, found, tail = text.rpartition("Answer:")
    return tail.strip(" \n\t*").split("\n")[0].strip() or None if found else None


def grade(text, answer):
    """Is the answer in `text` (what came after thinking) right?

    `answer` is a string to be met as mathematics, or {"numbers", "target"}: an expression is right
    when it uses just these numbers, each once, and comes to the target.
    """
    found = extract(text)
    if found is None:
        return False
    if isinstance(answer, str):
        return equal(found, answer)
    try:
        numbers, target = sorted(answer["numbers"]), answer["target"]
    except (KeyError, TypeError):
        raise BadInput(f"no reference answer, a string or numbers and target: {answer!r}") from None
    try:
        value, used = calculate(found.split("=")[0])
    except ValueError:
        return False
    return value == target and sorted(used) == numbers


def calculate(text):
    """The value of an expression of whole numbers, + - * and brackets, and the numbers it used.
    ValueError where it is no such expression; 100 characters bound the work."""
    if len(text) > 100 or re.search(r"[^-+*()0-9\s]|[0-9]\s+[0-9]|[0-9)]\s*\(|\)\s*[0-9]|"
                                    r"(^|[-+*(])\s*[-+*]", text):
        raise ValueError(f"not an expression: {text[:50]!r}")
    return Formula(re.findall(r"[0-9]+|\S", text)).whole(), [*map(int, re.findall("[0-9]+", text))]


def equal(found, answer):
    """Do two answers, in LaTeX or plain, say the same? Strict: a decimal is no fraction that it
    only comes near to, a set has no order and a tuple has one. Units are not compared."""
    found, answer = tidy(found), tidy(answer)
    if found == answer:
        return bool(answer)
    try:
        return same(solutions(found), solutions(answer))
    except (ValueError, TypeError, ArithmeticError):            # one of them is no formula
        return False


# What is written differently and means the same is put right in two steps: by these patterns, in
# this order, and then token by token, so that a Formula knows one spelling of each sign.
SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    (r",\\!\s*|\{,\}", ","), (r"(?<!\\)\\[,!;: ]", ""),        # 10,\!080 and 1{,}000
    (r"\\(?:left|right|[bB]igg?|displaystyle|limits)(?![a-zA-Z])", ""),
    ("~", " "), (r"\\?[$%]|[°\u200b]|\\degree|\^\s*\{?\s*\\circ\s*\}?", ""),
    (r"\\(?:mathrm|mathbf|textbf|mbox|textrm|operatorname)\b", r"\\text"),
    (r"\\text\s*\{\s*(?:and|or)\s*\}", ","),
    (r"(?<=[^\s(,=])\s*\\text\s*\{[^{}]*\}(?:\s*\^\s*\{?[0-9]\}?)?$", ""),         # a unit
    (r"(?<=[0-9])\s+(?:[a-zA-Z]{3,}(?:\s+[a-zA-Z]{3,})*|[ckm]?m|k?g|s|h)(?:\^[0-9])?\.?$", ""),
    (r"\\text\s*\{([^{}]*)\}", r"\1"),
    (r"(?:\\\\\s*)?\\end\s*\{[a-z]+\}", r"\\end "), (r"\\begin\s*\{[a-z]+\}", r"\\begin "),
    (r"(?<=[0-9])\s+([0-9]+)/([0-9]+)", r"\\frac{\1}{\2}"),     # 1 4/5
    (r"(?<=[0-9])\s*(?=\\[dtc]?frac)", r"\\mixed "),            # 1\frac{4}{5}
    (r"(?<![0-9.,])([0-9]{1,3}(?: [0-9]{3})+)(?![0-9.,])", lambda m: m[1].replace(" ", "")),
    (r"^(?:\\[a-z]+|[a-zA-Z](?:\([a-zA-Z]\))?|\([a-z](?:, ?[a-z])*\))\s*"
     r"(?:=|\\in\b)(?=[^=]*$)", ""),                            # x =, f(x) =, (x, y) =
    (r"\.$", ""), (r"^([A-Z])[):]$", r"\1"))]
TOKEN = re.compile(
    # 1,000 is a number; (100,200) is two
    r"(?<![(\[,.])(?<![(\[]\s)(?<!\\\{)[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])(?:\.[0-9]+)?"
    r"|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|\\[a-zA-Z]+|\\\S|[a-zA-Z]{3,}|\S")
PLAIN = {spelling: plain for plain, spellings in {
    "*": r"\cdot \times \ast × ·", "/": r"\div", "-": "\u2212", ",": ";", r"\pm": "±",
    r"\frac": r"\dfrac \tfrac \cfrac", r"\binom": r"\dbinom", r"\sqrt": "√", r"\pi": "π",
    r"\infty": "∞", r"\cup": "∪", r"\le": r"\leq ≤", r"\ge": r"\geq ≥", r"\ne": r"\neq ≠",
    r"\{": r"\lbrace", r"\}": r"\rbrace"}.items()
    for spelling in spellings.split()}


def tidy(text):
    """An answer as tokens, without what does not count: spelling, spaces, units, `x =` before the
    value. Words are in lower case; what is longer than 1,000 characters stays as it is."""
    text, tokens = text.strip(), []
    if len(text) > 1000:
        return [text]
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text).strip()
    for token in TOKEN.findall(text):
        if token[0] in "0123456789":
            token = token.replace(",", "")
        elif len(token) > 1 and token.isalpha():
            token = token.lower()
        tokens.append(PLAIN.get(token, token))
    return tokens


@dataclass(frozen=True)
class Several:
    """A list, set, matrix, inequality, ... Arithmetic with it is a TypeError: it is no number."""
    kind: str                   # the sign between them, or the brackets around them
    items: tuple


def solutions(tokens):
    """What an answer says: the set of its values, for most answers of one; \\pm is read twice."""
    found = []
    for sign in "+-" if r"\pm" in tokens else "+":
        value = Formula([sign if token == r"\pm" else token for token in tokens]).whole()
        listed = isinstance(value, Several) and value.kind in (",", r"\{\}")
        found += [one for one in (value.items if listed else (value,))
                  if sign == "+" or not any(same(one, other) for other in found)]
    return Several(r"\{\}", tuple(found))


def same(a, b):
    """Equal values: numbers exactly where both are rational, else to 9 digits; lists by place, sets
    without order."""
    if not isinstance(a, Several) and not isinstance(b, Several):
        exact = isinstance(a, Fraction) and isinstance(b, Fraction)
        return a == b if exact else cmath.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    if type(a) is not type(b) or a.kind != b.kind or len(a.items) != len(b.items):
        return False
    if a.kind not in (r"\{\}", r"\cup", r"\cap"):
        return all(map(same, a.items, b.items))
    left = list(b.items)
    for one in a.items:
        twin = next((i for i, other in enumerate(left) if same(one, other)), None)
        if twin is None:
            return False
        del left[twin]
    return True


def raised(base, exponent):
    """base ** exponent; exact for a Fraction and a small whole exponent, bounded always."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if size * abs(exponent) < 10_000:
            return base ** int(exponent)
    return complex(base) ** complex(exponent)


def mixed(whole, part):
    """1\\frac{4}{5} is a sum, 2\\frac{x}{5} a product."""
    numbers = isinstance(whole, Fraction) and isinstance(part, Fraction)
    return whole + part if numbers and whole.denominator == 1 and 0 < part < 1 else whole * part


def small(value):
    """The int of which a factorial may be taken."""
    if not isinstance(value, Fraction) or value.denominator > 1 or not 0 <= value < 99:
        raise ValueError("no small whole number")
    return int(value)


# Signs between two values, from those that bind least; the last line binds most.
LEVELS = {sign: level for level, signs in enumerate((
    r"\\", "&", ",", r"= < > \le \ge \ne \in :", r"\cup \cap", "+ -", "* /", r"\mixed", "^ _ !"))
    for sign in signs.split()}
ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
              r"\mixed": mixed, "^": raised}
BRACKETS = {"(": (")", "]"), "[": (")", "]"), "{": ("}",), r"\{": (r"\}",), "|": ("|",),
            r"\begin": (r"\end",)}
NUMBER = re.compile(r"\.?[0-9]")
ENDS = {"", *itertools.chain(*BRACKETS.values())}
CONSTANTS = {r"\pi": math.pi, "e": math.e, "i": 1j, r"\infty": 8.94427190999916e37}
FUNCTIONS = {"\\" + name: getattr(cmath, name) for name in ("sin", "cos", "tan", "exp")} | {
    r"\ln": cmath.log, r"\log": cmath.log10, r"\cot": lambda x: 1 / cmath.tan(x),
    r"\sec": lambda x: 1 / cmath.cos(x), r"\csc": lambda x: 1 / cmath.sin(x),
    r"\arcsin": cmath.asin, r"\arccos": cmath.acos, r"\arctan": cmath.atan}


class Formula:
    """A formula, read by precedence climbing: ours and not Python's, for text from a model is never
    evaluated. ValueError, TypeError or ArithmeticError where it is none. Its length, the depth of
    brackets and the size of powers are bounded, and so is the work.

        formula := value {sign value}         sign: LEVELS; none is a *, but not of two numbers
        value   := number | letter | +- formula | formula in BRACKETS, in |...| its size
                 | \\frac value value | \\binom value value | \\sqrt [formula] value
                 | \\sin ^value formula        [ ]: it may be missing, as the power of a \\sin may

    A value is a Fraction while it can be, then a float or complex. A letter is a fixed number of
    its own, so that equal polynomials have equal values; so is infinity. Signs that are no
    ARITHMETIC make Several: x < 5, a matrix of rows (with \\\\ between them) of cells (with &).
    """

    def __init__(self, tokens):
        if len(tokens) > 500:
            raise ValueError("too long for a formula")
        self.tokens = ["", *tokens[::-1]]       # the next one comes last, "" is the end
        self.last, self.depth = "", 0           # what was taken last; how deep in brackets

    def take(self):
        self.last = self.tokens.pop()
        return self.last

    def whole(self):
        value = self.climb(0)
        if self.tokens != [""]:
            raise ValueError(f"{self.tokens[-1]!r} is left over")
        return value

    def climb(self, least):
        """Values with signs between them that bind at `least` so much. In 2*3^4+5, climb(6) at the
        beginning reads 2, takes *, has climb(7) read 3^4, and leaves + to who binds less."""
        value = self.value(least)
        while self.tokens[-1] not in ENDS:
            sign = self.tokens[-1] if self.tokens[-1] in LEVELS else "*"
            if LEVELS[sign] < least:
                break
            if NUMBER.match(self.tokens[-1]) and NUMBER.match(self.last):
                raise ValueError("two numbers side by side")
            if self.tokens[-1] == sign:
                self.take()
            if sign == "!":
                value = Fraction(math.factorial(small(value)))
                continue
            right = self.climb(LEVELS[sign] + 1)
            self.last = "" if sign == "^" else self.last        # x^2 3 is a product
            if sign in ARITHMETIC:
                value = ARITHMETIC[sign](value, right)
            else:
                third = isinstance(value, Several) and value.kind == sign       # or fourth, ...
                value = Several(sign, (*(value.items if third else [value]), right))
        return value

    def value(self, least=math.inf):
        """A number, a letter, a command with what it takes, something in brackets, under a sign."""
        self.depth += 1
        if self.depth > 40:
            raise ValueError("nested too deep")
        token = self.take()
        if NUMBER.match(token):
            value = Fraction(token)
        elif token in ("+", "-"):                               # -2^2 is -4, 2^-2 is 1/4
            value = self.climb(max(least, LEVELS["*"])) * {"+": 1, "-": -1}[token]
        elif token in BRACKETS:
            value = self.bracket(token)
        elif token == r"\frac":
            value = self.piece() / self.piece()
        elif token == r"\binom":
            value = Fraction(math.comb(small(self.piece()), small(self.piece())))
        elif token == r"\sqrt":
            root = self.value() if self.tokens[-1] == "[" else 2
            value = raised(self.piece(), 1 / root)
        elif token in FUNCTIONS:
            power = 1
            if self.tokens[-1] == "^":                          # \sin^2 x
                self.take()
                power = self.piece()
            value = raised(FUNCTIONS[token](self.climb(LEVELS["^"])), power)
        elif token not in LEVELS and re.fullmatch(r"[a-zA-Z]|\\[a-zA-Z]+", token):
            value = CONSTANTS.get(token, 0.5 + zlib.crc32(token.encode()) / 2**32)
        else:
            raise ValueError(f"{token!r} is not known")
        self.depth -= 1
        return value

    def piece(self):
        """What \\frac and \\sqrt take: {...}, or the next digit or letter alone: \\frac12."""
        token = self.tokens[-1]
        if token.isdigit():
            self.tokens[-1:] = [token[1:], token[0]] if token[1:] else [token]
        value, self.last = self.value(), ""                     # as \sqrt2 3 is
        return value

    def bracket(self, opened):
        value, closed = self.climb(0), self.take()
        listed = isinstance(value, Several) and value.kind == ","
        if closed not in BRACKETS[opened]:
            raise ValueError(f"{opened!r} and {closed!r} do not match")
        if opened == "|":
            return abs(value)
        if opened in ("(", "[", r"\{") and listed:
            return Several(opened + closed, value.items)
        if opened + closed in ("(]", "[)"):
            raise ValueError("half an interval")
        return Several(r"\{\}", (value,)) if opened == r"\{" else value


# ---- Asking a teacher -----------------------------------------------------------------------

# A row of a file of traces, from an endpoint or from sample.py:
#
#   question, thinking, answer    as load_traces reads them; the thinking is never in the answer
#   gtruth_answer, correct        where the question has a reference answer
#   unfit                         why it is not trained on: "length" (cut), "no thinking", ...
#   teacher                       model, finish, usage, seconds, sample, and the key: a hash of all
#                                 that was asked, under which the row is found again

KEYS = ("TEACHER_API_KEY", "OPENAI_API_KEY")    # environment variables, the first set counts
BACKOFF = 1.0               # seconds before the second try, about; doubled for each further one
ATTEMPTS = 8                # tries of a question; a 429 only means: later, so it is never the last
HOPELESS = 10               # as many failures before the first answer end the run
GRACE = 1.0                 # seconds in which replies may still come when a run is interrupted
LARGEST_REPLY = 16 << 20    # bytes of a reply


def row_key(*asked):
    """The same endpoint, model, messages, parameters and sample index give the same key."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]


def trace_row(question, thinking, answer, **teacher):
    """A row to be written, of a row of load_questions and what came back."""
    thinking, answer = mended(thinking).strip(), mended(answer).strip()
    row = {"question": question["question"], "thinking": thinking, "answer": answer}
    if question["answer"] is not None:
        row |= {"gtruth_answer": question["answer"], "correct": grade(answer, question["answer"])}
    cut = None if teacher["finish"] == "stop" else teacher["finish"] or "no finish reason"
    unfit = cut or not thinking and "no thinking" or not answer and "no answer"
    return row | ({"unfit": unfit} if unfit else {}) | {"teacher": teacher}


def open_traces(path):
    """Open a file of traces to go on with: the file, and {key: teacher} of the rows it holds.

    A last line that a kill has torn is cut off. BadInput where the file is another's, or in use.
    """
    file, done, end = open(path, "ab"), {}, 0
    with contextlib.suppress(ImportError):      # Windows has no such lock, and goes without
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{path}: another run is writing to it") from None
    with open(path, "rb") as lines:             # a file both read and appended to can go wrong
        for number, line in enumerate(lines, 1):
            whole, ours = line.endswith(b"\n"), b'{"question": '[:len(line)]
            try:
                teacher = json.loads(line.decode())["teacher"]
                done[teacher["key"]] = teacher
                end += len(line)
                file.write(b"" if whole else b"\n")
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                if whole or not isinstance(error, ValueError) or not line.startswith(ours):
                    raise BadInput(f"{path}, line {number}: no row of a teacher; choose another "
                                   "file to write to") from None
                file.truncate(end)
    return file, done


def write_row(file, row, secret=""):
    """Append one whole line, and flush it; the key to the endpoint is in no file."""
    file.write(hide(json.dumps(row), secret).encode() + b"\n")
    file.flush()


def hide(text, secret):
    """A server may echo the key. One too short to be a secret ("ollama") may be any text's word."""
    return text.replace(secret, "[key]") if len(secret) > 7 else text


class Failure(Exception):
    """A try without an answer: may there be another, may this one have cost money; the HTTP status
    if it has one, and the seconds to wait if the server says so."""

    def __init__(self, message, again=True, paid=False, status=0, after=None):
        super().__init__(" ".join(escape(message[:100_000]).split()))
        self.again, self.paid, self.status, self.after = again, paid, status, after


def teacher_url(base, plain=False):
    """The parts of the chat endpoint's address under a base URL; BadInput where it is none that the
    key may be sent to. `plain` allows http to a host that is not this machine."""
    base = base.rstrip("/").removesuffix("/chat/completions")
    form = re.fullmatch(r"https?://[\w.-]+(?::(\d{1,5}))?(/[\w.~%:/+-]*)?", base, re.ASCII)
    if not form or int(form[1] or 0) > 65535:
        raise BadInput("--base-url: not of the form https://host:port/path")
    url = urllib.parse.urlsplit(base + "/chat/completions")
    loopback = url.hostname == "localhost"
    with contextlib.suppress(ValueError):       # a name
        loopback = loopback or ipaddress.ip_address(url.hostname).is_loopback
    if url.scheme == "http" and not loopback and not plain:
        raise BadInput("--base-url: key and questions would go unencrypted (--allow-http)")
    return url


def post(url, body, secret, timeout, deadline):
    """POST an object as JSON: (status, headers, body) of the reply. Any exception where no whole
    reply is here after `timeout` seconds of silence, or at `deadline` on the monotonic clock.
    http.client follows no redirect, so the key goes to no other host."""
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    left = max(0.001, deadline - time.monotonic())
    connection = kind(url.hostname, url.port, timeout=min(timeout, left))
    connection.connect()
    # Each byte that drips in starts `timeout` anew; this does not wait for the last of them.
    guard = threading.Timer(deadline - time.monotonic(), hang_up, [connection.sock])
    guard.daemon = True
    guard.start()
    headers = {"Content-Type": "application/json", "User-Agent": "s1-teacher"}
    headers |= {"Authorization": f"Bearer {secret}"} if secret else {}
    try:
        connection.request("POST", url.path, json.dumps(body), headers)
        reply = connection.getresponse()
        text = reply.read(LARGEST_REPLY + 1)
    finally:
        guard.cancel()
        connection.close()
    if len(text) > LARGEST_REPLY:
        raise Failure(f"a reply of more than {LARGEST_REPLY} bytes", again=False, paid=True)
    if reply.length or time.monotonic() >= deadline:    # cut off; by us, it may look like a whole
        raise http.client.IncompleteRead(text)
    return reply.status, reply.headers, text


def hang_up(line):
    with contextlib.suppress(OSError):          # it may be closed just now
        line.shutdown(socket.SHUT_RDWR)


def read_reply(status, headers, text):
    """The object of a reply, its choices[0]["message"] an object; else the Failure it is."""
    reply = text.decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        reply = json.loads(text)
        if status == 200 and isinstance(reply["choices"][0]["message"], dict):
            return reply
    said = reply[0] if isinstance(reply, list) and reply else reply         # Gemini's are lists
    for name in ("error", "message"):
        said = said.get(name, said) if isinstance(said, dict) else said
    said = "a redirect, which is not followed" if 300 <= status < 400 else said
    again = status in (200, 408, 409, 429) or status >= 500
    raise Failure(f"HTTP {status}{' without choices' * (status == 200)}: {said}", again,
                  status == 200, status, retry_after(headers))


def retry_after(headers):
    """Seconds to wait, as retry-after-ms or Retry-After (seconds or a date) says, else None."""
    said = headers["Retry-After"]
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        seconds = (float(headers["retry-after-ms"]) / 1000 if headers["retry-after-ms"] else
                   float(said) if re.fullmatch(r"\s*[\d.]+\s*", said) else
                   email.utils.parsedate_to_datetime(said).timestamp() - time.time())
        return max(0.0, seconds) if seconds < math.inf else None


def split_message(message):
    """(thinking, answer) of a chat message. Thinking has a field of its own, or leads the content:

        <think>so 5</think>The answer is 5.     also <thought>, also without the opening tag, which
                                                some chat templates put at the end of the prompt
    """
    texts = {name: text for name, text in message.items() if isinstance(text, str)}
    field = texts.get("reasoning") or texts.get("reasoning_content")
    content, inside, begin = texts.get("content", ""), [], 0
    opening = re.compile(r"\s*<(think|thought)>")
    while opened := opening.match(content, begin):      # by places: cutting would be quadratic
        closing = f"</{opened[1]}>"
        end = content.find(closing, opened.end()) % (len(content) + 1)      # -1: all the rest
        inside.append(content[opened.end():end])
        begin = end + len(closing)
    content = content[begin:]
    if not field and not inside and (closed := re.search(r"</(think|thought)>", content)):
        inside, content = [content[:closed.start()]], content[closed.end():]
    return field or "\n\n".join(inside), content


def tokens_used(usage):
    """Tokens (read, written) of a reply's usage; None where it does not say."""
    with contextlib.suppress(LookupError, TypeError, OverflowError):
        read, written = usage["prompt_tokens"], usage["completion_tokens"]
        # Gemini leaves the thoughts out of the latter, but not out of the total.
        written = max(written, usage.get("total_tokens", 0) - read)
        if type(read) is type(written) is int and 0 <= min(read, written) <= read + written < 1e9:
            return read, written


def dollars(args, read, written):
    return (read * (args.usd_in or 0) + written * (args.usd_out or 0)) / 1e6


class Job(typing.NamedTuple):
    """What is asked once."""
    question: dict              # a row of load_questions
    sample: int                 # which of its answers
    key: str                    # of the row to come
    body: dict                  # of the request
    most: float                 # dollars that one try may cost


class Asking:
    """One run: workers, each with one question at a time from its first try to its end, and the
    few numbers they share, which only the holder of `change` touches.

        todo --> turn: is it time, are there dollars? --> post --> a reply ---> a row of the file
                  ^                                         |
                  '----- after a while, all together -----  a Failure --> a row of the failures
                         no later than the deadline
    """

    def __init__(self, args, url, secret):
        jobs = teacher_jobs(args, url)
        self.args, self.url, self.secret = args, url, secret
        self.file, done = open_traces(args.out)
        self.failures = Path(f"{args.out}.failed.jsonl")
        self.failures.unlink(missing_ok=True)   # what failed last time is asked again now
        self.todo = [job for job in jobs.values() if job.key not in done]
        self.total, self.before = len(jobs), len(jobs) - len(self.todo)
        used = [tokens_used(row.get("usage")) or (0, args.max_tokens) for row in done.values()]
        self.tokens, self.spent = sum(map(sum, used)), sum(dollars(args, *pair) for pair in used)
        self.done = self.failed = 0
        self.pause = 0.0                        # until when on the monotonic clock nobody asks
        self.flying = []                        # dollars that each try under way may cost
        self.over = self.broke = False          # no more tries; and that for want of dollars
        self.change = threading.Condition()

    def run(self):
        """Ask all; what a worker raises comes out here. What has come is kept in any case."""
        bar = tqdm(total=self.total, initial=self.before, unit="row",
                   mininterval=0.1 if sys.stderr.isatty() else 30)
        with bar, ThreadPool(self.args.workers) as pool, contextlib.suppress(StopIteration):
            asked = pool.imap_unordered(self.ask, self.todo)
            try:
                while True:                     # no `for`: it would be deaf to Ctrl-C at times
                    with contextlib.suppress(multiprocessing.TimeoutError):
                        asked.next(timeout=0.1)
                    bar.set_postfix_str(self.state(), refresh=False)
                    bar.update(self.before + self.done - bar.n)
            finally:                            # and the workers are daemons, so it waits for none
                with self.change:
                    self.over = True
                    self.change.notify_all()
                    self.change.wait_for(lambda: not self.flying, GRACE)
                    self.file.close()

    def ask(self, job):
        """The life of a question: tried until it is a row or a failure, or the run is over."""
        tries, due, deadline = 0, 0.0, math.inf
        while self.turn(job, due):
            start, tries = time.monotonic(), tries + 1
            deadline = min(deadline, start + self.args.deadline)    # of all tries together
            try:
                reply, failure = read_reply(
                    *post(self.url, job.body, self.secret, self.args.timeout, deadline)), None
            except Exception as error:          # of many kinds, when a line breaks or is hung up
                failure = error if isinstance(error, Failure) else Failure(
                    f"no reply: {type(error).__name__} {error}",
                    paid=not isinstance(error, (ConnectionRefusedError, socket.gaierror)))
            with self.change:
                self.flying.remove(job.most)
                self.change.notify_all()
                if self.file.closed:            # too late
                    return
                if not failure:
                    return self.keep(job, reply, time.monotonic() - start)
                self.spent += job.most * failure.paid
                wait = BACKOFF * 2 ** min(tries - 1, 6) if failure.after is None else failure.after
                due = time.monotonic() + wait + random.uniform(0, BACKOFF)  # not all at once
                busy = failure.status == 429
                if not failure.again or due > deadline or tries >= ATTEMPTS and not busy:
                    return self.give_up(job, failure, tries)
                if busy:                        # said to one worker, meant for all
                    self.pause = max(self.pause, due)

    def turn(self, job, due):
        """Wait until `due`, until no 429 holds all, and until the dollars suffice should everything
        under way cost its most. False where the run is over, as it is when they never will."""
        with self.change:
            while not self.over:
                wait = max(due, self.pause) - time.monotonic()
                if wait > 0:
                    self.change.wait(wait)
                elif self.spent + sum(self.flying) + job.most <= self.args.max_usd:
                    self.flying.append(job.most)
                    return True
                elif self.flying:               # which may turn out cheaper
                    self.change.wait()
                else:
                    self.over = self.broke = True
                    self.change.notify_all()
        return False

    def keep(self, job, reply, seconds):
        """Write what came, and count what it cost: the most where the reply does not say."""
        usage, choice = reply.get("usage"), reply["choices"][0]
        used = tokens_used(usage)
        self.spent += dollars(self.args, *used) if used else job.most
        self.tokens += sum(used or ())
        self.done += 1
        write_row(self.file, trace_row(
            job.question, *split_message(choice["message"]), model=reply.get("model"),
            finish=choice.get("finish_reason"), usage=usage, seconds=round(seconds, 3),
            sample=job.sample, key=job.key), self.secret)

    def give_up(self, job, failure, tries):
        """Note a failure; BadInput, and the end of the run, where it would be everyone's."""
        self.failed += 1
        said = hide(str(failure), self.secret)[:300]
        with open(self.failures, "ab") as file:
            write_row(file, {"question": job.question["question"], "sample": job.sample,
                             "key": job.key, "error": said, "tries": tries}, self.secret)
        everyones = failure.status in (401, 402, 404) or 300 <= failure.status < 400
        if everyones or self.failed >= HOPELESS and not self.done:
            self.over = True
            hint = "" if self.secret else f" (no key in {' or '.join(KEYS)})"
            raise BadInput(f"the teacher gives no answers{hint}: {said}")

    def state(self):
        """Where the run stands, beside its count of rows."""
        said = f"{self.failed} failed, {self.tokens:,} tokens"
        if self.args.usd_out is not None:
            expected = self.spent * self.total / max(1, self.before + self.done)
            said += f", ${self.spent:.2f} so far, ${expected:.2f} expected"
        return said


def teacher_jobs(args, url):
    """{key: Job} of every question and sample, as the flags say it is to be asked."""
    extra = None
    with contextlib.suppress(ValueError, RecursionError):
        extra = json.loads(args.body)
    if not isinstance(extra, dict) or {"model", "messages", "n", "stream"} & extra.keys():
        raise BadInput("--body: no JSON object, or one with model, messages, n or stream")
    body = {"model": args.model, "max_tokens": args.max_tokens}
    if url.hostname.endswith("googleapis.com"):         # Gemini keeps its thoughts to itself else
        marker = {"thought_tag_marker": "thought"} if "aiplatform" in url.hostname else {}  # Vertex
        body["extra_body"] = {"google": {"thinking_config": {"include_thoughts": True}} | marker}
    body = {name: value for name, value in (body | extra).items() if value is not None}
    written = [body[name] for name in ("max_tokens", "max_completion_tokens")
               if isinstance(body.get(name), int)]
    if args.max_usd < math.inf and (None in (args.usd_in, args.usd_out) or not written):
        raise BadInput("--max-usd needs the prices, --usd-in and --usd-out, and max_tokens")
    jobs = {}
    for question in load_questions(args.questions, graded=False)[:args.n]:
        asked = "\n\n".join(filter(None, (question["question"], args.suffix)))
        sent = body | {"messages": [{"role": "user", "content": asked}]}
        read = len(json.dumps(sent)) + 100              # more than its tokens can be
        most = dollars(args, read, max(written, default=0))
        for sample in range(args.samples):
            key = row_key(url.geturl(), sent, sample)
            jobs[key] = Job(question, sample, key, sent, most)
    return jobs


def ask_teacher(args):
    """Ask an endpoint all that is not answered yet; the exit code: 0, or 1 where some still is not.
    BadInput where it cannot be asked."""
    url = teacher_url(args.base_url, args.allow_http)
    secret = next((os.environ[name].strip() for name in KEYS if os.environ.get(name)), "")
    if secret and not re.fullmatch(r"[!#-\[\]-~]+", secret):
        raise BadInput(f"the key in {' or '.join(KEYS)} has characters that a key cannot have")
    asking = Asking(args, url, secret)
    asking.run()
    answered = asking.before + asking.done
    print(f"{args.out}: {answered} of {asking.total} answered, {asking.state()}"
          + (f" (failures: {asking.failures})" if asking.failed else "")
          + (f"; stopped before ${args.max_usd:g} is passed" if asking.broke else ""))
    return 1 if answered < asking.total else 0


def teacher_flags(add):
    add("--questions", required=True, help="a file of questions, with reference answers or without")
    add("--base-url", required=True, help="of the endpoint, such as https://api.deepseek.com/v1")
    add("--model", required=True, help="the teacher's name there")
    add("--out", required=True, help="file the traces are appended to; what is in it is not asked")
    add("--n", type=at_least(1), help="only the first n questions")
    add("--samples", type=at_least(1), default=1, help="answers to each question")
    add("--suffix", default="", help="what to ask for after each question")
    add("--max-tokens", type=at_least(1), default=32768, help="of an answer with its thinking")
    add("--body", default="{}", metavar="JSON",
        help='more of the request, such as {"temperature": 0.6}; null leaves a field out')
    add("--workers", type=at_least(1, highest=1000), default=16, help="questions asked at a time")
    add("--timeout", type=at_least(0.01, float), default=600, help="seconds of silence")
    add("--deadline", type=at_least(0.01, float, 1e6), default=1800,
        help="seconds for a question, with all its tries")
    add("--usd-in", type=at_least(0, float), help="dollars for a million tokens read")
    add("--usd-out", type=at_least(0, float), help="dollars for a million tokens written")
    add("--max-usd", type=at_least(0, float), default=math.inf,
        help="stop before the run costs more than this")
    add("--allow-http", action="store_true", help="send key and questions unencrypted")


# ---- Choosing -------------------------------------------------------------------------------
# From many traces to a thousand (s1, section 2.2). A pool's rows go through stages; each is a
# function of a row that says why the row goes out, or None.

DOMAIN = ("domain", "cot_type", "subject", "source_type")
ERRORS = re.compile(r"(?i)^\s*(error\b|<html)|\b(APIError|RateLimitError|internal server error)\b")
IMAGES = re.compile(r"(?i)!\[|<image|\[asy\]|\\includegraphics"
                    r"|\b(figure|diagram|image|graph|picture)\s+(below|above|shown|attached)"
                    r"|\bshown in the (figure|diagram|picture)")
DRAWING = re.compile(r"(?:^[-|/\\_+*=.<>^ \t]{4,}$\n?){3}", re.M)


def decontaminate(benchmarks, words):
    """A stage (s1, section 2.1): out goes what shares a run of `words` words with a question of a
    benchmark, or with one that stayed before it; shorter ones are compared whole."""
    def pieces(question):
        said = question.lower().split()
        runs = {hash(tuple(said[i:i + words])) for i in range(len(said) - words + 1)}
        return hash(tuple(said)), runs
    held_whole, held_runs = set(), set()
    for question in benchmarks:
        whole, runs = pieces(question)
        held_whole.add(whole)
        held_runs |= runs
    seen_whole, seen_runs = set(), set()

    def stage(row, trace):
        whole, runs = pieces(trace[0])
        if whole in held_whole or not runs.isdisjoint(held_runs):
            return "a benchmark has it"
        if whole in seen_whole:
            return "the same question again"
        if not runs.isdisjoint(seen_runs):
            return f"{words} words of an earlier question"
        seen_whole.add(whole)
        seen_runs.update(runs)
    return stage


def quality(row, trace):
    """A stage: what went wrong in asking, and what cannot be understood as text."""
    question, thinking, answer = trace
    if ERRORS.search(thinking[:1000]) or ERRORS.search(answer[:1000]):
        return "an error for an answer"
    if DRAWING.search(question):
        return "a drawing in characters"
    if IMAGES.search(question):
        return "a picture that is not there"
    numbers = [int(n) for n in re.findall(r"^[^\S\n]*(\d{1,2})[.)]\s", question, re.M)]
    broken = any(b not in (1, a + 1) for a, b in itertools.pairwise([0, *numbers]))
    return "broken numbering" if broken else None


def difficulty(verdicts):
    """A stage (s1, section 2.2): a question goes out that any grader's model answers right, by a
    column that ends in _correct or by `verdicts`, {question: right}."""
    def stage(row, trace):
        columns = [verdict(value) for name, value in row.items() if name.endswith("_correct")]
        if verdicts.get(trace[0]) or any(columns):
            return "too easy: a model has it right"
    return stage


def verdict(value):
    """A verdict as columns have it: true, 1, "Yes"; false, 0, "No"; None for anything else."""
    said = str(value).strip().lower()
    return True if said in ("true", "yes", "1") else False if said in ("false", "no", "0") else None


def right(row, trace, teacher="deepseek"):
    """Is a trace's answer right, by its own verdict or its reference? None where nobody knows."""
    for column in ("correct", f"{teacher}_grade"):
        if (known := verdict(row.get(column))) is not None:
            return known
    reference = next((row[name] for name in ("gtruth_answer", "solution") if row.get(name)), None)
    reference = reference_of(reference)
    if isinstance(reference, str):              # a solution ends in its answer, or is prose
        reference = extract(reference) or (reference if len(reference) < 100 else None)
    said = trace[2] if extract(trace[2]) else f"Answer: {trace[2]}"
    return grade(said, reference) if reference else None


def domain_of(row, column=None):
    """The row's domain: its `column`, else the first of DOMAIN that it has, else "none"."""
    names = [column] if column else DOMAIN
    return next((str(row[name]) for name in names if row.get(name)), "none")


def draw_diverse(groups, n, rng, by_length=True):
    """n of {domain: [rows, longest first]}: a domain by chance, all alike, then in it a row, its
    chance halved with each rank (`by_length`), until there are n or none is left."""
    groups, chosen = {name: list(rows) for name, rows in sorted(groups.items())}, []
    while groups and len(chosen) < n:
        name = rng.choice(list(groups))
        # Beyond rank 50 the chances are too small to be drawn.
        ranks = range(min(50, len(groups[name])) if by_length else len(groups[name]))
        rank, = rng.choices(ranks, [2.0 ** -rank if by_length else 1 for rank in ranks])
        chosen.append(groups[name].pop(rank))
        if not groups[name]:
            del groups[name]
    return chosen


def choose(rows, method, n, seed, column=None, sources=(), seed_length=0, teacher="deepseek"):
    """n of `rows`, pairs (row, its trace), as new rows that name in `stage` what chose them: s1's
    way, or the paper's ablations random, longest, diverse, full."""
    rng = random.Random(f"choose {method} {seed}")
    rows = sorted(rows, key=lambda pair: (-len(pair[1][1]), pair[1][0]))    # the longest first
    taken = []
    if method == "s1k":
        taken = [(row, trace, "seed") for row, trace in rows
                 if str(row.get("source_type", row.get("source"))) in sources
                 and len(trace[1]) >= seed_length and right(row, trace, teacher)][:n]
        already = {trace[0] for _, trace, _ in taken}
        rows = [pair for pair in rows if pair[1][0] not in already]
    if method in ("s1k", "diverse"):
        groups = {}
        for pair in rows:
            groups.setdefault(domain_of(pair[0], column), []).append(pair)
        chosen = draw_diverse(groups, n - len(taken), rng, by_length=method == "s1k")
    else:
        ways = {"longest": rows[:n], "full": rows, "random": rng.sample(rows, min(n, len(rows)))}
        chosen = ways[method]
    stage = "diversity" if method == "s1k" else method
    taken += [(row, trace, stage) for row, trace in chosen]
    return [our_row(*one, teacher) for one in taken]


def our_row(row, trace, stage, teacher):
    """A chosen row under our own names, without the names of other traces that it may hold."""
    others = {name.format(teacher=each) for name in THINKING + ANSWER for each in TEACHERS}
    kept = {name: value for name, value in row.items() if name not in others}
    verdict = right(row, trace, teacher)
    return (kept | dict(zip(("question", "thinking", "answer"), trace)) | {"stage": stage}
            | ({} if verdict is None else {"correct": verdict}))


def select(args):
    """The pool's rows through every stage, each with what it took out; then the choice, written
    beside its name and renamed. BadInput where the file is there, or nothing is left."""
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise BadInput(f"{out} is there already: --overwrite it")
    held = [question["question"] for path in args.benchmarks
            for question in load_questions(path, graded=False)]
    verdicts = {}
    for path in args.verdicts:
        for _, row in read_rows(path):
            question = str(row.get("question"))
            verdicts[question] = verdicts.get(question) or verdict(row.get("correct"))
    rows = usable_rows(args.pool, args.teacher, args.verbose)
    stages = {"decontamination": decontaminate(held, args.words), "quality": quality}
    if args.method == "s1k":
        stages["difficulty"] = difficulty(verdicts)
    if args.domain and not any(args.domain in row for row, _ in rows):
        raise BadInput(f"no row of {args.pool} has a column {args.domain!r}")
    print(f"{len(rows):,} traces, {len(held):,} benchmark questions")
    for name, stage in stages.items():
        reasons = [stage(*pair) for pair in rows]
        rows = [pair for pair, why in zip(rows, reasons) if why is None]
        print(f"{name}: {len(rows):,} left" + "".join(
            f"; {count:,} {why}" for why, count in Counter(filter(None, reasons)).most_common()))
    chosen = choose(rows, args.method, args.n, args.seed, args.domain, args.sources,
                    args.seed_length, args.teacher)
    if not chosen:
        raise BadInput("nothing is left to choose from")
    draft = out.with_name(out.name + ".draft")
    draft.write_text("".join(json.dumps(row, default=str) + "\n" for row in chosen),
                     encoding="utf-8")              # default: parquet has dates
    draft.replace(out)
    stages = Counter(row["stage"] for row in chosen)
    domains = Counter(domain_of(row, args.domain) for row in chosen)
    print(f"chosen: {', '.join(f'{n:,} by {stage}' for stage, n in stages.items())}; of "
          f"{len(domains)} domains; written to {out}")


# ---- Packing --------------------------------------------------------------------------------


def targets_of(ids, first):
    """What is to be predicted at each place: the next id, or -100 where the next is not supervised.

    ids [5, 6, 7, 8], first 2 (the 7): [-100, 7, 8, -100].
    """
    return [-100] * (first - 1) + ids[first:] + [-100]


def tokens_in(examples):
    return sum(len(ids) for ids, _ in examples)


def best_fit(examples, room):
    """Examples (ids, first) in rows of at most `room` tokens: the longest first, each into the
    fullest row that still has room."""
    rows = []                                   # a row: [its tokens, example, example, ...]
    for example in sorted(examples, key=lambda example: -len(example[0])):
        fits = [row for row in rows if row[0] + len(example[0]) <= room]
        row = max(fits, key=lambda row: row[0], default=None)
        if row is None:
            rows.append(row := [0])
        row[0] += len(example[0])
        row.append(example)
    return [row for _, *row in rows]


def deal(examples, tokens_per_batch, processes=1):
    """Rows of examples, as few as best fit can make with `tokens_per_batch` tokens in each.

    Several processes take a row each at a time and wait for the one with the longest. So the rows
    are then made as short as the number of rounds allows, and each process has its share.
    """
    rows = best_fit(examples, tokens_per_batch)
    if processes > 1:
        most = -(-len(rows) // processes) * processes
        low, high = -(-tokens_in(examples) // most), tokens_per_batch
        while low < high:                       # the least room with which `most` rows suffice
            room = (low + high) // 2
            low, high = (low, room) if len(best_fit(examples, room)) <= most else (room + 1, high)
        rows = sorted(best_fit(examples, high), key=tokens_in, reverse=True)
    return rows


def pack(row):
    """A row of examples (ids, first) as `forward` takes it: ids, positions, targets, each (1, T),
    and lengths.

        ids        a a a a b b b c c
        positions  0 1 2 3 0 1 2 0 1
        lengths    4, 3, 2
    """
    lengths = [len(ids) for ids, _ in row]
    return {"ids": torch.tensor([[i for ids, _ in row for i in ids]]),
            "positions": torch.cat([torch.arange(n) for n in lengths])[None],
            "lengths": lengths,
            "targets": torch.tensor([[t for example in row for t in targets_of(*example)]])}


def epoch_batches(examples, batch_size, seed, epoch):
    """The examples of one epoch in batches, in an order that (seed, epoch) alone decide."""
    order = list(range(len(examples)))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    for start in range(0, len(order), batch_size):
        yield [examples[i] for i in order[start:start + batch_size]]


# ---- Commands -------------------------------------------------------------------------------


def load_examples(data, chat, n=None, seed=0, give_up=GIVE_UP, ask=(), **how):
    """Training examples (ids, first supervised) of `countdown` or a file of traces; `ask` names the
    KINDS of length to write into the questions, `how` is for load_traces. A file of rows {"ids":
    [...]} is for pre-training: tokens as they are, all of them supervised."""
    if data == "countdown":
        traces = countdown_traces(n or 1000, seed, give_up, len(ask))
    else:
        rows = read_rows(data)
        if "ids" in rows[0][1]:
            if ask:
                raise BadInput(f"{data} holds tokens, and no questions for --ask")
            size = chat.tokenizer.get_vocab_size()
            return [(token_ids(place, row, size), 1) for place, row in rows[:n]]
        traces = load_traces(data, rows=rows, **how)
    if ask:
        traces = list(ask_for_lengths(traces, chat, ask))
    return [chat.example(*trace) for trace in traces[:n]]


def token_ids(place, row, size):
    """The ids of a row; BadInput where they are none of a vocabulary of that size."""
    ids = row.get("ids")
    if not isinstance(ids, list) or len(ids) < 2 or any(
            type(i) is not int or not 0 <= i < size for i in ids):
        raise BadInput(f"{place}: no list of two or more token ids below {size}")
    return ids


def show_some(args):
    chat = Chat(local(args.model), args.chat, args.thinking)
    colour = args.colour == "always" or args.colour == "auto" and sys.stdout.isatty()
    for example in load_examples(args.data, chat, args.n, args.seed, teacher=args.teacher,
                                 verbose=args.verbose):
        print(show(chat, *example, colour))


def print_countdown(args):
    rows = countdown_pool(args.n, args.seed, args.give_up) if args.pool else (
        countdown_traces(args.n, args.seed, args.give_up, len(args.ask)))
    if args.ask:
        rows = ask_for_lengths(rows, Chat(local(args.model), args.chat, args.thinking), args.ask)
    for row in rows:
        print(json.dumps(row if args.pool else dict(zip(("question", "thinking", "answer"), row))))


def show(chat, ids, first, colour):
    """One example as the model sees it; supervised tokens green, or in [ and ] without colour."""
    given, supervised = (escape(chat.decode(part)) for part in (ids[:first], ids[first:]))
    return f"{given}\033[32m{supervised}\033[0m" if colour else f"{given}[{supervised}]"


def escape(text):
    """Control characters as they are written, so that data cannot steer the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text)


def stats(args):
    """Print what a file of traces holds: lengths, verdicts, domains."""
    rows, limit = usable_rows(args.data, args.teacher, args.verbose), args.tokens_per_batch
    chat = Chat(local(args.model), args.chat, args.thinking)
    lengths = sorted(len(chat.example(*trace)[0]) for _, trace in rows)
    print(f"{len(rows):,} traces, {sum(lengths):,} tokens as training examples: "
          f"median {lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,}")
    bounds = [2 ** k for k in range(4, 20)]
    for low, high in zip([0, *bounds], bounds):
        if count := sum(low < length <= high for length in lengths):
            print(f"  up to {high:7,} {count:7,} {'█' * math.ceil(50 * count / len(rows))}")
    print(f"{sum(length > limit for length in lengths):,} longer than {limit:,}: would be dropped")
    verdicts = Counter(right(*pair, args.teacher) for pair in rows)
    known = verdicts[True] + verdicts[False]
    share = f" ({100 * verdicts[True] / known:.1f}%)" if known else ""
    print(f"{verdicts[True]:,} right{share}, {verdicts[False]:,} wrong, {verdicts[None]:,} unknown")
    for name, count in Counter(domain_of(row, args.domain) for row, _ in rows).most_common(20):
        print(f"  {count:7,} {escape(name)}")


def select_flags(add):
    add("--pool", required=True, help="file of traces, or a hub dataset's id")
    add("--benchmarks", nargs="*", default=[], help="files of questions that must not come in")
    add("--words", type=at_least(1), default=8,
        help="a shared run of this many words is contamination; a task of one template needs more")
    add("--verdicts", nargs="*", default=[],
        help="rows.jsonl of evaluations: what a model had right is too easy")
    add("--sources", nargs="*", default=[], help="sources whose right, long traces are all taken")
    add("--seed-length", type=at_least(0), default=0, help="characters of such a trace at least")
    add("--method", choices=("s1k", "random", "longest", "diverse", "full"), default="s1k")
    add("--n", type=at_least(1), default=1000, help="how many traces")
    add("--seed", type=int, default=0, help="of the draws")
    add("--out", required=True, help="file to write")
    add("--overwrite", action="store_true", help="replace the file")


def arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)

    def command(name, run, **said):
        made = commands.add_parser(name, **said)
        made.set_defaults(run=run)
        return made

    shows = command("show", show_some, help="print training examples as the model sees them")
    shows.add_argument("data", nargs="?", default="countdown",
                       help="countdown or a file of traces")
    shows.add_argument("--n", type=at_least(1), default=1, help="how many examples")
    shows.add_argument("--seed", type=int, default=0)
    shows.add_argument("--colour", choices=("auto", "always", "never"), default="auto")
    counts = command("stats", stats, help="lengths, right answers and domains of traces")
    counts.add_argument("data", help="file of traces, or a hub dataset's id")
    counts.add_argument("--tokens-per-batch", type=at_least(1), default=8192,
                        help="longer examples would be dropped")
    writes = command("countdown", print_countdown, help="print traces of Countdown's teacher")
    writes.add_argument("--n", type=at_least(1), default=1000, help="how many traces")
    writes.add_argument("--seed", type=int, default=0)
    writes.add_argument("--give-up", type=at_least(0, float, 1), default=GIVE_UP,
                        help="how likely the teacher gives up when tired")
    kind = writes.add_mutually_exclusive_group()
    kind.add_argument("--ask", nargs="+", choices=KINDS, default=[],
                      help="write the length of the thinking into the question")
    kind.add_argument("--pool", action="store_true", help="rows to choose from: the numbers in "
                      "every order, with reference and domain")
    asks = command("teacher", ask_teacher, help="ask a chat endpoint for traces; its key is taken "
                   f"from the environment ({', else '.join(KEYS)})")
    teacher_flags(asks.add_argument)
    picks = command("select", select, help="choose the traces to train on, as s1 did")
    select_flags(picks.add_argument)

    for some in (shows, counts, writes):
        model_flags(some.add_argument, default="assets/countdown-base")
    for some in (shows, counts, picks):
        trace_flags(some.add_argument)
        some.add_argument("--verbose", action="store_true", help="name the rows not used")
    for some in (counts, picks):
        some.add_argument("--domain", help=f"column (default: first of {', '.join(DOMAIN)})")
    return parser.parse_args()


def trace_flags(add):
    add("--teacher", choices=TEACHERS, default=TEACHERS[0],
        help="whose traces, where rows have those of both (s1K-1.1)")


def main():
    args = arguments()
    with complaints():
        if code := args.run(args):
            sys.exit(code)


if __name__ == "__main__":
    main()
