"""Counts what comes before and after a Wait on Countdown: in the teacher's traces, and in the rows
of an evaluation without a limit.

    python docs/waits.py [ROWS]
"""
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from recipe import cli, countdown, rows  # noqa: E402


def count_steps(lines: list[str]) -> int:
    """How many lines are first steps: 12*5=60 is one, the try 60+1=61 ok is not."""
    return sum("=" in line and " " not in line for line in lines)


def solving_step(numbers: list[int], target: int) -> int:
    """The number, from 1 to 9, of the first step after which a try hits the target."""
    return next(number for number, (_, tries) in enumerate(countdown.search(numbers), 1)
                if target in [value for _, value, _ in tries])


def print_teacher() -> None:
    waits, gave_up = Counter(), Counter()
    for _, thinking, _ in countdown.traces(1000, seed=0):
        lines = thinking.splitlines()
        waits.update(count_steps(lines[:i]) for i, line in enumerate(lines) if line == "Wait")
        gave_up[count_steps(lines)] += not lines[-1].startswith("So")
    for name, counts in (("Wait", waits), ("gave up", gave_up)):
        print(f"{name:7} after step 1 to 9:", *(f"{counts[step]:3}" for step in range(1, 10)))


def print_student(path: str) -> None:
    runs, verdicts = defaultdict(dict), defaultdict(list)
    for _, row in rows.read_rows(path):
        if row["method"] == "budget" and row["max_thinking"] < 0:
            runs[row["model"], row["num_waits"]][row["question"]] = row
    for model, waits in runs:
        for question, before in runs.get((model, waits - 1), {}).items():
            after = runs[model, waits][question]
            thinking, _, _ = before["text"].partition("<|im_start|>answer")
            *lines, last = thinking.rstrip().split("\n")
            ahead = solving_step(**before["answer"]) > count_steps(lines)
            ending = ("So ..." if last.startswith("So") else
                      f"gave up, solution {'ahead' if ahead else 'missed'}")
            became, _, _ = after["text"][len(thinking):].partition("\n")
            key = waits, ending, re.sub(r"\d+", "#", became)
            verdicts[key].append((before["correct"], after["correct"]))
    print("\nWait  how the thinking ended     its line became    answers  right before  after")
    for (waits, ending, became), pairs in sorted(verdicts.items()):
        before, after = map(sum, zip(*pairs, strict=True))
        print(f"{waits:4}  {ending:25}  {became:18} {len(pairs):7} {before:13} {after:6}")


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", nargs="?", default="out/student/eval/rows.jsonl",
                        help="of budget_force.py")
    args = parser.parse_args()
    with cli.exit_on_user_error(args.debug):
        print_teacher()
        print_student(args.rows)


if __name__ == "__main__":
    main()
