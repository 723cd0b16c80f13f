"""Feed broken input to everything that reads files or text from outside.

    python tests/fuzz.py                        every target, 10,000 inputs each
    python tests/fuzz.py answers rows --n 500   these targets, fewer inputs
    python tests/fuzz.py rows --only 1234       one input, with its traceback

A target is a function of (rng, directory) that makes a random input, uses it, and returns whether
it was accepted. These are faults: an exception that `cli.exit_on_user_error` does not turn into
one line, more than SECONDS of processor time, control characters on the terminal, and an assertion
of the target. An input is a function of (target, seed, number). With a fault the exit code is 1.
"""
import argparse
import contextlib
import copy
import io
import json
import math
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from model import Transformer, read_config  # noqa: E402
from recipe import cli, countdown, grading, rows, selection, teacher  # noqa: E402

FIXTURES = ROOT / "tests" / "fixtures"
INDEX = "model.safetensors.index.json"
FAMILIES = ("qwen2", "qwen3", "llama", "r1")
# Processor time of an input. Grading may take as long as math-verify's own time limits.
SECONDS = {"template": 10, "answers": 3 * 3 * grading.MAX_SECONDS}

# ---- Random changes -------------------------------------------------------------------------

# Values of unexpected types and sizes. Half a surrogate pair is valid JSON; \x1b[2J clears the
# terminal. RAW replaces the strings "@..." by JSON that json.dumps does not write.
VALUES = (None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 10**9, -(10**30), 10**30, 10**400, 1e308,
          5e-324, math.nan, math.inf, -math.inf, "", " ", "x", "5", "false", "\ud800", "a\0b", "²",
          "٣", "\x1b[2J\r\n", "../x.safetensors", "\ud800.safetensors", "\0.safetensors", "{", "}",
          "\\boxed{", "x" * 5000, [], {}, [[]], [None], [1, "x"], {"x": 1}, [2**63], [-1, 5],
          "F16", "F64", "I32", "@digits", "@deep", "@nested", "@float")
RAW = {'"@digits"': "9" * 5000, '"@deep"': "[" * 100_000, '"@float"': "1e999",
       '"@nested"': "[" * 500 + "]" * 500}
TEXTS = ("{", "}", "(", ")", "[", "]", "|", "\\boxed{", "Answer:", "9^9^9^9", "9" * 400, "1e999",
         "²", "٣", "½", "\ud800", "\u2028", "\0", "\x1b[2J", "\\frac", "\\sqrt[", "\\end", "&", "^",
         "\\begin{pmatrix}", "\\\\", "_", "!", "\\pm ", "\\text{", "\\sin", "=", ",", "-", ".", "$",
         "a" * 40, "aa ", " ", "\t", "\n", "1.", "<think>", "</think>", "figure ", "1/7^{99}+",
         "(" * 60, "-" * 600, "\\{1,2\\},", "7!", "é", "0" * 9, "1,111,", "*", " 1", "\u00a0")
BYTES = (b"\xff", b"\0", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\r\n", b"{", b"}", b'"', b",",
         b"\\", b"9" * 5000, b"-", b"[" * 100_000, b"NaN", b"\xe2\x80", b'"\\ud800"')


def edit(rng, text, parts=TEXTS):
    """A string or bytes with a few parts deleted, repeated, replaced or cut off."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        i = rng.randint(0, len(text))
        j = min(len(text), i + rng.choice((0, 1, 2, 5, 20, len(text))))
        part, many = rng.choice(parts), rng.choice((1, 1, 2, 30, 100_000))
        text = rng.choice((
            text[:i] + text[j:], text[:j] + text[i:], text[:i], text[:i] + part + text[j:],
            text[:i] + part * math.ceil(many / len(part)) + text[i:],
            text[:i] + text[i:j] * min(many, 100_000 // max(1, j - i)) + text[j:]))
    return text[:200_000]


def nodes(container):
    """(container, key) of every node of a JSON value."""
    for key in (container if isinstance(container, dict) else range(len(container))):
        yield container, key
        if isinstance(container[key], (dict, list)):
            yield from nodes(container[key])


def edit_json(rng, value):
    """A copy of a JSON value with a few nodes deleted, wrapped, exchanged or of another type."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        container, key = rng.choice(list(nodes(root)))
        other, other_key = rng.choice(list(nodes(root)))
        kind = rng.randrange(8)
        if kind == 0 and container is not root:
            del container[key]
        elif kind == 1:
            container[key] = rng.choice(([container[key]], {"x": container[key]}))
        elif kind == 2:
            container[key] = copy.deepcopy(other[other_key])
        elif kind == 3 and isinstance(container[key], str):
            container[key] = edit(rng, container[key])
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return root[0]


