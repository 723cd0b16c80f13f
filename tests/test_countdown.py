"""recipe/countdown.py: questions, the teacher, the checker, length prompts; countdown-base."""
import hashlib
import importlib.util
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import jinja2.sandbox
import pytest

from data import Chat
from recipe.countdown import (
    LENGTH_PROMPTS,
    SHORT,
    add_length_prompts,
    ask_for_length,
    calculate,
    check,
    generate_trace,
    number_steps,
    pool,
    questions,
    search,
    split_of,
    traces,
)

ROOT = Path(__file__).parents[1]
BASE = ROOT / "assets" / "countdown-base"

spec = importlib.util.spec_from_file_location("pretrain", BASE / "pretrain.py")
pretrain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrain)


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "recipe.countdown", *map(str, arguments)],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)


# ---- Questions ------------------------------------------------------------------------------


def test_splits_share_no_question():
    """No (numbers, target) is in two splits, in whatever order the numbers are written."""
    keys = {split: {(tuple(sorted(row["answer"]["numbers"])), row["answer"]["target"])
                    for row in questions(split, n, 0)}
            for split, n in (("train", 3000), ("tune", 400), ("test", 500))}
    assert [len(keys[split]) for split in keys] == [3000, 400, 500]
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["tune"]
    assert not keys["tune"] & keys["test"]
    for numbers, target in keys["test"]:
        assert {split_of(order, target) for order in itertools.permutations(numbers)} == {"test"}


def test_questions_have_a_solution_and_depend_on_the_seed():
    rows = questions("test", 50, 0)
    for row in rows:
        numbers, target = row["answer"]["numbers"], row["answer"]["target"]
        assert target in {value for _, tries in search(numbers) for _, value, _ in tries}
        assert row["question"] == (f"Use {numbers[0]}, {numbers[1]} and {numbers[2]} with + - * "
                                   f"to make {target}.")
    assert rows == questions("test", 50, 0) != questions("test", 50, 1)
    assert rows[:10] == questions("test", 10, 0)
    for n in (99999, 0):
        with pytest.raises(ValueError, match=f"not {n}"):
            questions("test", n, 0)


def test_search_is_complete_and_its_arithmetic_is_right():
    steps = list(search([3, 5, 2]))
    assert [len(tries) for _, tries in steps] == [3] * 9
    assert steps[0][0] == "3+5=8" and [text for text, _, _ in steps[0][1]][:2] == ["8+2=10",
                                                                                  "8-2=6"]
    assert [step for step, _ in steps] == ["3+5=8", "5-3=2", "3*5=15", "3+2=5", "3-2=1", "3*2=6",
                                           "5+2=7", "5-2=3", "5*2=10"]
    for text, value, expression in (one for _, tries in steps for one in tries):
        assert calculate(expression) == value >= 0 and text.endswith(f"={value}")
        assert check(expression, {"numbers": [2, 3, 5], "target": value})


def test_published_numbers_rest_on_the_same_data():
    """Every result in the documentation comes from exactly these questions and traces."""
    assert digest(questions("test", 500, 0)) == "9451cfb2a4c38063"
    assert digest(questions("tune", 400, 0)) == "9bd17748f61d286e"
    assert digest(traces(1000, 0)) == "1ec7725916627bb2"
    assert digest(traces(1000, 0, hurried=3)) == "5c0f342a99201298"
    assert digest(list(pool(500, 0))) == "bd8b19cd56be4bb9"


# ---- Teacher --------------------------------------------------------------------------------


def test_a_careful_teacher_is_always_right():
    for row in questions("tune", 100, 0):
        thinking, answer = generate_trace(**row["answer"], rng=random.Random(0), give_up=0,
                                          false_hit=0, recheck=0)
        assert thinking.endswith(f" ok\nSo {answer}") and "Wait, is" not in thinking
        assert check(answer, row["answer"])


def test_traces_show_every_case_of_a_wait():
    """Checks that hold and that do not, going on instead of giving up, a second pass, giving up."""
    thoughts = [thinking for _, thinking, _ in traces(3000, 0)]
    text = "\n\n".join(thoughts)
    for pattern in (r" ok\nSo (.*)\nWait, is (\d+) \2\? ok\nSo \1\n\n",
                    r"\? ok\nSo .*\nWait, is (\d+) \1\? ok\nSo",
                    r"\? no\n\d+[-+*]", r" no\nWait\n\d+[-+*]"):
        assert re.search(pattern, text), pattern
    for value, target, verdict in re.findall(r"Wait, is (\d+) (\d+)\? (ok|no)", text):
        assert (value == target) == (verdict == "ok")
    assert any(thinking.endswith("no") for thinking in thoughts)
    steps = [sum(re.fullmatch(r"\d+[-+*]\d+=\d+", line) is not None for line in t.split("\n"))
             for t in thoughts]
    assert max(steps) > 9                               # the second pass


