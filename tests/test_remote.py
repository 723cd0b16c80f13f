"""Evaluation on a vLLM server: a loopback server samples with our own Sampler over its protocol."""
import gc
import json
import shutil
import sys
import threading
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import ReplyHandler, tiny_model

from budget_force import Budget
from recipe.remote import RemoteSampler
from sample import Sampler

pytest.importorskip("openai")

SECRET = "sk-loopback-0123456789"


class Handler(ReplyHandler):
    def do_GET(self):
        self.send(self.server.models)

    def do_POST(self):
        body = self.read_json()
        with self.server.lock:
            self.server.requests.append(body)
            reply = self.server.script(len(self.server.requests))
            if reply is None:
                reply = {"choices": [{"token_ids": self.server.complete(body)}]}
            self.send(reply)

    def send(self, reply):
        """Sends a JSON value or (status, headers, bytes); "drop" drops the connection."""
        self.server.headers.append(self.headers)
        if reply == "drop":
            self.close_connection = True
            return
        status, headers, text = reply if isinstance(reply, tuple) else (
            200, {"Content-Type": "application/json"}, json.dumps(reply).encode())
        self.send_reply(status, headers, text)


class Server(ThreadingHTTPServer):
    """Serves a Transformer by the part of vLLM's protocol that RemoteSampler uses. `script(n)` is
    what the n-th request gets instead of tokens; None: tokens."""
    request_queue_size, daemon_threads, allow_reuse_address = 128, True, True

    def __init__(self, model, max_model_len, chat=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.chat, self.max_model_len = model, chat, max_model_len
        self.sampler = Sampler(model, 1, max_model_len)
        self.models = {"data": [{"id": "other", "max_model_len": 9},
                                {"id": "served", "max_model_len": max_model_len}]}
        self.requests, self.headers, self.script = [], [], lambda number: None
        self.lock, self.url = threading.Lock(), f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def complete(self, body):
        """The token ids that vLLM would return; a stop is the last of them."""
        assert body["model"] == "served" and body["return_token_ids"] and body["ignore_eos"]
        assert 1 <= body["max_tokens"] <= self.max_model_len - len(body["prompt"])
        if body["logit_bias"]:
            assert body["max_tokens"] == 1          # a bias would hold for all tokens
            logits = self.model(torch.tensor([body["prompt"]]))[0, -1]
            for token, bias in body["logit_bias"].items():
                logits[int(token)] += bias
            return [int(logits.argmax())]
        sampling = {name: body[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
        sequence, = self.sampler.generate(
            [body["prompt"]], max_new_tokens=body["max_tokens"], stop_ids=body["stop_token_ids"],
            **sampling)
        tokens, stop = sequence.tokens, body["stop"]
        ends = (n for n in range(1, len(tokens)) if stop and stop in self.chat.decode(tokens[:n]))
        return tokens[:next(ends, None)]

    def handle_error(self, *_):                     # the client is gone
        pass


@pytest.fixture
def serve(monkeypatch):
    """serve(model, max_model_len, chat) is a running Server."""
    from openai import _base_client
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.002)
    monkeypatch.setattr(_base_client, "MAX_RETRY_DELAY", 0.01)
    servers = []

    def start(*arguments):
        servers.append(Server(*arguments))
        return servers[-1]
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# ---- The same tokens ------------------------------------------------------------------------

# A vocabulary of 16 tokens of random weights, which end thinking and answers often.
IDS = {"Wait": [5], "Hmm": [6, 6], "Final Answer:": [7], "\n": [8]}
# In plain text any even token, then 1, 3 or 10, is a delimiter; it may begin in an earlier token.
TEXTS = {8: "\n", 10: ").(", 1: ")", 3: ")"} | {i: "(" for i in (0, 2, 4, 6, 12, 14)}
TOY = dict(closing_ids=[1, 2], end_id=9, stop_ids={9},
           encode=lambda text: IDS.get(text, [11] * len(text)),
           decode=lambda ids: "".join(TEXTS.get(i, ":") for i in ids))
CHATS = {"token": SimpleNamespace(**TOY, closing_text="", end_ids={1, 9}, turn_ids={1}),
         "again": SimpleNamespace(**TOY, closing_text="", end_ids={1, 9}, turn_ids=set()),
         "text": SimpleNamespace(**TOY, closing_text="()", end_ids={9}, turn_ids=set())}
PROMPTS = [[first, 8] for first in (1, 3, 5, 6, 10, 14)]


@pytest.fixture(scope="module")
def toy_model():
    return tiny_model(initializer_range=0.5, vocab_size=16)


def outcome(sampler, controller=None, prompts=PROMPTS, **options):
    sequences = sampler.generate(prompts, controller, stop_ids={9}, **options)
    return sorted((seq.index, seq.sample, seq.tokens, seq.forced, seq.finish_reason,
                   vars(seq.state) if seq.state else {}) for seq in sequences)


@pytest.mark.parametrize("style, max_thinking, num_waits, repeats", [
    *((style, *numbers) for style in ("token", "text")
      for numbers in ((-1, 2, 0), (0, 0, 0), (5, 0, 0), (12, 1, 0))),
    ("again", -1, 0, 0), ("text", -1, 1, 1)])
def test_a_budget_gives_the_local_engines_tokens(serve, toy_model, style, max_thinking, num_waits,
                                                 repeats):
    server = serve(toy_model, 40, CHATS[style])
    controller = Budget(CHATS[style], max_thinking, num_waits, ("Wait", "Hmm"), 4, repeats, 40)
    remote = RemoteSampler(server.url, "served", 5)
    assert outcome(remote, controller) == outcome(Sampler(toy_model, 5, 40), controller)
    # No request goes past what the budget has left, except for the token that may be an end.
    if max_thinking >= 0:
        first = [body for body in server.requests if len(body["prompt"]) == 2]
        assert {body["max_tokens"] for body in first} == {max_thinking + 1}
        assert all(body["max_tokens"] <= max(max_thinking, 4) + 1 for body in server.requests)


@pytest.mark.parametrize("options", [
    dict(), dict(max_new_tokens=7), dict(repeats=1)])
def test_plain_sampling_gives_the_local_engines_tokens(serve, toy_model, options):
    server = serve(toy_model, 40)
    remote, local = RemoteSampler(server.url, "served", 5), Sampler(toy_model, 5, 40)
    assert remote.max_seq_len == 40
    assert outcome(remote, **options) == outcome(local, **options)
    assert len(server.requests) == len(PROMPTS)
    assert outcome(remote, prompts=[]) == []


def test_any_controller_works(serve, toy_model):
    """One without the hints of a Budget costs more of the server's tokens, and gives the same."""
    controller = Budget(CHATS["token"], 5, 1, max_answer=4, max_seq_len=40)

    def plain(sequence, token):
        return controller(sequence, token)
    server = serve(toy_model, 40)
    assert outcome(RemoteSampler(server.url, "served"), plain) == outcome(
        Sampler(toy_model, 5, 40), controller)


def test_a_wait_is_one_request_more(serve, toy_model):
    """After a Wait one token is asked for, without the banned ones; then as many as remain."""
    server = serve(toy_model, 40)
    remote = RemoteSampler(server.url, "served", 1)
    controller = Budget(CHATS["token"], 20, 1, max_answer=4, max_seq_len=40)
    found = next(seq for seq in remote.generate(PROMPTS, controller, stop_ids={9})
                 if seq.state.ended == "natural" and seq.state.waits)
    mine = [body for body in server.requests if body["prompt"][:2] == found.prompt]
    assert all(body["prompt"] == (found.prompt + found.tokens)[:len(body["prompt"])]
               for body in mine)
    after = found.tokens.index(5) + 1
    assert [(body["max_tokens"], body["logit_bias"]) for body in mine[:3]] == [
        (21, {}), (1, {"1": -100, "9": -100}), (21 - after - 1, {})]


def test_nothing_is_left_to_the_servers_defaults(serve, toy_model):
    """generation_config.json may have a repetition_penalty, which vLLM takes."""
    server = serve(toy_model, 40)
    outcome(RemoteSampler(server.url, "served"), temperature=0.5, top_k=3)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
             "frequency_penalty")
    assert [server.requests[0][name] for name in names] == [0.5, 3, 1.0, 0.0, 1.0, 0.0, 0.0]


def test_samples_have_seeds_of_their_own(serve, toy_model):
    server = serve(toy_model, 40)
    remote = RemoteSampler(server.url, "served", 4)

    def draws(seed):
        del server.requests[:]
        return outcome(remote, prompts=PROMPTS[:2], samples=3, seed=seed, temperature=1.0)
    first = draws(0)
    assert len({body["seed"] for body in server.requests}) == 6
    assert [row[:2] for row in first] == [(i, k) for i in range(2) for k in range(3)]
    assert draws(0) == first != draws(1)


# ---- The evaluation -------------------------------------------------------------------------

SMALL = ("--n", 2, "--method", "direct", "budget", "--budgets", 8, -1, "--num-waits", 1,
         "--max-answer", 8, "--max-seq-len", 110, "--max-num-seqs", 3)
ONE_RUN = ("--method", "budget", "--budgets", 3, "--num-waits", 0, "--max-num-seqs", 1)


@pytest.fixture
def evaluate(serve, run, tiny, tmp_path):
    """evaluate(*flags) runs budget_force.py on a server of `tiny`; its `server` is the last one.
    The model's directory has no weights, as they are the server's."""
    model = tmp_path / "there"
    shutil.copytree(tiny, model, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))

    def call(*flags, server=None):
        server = call.server = server or serve(tiny_model(vocab_size=1408), 768)
        return run("budget_force", "--model", model, "--base-url", server.url,
                   "--served-model-name", "served", *SMALL, *flags)
    call.out = model / "eval" / "rows.jsonl"
    return call


