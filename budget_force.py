"""Budget forcing (s1, section 3.1), and what a longer or shorter thinking buys.

In:   models, and questions with answers (the built-in Countdown task's held-out ones).
Out:  a table in the terminal; MODEL/eval/ with rows.jsonl (an answer a row), runs.jsonl (a run a
      row), summary.json (Control, Scaling, Performance) and curve.png where there is matplotlib.

Map:  Budget      lengthens thinking with `Wait` and cuts it short: a `steer` of the sampler
      evaluate    a set of questions under one budget: a run
      measures    intervals, Control, Scaling, Performance, what a Wait gains
      the report  table and curve
"""
import itertools
import json
import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import (BadInput, Parser, at_least, complaints, countdown_questions, extract, grade,
                  model_flags)
from model import BadModel
from sample import Sampler, load, stream

# ---- Budget ---------------------------------------------------------------------------------


@dataclass
class Thought:
    """Where a row stands: what `Budget` keeps in `row.memory`."""
    start: int = 0                      # where thinking begins in row.tokens
    waits: int = 0                      # how often it was made to go on
    ended: str | None = None            # "natural", "cut" (budget), "context" (no room), "repetition"
    tokens: int = 0                     # of thinking, once it has ended: sampled, and each `Wait`
    answer: int | None = None           # where the answer begins in row.tokens
    begin: int | None = None            # where what is sampled of it begins
    answered: str | None = None         # how the answer ended: "natural" or "cut"


@dataclass
class Budget:
    """Between `waits` (so many times `Wait`) and `max_thinking` tokens of thinking, then an answer.

                     wants to end, waits left: `Wait` instead
                    .------.
                    v      |
        thinking ---+------'--- wants to end -------------->  answering --> end
                    |                                             ^
                    '--- the budget is spent: `Final Answer:` ----'

    It is a `steer`: called with a row and the token that was drawn, it returns the tokens that go
    in instead. It knows tokens and no model. One budget holds over all extensions, an appended
    `Wait` is paid from it, and the opening and closing delimiters are free. A delimiter may be
    several tokens: the first of them are then in the row when the last one shows what they were,
    and are withdrawn.
    """
    max_thinking: int                   # tokens; 0 answers at once, -1 is no limit
    waits: int                          # how many ends of thinking are turned into a `Wait`
    close: list                         # the delimiter between thinking and answer
    wait: list                          # lists of tokens, used in turn, where it wanted to end
    final: list                         # what begins the answer when thinking was cut
    newline: list                       # goes before a cut's delimiter ...
    line_ends: frozenset                # ... unless the last token is one of these
    ends: frozenset                     # tuples of tokens; drawn while thinking, they end it
    stop: int                           # ends the answer
    stops: frozenset = frozenset()      # all that end a row when they are drawn in the answer
    open: list = ()                     # begins the thinking, where the prompt has not done so
    grace: float = 0.0                  # a share of the budget, within which a line may be finished
    repeats: int = 0                    # a run of 20 tokens that came so often ends thinking; 0 not
    max_answer: int = 32                # tokens of the answer, of what is sampled
    room: int | None = None             # tokens of a row in all, what the sampler can hold

    @classmethod
    def of(cls, chat, max_thinking=-1, waits=0, wait=("Wait",), final="Final Answer:", **others):
        """The budget with a chat's own delimiters."""
        if max_thinking < -1 or waits < 0 or not all(wait):
            raise BadInput("a budget is at least -1 (no limit), waits at least 0 and never empty")
        vocabulary = range(chat.tokenizer.get_vocab_size())
        line_ends = (i for i, text in zip(vocabulary, chat.tokenizer.decode_batch(
            [[i] for i in vocabulary], skip_special_tokens=False)) if text.endswith("\n"))
        return cls(max_thinking, waits, close=chat.answer, wait=[chat.text(text) for text in wait],
                   final=chat.text(final), newline=chat.text("\n"), line_ends=frozenset(line_ends),
                   ends=frozenset(chat.ends), stop=chat.end, stops=frozenset(chat.stops),
                   open=chat.think, **others)

    def __call__(self, row, token):
        if row.memory is None:
            opened = row.prompt[len(row.prompt) - len(self.open):] == list(self.open)
            row.memory = Thought(start=0 if opened else len(self.open))
            if not opened:
                return self.open
        thought = row.memory
        if thought.ended:
            return self.go_on_answering(row, token)

        if end := self.wants_to_end(row, token, thought.start):
            row.withdraw(len(end) - 1)
            wait = self.wait[thought.waits % len(self.wait)]
            if thought.waits < self.waits and len(wait) <= self.left(row)[0]:
                thought.waits += 1
                row.banned = {end[0] for end in self.ends}      # it may not want to end at once
                return wait
            return self.finish(row, "natural", self.close, [])
        left, why = self.left(row)
        if self.repeats and row.repeats(self.repeats):
            left, why = 0, "repetition"
        if left <= 0:
            newline = [] if (row.tokens or row.prompt)[-1] in self.line_ends else self.newline
            return self.finish(row, why, newline + self.close, self.final)
        return [token]

    def wants_to_end(self, row, token, start):
        """Which of `ends` the token completes, in what is there from `start` on."""
        for end in self.ends:
            n = len(end) - 1
            if token == end[-1] and len(row.tokens) - start >= n and (
                    tuple(row.tokens[len(row.tokens) - n:]) == end[:-1]):
                return end

    def left(self, row):
        """How many tokens of thinking are left, and what it is that ends them."""
        budget, last = math.inf, (row.tokens or row.prompt)[-1]
        if self.max_thinking >= 0:
            budget = self.max_thinking - (len(row.tokens) - row.memory.start)
            if budget <= 0 and last not in self.line_ends:
                budget += int(self.grace * self.max_thinking)       # to finish its line
        if self.room is None:
            return budget, "cut"
        context = self.room - len(row.prompt) - len(row.tokens) - self.closing
        return (budget, "cut") if budget <= context else (context, "context")

    @property
    def closing(self):
        """Tokens that must be left in a row when thinking ends: the delimiter and the answer."""
        return len(self.newline + self.close + self.final) + self.max_answer + 1

    def finish(self, row, why, close, final):
        thought = row.memory
        thought.ended, thought.tokens = why, len(row.tokens) - thought.start
        thought.answer = len(row.tokens) + len(close)
        thought.begin = thought.answer + len(final)
        return close + final

    def go_on_answering(self, row, token):
        """The answer ends by itself, when its own budget is spent, or when it would close again."""
        thought = row.memory
        if token in self.stops or token == self.stop:
            thought.answered = "natural"
            return [token]
        if end := self.wants_to_end(row, token, thought.begin):
            row.withdraw(len(end) - 1)
        elif len(row.tokens) - thought.begin < self.max_answer:
            return [token]
        thought.answered = "cut"
        return [self.stop]


