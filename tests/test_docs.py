"""README.md and docs/: their commands, links and worked changes hold for the code as it is."""
import argparse
import doctest
import importlib
import json
import os
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import BASE, ROOT

import sample
from budget_force import Budget, make_row
from recipe import countdown
from recipe.report import Setting

README = ROOT / "README.md"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (README, *sorted((ROOT / "docs").glob("*.md")), BASE / "README.md")}
EXTENDING = "docs/extending.md"


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


# ---- Commands -------------------------------------------------------------------------------


def split_shell(script):
    """The simple commands of a shell script, each a list of words; a loop's body once, with the
    first value of its variable."""
    script = script.replace("\\\n", " ")
    commands = [[]]
    for line in script.splitlines():
        for name, value in re.findall(r"\bfor (\w+) in (\S+)", line):
            line = re.sub(rf"\${name}\b", value, line)
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        for word in words:
            if set(word) <= set(";&|"):
                commands.append([])
            elif word not in ("do", "done"):
                commands[-1].append(word)
        commands.append([])
    return [command for command in commands if command]


def program_arguments(command):
    """(program, arguments) of a command that runs one of the project's programs, else None."""
    if command[0] == "torchrun":
        command = ["python", *command[command.index("--") + 1:]]
    if ">" in command:
        command = command[:command.index(">")]
    if command[0] != "python" or command[1:3] == ["-m", "pytest"]:
        return None
    if command[1] == "-m" and command[2] != "venv":
        return command[2], command[3:]
    return (command[1], command[2:]) if command[1].endswith(".py") else None


def documented_commands():
    """(page, program, arguments) of the commands in code blocks, and in spans of code. A span's
    "..." and a name in capitals, such as DIR, stand for what a reader fills in."""
    for page, text in PAGES.items():
        if page == EXTENDING:                       # its commands need its changes: see below
            continue
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        spans = [span.replace("\n", " ").replace(" ...", "")
                 for span in re.findall(r"`((?:python|torchrun) [^`]+)`", prose)]
        prompts = re.findall(r"^\$ (.*)", text, re.M)
        for script in (*blocks(text, "bash"), *spans, *prompts):
            for found in filter(None, map(program_arguments, split_shell(script))):
                yield page, *found


COMMANDS = list(documented_commands())


class Parsed(Exception):
    """The arguments are valid."""


@pytest.mark.parametrize("page, program, arguments", COMMANDS,
                         ids=[f"{page}: {shlex.join([program, *args])[:60]}"
                              for page, program, args in COMMANDS])
def test_a_documented_command_has_valid_flags(page, program, arguments, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*positional, **keywords):
        parse_args(*positional, **keywords)
        raise Parsed
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(Parsed):
        if program.endswith(".py") and "/" in program:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            importlib.import_module(program.removesuffix(".py")).main()


def test_every_program_is_documented_with_a_command():
    programs = {program for _, program, _ in COMMANDS}
    assert programs >= {"train.py", "sample.py", "budget_force.py", "data.py", "recipe.teacher",
                        "recipe.selection", "recipe.countdown", "tests/bench.py"}


def test_the_benchmarks_run():
    """In sizes that measure nothing, so that they work when a GPU is at hand."""
    command = [sys.executable, ROOT / "tests" / "bench.py", "loss", "train", "decode", "--tiny",
               "--rounds", "1", "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for row in ("| ours, float32 ", "| 16, equal ", "| two Waits ", "| ours "):
        assert row in done.stdout


def test_ci_runs_the_commands_of_the_readme_in_their_order():
    """The first two blocks of README.md are the main job and the tests."""
    main_job, tests, *_ = blocks(PAGES["README.md"], "bash")
    assert "train.py" in main_job and "budget_force.py" in main_job and "pytest" in tests
    wanted = [" ".join(words) for words in split_shell(main_job + tests)]
    wanted = list(dict.fromkeys(wanted))            # the environment is activated once
    ci = [" ".join(words) for words in split_shell((ROOT / ".ci" / "run").read_text())]
    start = ci.index(wanted[0])
    assert ci[start:start + len(wanted)] == wanted


# ---- Links and lengths ----------------------------------------------------------------------


def slug(heading):
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(text):
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)", prose, re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`((?:recipe|docs|assets|tests|\.ci)/[\w./-]+)`", PAGES[page]):
        assert (ROOT / name).exists(), name


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[^)#]+)", PAGES["README.md"]))
    assert linked == {page for page in PAGES if page.startswith("docs/")}


