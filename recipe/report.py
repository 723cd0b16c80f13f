"""What an evaluation shows: intervals, Control, Scaling, Performance; tables, page and figure.

`rows` are the answers of a model in one setting, one dict per question, in the same order for all
that are compared. A `run` is a dict that sums up such rows: see `measure`.
"""
import itertools
import json
import math
import os.path
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

# ---- Runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a run asks of a model: a method of budget_force.METHODS and its numbers."""
    method: str
    max_thinking: int = -1              # tokens; -1 is no limit
    min_thinking: int = 0
    num_waits: int = 0
    samples: int = 1                    # per question

    def within_budget(self, tokens: float) -> bool | None:
        """Returns whether a mean of thinking tokens keeps the limit; None without a limit."""
        if self.method == "direct" or (self.max_thinking < 0 and not self.min_thinking):
            return None
        return tokens > self.min_thinking if self.min_thinking else tokens <= self.max_thinking


def measure(rows: list[dict], model: str, setting: Setting, seed: int) -> dict:
    """Returns the run of these rows. A row without an answer counts as wrong."""
    n, correct = len(rows), sum(row["correct"] for row in rows)
    tokens = statistics.fmean(row["thinking_tokens"] for row in rows)
    low, high = wilson(correct, n)
    return {"model": model, **asdict(setting), "seed": seed, "n": n, "correct": correct,
            "accuracy": correct / n, "low": low, "high": high, "thinking_tokens": tokens,
            "cut": sum(row["answered"] == "cut" for row in rows),
            "unanswered": sum(row["found"] is None for row in rows),
            "within_budget": setting.within_budget(tokens)}


def forced_spans(tokens: list[int], forced: list[bool], decode: Callable) -> list[list[int]]:
    """Returns [start, end] of each forced part of the decoded text, in characters."""
    text, position, end, spans = decode(tokens), 0, 0, []
    for is_forced, run in itertools.groupby(forced):
        position, start = position + len(list(run)), end
        # A character that the next token completes is not in the text so far.
        end = len(os.path.commonprefix([decode(tokens[:position]), text]))
        if is_forced:
            spans.append([start, end])
    return spans


def graders(questions: list[dict], grader_name: str) -> list[str]:
    """Returns who judges the answers: a task's own checker where references are objects."""
    names = {dict: "the task's checker", str: grader_name}
    return sorted({names[type(question["answer"])] for question in questions})


def rejection(samples: list[dict]) -> dict:
    """Rejection sampling: the first sample that ended by itself; without one, no answer."""
    for tries, row in enumerate(samples, 1):
        if row["ended"] == "natural":
            return {**row, "tries": tries}
    none = {"found": None, "correct": False, "answered": "none"}
    return {**samples[-1], "tries": len(samples), **none}


def majority(samples: list[dict], equal) -> dict:
    """Majority vote: the first sample with the answer that most samples have, by `equal`."""
    found = [row["found"] for row in samples]
    votes = [answer is not None and sum(other is not None and equal(answer, other)
                                        for other in found) for answer in found]
    row = samples[votes.index(max(votes))]
    return {**row, "thinking_tokens": sum(row["thinking_tokens"] for row in samples)}


def coverage(samples: list[dict]) -> dict:
    """Coverage: a correct sample, if there is one, else one with an answer."""
    row = max(samples, key=lambda row: (row["correct"], row["found"] is not None))
    return {**row, "thinking_tokens": sum(row["thinking_tokens"] for row in samples)}


# ---- Measures -------------------------------------------------------------------------------

MEASURES = {"control": "control", "per doubling": "scaling_points_per_doubling",
            "best run": "performance"}


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Returns Wilson's 95% interval of an accuracy, between 0 and 1."""
    p = correct / n
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (center - half) / (1 + z * z / n)), min(1.0, (center + half) / (1 + z * z / n))


