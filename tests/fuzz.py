"""Put broken input through all that reads what others wrote, and see it refused in one line.

    python tests/fuzz.py                        every target, 10,000 inputs each
    python tests/fuzz.py answers rows --n 500   these targets, fewer inputs
    python tests/fuzz.py rows --only 1234       one input again, with its whole traceback

A target is a function of (rng, room): it makes one input by chance, writes it into the directory
`room` where a file is wanted, and says whether it was accepted. A fault is an exception that is no
documented refusal, an input that takes more than a second of processor time, a line on the terminal
that is more than text, or an assertion of the target's own: a file that came to harm, a result that
is plainly wrong. An input is a pure function of (target, seed, number); with a fault the exit code
is 1.
"""
import argparse
import ast
import contextlib
import copy
import email.message
import io
import json
import math
import operator
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402  (the programs lie beside tests/)
from model import INDEX, BadModel, Transformer, read_config  # noqa: E402

FIXTURES, BASE = ROOT / "tests" / "fixtures", ROOT / "assets" / "countdown-base"
SECONDS = 1.0               # of processor time for one input, so that busy neighbours do not count

# ---- Breaking things ------------------------------------------------------------------------

# Values that a reader did not think of. "@..." stand for what json.dumps would not write: see
# `written`. Half a surrogate pair is valid JSON; \x1b[2J clears a terminal.
ODD = (None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 10**9, -(10**30), 10**30, 10**400, 1e308,
       5e-324, math.nan, math.inf, -math.inf, "", " ", "x", "5", "false", "\ud800", "a\0b", "²",
       "٣", "\x1b[2J\r\n", "../x.safetensors", "\ud800.safetensors", "\0.safetensors", "{", "}",
       "{question}", "\\boxed{", "x" * 5000, [], {}, [[]], [None], [1, "x"], {"x": 1}, "@digits",
       "@deep", "@nested", "@float")
RAW = {'"@digits"': "9" * 5000, '"@deep"': "[" * 100_000, '"@float"': "1e999",
       '"@nested"': "[" * 500 + "]" * 500}
SCRAPS = ("{", "}", "{{", "(", ")", "[", "]", "|", "\\boxed{", "Answer:", "9^9^9^9", "9" * 400,
          "1e999", "²", "٣", "½", "\ud800", "\u2028", "\0", "\x1b[2J", "\\frac", "\\sqrt[",
          "\\begin{pmatrix}", "\\end", "&", "\\\\", "^", "_", "!", "\\pm ", "\\text{", "\\sin", "=",
          ",", "-", ".", "$",
          "a" * 40, "aa ", " ", "\t", "\n", "1.", "<think>", "</think>", "figure ", "1/7^{99}+",
          "(" * 60, "-" * 600, "\\{1,2\\},", "7!", "é", "0" * 9, "1,111,")
BYTES = (b"\xff", b"\0", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\r\n", b"{", b"}", b'"', b",",
         b"\\", b"9" * 5000, b"-", b"[" * 100_000, b"NaN", b"\xe2\x80", b'"\\ud800"')