def test_the_readme_has_at_most_200_lines():
    assert len(PAGES["README.md"].splitlines()) <= 200


# ---- The walkthrough ------------------------------------------------------------------------

WALKTHROUGH = PAGES["docs/walkthrough.md"]


@pytest.mark.parametrize("page", PAGES)
def test_names_that_link_to_a_file_are_defined_in_it(page):
    """[`Budget.remaining`](../budget_force.py): a function, class, method or constant."""
    for name, file in re.findall(r"\[`([\w.]+)`\]\((?:\.\./)?([\w/]+)\.py\)", PAGES[page]):
        if not file.endswith(name.removesuffix(".py")):
            found = importlib.import_module(file.replace("/", "."))
            for part in name.split("."):
                found = getattr(found, part)


def test_names_in_the_walkthrough_occur_in_the_code():
    paths = [*ROOT.glob("*.py"), *(ROOT / "recipe").glob("*.py")]
    words = {word for path in paths for word in re.findall(r"\w+", path.read_text())}
    prose = re.sub(r"^```.*?^```$", "", WALKTHROUGH, flags=re.M | re.S)
    names = re.findall(r"`([A-Za-z_]\w+)`", prose)
    assert len(names) > 20 and set(names) <= words


def test_the_session_of_the_walkthrough_prints_what_it_shows(monkeypatch):
    monkeypatch.chdir(ROOT)
    session = doctest.DocTestParser().get_doctest(
        "\n".join(blocks(WALKTHROUGH, "pycon")), {}, "walkthrough", "docs/walkthrough.md", 0)
    assert len(session.examples) > 15
    report = []
    doctest.DocTestRunner().run(session, out=report.append)
    assert not report, "".join(report)


class Replay:
    """A sampler whose model samples the tokens of a text."""

    def __init__(self, tokens):
        self.tokens = tokens

    def generate(self, prompts, controller, **options):
        sequence = sample.Sequence(0, prompts[0])
        for token in self.tokens:
            while sequence.queue:
                sequence.append_token(None)
            sequence.append_token(token, controller)
        sequence.finish_reason = "stop"
        yield sequence


@pytest.fixture
def forced(chat):
    """forced(num_waits) prints and returns the sequence in which the student gives up on the first
    test question; after each Wait it goes on as the teacher would."""
    question, = countdown.questions("test", 1, seed=0)
    gave_up, wrong = countdown.generate_trace(**question["answer"], rng=random.Random(4))
    thoughts = [gave_up, "\n12*5=60\n60+1=61 ok\nSo (12*5)+1", ", is 61 61? ok\nSo (12*5)+1"]

    def force(num_waits):
        text = "".join(f"{thought}\n<|im_start|>" for thought in thoughts[:num_waits + 1])
        text += f"Answer: {'(12*5)+1' if num_waits else wrong}<|im_end|>"
        return sample.stream(Replay(chat.encode_template(text)), chat,
                             chat.prompt(question["question"]), Budget(chat, num_waits=num_waits))
    return question, force


@pytest.mark.parametrize("page", ["README.md", "docs/walkthrough.md"])
def test_the_forced_answer_is_what_the_budget_makes_of_it(page, forced, capsys):
    shown, = re.findall(r"^\$ python budget_force.py .*\n(?:.*\n)*?\.\.\.\n((?:.*\n)*?)```$",
                        PAGES[page], re.M)
    question, force = forced
    assert f'"{question["question"]}"' in PAGES[page]
    state = force(1).state
    print(f"({state.thinking_tokens} thinking tokens, {state.waits} Wait, ended: {state.ended})")
    assert capsys.readouterr().out.endswith("\n" + shown)


def test_the_counts_of_waits(forced, chat, tmp_path, capsys, monkeypatch):
    question, force = forced
    rows = [{"model": "student", **asdict(Setting("budget", num_waits=n)),
             **make_row(force(n), chat, question)} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["waits.py", str(tmp_path / "rows.jsonl")])
    runpy.run_path(str(ROOT / "docs" / "waits.py"), run_name="__main__")
    table, = re.findall(r"^```\n(Wait .*?)^```$", WALKTHROUGH, re.M | re.S)
    shown, lines = table.splitlines(), capsys.readouterr().out.splitlines()
    assert shown[:4] == lines[:4]               # the teacher's counts, and the heads
    assert [re.split("  +", line.strip()) for line in lines[4:]] == [
        ["1", "gave up, solution ahead", "Wait", "1", "0", "1"],
        ["2", "So ...", "Wait, is # #? ok", "1", "1", "1"]]