# ---- Evaluation -----------------------------------------------------------------------------


def evaluate(sampler, chat, questions, budget, max_answer=32, seed=0, temperature=0.0, name=""):
    """Ask all questions under one budget, or with no thinking at all (None): a row of results each.

    Only what follows the first end of thinking is graded.
    """
    thinking = budget is not None
    prompts = [chat.prompt(question["question"], thinking) for question in questions]
    refuse_too_long(prompts, sampler.max_length, budget.closing if thinking else max_answer)
    rows = [None] * len(prompts)
    answers = sampler.generate(prompts, steer=budget, seed=seed, stops=chat.stops,
                               temperature=temperature,
                               max_new_tokens=None if thinking else max_answer)
    for row in tqdm(answers, desc=name, total=len(prompts), unit="row", leave=False, disable=None,
                    dynamic_ncols=True):
        thought = row.memory or Thought(ended="none", answer=0)
        end = len(row.tokens) - (row.finish == "stop")
        answer = chat.decode(row.tokens[thought.answer:end])
        rows[row.index] = {
            **questions[row.index], "text": chat.decode(row.tokens), "found": extract(answer),
            "correct": grade(answer, questions[row.index]["answer"]),
            "thinking_tokens": thought.tokens,
            "extensions": thought.waits, "ended": thought.ended, "finish": row.finish,
            "forced": [i for i, forced in enumerate(row.forced) if forced]}
    return rows


def refuse_too_long(prompts, length, closing):
    """BadInput where a prompt leaves no room for an answer."""
    longest = max(map(len, prompts))
    if longest + closing > length:
        raise BadInput(f"a question of {longest} tokens and its answer of {closing} do not fit "
                       f"into {length} (--max-length)")


def measure(rows, **what):
    """One run in numbers; the interval is Wilson's, 95%."""
    n, correct = len(rows), sum(row["correct"] for row in rows)
    low, high = wilson(correct, n)
    return {**what, "n": n, "correct": correct, "accuracy": correct / n, "low": low, "high": high,
            "thinking_tokens": statistics.fmean(row["thinking_tokens"] for row in rows)}