def rows_of(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return sorted(json.dumps(row | {"key": None, "model": None}) for row in rows)


def test_the_evaluation_is_that_of_the_local_engine(evaluate, run, tiny, tmp_path):
    """Only the tokenizer is here; the base, which nobody serves, is not evaluated."""
    code, printed, error = evaluate()
    assert code == 0 and "countdown-base" not in printed, error
    assert run("budget_force", "--model", tiny, "--base=", *SMALL, "--out", tmp_path / "local")[
        0] == 0
    assert len(rows_of(evaluate.out)) == 8
    assert rows_of(evaluate.out) == rows_of(tmp_path / "local" / "rows.jsonl")


def test_rows_go_by_the_name_of_the_served_model(evaluate):
    """Not by the server's address."""
    assert evaluate(*ONE_RUN)[0] == 0
    assert evaluate(*ONE_RUN)[0] == 0 and not evaluate.server.requests
    evaluate.server.models["data"].append({"id": "step200", "max_model_len": 768})
    evaluate.server.script = lambda number: {"choices": [{"token_ids": [5]}]}
    assert evaluate(*ONE_RUN, "--served-model-name", "step200", server=evaluate.server)[0] == 0
    assert evaluate.server.requests and len(rows_of(evaluate.out)) == 4


def test_one_answer_is_watched(evaluate, run, tiny):
    code, printed, error = evaluate("What?")
    assert code == 0 and printed.startswith("[<|im_start|>think\n]"), error
    assert printed == run("budget_force", "What?", "--model", tiny, *SMALL)[1]


# ---- What goes wrong ------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("reply, message", [
    ({"choices": [{"text": "a"}]}, "no token ids"), ({"choices": []}, "no token ids"),
    ({"choices": [{"token_ids": []}]}, "no token ids"), ([], "no token ids"),
    ({"choices": [{"token_ids": ["a"]}]}, "no token ids"),
    ((200, {}, b"<html>"), "no token ids"), ((200, JSON, b"{"), "Expecting"),
    ((404, JSON, b'{"error": {"message": "no \\u001b[31m such model"}}'), "such model"),
    ((500, {}, b"out of memory"), "500"), ("drop", "disconnected"),
    ((307, {"Location": "http://127.0.0.1:9/"}, b""), "307")])
