"""Choose the traces to train on: from many thousand to one thousand (s1, section 2.2).

    python -m recipe.selection --pool traces.jsonl --benchmarks math500.json \
        --verdicts out/base/rows.jsonl --n 1000 --out s1k.jsonl
"""
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from recipe import cli, grading, rows


def select(pool: list[dict], benchmarks: list[str], solved: set[str], args) -> list[dict]:
    """Returns at most args.n rows of the pool; the column `stage` says what chose each."""
    stages = {"decontamination": decontamination(benchmarks, args.ngram), "quality": quality}
    if args.method == "s1k":                    # the paper's ablations leave it out
        stages["difficulty"] = difficulty(solved)
    for name, stage in stages.items():
        reasons = [stage(row) for row in pool]
        pool = [row for row, reason in zip(pool, reasons, strict=True) if reason is None]
        dropped = Counter(filter(None, reasons)).most_common()
        print(f"{name}: {len(pool):,} left" + "".join(f"; {n:,} {why}" for why, n in dropped))

    pool = sorted(pool, key=lambda row: (-len(row["thinking"]), row["question"]))
    # s1 begins with all correct and long traces of sources like the benchmarks, and draws the rest.
    seeds = [row for row in pool if args.method == "s1k" and row["source"] in args.sources
             and row["correct"] and len(row["thinking"]) >= args.seed_length][:args.n]
    rest = [row for row in pool if row not in seeds]
    rng = random.Random(f"choose {args.method} {args.seed}")
    drawn = METHODS[args.method](rest, args.n - len(seeds), rng)
    stage = "diversity" if args.method == "s1k" else args.method
    print(f"chosen: {len(seeds):,} by seed, {len(drawn):,} by {stage}")
    return [row | {"stage": "seed"} for row in seeds] + [row | {"stage": stage} for row in drawn]


def draw_by_domain(pool: list[dict], n: int, rng: random.Random, by_length=True) -> list[dict]:
    """Draws a domain uniformly, then one of its rows, until there are n. With `by_length` a row is
    half as likely as the next longer one of its domain."""
    names = sorted({row["domain"] for row in pool})
    domains, drawn = {name: [row for row in pool if row["domain"] == name] for name in names}, []
    while domains and len(drawn) < n:
        name = rng.choice(list(domains))
        ranks = range(min(50, len(domains[name])) if by_length else len(domains[name]))
        rank, = rng.choices(ranks, [2.0 ** -rank if by_length else 1 for rank in ranks])
        drawn.append(domains[name].pop(rank))
        if not domains[name]:
            del domains[name]
    return drawn


# How n rows are drawn from a pool that is sorted by length, the longest first.
METHODS = {
    "s1k": draw_by_domain,
    "random": lambda pool, n, rng: rng.sample(pool, min(n, len(pool))),
    "longest": lambda pool, n, rng: pool[:n],
    "diverse": lambda pool, n, rng: draw_by_domain(pool, n, rng, by_length=False),
    "full": lambda pool, n, rng: pool,
}


# ---- Stages: functions of a row that return why it is dropped, or None ----------------------

ERROR = re.compile(r"^\s*(error\b|<html)|\b(APIError|RateLimitError|internal server error)\b", re.I)
IMAGE = re.compile(r"!\[|<image|\[asy\]|\\includegraphics|\bshown in the (figure|diagram|picture)"
                   r"|\b(figure|diagram|image|graph|picture)\s+(below|above|shown|attached)", re.I)
DRAWING = re.compile(r"(?:^[-|/\\_+*=.<>^ \t]{4,}$\n?){3}", re.M)


def decontamination(benchmarks: list[str], n: int) -> Callable[[dict], str | None]:
    """Drops a question that shares n words in a row with a benchmark or with a kept question of
    another source (s1, section 2.1). Within a source only repeated questions are dropped."""
    def ngrams(question):                       # a question of fewer words is compared whole
        words = question.lower().split()
        return {hash(tuple(words[i:i + n])) for i in range(max(1, len(words) - n + 1))}
    seen, source = set(), {gram: None for question in benchmarks for gram in ngrams(question)}

    def stage(row):
        own, question = row["source"], " ".join(row["question"].lower().split())
        others = {source.get(gram, own) for gram in ngrams(question)} - {own}
        if others:
            return "in a benchmark" if None in others else "in another source"
        if question in seen:
            return "repeated"
        seen.add(question)
        source.update(dict.fromkeys(ngrams(question), own))
        return None
    return stage


