"""The programs as a person runs them: training, the whole path, and what they say to bad input."""
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import make_base
import mutants
import pytest
import safetensors.torch
import torch
from conftest import ROOT, tiny_model

import budget_force
import data
import sample
import train
from model import Transformer


def trained(run, tiny, out, *arguments):
    code, printed, _ = run("train", "--model", tiny, "--out", out, "--n", 10, "--batch-size", 4,
                           "--epochs", 1, *arguments)
    assert code == 0, printed
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return safetensors.torch.load_file(out / "model.safetensors"), losses, printed


# ---- Training -------------------------------------------------------------------------------


def test_rerun_is_bitwise_equal_and_the_seed_matters(run, tiny, tmp_path):
    first, losses, _ = trained(run, tiny, tmp_path / "a")
    again, _, _ = trained(run, tiny, tmp_path / "b")
    other, _, _ = trained(run, tiny, tmp_path / "c", "--seed", 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert len(losses) == 3                         # 10 examples by 4: 4, 4, 2


def test_the_loss_is_a_mean_over_the_steps_tokens(run, tiny, tmp_path):
    """All in one row or an example a row: the same steps, though the lengths are very unequal."""
    whole, losses, _ = trained(run, tiny, tmp_path / "a", "--tokens-per-batch", 99999)
    parts, again, _ = trained(run, tiny, tmp_path / "b", "--tokens-per-batch", 330)
    assert losses == pytest.approx(again, abs=1e-5)
    # Adam divides by the root of the square: a gradient of 1e-9 and one of 2e-9 move a weight
    # alike, so a few near-zero gradients differ by much of a step; the losses above are the strict
    # check.
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-3, rtol=0)


def test_the_first_loss_is_the_plain_one(run, tiny, tmp_path):
    _, losses, _ = trained(run, tiny, tmp_path / "a", "--batch-size", 10)
    chat, model = data.Chat(tiny), Transformer.load(tiny)
    total = count = 0
    for trace in data.countdown_traces(10, 0):
        ids, first = chat.example(*trace)
        logits = model(torch.tensor([ids]))[0, first - 1:-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[first:]),
                                                   reduction="sum").item()
        count += len(ids) - first
    assert losses[0] == pytest.approx(total / count, abs=1e-4)


def test_the_loop_is_the_recipes(run, tiny, tmp_path):
    """Against a plain loop: AdamW (0.9, 0.95), no decay of vectors, clipping, schedule, epoch
    order."""
    found, _, _ = trained(run, tiny, tmp_path / "a", "--epochs", 2,
                          "--weight-decay", 0.1, "--clip", 0.5)
    chat, model = data.Chat(tiny), Transformer.load(tiny)
    examples = [chat.example(*trace) for trace in data.countdown_traces(10, 0)]
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)]
               for name, p in model.named_parameters()}
    batches = [batch for epoch in (0, 1) for batch in data.epoch_batches(examples, 4, 0, epoch)]
    for step, batch in enumerate(batches):
        model.zero_grad()
        logits = [model(torch.tensor([ids]))[0, first - 1:-1] for ids, first in batch]
        answers = torch.cat([torch.tensor(ids[first:]) for ids, first in batch])
        torch.nn.functional.cross_entropy(torch.cat(logits), answers).backward()
        norm = sum(p.grad.pow(2).sum() for p in model.parameters()) ** 0.5
        rate = train.learning_rate(step, 6, 2e-3, 0.05)
        for name, p in model.named_parameters():
            g, (m, v) = p.grad * min(1, 0.5 / norm), moments[name]
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.95).addcmul_(g, g, value=0.05)
            p.data *= 1 - rate * (0.1 if p.dim() == 2 else 0)
            p.data -= (rate * m / (1 - 0.9 ** (step + 1))
                       / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8))
    # The mean, for the reason above; a wrong beta, decay, clip, rate or order gives 5e-4 and more.
    for name, p in model.named_parameters():
        assert (found[name] - p.data).abs().mean() < 1e-4, name