def to_bytes(rng, value, broken=0.2):
    """The bytes of a JSON value; with probability `broken` they are edited."""
    text = json.dumps(value)
    for mark, raw in RAW.items():
        text = text.replace(mark, raw)
    return edit(rng, text.encode(), BYTES) if rng.random() < broken else text.encode()


def accepts(call, *arguments):
    """Whether the call returns. A refusal must be one line of plain text and exit code 2."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output), \
                cli.exit_on_user_error():
            call(*arguments)
    except SystemExit as stop:
        assert stop.code == 2, f"exit code {stop.code}"
        *_, line = ["", *output.getvalue().splitlines()]
        assert line.startswith("error: "), f"not one line: {output.getvalue()[-300:]!r}"
        return False
    finally:
        text = output.getvalue()
        assert text == cli.escape(text), f"control characters are printed: {text[-300:]!r}"
    return True


# ---- Targets: models ------------------------------------------------------------------------


def fuzz_config(rng, directory):
    """config.json. An accepted one builds a model without memory, and can be saved and read."""
    path = directory / "config.json"
    raw = json.loads((FIXTURES / rng.choice(FAMILIES) / "config.json").read_text())
    path.write_bytes(to_bytes(rng, edit_json(rng, raw)))

    def use():
        config = read_config(directory)
        with torch.device("meta"):
            model = Transformer(config)
            if config.num_hidden_layers < 9:
                assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, config.vocab_size)
        path.write_text(json.dumps(config.to_dict()))
        assert repr(read_config(directory)) == repr(config)         # repr, because NaN != NaN
    return accepts(use)


def fuzz_weights(rng, directory):
    """The shards of a model or their index. Every tensor that is loaded has its shape."""
    copytree(FIXTURES / "qwen3", directory, dirs_exist_ok=True)
    path = rng.choice(sorted(directory.glob("model*")))
    content = path.read_bytes()
    if path.suffix == ".json":
        content = to_bytes(rng, edit_json(rng, json.loads(content)))
    else:
        end = 8 + int.from_bytes(content[:8], "little")
        header = content[8:end]
        if rng.random() < 0.5:
            header = to_bytes(rng, edit_json(rng, json.loads(header)))
        length = rng.choice([len(header)] * 9 + [0, 1, 2**31, 2**63, 2**64 - 1, len(header) + 1])
        content = length.to_bytes(8, "little") + header + content[end:]
        content = edit(rng, content, BYTES) if rng.random() < 0.5 else content
    path.write_bytes(content)
    return accepts(Transformer.load, directory)


def use_chat(directory):
    """Loads a chat. Text from outside never adds a control token to an example."""
    chat = data.Chat(directory)
    assert all(chat.tokenizer.id_to_token(i) for i in chat.stop_ids), "a stop id is no token"
    assert chat.tokenizer.id_to_token(chat.end_id) in chat.control_ids, "a turn ends in text"
    plain = chat.tokenizer.get_vocab(with_added_tokens=False).values()
    control = set(chat.control_ids.values()) - set(plain)
    counts = {sum(i in control for i in chat.example(text, text, text)[0])
              for text in ("x", *list(chat.control_ids)[:9])}
    assert len(counts) == 1, "text becomes a control token"
    ids, prompt_length = chat.example("2+3?", "2+3=5 \n", "5")
    assert 0 < prompt_length < len(ids) and chat.opening_ids and chat.closing_ids
    chat.decode(chat.prompt("q\x00é", thinking=False))
    (directory / "saved").mkdir(exist_ok=True)
    chat.save(directory / "saved")
    assert data.Chat(directory / "saved").stop_ids == chat.stop_ids


def fuzz_tokenizer(rng, directory):
    """The files of a model directory that a chat is made of, one of them broken."""
    copytree(FIXTURES / rng.choice(FAMILIES), directory, dirs_exist_ok=True,
             ignore=lambda *_: ["golden.json", "golden.safetensors"])
    (directory / "chat.json").write_text('{"thinking": "s1", "system": null}')
    path = rng.choice(sorted(set(directory.glob("*.json")) - set(directory.glob("model*"))))
    raw = json.loads(path.read_text())
    part = rng.choice(list(raw))
    if path.name == "tokenizer.json" and rng.random() < 0.3:        # another control token
        rng.choice(raw["added_tokens"])["content"] = rng.choice(
            ("", "{", "}", "\ufdd1", "user", "think", "\n", "<", "im_end"))
    elif rng.random() < 0.7:                                        # not only its vocabulary
        raw[part] = edit_json(rng, raw[part])
    else:
        raw = edit_json(rng, raw)
    path.write_bytes(to_bytes(rng, raw))
    return accepts(use_chat, directory)


TEMPLATES = (
    "{% for i in range(10**9) %}x{% endfor %}", "{% for i in range(99) %}{% endfor %}", "\0",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ caller() }}", "{% break %}", "{{ 1.x }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ [] | first }}",
    "{% for i in 'a' %}" * 30 + "{% endfor %}" * 30, "{% if 1 %}" * 120 + "{% endif %}" * 120,
    "{{ " + "(" * 500 + ")" * 500 + " }}", "{% include 'x' %}", "{% import 'x' as y %}",
    "{% extends 'x' %}", "{{ lipsum() }}", "{{ cycler() }}", "{{ messages.append(1) }}",
    "{{ ().__class__ }}", "{{ ''.__class__.__base__.__subclasses__() }}", "{{ messages[9].x }}",
    "{{ '{0.__class__}'.format(1) }}", "{{ '{x}'.format() }}", "{{ 'a'.encode('x') }}", "{{ x.y }}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "{{ bos_token }}", "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}", "{{ '%d' % 'a' }}", "{{ 5 | join }}", "{{ '\ud800' }}", "\ufdd1",
    "{{ messages | tojson }}", "{{ messages | map(attribute=5) | list }}", "<|im_end|>", "\ufdd2",
    "{{ messages[0].content[:1] }}", "{% set messages = [] %}", "{% generation %}")


def fuzz_template(rng, directory):
    """A chat template with hostile parts."""
    copytree(FIXTURES / rng.choice(FAMILIES), directory, dirs_exist_ok=True,
             ignore=lambda *_: ["model.safetensors"])
    path = directory / "chat_template.jinja"
    text = edit(rng, path.read_text(), TEMPLATES)
    path.write_text(text, encoding="utf-8", errors="replace")
    return accepts(use_chat, directory)


# ---- Targets: rows, replies, answers --------------------------------------------------------

ROWS = (
    {"question": "What is 2+3? " * 4, "thinking": "2+3=5", "answer": "Answer: 5",
     "gtruth_answer": "5", "correct": True, "domain": "sums"},
    {"question": "Use 1, 2 and 3 to make 6.", "thinking": "t", "attempt": "Answer: 1+2+3",
     "gtruth_answer": {"numbers": [1, 2, 3], "target": 6}},
    {"problem": "1. a\n2. b", "solution": "so \\boxed{\\frac12}", "thinking_trajectories": ["t"],
     "deepseek_attempt": "\\boxed{0.5}", "deepseek_grade": "Yes", "source_type": "math",
     "unfit": ""},
    {"Question": "Which?", "Correct Answer": "a", "Incorrect Answer 1": "b",
     "Incorrect Answer 2": "c", "Subdomain": "d", "qwen_correct": False})


def fuzz_rows(rng, directory):
    """A file of rows, read as traces, as questions, and by recipe.selection."""
    path, good, out = (directory / name for name in ("rows.jsonl", "good.jsonl", "out.jsonl"))
    broken = edit_json(rng, rng.choices(ROWS, k=rng.randint(1, 5)))
    as_lines = isinstance(broken, list) and rng.random() < 0.7
    path.write_bytes(b"\n".join(to_bytes(rng, row, broken=0.05) for row in broken) if as_lines
                     else to_bytes(rng, broken))
    good.write_text("\n".join(map(json.dumps, ROWS[:3])))
    out.unlink(missing_ok=True)
    pool, benchmarks, verdicts = rng.choice(((path, good, good), (good, path, good),
                                             (good, good, path)))

    def read_questions(need_answer):
        for row in rows.load_questions(path, need_answer=need_answer):
            row["question"].encode()                # a tokenizer takes it
            assert isinstance(row["answer"], (str, dict)) or not need_answer
            rows.trace_row(row, "t", "\\boxed{1+2+3}", finish="stop")

    def read_traces():
        for trace in rows.load_traces(path, teacher=rng.choice(rows.TEACHERS)):
            "".join(trace).encode()

    def select():
        arguments = ["--pool", pool, "--benchmarks", benchmarks, "--verdicts", verdicts, "--n", 2,
                     "--method", rng.choice(list(selection.METHODS)), "--out", out]
        with mock.patch("sys.argv", ["selection", *map(str, arguments)]):
            selection.main()
        rows.load_traces(out)
    results = [accepts(read_questions, True), accepts(read_questions, False), accepts(read_traces),
               accepts(select)]
    assert results[-1] == out.exists(), "a refusal leaves a file behind"
    return any(results)


def fuzz_jsonl(rng, directory):
    """A file to append rows to: an unfinished last line is cut off; other files stay unchanged."""
    path, content, new = directory / "traces.jsonl", b"", {"question": "q", "key": "new"}
    for i in range(rng.randint(0, 3)):
        row = {"question": "q", "thinking": "t", "teacher": {"key": f"{i}"}}
        row = edit_json(rng, row) if rng.random() < 0.2 else row
        content += to_bytes(rng, row, broken=0) + b"\n"
    content = rng.choice((content, content[:rng.randint(0, len(content))],
                          edit(rng, content, BYTES)))
    path.write_bytes(content)

    def use():
        file, done = rows.open_jsonl(path)
        with file:
            rows.append_jsonl(file, new)
        kept = path.read_bytes().removesuffix(json.dumps(new).encode() + b"\n")
        cut = content[len(kept):]
        assert kept == content + b"\n" or content.startswith(kept), "rows are changed"
        assert b"\n" not in cut and kept[-1:] in (b"", b"\n"), "more than a line is cut"
        assert cut[:2] == b'{"'[:len(cut)], "a line of another program is cut"
        assert {**done, "new": new} == rows.open_jsonl(path)[1]
        rows.read_rows(path)
    accepted = accepts(use)
    assert accepted or path.read_bytes() == content, "a refused file is changed"
    return accepted


def fuzz_replies(rng, directory):
    """A server's reply, up to the row that is written of it."""
    message = rng.choice(({"content": "<think>t</think>Answer: 5"},
                          {"reasoning_content": "2+3", "content": "secret-key Answer: \\boxed{5}"},
                          {"content": [{"type": "thinking", "thinking": "t"},
                                       {"type": "text", "text": "5"}]}))
    if rng.random() < 0.3:                          # the text that the thinking is found in
        message = {"content": edit(rng, "<think>\nt\n</think>\nAnswer: 5")}
    reply = {"model": "m", "choices": [{"finish_reason": "stop", "message": message}],
             "usage": {"prompt_tokens": 100, "completion_tokens": 400, "total_tokens": 500}}
    reply = edit_json(rng, reply) if rng.random() < 0.8 else reply
    text = to_bytes(rng, reply).decode(errors="replace")
    args = SimpleNamespace(usd_in=1.0, usd_out=2.0)
    path = directory / "traces.jsonl"
    with path.open("wb") as file:
        run = teacher.Run(args, "secret-key", file, None, worst_case=1.0)
        job = {"question": "2+3?", "answer": "5", "sample": 0, "key": "k"}
        accepted = accepts(run.record, job, text, 0.5)
        assert 0 <= run.spent < math.inf, "a reply earns money"
        if not accepted:
            run.failures = file
            run.fail(job, "no answer", text)
    assert b"secret-key" not in path.read_bytes()
    for _, row in rows.read_rows(path) if accepted else []:
        (row["thinking"] + row["answer"]).encode()
        assert "unfit" in row or not re.search("</?think>", row["answer"]), row["answer"]
    return accepted