def edited(rng, text, scraps):
    """A text or bytes with a few places deleted, doubled, replaced, cut or repeated many times."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        i = rng.randint(0, len(text))
        j = min(len(text), i + rng.choice((0, 1, 2, 5, 20, len(text))))
        scrap, many = rng.choice(scraps), rng.choice((2, 3, 30, 100_000))
        text = rng.choice((
            lambda: text[:i] + text[j:], lambda: text[:j] + text[i:],
            lambda: text[:i] + scrap + text[i:], lambda: text[:i] + scrap + text[j:],
            lambda: text[:i], lambda: text[:i] + scrap * (many // len(scrap)) + text[i:],
            lambda: text[:i] + text[i:j] * min(many, 100_000 // max(1, j - i)) + text[j:]))()
    return text[:200_000]


def swapped(rng, value):
    """A copy of a JSON value with a few places of another type, gone, wrapped or elsewhere."""
    value = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = []                                 # (container, key) of all that is in it

        def walk(node):
            for key in (node if isinstance(node, dict) else range(len(node))):
                places.append((node, key))
                if isinstance(node[key], (dict, list)):
                    walk(node[key])
        walk(value)
        node, key = rng.choice(places)
        other = copy.deepcopy(rng.choice(places[1:] or places))
        kind = rng.randrange(8)
        if kind == 0 and node is not value:
            del node[key]
        elif kind == 1:
            node[key] = [node[key]] if rng.random() < 0.5 else {"x": node[key]}
        elif kind == 2:
            node[key] = other[0][other[1]]
        elif kind == 3 and isinstance(node[key], str):
            node[key] = edited(rng, node[key], SCRAPS)
        else:
            node[key] = copy.deepcopy(rng.choice(ODD))
    return value[0]


def written(rng, value, torn=0.2):
    """The bytes of a JSON value, a key doubled now and then, and torn with that probability."""
    text = json.dumps(value)
    if isinstance(value, dict) and value and rng.random() < 0.1:
        text = f"{text[:-1]}, {json.dumps({rng.choice(list(value)): rng.choice(ODD)})[1:]}"
    for mark, raw in RAW.items():
        text = text.replace(mark, raw)
    return edited(rng, text.encode(), BYTES) if rng.random() < torn else text.encode()


def put(path, text):
    path.unlink(missing_ok=True)                    # a model may still have the old one mapped
    path.write_bytes(text)


def accepted(call):
    """Does it pass? What a program refuses goes through its own `complaints`, to one line of text
    alone; any other exception is a fault."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            with data.complaints(BadModel):
                call()
    except SystemExit as stop:
        assert stop.code == 2, f"exit code {stop.code}"
        said = printed.getvalue().splitlines()[-1:]
        assert said and said[0].startswith("error: "), f"no one line: {printed.getvalue()[-300:]!r}"
        return False
    finally:
        said = printed.getvalue()
        assert said == data.escape(said), f"the terminal is steered: {said[-300:]!r}"
    return True


# ---- Targets --------------------------------------------------------------------------------


def target_config(rng, room):
    """config.json; what is accepted is built without memory, read once by `forward`, and saved."""
    family = rng.choice(("qwen2", "qwen3", "llama", "r1"))
    raw = json.loads((FIXTURES / family / "config.json").read_text())
    put(room / "config.json", written(rng, swapped(rng, raw)))

    def use():
        config = read_config(room)
        with torch.device("meta"):
            model = Transformer(config)
            if config.num_hidden_layers < 9:
                assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, config.vocab_size)
        put(room / "config.json", json.dumps(config.to_dict()).encode())
        # As text, for what the program does not read may hold a NaN.
        assert repr(read_config(room)) == repr(config)
    return accepted(use)


def target_index(rng, room):
    """The list of the shards of a model."""
    for path in (FIXTURES / "qwen3").glob("*"):
        if not (room / path.name).exists():
            shutil.copy(path, room)
    index = json.loads((FIXTURES / "qwen3" / INDEX).read_text())
    put(room / INDEX, written(rng, swapped(rng, index)))
    return accepted(lambda: Transformer.load(room))


