"""What comes in, and what is chosen of it: each rule with a row it takes out and one it leaves."""
import json
import random
import sys
from collections import Counter

import pytest

import data
from data import BadInput, choose, decontaminate, difficulty, quality, trace_of, usable_rows

EIGHT = "find the sum of all the prime numbers"          # eight words


def a_row(question="q", thinking="t", answer="Answer: 5", **more):
    return {"question": question, "thinking": thinking, "answer": answer, **more}


def pairs(*rows):
    return [(row, trace_of(row)) for row in rows]


# ---- What comes in --------------------------------------------------------------------------


@pytest.mark.parametrize("row, trace", [
    (a_row(), ("q", "t", "Answer: 5")),
    ({"question": "q", "solution": "s", "thinking_trajectories": ["t", "u"], "attempt": "a"},
     ("q", "t", "a")),
    ({"question": "q", "gemini_thinking_trajectory": "g", "gemini_attempt": "ga",
      "deepseek_thinking_trajectory": "d", "deepseek_attempt": "da"}, ("q", "d", "da")),
    ({"problem": "q", "message_thinking": "t", "message_content": "a", "gtruth_answer": "5"},
     ("q", "t", "a")),
    (a_row(answer=" "), "no answer"), (a_row(thinking=None), "no thinking"), ({}, "no question"),
    (a_row(thinking=["", "u"]), "no thinking"), (a_row(question=7), "no question"),
    (a_row(unfit="length"), "unfit (length)")])
def test_rows_under_the_names_they_have(row, trace):
    assert trace_of(row) == trace
    if "gemini_attempt" in row:
        assert trace_of(row, "gemini") == ("q", "g", "ga")


def test_rows_of_no_use_are_counted_and_named(tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (
        a_row(), a_row(answer=""), a_row(answer=""), a_row(thinking=""))))
    assert len(usable_rows(path)) == 1
    error = capsys.readouterr().err
    assert "3 of 4 rows passed over: 2 no answer, 1 no thinking" in error and "line" not in error
    usable_rows(path, verbose=True)
    assert f"{path}, line 3: no answer" in capsys.readouterr().err