def wilson(correct, n, z=1.96):
    p = correct / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def gain(rows, others, z=1.96):
    """Points that `rows` gained over `others`, question by question: mean and 95% interval."""
    differences = [100 * (row["correct"] - other["correct"]) for row, other in zip(rows, others)]
    mean = statistics.fmean(differences)
    half = z * statistics.pstdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def summarise(runs):
    """Control, Scaling and Performance (s1, section 3.2) of one model's runs over budgets.

    Control: share of the runs with a budget that kept it. Scaling: mean over pairs of runs of the
    points gained per doubling of the thinking, so over runs that thought at all; pairs less than a
    tenth of a doubling apart are left out, for they would divide noise by nothing.
    """
    asked = [run for run in runs if run["method"] == "budget"]
    bound = [run for run in asked if run["max_thinking"] >= 0]
    kept = [run for run in bound if run["thinking_tokens"] <= run["max_thinking"]]
    points = sorted((math.log2(run["thinking_tokens"]), 100 * run["accuracy"])
                    for run in asked if not run["waits"] and run["thinking_tokens"] >= 1)
    slopes = [(g - f) / (b - a) for (a, f), (b, g) in itertools.combinations(points, 2)
              if b - a > 0.1]
    return {"control": 100 * len(kept) / len(bound) if bound else None,
            "scaling_points_per_doubling": statistics.fmean(slopes) if slopes else None,
            "performance": max((100 * run["accuracy"] for run in asked), default=None)}


# ---- The report -----------------------------------------------------------------------------


def line(run):
    """A run as a line of the table, with a bar of 50 characters for 100%."""
    return (f"{run['model'][:16]:16} {setting(run):18} {run['thinking_tokens']:8.1f} "
            f"{100 * run['accuracy']:6.1f}% [{100 * run['low']:5.1f}, {100 * run['high']:5.1f}] "
            f"{'█' * round(50 * run['accuracy'])}")


HEADER = f"{'model':16} {'thinking budget':18} {'thought':>8} {'right':>7} {'95% interval':14}"


def setting(run):
    """What a run asked for, in words."""
    if run["method"] == "direct":
        return "no thinking"
    budget = "unlimited" if run["max_thinking"] < 0 else str(run["max_thinking"])
    return budget + (f" + {run['waits']} Wait" if run["waits"] else "")


def side_by_side(students):
    """The accuracy of several students under the same settings, mean and spread (max - min)."""
    names = "".join(f"{runs[0]['model'][:10]:>11}" for runs in students)
    print(f"{'thinking budget':18}{names}{'mean':>11}{'spread':>8}")
    for same in zip(*students):
        right = [100 * run["accuracy"] for run in same]
        print(f"{setting(same[0]):18}" + "".join(f"{value:10.1f}%" for value in right)
              + f"{statistics.fmean(right):10.1f}%{max(right) - min(right):8.1f}")