def test_the_counts_of_waits_add_up_to_the_table_of_the_readme():
    counts = [list(map(int, line)) for line in re.findall(
        r"^   ([12])  .*?(\d+) +(\d+) +(\d+)$", WALKTHROUGH, re.M)]
    assert len(counts) == 7
    names = ("unlimited  ", "unlimited + 1 Wait", "unlimited + 2 Wait")
    for wait in (1, 2):
        answers, *right = map(sum, zip(*(row[1:] for row in counts if row[0] == wait), strict=True))
        assert answers == 500
        for name, correct in zip(names[wait - 1:], right, strict=False):
            accuracy = f"{100 * correct / answers:.1f}%"
            line, = re.findall(rf"^student +{re.escape(name)}.*", PAGES["README.md"], re.M)
            assert accuracy in line and accuracy in WALKTHROUGH


# ---- Worked changes -------------------------------------------------------------------------

DIFFS, EXAMPLES = (blocks(PAGES[EXTENDING], language) for language in ("diff", "bash"))


@pytest.fixture
def apply(tmp_path):
    """apply(k) makes a copy of the project with the k-th change. It returns a function that runs
    the page's k-th example there, with more arguments and after the checks of a script."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "recipe", tmp_path / "recipe")

    def change(k):
        changed = [line for line in DIFFS[k].splitlines() if re.match(r"[-+](?![-+]{2} )", line)]
        assert len(changed) <= 16
        (tmp_path / "k.diff").write_text(DIFFS[k])
        subprocess.run(["git", "apply", "k.diff"], cwd=tmp_path, check=True)

        def run_example(*more, checks=""):
            program, arguments = program_arguments(shlex.split(EXAMPLES[k]))
            script = f"{checks}\nimport {(name := program.removesuffix('.py'))}\n{name}.main()"
            done = subprocess.run(
                [sys.executable, "-c", script, *arguments, *map(str, more)], cwd=tmp_path,
                text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            assert done.returncode == 0, done.stderr
        return run_example
    return change


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_there_are_three_worked_changes():
    assert len(DIFFS) == len(EXAMPLES) == 3


def test_a_controller_of_your_own(apply, tiny, tmp_path):
    checks = f"""
import budget_force, data, sample
chat = data.Chat({str(tiny)!r})
controller, sequence = budget_force.Sure(chat), sample.Sequence(0, chat.prompt("q"))
for token in chat.encode("1+2=3 ok\\n4"):
    sequence.tokens += controller(sequence, token)
assert sequence.state.ended == "sure", sequence
assert chat.decode(sequence.tokens).startswith("1+2=3 ok\\n<|im_start|>answer"), sequence
for token in chat.encode("1 ok\\n2"):            # in the answer it ends nothing
    sequence.tokens += controller(sequence, token)
assert chat.decode(sequence.tokens).endswith("1 ok\\n2"), sequence
"""
    apply(0)("--model", tiny, "--base=", "--n", 2, "--num-waits", 0, "--max-seq-len", 400, "--out",
             "eval", checks=checks)
    rows = read_jsonl(tmp_path / "eval" / "rows.jsonl")
    assert sorted(row["method"] for row in rows) == ["budget"] * 4 + ["sure"] * 4


def test_a_task_of_your_own(apply, tiny, tmp_path):
    checks = """
from budget_force import is_correct
assert is_correct("Answer: Word", {"letters": "drow"})
assert not is_correct("Answer: row", {"letters": "drow"})
assert not is_correct("word", {"letters": "drow"})
assert is_correct("Answer: 5", "5.0")
assert is_correct("Answer: 1+2", {"numbers": [2, 1], "target": 3})
"""
    question, = blocks(PAGES[EXTENDING], "json")
    (tmp_path / "anagrams.jsonl").write_text(question)
    apply(1)("--model", tiny, "--base=", "--budgets", 8, "--num-waits", 0, "--out", "eval",
             checks=checks)
    row, = read_jsonl(tmp_path / "eval" / "rows.jsonl")
    assert "drow" in row["question"] and row["answer"] == {"letters": "drow"}


def test_another_way_to_choose(apply, tmp_path):
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(
        {"question": f"q{i}", "thinking": "t" * (i + 1), "answer": "5"}) + "\n" for i in range(9)))
    apply(2)("--n", 2)
    chosen = read_jsonl(tmp_path / "shortest.jsonl")
    assert {row["question"] for row in chosen} == {"q0", "q1"}
    assert {row["stage"] for row in chosen} == {"shortest"}