def paired_gain(rows, others, z: float = 1.96) -> tuple[float, float, float, float]:
    """Returns what `rows` gain over `others`, question by question: the mean in percentage points,
    its 95% interval, and p of an exact sign test on the verdicts that differ (McNemar's)."""
    pairs = zip(rows, others, strict=True)
    points = 100 * np.array([float(a["correct"]) - b["correct"] for a, b in pairs])
    mean, half = points.mean(), z * points.std() / math.sqrt(len(points))
    gained, lost = int((points > 0).sum()), int((points < 0).sum())     # ints of any size
    differ = gained + lost
    tail = sum(math.comb(differ, k) for k in range(min(gained, lost) + 1))
    return mean, mean - half, mean + half, min(1.0, 2 * tail / 2 ** differ)


def scaling(tokens, accuracy, axis=math.log2, min_doublings: float = 0.1) -> float | None:
    """Returns s1's Scaling (section 3.2): the mean slope over all pairs of runs, in percentage
    points per unit of `axis`; None without a pair.

    The paper writes it per token, but its printed tables reproduce only per doubling, the default
    here. Runs without thinking are left out, and pairs closer than `min_doublings`: they would
    divide noise by almost nothing.
    """
    points = sorted((a, 100 * f) for a, f in zip(tokens, accuracy, strict=True) if a >= 1)
    slopes = [(g - f) / (axis(b) - axis(a)) for (a, f), (b, g) in itertools.combinations(points, 2)
              if math.log2(b / a) > min_doublings]
    return statistics.fmean(slopes) if slopes else None


def summarize(results, resamples: int = 500) -> dict:
    """Returns Control, Scaling and Performance (s1, section 3.2) of a method's [(run, rows)].

    Control is the share of the runs with a budget that kept it. Scaling is over the runs without
    Waits. Performance is the accuracy of the best run. The 95% intervals bootstrap the questions.
    """
    within = [run["within_budget"] for run, _ in results if run["within_budget"] is not None]
    no_waits = [not run["num_waits"] for run, _ in results]
    correct, tokens = (np.array([[row[key] for row in rows] for _, rows in results], float)
                       for key in ("correct", "thinking_tokens"))          # (runs, questions)

    def measures(questions):
        accuracy, thinking = correct[:, questions].mean(1), tokens[:, questions].mean(1)
        points = thinking[no_waits], accuracy[no_waits]
        return {"scaling_points_per_doubling": scaling(*points),
                "scaling_points_per_1000_tokens": scaling(*points, axis=lambda a: a / 1000),
                "performance": 100 * accuracy.max()}

    n = correct.shape[1]
    summary = measures(slice(None))
    draws = [measures(draw) for draw in np.random.default_rng(0).integers(0, n, (resamples, n))]
    for name in [name for name in summary if summary[name] is not None]:
        values = [draw[name] for draw in draws if draw[name] is not None]
        summary[f"{name}_interval"] = np.percentile(values, (2.5, 97.5)).round(2).tolist()
    return {"control": 100 * sum(within) / len(within) if within else None, **summary}


# ---- Tables ---------------------------------------------------------------------------------


def header(width: int = 16) -> str:
    """Returns the table's first line; `width` is that of the longest model name."""
    return f"{'model':{width}} thinking budget     thought   right 95% interval      cut   none"


def table_row(run: dict, width: int = 16) -> str:
    """Returns a run as a line of the table; a bar of 25 characters is 100%."""
    cut, none = (f"{run[key] / run['n']:.1%}" if key in run else "-"    # older runs lack "cut"
                 for key in ("cut", "unanswered"))
    return (f"{run['model']:{width}} {setting_name(run):18} {run['thinking_tokens']:8.1f} "
            f"{100 * run['accuracy']:6.1f}% [{100 * run['low']:5.1f}, {100 * run['high']:5.1f}] "
            f"{cut:>6} {none:>6} {'█' * round(25 * run['accuracy'])}")


