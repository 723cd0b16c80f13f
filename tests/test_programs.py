"""What all programs share: help, bad input, and the layout of the repository."""
import ast
import json
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_model

from recipe import cli

PROGRAMS = ("train", "sample", "budget_force", "data", "recipe.countdown", "recipe.selection",
            "recipe.teacher")


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_says_the_defaults_that_there_are(run, program):
    code, printed, _ = run(program, "--help")
    assert code == 0 and "default: None" not in printed and "default: False" not in printed
    if program == "train":
        assert "passes over the examples (default: 8)" in " ".join(printed.split())


def test_a_closed_pipe_is_no_error():
    child = subprocess.Popen([sys.executable, "-m", "recipe.countdown", "traces", "--n", "3000"],
                             cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert json.loads(child.stdout.readline())["question"].startswith("Use ")
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"", 0)
    child.stderr.close()


@pytest.mark.parametrize("command, message", [
    ("train --model {tmp} --out {tmp}/out", "tokenizer.json"),
    ("train --nonsense", "unrecognized arguments"),
    ("sample q --model {tmp}", "tokenizer.json"),
    ("sample q --model {tiny} --top-p 0", "--top-p"),
    ("sample q --model {small}", "1347 tokens, and the model has 64"),
    ("sample q --model {tmp}/none", "tokenizer.json"),
    ("sample", "arguments are required: question"),
    ("sample {long} --model {short}", "does not fit: 1 to 63"),
    ("budget_force --model {tiny} {tmp} --base= --n 4", "tokenizer.json"),
    ("budget_force --model {tiny} --base {tmp}/none --n 4", "none"),
    ("budget_force q --model {tiny} --wait-text=", "Wait without text"),
    ("budget_force --model {tiny} --budgets -2", "expected a number from -1 to inf, got '-2'"),
    ("budget_force --model {tiny} --num-waits -1", "expected a number from 0 to inf, got '-1'"),
    ("budget_force --model {tiny} --n 99999", "not 99999"),
    ("budget_force {long} --model {tiny} --max-seq-len 64", "fit"),
    ("budget_force --model {tiny} --base= --n 2 --method majority", "--temperature above 0"),
    ("budget_force --draw {tmp}/unanswered", "runs.jsonl"),
    ("budget_force --draw {tmp}/words", "runs.jsonl"),
    ("budget_force --draw {tmp}/endless", "runs.jsonl"),
    ("budget_force --model {tiny} --base= --method tokens --budgets -1", "--budgets above 0"),
    ("data show {tmp}/none.jsonl", "No such file"), ("data nothing", "invalid choice"),
    ("recipe.countdown traces --n 99999", "not 99999"),
    ("recipe.selection --pool {tmp}/none.jsonl --out {tmp}/new", "No such file")])
def test_bad_input_gets_one_line_and_exit_code_2(run, tiny, tmp_path, command, message):
    (tmp_path / "unanswered").write_text('{"question": "q", "thinking": "t"}')
    run_of = {"model": "m", "method": "budget", "max_thinking": 4, "num_waits": 0,
              "thinking_tokens": 4, "accuracy": 1.0, "low": 0.9, "high": 1.0}
    (tmp_path / "words").write_text(json.dumps(run_of | {"thinking_tokens": "x"}))
    (tmp_path / "endless").write_text(json.dumps(run_of).replace("1.0", "1e999"))
    small = shutil.copytree(tiny, tmp_path / "small")
    tiny_model().save(small)
    short = shutil.copytree(tiny, tmp_path / "short")
    tiny_model(vocab_size=1408, max_position_embeddings=64).save(short)
    before = sorted(tmp_path.rglob("*")) + sorted(tiny.rglob("*"))
    paths = {"tmp": tmp_path, "tiny": tiny, "small": small, "short": short}
    words = [word.format(**paths, long="word " * 200) for word in command.split()]
    code, _, error = run(*words)
    lines = [line for line in error.splitlines() if "error:" in line]
    assert code == 2 and "Traceback" not in error and len(lines) == 1
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) + sorted(tiny.rglob("*")) == before


def test_debug_shows_the_traceback(run, tmp_path):
    with pytest.raises(FileNotFoundError):
        run("data", "show", tmp_path / "none.jsonl", "--debug")


def test_out_of_memory_is_one_line_that_helps(capsys):
    with pytest.raises(SystemExit) as stop, cli.exit_on_user_error():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
    assert stop.value.code == 2 and "smaller --max-num-seqs" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="shapes"), cli.exit_on_user_error():
        raise RuntimeError("shapes")            # a fault of the program


# ---- The layout -----------------------------------------------------------------------------

LINES = {"model": 440, "data": 340, "train": 330, "sample": 300, "budget_force": 360}
IMPORTS = {
    "model": set(), "data": {"recipe.cli", "recipe.countdown", "recipe.rows"},
    "train": {"model", "data", "recipe.cli", "recipe.countdown", "recipe.rows", "recipe.cost",
              "recipe.checkpoint"},
    "sample": {"model", "data", "recipe.cli"},
    "budget_force": {"data", "sample", "recipe.cli", "recipe.countdown", "recipe.rows",
                     "recipe.grading", "recipe.report", "recipe.remote"},
    "recipe.cli": set(), "recipe.remote": {"data", "sample", "recipe.cli"},
    "recipe.countdown": set(), "recipe.grading": set(), "recipe.report": set(),
    "recipe.cost": set(), "recipe.checkpoint": set(), "recipe.rows": {"recipe.grading"},
    "recipe.teacher": {"recipe.cli", "recipe.rows", "recipe.grading"},
    "recipe.selection": {"recipe.cli", "recipe.rows", "recipe.grading"}}


def project_imports(path):
    """The project's own modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name in IMPORTS)


def test_files_stay_within_their_limits_and_imports():
    paths = {path.stem: path for path in ROOT.glob("*.py")}
    assert set(paths) == set(LINES)
    for name, limit in LINES.items():
        assert paths[name].read_text(encoding="utf-8").count("\n") <= limit, name
    paths |= {f"recipe.{path.stem}": path for path in (ROOT / "recipe").glob("*.py")}
    assert set(paths) == set(IMPORTS)
    for name, path in paths.items():
        assert set(project_imports(path)) <= IMPORTS[name], name


def test_the_comparison_counts_the_lines_there_are():
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    lines = {name: (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8").count("\n")
             for name in IMPORTS}
    programs, total = sum(lines[name] for name in LINES), sum(lines.values())
    path = total - lines["recipe.teacher"] - lines["recipe.selection"]
    assert f"| Lines of the path | {path:,} |" in page
    assert f"have {programs:,} lines and `recipe/` has {total - programs:,}, of which" in page


def test_every_mutant_finds_its_line():
    """tests/mutants takes too long for each run; this checks that it can be run at all."""
    for name, file, tests, line, _ in runpy.run_path(str(ROOT / "tests" / "mutants"))["MUTANTS"]:
        assert (ROOT / file).read_text(encoding="utf-8").count(line) == 1, name
        assert (ROOT / tests).is_file(), name