def test_training_learns(run, tiny, tmp_path):
    _, losses, printed = trained(run, tiny, tmp_path / "a", "--epochs", 20, "--lr", 1e-2)
    assert losses[-1] < 0.5 * losses[0]
    assert "60 steps" in printed


def test_over_long_examples_are_dropped_and_counted(run, tiny, tmp_path):
    lengths = [len(data.Chat(tiny).example(*trace)[0]) for trace in data.countdown_traces(10, 0)]
    limit = sorted(lengths)[6]
    _, _, printed = trained(run, tiny, tmp_path / "a", "--tokens-per-batch", limit)
    kept = sum(length <= limit for length in lengths)
    assert f"{kept} examples" in printed
    assert f"{10 - kept} dropped as longer than {limit}" in printed


def test_schedule():
    rates = [train.learning_rate(step, 100, 1.0, 0.05) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and max(rates) == 1.0
    assert all(a >= b for a, b in zip(rates[4:], rates[5:])) and 0 < rates[-1] < 0.001


def test_pretraining_from_scratch_and_traces_of_another_tool(run, tiny, tmp_path):
    """The documents of tests/make_base.py are tokens as they are, all of them supervised."""
    chat = data.Chat(tiny)
    rows = [json.dumps({"ids": ids}) + "\n" for ids in make_base.documents(20, 0, chat)]
    (tmp_path / "base.jsonl").write_text("".join(rows))
    trained(run, tiny, tmp_path / "a", "--scratch", "--data", tmp_path / "base.jsonl")
    assert data.load_examples(tmp_path / "base.jsonl", chat, 7) == [
        (json.loads(row)["ids"], 1) for row in rows[:7]]
    (tmp_path / "bad.jsonl").write_text('{"ids": [1, 2]}\n{"ids": [1, 99999]}\n')
    code, _, error = run("train", "--model", tiny, "--data", tmp_path / "bad.jsonl")
    assert code == 2 and "line 2: no list of two or more token ids below 1347" in error
    (tmp_path / "r1.json").write_text(json.dumps(
        [{"problem": "1+1?", "message_thinking": "Okay, so 1+1. " * 9,
          "message_content": r"\boxed{2}"}]))
    trained(run, tiny, tmp_path / "b", "--data", tmp_path / "r1.json", "--max-steps", 1)


def test_a_run_leaves_a_whole_model_directory(run, tiny, tmp_path):
    out = tmp_path / "deep" / "student"
    trained(run, tiny, out)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat.json", "model.safetensors", "metrics.jsonl", "run.json"}
    assert not list(out.parent.glob("*.draft"))
    assert json.loads((out / "run.json").read_text())["arguments"]["n"] == 10


def test_the_recorded_command_makes_the_run_again(run, tiny, tmp_path):
    """Bitwise, on a CPU; and run.json says what else a run depends on."""
    out = tmp_path / "a student"
    trained(run, tiny, out, "--seed", 3)
    first = (out / "model.safetensors").read_bytes()
    said = json.loads((out / "run.json").read_text())
    python, program, *words = shlex.split(said["command"])
    assert (python, program, said["threads"], said["processes"]) == ("python", "train.py", 1, 1)
    assert said["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    code, _, error = run("train", *words, "--overwrite")
    assert code == 0, error
    again = json.loads((out / "run.json").read_text())
    assert (out / "model.safetensors").read_bytes() == first
    assert again["data"] == said["data"] and len(said["data"]) == 16
    trained(run, tiny, tmp_path / "b", "--seed", 4)
    assert json.loads((tmp_path / "b" / "run.json").read_text())["data"] != said["data"]


# ---- The whole path -------------------------------------------------------------------------


def test_train_then_evaluate(run, tiny, tmp_path):
    out = tmp_path / "student"
    trained(run, tiny, out)
    code, printed, error = run("budget_force", "--model", out, "--base", tiny, "--n", 6,
                               "--budgets", 0, 8, -1, "--waits", 1, "--max-length", 128,
                               "--slots", 4)
    assert code == 0, error
    runs = [json.loads(line) for line in (out / "eval" / "runs.jsonl").read_text().splitlines()]
    found = [(r["model"] == "student", r["method"], r["max_thinking"], r["waits"]) for r in runs]
    assert found == [
        (False, "direct", 0, 0), *((student, "budget", *setting) for student in (False, True)
                                   for setting in ((0, 0), (8, 0), (-1, 0), (-1, 1)))]
    assert all(r["thinking_tokens"] <= r["max_thinking"] for r in runs if r["max_thinking"] >= 0)
    rows = [json.loads(line) for line in (out / "eval" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * len(runs)
    assert sum(r["correct"] for r in rows) == sum(r["correct"] for r in runs)
    assert [r["waits"] for r in rows[-6:]] == [1] * 6
    assert all(r["extensions"] <= r["waits"] for r in rows)
    assert json.loads((out / "eval" / "summary.json").read_text())["control"] == 100
    assert "1 Wait over 0" in printed and "unlimited + 1 Wait" in printed
    code, _, error = run("budget_force", "--model", out)
    assert code == 2 and "already holds" in error


def evaluated(directory):
    """rows.jsonl, runs.jsonl and summary.json as bytes: two evaluations are the same or not."""
    return [(directory / "eval" / name).read_bytes()
            for name in ("rows.jsonl", "runs.jsonl", "summary.json")]


EVALUATION = ("--base=", "--n", 12, "--budgets", 8, -1, "--waits", 1, "--max-length", 200,
              "--slots", 3)


def test_a_killed_evaluation_of_two_models_goes_on(run, tiny, tmp_path, monkeypatch):
    """Though the first one's is written already; what is there from another is still refused."""
    models = [shutil.copytree(tiny, tmp_path / name) for name in ("a", "b")]
    command = ["budget_force", "--model", *models, *EVALUATION]
    examine = budget_force.examine

    def killed(directory, *rest):
        if directory == str(models[1]):
            raise KeyboardInterrupt
        return examine(directory, *rest)
    monkeypatch.setattr(budget_force, "examine", killed)
    assert run(*command)[0] == 130 and (models[0] / "eval").exists()
    monkeypatch.undo()
    code, _, error = run(*command[:1], *command[1:], "--seed", 1)
    assert code == 2 and "other arguments" in error
    assert run(*command)[0] == 0 and (models[1] / "eval").exists()
    code, _, error = run(*command)
    assert code == 2 and "already holds an evaluation" in error


def test_an_evaluation_goes_on_with_its_own_questions(run, tiny, tmp_path, monkeypatch):
    model, asked = shutil.copytree(tiny, tmp_path / "a"), tmp_path / "q.jsonl"
    asked.write_text('{"question": "1+1?", "answer": "2"}\n')
    command = ["budget_force", "--model", model, "--base=", "--questions", asked, "--budgets", 4,
               "--waits", 0]
    with monkeypatch.context() as patch:
        patch.setattr(budget_force, "write", lambda *_: sys.exit(130))
        assert run(*command)[0] == 130
    asked.write_text('{"question": "1+2?", "answer": "3"}\n')
    code, _, error = run(*command)
    assert code == 2 and "other arguments" in error


def test_a_killed_evaluation_goes_on(run, tiny, tmp_path):
    """Killed again and again at random, once with a torn line: in the end the rows of one that was
    not, each question once; what was answered is not asked again."""
    whole, out = tmp_path / "whole" / "tiny", tmp_path / "killed" / "tiny"
    for directory in (whole, out):
        shutil.copytree(tiny, directory)
    assert run("budget_force", "--model", whole, *EVALUATION)[0] == 0
    rng, kills = random.Random(0), 0

    def journal():
        """Its whole lines, each behind its file's name."""
        with contextlib.suppress(FileNotFoundError):    # removed just now, as the evaluation ended
            return [f"{path.name} {line}" for path in (out / "eval.draft").glob("*.jsonl")
                    for line in path.read_text().splitlines() if line.endswith("}]")]
        return []
    for _ in range(30):
        child = os.fork()
        if not child:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1), os.dup2(devnull, 2)
            sys.argv = ["budget_force.py", "--model", str(out), *map(str, EVALUATION)]
            try:
                budget_force.main()
            finally:
                os._exit(0)
        before, deadline = len(journal()), time.monotonic() + 60
        while not (out / "eval").exists() and time.monotonic() < deadline and (
                len(journal()) == before):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (out / "eval").exists():
            break
        kills += 1
        if kills == 2:
            with open(sorted((out / "eval.draft").glob("*.0.jsonl"))[-1], "a") as file:
                file.write('\n[11, {"torn')
        keys = [line.split(",")[0] for line in journal()]           # RUN.RANK.jsonl [INDEX
        assert len(keys) == len(set(keys)) >= before
    assert kills > 2
    if not (out / "eval").exists():
        assert run("budget_force", "--model", out, *EVALUATION)[0] == 0
    assert evaluated(out) == evaluated(whole)


def test_an_evaluation_with_other_arguments_is_not_gone_on_with(run, tiny, tmp_path):
    out = tmp_path / "tiny"
    shutil.copytree(tiny, out)
    (out / "eval.draft").mkdir()
    (out / "eval.draft" / "arguments.json").write_text("{}")
    code, _, error = run("budget_force", "--model", out, *EVALUATION)
    assert code == 2 and "other arguments" in error
    assert run("budget_force", "--model", out, *EVALUATION, "--overwrite")[0] == 0
    assert not (out / "eval.draft").exists()


def test_an_evaluation_stays_until_the_next_is_whole(tmp_path, monkeypatch):
    home, old = tmp_path / "eval", {"rows.jsonl": "old", "more": "old"}
    home.mkdir()
    for name, text in old.items():
        (home / name).write_text(text)
    results = [({"n": 1}, [{"correct": True}])]

    def full(runs, path):
        raise OSError("the disk is full")
    monkeypatch.setattr(budget_force, "draw", full)
    with pytest.raises(OSError):
        budget_force.write(home, results, {})
    assert {path.name: path.read_text() for path in home.iterdir()} == old
    monkeypatch.setattr(budget_force, "draw", lambda runs, path: path.write_text("curve"))
    budget_force.write(home, results, {"control": 100})
    assert {path.name: path.read_text() for path in home.iterdir()} == {
        "rows.jsonl": '{"correct": true}\n', "runs.jsonl": '{"n": 1}\n', "curve.png": "curve",
        "summary.json": '{\n  "control": 100\n}\n'}
    assert [path.name for path in tmp_path.iterdir()] == ["eval"]


def test_two_processes_share_the_questions(run, tiny, tmp_path):
    one, two = tmp_path / "one" / "tiny", tmp_path / "two" / "tiny"
    for directory in (one, two):
        shutil.copytree(tiny, directory)
    assert run("budget_force", "--model", one, *EVALUATION)[0] == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
         "29731", "--", ROOT / "budget_force.py", "--model", two, *map(str, EVALUATION)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert evaluated(one) == evaluated(two)
    assert done.stdout.count("wrote") == 1          # one of them speaks


def test_a_process_asks_its_part(tmp_path, monkeypatch):
    """The second of three asks questions 1 and 4 of seven, but for those that are answered, and has
    the rows of all in their order. Behind a torn line a row is whole."""
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "3")
    for there, missing in (("", ["b", "e"]), ('\n[1, {"row": 1}]', ["e"]),
                           ('\n[4, {"row": 4}]\n[1, {"ro', ["b"])):
        directory, asked = tmp_path / f"{len(there)}", []
        directory.mkdir()
        (directory / "0.1.jsonl").write_text(there)

        def answer(questions):
            asked.extend(questions.values())
            for rank, share in ((0, (0, 3, 6)), (2, (5, 2))):       # the others, meanwhile
                (directory / f"0.{rank}.jsonl").write_text(
                    "".join(f'\n[{i}, {{"row": {i}}}]' for i in share))
            yield from ((index, {"row": index}) for index in questions)
        for _ in range(2):                          # the second time nothing is left to ask
            journal = budget_force.Journal(directory, {}, False)
            assert journal.complete("abcdefg", answer) == [{"row": i} for i in range(7)]
        assert asked == missing


def test_students_stand_side_by_side(run, tiny, tmp_path, monkeypatch):
    """Two right of two, and one of two: their mean, and how far they lie apart."""
    verdicts = iter([True, True, True, False])
    monkeypatch.setattr(budget_force, "grade", lambda *_: next(verdicts))
    for name in "ab":
        shutil.copytree(tiny, tmp_path / name)
    code, printed, error = run("budget_force", "--model", tmp_path / "a", tmp_path / "b", "--base=",
                               "--n", 2, "--budgets", 4, "--waits", 0, "--max-length", 128)
    assert code == 0, error
    *_, names, numbers = printed.splitlines()
    assert names.split()[-4:] == ["a", "b", "mean", "spread"]
    assert numbers.split() == ["4", "100.0%", "50.0%", "75.0%", "50.0"]


def test_without_matplotlib_the_curve_is_named_and_nothing_else_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    budget_force.write(tmp_path / "eval", [({"n": 1}, [{"correct": True}])], {})
    assert "no curve.png: `pip install matplotlib`" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {
        "rows.jsonl", "runs.jsonl", "summary.json"}


def test_the_papers_methods(run, tiny, tmp_path):
    out = tmp_path / "tiny"
    shutil.copytree(tiny, out)
    code, printed, error = run(
        "budget_force", "--model", out, "--base=", "--n", 3, "--budgets", 4, 16, "--max-length",
        200, "--waits", 0, "--temperature", 1, "--samples", 1, 3, "--tries", 2, "--method",
        "budget", "tokens", "tokens+budget", "steps", "steps+budget", "class", "rejection",
        "majority", "coverage")
    assert code == 0, error
    summary = json.loads((out / "eval" / "summary.json").read_text())
    assert len(summary["methods"]) == 9 and "class: short" in printed
    for method in ("budget", "tokens+budget", "steps+budget", "rejection"):
        assert summary["methods"][method]["control"] == 100
    rows = [json.loads(line) for line in (out / "eval" / "rows.jsonl").read_text().splitlines()]
    assert all(row["tries"] <= 2 for row in rows if row["method"] == "rejection")
    for method in ("tokens", "steps"):              # asked for, and not enforced
        assert any(row["thinking_tokens"] > 16 for row in rows if row["method"] == method)
    code, printed, _ = run("budget_force", "--draw", out / "eval" / "runs.jsonl")
    assert code == 0 and "class: long" in printed


def test_questions_of_a_file(run, tiny, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n' * 3)
    out = tmp_path / "tiny"
    shutil.copytree(tiny, out)
    code, printed, error = run("budget_force", "--model", out, "--base=", "--budgets", 4, "--waits",
                               0, "--questions", tmp_path / "q.jsonl", "--n", 2)
    assert code == 0, error
    rows = [json.loads(line) for line in (out / "eval" / "rows.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == ["1+1?"] * 2


def test_only_the_answer_is_graded(chat, monkeypatch):
    """A right expression in the thinking, or behind a second end of it, earns nothing."""
    question = {"question": "q", "answer": {"numbers": [2, 3, 5], "target": 16}}

    def graded(text, cut=False):
        setting = budget_force.Setting("budget", 0 if cut else -1)
        args = SimpleNamespace(wait=["Wait"], max_answer=32, grace=0, repeats=0, step_tokens=8,
                               temperature=0, top_k=0, top_p=1, min_p=0, seed=0)

        class Scripted:
            max_length = 999

            def generate(self, prompts, steer, *others, **options):
                row, script = sample.Row(0, prompts[0]), chat.tokenizer
                script.encode_special_tokens = False
                drawn = script.encode(text).ids
                script.encode_special_tokens = True
                while row.finish is None:
                    sample.Sampler.take(self, row, drawn.pop(0) if not row.queue else None, steer)
                    row.finish = "stop" if row.tokens[-1] in chat.stops else None
                yield row
        (_, row), = budget_force.evaluate(Scripted(), chat, {0: question}, setting, args)
        return row
    assert graded("no\n<|im_start|>Answer: (3+5)*2<|im_end|>")["correct"]
    # Here x gives way to `Final Answer:`.
    assert graded("x (3+5)*2<|im_end|>", cut=True)["found"] == "(3+5)*2"
    assert not graded("Answer: (3+5)*2\n<|im_start|>Answer: 3*5<|im_end|>")["correct"]
    assert not graded("no\n<|im_start|>no\n<|im_start|>Answer: (3+5)*2<|im_end|>")["correct"]
    assert graded("Answer: (3+5)*2\n<|im_start|>no<|im_end|>")["found"] is None


def test_streaming_shows_forced_apart(run, tiny):
    code, printed, _ = run("sample", "What?", "--model", tiny, "--max-new-tokens", 5)
    assert code == 0 and printed.startswith("[<|im_start|>think\n]")
    code, printed, _ = run("budget_force", "What?", "--model", tiny, "--budgets", 3, "--waits", 0)
    assert code == 0 and "[\n<|im_start|>answer\nFinal Answer:]" in printed
    assert "3 thinking tokens, 0 Wait, ended: cut" in printed


def test_half_a_character_that_was_drawn_is_not_shown_as_forced(chat, capsys):
    half = chat.text("é")[:1]
    printer = sample.Printer(chat, colour=False)
    printer.write(half, False)
    assert capsys.readouterr().out == ""
    printer.write(chat.text("Wait"), True)
    printer.write(half, False)
    printer.flush()
    assert capsys.readouterr().out == "\ufffd[Wait]\ufffd"


def test_show_marks_what_is_supervised(run):
    code, printed, _ = run("data", "show", "--n", 1)
    assert code == 0 and "<|im_start|>assistant\n[<|im_start|>think\n" in printed
    assert printed.endswith("\n]\n")
    code, printed, _ = run("data", "show", "--n", 1, "--colour", "always")
    assert "\033[32m<|im_start|>think" in printed


def test_help_tells_the_defaults_that_there_are(run):
    code, printed, _ = run("train", "--help")
    assert code == 0 and "passes over the examples (default: 8)" in " ".join(printed.split())
    assert "default: None" not in printed and "default: False" not in printed


def test_a_closed_pipe_is_no_complaint():
    """Output may go on a while: the pipe is closed before much of it can be written."""
    child = subprocess.Popen([sys.executable, "data.py", "countdown", "--n", "3000"], cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert json.loads(child.stdout.readline())["question"].startswith("Use ")
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"", 0)
    child.stderr.close()


# ---- Bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("command, complaint", [
    ("train --data {tmp}/none.jsonl", "No such file"), ("train --data {tmp}/empty", "is empty"),
    ("train --data {tmp}/torn", "line 2: no JSON"), ("train --data {tmp}/unanswered", "no answer"),
    ("train --model {tmp}", "tokenizer.json"), ("train --n 0", "0 is not a number of at least 1"),
    ("train --tokens-per-batch 9", "longer than 9"), ("train --out {tmp}/full", "--overwrite"),
    ("train --out {tmp}/full --overwrite", "holds no run"),
    ("train --out {tmp}/file/x", "File exists"),
    ("train --give-up 7", "at most 1"), ("train --model {tmp}/file", "tokenizer"),
    ("budget_force --model {tiny} {tmp}/none --base= --n 4", "config.json"),
    ("budget_force q --model {tiny} --wait=", "never empty"),
    ("train --n 99999", "not 99999"), ("train --nonsense", "unrecognized arguments"),
    ("train --epochs 0", "argument --epochs"), ("train --epochs many", "invalid number"),
    ("sample q --model {tmp}/none", "config.json"),
    ("budget_force --model {tiny} --budgets -2 --n 4", "-2 is not a number of at least -1"),
    ("budget_force --model {tiny} --waits -1 --n 4", "-1 is not a number of at least 0"),
    ("budget_force --model {tiny} --n 99999", "not 99999"),
    ("budget_force --model {tmp}/none --n 4 --base=", "config.json"),
    ("budget_force {long} --model {tiny} --max-length 64", "do not fit"),
    ("budget_force --model {tiny} --base= --n 2 --method majority", "--temperature above 0"),
    ("budget_force --draw {tmp}/unanswered", "no runs.jsonl"),
    ("budget_force --draw {tmp}/words", "no runs.jsonl"),
    ("budget_force --draw {tmp}/endless", "no runs.jsonl"),
    ("budget_force --model {tiny} --base= --method tokens --budgets -1", "--budgets above 0"),
    ("train --data {tmp}/one.jsonl", "two or more token ids"),
    ("train --data {tmp}/two.jsonl --ask tokens", "no questions for --ask"),
    ("train --mfu 0 --plan", "at least 0.001"), ("train --clip 0", "at least 1e-09"),
    ("train --plan", "--device-tflops"), ("train --model {small}", "1347 tokens, and the model 64"),
    ("train --data {tmp}/prose --ask steps", "no steps to ask for"),
    ("data show {tmp}/none.jsonl", "No such file"), ("data nothing", "invalid choice")])
def test_bad_input_gets_one_line_and_exit_code_2(run, tiny, tmp_path, command, complaint):
    (tmp_path / "empty").write_text("")
    (tmp_path / "torn").write_text(
        '{"question": "q", "thinking": "t", "answer": "a"}\n{"question": ')
    (tmp_path / "unanswered").write_text('{"question": "q", "thinking": "t"}')
    (tmp_path / "prose").write_text('{"question": "q", "thinking": "t", "answer": "a"}\n' * 2)
    (tmp_path / "one.jsonl").write_text('{"ids": [1]}')
    (tmp_path / "two.jsonl").write_text('{"ids": [1, 2]}')
    run_of = {"model": "m", "method": "budget", "max_thinking": 4, "waits": 0, "thinking_tokens": 4,
              "accuracy": 1.0, "low": 0.9, "high": 1.0}
    (tmp_path / "words").write_text(json.dumps(run_of | {"thinking_tokens": "x"}))
    (tmp_path / "endless").write_text(json.dumps(run_of).replace("1.0", "1e999"))
    (tmp_path / "full").mkdir()
    (tmp_path / "file").write_text("x")
    small = shutil.copytree(tiny, tmp_path / "small")
    tiny_model().save(small)
    before = sorted(tmp_path.rglob("*")) + sorted(tiny.rglob("*"))
    words = [word.format(tmp=tmp_path, tiny=tiny, small=small, long="word " * 200)
             for word in command.split()]
    if words[0] == "train":
        words[1:1] = ["--out", tmp_path / "out"] + ([] if "--model" in words else ["--model", tiny])
    code, _, error = run(*words)
    assert code == 2 and complaint in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if "error:" in line]) == 1
    assert sorted(tmp_path.rglob("*")) + sorted(tiny.rglob("*")) == before


def test_every_mutant_finds_its_line():
    """tests/mutants.py is too slow for each day; that it can be run at all is seen here."""
    for name, file, tests, line, _ in mutants.MUTANTS:
        assert (ROOT / file).read_text(encoding="utf-8").count(line) == 1, name
        assert (ROOT / tests).is_file(), name


def test_the_house_has_its_arrows():
    """Five programs, and only the imports the design allows."""
    allowed = {"model": set(), "data": set(), "train": {"model", "data"},
               "sample": {"model", "data"}, "budget_force": {"model", "data", "sample"}}
    assert {path.stem for path in ROOT.glob("*.py")} == set(allowed)
    for name, arrows in allowed.items():
        found = re.findall(r"^\s*(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), re.M)
        assert set(found) & set(allowed) <= arrows
