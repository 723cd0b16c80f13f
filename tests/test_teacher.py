"""Asking a teacher: a server on loopback that answers in every way there is; both are killed."""
import email.message
import email.utils
import io
import itertools
import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

import data
from data import BadInput, Failure, load_traces, split_message

SECRET = "sk-loopback-0123456789"
USAGE = {"prompt_tokens": 100, "completion_tokens": 400, "total_tokens": 500}


# ---- A server -------------------------------------------------------------------------------


def said(content="<think>t</think>Answer: 5", finish="stop", usage=USAGE, **message):
    """A reply as endpoints give it."""
    return {"model": "served", "usage": usage, "choices": [
        {"finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}]}


class Handler(BaseHTTPRequestHandler):
    """Answers with what `script(question, handler)` gives: object or (status, headers, body)."""
    wbufsize = -1                                   # a reply is one packet

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = self.server.script(body["messages"][0]["content"], self, body)
        if reply is None:                           # dropped, or written already
            self.close_connection = True
            return
        status, headers, text = reply if isinstance(reply, tuple) else (200, {}, reply)
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size, daemon_threads, allow_reuse_address = 128, True, True

    def handle_error(self, *_):                     # a client that went away
        pass


@pytest.fixture
def serve(monkeypatch, tmp_path, run):
    """serve(script, *flags): ask q.jsonl's questions of a server in a thread; its code, printed,
    error, rows, failures and requests, each (seconds, question, headers, body)."""
    monkeypatch.setattr(data, "BACKOFF", 0.01)
    monkeypatch.setenv("TEACHER_API_KEY", SECRET)
    servers = []

    def call(script, *flags, n=1, answer="5"):
        requests, numbers = [], itertools.count(1)      # two threads never get the same number

        def note(question, handler, body):
            requests.append((time.monotonic(), question, dict(handler.headers), body))
            return script(question, handler, next(numbers))
        servers.append(server := Server(("127.0.0.1", 0), Handler))
        server.script = note
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        (tmp_path / "q.jsonl").write_text("".join(
            json.dumps({"question": f"q{i}", **({"answer": answer} if answer else {})}) + "\n"
            for i in range(n)))
        out = tmp_path / "traces.jsonl"
        code, printed, error = run(
            "data", "teacher", "--questions", tmp_path / "q.jsonl", "--model", "big", "--out", out,
            "--base-url", f"http://127.0.0.1:{server.server_port}/v1", *flags)
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        assert SECRET not in printed + error
        for path in tmp_path.iterdir():
            assert SECRET not in path.read_text()
        return SimpleNamespace(code=code, printed=printed, error=error, rows=rows, out=out,
                               requests=requests, failures=failures(out))
    yield call
    for server in servers:
        server.shutdown()
        server.server_close()


def failures(out):
    path = out.with_name(out.name + ".failed.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- What a reply says ----------------------------------------------------------------------


@pytest.mark.parametrize("message, thinking, answer", [
    ({"content": "a", "reasoning": "t"}, "t", "a"),
    ({"content": "a", "reasoning_content": "t"}, "t", "a"),
    ({"content": "a", "reasoning_content": None, "reasoning": ""}, "", "a"),
    ({"content": "<think>t</think>a"}, "t", "a"),
    ({"content": "\n<thought>t</thought>a"}, "t", "a"),
    ({"content": "<thought>t</thought>\n<thought>u</thought>a"}, "t\n\nu", "a"),
    ({"content": "t</think>a"}, "t", "a"), ({"content": "t</thought>a"}, "t", "a"),
    ({"content": "<think>t"}, "t", ""), ({"content": None, "reasoning": "t"}, "t", ""),
    ({"content": "<think>t</think>a", "reasoning": "t"}, "t", "a"),
    ({"content": "a tag is </think>", "reasoning": "t"}, "t", "a tag is </think>"),
    ({"content": "so <think>b</think>"}, "so <think>b", ""),
    ({"content": 7, "reasoning": ["t"]}, "", ""), ({}, "", "")])
def test_thinking_never_in_the_answer(message, thinking, answer):
    assert tuple(part.strip() for part in split_message(message)) == (thinking, answer)


def test_a_row_holds_what_came_and_can_be_trained_on(serve):
    done = serve(lambda *_: said("so \\boxed{5}", reasoning_content="t"), "--suffix", "Box it.",
                 "--body", '{"temperature": 0.6, "max_tokens": null}')
    assert done.code == 0 and "1 of 1 answered, 0 failed" in done.printed
    row, = done.rows
    teacher = row.pop("teacher")
    assert row == {"question": "q0", "thinking": "t", "answer": "so \\boxed{5}",
                   "gtruth_answer": "5", "correct": True}
    assert teacher.pop("seconds") > 0 and len(teacher.pop("key")) == 24
    assert teacher == {"model": "served", "finish": "stop", "usage": USAGE, "sample": 0}
    assert load_traces(done.out) == [("q0", "t", "so \\boxed{5}")]
    (_, _, headers, body), = done.requests
    assert headers["Authorization"] == f"Bearer {SECRET}" and body == {
        "model": "big", "temperature": 0.6,
        "messages": [{"role": "user", "content": "q0\n\nBox it."}]}


def test_a_terminal_shows_what_is_done(serve, monkeypatch):
    shown, bar = io.StringIO(), data.tqdm
    monkeypatch.setattr(data, "tqdm", lambda **how: bar(**how | {"disable": False, "file": shown}))
    assert serve(lambda *_: said(), n=3).code == 0
    assert "3/3" in shown.getvalue() and "0 failed" in shown.getvalue()


def test_a_wrong_answer_and_none_to_compare_with(serve):
    assert serve(lambda *_: said(), answer="6").rows[0]["correct"] is False
    rows = serve(lambda *_: said(), "--n", 1, "--samples", 2, n=3, answer=None).rows[1:]
    assert [sorted(row) for row in rows] == [["answer", "question", "teacher", "thinking"]] * 2
    assert {row["teacher"]["sample"] for row in rows} == {0, 1}


def test_what_is_cut_is_kept_flagged_and_not_trained_on(serve, capsys):
    replies = {"q0": said(finish="length"), "q1": said(), "q2": said("only an answer"),
               "q3": said("<think>only thinking"), "q4": said(finish=None)}
    done = serve(lambda question, *_: replies[question], n=5)
    assert done.code == 0 and not done.failures
    assert {row["question"]: row.get("unfit") for row in done.rows} == {
        "q0": "length", "q1": None, "q2": "no thinking", "q3": "no answer",
        "q4": "no finish reason"}
    assert [trace[0] for trace in load_traces(done.out)] == ["q1"]
    assert "4 of 5 rows passed over" in capsys.readouterr().err
    done.out.write_text("".join(json.dumps(row) + "\n" for row in done.rows if row.get("unfit")))
    with pytest.raises(BadInput, match="no row can be used .*unfit"):
        load_traces(done.out)


def test_train_takes_the_file(serve, run, tiny, tmp_path):
    done = serve(lambda *_: said(), n=3)
    code, printed, error = run("train", "--model", tiny, "--data", done.out, "--max-steps", 1,
                               "--out", tmp_path / "student")
    assert code == 0 and "3 examples" in printed, error


@pytest.mark.parametrize("host, extra", [
    ("generativelanguage.googleapis.com", {"thinking_config": {"include_thoughts": True}}),
    ("us-central1-aiplatform.googleapis.com", {"thinking_config": {"include_thoughts": True},
                                               "thought_tag_marker": "thought"}),
    ("api.deepseek.com", None)])
def test_gemini_is_asked_for_its_thoughts(tmp_path, host, extra):
    (tmp_path / "q.jsonl").write_text('{"question": "q"}')
    args = SimpleNamespace(questions=tmp_path / "q.jsonl", body="{}", model="m", max_tokens=9, n=1,
                           suffix="", samples=1, max_usd=math.inf, usd_in=None, usd_out=None)
    job, = data.teacher_jobs(args, data.teacher_url(f"https://{host}/v1beta/openai/")).values()
    assert job.body.get("extra_body") == (extra and {"google": extra})


# ---- When to try again ----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [408, 409, 429, 500, 503, 529, "drop", "no JSON", "no choices",
                                 "empty choices", "torn"])
def test_tried_again(serve, bad):
    def script(question, handler, count):
        if count > 2:
            return said()
        return {"drop": None, "no JSON": (200, {}, b"<html>busy"),
                "no choices": {"error": {"code": 429, "message": "busy"}},
                "empty choices": {"choices": []},
                "torn": (200, {"Content-Length": "9999", "Connection": "close"},
                         json.dumps(said()).encode()[:-1])
                }.get(bad, (bad, {}, b"busy"))
    done = serve(script, "--timeout", 0.2)
    assert done.code == 0 and len(done.rows) == 1 and len(done.requests) == 3, done.error


@pytest.mark.parametrize("status", [400, 403, 422])
def test_refused_at_once_with_the_servers_message(serve, status):
    def script(question, *_):
        return said() if question != "q1" else (
            status, {}, {"error": {"message": f"bad \x1b[31m {SECRET} here"}})
    done = serve(script, n=4)
    assert done.code == 1 and "3 of 4 answered, 1 failed" in done.printed
    assert len(done.requests) == 4 and len(done.rows) == 3
    failure, = done.failures
    assert failure["question"] == "q1" and failure["tries"] == 1
    assert failure["error"] == f"HTTP {status}: bad \\x1b[31m [key] here"
    again = serve(lambda *_: said(), n=4)           # another port: another endpoint, other keys
    assert len(again.requests) == 4 and not again.failures


@pytest.mark.parametrize("status, text", [(401, "who are you"), (404, "no such model"),
                                          (402, "no money"), (302, "redirect")])
def test_what_all_questions_would_meet_ends_the_run(serve, status, text):
    done = serve(lambda *_: (status, {"Location": "/elsewhere"}, [{"error": {"message": text}}]),
                 "--workers", 1, n=5)
    assert done.code == 2 and len(done.requests) == 1
    assert done.error.count("error:") == 1 and f"HTTP {status}: " in done.error
    assert text in done.error and "Traceback" not in done.error


def test_a_redirect_takes_the_key_nowhere(serve):
    elsewhere = []
    other = Server(("127.0.0.1", 0), Handler)
    other.script = lambda *_: elsewhere.append(1) or said()
    threading.Thread(target=other.serve_forever, daemon=True).start()
    for status in (301, 302, 303, 307, 308):
        done = serve(lambda *_: (status, {"Location": f"http://127.0.0.1:{other.server_port}/"},
                                 said()))
        assert done.code == 2 and "redirect" in done.error and not done.rows
    other.shutdown()
    assert not elsewhere


def test_a_server_that_never_answers_ends_the_run(serve, monkeypatch):
    monkeypatch.setattr(data, "ATTEMPTS", 2)
    done = serve(lambda *_: (500, {}, b"down"), "--workers", 1, n=50)
    assert done.code == 2 and "no answers: HTTP 500: down" in done.error
    assert len(done.failures) == data.HOPELESS and len(done.requests) < 60


def test_retry_after_in_seconds_milliseconds_and_as_a_date():
    def wait(**headers):
        message = email.message.Message()
        for name, value in headers.items():
            message[name.replace("_", "-")] = value
        return data.retry_after(message)
    soon = email.utils.formatdate(time.time() + 40, usegmt=True)
    assert wait(Retry_After="7") == 7 and wait(Retry_After=" 0.5 ") == 0.5
    assert wait(retry_after_ms="250", Retry_After="9") == 0.25
    assert 37 < wait(Retry_After=soon) <= 40
    assert wait(Retry_After="Mon, 01 Jan 2001 00:00:00 GMT") == 0
    for nonsense in ({}, {"Retry_After": "soon"}, {"Retry_After": "1.2.3"},
                     {"retry_after_ms": "nan"}, {"retry_after_ms": "inf"}):
        assert wait(**nonsense) is None
    with pytest.raises(Failure) as failure:
        data.read_reply(503, {"retry-after-ms": "2000", "Retry-After": None}, b"busy")
    assert failure.value.after == 2


def test_one_429_slows_all_workers(serve):
    def script(question, handler, count):
        time.sleep(0.05)
        return (429, {"Retry-After": "0.6"}, b"slow down") if count == 1 else said()
    done = serve(script, "--workers", 3, n=40)      # 14 times 0.05 seconds, if nobody waited
    assert done.code == 0 and len(done.requests) == 41
    times = [seconds - done.requests[0][0] for seconds, *_ in done.requests]
    assert times[-1] > 0.6 and not any(0.2 < seconds < 0.6 for seconds in times)


def test_a_wait_beyond_the_deadline_is_not_waited(serve):
    start = time.monotonic()
    done = serve(lambda *_: (429, {"Retry-After": "5"}, b"later"), "--deadline", 4, n=2)
    assert time.monotonic() - start < 3
    assert done.code == 1 and [row["tries"] for row in done.failures] == [1, 1]


def test_a_deadline_is_for_all_tries_together(serve):
    def script(question, handler, count):
        return (429, {"Retry-After": "0.1"}, b"busy") if count < 30 else said()
    done = serve(script, "--deadline", 0.5)
    assert done.code == 1 and 1 < done.failures[0]["tries"] <= 5


@pytest.mark.parametrize("drip", [b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_dripping_server_holds_no_worker(serve, drip):
    """Byte after byte, well within the socket's timeout: in the headers, and in the body."""
    def script(question, handler, count):
        if question != "q0":
            return said()
        handler.connection.sendall(drip)
        for _ in range(200):                        # until the client hangs up
            time.sleep(0.03)
            handler.connection.sendall(b" ")
    start = time.monotonic()
    done = serve(script, "--deadline", 0.5, "--timeout", 0.4, "--workers", 1, n=3)
    assert 0.4 < time.monotonic() - start < 2
    assert done.code == 1 and [row["question"] for row in done.rows] == ["q1", "q2"]
    assert "no reply" in done.failures[0]["error"]


def test_replies_are_bounded(serve, monkeypatch):
    monkeypatch.setattr(data, "LARGEST_REPLY", 1000)
    done = serve(lambda question, *_: said("a" * (2000 if question == "q0" else 9)), n=2)
    assert done.code == 1 and [row["question"] for row in done.rows] == ["q1"]
    assert "more than 1000 bytes" in done.failures[0]["error"] and len(done.requests) == 2


# ---- The key, and where it may go -----------------------------------------------------------


def test_the_key_is_shown_nowhere(serve, monkeypatch):
    """Though the server echoes it, also where a message is cut short, and in an answer."""
    echo = "x" * 280 + SECRET                       # of 300 characters 10 are `HTTP 400: `
    replies = {"q0": (400, {}, {"error": echo}), "q1": said(f"<think>{SECRET}</think>{SECRET}")}
    done = serve(lambda question, *_: replies[question], n=2)       # serve looks into every file
    assert done.rows[0]["answer"] == "[key]"
    assert SECRET[:6] not in done.failures[0]["error"]
    monkeypatch.delenv("TEACHER_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "ollama")
    done = serve(lambda *_: said("<think>t</think>ollama"))
    assert done.requests[0][2]["Authorization"] == "Bearer ollama"
    assert done.rows[-1]["answer"] == "ollama"      # too short to be a secret: a word
    monkeypatch.delenv("OPENAI_API_KEY")
    done = serve(lambda *_: (401, {}, b"key?"))
    assert "Authorization" not in done.requests[0][2] and "no key in TEACHER_API_KEY" in done.error


@pytest.mark.parametrize("flags, complaint", [
    ("--base-url http://example.com/v1", "unencrypted"), ("--base-url ftp://localhost", "form"),
    ("--base-url https://user:pass@example.com", "form"), ("--base-url localhost:8000", "form"),
    ("--base-url https://example.com/v1?key=1", "form"),
    ("--base-url http://localhost:99999", "port"), ("--questions none", "No such file"),
    ("--base-url http://127.0.0.1.example.com", "unencrypted"),
    ("--base-url http://127.999.0.1", "unencrypted"),
    ("--body [1]", "--body"), ("--body {", "no JSON"), ('--body {"n":2}', "--body"),
    ("--workers 0", "at least 1"), ("--max-usd 1", "--usd-in"), ("--deadline x", "invalid"),
    ("--out q.jsonl", "no row of a teacher"), ("--out none/none", "No such file")])
def test_bad_input_gets_one_line_and_exit_code_2(run, tmp_path, monkeypatch, flags, complaint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "BACKOFF", 0.01)
    (tmp_path / "q.jsonl").write_text('{"question": "q", "answer": "5"}')
    code, _, error = run("data", "teacher", "--questions", "q.jsonl", "--model", "m", "--out", "o",
                         "--base-url", "http://localhost:9/v1", *flags.split(" "))
    assert code == 2 and complaint in error and error.count("error:") == 1
    assert "pass" not in error and (tmp_path / "q.jsonl").read_text().endswith('"5"}')


def test_a_key_that_is_no_header_is_not_shown(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", "sk-hidden\nX: y")
    code, _, error = run("data", "teacher", "--questions", "q", "--model", "m", "--out", "o",
                         "--base-url", "http://localhost:9/v1")
    assert code == 2 and "characters" in error and "hidden" not in error


# ---- Dollars --------------------------------------------------------------------------------


@pytest.mark.parametrize("usage", [USAGE, None, {"prompt_tokens": -9, "completion_tokens": 1}])
def test_no_more_dollars_than_allowed(serve, usage):
    """100 in and 400 out are 0.90 dollars; at worst it is 184 in and 400 out: 0.98."""
    flags = ("--usd-in", 1000, "--usd-out", 2000, "--max-usd", 4.85, "--max-tokens", 400)
    done = serve(lambda *_: said(usage=usage), *flags, "--workers", 3, n=20)
    assert done.code == 1 and "stopped before $4.85 is passed" in done.printed
    assert len(done.requests) == len(done.rows) == (5 if usage is USAGE else 4)
    assert ("$4.50 so far, $18.00 expected" in done.error) is (usage is USAGE)
    assert f"{2500 if usage is USAGE else 0:,} tokens" in done.printed


def test_dollars_of_lost_replies_and_earlier_runs_count(serve, monkeypatch):
    flags = ("--usd-in", 1000, "--usd-out", 2000, "--max-usd", 2.9, "--max-tokens", 400)
    done = serve(lambda *_: None, *flags, "--workers", 1, n=20)
    assert len(done.requests) == 2                  # each may have cost 0.99
    lines = serve(lambda *_: said(), n=3).rows
    done = serve(lambda *_: said(), *flags, n=20)   # 2.7 dollars are in the file
    assert not done.requests and len(done.rows) == len(lines) == 3


def test_gemini_thoughts_are_in_the_total_alone():
    assert data.tokens_used({"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 99}) == (
        5, 94)
    for bad in (None, {}, [], {"prompt_tokens": "5", "completion_tokens": 7}, {
            "prompt_tokens": 5, "completion_tokens": float("nan")}):
        assert data.tokens_used(bad) is None


# ---- Stopping and going on ------------------------------------------------------------------


def test_a_torn_line_is_cut_off_and_only_that(tmp_path):
    path = tmp_path / "t.jsonl"
    whole = json.dumps({"question": "q", "teacher": {"key": "k"}}).encode()
    head = (whole + b"\n") * 3
    for tail, left in ((b"", b""), (whole[:30], b""), (whole[:5], b""), (whole, whole + b"\n")):
        path.write_bytes(head + tail)
        file, done = data.open_traces(path)
        data.write_row(file, {"question": "next"})
        assert list(done) == ["k"]
        file.close()
        assert path.read_bytes() == head + left + b'{"question": "next"}\n'
    for others in (b'[{"question": 5}]', b"hello", b'{"question": "q"}\n', whole[:30] + b"\n"):
        path.write_bytes(others)
        with pytest.raises(BadInput, match="line 1: no row of a teacher"):
            data.open_traces(path)
        assert path.read_bytes() == others


def test_two_runs_do_not_share_a_file(tmp_path):
    file, _ = data.open_traces(tmp_path / "t.jsonl")
    with pytest.raises(BadInput, match="another run"):
        data.open_traces(tmp_path / "t.jsonl")
    file.close()


def test_ctrl_c_keeps_what_came(serve):
    def script(question, handler, count):
        if count == 6:
            os.kill(os.getpid(), signal.SIGINT)
        if count > 5:
            time.sleep(6)
        return said()
    signal.signal(signal.SIGINT, signal.default_int_handler)    # train.py may have left its own
    start = time.monotonic()
    done = serve(script, "--workers", 2, n=50)
    assert done.code == 130 and time.monotonic() - start < 5   # not the 6
    assert 4 <= len(done.rows) <= 5 and "interrupted" in done.error


def test_ctrl_c_keeps_what_waits_to_be_written(serve, monkeypatch):
    """Two replies are here, neither is written yet, when Ctrl-C comes."""
    both, read_reply, here = threading.Barrier(2), data.read_reply, []

    def script(*_):
        both.wait()
        return said()

    def slowly(*reply):
        here.append(reply)
        if len(here) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.4)
        return read_reply(*reply)
    monkeypatch.setattr(data, "read_reply", slowly)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    done = serve(script, "--workers", 2, n=2)
    assert done.code == 130 and len(done.rows) == 2


def chaos(seed, log):
    """Answers for a server that fails in every way; each whole answer is noted in `log`."""
    rng, lock = random.Random(seed), threading.Lock()
    soon = email.utils.formatdate(time.time() - 1, usegmt=True)

    def script(question, handler, body):
        with lock:
            dice = rng.random()
            os.write(log, f"{question}\n".encode())
        for reply in ((408, {}, b""), (409, {}, b"x"), (429, {"Retry-After": "0.01"}, b"slow"),
                      (429, {"retry-after-ms": "5"}, b""), (500, {}, b"{}"), None,
                      (503, {"Retry-After": soon}, b""), (200, {}, b"no JSON"), {"choices": []},
                      (400, {}, {"error": {"message": "refused"}}), (422, {}, b"{"),
                      (200, {"Content-Length": "9999", "Connection": "close"}, b'{"choices"')):
            dice -= 0.02
            if dice < 0:
                return reply
        if dice < 0.003:                            # drips beyond the client's deadline
            handler.connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            for _ in range(30):
                time.sleep(0.05)
                handler.connection.sendall(b" ")
            return None
        content = f"<think>{question} {'hm ' * 2000}</think>Answer: {question}"
        return [said(f"Answer: {question}", reasoning=f"{question} {'hm ' * 2000}"),
                said(content), said(content.removeprefix("<think>"))][int(dice * 1e6) % 3]
    return script


def forked(work):
    """A child process that does `work` and no more."""
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        try:
            work()
        finally:
            os._exit(1)
    return child


def test_server_and_client_are_killed_and_every_question_is_answered_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BACKOFF", 0.01)
    monkeypatch.setenv("TEACHER_API_KEY", SECRET)
    names = [f"q{i}" for i in range(1000)]
    (tmp_path / "q.jsonl").write_text("".join(
        json.dumps({"question": name, "answer": name}) + "\n" for name in names))
    out, rng = tmp_path / "traces.jsonl", random.Random(0)
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_RDWR | os.O_APPEND)
    probe = Server(("127.0.0.1", 0), Handler)
    port = probe.server_port
    probe.server_close()

    def server():
        made = Server(("127.0.0.1", port), Handler)
        made.script = chaos(rng.random(), log)
        made.serve_forever()

    def client():
        monkeypatch.setattr(sys, "argv", [
            "data.py", "teacher", "--questions", str(tmp_path / "q.jsonl"), "--model", "big",
            "--base-url", f"http://127.0.0.1:{port}", "--out", str(out), "--deadline", "1"])
        try:
            data.main()
            os._exit(0)
        except SystemExit as stop:
            os._exit(stop.code)

    def rows():
        return out.read_bytes().split(b"\n")[:-1] if out.exists() else []
    serving, kills, torn, code = forked(server), 0, 0, None
    try:
        for _ in range(60):
            done = {json.loads(line)["question"] for line in rows()}
            asked = os.fstat(log).st_size
            rng.random()
            child, asking = forked(client), 0
            if len(done) < 900:
                time.sleep(rng.uniform(0.1, 0.5))
                if kills % 3 == 1:                  # the server too, under the client
                    os.kill(serving, signal.SIGKILL)
                    os.waitpid(serving, 0)
                    time.sleep(0.05)
                    serving = forked(server)
                    time.sleep(0.1)
                os.kill(child, signal.SIGKILL)
                kills += 1
            code = os.waitpid(child, 0)[1]
            asking = (tmp_path / "log").read_bytes()[asked:].decode().split()
            assert not done & set(asking)           # what is done is not asked again
            if kills == 3:
                with open(out, "ab") as file:
                    torn += file.write(b'{"question": "q7", "thin')
            if code == 0:
                break
    finally:
        os.kill(serving, signal.SIGKILL)
        os.waitpid(serving, 0)
    assert code == 0 and kills > 3 and torn
    found = [json.loads(line) for line in rows()]
    assert Counter(row["question"] for row in found) == Counter(names)
    assert all(row["correct"] and row["thinking"].startswith(row["question"] + " ")
               and row["answer"] == f"Answer: {row['question']}" for row in found)
    assert len(load_traces(out)) == 1000 and not failures(out)


# ---- A local teacher ------------------------------------------------------------------------


def test_sample_writes_the_same_rows_and_goes_on(run, tiny, tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(
        json.dumps({"question": f"What is {i}?", "answer": "5"}) + "\n" for i in range(6)))
    out = tmp_path / "traces.jsonl"
    flags = ("--model", tiny, "--questions", tmp_path / "q.jsonl", "--out", out,
             "--max-new-tokens", 8, "--slots", 4, "--temperature", 1)
    assert run("sample", *flags)[0] == 0
    first = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["question"] for row in first) == [f"What is {i}?" for i in range(6)]
    for row in first:
        assert row["unfit"] == "max_new_tokens" and row["correct"] is False
        assert row["teacher"]["usage"]["completion_tokens"] == 8 and row["teacher"]["seconds"] > 0
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:3]) + lines[3][:40])      # as a kill leaves it
    assert run("sample", *flags)[0] == 0
    again = [json.loads(line) for line in out.read_text().splitlines()]
    for rows in (first, again):
        rows.sort(key=lambda row: row["question"])
        for row in rows:
            del row["teacher"]["seconds"]
    assert first == again                           # a row draws what it draws
    code, _, error = run("sample", "q", *flags)
    assert code == 2 and "either a question" in error


def test_sample_parts_thinking_and_answer(run, tiny, tmp_path, monkeypatch, chat):
    import sample
    script = chat.text("so 5\n") + chat.answer + chat.text("Answer: 5") + [chat.end]

    def generate(self, prompts, steer, **_):
        row = sample.Row(0, prompts[0], tokens=script, finish="stop")
        steer(row, script[0])
        yield row
    monkeypatch.setattr(sample.Sampler, "generate", generate)
    (tmp_path / "q.jsonl").write_text('{"question": "q", "answer": "5"}')
    out = tmp_path / "traces.jsonl"
    assert run("sample", "--model", tiny, "--questions", tmp_path / "q.jsonl", "--out", out)[0] == 0
    row = json.loads(out.read_text())
    assert (row["thinking"], row["answer"], row["correct"]) == ("so 5", "Answer: 5", True)
    assert "unfit" not in row and load_traces(out) == [("q", "so 5", "Answer: 5")]