def test_a_directory_of_a_hub_dataset_is_all_its_files(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.jsonl").write_text(json.dumps(a_row("b")))
    (tmp_path / "data" / "a.json").write_text(json.dumps([a_row("a")]))
    (tmp_path / "README.md").write_text("not a row")
    assert [trace[0] for _, trace in usable_rows(tmp_path / "data")] == ["a", "b"]


def test_a_datasets_own_description_is_no_row(tmp_path):
    (tmp_path / "dataset_infos.json").write_text('{\n "default": {}\n}')
    (tmp_path / "rows.jsonl").write_text(json.dumps(a_row("a")))
    assert [trace[0] for _, trace in usable_rows(tmp_path)] == ["a"]


def test_parquet_without_pyarrow_is_one_line(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    code, _, error = run("data", "stats", tmp_path / "x.parquet")
    assert code == 2 and "pip install pyarrow" in error and error.count("\n") == 1


def test_parquet_is_read_row_by_row(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist([a_row("a"), a_row("b")]), tmp_path / "x.parquet")
    assert [trace[0] for _, trace in usable_rows(tmp_path / "x.parquet")] == ["a", "b"]
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match="x.parquet cannot be read"):
        usable_rows(tmp_path / "x.parquet")


# ---- Stages ---------------------------------------------------------------------------------


def test_decontamination_by_runs_of_eight_words():
    stage = decontaminate([f"Please {EIGHT} below ten", "short one"], 8)

    def why(question):
        return stage({}, (question, "t", "a"))
    assert why(f"  {EIGHT.upper()}  up   to six") == "a benchmark has it"
    assert why("Find the sum of all the prime factors") is None             # seven of eight
    assert why("Short  ONE") == "a benchmark has it"
    assert why("a short one") is None
    fresh = "how many ways are there to seat nine people"
    assert why(fresh) is None and why(fresh.title()) == "the same question again"
    assert why(f"Tell me {fresh}") == "8 words of an earlier question"
    assert decontaminate([], 11)({}, (f"{EIGHT} a b", "t", "a")) is None


def test_what_went_out_holds_nobody_back():
    """Only accepted questions join the list."""
    tail = "one two three four five six seven eight"
    stage = decontaminate([EIGHT], 8)
    assert stage({}, (f"{EIGHT} {tail}", "t", "a")) and stage({}, (tail, "t", "a")) is None


@pytest.mark.parametrize("question, thinking, answer, why", [
    ("What is 1+1?", "I see no Error here", "5", None),
    ("q", "Error code: 429", "5", "an error"), ("q", "t", "RateLimitError: slow down", "an error"),
    ("+----+----+\n|  + |    |\n+----+----+\n", "t", "5", "a drawing"),
    ("a - b\n", "t", "5", None),
    ("See the figure below.", "t", "5", "a picture"), ("![](x.png)", "t", "5", "a picture"),
    ("[asy] draw(); [/asy]", "t", "5", "a picture"), ("Plot the graph of f", "t", "5", None),
    ("1. a\n2. b", "t", "5", None), ("2. What is this?", "t", "5", "broken numbering"),
    ("1. a\n2. b\n1. c", "t", "5", None), ("1. a\n3. b", "t", "5", "broken numbering"),
    ("3.5 is a number", "t", "5", None)])
def test_quality(question, thinking, answer, why):
    found = quality({}, (question, thinking, answer))
    assert found is None if why is None else found.startswith(why)


def test_difficulty_by_columns_and_by_verdicts():
    stage = difficulty({"easy": True, "hard": False})
    trace = "other", "t", "a"
    for value, out in ((True, True), ("Yes", True), (1, True), (False, False), ("No", False)):
        assert bool(stage({"qwen7b_correct": False, "qwen32b_correct": value}, trace)) is out
    assert stage({}, ("easy", "t", "a")) and stage({}, ("hard", "t", "a")) is None
    assert stage({"correct": True, "deepseek_grade": "Yes"}, trace) is None     # the teacher's own


def test_right_by_verdict_grade_or_reference():
    for row, verdict in ((a_row(correct=False), False), (a_row(deepseek_grade="Yes"), True),
                         (a_row(gtruth_answer="5.0"), True), (a_row(gtruth_answer="6"), False),
                         (a_row(solution="so \\boxed{5}"), True), (a_row(), None),
                         (a_row(solution="We see that " * 20), None),
                         (a_row(answer="(1+2)*3",
                                gtruth_answer={"numbers": [1, 2, 3], "target": 9}), True)):
        assert data.right(row, trace_of(row)) is verdict
    assert data.right(a_row(gemini_grade="No"), ("q", "t", "5"), "gemini") is False


# ---- The choice -----------------------------------------------------------------------------


def a_pool(n=300, domains=3):
    """Of domain d0 half the rows, of the others the rest; lengths all different."""
    rng = random.Random(0)
    lengths = rng.sample(range(1, 10 * n), n)
    return pairs(*(a_row(f"q{i}", "t" * length,
                         domain=f"d{max(0, i % (2 * (domains - 1)) - domains + 2)}")
                   for i, length in enumerate(lengths)))


def test_the_draw_favours_length_and_no_domain():
    counts, ranks = Counter(), Counter()
    pool = a_pool(3000)
    ordered = {name: sorted((len(t[1]) for r, t in pool if r["domain"] == name), reverse=True)
               for name in ("d0", "d1", "d2")}
    for seed in range(600):
        row, = choose(pool, "s1k", 1, seed)
        counts[row["domain"]] += 1
        ranks[ordered[row["domain"]].index(len(row["thinking"]))] += 1
    assert all(150 < counts[name] < 250 for name in ordered)        # 200 each; 4.3 deviations
    # Ranks 0, 1, 2 with 1/2, 1/4, 1/8 of 600: 300, 150, 75, each within 4.3 deviations.
    assert abs(ranks[0] - 300) < 53 and abs(ranks[1] - 150) < 46 and abs(ranks[2] - 75) < 35


def test_methods_and_their_stages():
    pool = a_pool()
    by = {method: choose(pool, method, 30, 0) for method in
          ("s1k", "random", "longest", "diverse", "full")}
    assert len(by["full"]) == 300 and all(len(by[m]) == 30 for m in by if m != "full")
    mean = {m: sum(len(row["thinking"]) for row in rows) / len(rows) for m, rows in by.items()}
    longest = sorted((len(t[1]) for _, t in pool), reverse=True)[:30]
    assert sorted((len(row["thinking"]) for row in by["longest"]), reverse=True) == longest
    assert mean["longest"] > mean["s1k"] > 1.3 * max(mean["random"], mean["diverse"])
    domains = Counter(row["domain"] for row in by["random"])
    assert domains["d0"] > 10 > len(Counter(row["domain"] for row in by["diverse"])) == 3
    assert {row["stage"] for row in by["s1k"]} == {"diversity"}
    assert {row["stage"] for row in by["random"]} == {"random"}
    for method in by:
        assert by[method] == choose(pool[::-1], method, 30, 0)      # whatever the order
        assert len({row["question"] for row in by[method]}) == len(by[method])
    assert by["s1k"] != choose(pool, "s1k", 30, 1) and by["random"] != choose(pool, "random", 30, 1)


def test_the_seed_is_right_and_long_and_from_the_named_sources():
    rows = pairs(a_row("a", "t" * 50, source_type="aime", correct=True),
                 a_row("b", "t" * 50, source_type="aime", correct=False),
                 a_row("c", "t" * 5, source_type="aime", correct=True),
                 a_row("d", "t" * 60, source_type="other", correct=True))
    chosen = choose(rows, "s1k", 2, 0, sources=["aime"], seed_length=40)
    assert (chosen[0]["question"], chosen[0]["stage"]) == ("a", "seed")
    assert len(chosen) == 2 and chosen[1]["question"] != "a" and chosen[1]["stage"] == "diversity"


def test_a_chosen_row_holds_one_trace():
    """Read again, under whatever teacher, it is the trace that was chosen, with its verdict."""
    row = {"question": "q", "gemini_thinking_trajectory": "g", "gemini_attempt": "ga",
           "deepseek_thinking_trajectory": "d", "deepseek_attempt": "da", "gemini_grade": "No",
           "deepseek_grade": "Yes", "cot_type": "math"}
    chosen, = choose([(row, trace_of(row, "gemini"))], "full", 1, 0, teacher="gemini")
    for teacher in data.TEACHERS:
        assert trace_of(chosen, teacher) == ("q", "g", "ga")
        assert data.right(chosen, trace_of(chosen, teacher), teacher) is False
    assert chosen["cot_type"] == "math" and chosen["stage"] == "full"


def test_domains_that_run_out_are_left(tmp_path):
    rows = pairs(a_row("a", domain="x"), *(a_row(f"b{i}", domain="y") for i in range(5)))
    assert len(choose(rows, "s1k", 6, 0)) == 6 and len(choose(rows, "diverse", 9, 0)) == 6
    chosen = choose(pairs(a_row(subject="z")), "s1k", 1, 0, "subject")
    assert {row["subject"] for row in chosen} == {"z"}


# ---- The commands ---------------------------------------------------------------------------


def test_select_from_end_to_end(run, tiny, tmp_path):
    """Each stage says what went out; the file trains; the same seed gives the same bytes."""
    code, printed, _ = run("data", "countdown", "--pool", "--n", 60)
    (tmp_path / "pool.jsonl").write_text(printed)
    rows = [json.loads(line) for line in printed.splitlines()]
    easy = rows[0]["question"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": easy, "correct": True}) + "\n"
                                         + json.dumps({"question": easy, "correct": False})
                                         + "\n" + json.dumps({"question": rows[2]["question"],
                                                              "correct": "No"}))
    (tmp_path / "held.jsonl").write_text(json.dumps({"question": rows[1]["question"]}))
    command = ["data", "select", "--pool", tmp_path / "pool.jsonl", "--benchmarks",
               tmp_path / "held.jsonl", "--verdicts", tmp_path / "rows.jsonl", "--words", 12,
               "--n", 20, "--out", tmp_path / "out.jsonl"]
    code, printed, error = run(*command)
    assert code == 0, error
    assert "decontamination: 59 left; 1 a benchmark has it" in printed
    assert "difficulty: 58 left; 1 too easy" in printed and "20 by diversity" in printed
    first = (tmp_path / "out.jsonl").read_bytes()
    assert not {easy, rows[1]["question"]} & {
        json.loads(line)["question"] for line in first.splitlines()}
    assert len(first.splitlines()) == 20
    code, _, error = run(*command)
    assert code == 2 and "--overwrite" in error and (tmp_path / "out.jsonl").read_bytes() == first
    assert run(*command, "--overwrite")[0] == 0 and (tmp_path / "out.jsonl").read_bytes() == first
    code, _, error = run(*command, "--overwrite", "--domain", "none")
    assert code == 2 and "no row of" in error and (tmp_path / "out.jsonl").read_bytes() == first
    code, _, error = run(*command, "--overwrite", "--benchmarks", tmp_path / "pool.jsonl")
    assert code == 2 and "nothing is left" in error
    assert (tmp_path / "out.jsonl").read_bytes() == first
    code, printed, error = run("data", "stats", tmp_path / "out.jsonl", "--tokens-per-batch", 200)
    longer = sum(len(data.Chat(tiny).example(*trace)[0]) > 200
                 for trace in data.load_traces(tmp_path / "out.jsonl"))
    assert code == 0 and f"{longer} longer than 200" in printed and "20 traces" in printed
    assert run("train", "--model", tiny, "--data", tmp_path / "out.jsonl", "--out",
               tmp_path / "student", "--max-steps", 1)[0] == 0


def test_the_pool_is_of_training_questions():
    pool = list(data.countdown_pool(400, 0))
    assert pool[:5] == list(data.countdown_pool(5, 0)) != list(data.countdown_pool(5, 1))
    for row in pool:
        numbers, target = row["gtruth_answer"].values()
        assert data.split(numbers, target) == "train" and target <= 200
        assert row["correct"] == data.grade(f"Answer: {row['answer']}", row["gtruth_answer"])
        assert (row["domain"] == "high") == (target > 100)
    assert len({row["domain"] for row in pool}) == 7
    with pytest.raises(BadInput, match="not 99999"):
        next(data.countdown_pool(99999, 0))
