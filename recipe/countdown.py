"""Countdown, the built-in task: reach a target from three numbers with + - *, each used once."""
import argparse
import itertools
import json
import random
import re
import sys
import zlib

MAX_NUMBER, MAX_TARGET = 13, 100
MAX_PRODUCT = 999           # countdown-base has one token for each number up to it
GIVE_UP = 0.7               # probability that the teacher gives up where it may
PATIENCE = 8                # of nine first steps: how many come before it may give up
SHORT = 100                 # tokens of thinking up to which it is called short
LENGTH_PROMPTS = {"tokens": "up to {} tokens", "steps": "up to {} steps", "class": "a {} time"}


def combine(a, b):
    """Yields (text, value, expression) for each way to combine two terms (value, expression)."""
    high, low = (a, b) if a[0] >= b[0] else (b, a)          # no value is negative
    for op, (x, left), (y, right) in (("+", a, b), ("-", high, low), ("*", a, b)):
        value = {"+": x + y, "-": x - y, "*": x * y}[op]
        yield f"{x}{op}{y}={value}", value, f"{left}{op}{right}"


def search(numbers):
    """Yields each first step with its tries (text, value, expression), in the teacher's order."""
    a, b, c = [(number, str(number)) for number in numbers]
    for first, second, third in ((a, b, c), (a, c, b), (b, c, a)):
        for step, value, expression in combine(first, second):
            yield step, list(combine((value, f"({expression})"), third))


def split_of(numbers, target: int) -> str:
    """Returns "train" (75%), "tune" (10%) or "test" (15%), whatever the order of the numbers."""
    bucket = zlib.crc32(f"{sorted(numbers)} {target}".encode()) % 20
    return "train" if bucket < 15 else "tune" if bucket < 17 else "test"


def question(numbers, target: int) -> dict:
    """Returns a row with the text of a question and its reference answer."""
    text = f"Use {numbers[0]}, {numbers[1]} and {numbers[2]} with + - * to make {target}."
    return {"question": text, "answer": {"numbers": list(numbers), "target": target}}


def solvable(split: str, max_target: int = MAX_TARGET) -> list[tuple]:
    """Returns each (sorted numbers, target) of a split that has a solution."""
    return [(numbers, target)
            for numbers in itertools.combinations_with_replacement(range(1, MAX_NUMBER + 1), 3)
            if numbers[0] * numbers[1] * numbers[2] <= MAX_PRODUCT
            for target in sorted({value for _, tries in search(numbers) for _, value, _ in tries})
            if 1 <= target <= max_target and split_of(numbers, target) == split]


def questions(split: str, n: int, seed: int) -> list[dict]:
    """Returns the first n questions of a split in the order of the seed."""
    keys = solvable(split)
    if not 1 <= n <= len(keys):
        raise ValueError(f"Countdown has {len(keys)} different {split} questions, not {n}")
    rng = random.Random(f"{split} questions {seed}")
    rng.shuffle(keys)
    return [question(rng.sample(numbers, 3), target) for numbers, target in keys[:n]]


def generate_trace(numbers, target: int, rng: random.Random, give_up=GIVE_UP, patience=PATIENCE,
                   false_hit=0.15, recheck=0.42) -> tuple[str, str]:
    """Returns the (thinking, answer) of a scripted teacher that makes mistakes."""
    lines, steps = [], list(search(numbers))
    for i, (step, tries) in enumerate(2 * steps):           # twice: it may overlook a hit
        may_give_up = i in (patience, len(steps))
        if may_give_up and rng.random() < give_up:
            break                                           # the answer is its last try
        if may_give_up or lines and rng.random() < 0.1:
            lines.append("Wait")
        lines.append(step)
        for text, value, answer in tries:
            hit = value == target
            error_rate = 0.04 if hit else false_hit if abs(value - target) <= 3 else 0
            accepted = hit != (rng.random() < error_rate)
            lines.append(f"{text} {'ok' if accepted else 'no'}")
            while accepted:
                lines.append(f"So {answer}")
                if rng.random() >= (recheck if hit else 0.8):       # more often after an error
                    return "\n".join(lines), answer
                lines.append(f"Wait, is {value} {target}? {'ok' if hit else 'no'}")
                accepted = hit
    return "\n".join(lines), answer