def setting_name(run: dict) -> str:
    """Returns what the run asked for, as "64", "unlimited + 1 Wait" or "class: short"."""
    method, limit = run["method"], run["max_thinking"]
    if method == "direct":
        return "no thinking"
    budget = "unlimited" if limit < 0 else str(limit)
    if method == "class":
        budget = "long" if limit < 0 else "short"
    elif method in ("majority", "coverage"):
        budget = f"of {run['samples']}"
    waits = f" + {run['num_waits']} Wait" if run["num_waits"] else ""
    return ("" if method == "budget" else f"{method}: ") + budget + waits


def print_summary(results) -> dict:
    """Prints the measures of a model and what each Wait gained; returns {method: measures}."""
    summaries, model = {}, results[0][0]["model"]
    print(f"\n{model:22} control  points per doubling     per 1,000 tokens  best run")
    for method in dict.fromkeys(run["method"] for run, _ in results):
        of_method = [result for result in results if result[0]["method"] == method]
        summary = summaries[method] = summarize(of_method)
        control = "-" if summary["control"] is None else f"{summary['control']:.0f}"
        slopes = [with_interval(summary, f"scaling_points_per_{unit}")
                  for unit in ("doubling", "1000_tokens")]
        print(f"{method:22} {control:>7} {slopes[0]:>20} {slopes[1]:>20} "
              f"{summary['performance']:8.1f}%")
    unlimited = {run["num_waits"]: rows for run, rows in results
                 if run["method"] == "budget" and run["max_thinking"] < 0}
    for fewer, more in itertools.pairwise(sorted(unlimited)):
        print("{} Wait over {}: {:+.1f} points [{:+.1f}, {:+.1f}], paired, p = {:.2g}".format(
            more, fewer, *paired_gain(unlimited[more], unlimited[fewer])))
    return summaries


def with_interval(summary: dict, name: str) -> str:
    if summary[name] is None:                   # a single run has no Scaling
        return "-"
    return "{:.1f} [{:.1f}, {:.1f}]".format(summary[name], *summary[f"{name}_interval"])


def print_side_by_side(models, summaries) -> None:
    """Prints the accuracies and measures of several models, their mean and max - min. `models` has
    the runs of each, `summaries` its {method: measures}."""
    lines = [(setting_name(runs[0]), "%", [100 * run["accuracy"] for run in runs])
             for runs in zip(*models, strict=True)]
    for method, (measure, key) in itertools.product(summaries[0], MEASURES.items()):
        values = [summary[method][key] for summary in summaries]
        if None not in values:
            lines.append((f"{method}: {measure}", " ", values))
    names = [runs[0]["model"] for runs in models]
    first = max(18, *(len(name) for name, _, _ in lines))
    width = max(10, *map(len, names)) + 1
    columns = "".join(f"{name:>{width}}" for name in names)
    print(f"\n{'thinking budget':{first}}{columns}{'mean':>11}{'spread':>8}")
    for name, unit, values in lines:
        print(f"{name:{first}}" + "".join(f"{value:{width - 1}.1f}{unit}" for value in values)
              + f"{statistics.fmean(values):10.1f}{unit}{max(values) - min(values):8.1f}")


def finish(results, out, graders: list[str], base: str | None = None) -> None:
    """Prints the measures of each model; writes runs.jsonl, summary.json, report.html, curve.png.

    `results` lists the (run, rows) of all models. The model labelled `base` is there to compare
    with and has no measures of its own.
    """
    results = [({**run, "base": run["model"] == base}, rows) for run, rows in results]
    groups = [list(group) for _, group in itertools.groupby(results, lambda pair: pair[0]["model"])]
    groups = [group for group in groups if not group[0][0]["base"]]
    summary = {"graders": graders, "models": {}}
    for group in groups:
        summary["models"][group[0][0]["model"]] = print_summary(group)
    if len(groups) > 1:
        print_side_by_side([[run for run, _ in group] for group in groups],
                           list(summary["models"].values()))
    runs = [run for run, _ in results]
    lines = "".join(json.dumps(run) + "\n" for run in runs)
    (out / "runs.jsonl").write_text(lines, encoding="utf-8")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_page(results, out / "report.html")
    draw(runs, out / "curve.png")
    print(f"wrote {out}")


