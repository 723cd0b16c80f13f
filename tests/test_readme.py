"""The README's worked changes, applied as they stand there and run."""
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


@pytest.fixture
def fork(tmp_path):
    """fork(k) is a copy of the project with the k-th change: a function that runs its Python."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "k.diff").touch()

    def apply(k):
        added = [line for line in DIFFS[k].splitlines() if re.match(r"[-+](?![-+]{2} )", line)]
        assert len(added) <= 15
        (tmp_path / "k.diff").write_text(DIFFS[k])
        subprocess.run(["git", "apply", "k.diff"], cwd=tmp_path, check=True)

        def python(*arguments):
            done = subprocess.run([sys.executable, *map(str, arguments)], cwd=tmp_path, text=True,
                                  capture_output=True)
            assert done.returncode == 0, done.stderr
            return done.stdout
        return python
    return apply


def test_there_are_three():
    assert len(DIFFS) == 3


def test_a_steer_of_ones_own(fork, tiny, tmp_path):
    """Its thinking never goes on behind `ok`, and now and then is cut there."""
    python = fork(0)
    model = shutil.copytree(tiny, tmp_path / "model")
    python("budget_force.py", "--model", model, "--base=", "--method", "sure", "--budgets", 200,
           "--n", 4, "--waits", 0, "--max-length", 300)
    rows = [json.loads(line) for line in (model / "eval" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(row["method"] == "sure" for row in rows)
    print(python("-c", "import budget_force as b, data, sample\n"
                 f"chat = data.Chat({str(tiny)!r})\n"
                 "steer, row = b.Sure.of(chat), sample.Row(0, chat.prompt('q'))\n"
                 "for token in chat.text('1+2=3 ok\\n4'):\n"
                 "    row.tokens += steer(row, token)\n"
                 "assert row.memory.ended == 'sure', row\n"
                 "assert chat.decode(row.tokens).startswith('1+2=3 ok\\n<|im_start|>answer')\n"))


def test_a_task_of_ones_own(fork, tmp_path):
    python = fork(1)
    python("-c", "import data\nq = {'letters': 'drow'}\n"
           "assert data.grade('Answer: Word', q) and not data.grade('Answer: row', q)\n"
           "assert data.grade('Answer: 5', '5.0')\n")
    (tmp_path / "q.json").write_text(json.dumps(
        [{"question": "Which word is an anagram of drow?", "answer": {"letters": "drow"}}]))
    python("-c", "import data\nq, = data.load_questions('q.json')\n"
           "assert data.grade('Answer: word', q['answer'])")


def test_another_way_to_choose(fork, tmp_path):
    python = fork(2)
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(
        {"question": f"q{i}", "thinking": "t" * (i + 1), "answer": "5"}) + "\n" for i in range(9)))
    python("data.py", "select", "--method", "shortest", "--pool", "pool.jsonl", "--n", 2, "--out",
           "chosen.jsonl")
    chosen = [json.loads(line) for line in (tmp_path / "chosen.jsonl").read_text().splitlines()]
    assert {row["question"] for row in chosen} == {"q0", "q1"}
    assert {row["stage"] for row in chosen} == {"shortest"}