def target_safetensors(rng, room):
    """The weights: the header's length, its JSON, its offsets, the numbers themselves. What is
    accepted is what the header says, read here by hand."""
    shutil.copy(FIXTURES / "qwen2" / "config.json", room)
    whole = (FIXTURES / "qwen2" / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header, numbers = whole[8:end], whole[end:]
    kind = rng.randrange(4)
    if kind == 0:                                   # a header that says something else
        raw = json.loads(header)
        name = rng.choice(list(raw))
        entry = swapped(rng, raw[name])
        if rng.random() < 0.5 and isinstance(entry, dict) and name != "__metadata__":
            key = rng.choice(("dtype", "shape", "data_offsets"))
            entry[key] = rng.choice(("F16", "BF16", "I32", "F64", "F8_E4M3", "BOOL", [], [0],
                                     [2**63], [-1, 5], [0, 4], [4, 0], [0, 2**64], [8, 8]))
        header = written(rng, {**raw, name: entry}, torn=0.3)
    elif kind == 1:
        numbers = edited(rng, numbers, BYTES)
    whole = len(header).to_bytes(8, "little") + header + numbers
    if kind == 2:
        whole = rng.choice((0, 1, 7, 2**31, 2**63, 2**64 - 1, len(header) - 1, len(header) + 1,
                            len(whole))).to_bytes(8, "little") + whole[8:]
    elif kind == 3:
        flipped = bytearray(whole)
        for _ in range(rng.choice((1, 2, 9))):
            flipped[rng.randrange(rng.choice((9, end, len(whole))))] ^= 1 << rng.randrange(8)
        whole = bytes(flipped)[:rng.choice((len(whole), len(whole), rng.randint(0, len(whole))))]
    put(room / "model.safetensors", whole)

    def use():
        model = Transformer.load(room)
        end = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:end])
        for name, got in model.state_dict().items():
            first, last = header[name]["data_offsets"]
            kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
            said = torch.frombuffer(bytearray(whole[end + first:end + last]),
                                    dtype=kind[header[name]["dtype"]])
            assert got.flatten().equal(said.float()) or said.isnan().any(), name
    return accepted(use)


def some_rows(rng):
    """A few rows as they are met, of questions and of traces."""
    return rng.choices((
        {"question": "What is 2+3? " * 4, "thinking": "2+3=5", "answer": "Answer: 5",
         "gtruth_answer": "5", "correct": True, "domain": "sums"},
        {"question": "Use 1, 2 and 3 to make 6.", "thinking": "t", "attempt": "Answer: 1+2+3",
         "gtruth_answer": {"numbers": [1, 2, 3], "target": 6}},
        {"question": "Use 2 and 3 to make 6.", "answer": {"numbers": [2, 3], "target": 6}},
        {"problem": "1. a\n2. b", "solution": "so \\boxed{\\frac12}",
         "thinking_trajectories": ["t"], "deepseek_attempt": "\\boxed{0.5}",
         "deepseek_grade": "Yes", "source_type": "math"},
        {"Question": "Which?", "Correct Answer": "a", "Incorrect Answer 1": "b",
         "Incorrect Answer 2": "c", "Subdomain": "d", "qwen_correct": False}), k=rng.randint(1, 5))


def target_rows(rng, room):
    """A file of rows in every place where one is read: as traces, as questions, and in `select`."""
    rows, path, out = some_rows(rng), room / "rows.jsonl", room / "out.jsonl"
    rows = swapped(rng, rows) if rng.random() < 0.9 else rows
    if isinstance(rows, list) and rng.random() < 0.7:
        text = b"\n".join(written(rng, row, torn=0.05) for row in rows)
    else:
        text = written(rng, rows)
    put(path, text)
    put(room / "good.jsonl", b"\n".join(json.dumps(row).encode() for row in some_rows(rng) * 2))
    out.unlink(missing_ok=True)
    good, method = room / "good.jsonl", rng.choice(("s1k", "random", "longest", "diverse", "full"))

    def as_questions(graded):
        for row in data.load_questions(path, graded=graded):
            json.dumps(row["question"], ensure_ascii=False).encode()        # a tokenizer takes it
            assert type(row["question"]) is str and (not graded or row["answer"])
            try:
                data.trace_row(row, "t", "\\boxed{1+2+3}", finish="stop")
            except data.BadInput as error:          # too late: the answer has been paid for
                raise AssertionError("a question without a verdict") from error

    def as_traces():
        for trace in data.load_traces(path, teacher=rng.choice(data.TEACHERS),
                                      verbose=rng.random() < 0.5):
            json.dumps(trace, ensure_ascii=False).encode()

    def chosen(pool, held, verdicts):
        data.select(SimpleNamespace(
            pool=pool, benchmarks=[held], verdicts=[verdicts], out=out, overwrite=True, words=8,
            method=method, n=3, seed=0, domain=rng.choice((None, None, "domain")), verbose=False,
            sources=["math"], seed_length=0, teacher="deepseek"))
    taken = [accepted(lambda: as_questions(True)), accepted(lambda: as_questions(False)),
             accepted(as_traces)]
    for files in ((path, good, good), (good, path, good), (good, good, path)):
        taken.append(accepted(lambda: chosen(*files)))
        if taken[-1]:
            assert len(data.usable_rows(out)) <= (99 if method == "full" else 3)
        else:
            assert not out.exists(), "a refusal left a file behind"
        out.unlink(missing_ok=True)
    return any(taken)