def test_a_broken_run_goes_on(evaluate, serve, reply, message):
    """One line; what was answered is kept, and the same command asks for the rest only."""
    server = serve(tiny_model(vocab_size=1408), 768)
    server.script = lambda number: reply if number > 2 else None
    code, _, error = evaluate(*ONE_RUN, server=server)
    assert code == 2 and message in error and server.url in error
    assert len(error.splitlines()) == 1 and "\x1b" not in error
    kept = rows_of(evaluate.out)
    assert len(kept) == 1
    gc.collect()                                    # closes the file, as the end of a process does
    server.script = lambda number: None
    assert evaluate(*ONE_RUN, server=server)[0] == 0
    rows = rows_of(evaluate.out)
    assert len(rows) == 2 and kept[0] in rows
    assert sum(body["prompt"] == server.requests[0]["prompt"] for body in server.requests) == 1


@pytest.mark.parametrize("models, message", [
    ({"data": [{"id": "m"}, {"id": "n"}]}, "m, n (--served-model-name)"),
    ({"data": []}, "--served-model-name"), ([], "--served-model-name"),
    ((200, {}, b"<html>"), "--served-model-name"), ((401, JSON, b'{"error": "key"}'), "401"),
    ("drop", "disconnected"),
    ({"data": [{"id": "served", "max_model_len": 60}]}, "only 60 fit into a sequence")])
