"""Writes what countdown-base is made from: its tokenizer and its documents for pre-training.

    python assets/countdown-base/pretrain.py tokenizer assets/countdown-base
    python assets/countdown-base/pretrain.py documents 150000 > pieces.jsonl

A document is a row {"ids": [...]}; train.py supervises all of its tokens. README.md next to this
file has the command that trains the model.
"""
import argparse
import functools
import itertools
import json
import random
import re
import sys
from pathlib import Path

import tokenizers

BASE = Path(__file__).resolve().parent
sys.path.insert(0, str(BASE.parents[1]))
from data import Chat  # noqa: E402
from recipe import countdown  # noqa: E402

# ---- Documents ------------------------------------------------------------------------------
# They teach what a base model knows before fine-tuning: arithmetic, comparing a value with a
# target, correcting a wrong verdict. None shows a question together with thinking, a question of
# the tune or test split, or the fixed order in which the teacher searches.


@functools.cache
def train_steps():
    """Returns all first steps with their tries, as search() yields them: by numbers and by value.

    A try whose value is the target of a tune or test question is left out.
    """
    by_numbers, by_value = {}, {}
    for numbers in itertools.product(range(1, countdown.MAX_NUMBER + 1), repeat=3):
        if numbers[0] * numbers[1] * numbers[2] > countdown.MAX_PRODUCT:
            continue
        for step, tries in countdown.search(numbers):
            tries = [t for t in tries if countdown.split_of(numbers, t[1]) == "train"]
            if tries:
                by_numbers.setdefault(numbers, []).append((step, tries))
            for value in {t[1] for t in tries}:
                by_value.setdefault(value, []).append((step, tries))
    return by_numbers, by_value


def draw_step(rng, steps):
    """Returns a random first step with one or more of its tries in random order."""
    step, tries = rng.choice(steps)
    return step, rng.sample(tries, rng.randint(1, len(tries)))


def arithmetic(rng):
    """Sums, differences and products in the range that occurs in Countdown."""
    lines, limit = [], countdown.MAX_NUMBER
    for _ in range(rng.randint(10, 35)):
        a, b = rng.randint(0, limit * limit), rng.randint(1, limit)
        op = rng.choice("+-*" if a * b <= countdown.MAX_PRODUCT else "+-")
        lines += [text for text, _, _ in countdown.combine((a, ""), (b, "")) if op in text]
    return lines


def reachable_values(rng):
    """Steps and tries from three numbers, without a target."""
    by_numbers, _ = train_steps()
    numbers = rng.choice(list(by_numbers))
    lines = [f"From {numbers[0]}, {numbers[1]} and {numbers[2]}:"]
    for _ in range(rng.randint(2, 8)):
        step, tries = draw_step(rng, by_numbers[numbers])
        lines += [step, *(text for text, _, _ in tries)]
    return lines


def written_answers(rng):
    """A hit, its expression, and the same expression again after further lines."""
    _, by_value = train_steps()
    lines = []
    for _ in range(rng.randint(1, 4)):
        target = rng.choice(list(by_value))
        step, tries = draw_step(rng, by_value[target])
        hit, _, expression = next((t for t in tries if t[1] == target), tries[-1])
        value = int(hit.split("=")[1])
        misses = [f"{text} no" for text, other, _ in tries if other != value]
        again = [f"Wait, is {value} {value}? ok", f"So {expression}"] * rng.randint(0, 4)
        lines += [f"make {value}.", step, *misses, f"{hit} ok", f"So {expression}", *again,
                  f"Answer: {expression}"]
    return lines


def verdicts(rng):
    """Tries of different numbers compared with one target.

    A verdict may be wrong and is corrected after a `Wait`, for hits as often as for misses, so that
    copying the value or the first verdict does not help.
    """
    by_numbers, by_value = train_steps()
    target = rng.randint(1, countdown.MAX_TARGET)
    lines = [f"make {target}."]
    for _ in range(rng.randint(2, 12)):
        near = target + rng.choice((0, 0, 0, rng.randint(-3, 3)))
        steps = by_value.get(near) if rng.random() < 0.75 else None
        step, tries = draw_step(rng, steps or by_numbers[rng.choice(list(by_numbers))])
        lines.append(step)
        for text, value, _ in tries:
            hit, wrong = value == target, rng.random() < 0.06
            lines.append(f"{text} {'ok' if hit != wrong else 'no'}")
            if wrong or rng.random() < (0.2 if hit else 0.06):
                lines.append(f"Wait, is {value} {target}? {'ok' if hit else 'no'}")
    return lines