CASES = [(case["answer"], answer) for line in (ROOT / "tests" / "grading.jsonl").open()
         for case in [json.loads(line)] for answer in case["right"] + case["wrong"]]


def fuzz_answers(rng, directory):
    """Answers to grade. Each is equal to itself."""
    reference, answer = rng.choice(CASES)
    answer = edit(rng, answer)
    reference = edit(rng, reference) if rng.random() < 0.3 else reference
    assert grading.equal(answer, answer) or not re.search(r"\w", answer), answer
    text = rng.choice((f"\\boxed{{{answer}}}", f"so \nAnswer: {answer}", answer))
    assert type(grading.extract_answer(text)) in (str, type(None))
    verdicts = [grading.equal(answer, reference), grading.grade(text, reference)]
    assert set(map(type, verdicts)) == {bool}
    return verdicts[0]


def fuzz_expressions(rng, directory):
    """Expressions of Countdown. An accepted one has the value that Python gives it."""
    text = edit(rng, "(1+2)*3")
    correct = countdown.check(text, {"numbers": [1, 2, 3], "target": 9})
    try:
        value = countdown.calculate(text)
    except ValueError:
        return correct
    text = " ".join(text.split())
    assert re.fullmatch(r"[-+*() 0-9]+", text) and "**" not in text, text
    assert value == eval(re.sub(r"\b0+(?=\d)", "", text)), text
    assert not correct or sorted(map(int, re.findall(r"\d+", text))) == [1, 2, 3], text
    return True


