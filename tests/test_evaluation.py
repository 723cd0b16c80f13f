"""The evaluation in budget_force.py: what is asked, graded and kept, on one process and several."""
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import BASE

import budget_force
from budget_force import METHODS, evaluate, is_correct, make_prompt
from recipe import grading
from recipe.report import Setting
from sample import Sequence

SMALL = ("--base=", "--n", 8, "--budgets", 8, -1, "--num-waits", 1, "--max-seq-len", 140,
         "--max-num-seqs", 3)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def results_of(out):
    """Two evaluations have the same results or not: rows in any order, runs and summary."""
    rows = [{k: v for k, v in row.items() if k != "key"} for row in read_jsonl(out / "rows.jsonl")]
    return (sorted(rows, key=json.dumps), read_jsonl(out / "runs.jsonl"),
            json.loads((out / "summary.json").read_text()))


@pytest.fixture
def model(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "tiny")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i}+1?", "answer": str(i + 1)}) + "\n"
                            for i in range(3)))
    return path


# ---- What is asked --------------------------------------------------------------------------


def test_runs_rows_and_summary(run, tiny, model):
    """The base runs without thinking and unlimited, the model in all settings."""
    code, printed, error = run(
        "budget_force", "--model", model, "--base", BASE, "--n", 6, "--budgets", 0, 8, -1,
        "--num-waits", 1, "--max-seq-len", 128, "--max-num-seqs", 4)
    assert code == 0, error
    out = model / "eval"
    runs, rows = read_jsonl(out / "runs.jsonl"), read_jsonl(out / "rows.jsonl")
    assert [(r["model"], r["method"], r["max_thinking"], r["num_waits"]) for r in runs] == [
        ("countdown-base", "direct", 0, 0), ("countdown-base", "budget", -1, 0),
        ("tiny", "budget", 0, 0), ("tiny", "budget", 8, 0), ("tiny", "budget", -1, 0),
        ("tiny", "budget", -1, 1)]
    assert all(r["thinking_tokens"] <= r["max_thinking"] for r in runs if r["max_thinking"] >= 0)
    assert len(rows) == 6 * len(runs) == len({row["key"] for row in rows})
    assert sum(row["correct"] for row in rows) == sum(r["correct"] for r in runs)
    assert [row["num_waits"] for row in rows[-6:]] == [1] * 6
    assert all(row["waits"] <= row["num_waits"] and row["seed"] == 0 for row in rows)
    assert {row["ended"] for row in rows[:6]} == {"none"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["graders"] == ["the task's checker"] and list(summary["models"]) == ["tiny"]
    assert summary["models"]["tiny"]["budget"]["control"] == 100
    assert "1 Wait over 0" in printed and "unlimited + 1 Wait" in printed


def test_the_papers_methods(run, model):
    out = model / "eval"
    code, printed, error = run(
        "budget_force", "--model", model, "--base=", "--n", 3, "--budgets", 4, 16, "--max-seq-len",
        200, "--num-waits", 0, "--temperature", 1, "--samples", 1, 3, "--method", *[*METHODS][1:])
    assert code == 0, error
    methods = json.loads((out / "summary.json").read_text())["models"]["tiny"]
    assert len(methods) == 9 and "class: short" in printed
    for method in ("budget", "tokens+budget", "steps+budget", "rejection"):
        assert methods[method]["control"] == 100
    rows = read_jsonl(out / "rows.jsonl")
    assert {row["tries"] for row in rows if row["method"] == "rejection"} <= {1, 2, 3}
    assert {row["samples"] for row in rows if row["method"] == "rejection"} == {3}
    for method in ("tokens", "steps"):              # asked for, and not enforced
        assert any(row["thinking_tokens"] > 16 for row in rows if row["method"] == method)
    code, printed, _ = run("budget_force", "--draw", out / "runs.jsonl")
    assert code == 0 and "class: long" in printed


def test_length_prompts(chat):
    def asked(*setting, **options):
        prompt = make_prompt(chat, "Why?", Setting(*setting, **options), step_tokens=8)
        return chat.decode(prompt).partition("user\n")[2].partition("<|im_end|>")[0]
    assert asked("budget", 64) == asked("direct", 0) == "Why?"
    assert asked("tokens", 64) == "Why? Think for up to 64 tokens."
    assert asked("steps+budget", 64) == "Why? Think for up to 8 steps."
    assert asked("steps", 4) == "Why? Think for up to 1 steps."
    assert asked("class", 100) == "Why? Think for a short time."
    assert asked("class", min_thinking=100) == "Why? Think for a long time."
    assert make_prompt(chat, "Why?", Setting("direct", 0)) == chat.prompt("Why?", thinking=False)


def test_questions_of_a_file(run, model, questions):
    """Before it begins, the evaluation prints one question with its reference, and the grader."""
    code, printed, error = run("budget_force", "--model", model, "--base=", "--budgets", 4,
                               "--num-waits", 0, "--questions", questions, "--n", 2)
    assert code == 0, error
    rows = read_jsonl(model / "eval" / "rows.jsonl")
    assert [row["question"] for row in rows] == ["0+1?", "1+1?"]
    name = grading.grader_name()
    assert printed.startswith(f"2 questions, seed 0, graded by {name}. First:\n0+1?\n\"1\"\n\n")
    assert json.loads((model / "eval" / "summary.json").read_text())["graders"] == [name]


def test_models_of_the_same_directory_name_are_told_apart(run, tiny, tmp_path, questions):
    models = [shutil.copytree(tiny, tmp_path / name / "student") for name in "ab"]
    code, printed, error = run(
        "budget_force", "--model", *models, "--base=", "--questions", questions, "--budgets", 4,
        "--num-waits", 0, "--out", tmp_path / "out")
    assert code == 0, error
    runs = read_jsonl(tmp_path / "out" / "runs.jsonl")
    assert [r["model"] for r in runs] == [str(path) for path in models]
    assert all(f"{path} " in printed for path in models)


def test_models_stand_side_by_side(run, tiny, tmp_path, monkeypatch, questions):
    verdicts = iter([True, True, True, False])
    monkeypatch.setattr(budget_force, "is_correct", lambda *_: next(verdicts))
    for name in "ab":
        shutil.copytree(tiny, tmp_path / name)
    code, printed, error = run(
        "budget_force", "--model", tmp_path / "a", tmp_path / "b", "--base=", "--n", 2,
        "--questions", questions, "--budgets", 4, "--num-waits", 0)
    assert code == 0, error
    table = [line.split() for line in printed.split("thinking budget")[-1].splitlines()]
    assert table[0] == ["a", "b", "mean", "spread"]
    assert table[1] == ["4", "100.0%", "50.0%", "75.0%", "50.0"]


def test_one_answer_shows_forced_tokens_apart(run, tiny):
    code, printed, _ = run("budget_force", "What?", "--model", tiny, "--budgets", 3,
                           "--num-waits", 0)
    assert code == 0 and "[\n<|im_start|>answer\nFinal Answer:]" in printed
    assert printed.startswith("[<|im_start|>think\n]")
    assert "(3 thinking tokens, 0 Wait, ended: cut)" in printed


# ---- What is graded -------------------------------------------------------------------------


def test_is_correct():
    countdown = {"numbers": [2, 3, 5], "target": 16}
    assert is_correct("Answer: (3+5)*2", countdown) and not is_correct("Answer: 16", countdown)
    assert is_correct("so Answer: 0.5", "1/2") and not is_correct("0.5", "1/2")
    with pytest.raises(ValueError, match="numbers"):
        is_correct("Answer: word", {"letters": "drow"})


class Scripted:
    """A sampler whose model writes a text, control tokens by name."""
    max_seq_len, dtype = 999, torch.float32

    def __init__(self, chat, text):
        self.chat, self.text = chat, text

    def generate(self, prompts, controller, samples, max_new_tokens, stop_ids, **options):
        script = self.chat.tokenizer.encode(self.text).ids
        for index, prompt in enumerate(prompts):
            sequence, sampled = Sequence(index, prompt), list(script)
            while sequence.finish_reason is None:
                token = None if sequence.queue else sampled.pop(0)
                sequence.append_token(token, controller)
                if sequence.tokens[-1] in stop_ids:
                    sequence.finish_reason = "stop"
            yield sequence


def scripted_row(chat, text, setting):
    args = SimpleNamespace(wait_text=["Wait"], max_answer=32, repeats=0, temperature=0, top_k=0,
                           top_p=1, min_p=0, seed=0, base_url=None)
    question = {"question": "q", "answer": {"numbers": [2, 3, 5], "target": 16}}
    row, = evaluate(Scripted(chat, text), chat, [question], setting, args, "m", io.BytesIO(), {})
    return row


def test_only_the_answer_is_graded(chat):
    """A right expression in the thinking, or after a second end of it, earns nothing."""
    def graded(text, max_thinking=-1):
        return scripted_row(chat, text, Setting("budget", max_thinking))
    assert graded("no\n<|im_start|>Answer: (3+5)*2<|im_end|>")["correct"]
    # Here `Final Answer:` replaces x.
    assert graded("x (3+5)*2<|im_end|>", max_thinking=0)["found"] == "(3+5)*2"
    assert not graded("Answer: (3+5)*2\n<|im_start|>Answer: 3*5<|im_end|>")["correct"]
    assert not graded("no\n<|im_start|>no\n<|im_start|>Answer: (3+5)*2<|im_end|>")["correct"]
    assert graded("Answer: (3+5)*2\n<|im_start|>no<|im_end|>")["found"] is None


def test_a_row_says_how_it_came_about(chat):
    row = scripted_row(chat, "no\n<|im_start|>1\n<|im_start|>Answer: (3+5)*2<|im_end|>",
                       Setting("budget", num_waits=1))
    assert row["text"] == "no\nWait1\n<|im_start|>answer\nAnswer: (3+5)*2<|im_end|>"
    assert (row["found"], row["correct"]) == ("(3+5)*2", True)
    assert (row["waits"], row["ended"], row["answered"]) == (1, "natural", "natural")
    assert row["thinking_tokens"] == len(chat.encode("no\nWait1\n"))
    assert [row["text"][start:end] for start, end in row["forced_spans"]] == ["Wait", "answer\n"]
    assert (row["model"], row["method"], row["num_waits"], row["seed"]) == ("m", "budget", 1, 0)
    cut = scripted_row(chat, "<|im_start|>" + "1+" * 40, Setting("budget"))
    assert cut["answered"] == "cut" and cut["text"].endswith("1+1+<|im_end|>")


# ---- What is kept ---------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The numbers of prompts in each call of Sampler.generate."""
    counts, generate = [], budget_force.sample.Sampler.generate

    def count(sampler, prompts, *others, **options):
        counts.append(len(prompts))
        return generate(sampler, prompts, *others, **options)
    monkeypatch.setattr(budget_force.sample.Sampler, "generate", count)
    return counts


def test_a_finished_evaluation_prints_its_table_again(run, model, asked):
    first = run("budget_force", "--model", model, *SMALL)
    assert first[0] == 0 and asked == [8, 8, 8], first
    results = results_of(model / "eval")
    assert run("budget_force", "--model", model, *SMALL) == first
    assert asked[3:] == [0, 0, 0] and results_of(model / "eval") == results
    # Further settings ask only for themselves, --overwrite for all again.
    assert run("budget_force", "--model", model, *SMALL, "--budgets", 8, -1, 4)[0] == 0
    assert asked[6:] == [0, 0, 8, 0]
    assert run("budget_force", "--model", model, *SMALL, "--overwrite")[0] == 0
    assert asked[10:] == [8, 8, 8] and results_of(model / "eval") == results


@pytest.mark.parametrize("change", [
    ("--seed", 1), ("--max-answer", 20), ("--max-seq-len", 290), ("--wait-text", "Hmm"),
    ("--temperature", 0.5), ("--repeats", 3), ("--dtype", "bfloat16"),
    ("--system", "Be brief."), ("--thinking", "think"), "weights", "reference"])
def test_a_row_is_kept_for_the_same_request_only(run, model, asked, questions, change):
    command = ["budget_force", "--model", model, "--base=", "--questions", questions, "--budgets",
               4, "--num-waits", 0, "--max-seq-len", 300, "--max-answer", 32]
    assert run(*command)[0] == 0
    if change == "weights":
        os.utime(model / "model.safetensors", ns=(1, 1))
    elif change == "reference":
        questions.write_text(questions.read_text().replace('"3"', '"4"'))
    else:
        command += change
    assert run(*command)[0] == 0
    assert asked == [3, 1 if change == "reference" else 3]


def test_another_grader_judges_again(run, model, asked, questions, monkeypatch):
    command = ["budget_force", "--model", model, "--base=", "--budgets", 4, "--num-waits", 0]
    for name in ("strict", "strict", "math-verify 9"):
        monkeypatch.setattr(grading, "grader_name", lambda name=name: name)
        assert run(*command, "--questions", questions)[0] == 0
        assert run(*command, "--n", 2)[0] == 0                  # Countdown has a checker of its own
    assert asked == [3, 2, 0, 0, 3, 0]


def test_a_killed_evaluation_goes_on(run, tiny, tmp_path):
    """Killed again and again at random, once with a torn line. In the end it has the results of one
    that was not killed; each question was asked once, and no row was lost."""
    whole, out = (shutil.copytree(tiny, tmp_path / name / "tiny") for name in ("whole", "killed"))
    assert run("budget_force", "--model", whole, *SMALL)[0] == 0
    rng, kills, path = random.Random(0), 0, out / "eval" / "rows.jsonl"

    def lines():
        return path.read_text().split("\n")[:-1] if path.exists() else []
    for _ in range(30):
        child = os.fork()
        if not child:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1), os.dup2(devnull, 2)
            sys.argv = ["budget_force.py", "--model", str(out), *map(str, SMALL)]
            try:
                budget_force.main()
            finally:
                os._exit(0)
        before, deadline = lines(), time.monotonic() + 60
        while len(lines()) == len(before) and time.monotonic() < deadline and (
                not (out / "eval" / "summary.json").exists()):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        after = lines()
        assert after[:len(before)] == before
        assert len({json.loads(line)["key"] for line in after}) == len(after)
        if (out / "eval" / "summary.json").exists():
            break
        kills += 1
        if kills == 2:
            with open(path, "a") as file:
                file.write('{"key": "torn')
    assert kills > 2
    assert run("budget_force", "--model", out, *SMALL)[0] == 0
    assert results_of(out / "eval") == results_of(whole / "eval")
    assert len(lines()) == 24


def test_two_evaluations_do_not_write_to_one_file(run, model):
    (model / "eval").mkdir()
    file, _ = budget_force.rows.open_jsonl(model / "eval" / "rows.jsonl")
    code, _, error = run("budget_force", "--model", model, *SMALL)
    file.close()
    assert code == 2 and "rows.jsonl" in error


# ---- Bad input ------------------------------------------------------------------------------


def test_a_budget_that_does_not_fit_is_refused(run, model, questions):
    """Not cut at --max-seq-len in silence. A file's default is the model's context."""
    flags = ("budget_force", "--model", model, "--base=", "--n", 2, "--num-waits", 0)
    code, printed, error = run(*flags, "--budgets", 700)
    assert code == 2 and "only 768 fit into a sequence (700)" in error and not printed
    code, printed, error = run(*flags, "--budgets", 16, 700)        # before the first is run
    assert code == 2 and "(700)" in error and not printed
    assert run(*flags, "--budgets", 700, "--questions", questions)[0] == 0


def test_a_prompt_without_room_for_an_answer_is_refused(run, model):
    code, _, error = run("budget_force", "--model", model, *SMALL, "--max-seq-len", 80)
    assert code == 2 and "only 80 fit" in error and not (model / "eval").exists()