def test_what_the_server_lacks_is_said_at_once(evaluate, serve, models, message):
    server = serve(tiny_model(vocab_size=1408), 768)
    server.models = models
    code, printed, error = evaluate(server=server)
    assert code == 2 and message in error and not printed and not server.requests
    assert len(error.splitlines()) == 1 and not evaluate.out.exists()


def test_an_error_comes_after_the_results_of_the_same_moment(serve, toy_model, monkeypatch):
    async def sample_tokens(sampler, client, seq, *_):
        if seq.index == 2:
            raise ValueError("broken")
        return [9]
    monkeypatch.setattr(RemoteSampler, "sample_tokens", sample_tokens)
    remote, found = RemoteSampler(serve(toy_model, 40).url, "served"), []
    with pytest.raises(ValueError, match="broken"):
        found.extend(seq.index for seq in remote.generate(PROMPTS, stop_ids={9}))
    assert sorted(found) == [0, 1, 3, 4, 5]


def test_no_server(evaluate, serve):
    server = serve(tiny_model(vocab_size=1408), 768)
    code, _, error = evaluate("--base-url", "http://127.0.0.1:9/v1", server=server)
    assert code == 2 and "http://127.0.0.1:9/v1: Connection error" in error
    assert len(error.splitlines()) == 1


def test_the_key_is_the_servers_own(evaluate, serve, monkeypatch):
    """No other key is sent, and none over http to another machine."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert evaluate(*ONE_RUN)[0] == 0
    assert all(SECRET not in str(headers) for headers in evaluate.server.headers)
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    assert evaluate(*ONE_RUN, "--overwrite")[0] == 0
    sent = {headers["Authorization"] for headers in evaluate.server.headers}
    assert sent == {f"Bearer {SECRET}"} and SECRET not in evaluate.out.read_text()
    code, _, error = evaluate("--base-url", "http://example.invalid/v1")
    assert code == 2 and "--allow-http" in error and SECRET not in error
    monkeypatch.delenv("VLLM_API_KEY")
    code, _, error = evaluate("--base-url", "http://example.invalid/v1")
    assert code == 2 and "Connection error" in error


def test_the_openai_library_is_optional(evaluate, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    code, _, error = evaluate()
    assert code == 2 and "pip install openai" in error and error.count("\n") == 1
