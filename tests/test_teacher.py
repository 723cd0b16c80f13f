"""Asking a teacher: a loopback server that fails in many ways; both sides are killed."""
import argparse
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
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import ReplyHandler

from recipe import teacher
from recipe.rows import load_traces

SECRET = "sk-loopback-0123456789"
USAGE = {"prompt_tokens": 100, "completion_tokens": 400, "total_tokens": 500}


def reply_with(content="<think>t</think>Answer: 5", finish="stop", usage=USAGE, **message):
    return {"model": "served", "usage": usage, "choices": [
        {"finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}]}


# ---- Reading a reply (without the openai library) -------------------------------------------


@pytest.mark.parametrize("text, thinking, answer", [
    ("<think>t</think>a", "t", "a"),
    ("<thinking>\nt\n</thinking>\n\na", "t", "a"),
    ("\n<thought>t</thought>a", "t", "a"),
    ("<thought>t</thought>\n<thought>u</thought>a", "t\n\nu", "a"),
    ("t</think>a", "t", "a"),
    ("t</thinking>a", "t", "a"),
    ("t</thought>a", "t", "a"),
    ("<think>t", "t", ""),
    ("so <think>b</think>", "so <think>b", ""),
    ("<think>t</think>a</think>b", "t", "a</think>b"),
    ("only an answer", "", "only an answer"),
    ("", "", "")])
def test_tagged_thinking_is_split_from_the_answer(text, thinking, answer):
    assert tuple(part.strip() for part in teacher.split_thinking(text)) == (thinking, answer)


@pytest.mark.parametrize("message, thinking, answer", [
    ({"content": "a", "reasoning": "t"}, "t", "a"),
    ({"content": "a", "reasoning_content": "t"}, "t", "a"),
    ({"content": "a", "reasoning": None, "reasoning_content": "t"}, "t", "a"),
    ({"content": "a", "reasoning_content": None, "reasoning": ""}, "", "a"),
    ({"content": "a", "reasoning_details": [
        {"type": "reasoning.text", "text": "t"}, {"type": "reasoning.encrypted", "data": "x"},
        {"type": "reasoning.summary", "summary": "u"}]}, "tu", "a"),
    ({"content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]}, "t", "a"),
    ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]},
                  {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "t", "ab"),
    ({"content": [{"type": "text", "text": "<think>t</think>a"}]}, "t", "a"),
    ({"content": "<think>t</think>a"}, "t", "a"),
    ({"content": "t</think>a"}, "t", "a"),
    ({"content": "<think>t</think>a", "reasoning": "t"}, "t", "a"),
    ({"content": "a tag is </think>", "reasoning": "t"}, "t", "a tag is </think>")])
def test_thinking_is_found_where_servers_put_it(message, thinking, answer):
    reply = {"choices": [{"message": message, "finish_reason": "stop"}]}
    assert teacher.read_reply(reply) == (thinking, answer, "stop")


@pytest.mark.parametrize("finish, meaning", [
    *((name, "stop") for name in ("stop", "STOP", "eos", "eos_token", "end_turn")),
    ("length", "length"), ("max_tokens", "length"), ("MAX_TOKENS", "length"), (None, None)])
def test_finish_reasons_of_different_servers(finish, meaning):
    assert teacher.read_reply(reply_with(finish=finish))[2] == meaning


@pytest.mark.parametrize("reply", [
    None, [], {}, {"choices": []}, {"choices": None}, {"choices": [None]}, {"choices": ["a"]},
    {"choices": [{"finish_reason": "stop", "message": None}]},
    {"error": {"code": 429, "message": "busy"}},
    reply_with(None), reply_with(None, reasoning="t"), reply_with(" \n"), reply_with(7),
    reply_with([]), reply_with([{"type": "thinking", "thinking": ""}]),
    reply_with(finish="error"), reply_with(finish="content_filter"),
    reply_with(finish="insufficient_system_resource"), reply_with(finish=["stop"])])
def test_what_is_not_an_answer(reply):
    with pytest.raises(ValueError, match="the reply has no"):
        teacher.read_reply(reply)


def test_parts_nested_without_end():
    deep = "t"
    for _ in range(5000):
        deep = [deep]
    for reply in (reply_with(deep), reply_with(reasoning=deep)):
        with pytest.raises(ValueError, match="the reply has no"):
            teacher.read_reply(reply)


def test_a_reply_cut_while_thinking_has_no_content():
    assert teacher.read_reply(reply_with(None, "length", reasoning="t")) == ("t", "", "length")


# ---- Reading a stream (without the openai library) ------------------------------------------


def delta(content=None, finish=None, **fields):
    return {"model": "served", "choices": [
        {"index": 0, "delta": {"content": content, **fields}, "finish_reason": finish}]}


def events(*parts, end="\n\n", usage=USAGE):
    """The text of a stream: a part is a chunk, or the line that it is; usage and [DONE] follow."""
    last = [{"model": "served", "choices": [], "usage": usage}] if usage else []
    lines = [part if isinstance(part, str) else "data: " + json.dumps(part, ensure_ascii=False)
             for part in (*parts, *last, "data: [DONE]")]
    return end.join(lines) + end


STREAM = [delta("", role="assistant"), delta(reasoning_content="so "), delta(reasoning_content="5"),
          delta("Answer:\u2028"), delta(" 5"), delta("", "stop")]


@pytest.mark.parametrize("text", [
    events(*STREAM), events(*STREAM, end="\r\n\r\n"), events(*STREAM, end="\r\r"),
    events(*STREAM, end="\n"), events(*STREAM).replace("data: ", "data:"),
    events(": keep-alive", STREAM[0], ":", "event: chunk\nid: 7", *STREAM[1:], "retry: 9"),
    events({"choices": None, "prompt_filter_results": []}, *STREAM, {"choices": []}),
    events(*STREAM, {"choices": [{"delta": None, "finish_reason": None}]}),
    events({**STREAM[0], "usage": None, "error": None}, *STREAM[1:]),
    events(*STREAM) + "data: {}\n\n", events(*STREAM) + "data: " + json.dumps(delta("more")),
    events({**STREAM[0], "usage": {"prompt_tokens": 1, "total_tokens": 1}}, *STREAM[1:])])
def test_a_stream_is_the_reply_that_its_events_add_up_to(text):
    reply = teacher.parse_reply(text)
    assert teacher.read_reply(reply) == ("so 5", "Answer:\u2028 5", "stop")
    assert reply["usage"] == USAGE and reply["model"] == "served"


@pytest.mark.parametrize("parts, thinking", [
    ([{"content": "<think>t"}, {"content": "u</think>"}], "tu"),
    ([{"reasoning": "t"}, {"reasoning": "u"}], "tu"),
    ([{"reasoning": "t", "reasoning_content": "t"}, {"reasoning": "u"}], "tu"),
    ([{"reasoning_details": [{"type": "reasoning.text", "text": text}]} for text in "tu"], "tu"),
    ([{"content": [{"type": "thinking", "thinking": [{"type": "text", "text": text}]}]}
      for text in "tu"], "tu")])
def test_thinking_is_found_where_streams_put_it(parts, thinking):
    chunks = [delta(**part) for part in parts]
    reply = teacher.parse_reply(events(*chunks, delta("a"), delta("", "length")))
    assert teacher.read_reply(reply) == (thinking, "a", "length")


@pytest.mark.parametrize("text, answer", [
    (events(*STREAM).partition('"stop"')[0], "Answer:\u2028 5"),
    (events(*STREAM[:-2]), "Answer:\u2028"),
    (events(*STREAM[:4], "data: {", *STREAM[4:]), "Answer:\u2028")])
def test_a_stream_that_breaks_off_has_no_finish_reason_and_no_usage(text, answer):
    reply = teacher.parse_reply(text)
    assert teacher.read_reply(reply) == ("so 5", answer, None) and reply["usage"] is None


@pytest.mark.parametrize("text, message", [
    ("", "no answer"), ("data:", "no answer"), ("data: [DONE]\n\n", "no answer"),
    (events(*STREAM[:3]), "no answer"), (events(": keep-alive"), "no answer"),
    (events(*STREAM[:4], {"error": {"message": "busy"}}), "no answer.*busy"),
    (events(*STREAM[:4], {"error": "busy"}, STREAM[-1]), "no answer.*busy"),
    (events(*STREAM[:4], {**delta("", "error"), "error": {"code": 502}}), "no answer.*502")])
def test_a_stream_without_an_answer(text, message):
    with pytest.raises(ValueError, match=message):
        teacher.read_reply(teacher.parse_reply(text))


# ---- Requests (without the openai library) --------------------------------------------------


@pytest.mark.parametrize("url, base", [
    ("https://api.deepseek.com/v1", "https://api.deepseek.com/v1"),
    ("https://api.deepseek.com/v1/chat/completions", "https://api.deepseek.com/v1"),
    ("https://example.com:8443/", "https://example.com:8443"),
    ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
    ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"), ("http://[::1]:80", "http://[::1]:80")])
def test_urls_that_the_key_may_be_sent_to(url, base):
    assert teacher.check_url(url) == base


@pytest.mark.parametrize("url, message", [
    ("http://example.com/v1", "unencrypted"), ("http://127.0.0.1.example.com", "unencrypted"),
    ("http://127.999.0.1", "unencrypted"), ("http://localhost.example.com", "unencrypted"),
    ("ftp://localhost", "form"), ("localhost:8000", "form"), ("", "form"),
    ("https://user:pass@example.com", "form"), ("https://example.com/v1?key=1", "form"),
    ("https://example.com\n.org", "form"), ("http://localhost:99999", "[Pp]ort")])
def test_urls_that_the_key_must_not_be_sent_to(url, message):
    with pytest.raises(ValueError, match=message) as error:
        teacher.check_url(url)
    assert "pass@" not in str(error.value)


def test_http_is_allowed_by_a_flag():
    assert teacher.check_url("http://example.com/v1", allow_http=True) == "http://example.com/v1"


def arguments(directory, **changes):
    """The parsed arguments of a run that asks one question."""
    (directory / "q.jsonl").write_text('{"question": "q"}')
    return argparse.Namespace(**{**dict(
        questions=directory / "q.jsonl", split=None, columns=None, model="m", stream=False,
        out=directory / "t.jsonl", n=None,
        base_url="https://example.com/v1", allow_http=False, body={}, max_tokens=9, suffix="",
        samples=1, workers=1, deadline=9.0, usd_in=0, usd_out=0, max_usd=math.inf), **changes})


@pytest.mark.parametrize("host, fields", [
    ("generativelanguage.googleapis.com", {"thinking_config": {"include_thoughts": True}}),
    ("us-central1-aiplatform.googleapis.com", {"thinking_config": {"include_thoughts": True},
                                               "thought_tag_marker": "thought"}),
    ("api.deepseek.com", None)])
def test_gemini_is_asked_for_its_thoughts(tmp_path, host, fields):
    run = teacher.prepare(arguments(tmp_path, base_url=f"https://{host}/v1beta/openai/"))
    assert run.body.get("extra_body") == (fields and {"google": fields})


def test_the_key_is_the_first_that_the_environment_has(tmp_path, monkeypatch):
    for name in teacher.KEYS:
        monkeypatch.delenv(name, raising=False)
    assert teacher.prepare(arguments(tmp_path)).key == ""
    monkeypatch.setenv("OPENAI_API_KEY", "second\n")
    assert teacher.prepare(arguments(tmp_path)).key == "second"
    monkeypatch.setenv("TEACHER_API_KEY", "first")
    assert teacher.prepare(arguments(tmp_path)).key == "first"
    monkeypatch.setenv("TEACHER_API_KEY", "sk-hidden\nX: y")
    with pytest.raises(ValueError, match="characters") as error:
        teacher.prepare(arguments(tmp_path))
    assert "hidden" not in str(error.value)


def test_cost_of_a_reply(tmp_path):
    run = teacher.prepare(arguments(tmp_path, usd_in=1000, usd_out=2000, max_usd=9, max_tokens=400))
    assert 0.8 < run.worst_case < 1.0
    for usage, dollars in ((USAGE, 0.9), ({"prompt_tokens": 5, "total_tokens": 99}, 0.193),
                           ({**USAGE, "total_tokens": 600}, 1.1)):      # Gemini's thoughts
        run.spent = 0.0
        run.charge({"usage": usage})
        assert run.spent == pytest.approx(dollars)
    tokens = run.tokens
    for reply in (None, [], {}, {"usage": None}, {"usage": []}, {"usage": {"prompt_tokens": 5}},
                  {"usage": {"prompt_tokens": "5", "total_tokens": 7}},
                  {"usage": {"prompt_tokens": -9, "total_tokens": 1}},
                  {"usage": {"prompt_tokens": 9, "total_tokens": 1}},
                  {"usage": {"prompt_tokens": 5, "total_tokens": math.nan}},
                  {"usage": {"prompt_tokens": 5, "total_tokens": math.inf}}):
        run.spent = 0.0
        run.charge(reply)
        assert run.spent == run.worst_case and run.tokens == tokens


def test_the_openai_library_is_optional(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    arguments(tmp_path)
    code, _, error = run("recipe.teacher", "--questions", tmp_path / "q.jsonl", "--model", "m",
                         "--base-url", "https://example.com", "--out", tmp_path / "t.jsonl")
    assert code == 2 and "pip install openai" in error and error.count("\n") == 1
    assert not (tmp_path / "t.jsonl").exists()


# ---- A server -------------------------------------------------------------------------------


class Handler(ReplyHandler):
    """Sends what `script(question, handler, body)` returns: a JSON value or (status, headers,
    bytes). None drops the connection."""

    def do_POST(self):
        body = self.read_json()
        reply = self.server.script(body["messages"][0]["content"], self, body)
        if reply is None:
            self.close_connection = True
            return
        status, headers, text = reply if isinstance(reply, tuple) else (200, {}, reply)
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        self.send_reply(status, headers, text)


class Server(ThreadingHTTPServer):
    request_queue_size, daemon_threads, allow_reuse_address = 128, True, True

    def handle_error(self, *_):                     # the client is gone
        pass


@pytest.fixture
def fast_retries(monkeypatch):
    """Makes the SDK's delays between its tries short; skips the test without the SDK."""
    pytest.importorskip("openai")
    from openai import _base_client
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.002)
    monkeypatch.setattr(_base_client, "MAX_RETRY_DELAY", 0.01)


@pytest.fixture
def serve(monkeypatch, tmp_path, run, fast_retries):
    """serve(script, *flags) asks n questions of a server in a thread. Returns the exit code, what
    is printed, the rows, the failures and the requests: (seconds, question, headers, body)."""
    monkeypatch.setenv("TEACHER_API_KEY", SECRET)
    servers = []

    def call(script, *flags, n=1, answer="5"):
        requests, numbers = [], itertools.count(1)      # threads never get the same number

        def note(question, handler, body):
            headers = {name.lower(): value for name, value in handler.headers.items()}
            requests.append((time.monotonic(), question, headers, body))
            return script(question, handler, next(numbers))
        servers.append(server := Server(("127.0.0.1", 0), Handler))
        server.script = note
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        (tmp_path / "q.jsonl").write_text("".join(
            json.dumps({"question": f"q{i}", **({"answer": answer} if answer else {})}) + "\n"
            for i in range(n)))
        out = tmp_path / "traces.jsonl"
        code, printed, error = run(
            "recipe.teacher", "--questions", tmp_path / "q.jsonl", "--model", "big", "--out", out,
            "--base-url", f"http://127.0.0.1:{server.server_port}/v1", *flags)
        assert SECRET not in printed + error
        for path in tmp_path.iterdir():
            assert SECRET not in path.read_text()
        return SimpleNamespace(code=code, printed=printed, error=error, out=out, requests=requests,
                               rows=read_lines(out), failures=failures(out))
    yield call
    for server in servers:
        server.shutdown()
        server.server_close()


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def failures(out):
    return read_lines(out.with_name(out.name + ".failed.jsonl"))


# ---- Rows -----------------------------------------------------------------------------------


def test_a_row_holds_the_reply_and_can_be_trained_on(serve):
    done = serve(lambda *_: reply_with("so \\boxed{5}", reasoning_content="t"),
                 "--suffix", "Box it.",
                 "--body", '{"temperature": 0.6, "max_tokens": null, "extra": {"a": 1}}')
    assert done.code == 0 and "1 of 1 answered, 0 failed" in done.printed
    row, = done.rows
    about = row.pop("teacher")
    assert row == {"question": "q0", "thinking": "t", "answer": "so \\boxed{5}",
                   "gtruth_answer": "5", "correct": True}
    assert about.pop("seconds") > 0 and len(about.pop("key")) == 24
    assert about == {"model": "served", "finish": "stop", "usage": USAGE, "sample": 0}
    assert load_traces(done.out) == [("q0", "t", "so \\boxed{5}")]
    (_, _, headers, body), = done.requests
    assert headers["authorization"] == f"Bearer {SECRET}" and body == {
        "model": "big", "temperature": 0.6, "extra": {"a": 1},
        "messages": [{"role": "user", "content": "q0\n\nBox it."}]}


def test_the_progress_bar_shows_counts_and_dollars(serve, monkeypatch):
    shown, bar = io.StringIO(), teacher.tqdm
    monkeypatch.setattr(teacher, "tqdm", lambda **options: bar(
        **options | {"disable": False, "file": shown, "mininterval": 0}))
    done = serve(lambda *_: reply_with(), "--usd-in", 1000, "--usd-out", 2000, n=3)
    assert done.code == 0 and "3/3" in shown.getvalue()
    assert "0 failed, 1,500 tokens, $2.70" in shown.getvalue()
    assert "0 failed, 1,500 tokens, $2.70" in done.printed


def test_a_wrong_answer_and_none_to_compare_with(serve):
    assert serve(lambda *_: reply_with(), answer="6").rows[0]["correct"] is False
    rows = serve(lambda *_: reply_with(), "--n", 1, "--samples", 2, n=3, answer=None).rows[1:]
    assert [sorted(row) for row in rows] == [["answer", "question", "teacher", "thinking"]] * 2
    assert {row["teacher"]["sample"] for row in rows} == {0, 1}


def test_a_reference_of_another_task_is_kept_and_not_graded(serve):
    row, = serve(lambda *_: reply_with(), answer={"numbers": [2, 3], "target": 5}).rows
    assert row["gtruth_answer"] == {"numbers": [2, 3], "target": 5} and "correct" not in row


def test_a_reply_that_is_cut_is_kept_and_not_trained_on(serve, capsys):
    replies = {"q0": reply_with(finish="max_tokens"), "q1": reply_with(finish="eos"),
               "q2": reply_with("only an answer"), "q3": reply_with("<think>only thinking"),
               "q4": reply_with(finish=None), "q5": reply_with("<think>t</think>a</think>b"),
               "q6": reply_with("</think> closes", reasoning="t")}
    done = serve(lambda question, *_: replies[question], n=7)
    assert done.code == 0 and not done.failures
    assert {row["question"]: row.get("unfit") for row in done.rows} == {
        "q0": "length", "q1": None, "q2": "no thinking", "q3": "no answer",
        "q4": "no finish reason", "q5": "thinking tag", "q6": "thinking tag"}
    assert [trace[0] for trace in load_traces(done.out)] == ["q1"]
    assert "6 of 7 rows" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [
    (200, {}, b"<html>busy"), (200, {"Content-Type": "application/json"}, b'{"choices": ['),
    {"error": {"code": 429, "message": "busy"}}, {"choices": []}, reply_with(None),
    reply_with("half an ", "error"), reply_with("", "content_filter"), ["reply"]])
def test_what_is_not_an_answer_is_kept_raw_and_asked_again(serve, bad, tmp_path):
    raw = bad[2].decode() if isinstance(bad, tuple) else json.dumps(bad)
    done = serve(lambda question, *_: bad if question == "q0" else reply_with(), n=2)
    assert done.code == 1 and [row["question"] for row in done.rows] == ["q1"]
    failure, = done.failures
    assert failure["question"] == "q0" and failure["raw"] == raw and len(done.requests) == 2


def test_a_raw_reply_is_bounded(serve):
    done = serve(lambda question, *_: reply_with("a" * 2_000_000, "error"))
    assert done.code == 1 and len(done.failures[0]["raw"]) == 1_000_000


def test_failures_are_asked_again_and_answers_are_not(serve, monkeypatch):
    monkeypatch.setattr(teacher, "check_url", lambda url, allow_http: url)
    real = teacher.request_key          # the server of the second run has another port
    monkeypatch.setattr(teacher, "request_key", lambda url, *parts: real(*parts))
    done = serve(lambda question, *_: reply_with(None) if question == "q1" else reply_with(), n=3)
    assert done.code == 1 and len(done.rows) == 2 and len(done.failures) == 1
    done.out.write_bytes(done.out.read_bytes() + b'{"question": "q2", "thin')       # a kill
    again = serve(lambda *_: reply_with(), n=3)
    assert again.code == 0 and [request[1] for request in again.requests] == ["q1"]
    assert Counter(row["question"] for row in again.rows) == Counter(["q0", "q1", "q2"])
    assert not again.failures


def test_training_reads_the_file(serve, run, tiny, tmp_path):
    done = serve(lambda *_: reply_with(), n=3)
    code, printed, error = run("train", "--model", tiny, "--data", done.out, "--max-steps", 1,
                               "--out", tmp_path / "student")
    assert code == 0 and "3 examples" in printed, error


# ---- Streams --------------------------------------------------------------------------------


def stream_of(*parts, **options):
    return 200, {"Content-Type": "text/event-stream"}, events(*parts, **options).encode()


def test_a_streamed_row_is_the_row_of_the_whole_reply(serve, monkeypatch):
    """It has the same key: a run goes on with --stream or without."""
    real = teacher.request_key              # the servers have different ports
    monkeypatch.setattr(teacher, "request_key", lambda url, *parts: real(*parts))
    whole, = serve(lambda *_: reply_with("Answer: 5é", reasoning_content="so")).rows
    done = serve(lambda *_: None, "--stream")
    assert done.code == 0 and not done.requests and len(done.rows) == 1
    done.out.unlink()
    done = serve(lambda *_: stream_of(delta(reasoning_content="so"), delta("Answer: "), ": wait",
                                      delta("5é", "stop")), "--stream")
    row, = done.rows
    assert row["teacher"].pop("seconds") > 0 and whole["teacher"].pop("seconds") > 0
    assert row == whole and row["correct"] and "500 tokens" in done.printed
    assert done.requests[0][3] == {
        "model": "big", "max_tokens": 32768, "stream": True,
        "stream_options": {"include_usage": True}, "messages": [{"role": "user", "content": "q0"}]}
    assert not serve(lambda *_: None, "--stream", "--body", '{"stream_options": null}').requests


def test_usage_can_be_left_out_of_the_request(serve):
    done = serve(lambda *_: stream_of(*STREAM), "--stream", "--body", '{"stream_options": null}')
    assert done.code == 0 and "stream_options" not in done.requests[0][3]


@pytest.mark.parametrize("flags", [(), ("--stream",)])
def test_a_server_that_ignores_what_is_asked(serve, flags):
    replies = {"q0": reply_with(), "q1": stream_of(*STREAM)}
    done = serve(lambda question, *_: replies[question], *flags, n=2)
    assert done.code == 0 and [row["correct"] for row in done.rows] == [True, True]


def test_streams_that_fail(serve):
    cut = events(*STREAM).partition('"stop"')[0].encode()
    closed = {"Content-Type": "text/event-stream", "Connection": "close"}
    replies = {"q0": stream_of(*STREAM), "q1": (200, closed, cut), "q2": stream_of(*STREAM[:3]),
               "q3": stream_of(*STREAM[:4], {"error": {"message": f"busy {SECRET}"}}),
               "q4": stream_of(*STREAM[:5], delta("", "length")), "q5": stream_of("data: [1]"),
               "q6": stream_of(delta("a"), {"choices": [7]}),
               "q7": stream_of("data: " + "[" * 9999)}
    done = serve(lambda question, *_: replies[question], "--stream", n=8)
    assert done.code == 1 and {row["question"]: row.get("unfit") for row in done.rows} == {
        "q0": None, "q1": "no finish reason", "q4": "length"}
    failed = {row["question"]: row for row in done.failures}
    assert sorted(failed) == ["q2", "q3", "q5", "q6", "q7"]
    assert "busy [key]" in failed["q3"]["error"] and '"content": "Answer:' in failed["q3"]["raw"]


def test_a_torn_stream_is_tried_again(serve):
    def script(question, handler, number):
        status, headers, text = stream_of(*STREAM)
        torn = {"Content-Length": "9999", "Connection": "close"}
        return (status, headers | torn, text[:-300]) if number < 3 else (status, headers, text)
    done = serve(script, "--stream")
    assert done.code == 0 and len(done.requests) == 3 and done.rows[0]["correct"]


def test_a_stream_cannot_outlast_the_deadline(serve):
    def script(question, handler, number):
        if question == "q1":
            return stream_of(*STREAM)
        handler.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for _ in range(50):
            time.sleep(0.05)
            handler.connection.sendall(events(delta("a")).encode())
    done = serve(script, "--stream", "--deadline", 0.5, "--workers", 1, n=2)
    assert done.code == 1 and [row["question"] for row in done.rows] == ["q1"]
    assert "TimeoutError" in done.failures[0]["error"]


# ---- Retries --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [408, 409, 429, 500, 503, 529, "drop", "torn"])
def test_tries_again(serve, bad):
    def script(question, handler, number):
        if number > 2:
            return reply_with()
        torn = (200, {"Content-Length": "9999", "Connection": "close"},
                json.dumps(reply_with()).encode()[:-1])
        return {"drop": None, "torn": torn}.get(bad, (bad, {}, b"busy"))
    done = serve(script)
    assert done.code == 0 and len(done.rows) == 1 and len(done.requests) == 3, done.error


@pytest.mark.parametrize("status", [400, 403, 422])
def test_a_refusal_is_not_tried_again(serve, status):
    def script(question, *_):
        return reply_with() if question != "q1" else (
            status, {}, {"error": {"message": f"bad \x1b[31m {SECRET} here"}})
    done = serve(script, n=4)
    assert done.code == 1 and "3 of 4 answered, 1 failed" in done.printed
    assert len(done.requests) == 4 and len(done.rows) == 3
    failure, = done.failures
    assert failure["question"] == "q1" and f"HTTP {status}: " in failure["error"]
    assert "[key] here" in failure["error"] and "[key] here" in failure["raw"]


@pytest.mark.parametrize("status, text", [(401, "who are you"), (404, "no such model"),
                                          (402, "no money"), (302, "redirect")])
def test_what_all_questions_would_get_ends_the_run(serve, status, text):
    done = serve(lambda *_: (status, {"Location": "/elsewhere"}, [{"error": {"message": text}}]),
                 "--workers", 1, n=5)
    assert done.code == 2 and len(done.requests) == 1
    assert done.error.count("error:") == 1 and str(status) in done.error
    assert text in done.error and "Traceback" not in done.error


def test_a_fatal_reply_does_not_lose_those_under_way(serve):
    def script(question, handler, number):
        if question == "q9":
            return 402, {}, b"no money"
        time.sleep(0.2)
        return reply_with()
    done = serve(script, "--workers", 10, n=30)
    assert done.code == 2 and "no money" in done.error
    assert len(done.rows) == 9 and len(done.requests) == 10


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(serve, status):
    elsewhere = []
    other = Server(("127.0.0.1", 0), Handler)
    other.script = lambda *_: elsewhere.append(1) or reply_with()
    threading.Thread(target=other.serve_forever, daemon=True).start()
    location = {"Location": f"http://127.0.0.1:{other.server_port}/"}
    done = serve(lambda *_: (status, location, reply_with()))
    other.shutdown()
    assert done.code == 2 and str(status) in done.error and not done.rows and not elsewhere


def test_a_server_that_never_answers_ends_the_run(serve):
    done = serve(lambda *_: (500, {}, b"down"), "--workers", 1, n=50)
    assert done.code == 2 and "no answers" in done.error and "500" in done.error
    assert len(done.failures) == 10 and len(done.requests) == 10 * 17


@pytest.mark.parametrize("headers", [{"Retry-After": "0.3"}, {"retry-after-ms": "300"}])
def test_the_server_says_when_to_try_again(serve, headers):
    done = serve(lambda question, handler, number: (429, headers, b"slow down") if number == 1
                 else reply_with())
    (first, *_), (second, *_) = done.requests
    assert done.code == 0 and 0.3 <= second - first < 2


def test_the_deadline_is_for_all_tries_together(serve):
    start = time.monotonic()
    done = serve(lambda *_: (429, {"Retry-After": "0.1"}, b"busy"), "--deadline", 0.5)
    assert done.code == 1 and 1 < len(done.requests) <= 5 and time.monotonic() - start < 4
    assert "TimeoutError" in done.failures[0]["error"]


@pytest.mark.parametrize("drip", [b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_server_that_sends_byte_after_byte_meets_the_deadline(serve, drip):
    def script(question, handler, number):
        if question != "q0":
            return reply_with()
        handler.connection.sendall(drip)
        for _ in range(300):                        # until the client hangs up
            time.sleep(0.03)
            handler.connection.sendall(b" ")
    start = time.monotonic()
    done = serve(script, "--deadline", 0.5, "--workers", 1, n=3)
    assert 0.4 < time.monotonic() - start < 5
    assert done.code == 1 and [row["question"] for row in done.rows] == ["q1", "q2"]
    assert "TimeoutError" in done.failures[0]["error"]


class Concurrency:
    """A script that takes a while, and the most requests that were under way in it."""

    def __init__(self, reply):
        self.reply, self.lock, self.now, self.most = reply, threading.Lock(), 0, 0

    def __call__(self, *_):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.1)
        with self.lock:
            self.now -= 1
        return self.reply


def test_as_many_requests_at_a_time_as_workers(serve):
    script = Concurrency(reply_with())
    assert serve(script, "--workers", 3, n=9).code == 0 and script.most == 3


# ---- The key --------------------------------------------------------------------------------


def test_the_key_is_written_nowhere(serve, monkeypatch):
    """Not even if the server echoes it, across the place where a message is cut, or in JSON
    escapes. `serve` looks into every file."""
    echo, escaped = "x" * 255 + SECRET, json.dumps(SECRET).replace("sk", "\\u0073\\u006b")
    answer = json.dumps(reply_with("SECRET")).replace('"SECRET"', escaped).encode()
    replies = {"q0": (400, {}, {"error": {"message": echo}}), "q1": (200, {}, answer),
               "q2": reply_with(f"<think>{SECRET}</think>{SECRET}")}
    done = serve(lambda question, *_: replies[question], n=3)
    assert sorted(row["answer"] for row in done.rows) == ["[key]", "[key]"]
    assert SECRET[:6] not in done.failures[0]["error"] and "xx[key]" in done.failures[0]["error"]


def test_a_short_key_may_be_a_word_of_an_answer(serve, monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", "ollama")
    done = serve(lambda *_: reply_with("<think>t</think>ollama"))
    assert done.requests[0][2]["authorization"] == "Bearer ollama"
    assert done.rows[-1]["answer"] == "ollama"


def test_the_log_of_the_sdk_is_without_the_key(serve, caplog):
    with caplog.at_level("DEBUG"):
        assert serve(lambda *_: reply_with()).code == 0
    assert SECRET not in caplog.text


def test_proxies_of_the_environment_do_not_see_loopback_requests(serve, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert serve(lambda *_: reply_with()).code == 0


@pytest.mark.parametrize("flags, message", [
    ("--base-url http://example.com/v1", "unencrypted"), ("--questions none.jsonl", "none"),
    ("--body [1]", "--body"), ("--body {", "--body"), ('--body {"n":2}', "--body"),
    ('--body {"stream":true}', "--body"),
    ("--workers 0", "--workers"), ("--max-usd 1", "--usd-in"), ("--deadline x", "--deadline"),
    ("--out q.jsonl", "q.jsonl"), ("--out none/none", "No such file")])
def test_user_errors_get_one_line_and_exit_code_2(run, tmp_path, monkeypatch, flags, message):
    pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"question": "q", "answer": "5"}\n')
    code, _, error = run("recipe.teacher", "--questions", "q.jsonl", "--model", "m", "--out", "o",
                         "--base-url", "http://localhost:9/v1", *flags.split(" "))
    assert code == 2 and message in error and error.count("error:") == 1
    assert (tmp_path / "q.jsonl").read_text() == '{"question": "q", "answer": "5"}\n'


# ---- Dollars --------------------------------------------------------------------------------


PRICES = ("--usd-in", 1000, "--usd-out", 2000, "--max-tokens", 400)


@pytest.mark.parametrize("usage", [USAGE, None, {"prompt_tokens": -9, "total_tokens": 1}])
def test_the_limit_counts_what_is_under_way(serve, usage):
    """100 tokens in and 400 out are 0.90 dollars; the worst case is about 0.90 as well."""
    done = serve(lambda *_: reply_with(usage=usage), *PRICES, "--max-usd", 4.85, "--workers", 3,
                 n=20)
    assert done.code == 1 and "stopped before $4.85 is passed" in done.printed
    assert len(done.requests) == len(done.rows) == 5 and not done.failures
    assert f"{2500 if usage is USAGE else 0:,} tokens" in done.printed


@pytest.mark.parametrize("usage, rows", [(USAGE, 5), (None, 5), (
    {"prompt_tokens": 1, "total_tokens": 2}, 20)])
def test_streams_cost_what_they_report_or_the_worst_case(serve, usage, rows):
    done = serve(lambda *_: stream_of(*STREAM, usage=usage), "--stream", *PRICES,
                 "--max-usd", 4.85, "--workers", 1, n=20)
    assert len(done.rows) == len(done.requests) == rows and done.code == int(rows < 20)


def test_no_more_are_under_way_than_the_limit_pays_for(serve):
    script = Concurrency(reply_with(usage={"prompt_tokens": 1, "total_tokens": 2}))
    done = serve(script, *PRICES, "--max-usd", 2.5, "--workers", 8, n=20)
    assert script.most == 2
    assert done.code == 0 and len(done.rows) == 20      # each costs less than the worst case


def test_lost_replies_and_earlier_runs_cost_dollars(serve, monkeypatch):
    done = serve(lambda *_: None, *PRICES, "--max-usd", 2.9, "--workers", 1, n=20)
    assert len(done.requests) == 3                  # each may have cost up to 0.91
    assert done.code == 1 and "stopped before $2.9 is passed" in done.printed
    rows = serve(lambda *_: reply_with(), n=3).rows
    done = serve(lambda *_: reply_with(), *PRICES, "--max-usd", 2.9, n=20)
    assert not done.requests and len(done.rows) == len(rows) == 3      # 2.7 dollars are in the file


def test_faults_never_cost_more_than_the_limit(serve):
    """Each request whose reply is lost or a 200 is billed, and no other."""
    rng, lock, billed = random.Random(0), threading.Lock(), []

    def script(*_):
        with lock:
            fault = rng.choice(("drop", "torn", "busy", "slow", "cheap", "no answer", *[""] * 6))
            if fault != "busy":
                billed.append(0.4 if fault == "cheap" else 0.9)
        time.sleep(0.6 if fault == "slow" else 0.01)        # beyond the deadline
        cheap = {"prompt_tokens": 100, "total_tokens": 250}
        torn = (200, {"Content-Length": "9999", "Connection": "close"}, b"{")
        return {"drop": None, "torn": torn, "busy": (429, {}, b""), "no answer": reply_with(None),
                "cheap": reply_with(usage=cheap)}.get(fault, reply_with())
    done = serve(script, *PRICES, "--max-usd", 40, "--workers", 8, "--deadline", 0.5, n=200)
    assert done.code == 1 and "stopped before $40 is passed" in done.printed
    assert 35 < sum(billed) <= 40
    spent = float(done.printed.partition("$")[2].partition(";")[0])
    assert sum(billed) <= spent + 0.01 and spent <= 40


def test_a_refused_connection_costs_nothing(run, tmp_path, monkeypatch, fast_retries):
    server = Server(("127.0.0.1", 0), Handler)
    server.server_close()
    (tmp_path / "q.jsonl").write_text('{"question": "q"}\n')
    code, printed, _ = run("recipe.teacher", "--questions", tmp_path / "q.jsonl", "--model", "m",
                           "--out", tmp_path / "t.jsonl", *PRICES, "--max-usd", 5,
                           "--base-url", f"http://127.0.0.1:{server.server_port}/v1")
    assert code == 1 and "1 failed, 0 tokens, $0.00" in printed
    assert "onnect" in failures(tmp_path / "t.jsonl")[0]["error"]


# ---- Stopping and going on ------------------------------------------------------------------


def test_ctrl_c_keeps_what_came(serve):
    def script(question, handler, number):
        if number == 6:
            os.kill(os.getpid(), signal.SIGINT)
        if number > 5:
            time.sleep(6)
        return reply_with()
    signal.signal(signal.SIGINT, signal.default_int_handler)    # another test may have changed it
    start = time.monotonic()
    done = serve(script, "--workers", 2, n=50)
    assert done.code == 130 and time.monotonic() - start < 5    # it does not wait for the server
    assert 4 <= len(done.rows) <= 5


def chaos(seed, log):
    """Replies of a server that fails in many ways; each question is noted in `log`."""
    rng, lock = random.Random(seed), threading.Lock()

    def script(question, handler, body):
        with lock:
            dice = rng.random()
            os.write(log, f"{question}\n".encode())
        for reply in ((408, {}, b""), (409, {}, b"x"), (429, {"Retry-After": "0.01"}, b"slow"),
                      (429, {"retry-after-ms": "5"}, b""), (500, {}, b"{}"), None,
                      (503, {"Retry-After": "Mon, 01 Jan 2001 00:00:00 GMT"}, b""),
                      (200, {}, b"no JSON"), {"choices": []}, reply_with(None),
                      (400, {}, {"error": {"message": "refused"}}), (422, {}, b"{"),
                      (200, {"Content-Length": "9999", "Connection": "close"}, b'{"choices"')):
            dice -= 0.02
            if dice < 0:
                return reply
        if dice < 0.003:                            # drips beyond the client's deadline
            handler.connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            for _ in range(40):
                time.sleep(0.05)
                handler.connection.sendall(b" ")
            return None
        content = f"<think>{question} {'hm ' * 500}</think>Answer: {question}"
        return [reply_with(f"Answer: {question}", reasoning=f"{question} {'hm ' * 500}"),
                reply_with(content), reply_with(content.removeprefix("<think>"))][
                    int(dice * 1e6) % 3]
    return script


def forked(work):
    """The id of a child process that does `work` and ends."""
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        try:
            work()
        finally:
            os._exit(1)
    return child


def test_server_and_client_are_killed_and_every_question_is_answered_once(
        tmp_path, monkeypatch, fast_retries):
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
            "teacher.py", "--questions", str(tmp_path / "q.jsonl"), "--model", "big",
            "--base-url", f"http://127.0.0.1:{port}", "--out", str(out), "--deadline", "1.5"])
        try:
            teacher.main()
            os._exit(0)
        except SystemExit as stop:
            os._exit(stop.code)

    def lines():
        return out.read_bytes().split(b"\n")[:-1] if out.exists() else []
    serving, kills, torn, code = forked(server), 0, 0, None
    try:
        for _ in range(30):
            done = {json.loads(line)["question"] for line in lines()}
            asked = os.fstat(log).st_size
            rng.random()                            # the next server fails in other places
            child = forked(client)
            if len(done) < 900:
                end, patience = len(done) + rng.randint(1, 150), time.monotonic() + 3
                while len(lines()) < end and time.monotonic() < patience:
                    time.sleep(0.005)
                if kills % 3 == 1:                  # the server too, while the client asks
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
    found = [json.loads(line) for line in lines()]
    assert Counter(row["question"] for row in found) == Counter(names)
    assert all(row["correct"] and row["thinking"].startswith(row["question"] + " ")
               and row["answer"] == f"Answer: {row['question']}" for row in found)
    assert len(load_traces(out)) == 1000 and not failures(out)
