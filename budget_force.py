"""Budget forcing (s1, section 3.1), and what a longer or shorter thinking buys.

In:   models, and questions with answers (the built-in Countdown task's held-out ones).
Out:  a table in the terminal; MODEL/eval/ with rows.jsonl (an answer a row), runs.jsonl (a run a
      row), summary.json (Control, Scaling, Performance) and curve.png where there is matplotlib.

Map:  Budget      lengthens thinking with `Wait` and cuts it short: a `steer` of the sampler.
                  `__call__` forces, `left` counts
      evaluation  the paper's other methods; a set of questions in one setting: a run
      measures    intervals, Control, Scaling, Performance, what a Wait gains
      the report  table and curve
      the journal rows kept through a kill, and shared among processes
      the program
"""
import contextlib
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import typing
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import distributed
from tqdm import tqdm

from data import (SHORT, BadInput, Parser, ask_for, at_least, complaints, countdown_questions,
                  extract, grade, load_questions, local, model_flags, read_rows, row_key)
from model import BadModel
from sample import Sampler, load, sampling, sampling_flags, stream

# ---- Budget ---------------------------------------------------------------------------------


@dataclass
class Thought:
    """Where a row stands: what `Budget` keeps in `row.memory`."""
    start: int = 0                      # where thinking begins in row.tokens
    waits: int = 0                      # how often it was made to go on
    ended: str | None = None            # "natural", "cut" (budget), "context" (room), "repetition";
                                        # "none" of an answer without thinking
    tokens: int = 0                     # of thinking, once it has ended: sampled, and each `Wait`
    answer: int | None = None           # where the answer begins in row.tokens
    begin: int | None = None            # where what is sampled of it begins
    answered: str | None = None         # how the answer ended: "natural" or "cut"


@dataclass
class Budget:
    """At least `waits` times `Wait`, at most `max_thinking` tokens of thinking, then an answer.

                     wants to end, waits left: `Wait` instead
                    .------.
                    v      |
        thinking ---+------'--- wants to end -------------->  answering --> end
                    |                                             ^
                    '--- the budget is spent, the row is full, ---'
                         or it goes in circles: `Final Answer:`

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
    room: float = math.inf              # tokens of a row in all, what the sampler can hold

    def __call__(self, row, token):
        if row.memory is None:
            opened = row.prompt[len(row.prompt) - len(self.open):] == list(self.open)
            row.memory = Thought(start=0 if opened else len(self.open))
            if not opened:
                return self.open
        thought = row.memory
        if thought.ended:
            return self.go_on_answering(row, token)

        # The minimum: when it wants to end and waits are left, `Wait` goes in instead of the end.
        if end := self.wants_to_end(row, token, thought.start):
            row.withdraw(len(end) - 1)
            wait = self.wait[thought.waits % len(self.wait)]
            if thought.waits < self.waits and len(wait) <= self.left(row)[0]:
                thought.waits += 1
                row.banned = {end[0] for end in self.ends}      # it may not want to end at once
                return wait
            return self.finish(row, "natural", self.close, [])
        # The maximum: when the budget is spent, the end and `Final Answer:` go in.
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
            first = len(row.tokens) - len(end) + 1
            if first >= start and (*row.tokens[first:], token) == end:
                return end

    def left(self, row):
        """How many tokens of thinking are left, and what it is that ends them."""
        budget = math.inf
        if self.max_thinking >= 0:
            budget = self.max_thinking - (len(row.tokens) - row.memory.start)
            if budget <= 0 and (row.tokens or row.prompt)[-1] not in self.line_ends:
                budget += int(self.grace * self.max_thinking)       # to finish its line
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

    @classmethod
    def of(cls, chat, max_thinking=-1, waits=0, wait=("Wait",), final="Final Answer:", **others):
        """The budget with a chat's own delimiters."""
        if max_thinking < -1 or waits < 0 or not all(wait):
            raise BadInput("a budget is at least -1 (no limit), waits at least 0 and never empty")
        words = chat.tokenizer.decode_batch(
            [[i] for i in range(chat.tokenizer.get_vocab_size())], skip_special_tokens=False)
        return cls(max_thinking, waits, close=chat.answer, wait=[chat.text(text) for text in wait],
                   final=chat.text(final), newline=chat.text("\n"), open=chat.think,
                   line_ends=frozenset(i for i, word in enumerate(words) if word.endswith("\n")),
                   ends=frozenset(chat.ends), stop=chat.end, stops=frozenset(chat.stops), **others)