def test_give_up_changes_how_many_answers_are_wrong():
    def wrong(give_up):
        rows = questions("train", 1000, 0)
        answers = [answer for _, _, answer in traces(1000, 0, give_up)]
        return sum(not check(answer, row["answer"])
                   for row, answer in zip(rows, answers, strict=True))
    assert wrong(0.0) < 30 < wrong(0.5) < wrong(1.0)


def test_more_traces_begin_with_the_same_ones():
    """An ablation over the number of traces adds questions and changes none."""
    assert traces(30, 0)[:10] == traces(10, 0) != traces(10, 1)


def test_hurried_traces_ask_the_same_question_and_are_shorter():
    both = traces(400, 0, hurried=1)
    calm, hurried = both[::2], both[1::2]
    assert calm == traces(200, 0)
    assert [trace[0] for trace in calm] == [trace[0] for trace in hurried]
    lines = [sum(trace[1].count("\n") for trace in group) for group in (calm, hurried)]
    assert lines[1] < 0.8 * lines[0]
    assert all(trace[2] for trace in hurried)           # the answer is the last try


def test_the_pool_has_train_questions_only():
    rows = list(pool(400, 0))
    assert rows[:5] == list(pool(5, 0)) != list(pool(5, 1))
    for row in rows:
        numbers, target = row["gtruth_answer"].values()
        assert split_of(numbers, target) == "train" and target <= 200
        assert row["correct"] == check(row["answer"], row["gtruth_answer"])
        assert (row["domain"] == "high") == (target > 100)
    assert {row["correct"] for row in rows} == {True, False}
    assert len({row["domain"] for row in rows}) == 7
    with pytest.raises(ValueError, match="not 99999"):
        next(pool(99999, 0))


# ---- Checker --------------------------------------------------------------------------------


@pytest.mark.parametrize("text, value", [
    ("1+2*3", 7), ("(1+2)*3", 9), ("10-(4-3)", 9), ("8-3-2", 3), (" 7 ", 7), ("((2))*(3)", 6),
    ("2-8+1", -5), ("( 1 + 2 )*3", 9), ("(1)+(2)", 3), ("2*3*4-5", 19), ("05+1", 6)])
def test_calculate(text, value):
    assert calculate(text) == value


@pytest.mark.parametrize("text", ["", "1+", "(1", "1)", "1 2", "12 5", "2**3", "-1", "2*-1", "+1",
                                  "1/2", "a", "__import__('os')", "9" * 101, "(" * 100, "3+²",
                                  "٣+1", "()", "2(3)", "(2)3", "(1)(2)", ")1+2(", "1)+(2", "1_0"])
def test_calculate_refuses(text):
    with pytest.raises(ValueError):
        calculate(text)


@pytest.mark.parametrize("answer, right", [
    ("(3+5)*2", True), ("2*(5+3) = 16", True), (None, False), ("", False), ("3+5*2", False),
    ("8*2", False), ("(3+5)*2+2-2", False), ("16", False), ("(3+5)*2<|im_end|>", False),
    ("= (3+5)*2", False), ("(3+5)*2+0", False)])
def test_check(answer, right):
    assert check(answer, {"numbers": [2, 3, 5], "target": 16}) is right


@pytest.mark.parametrize("reference", [
    None, "16", 16, [2, 3], {}, {"numbers": [1]}, {"target": 1}, {"numbers": 5, "target": 1},
    {"numbers": ["1", 2], "target": 3}])
def test_a_reference_of_another_form_is_an_error(reference):
    with pytest.raises(ValueError, match="numbers and target"):
        check("1+2", reference)
    with pytest.raises(ValueError, match="numbers and target"):
        check(None, reference)


