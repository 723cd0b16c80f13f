"""Make what the tiny base was made of: its tokenizer, and its documents of pre-training.

    python tests/make_base.py tokenizer assets/countdown-base
    python tests/make_base.py documents 150000 > pieces.jsonl

The base stands in for what a real model brings along. assets/countdown-base/README.md has the
command that pre-trains it on the documents, rows {"ids": [...]}, in which everything is supervised.
"""
import functools
import itertools
import json
import random
import re
import sys
from pathlib import Path

import tokenizers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data                                     # noqa: E402: the project is no package


# The pieces of pre-training: what a base has before it sees one trace. No piece shows a question
# with thinking behind it, and none the teacher's order: here everything comes in random order.


@functools.cache
def all_tries():
    """Every first step with all its tries, for training questions only, by numbers and by value.

    A try is (line, value, expression). What would make a held-out question is left out.
    """
    by_numbers, by_value = {}, {}
    for numbers in itertools.product(range(1, data.LARGEST + 1), repeat=3):
        if numbers[0] * numbers[1] * numbers[2] > data.PRODUCT:
            continue
        for line, left in data.moves(data.leaves(numbers)):
            tries = [(second, last[0][0], last[0][1][1:-1]) for second, last in data.moves(left)]
            tries = [t for t in tries if data.split(numbers, t[1]) == "train"]
            if tries:
                by_numbers.setdefault(numbers, []).append((line, tries))
            for value in {t[1] for t in tries}:
                by_value.setdefault(value, []).append((line, tries))
    return by_numbers, by_value


def some_tries(rng, steps):
    """One of the first steps, and one to all of its tries in random order."""
    line, tries = rng.choice(steps)
    return line, rng.sample(tries, rng.randint(1, len(tries)))


def piece_listing(rng):
    """What three numbers can make."""
    by_numbers, _ = all_tries()
    numbers = rng.choice(list(by_numbers))
    lines = [f"From {numbers[0]}, {numbers[1]} and {numbers[2]}:"]
    for _ in range(rng.randint(2, 8)):
        line, tries = some_tries(rng, by_numbers[numbers])
        lines += [line, *(t[0] for t in tries)]
    return lines


def piece_sums(rng):
    """Lines of arithmetic over all that two numbers can come to."""
    lines = []
    for _ in range(rng.randint(10, 35)):
        a, b = rng.randint(0, data.LARGEST * data.LARGEST), rng.randint(1, data.LARGEST)
        op = rng.choice("+-*" if a * b <= data.PRODUCT else "+-")
        lines.append(data.join((a, ""), (b, ""), op)[0])
    return lines


def piece_writing(rng):
    """A hit as one expression, and that expression again behind what comes between."""
    _, by_value = all_tries()
    lines = []
    for _ in range(rng.randint(1, 4)):
        target = rng.choice(list(by_value))
        line, tries = some_tries(rng, by_value[target])
        hit, _, expression = next((t for t in tries if t[1] == target), tries[-1])
        value = int(hit.split("=")[1])
        misses = [f"{second} no" for second, other, _ in tries if other != value]
        again = [f"Wait, is {value} {value}? ok", f"So {expression}"] * rng.randint(0, 4)
        lines += [f"make {value}.", line, *misses, f"{hit} ok", f"So {expression}", *again,
                  f"Answer: {expression}"]
    return lines


def piece_checking(rng):
    """Tries held against a target, each from other numbers, so that guessing is not practised.

    Hits and misses mixed; a verdict may be wrong at first and is put right behind a `Wait`, hits
    as often as misses, so that copying the value or the first verdict will not do.
    """
    by_numbers, by_value = all_tries()
    target = rng.randint(1, data.HIGHEST)
    lines = [f"make {target}."]
    for _ in range(rng.randint(2, 12)):
        near = target + rng.choice((0, 0, 0, rng.randint(-3, 3)))       # hits, and near misses
        steps = by_value.get(near) if rng.random() < 0.75 else None
        line, tries = some_tries(rng, steps or by_numbers[rng.choice(list(by_numbers))])
        lines.append(line)
        for second, value, _ in tries:
            right, wrong = value == target, rng.random() < 0.06
            lines.append(f"{second} {'ok' if right != wrong else 'no'}")
            if wrong or rng.random() < (0.2 if right else 0.06):
                lines.append(f"Wait, is {value} {target}? {'ok' if right else 'no'}")
    return lines