def target_traces(rng, room):
    """A file of traces to go on with: another's is never touched, a torn line is cut off."""
    path, whole = room / "traces.jsonl", b""
    for i in range(rng.randint(0, 3)):
        row = {"question": "q", "thinking": "t", "answer": "5", "teacher": {"key": f"{i}"}}
        whole += written(rng, swapped(rng, row) if rng.random() < 0.2 else row, torn=0) + b"\n"
    whole = rng.choice((whole, whole[:rng.randint(0, len(whole))], edited(rng, whole, BYTES)))
    put(path, whole)

    def use():
        file, done = data.open_traces(path)
        with file:
            data.write_row(file, {"question": "q", "teacher": {"key": "new"}})
        kept = path.read_bytes().rpartition(b'{"question": "q", "teacher": {"key": "new"}}')[0]
        torn = whole[len(kept):]
        assert kept in (whole, whole + b"\n") or whole.startswith(kept), "rows were changed"
        assert b"\n" not in torn and (kept.endswith(b"\n") or not kept), "more than a line was cut"
        assert torn[:13] == b'{"question": '[:len(torn)], "another's line was cut"
        rows = data.read_rows(path)                 # what it goes on with can be read
        assert {row["teacher"]["key"] for _, row in rows} == {*done, "new"}
    taken = accepted(use)
    assert taken or path.read_bytes() == whole, "a refused file was changed"
    return taken


def target_chat(rng, room):
    """tokenizer.json, chat.json and the stop tokens of a model's directory."""
    source = rng.choice([FIXTURES / name for name in ("qwen2", "qwen3", "llama", "r1")])
    raw = {name: json.loads((source / name).read_text())
           for name in ("tokenizer.json", "generation_config.json", "config.json")}
    raw["chat.json"] = {"family": None, "thinking": rng.choice(("s1", "think", None))}
    broken = rng.choice(list(raw))
    for name, value in raw.items():
        if name == broken == "tokenizer.json" and rng.random() < 0.7:     # not only its vocabulary
            part = rng.choice(list(value))
            value = {**value, part: swapped(rng, value[part])}
            if rng.random() < 0.3:                  # a control token of another name
                value = copy.deepcopy(value)
                with contextlib.suppress(TypeError, LookupError):
                    rng.choice(value["added_tokens"])["content"] = rng.choice(
                        ("", "{", "}", "{question}", "user", "think", "\n", "<", "im_end"))
        elif name == broken:
            value = swapped(rng, value)
        put(room / name, written(rng, value, torn=0.2 * (name == broken)))

    def use():
        chat = data.Chat(room)
        size = max(chat.tokenizer.get_vocab().values()) + 1
        assert all(type(end) is int and 0 <= end < size for end in chat.stops), chat.stops
        assert chat.tokenizer.id_to_token(chat.end) in chat.control, "a turn ends with plain text"
        ids, first = chat.example("2+3? <|im_end|>", "2+3=5 \n", "5")
        assert 0 < first < len(ids) and ids.count(chat.end) <= 3 and chat.think and chat.answer
        chat.decode(chat.prompt("q\x00é", thinking=False))
        chat.save(room / "saved")
        assert data.Chat(room / "saved").stops == chat.stops
    (room / "saved").mkdir(exist_ok=True)
    return accepted(use)