TARGETS = {name.removeprefix("fuzz_"): function for name, function in list(globals().items())
           if name.startswith("fuzz_")}

# ---- Running --------------------------------------------------------------------------------


class TooSlow(BaseException):
    """No `except Exception` of the code under test catches it."""


def stop_slow_input(*_):
    raise TooSlow


def run_input(name, seed, number):
    """One input: (accepted, the fault or None)."""
    rng, limit = random.Random(f"{name} {seed} {number}"), SECONDS.get(name, 1)
    start, accepted, fault = time.process_time(), False, None
    signal.signal(signal.SIGPROF, stop_slow_input)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        with tempfile.TemporaryDirectory() as directory:
            accepted = bool(TARGETS[name](rng, Path(directory)))
    except KeyboardInterrupt:
        raise
    except BaseException as error:                  # a panic of a Rust library is no Exception
        fault = error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if time.process_time() - start > limit:         # in a library that handles no signal
        fault = fault or TooSlow()
    return accepted, fault


def run_target(name, numbers, seed=0):
    """The line to print about these inputs of a target, and [(number, fault)]."""
    run_input(name, seed, 0)                        # imports, which are slow once
    results = {number: run_input(name, seed, number) for number in numbers}
    faults = [(number, fault) for number, (_, fault) in results.items() if fault]
    accepted = sum(accepted for accepted, _ in results.values())
    return f"{name:12} {len(results)} inputs, {accepted} accepted, {len(faults)} faults", faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"targets, of {', '.join(TARGETS)}")
    parser.add_argument("--n", type=int, default=10_000, help="inputs of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this input alone, with its traceback")
    args = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30,) * 2)         # huge sizes fail at once
    failed = False
    for name in args.names or TARGETS:
        numbers = range(args.n) if args.only is None else [args.only]
        line, faults = run_target(name, numbers, args.seed)
        print(line, flush=True)
        for number, fault in faults[:20]:
            where = traceback.extract_tb(fault.__traceback__)[-1]
            print(f"    {name} --seed {args.seed} --only {number}: {type(fault).__name__} "
                  f"{' '.join(cli.escape(str(fault)).split())[:150]} ({where.name})", flush=True)
            if args.only is not None:
                traceback.print_exception(fault)
        failed |= bool(faults)
    sys.exit(failed)


if __name__ == "__main__":
    main()