def draw(runs, path):
    """The curve, accuracy against thinking tokens: one line a model, its Waits as triangles."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: `pip install matplotlib` draws it next time")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for number, model in enumerate(dict.fromkeys(run["model"] for run in runs)):
        mine = [run for run in runs if run["model"] == model]
        colour, style = f"C{number}", ("-", "--", ":", "-.")[number % 4]
        for waits, marker in ((False, "o"), (True, "^")):
            points = sorted((run["thinking_tokens"], run) for run in mine
                            if run["method"] == "budget" and bool(run["waits"]) == waits)
            if points:
                x = [tokens for tokens, _ in points]
                y = [100 * run["accuracy"] for _, run in points]
                bars = [[100 * (run["accuracy"] - run["low"]) for _, run in points],
                        [100 * (run["high"] - run["accuracy"]) for _, run in points]]
                axes.errorbar(x, y, bars, color=colour, linestyle="" if waits else style,
                              marker=marker,
                              capsize=3, label=f"{model}, {'with Waits' if waits else 'budgets'}")
        for run in mine:
            if run["method"] == "direct":
                axes.axhline(100 * run["accuracy"], color=colour, linestyle=":", linewidth=1,
                             label=f"{model}, no thinking")
    axes.set(xlabel="thinking tokens, mean of the answers", ylabel="right answers, %",
             ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("question", nargs="?",
        help="ask only this, and watch it think: last of --budgets, first of --waits")
    model_flags(add, nargs="+", default=["out/student"])
    add("--base", default="assets/countdown-base", help="directory to compare with, '' for none")
    add("--budgets", type=at_least(-1), nargs="+", default=[0, 16, 32, 64, 96, 128, -1],
        help="thinking tokens at most; -1 is no limit")
    add("--waits", type=at_least(0), nargs="+", default=[1, 2],
        help="how many ends of thinking become a Wait, thinking unlimited; 0 for none")
    add("--wait", nargs="+", default=["Wait"],
        help="what is appended where thinking wanted to end; several are used in turn")
    add("--grace", type=at_least(0, float), default=0.0,
        help="share of a budget by which thinking may pass it to finish its line")
    add("--max-answer", type=at_least(1), default=32, help="tokens of the answer")
    add("--part", choices=("test", "tune"), default="test",
        help="the held-out questions, or those to tune on")
    add("--n", type=at_least(1), default=500, help="how many questions")
    add("--seed", type=int, default=0, help="of the choice of questions, and of the draws")
    add("--temperature", type=at_least(0, float), default=0.0, help="0 takes the likeliest token")
    add("--slots", type=at_least(1), default=64, help="rows side by side")
    add("--max-length", type=at_least(1), default=768,
        help="tokens of a row with its prompt, which bounds 'no limit'")
    add("--overwrite", action="store_true", help="replace an evaluation that is there")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu, mps")
    return parser.parse_args()


def main():
    args = arguments()
    with complaints(BadModel):
        ask(args) if args.question else compare(args)


def ask(args):
    model, chat = load(args.model[0], args)
    length = min(args.max_length, model.config.max_position_embeddings)
    budget = Budget.of(chat, args.budgets[-1], args.waits[0], args.wait,
                       max_answer=args.max_answer, room=length)
    prompt = chat.prompt(args.question)
    refuse_too_long([prompt], length, budget.closing)
    row = stream(Sampler(model, 1, length), chat, prompt, len(chat.think), budget,
                 stops=chat.stops, seed=args.seed, temperature=args.temperature)
    thought = row.memory
    print(f"({thought.tokens} thinking tokens, {thought.waits} Wait, ended: {thought.ended})")


def compare(args):
    """Evaluate base and students over the budgets and the Waits; print, and write MODEL/eval."""
    settings = [(budget, 0) for budget in args.budgets] + [(-1, n) for n in args.waits if n]
    for directory in args.model:
        if home(directory).exists() and not args.overwrite:
            raise BadInput(f"{home(directory)} already holds an evaluation: --overwrite it")
    for directory in filter(None, [args.base, *args.model]):
        load(directory, args)            # complain about the last one now, not after the first
    questions = countdown_questions(args.part, args.n, args.seed)
    print(f"{args.n} questions to {args.part}, seed {args.seed}\n\n{HEADER}", flush=True)
    base = examine(args.base, questions, [(None, 0), *settings], args) if args.base else []
    students = []
    for directory in args.model:
        student = examine(directory, questions, settings, args)
        summary = summarise([run for run, _ in student])
        report(Path(directory).name, student, summary)
        write(home(directory), base + student, summary)
        students.append([run for run, _ in student])
        print(flush=True)
    if len(students) > 1:
        side_by_side(students)


def home(name):
    """Where the evaluation of a model is written: in its directory, of a hub id in out/NAME."""
    return (Path(name) if Path(name).is_dir() else Path("out", Path(name).name)) / "eval"


def report(name, results, summary):
    """The measures, and what each further Wait gained on the same questions."""
    print(f"\n{name}: " + ", ".join(f"{key.replace('_', ' ')} {value:.1f}"
                                    for key, value in summary.items() if value is not None))
    unlimited = {run["waits"]: rows for run, rows in results
                 if run["method"] == "budget" and run["max_thinking"] < 0}
    for fewer, more in itertools.pairwise(sorted(unlimited)):
        print("{} Wait over {}: {:+.1f} points [{:+.1f}, {:+.1f}], paired".format(
            more, fewer, *gain(unlimited[more], unlimited[fewer])))


def examine(directory, questions, settings, args):
    """All runs of one model, each printed as it is done: [(run, its rows)]. A budget None is an
    answer without thinking, which only a base can give: a student opens the thinking by itself."""
    model, chat = load(directory, args)
    sampler = Sampler(model, args.slots, min(args.max_length, model.config.max_position_embeddings))
    results = []
    for max_thinking, waits in settings:
        budget = None if max_thinking is None else Budget.of(
            chat, max_thinking, waits, args.wait, max_answer=args.max_answer,
            room=sampler.max_length)
        what = {"model": Path(directory).name, "method": "budget" if budget else "direct",
                "max_thinking": max_thinking or 0, "waits": waits, "seed": args.seed}
        rows = evaluate(sampler, chat, questions, budget, args.max_answer, args.seed,
                        args.temperature,
                        what["model"])
        results.append((measure(rows, **what), [{**what, **row} for row in rows]))
        print(line(results[-1][0]), flush=True)
    return results


def write(directory, results, summary):
    """rows.jsonl, runs.jsonl, summary.json and curve.png beside the final name, then renamed."""
    draft = directory.with_name(directory.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, objects in (("runs.jsonl", [run for run, _ in results]),
                          ("rows.jsonl", [row for _, rows in results for row in rows])):
        (draft / name).write_text("".join(json.dumps(o) + "\n" for o in objects), encoding="utf-8")
    (draft / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw([run for run, _ in results], draft / "curve.png")
    shutil.rmtree(directory, ignore_errors=True)
    draft.rename(directory)
    print(f"wrote {directory}")


if __name__ == "__main__":
    main()