def comparisons(rng):
    """Plain values compared with a target; many are close to it."""
    target = rng.randint(1, countdown.MAX_TARGET)
    lines = [f"make {target}."]
    for _ in range(rng.randint(5, 35)):
        value = rng.choice((target, target, abs(target + rng.randint(-4, 4)),
                            rng.randint(0, countdown.MAX_TARGET),
                            rng.randint(0, countdown.MAX_PRODUCT)))
        verdict = "ok" if value == target else "no"
        lines.append(f"{value} {verdict}" if rng.random() < 0.7 else
                     f"Wait, is {value} {target}? {verdict}")
    return lines


def direct_answer(rng):
    """A train question with its answer and no thinking: (question, None, answer)."""
    by_numbers, _ = train_steps()
    numbers = rng.choice(list(by_numbers))
    _, tries = draw_step(rng, by_numbers[numbers])
    _, target, answer = tries[0]
    if not 1 <= target <= countdown.MAX_TARGET:
        return direct_answer(rng)
    return countdown.question(numbers, target)["question"], None, answer


KINDS = {arithmetic: 0.2, reachable_values: 0.12, written_answers: 0.16, verdicts: 0.32,
         comparisons: 0.13, direct_answer: 0.07}


def document_texts(n: int, seed: int) -> list:
    """Returns n documents: plain text, or (question, None, answer)."""
    rng = random.Random(f"pieces {seed}")
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=n)
    documents = [kind(rng) for kind in kinds]
    return [d if isinstance(d, tuple) else "\n".join(d) for d in documents]


def documents(n: int, seed: int, chat: Chat):
    """Yields the token ids of n documents; each ends with <|endoftext|> or as a chat turn does."""
    for document in document_texts(n, seed):
        if isinstance(document, tuple):
            yield chat.example(*document)[0]
        else:
            yield chat.encode(document) + [chat.control_ids["<|endoftext|>"]]


# ---- Tokenizer ------------------------------------------------------------------------------

# The texts from which the merges are learnt; digits are removed first.
TEXTS = ["system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
         "user\n", "assistant\n", "think\n", "answer\n",
         "Use 1 and 2 with + - * to make 3.", "Final Answer: (1)", "From 1, 2 and 3:\n",
         "make 1.\n1 ok\n1 no\n", "Wait, is 1 2? ok\n"]


def make_tokenizer(directory):
    """Writes a byte-level BPE tokenizer with Qwen's special tokens; it can encode any text.

    Each number up to 999 is one token, and the merges are learnt from the words of the task.
    """
    isolate = tokenizers.pre_tokenizers.Split(tokenizers.Regex(
        r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([isolate, byte_level])
    learner.train_from_iterator(
        [re.sub(r"\d+", "", text) for text in TEXTS] * 2,
        tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, min_frequency=2,
                                       show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    words = [*alphabet, *(str(n) for n in range(10, 1000)),
             *(word for word in sorted(learnt["vocab"], key=learnt["vocab"].get) if len(word) > 1)]
    # ignore_merges: a word of the vocabulary is one token, even if no merges lead to it.
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
        {word: i for i, word in enumerate(words)}, [tuple(merge) for merge in learnt["merges"]],
        ignore_merges=True))
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(Path(directory) / "tokenizer.json"))
    (Path(directory) / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
         "pad_token": "<|endoftext|>", "model_max_length": 32768}, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tokenizer", help="write tokenizer.json").add_argument("directory")
    commands.add_parser("documents", help="print documents").add_argument("n", type=int)
    args = parser.parse_args()
    if args.command == "tokenizer":
        make_tokenizer(args.directory)
    else:
        for ids in documents(args.n, 0, Chat(BASE)):
            print(json.dumps({"ids": ids}))


if __name__ == "__main__":
    main()