def redraw(runs: list[dict], out) -> None:
    """Prints the table of runs that were read from runs.jsonl files, and draws curve.png."""
    try:
        width = max(16, *(len(run["model"]) for run in runs))
        print(header(width), *(table_row(run, width) for run in runs), sep="\n")
        draw(runs, out / "curve.png")
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"not a runs.jsonl of an evaluation: {error!r}") from None


# ---- Page -----------------------------------------------------------------------------------


def write_page(results, path: Path) -> None:
    """Writes a page with the curve, the runs and all answers; it loads nothing from elsewhere."""
    page = {"runs": [{**run, "setting": setting_name(run)} for run, _ in results],
            "rows": [rows for _, rows in results]}
    # Written as an escape, no "<" in a text can end the script element around the JSON.
    text = json.dumps(page).replace("<", "\\u003c")
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    path.write_text(template.replace("{{page}}", text), encoding="utf-8")


# ---- Figure ---------------------------------------------------------------------------------

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw(runs, path) -> None:
    """Draws accuracy against thinking tokens: a line per model and method, triangles for Waits.

    An accuracy without thinking is a horizontal line, all that is drawn of the base.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: `pip install matplotlib`, then --draw with its runs.jsonl")
        return
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    lines = defaultdict(list)
    for run in runs:
        if run["method"] == "direct":
            height = 100 * run["accuracy"]
            axes.axhline(height, color="0.5", linestyle="--", linewidth=1)
            axes.annotate(f"{run['model']}, no thinking", (0.99, height), (0, 4), ha="right",
                          xycoords=("axes fraction", "data"), textcoords="offset points")
        elif not run.get("base"):
            method = "" if run["method"] == "budget" else f", {run['method']}"
            lines[run["model"] + method].append(run)
    num_waited = sum(any(run["num_waits"] for run in group) for group in lines.values())
    for number, (label, group) in enumerate(lines.items()):
        style = {"color": COLOURS[number % 7], "capsize": 3}
        waits = [run for run in group if run["num_waits"]]
        budgets = [run for run in group if not run["num_waits"]]
        unlimited = [run for run in group if run["max_thinking"] < 0]
        plot_runs(axes, budgets, label=label, fmt=("o-", "o--", "o-.")[number // 7 % 3], **style)
        plot_runs(axes, waits, fmt="^", **style)
        plot_runs(axes, unlimited if waits else [], fmt=":", **style)
        for run in waits if num_waited == 1 else ():        # the labels of several overlap
            text = "1 Wait" if run["num_waits"] == 1 else f"{run['num_waits']} Waits"
            axes.annotate(text, (run["thinking_tokens"], 100 * run["accuracy"]), (0, -18),
                          ha="center", textcoords="offset points")
    axes.set(xlabel="thinking tokens, mean of the answers", ylabel="right answers, %")
    if any(run["max_thinking"] >= 0 for run in runs):
        axes.set(xlim=(0, None), ylim=(0, 103))     # so that a marker at 100% is seen whole
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    # More than seven names leave no room for the lines, so they stand beside the axes.
    place, loc = (figure, "outside right upper") if len(lines) > 7 else (axes, "lower right")
    place.legend(loc=loc, frameon=False)
    figure.set_size_inches(10 if place is figure else 7, max(4.2, 0.23 * len(lines)))
    figure.savefig(path, dpi=150)


def plot_runs(axes, runs, **style) -> None:
    """Plots runs in the order of their thinking tokens, with intervals."""
    points = sorted([run[key] for key in ("thinking_tokens", "accuracy", "low", "high")]
                    for run in runs)
    if points:
        tokens, accuracy, *ends = np.array(points).T * [[1], [100], [100], [100]]
        axes.errorbar(tokens, accuracy, abs(ends - accuracy), **style)