def some_headers(rng):
    headers, date = email.message.Message(), "Wed, 21 Oct 2026 07:28:00 GMT"
    for name, values in (("Retry-After", ("5", "1.5", date, "²", "٣", "1e9", "-1", " ")),
                         ("retry-after-ms", ("5", "nan", "inf", "1_0", "x"))):
        if rng.random() < 0.5:
            value = rng.choice(values)
            headers[name] = edited(rng, value, SCRAPS) if rng.random() < 0.5 else value
    return headers


def target_replies(rng, room):
    """What a server answers, up to the row or the failure that is written of it."""
    usage = {"prompt_tokens": 100, "completion_tokens": 400, "total_tokens": 500}
    reply, = rng.choices((
        {"model": "m", "usage": usage, "choices": [{"finish_reason": "stop", "message": {
            "role": "assistant", "content": "<think>t</think>Answer: 5"}}]},
        {"model": "m", "usage": usage, "choices": [{"finish_reason": "length", "message": {
            "reasoning_content": "2+3", "content": "Answer: \\boxed{5}"}}]},
        [{"error": {"message": "busy", "code": 429}}], {"error": {"message": "busy"}}, "busy"),
        (9, 9, 1, 1, 1))
    part = rng.choice([name for name in ("usage", "choices", None)
                       if name is None or name in list(reply)])
    broken = {**reply, part: swapped(rng, reply[part])} if part else swapped(rng, reply)
    if part == "choices" and rng.random() < 0.7:    # the text itself, in which thinking is found
        message = reply["choices"][0]["message"]
        name = rng.choice(list(message))
        said = edited(rng, message[name], SCRAPS)
        broken = {**reply, "choices": [{**reply["choices"][0], "message": {**message, name: said}}]}
    if part == "usage" and rng.random() < 0.3:
        broken = {**reply, "usage": {name: rng.choice(ODD) for name in usage}}
    text = written(rng, broken)
    status = rng.choice((200, 200, 200, 200, 200, 200, 200, 429, 500, 302, 401, 404))
    for path in room.glob("*"):
        path.unlink()
    try:
        outcome = data.read_reply(status, some_headers(rng), text)
    except data.Failure as failure:
        outcome = failure
        assert str(failure) == data.escape(str(failure)) and "\n" not in str(failure)
        assert failure.after is None or 0 <= failure.after < math.inf
    question = {"question": "2+3?"} | rng.choice(({}, {"answer": "5"}))
    put(room / "q.jsonl", json.dumps(question).encode())
    args = SimpleNamespace(questions=room / "q.jsonl", out=room / "t.jsonl", max_tokens=10, n=None,
                           model="m", usd_in=1.0, usd_out=2.0, max_usd=9.0, body="{}", suffix="",
                           samples=1)
    url = data.teacher_url("http://localhost/v1")

    def use():
        asking = data.Asking(args, url, "secret-key")
        job, = asking.todo
        with asking.file:
            if isinstance(outcome, dict):
                asking.keep(job, outcome, 0.5)
            else:
                with contextlib.suppress(data.BadInput):        # some end the run
                    asking.give_up(job, outcome, 1)
            assert 0 <= asking.spent < math.inf, "it earns money"
            asking.state()
        assert not any(b"secret-key" in path.read_bytes() for path in room.iterdir())
        if isinstance(outcome, dict):
            row = data.read_rows(args.out)[0][1]
            assert data.trace_of(row)
            json.dumps([row["thinking"], row["answer"]], ensure_ascii=False).encode()
        again = data.Asking(args, url, "")
        again.file.close()
        assert len(again.todo) == (not isinstance(outcome, dict)), "asked again, or never"
    return accepted(use) and isinstance(outcome, dict)


CASES = [(case["answer"], said) for line in (ROOT / "tests" / "grading.jsonl").open()
         for case in [json.loads(line)] for said in case["right"] + case["wrong"]]


def worked_out(node):
    """The value of a sum as Python reads it: an independent reference for `calculate`."""
    if isinstance(node, ast.Constant):
        return node.value
    sign = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}[type(node.op)]
    return sign(worked_out(node.left), worked_out(node.right))