def piece_comparing(rng):
    """Bare values held against a target, as many hits as misses, many of them near."""
    target = rng.randint(1, data.HIGHEST)
    lines = [f"make {target}."]
    for _ in range(rng.randint(5, 35)):
        value = rng.choice((target, target, abs(target + rng.randint(-4, 4)),
                            rng.randint(0, data.HIGHEST), rng.randint(0, data.PRODUCT)))
        verdict = "ok" if value == target else "no"
        lines.append(f"{value} {verdict}" if rng.random() < 0.7 else
                     f"Wait, is {value} {target}? {verdict}")
    return lines


def piece_answering(rng):
    """A training question with its answer and no thinking: (question, None, answer)."""
    by_numbers, _ = all_tries()
    numbers = rng.choice(list(by_numbers))
    _, tries = some_tries(rng, by_numbers[numbers])
    _, target, answer = tries[0]
    if not 1 <= target <= data.HIGHEST:
        return piece_answering(rng)
    return data.pose(numbers, target), None, answer


PIECES = {piece_sums: 0.2, piece_listing: 0.12, piece_writing: 0.16, piece_checking: 0.32,
          piece_comparing: 0.13, piece_answering: 0.07}


def countdown_pieces(n, seed):
    """n documents of pre-training: plain text, or (question, None, answer)."""
    rng = random.Random(f"pieces {seed}")
    kinds = rng.choices(list(PIECES), list(PIECES.values()), k=n)
    pieces = [kind(rng) for kind in kinds]
    return [piece if isinstance(piece, tuple) else "\n".join(piece) for piece in pieces]


def make_tokenizer(directory):
    """Write the tiny base's tokenizer: Qwen's special tokens and byte-level BPE, but each number up
    to 999 is one token, and the merges are learnt from the task's words. It can encode any text."""
    isolate = tokenizers.pre_tokenizers.Split(tokenizers.Regex(
        r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([isolate, byte_level])
    texts = [f"system\n{data.SYSTEM}", "user\n", "assistant\n", "think\n", "answer\n",
             data.pose((1, 2), 3), "Final Answer: (1)", "From 1, 2 and 3:\n",
             "make 1.\n1 ok\n1 no\n",
             "Wait, is 1 2? ok\n"]
    learner.train_from_iterator(
        [re.sub(r"\d+", "", text) for text in texts] * 2, tokenizers.trainers.BpeTrainer(
        initial_alphabet=alphabet, min_frequency=2, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    words = [*alphabet, *(str(n) for n in range(10, 1000)),
             *(word for word in sorted(learnt["vocab"], key=learnt["vocab"].get) if len(word) > 1)]
    # ignore_merges: a word that is in the vocabulary is that token, whatever the merges would do.
    made = tokenizers.Tokenizer(tokenizers.models.BPE(
        {word: i for i, word in enumerate(words)}, [tuple(m) for m in learnt["merges"]],
        ignore_merges=True))
    made.pre_tokenizer, made.decoder = learner.pre_tokenizer, tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.save(str(Path(directory) / "tokenizer.json"))
    (Path(directory) / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
         "pad_token": "<|endoftext|>", "model_max_length": 32768}, indent=2) + "\n")


def documents(n, seed, chat):
    """The token ids of n documents; each ends in <|endoftext|>, or as an assistant's turn does."""
    end = chat.render("<|endoftext|>")
    for piece in countdown_pieces(n, seed):
        yield (chat.example(*piece)[0] if isinstance(piece, tuple) else chat.text(piece) + end)


if __name__ == "__main__":
    if sys.argv[1] == "tokenizer":
        make_tokenizer(sys.argv[2])
    else:
        for ids in documents(int(sys.argv[2]), 0, data.Chat(ROOT / "assets" / "countdown-base")):
            print(json.dumps({"ids": ids}))