@pytest.mark.parametrize("hostile", [
    "9**9**9", "(" * 100_000, "-" * 999, "__import__('os').system('true')", "x" * 100_000,
    "9" * 100_000, "(" * 50 + ")" * 50, "(" * 49 + "1+" + ")" * 49, "1*" * 49, "1-" * 49 + "1",
    "(1)" * 33, "()" * 50, "1+(" * 33, "*(" * 50])
def test_hostile_answers_are_wrong_and_cost_little(hostile):
    """Counts calls, which do not depend on the speed of the machine."""
    calls = 0

    def count(frame, event, _):
        nonlocal calls
        calls += event in ("call", "c_call")
    sys.setprofile(count)
    try:
        right = check(hostile, {"numbers": [2, 3, 5], "target": 16})
    finally:
        sys.setprofile(None)
    assert not right and calls < 20_000


def test_random_expressions_agree_with_python():
    """Valid expressions have Python's value; random text gives a number or a ValueError."""
    rng = random.Random(0)

    def expression(depth):
        if not depth or rng.random() < 0.3:
            return str(rng.randint(0, 13))
        text = expression(depth - 1) + rng.choice(["+", "-", "*", " * "]) + expression(depth - 1)
        return rng.choice([text, f"({text})"])
    for _ in range(1000):
        text = expression(3)
        assert calculate(text) == eval(text)            # made here: digits, + - * and brackets
        broken = "".join(rng.choices("0123+-*() =x²", k=8))
        assert check(broken, {"numbers": [1, 2, 3], "target": 6}) in (True, False)


# ---- Length prompts -------------------------------------------------------------------------


def count_tokens(text):
    return len(re.findall(r"\d+|\w+|\W", text))


def test_length_prompts_state_the_length_of_the_trace():
    """The traces alternate between no prompt and each kind; only steps change the thinking."""
    plain, kinds = traces(60, 0, hurried=3), list(LENGTH_PROMPTS)
    assert kinds == ["tokens", "steps", "class"]
    prompted = list(add_length_prompts(plain, count_tokens, kinds))
    assert len(prompted) == 60
    for i, (trace, changed) in enumerate(zip(plain, prompted, strict=True)):
        prompt = changed[0].removeprefix(trace[0] + " Think for ")
        tokens = count_tokens(trace[1])
        steps = [line for line in trace[1].split("\n") if re.fullmatch(r"\d+[-+*]\d+=\d+", line)]
        kind = [None, *kinds][i % 4]
        if kind is None:
            assert changed[0] == trace[0]
        elif kind == "class":
            assert prompt == f"a {'short' if tokens <= SHORT else 'long'} time."
        elif kind == "tokens":
            limit = int(re.fullmatch(r"up to (\d+) tokens\.", prompt)[1])
            assert tokens <= limit < 2 * tokens and limit & limit - 1 == 0
        else:
            assert prompt == f"up to {len(steps)} steps."
            counted = re.findall(r"^(\d+) left\n(.*)$", changed[1], re.M)
            assert counted == [(str(len(steps) - 1 - k), step) for k, step in enumerate(steps)]
            changed = changed[0], re.sub(r"\d+ left\n", "", changed[1]), changed[2]
        assert changed[1:] == trace[1:]
    assert {text.split()[-2] for text, _, _ in prompted[3::4]} == {"short", "long"}


def test_fewer_traces_with_length_prompts_are_among_more():
    few, many = (list(add_length_prompts(traces(n, 0, hurried=1), count_tokens, ["class"]))
                 for n in (5, 60))
    assert few == many[:5]


def test_number_steps():
    thinking = "8-3=5\n5+2=7 no\nWait\n8+3=11\n11-2=9 ok\nSo 8+3-2"
    assert number_steps(thinking) == (
        "1 left\n8-3=5\n5+2=7 no\nWait\n0 left\n8+3=11\n11-2=9 ok\nSo 8+3-2", 2)
    assert number_steps("Hm.\n1+1=2") == ("Hm.\n0 left\n1+1=2", 1)
    assert number_steps("no arithmetic") == ("no arithmetic", 0)


def test_a_trace_without_steps_cannot_ask_for_them():
    plain = [("q", "no arithmetic", "5")] * 2
    assert list(add_length_prompts(plain, count_tokens, ["class"]))[1][0].endswith("a short time.")
    with pytest.raises(ValueError, match="no steps to ask for"):
        list(add_length_prompts(plain, count_tokens, ["steps"]))