def target_answers(rng, room):
    """Texts to grade. Whatever they are, there is a verdict soon, it does not depend on which of
    the two is called the answer, and a text is equal to itself."""
    answer, said = rng.choice(CASES)
    said = edited(rng, said, SCRAPS)
    if rng.random() < 0.3:
        answer = edited(rng, answer, SCRAPS)
    verdict = data.equal(said, answer)
    assert type(verdict) is bool and verdict == data.equal(answer, said), (said, answer)
    assert data.equal(said, said) or not data.tidy(said), said
    for text in (f"\\boxed{{{said}}}", f"so \nAnswer: {said}", said):
        found = data.extract(text)
        assert found is None or type(found) is str
        assert type(data.grade(text, answer)) is bool
    sum_ = edited(rng, "(1+2)*3", ("(", ")", "9" * 30, "²", "٣", "\u00a0", "*", "-", "=", " 1"))
    numbers = {"numbers": [1, 2, 3], "target": 9}
    right = data.grade(f"Answer: {sum_}", numbers)
    assert type(right) is bool
    with contextlib.suppress(ValueError):
        value, used = data.calculate(sum_)
        assert value == worked_out(ast.parse(" ".join(sum_.split()), mode="eval").body), sum_
        assert not right or sorted(used) == [1, 2, 3], sum_
    return verdict


TARGETS = {name.removeprefix("target_"): function for name, function in list(globals().items())
           if name.startswith("target_")}

# ---- Running them ---------------------------------------------------------------------------


class Slow(BaseException):
    """More than SECONDS for one input; no `except Exception` may keep it."""


def too_slow(*_):
    raise Slow(f"more than {SECONDS:g} s")


def attempt(name, seed, number, room):
    """One input: (accepted, seconds, the fault or None)."""
    rng, start = random.Random(f"{name} {seed} {number}"), time.process_time()
    signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    taken = fault = None
    try:
        taken = TARGETS[name](rng, room)
    except KeyboardInterrupt:
        raise
    except BaseException as error:                  # a panic of a Rust library is no Exception
        fault = error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - start
    if seconds > SECONDS and fault is None:         # in a library that hears no signal
        fault = Slow(f"{seconds:.1f} s")
    return taken, seconds, fault


def fuzz(name, n, seed=0):
    """n inputs of a target: its line, and [(number, fault)]."""
    taken, slowest, faults = 0, 0.0, []
    with tempfile.TemporaryDirectory() as room:
        attempt(name, seed, 0, Path(room))          # what is slow once alone: imports, caches
        for number in range(n):
            accepts, seconds, fault = attempt(name, seed, number, Path(room))
            taken, slowest = taken + bool(accepts), max(slowest, seconds)
            faults += [(number, fault)] if fault else []
    line = (f"{name:12} {n:7,} inputs {taken:7,} accepted {n - taken - len(faults):7,} refused "
            f"{1000 * slowest:6.0f} ms slowest {len(faults):5} faults")
    return line, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"only these of {', '.join(TARGETS)}")
    parser.add_argument("--n", type=int, default=10_000, help="inputs of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this input alone, with its traceback")
    args = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30,) * 2)         # a huge size fails at once
    failed = False
    for name in args.names or TARGETS:
        if args.only is not None:
            with tempfile.TemporaryDirectory() as room:
                taken, seconds, fault = attempt(name, args.seed, args.only, Path(room))
            print(f"{name} {args.only}: accepted {taken}, {1000 * seconds:.0f} ms")
            if fault:
                traceback.print_exception(fault)
            failed |= fault is not None
            continue
        line, faults = fuzz(name, args.n, args.seed)
        print(line, flush=True)
        for number, fault in faults[:20]:
            where = traceback.extract_tb(fault.__traceback__)[-1]
            print(f"    {name} --seed {args.seed} --only {number}: {type(fault).__name__} "
                  f"{' '.join(data.escape(str(fault)).split())[:150]} ({where.name})", flush=True)
        failed |= bool(faults)
    sys.exit(failed)


if __name__ == "__main__":
    main()