def quality(row: dict) -> str | None:
    """Drops failed API calls, and questions that text alone does not convey."""
    numbers = [int(n) for n in re.findall(r"^[^\S\n]*(\d{1,2})[.)]\s", row["question"], re.M)]
    found = {
        "an API error": any(ERROR.search(row[name][:1000]) for name in ("thinking", "answer")),
        "a drawing in characters": DRAWING.search(row["question"]),
        "a missing image": IMAGE.search(row["question"]),
        "broken numbering": any(b not in (1, a + 1) for a, b in itertools.pairwise([0, *numbers]))}
    return next((reason for reason in found if found[reason]), None)


def difficulty(solved: set[str]) -> Callable[[dict], str | None]:
    """Drops a question of `solved`, and one with a positive verdict in a column *_correct."""
    def stage(row):
        columns = [verdict(value) for name, value in row.items() if name.endswith("_correct")]
        return "solved by a model" if row["question"] in solved or any(columns) else None
    return stage


def read_pool(args) -> list[dict]:
    """The usable rows, one trace each, with correct, domain and source. Prints the counts."""
    domains = [args.domain] if args.domain else ["domain", "cot_type", "subject", "source_type"]
    pool = []
    for row, trace in rows.usable_traces(args.pool, args.split, args.teacher, args.columns):
        kept = {name: value for name, value in row.items()
                if not re.search("thinking|attempt|message_content|_grade", name)}
        pool.append(kept | dict(
            zip(("question", "thinking", "answer"), trace, strict=True),
            correct=is_correct(row, trace[2], args.teacher),
            domain=str(next(filter(None, map(row.get, domains)), "none")),
            source=str(row.get("source_type") or row.get("source") or "none")))
    correct, sizes = (Counter(row[name] for row in pool) for name in ("correct", "domain"))
    if args.domain and set(sizes) == {"none"}:
        raise ValueError(f"{args.pool} has no column {args.domain!r}")
    print(f"pool: {len(pool):,} traces, {correct[True]:,} correct, {correct[False]:,} wrong, "
          f"{correct[None]:,} unknown")
    print("".join(f"  {n:7,} {cli.escape(name)}\n" for name, n in sizes.most_common(20)), end="")
    return pool


def is_correct(row: dict, answer: str, teacher: str = "deepseek") -> bool | None:
    """Whether the answer is correct, by the row's verdict or its reference; None if unknown."""
    for name in ("correct", f"{teacher}_grade"):
        if (known := verdict(row.get(name))) is not None:
            return known
    reference = row.get("gtruth_answer") or row.get("solution")
    if not isinstance(reference, (str, int, float)):
        return None
    boxed = grading.extract_answer(str(reference))
    if not boxed and len(str(reference)) >= 100:        # a solution in prose
        return None
    text = answer if grading.extract_answer(answer) else f"Answer: {answer}"
    return grading.grade(text, boxed or str(reference))


def verdict(value: object) -> bool | None:
    """True for true, 1 and "Yes", False for false, 0 and "No", None for anything else."""
    text = str(value).strip().lower()
    return True if text in ("true", "yes", "1") else False if text in ("false", "no", "0") else None


def main() -> None:
    parser = cli.ArgumentParser(description="Choose the traces to train on, as s1 did")
    add = parser.add_argument
    add("--pool", required=True, help="traces: a file or a dataset")
    rows.add_trace_arguments(add)
    add("--benchmarks", nargs="*", default=[], help="files of questions to keep out")
    add("--ngram", type=cli.at_least(1), default=8, help="shared words that count as a copy")
    add("--verdicts", nargs="*", default=[], help="rows.jsonl of models; drop what they solve")
    add("--method", choices=METHODS, default="s1k")
    add("--sources", nargs="*", default=[], help="take all their correct, long traces (s1k only)")
    add("--seed-length", type=cli.at_least(0), default=0, help="characters of a long trace")
    add("--domain", help="column of the domain (default: domain, cot_type, subject, source_type)")
    add("--n", type=cli.at_least(1), default=1000, help="number of traces")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="file to write; without it, only the counts are printed")
    add("--overwrite", action="store_true", help="replace the file")
    args = parser.parse_args()
    with cli.exit_on_user_error(args.debug):
        if args.out and args.out.exists() and not args.overwrite:
            raise FileExistsError(f"{args.out} exists: pass --overwrite to replace it")
        benchmarks = [row["question"] for path in args.benchmarks
                      for row in rows.load_questions(path, need_answer=False)]
        solved = {str(row.get("question")) for path in args.verdicts
                  for _, row in rows.read_rows(path) if verdict(row.get("correct"))}
        chosen = select(read_pool(args), benchmarks, solved, args)
        if not chosen:
            raise ValueError("no trace is left to choose from")
        if args.out:
            draft = args.out.with_name(args.out.name + ".draft")        # default: parquet has dates
            draft.write_text("".join(json.dumps(row, default=str) + "\n" for row in chosen))
            draft.replace(args.out)


if __name__ == "__main__":
    main()