def test_ask_for_length():
    assert ask_for_length("1+1?", None, 5) == "1+1?"
    assert ask_for_length("1+1?", "tokens", 64) == "1+1? Think for up to 64 tokens."
    assert ask_for_length("1+1?", "steps", 3) == "1+1? Think for up to 3 steps."
    assert ask_for_length("1+1?", "class", "long") == "1+1? Think for a long time."


# ---- Command line ---------------------------------------------------------------------------


def test_the_command_prints_traces_and_pool_as_json_lines():
    printed = run("traces", "--n", 20, "--seed", 1, "--give-up", 0.2)
    rows = [json.loads(line) for line in printed.stdout.splitlines()]
    assert printed.returncode == 0 and not printed.stderr
    assert [(row["question"], row["thinking"], row["answer"]) for row in rows] == traces(20, 1, 0.2)
    assert all(list(row) == ["question", "thinking", "answer"] for row in rows)
    printed = run("pool", "--n", 20, "--seed", 1, "--give-up", 0.2)
    assert [json.loads(line) for line in printed.stdout.splitlines()] == list(pool(20, 1, 0.2))


@pytest.mark.parametrize("arguments, message", [
    (("traces", "--n", 99999), "not 99999"), (("pool", "--n", 99999), "not 99999"),
    (("traces", "--n", 0), "not 0"), (("pool", "--n", -3), "not -3"),
    (("nothing",), "invalid choice"), (("traces", "--n", "many"), "invalid int")])
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, message):
    failed = run(*arguments)
    assert failed.returncode == 2 and not failed.stdout
    assert message in failed.stderr and "Traceback" not in failed.stderr
    assert sum("error:" in line for line in failed.stderr.splitlines()) == 1


def test_a_closed_pipe_prints_no_error():
    child = subprocess.Popen([sys.executable, "-m", "recipe.countdown", "traces", "--n", "3000"],
                             cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert json.loads(child.stdout.readline())["question"].startswith("Use ")
    child.stdout.close()                                # long before all of it is written
    assert child.stderr.read() == b""
    child.stderr.close()
    child.wait()


# ---- countdown-base -------------------------------------------------------------------------


def test_no_document_has_a_held_out_question_or_thinking_after_a_question():
    """Direct answers are to train questions, and so is every try compared with a target."""
    tries = 0
    for document in pretrain.document_texts(2000, 1):
        if isinstance(document, tuple):
            question, thinking, answer = document
            *numbers, target = map(int, re.findall(r"\d+", question))
            assert thinking is None and split_of(numbers, target) == "train"
            assert check(answer, {"numbers": numbers, "target": target})
            continue
        assert "Use" not in document and "<|" not in document
        for line in document.split("\n"):
            found = re.match(r"(\d+)([-+*])(\d+)=(\d+)( ok| no)?$", line)
            if not found:
                continue
            a, b, value = int(found[1]), int(found[3]), int(found[4])
            assert {"+": a + b, "-": a - b, "*": a * b}[found[2]] == value
            if not found[5]:
                first = (a, b), value
            else:                                       # a try from the first step before it
                tries += 1
                third = b if a == first[1] else a
                assert first[1] in (a, b) and split_of((*first[0], third), value) == "train"
    assert tries > 2000
    for numbers, steps in pretrain.train_steps()[0].items():
        assert all(split_of(numbers, value) == "train"
                   for _, found in steps for _, value, _ in found)


def test_documents_and_tokenizer_are_those_of_the_committed_model(tmp_path):
    assert digest(list(pretrain.documents(300, 0, Chat(BASE)))) == "2429fcfe9fc2579f"
    pretrain.make_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (BASE / name).read_bytes()


def test_chat_template():
    """ChatML with Qwen2.5's default system prompt, rendered as transformers does."""
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = sandbox.from_string((BASE / "chat_template.jinja").read_text(encoding="utf-8"))
    default = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    user = {"role": "user", "content": " q\n?"}
    for system in (None, "", " Think.\n"):
        messages = [user] if system is None else [{"role": "system", "content": system}, user]
        head = (f"<|im_start|>system\n{default if system is None else system}<|im_end|>\n"
                "<|im_start|>user\n q\n?<|im_end|>\n")
        prompt = template.render(messages=messages, add_generation_prompt=True)
        assert prompt == head + "<|im_start|>assistant\n"
        messages += [{"role": "assistant", "content": "a"}]
        assert template.render(messages=messages) == prompt + "a<|im_end|>\n"
