"""Selection of traces: each stage with rows that it drops and that it keeps, then the draws."""
import functools
import json
import random
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from recipe import countdown, rows
from recipe.selection import METHODS, decontamination, difficulty, is_correct, quality, select

EIGHT = "find the sum of all the prime numbers"          # eight words


def make_row(question="q", thinking="t", answer="Answer: 5", **columns):
    return {"question": question, "thinking": thinking, "answer": answer, "correct": None,
            "domain": "none", "source": "none", **columns}


def make_pool(n=300, num_domains=3):
    """Rows of different lengths; half of them are of domain d0."""
    lengths = random.Random(0).sample(range(1, 10 * n), n)
    return [make_row(f"q{i}", "t" * length,
                     domain=f"d{max(0, i % (2 * (num_domains - 1)) - num_domains + 2)}")
            for i, length in enumerate(lengths)]


def settings(**changes):
    return SimpleNamespace(**{"method": "s1k", "n": 30, "seed": 0, "ngram": 8, "sources": [],
                              "seed_length": 0, **changes})


@pytest.fixture
def choose(run):
    return functools.partial(run, "recipe.selection")


def write_jsonl(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---- Stages ---------------------------------------------------------------------------------


def test_decontamination_compares_eight_words_in_a_row():
    stage = decontamination([f"Please {EIGHT} below ten", "short one"], 8)

    def reason(question):
        return stage(make_row(question))
    assert reason(f"  {EIGHT.upper()}  up   to six") == "in a benchmark"
    assert reason("Find the sum of all the prime factors") is None             # seven of eight
    assert reason("Short  ONE") == "in a benchmark"
    assert reason("a short one") is None
    assert decontamination([], 11)(make_row(f"{EIGHT} a b")) is None


def test_within_a_source_only_repeated_questions_are_dropped():
    stage = decontamination([], 8)
    fresh = "how many ways are there to seat nine people"
    assert stage(make_row(fresh, source="a")) is None
    assert stage(make_row(fresh.title() + " ", source="a")) == "repeated"
    assert stage(make_row(f"Tell me {fresh}", source="a")) is None
    assert stage(make_row(f"Tell us {fresh}", source="b")) == "in another source"
    assert stage(make_row(fresh, source="b")) == "in another source"
    assert stage(make_row("how many ways are there to seat ten people", source="b")) is None


def test_short_questions_of_other_sources_are_compared_whole():
    stage = decontamination([], 8)
    assert stage(make_row("What is 2 + 3?", source="a")) is None
    assert stage(make_row("what is 2 + 3?", source="b")) == "in another source"
    assert stage(make_row("what is 2 + 3", source="b")) is None


def test_a_dropped_question_is_not_held_against_others():
    tail = "one two three four five six seven eight"
    stage = decontamination([EIGHT], 8)
    assert stage(make_row(f"{EIGHT} {tail}", source="a"))
    assert stage(make_row(tail, source="b")) is None


@pytest.mark.parametrize("question, thinking, answer, reason", [
    ("What is 1+1?", "I see no Error here", "5", None),
    ("q", "Error code: 429", "5", "an API error"),
    ("q", "t", "RateLimitError: slow down", "an API error"),
    ("+----+----+\n|  + |    |\n+----+----+\n", "t", "5", "a drawing"),
    ("a - b\n", "t", "5", None),
    ("See the figure below.", "t", "5", "a missing image"),
    ("![](x.png)", "t", "5", "a missing image"),
    ("[asy] draw(); [/asy]", "t", "5", "a missing image"),
    ("As shown in the diagram", "t", "5", "a missing image"),
    ("Plot the graph of f", "t", "5", None),
    ("1. a\n2. b", "t", "5", None), ("2. What is this?", "t", "5", "broken numbering"),
    ("1. a\n2. b\n1. c", "t", "5", None), ("1. a\n3. b", "t", "5", "broken numbering"),
    ("3.5 is a number", "t", "5", None)])
def test_quality(question, thinking, answer, reason):
    found = quality(make_row(question, thinking, answer))
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize("question", [" " * 50_000 + "x", "\n" * 50_000 + "x", "-" * 50_000])
def test_no_question_makes_quality_slow(question):
    start = time.process_time()
    quality(make_row(question))
    assert time.process_time() - start < 1


@pytest.mark.parametrize("value, dropped", [
    (True, True), ("Yes", True), (1, True), (False, False), ("No", False), (None, False)])
def test_difficulty_by_columns(value, dropped):
    row = make_row(qwen7b_correct=False, qwen32b_correct=value)
    assert bool(difficulty(set())(row)) is dropped


def test_difficulty_by_evaluations():
    stage = difficulty({"easy"})
    assert stage(make_row("easy")) and stage(make_row("hard")) is None
    # The verdict on the trace itself is the teacher's, not a grader model's.
    assert stage(make_row("hard", correct=True, deepseek_grade="Yes")) is None


# ---- Verdicts -------------------------------------------------------------------------------


@pytest.mark.parametrize("row, correct", [
    ({"correct": False, "gtruth_answer": "5"}, False), ({"deepseek_grade": "Yes"}, True),
    ({"correct": None, "deepseek_grade": "No"}, False), ({"gtruth_answer": "5.0"}, True),
    ({"gtruth_answer": "6"}, False), ({"gtruth_answer": 5}, True),
    ({"solution": "so \\boxed{5}"}, True), ({"solution": "5"}, True),
    ({"solution": "We see that " * 20}, None), ({}, None), ({"correct": "maybe"}, None),
    ({"gtruth_answer": {"numbers": [1, 2, 3], "target": 9}}, None),
    ({"gtruth_answer": ["5"]}, None)])
def test_is_correct_by_verdict_grade_or_reference(row, correct):
    assert is_correct(row, "Answer: 5") is correct
    assert is_correct(row, "5") is correct


def test_the_grade_is_that_of_the_chosen_teacher():
    row = {"gemini_grade": "No", "deepseek_grade": "Yes"}
    assert is_correct(row, "5", "gemini") is False and is_correct(row, "5") is True


# ---- Draws ----------------------------------------------------------------------------------


def test_s1k_favors_length_and_no_domain():
    counts, ranks = Counter(), Counter()
    pool = sorted(make_pool(3000), key=lambda row: -len(row["thinking"]))
    by_domain = {name: [row for row in pool if row["domain"] == name]
                 for name in ("d0", "d1", "d2")}
    for seed in range(600):
        row, = METHODS["s1k"](pool, 1, random.Random(f"draw {seed}"))
        counts[row["domain"]] += 1
        ranks[by_domain[row["domain"]].index(row)] += 1
    assert all(150 < counts[name] < 250 for name in by_domain)      # 200 each; 4.3 deviations
    # Ranks 0, 1, 2 with 1/2, 1/4, 1/8 of 600: 300, 150, 75, each within 4.3 deviations.
    assert abs(ranks[0] - 300) < 53 and abs(ranks[1] - 150) < 46 and abs(ranks[2] - 75) < 35


def test_methods_draw_what_they_say():
    pool = make_pool()
    chosen = {method: select(pool, [], set(), settings(method=method)) for method in METHODS}
    assert len(chosen["full"]) == 300
    assert all(len(chosen[method]) == 30 for method in METHODS if method != "full")
    mean = {method: sum(len(row["thinking"]) for row in drawn) / len(drawn)
            for method, drawn in chosen.items()}
    longest = sorted((len(row["thinking"]) for row in pool), reverse=True)[:30]
    assert sorted((len(row["thinking"]) for row in chosen["longest"]), reverse=True) == longest
    assert mean["longest"] > mean["s1k"] > 1.3 * max(mean["random"], mean["diverse"])
    domains = Counter(row["domain"] for row in chosen["random"])
    assert domains["d0"] > 10 > len({row["domain"] for row in chosen["diverse"]}) == 3
    assert {row["stage"] for row in chosen["s1k"]} == {"diversity"}
    assert {row["stage"] for row in chosen["random"]} == {"random"}
    for method, drawn in chosen.items():        # whatever the order of the pool
        assert drawn == select(pool[::-1], [], set(), settings(method=method))
        assert len({row["question"] for row in drawn}) == len(drawn)
    for method in ("s1k", "random"):
        assert chosen[method] != select(pool, [], set(), settings(method=method, seed=1))


def test_only_s1k_drops_easy_questions():
    pool, solved = make_pool(10), {"q1", "q2"}
    assert len(select(pool, [], solved, settings())) == 8
    assert all(len(select(pool, [], solved, settings(method=method))) == 10
               for method in METHODS if method != "s1k")


def test_the_seed_is_correct_and_long_and_of_the_named_sources():
    pool = [make_row("a", "t" * 50, source="aime", correct=True),
            make_row("b", "t" * 50, source="aime", correct=False),
            make_row("c", "t" * 5, source="aime", correct=True),
            make_row("d", "t" * 60, source="other", correct=True)]
    named = {"sources": ["aime"], "seed_length": 40}
    chosen = select(pool, [], set(), settings(n=2, **named))
    assert (chosen[0]["question"], chosen[0]["stage"]) == ("a", "seed")
    assert len(chosen) == 2 and chosen[1]["question"] != "a" and chosen[1]["stage"] == "diversity"
    chosen = select(pool, [], set(), settings(n=9, **named))
    assert sorted(row["question"] for row in chosen) == ["a", "b", "c", "d"]
    chosen = select(pool, [], set(), settings(method="longest", **named))
    assert {row["stage"] for row in chosen} == {"longest"}


def test_an_empty_domain_is_left_out():
    pool = [make_row("a", domain="x"), *(make_row(f"b{i}", domain="y") for i in range(5))]
    assert len(select(pool, [], set(), settings(n=6))) == 6
    assert len(select(pool, [], set(), settings(n=9, method="diverse"))) == 6


# ---- The command ----------------------------------------------------------------------------


def test_a_chosen_row_holds_one_trace(choose, tmp_path):
    """Read again, for whichever teacher, it is the trace that was chosen, with its verdict."""
    row = {"question": "q", "gemini_thinking_trajectory": "g", "gemini_attempt": "ga",
           "deepseek_thinking_trajectory": "d", "deepseek_attempt": "da", "gemini_grade": "No",
           "deepseek_grade": "Yes", "cot_type": "math", "source_type": "aime"}
    pool, out = write_jsonl(tmp_path / "pool.jsonl", row), tmp_path / "out.jsonl"
    assert choose("--pool", pool, "--teacher", "gemini", "--method", "full", "--out", out)[0] == 0
    for teacher in rows.TEACHERS:
        (chosen, trace), = rows.usable_traces(out, teacher=teacher)
        assert trace == ("q", "g", "ga") and is_correct(chosen, trace[2], teacher) is False
    assert chosen["cot_type"] == chosen["domain"] == "math" and chosen["stage"] == "full"
    assert chosen["source"] == "aime" and "deepseek_grade" not in chosen


def test_select_from_end_to_end(choose, tmp_path):
    """Each stage prints what it drops; the same seed gives the same bytes."""
    pool = list(countdown.pool(60, 0))
    easy, held_out = pool[0]["question"], pool[1]["question"]
    write_jsonl(tmp_path / "pool.jsonl", *pool)
    write_jsonl(tmp_path / "rows.jsonl", {"question": easy, "correct": True},
                {"question": easy, "correct": False}, {"question": ["q"], "correct": True},
                {"question": pool[2]["question"], "correct": "No"})
    write_jsonl(tmp_path / "held.jsonl", {"question": held_out})
    out = tmp_path / "out.jsonl"
    command = ["--pool", tmp_path / "pool.jsonl", "--benchmarks", tmp_path / "held.jsonl",
               "--verdicts", tmp_path / "rows.jsonl", "--ngram", 12, "--n", 20]
    code, printed, error = choose(*command)
    assert code == 0, error
    assert not out.exists()
    correct = sum(row["correct"] for row in pool)
    assert f"pool: 60 traces, {correct} correct, {60 - correct} wrong, 0 unknown" in printed
    assert f"{sum(row['domain'] == 'high' for row in pool)} high" in printed
    assert "decontamination: 59 left; 1 in a benchmark\n" in printed
    assert "quality: 59 left\n" in printed
    assert "difficulty: 58 left; 1 solved by a model\n" in printed
    assert "chosen: 0 by seed, 20 by diversity" in printed
    assert choose(*command, "--out", out)[0] == 0
    first = out.read_bytes()
    traces = rows.load_traces(out)
    assert len(traces) == 20 and not {easy, held_out} & {question for question, _, _ in traces}
    assert set(traces) < {(row["question"], row["thinking"], row["answer"]) for row in pool}
    assert choose(*command, "--out", out, "--overwrite")[0] == 0 and out.read_bytes() == first
    for flags, message in (
            ([], "--overwrite"), (["--overwrite", "--domain", "x"], "no column 'x'"),
            (["--overwrite", "--benchmarks", tmp_path / "pool.jsonl"], "no trace is left"),
            (["--overwrite", "--pool", tmp_path / "none.jsonl"], "none.jsonl")):
        code, _, error = choose(*command, "--out", out, *flags)
        assert code == 2 and message in error and error.count("error: ") == 1
        assert out.read_bytes() == first and len(list(tmp_path.iterdir())) == 4


def test_the_column_of_the_domain_can_be_named(choose, tmp_path):
    pool = write_jsonl(tmp_path / "pool.jsonl", make_row(subject="z", domain="d"))
    assert " 1 z\n" in choose("--pool", pool, "--domain", "subject")[1]
    assert " 1 d\n" in choose("--pool", pool)[1]
    assert " 1 \\x1b\n" in choose("--pool", write_jsonl(pool, make_row(domain="\x1b")))[1]


def test_sources_are_read_from_their_columns(choose, tmp_path):
    question = f"{EIGHT} below"
    pool = write_jsonl(tmp_path / "pool.jsonl", {**make_row(question), "source_type": "a"},
                       {**make_row(question + " ten"), "source_type": "a"},
                       make_row(question + " two", source="b"))
    assert "decontamination: 2 left; 1 in another source" in choose("--pool", pool)[1]