# ---- Evaluation -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What one run asks of a model: a method of METHODS and its numbers."""
    method: str
    max_thinking: int = -1              # tokens of thinking; -1 is no limit
    waits: int = 0
    samples: int = 1                    # answers to each question

    def question(self, question, step_tokens):
        """The question, with how long to think where the method asks for it."""
        kind = METHODS[self.method].asks
        limits = {"class": "short" if self.max_thinking >= 0 else "long",
                  "tokens": self.max_thinking, "steps": max(1, self.max_thinking // step_tokens)}
        return ask_for(question, kind, limits.get(kind))

    def kept(self, tokens):
        """Does this mean of thinking tokens keep to what was asked? None: nothing was. Control is
        the share of the runs that do (s1, section 3.2)."""
        if self.max_thinking >= 0 and self.method != "direct":
            return tokens <= self.max_thinking
        return tokens > SHORT if METHODS[self.method].asks == "class" else None


class Method(typing.NamedTuple):
    """A way to control thinking (s1, sections 3.1 and 3.2): another prompt, another steer, or
    another way to make one row of a question's samples."""
    asks: str | None = None             # which of KINDS the question says
    forces: bool = True                 # is the budget enforced?
    steer: type | None = Budget         # what enforces it, a class; None: there is no thinking
    fold: typing.Callable = lambda rows: rows[0]


def first_that_fits(rows):
    """Rejection sampling: the first sample that ended by itself; with none, there is no answer."""
    for tries, row in enumerate(rows, 1):
        if row["ended"] == "natural":
            return {**row, "tries": tries}
    return {**rows[-1], "tries": len(rows), "found": None, "correct": False}


def most_voted(rows):
    """Majority vote: a row with the answer that most samples gave, the earliest of equals."""
    votes = Counter(row["found"] for row in rows if row["found"] is not None).most_common(1)
    row = next(row for row in rows if not votes or row["found"] == votes[0][0])
    return {**row, "thinking_tokens": sum(row["thinking_tokens"] for row in rows)}


def any_right(rows):
    """Coverage: is one of the samples right?"""
    row = next((row for row in rows if row["correct"]), rows[0])
    return {**row, "thinking_tokens": sum(row["thinking_tokens"] for row in rows)}


METHODS = {"direct": Method(steer=None), "budget": Method(),
           "tokens": Method("tokens", False), "tokens+budget": Method("tokens"),
           "steps": Method("steps", False), "steps+budget": Method("steps"),
           "class": Method("class", False), "rejection": Method(fold=first_that_fits),
           "majority": Method(fold=most_voted), "coverage": Method(fold=any_right)}


def settings(args):
    """The runs that the flags ask for. BadInput where samples of a question would be alike."""
    limits = [{"max_thinking": n} for n in args.budgets if n > 0]
    samples = [{"samples": n} for n in args.samples]
    numbers = {"budget": [*({"max_thinking": n} for n in args.budgets),
                          *({"waits": n} for n in args.waits if n)],
               "class": [{"max_thinking": SHORT}, {}], "majority": samples, "coverage": samples,
               "rejection": [{**limit, "samples": args.tries} for limit in limits]}
    asked = [Setting(method, **run) for method in args.method
             for run in numbers.get(method, limits)]
    if not asked:
        raise BadInput("these methods need one of --budgets above 0")
    if args.temperature == 0 and any(setting.samples > 1 for setting in asked):
        raise BadInput("several answers to a question differ only with a --temperature above 0")
    return asked


def evaluate(sampler, chat, questions, setting, args, name=""):
    """Ask `questions` {index: question} in one setting; yield (index, row) as each is answered.

    Only what follows the first end of thinking is graded.
    """
    method = METHODS[setting.method]
    budget = method.steer and method.steer.of(
        chat, setting.max_thinking if method.forces else -1, setting.waits, args.wait,
        max_answer=args.max_answer, grace=args.grace, repeats=args.repeats, room=sampler.max_length)
    prompts = [chat.prompt(setting.question(question["question"], args.step_tokens),
                           thinking=budget is not None) for question in questions.values()]
    refuse_too_long(prompts, sampler.max_length, budget.closing if budget else args.max_answer)
    answers = sampler.generate(
        prompts, budget, setting.samples, None if budget else args.max_answer, chat.stops,
        **sampling(args))
    places, samples = list(questions), defaultdict(dict)
    for row in tqdm(answers, desc=name, total=len(prompts) * setting.samples, unit="row",
                    leave=False, disable=None, dynamic_ncols=True):
        index = places[row.index]
        samples[index][row.sample] = result(row, chat, questions[index])
        if len(samples[index]) == setting.samples:
            yield index, method.fold([row for _, row in sorted(samples.pop(index).items())])


def result(row, chat, question):
    """What a finished row says: its answer, its verdict, and how it came about."""
    thought = row.memory or Thought(ended="none", answer=0)
    answer = chat.decode(row.tokens[thought.answer:len(row.tokens) - (row.finish == "stop")])
    return {**question, "text": chat.decode(row.tokens), "found": extract(answer),
            "correct": grade(answer, question["answer"]), "thinking_tokens": thought.tokens,
            "extensions": thought.waits, "ended": thought.ended,
            "answered": thought.answered or row.finish, "finish": row.finish,
            "forced": spans(row.forced), "tokens": len(row.tokens)}


def spans(forced):
    """Where it is True, as [begin, end): [F, T, T, F, T] is [[1, 3], [4, 5]]."""
    edges = [i for i, (a, b) in enumerate(itertools.pairwise([False, *forced, False])) if a != b]
    return [list(edge) for edge in zip(edges[::2], edges[1::2])]


def refuse_too_long(prompts, length, closing):
    """BadInput where a prompt leaves no room for an answer."""
    longest = max(map(len, prompts), default=0)
    if longest + closing > length:
        raise BadInput(f"a question of {longest} tokens and its answer of {closing} do not fit "
                       f"into {length} (--max-length)")


# ---- Measures -------------------------------------------------------------------------------


def measure(rows, **what):
    """One run in numbers; the interval is Wilson's, 95%. Without an answer a row is wrong."""
    n, correct = len(rows), sum(row["correct"] for row in rows)
    low, high = wilson(correct, n)
    return {**what, "n": n, "correct": correct, "accuracy": correct / n, "low": low, "high": high,
            "thinking_tokens": statistics.fmean(row["thinking_tokens"] for row in rows),
            "unanswered": sum(row["found"] is None for row in rows)}


def wilson(correct, n, z=1.96):
    p = correct / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def gain(rows, others, z=1.96):
    """Points that `rows` gained over `others`, question by question: mean, 95% interval, and the p
    of an exact sign test on the questions that only one of them has right (McNemar's)."""
    points = 100 * np.array([float(a["correct"]) - b["correct"] for a, b in zip(rows, others)])
    mean, half = points.mean(), z * points.std() / math.sqrt(len(points))
    either, fewer = np.count_nonzero(points), min((points > 0).sum(), (points < 0).sum())
    tail = sum(math.comb(either, k) for k in range(fewer + 1))
    return mean, mean - half, mean + half, min(1.0, 2 * tail / 2 ** either)


def scaling(tokens, accuracy, axis=math.log2, least=0.1):
    """Mean over pairs of runs of the points gained per doubling (s1, section 3.2). Over runs that
    thought at all; pairs less than a tenth of a doubling apart are left out, for they would divide
    noise by nothing."""
    points = sorted((a, 100 * f) for a, f in zip(tokens, accuracy) if a >= 1)
    slopes = [(g - f) / (axis(b) - axis(a)) for (a, f), (b, g) in itertools.combinations(points, 2)
              if math.log2(b / a) > least]
    return statistics.fmean(slopes) if slopes else None


def summarise(results, resamples=500):
    """Control, Scaling and Performance (s1, section 3.2) of one method's runs, [(run, its rows)].

    Control: share of the runs with a budget that kept it. Scaling: see there; Waits are left out.
    Performance: the best run. The intervals are those of the bootstrap: questions drawn anew.
    """
    kept = [run["kept"] for run, _ in results if run["kept"] is not None]
    plain = [not run["waits"] for run, _ in results]
    correct, tokens = (np.array([[row[key] for row in rows] for _, rows in results], float)
                       for key in ("correct", "thinking_tokens"))          # (runs, questions)

    def of(draw):
        right, thought = correct[:, draw].mean(1), tokens[:, draw].mean(1)
        points = thought[plain], right[plain]
        return {"scaling_points_per_doubling": scaling(*points),
                "scaling_points_per_1000_tokens": scaling(*points, lambda a: a / 1000),
                "performance": 100 * right.max()}
    n = correct.shape[1]
    found = of(slice(None))
    again = [of(draw) for draw in np.random.default_rng(0).integers(0, n, (resamples, n))]
    for name in [name for name in found if found[name] is not None]:
        values = [one[name] for one in again if one[name] is not None]
        found[f"{name}_interval"] = np.percentile(values, (2.5, 97.5)).round(2).tolist()
    return {"control": 100 * sum(kept) / len(kept) if kept else None, **found}


# ---- The report -----------------------------------------------------------------------------

HEADER = f"{'model':16} {'thinking budget':18} {'thought':>8} {'right':>7} {'95% interval':14}"


def line(run):
    """A run as a line of the table, with a bar of 50 characters for 100%."""
    return (f"{run['model'][:16]:16} {in_words(run):18} {run['thinking_tokens']:8.1f} "
            f"{100 * run['accuracy']:6.1f}% [{100 * run['low']:5.1f}, {100 * run['high']:5.1f}] "
            f"{'█' * round(50 * run['accuracy'])}")


def in_words(run):
    """What a run asked for."""
    method, limit = run["method"], run["max_thinking"]
    asked = {"direct": "no thinking", "class": "long" if limit < 0 else "short"}
    if method in ("majority", "coverage"):
        asked[method] = f"of {run['samples']}"
    budget = asked.get(method, "unlimited" if limit < 0 else str(limit))
    waits = f" + {run['waits']} Wait" if run["waits"] else ""
    return ("" if method in ("direct", "budget") else f"{method}: ") + budget + waits


def side_by_side(students):
    """The accuracy of several students under the same settings, mean and spread (max - min)."""
    names = "".join(f"{runs[0]['model'][:10]:>11}" for runs in students)
    print(f"{'thinking budget':18}{names}{'mean':>11}{'spread':>8}")
    for same in zip(*students):
        right = [100 * run["accuracy"] for run in same]
        print(f"{in_words(same[0]):18}" + "".join(f"{value:10.1f}%" for value in right)
              + f"{statistics.fmean(right):10.1f}%{max(right) - min(right):8.1f}")


def report(name, results):
    """The measures of each method, and what each further Wait gained on the same questions."""
    summaries = {}
    print(f"\n{name:22} control  points per doubling     per 1,000 tokens  best run")
    for method in dict.fromkeys(run["method"] for run, _ in results):
        found = summaries[method] = summarise([r for r in results if r[0]["method"] == method])
        control = "-" if found["control"] is None else f"{found['control']:.0f}"
        print(f"{method:22} {control:>7} {cell(found, 'scaling_points_per_doubling'):>20} "
              f"{cell(found, 'scaling_points_per_1000_tokens'):>20} {found['performance']:8.1f}%")
    unlimited = {run["waits"]: rows for run, rows in results
                 if run["method"] == "budget" and run["max_thinking"] < 0}
    for fewer, more in itertools.pairwise(sorted(unlimited)):
        print("{} Wait over {}: {:+.1f} points [{:+.1f}, {:+.1f}], paired, p = {:.2g}".format(
            more, fewer, *gain(unlimited[more], unlimited[fewer])))
    return {**next(iter(summaries.values())), "methods": summaries}


def cell(found, name):
    """A measure and its interval; a single run has no Scaling."""
    if found[name] is None:
        return "-"
    return "{:.1f} [{:.1f}, {:.1f}]".format(found[name], *found[f"{name}_interval"])


# Okabe and Ito's, which the colour-blind tell apart; lines and marks differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw(runs, path):
    """Accuracy against thinking tokens: a line a model and method, triangles for Waits."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: `pip install matplotlib`, then --draw with its runs.jsonl")
        return
    groups = defaultdict(list)
    for run in runs:
        groups[run["model"], run["method"], run["waits"] > 0].append(
            [run[key] for key in ("thinking_tokens", "accuracy", "low", "high")])
    names = sorted(dict.fromkeys(key[:2] for key in groups), key=lambda name: name[1] == "direct")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for (model, method, waits), points in groups.items():
        tokens, right, *ends = np.array(sorted(points)).T * [[1], [100], [100], [100]]
        number = names.index((model, method))
        colour, style = COLOURS[number % 7], ("-", "--", ":", "-.")[number % 4]
        if method == "direct":
            axes.axhline(right[0], color=colour, linestyle=":", linewidth=1,
                         label=f"{model}, no thinking")
            continue
        label = model + ("" if method == "budget" else f", {method}")
        axes.errorbar(tokens, right, abs(ends - right), color=colour, capsize=3,
                      linestyle="" if waits else style,
                      marker="^" if waits else "osDvP"[number % 5],
                      label=f"{label}, with Waits" if waits else label)
    axes.set(xlabel="thinking tokens, mean of the answers", ylabel="right answers, %",
             ylim=(0, 103))                     # a mark at 100% is seen whole
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def draw_again(paths):
    """Table and curve from runs.jsonl files alone; curve.png goes beside the first."""
    runs = [run for path in paths for _, run in read_rows(path)]
    try:
        print(HEADER, *map(line, runs), sep="\n")
        draw(runs, Path(paths[0]).with_name("curve.png"))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadInput(f"no runs.jsonl of an evaluation: {error!r}") from None


# ---- The journal ----------------------------------------------------------------------------


class Journal:
    """Rows on the disk as they come, a line [index, row] each: a killed evaluation goes on where it
    stopped, and processes share out its questions.

    A run and a process have a file, RUN.RANK.jsonl; every process reads those of all. BadInput
    where the directory holds a part of an evaluation with other arguments.
    """

    def __init__(self, directory, arguments, overwrite):
        self.directory, self.runs = directory, itertools.count()
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        said = directory / "arguments.json"
        text = json.dumps(arguments, indent=2, default=str) + "\n"
        if self.rank == 0:
            if said.is_file() and said.read_text(encoding="utf-8") != text:
                if not overwrite:
                    raise BadInput(f"{directory} holds a part of an evaluation with other "
                                   f"arguments or weights: --overwrite it")
                shutil.rmtree(directory)
            directory.mkdir(parents=True, exist_ok=True)
            said.write_text(text, encoding="utf-8")
        wait_for_all()

    def complete(self, questions, answer):
        """The rows of the next run, one for each of the questions. What is missing of this
        process's share is asked: answer({index: question}) yields (index, row)."""
        run = next(self.runs)
        done = self.rows(run)
        mine = {i: question for i, question in enumerate(questions)
                if i not in done and i % self.world == self.rank}
        with open(self.directory / f"{run}.{self.rank}.jsonl", "a", encoding="utf-8") as file:
            for index, row in answer(mine):
                # A kill may have torn the last line, so the line break comes first.
                file.write("\n" + json.dumps([index, row]))
                file.flush()
        wait_for_all()
        rows = self.rows(run)
        return [rows[i] for i in range(len(questions))]

    def rows(self, run):
        """{index: row} of all processes."""
        rows = {}
        for path in self.directory.glob(f"{run}.*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):       # torn
                    rows.update([json.loads(line)])
        return rows


def wait_for_all():
    if distributed.is_initialized():
        distributed.barrier()


# ---- The program ----------------------------------------------------------------------------


def arguments():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("question", nargs="?", help="only this, watched: last of --budgets, first of --waits")
    model_flags(add, nargs="+", default=["out/student"])
    add("--base", default="assets/countdown-base", help="directory to compare with, '' for none")
    add("--method", nargs="+", choices=[m for m in METHODS if m != "direct"], default=["budget"],
        help="how thinking is controlled; tokens, steps and class ask for it in the question")
    add("--budgets", type=at_least(-1), nargs="+", default=[0, 16, 32, 64, 96, 128, -1],
        help="thinking tokens at most; -1 is no limit")
    add("--waits", type=at_least(0), nargs="+", default=[1, 2],
        help="how many ends of thinking become a Wait, thinking unlimited; 0 for none")
    add("--wait", nargs="+", default=["Wait"], help="what goes in there; several in turn")
    add("--grace", type=at_least(0, float), default=0.0,
        help="share of a budget by which thinking may pass it to finish its line")
    add("--max-answer", type=at_least(1), default=32, help="tokens of the answer")
    add("--samples", type=at_least(1), nargs="+", default=[1, 2, 4, 8],
        help="answers to a question, for majority and coverage")
    add("--tries", type=at_least(1), default=8, help="for rejection: answers drawn at most")
    add("--step-tokens", type=at_least(1), default=40, help="for steps: tokens that one counts")
    add("--questions", help="file of questions and answers (default: Countdown's)")
    add("--part", choices=("test", "tune"), default="test", help="Countdown: held out, or to tune")
    add("--n", type=at_least(1), help="how many questions (default: Countdown 500, a file all)")
    add("--slots", type=at_least(1), default=64, help="rows side by side")
    add("--max-length", type=at_least(1), default=768,
        help="tokens of a row with its prompt, which bounds 'no limit'")
    add("--overwrite", action="store_true", help="replace an evaluation that is there")
    add("--draw", nargs="+", metavar="RUNS", help="only table and curve, of these runs.jsonl")
    sampling_flags(add)
    return parser.parse_args()


def main():
    args = arguments()
    with complaints(BadModel):
        if args.draw:
            draw_again(args.draw)
        elif args.question:
            ask(args)
        else:
            compare(args)


def ask(args):
    model, chat = load(args.model[0], args)
    length = min(args.max_length, model.config.max_position_embeddings)
    budget = Budget.of(chat, args.budgets[-1], args.waits[0], args.wait, grace=args.grace,
                       repeats=args.repeats, max_answer=args.max_answer, room=length)
    prompt = chat.prompt(args.question)
    refuse_too_long([prompt], length, budget.closing)
    row = stream(Sampler(model, 1, length, args.compile), chat, prompt, len(chat.think), budget,
                 held=max(map(len, budget.ends)) - 1, stops=chat.stops, **sampling(args))
    thought = row.memory
    print(f"({thought.tokens} thinking tokens, {thought.waits} Wait, ended: {thought.ended})")


def compare(args):
    """Evaluate base and students in all settings; print, and write MODEL/eval."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:                # torchrun
        distributed.init_process_group("gloo")
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    asked, models = settings(args), [*filter(None, [args.base]), *args.model]
    draft = home(args.model[0]).with_name("eval.draft")         # there after a kill: see Journal
    for directory in args.model:
        if home(directory).exists() and not args.overwrite and not draft.exists():
            raise BadInput(f"{home(directory)} already holds an evaluation: --overwrite it")
    for directory in models:
        load(directory, args)            # complain about the last one now, not after the first
    questions = (load_questions(args.questions, args.seed)[:args.n] if args.questions
                 else countdown_questions(args.part, args.n or 500, args.seed))
    journal = Journal(draft, identity(args, models, questions), args.overwrite)
    if journal.rank > 0:
        sys.stdout = open(os.devnull, "w")                      # one of them speaks
    print(f"{len(questions)} questions to {args.questions or args.part}, seed {args.seed}\n\n"
          f"{HEADER}", flush=True)
    base, students = [], []
    if args.base:                        # a student opens the thinking by itself: no direct answers
        every = [Setting("direct", 0), *asked]
        base = examine(args.base, questions, every, args, journal)
    for directory in args.model:
        student = examine(directory, questions, asked, args, journal)
        summary = report(Path(directory).name, student)
        students.append([run for run, _ in student])
        if journal.rank == 0:
            write(home(directory), base + student, summary)
        print(flush=True)
    if len(students) > 1:
        side_by_side(students)
    wait_for_all()                       # until all have read it
    if journal.rank == 0:
        shutil.rmtree(journal.directory)


def home(name):
    """Where the evaluation of a model is written: in its directory, of a hub id in out/NAME."""
    return (Path(name) if Path(name).is_dir() else Path("out", Path(name).name)) / "eval"


def identity(args, models, questions):
    """All that makes an evaluation this one: its arguments, its questions, and the weights."""
    weights = [[path.name, path.stat().st_size, path.stat().st_mtime_ns]
               for name in models for path in sorted(Path(local(name)).glob("*.safetensors"))]
    said = {key: value for key, value in vars(args).items() if key not in ("overwrite", "device")}
    return {**said, "asked": row_key(questions), "weights": weights}


def examine(directory, questions, asked, args, journal):
    """All runs of one model, each printed as it is done: [(run, its rows)]."""
    model, chat = load(directory, args)
    length = min(args.max_length, model.config.max_position_embeddings)
    sampler = Sampler(model, args.slots, length, args.compile)
    results, name = [], Path(directory).name
    for setting in asked:
        rows = journal.complete(
            questions, lambda mine: evaluate(sampler, chat, mine, setting, args, name))
        what = {"model": name, **asdict(setting), "seed": args.seed}
        run = measure(rows, **what)
        run["kept"] = setting.kept(run["thinking_tokens"])
        results.append((run, [what | row for row in rows]))
        print(line(run), flush=True)
    return results


def write(directory, results, summary):
    """rows.jsonl, runs.jsonl, summary.json and curve.png beside the final name, then renamed."""
    draft = directory.with_name(directory.name + ".new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    runs, rows = zip(*results)
    for name, objects in (("runs.jsonl", runs), ("rows.jsonl", itertools.chain(*rows))):
        (draft / name).write_text("".join(json.dumps(o) + "\n" for o in objects), encoding="utf-8")
    (draft / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw(runs, draft / "curve.png")
    shutil.rmtree(directory, ignore_errors=True)
    draft.rename(directory)
    print(f"wrote {directory}")


if __name__ == "__main__":
    main()