def traces(n: int, seed: int, give_up: float = GIVE_UP, hurried: int = 0,
           split: str = "train") -> list[tuple]:
    """Returns n traces (question, thinking, answer) of a split, `hurried` more of each question."""
    found = []
    for row in questions(split, -(-n // (1 + hurried)), seed):
        for copy in range(1 + hurried):
            rng = random.Random(f"teacher {seed} {row['question']}" + (f" {copy}" if copy else ""))
            # A hurried teacher gives up at random: its length does not follow from the question.
            options = ({"give_up": 1.0, "patience": rng.randint(1, PATIENCE)} if copy
                       else {"give_up": give_up})
            found.append((row["question"], *generate_trace(**row["answer"], rng=rng, **options)))
    return found[:n]


def pool(n: int, seed: int, give_up: float = GIVE_UP):
    """Yields n rows for recipe.selection; the numbers come in every order, targets up to 200."""
    keys = sorted((numbers, target) for combination, target in solvable("train", 2 * MAX_TARGET)
                  for numbers in set(itertools.permutations(combination)))
    if not 1 <= n <= len(keys):
        raise ValueError(f"Countdown's pool has {len(keys)} different questions, not {n}")
    random.Random(f"pool {seed}").shuffle(keys)
    for numbers, target in keys[:n]:
        row = question(numbers, target)
        rng = random.Random(f"teacher {seed} {row['question']}")
        thinking, answer = generate_trace(numbers, target, rng, give_up)
        _, solution = generate_trace(numbers, target, rng, give_up=0, false_hit=0, recheck=0)
        domain = "high" if target > MAX_TARGET else "".join(sorted(re.findall("[-+*]", solution)))
        yield {"question": row["question"], "thinking": thinking, "answer": answer,
               "gtruth_answer": row["answer"], "correct": check(answer, row["answer"]),
               "domain": domain}


def calculate(text: str) -> int:
    """Returns the value of whole numbers with + - * and brackets; ValueError for anything else."""
    if not re.fullmatch(r"[-+*()0-9\s]{1,100}", text):          # the length bounds the work
        raise ValueError(f"not an expression: {text[:50]!r}")
    text = text.strip()
    for operators in ("+-", "*"):                       # split at the last one outside brackets
        for i in reversed(range(len(text))):
            if text[i] in operators and text.count("(", i) == text.count(")", i):
                a, b = calculate(text[:i]), calculate(text[i + 1:])
                return {"+": a + b, "-": a - b, "*": a * b}[text[i]]
    if text.startswith("(") and text.endswith(")"):
        return calculate(text[1:-1])
    return int(text)


def check(answer: str | None, reference: dict) -> bool:
    """Returns whether an expression uses each number of the reference once and hits its target."""
    try:
        numbers, target = sorted(reference["numbers"]), reference["target"]
    except (KeyError, TypeError):
        raise ValueError(f"a Countdown reference has numbers and target: {reference!r}") from None
    expression = (answer or "").split("=")[0]
    try:
        hit = calculate(expression) == target
    except ValueError:
        return False
    return hit and sorted(map(int, re.findall("[0-9]+", expression))) == numbers


def ask_for_length(question: str, kind: str | None, limit) -> str:
    """Returns the question with a length prompt; without a kind, the question itself."""
    return f"{question} Think for {LENGTH_PROMPTS[kind].format(limit)}." if kind else question


def number_steps(thinking: str) -> tuple[str, int]:
    """Returns the thinking with the number of steps left before each, and how many there are."""
    head, *steps = re.split(r"^(?=[-+*=\d]+$)", thinking, flags=re.M)      # before "8-3=5"
    numbered = [f"{len(steps) - i} left\n{step}" for i, step in enumerate(steps, 1)]
    return head + "".join(numbered), len(steps)


def add_length_prompts(traces, count_tokens, kinds):
    """Yields the traces: in turn unchanged, and with their length as a prompt of each kind."""
    for (question, thinking, answer), kind in zip(traces, itertools.cycle([None, *kinds])):
        num_tokens = count_tokens(thinking)
        limit = 2 ** (num_tokens - 1).bit_length()          # tokens, up to a power of two
        if kind == "class":
            limit = "short" if num_tokens <= SHORT else "long"
        elif kind == "steps":
            thinking, limit = number_steps(thinking)
            if not limit:
                raise ValueError("a trace has no steps to ask for, which are lines such as 8-3=5")
        yield ask_for_length(question, kind, limit), thinking, answer


def main():
    parser = argparse.ArgumentParser(description="Print the teacher's traces as JSON lines")
    parser.add_argument("what", choices=("traces", "pool"), help="pool: graded, to select from")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--give-up", type=float, default=GIVE_UP)
    args = parser.parse_args()
    try:
        for row in (pool if args.what == "pool" else traces)(args.n, args.seed, args.give_up):
            if args.what == "traces":
                row = dict(zip(("question", "thinking", "answer"), row, strict=True))
            print(json.dumps(row))
    except ValueError as error:
        parser.error(str(error))
    except BrokenPipeError:
        sys.stderr.close()              # the reader, such as `head`, has enough


if __name__ == "__main__":
    main()
