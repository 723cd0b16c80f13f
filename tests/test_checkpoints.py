"""Real checkpoints: each family against what `transformers` computes, what is refused, chat,
the hub."""
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import BASE, ROOT, tiny_model

import data
from data import BadInput, Chat
from model import BadModel, KVCache, Transformer, read_config
from sample import Sampler

FIXTURES = ROOT / "tests" / "fixtures"
FAMILIES = sorted(path.name for path in FIXTURES.iterdir())
each = pytest.mark.parametrize("family", FAMILIES)


def golden(family):
    return safetensors.torch.load_file(FIXTURES / family / "golden.safetensors")


@pytest.fixture
def copied(tmp_path):
    """copied("llama") is a copy of that fixture that a test may break."""
    def copy(family, name="model"):
        return Path(shutil.copytree(FIXTURES / family, tmp_path / name))
    return copy


def change_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    config.update(changes)
    (directory / "config.json").write_text(json.dumps(
        {k: v for k, v in config.items() if v is not ...}))


# ---- Parity ---------------------------------------------------------------------------------


def test_there_is_a_fixture_of_each_family():
    assert FAMILIES == ["llama", "qwen2", "qwen3", "r1"]


@each
def test_logits_gradients_and_greedy_tokens_are_those_of_transformers(family):
    want, model = golden(family), Transformer.load(FIXTURES / family)
    torch.testing.assert_close(model(want["ids"]), want["logits"], atol=1e-4, rtol=0)
    targets = torch.nn.functional.pad(want["ids"][:, 1:], (0, 1), value=-100)
    model(want["ids"], targets=targets)[0].backward()
    for name, p in model.named_parameters():
        scale = want[f"grad.{name}"].abs().max().item()
        torch.testing.assert_close(p.grad, want[f"grad.{name}"], atol=1e-5 * scale, rtol=1e-4)
    row, = Sampler(model, 1, 72).generate([want["ids"][0, :8].tolist()], max_new_tokens=64)
    assert row.tokens == want["greedy"].tolist()


@each
def test_cached_packed_and_batched_are_the_plain_forward(family):
    model, ids = Transformer.load(FIXTURES / family), golden(family)["ids"]
    close = {"atol": 1e-5, "rtol": 1e-5}
    with torch.no_grad():
        plain = model(ids)
        cache = KVCache.empty(model.config, 2, 40)
        steps = [model(ids[:, :30], cache=cache.rows(1, 2)), *(
            model(ids[:, i:i + 1].repeat(2, 1), cache=cache)[1:] for i in range(30, 40))]
        torch.testing.assert_close(torch.cat(steps, 1), plain, **close)
        torch.testing.assert_close(model(ids.repeat(3, 1))[2:], plain, **close)
        packed = model(torch.cat((ids[:, :25], ids), 1), lengths=[25, 40],
                       positions=torch.cat((torch.arange(25), torch.arange(40)))[None])
        torch.testing.assert_close(packed[:, 25:], plain, **close)


@each
def test_both_layouts_of_the_config_are_one_model(copied, family):
    directory = copied(family)
    rope = json.loads((directory / "config.json").read_text())["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    for scaling in ({"type": kind, **rope}, {"rope_type": kind, **rope},
                    *([None] if kind == "default" else [])):
        change_config(directory, rope_parameters=..., rope_theta=theta, rope_scaling=scaling,
                      dtype=..., torch_dtype="float32")
        ids = golden(family)["ids"]
        assert torch.equal(Transformer.load(directory)(ids),
                           Transformer.load(FIXTURES / family)(ids))


def test_a_tied_model_may_store_its_head(copied):
    directory = copied("qwen2")
    state = safetensors.torch.load_file(directory / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(state, directory / "model.safetensors")
    assert "lm_head.weight" not in Transformer.load(directory).state_dict()


@each
def test_weights_come_in_the_dtype_asked_for(family):
    for dtype in (torch.float32, torch.bfloat16):
        assert {p.dtype for p in Transformer.load(FIXTURES / family, dtype).parameters()} == {dtype}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_no_second_copy(tmp_path, dtype):
    """Anonymous memory at most 1.15 times the model: the file is mapped, tensors go one by one."""
    big = tiny_model(vocab_size=30_000, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    big.save(tmp_path, torch.bfloat16)
    size = sum(p.numel() for p in big.parameters()) * getattr(torch, dtype).itemsize
    code = f"""
import sys, threading, time, torch
from model import Transformer
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status")
                if l.startswith("RssAnon")) * 1024
Transformer.load({str(FIXTURES / "qwen2")!r})       # what the libraries take once
seen, done = [anonymous()], []
def watch():
    while not done:
        seen.append(anonymous())
        time.sleep(0.0002)
thread = threading.Thread(target=watch)
thread.start()
model = Transformer.load({str(tmp_path)!r}, torch.{dtype})
seen.append(anonymous())
done.append(True)
thread.join()
print(max(seen) - seen[0])
"""
    peak = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True,
                              capture_output=True).stdout)
    assert 0.9 * size < peak < 1.15 * size


# ---- Refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("family, change, complaint", [
    ("qwen2", {"model_type": "mistral"}, "model_type 'mistral'"),
    ("qwen3", {"model_type": "qwen3_moe"}, "qwen3_moe"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
    ("llama", {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 4.0}},
     "rope type 'linear'"),
    ("llama", {"rope_parameters": 7}, "the rope is 7"),
    ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "rope_scaling has no number factor"),
    ("qwen2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("qwen2", {"use_sliding_window": True}, "sliding window"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
    ("qwen2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama", {"attention_bias": True}, "attention_bias"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("qwen2", {"hidden_size": "32"}, "hidden_size is '32'"),
    ("qwen2", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ("qwen2", {"num_key_value_heads": 3}, "do not share"),
    ("qwen3", {"head_dim": 7}, "head_dim is 7")])
def test_refused_by_name_before_any_weight_is_read(copied, family, change, complaint):
    directory = copied(family)
    change_config(directory, **change)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(BadModel, match=complaint):
        Transformer.load(directory)


def edit_weights(directory, edit):
    state = safetensors.torch.load_file(directory / "model.safetensors")
    edit(state)
    safetensors.torch.save_file(state, directory / "model.safetensors")


@pytest.mark.parametrize("edit, complaint", [
    (lambda s: (s.pop("model.norm.weight"), s.pop("model.layers.1.mlp.up_proj.weight")),
     "missing model.layers.1.mlp.up_proj.weight, model.norm.weight"),
    (lambda s: s.update({"model.extra": torch.ones(1)}), "extra model.extra"),
    (lambda s: s.update({"model.norm.weight": torch.ones(31)}),
     "of another shape model.norm.weight"),
    (lambda s: s.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
     "quantised model.norm.weight")])
def test_wrong_tensors_are_refused_by_their_keys(copied, edit, complaint):
    directory = copied("qwen2")
    edit_weights(directory, edit)
    with pytest.raises(BadModel, match=complaint):
        Transformer.load(directory)


def test_old_buffers_are_no_weights(copied):
    directory = copied("qwen2")
    edit_weights(directory, lambda s: s.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    Transformer.load(directory)


def rename_shard(to):
    def edit(directory):
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.norm.weight"] = to
        path.write_text(json.dumps(index))
    return edit


@pytest.mark.parametrize("family, edit, complaint", [
    ("qwen2", lambda d: (d / "model.safetensors").write_bytes(
        (d / "model.safetensors").read_bytes()[:-9]), "cannot be read"),
    ("qwen2", lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 999), "cannot be read"),
    ("qwen2", lambda d: (d / "model.safetensors").write_bytes(b""), "cannot be read"),
    ("qwen2", lambda d: (d / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"), "Git LFS pointer"),
    ("qwen2", lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "only pickles"),
    ("qwen2", lambda d: (d / "model.safetensors").unlink(),
     "no weights in safetensors files: none"),
    ("qwen3", rename_shard("../model-00001-of-00003.safetensors"), "no plain name"),
    ("qwen3", rename_shard("/etc/passwd"), "no plain name"),
    ("qwen3", rename_shard("model.bin"), "no plain name"),
    ("qwen3", rename_shard(7), "no plain name"),
    ("qwen3", rename_shard("gone.safetensors"), "No such file"),
    ("qwen3", lambda d: (d / "model-00002-of-00003.safetensors").unlink(), "No such file"),
    ("qwen3", lambda d: (d / "model.safetensors.index.json").write_text("[]"),
     "no index of shards")])
def test_broken_weights_are_refused_as_what_they_are(copied, family, edit, complaint):
    directory = copied(family)
    edit(directory)
    with pytest.raises(BadModel, match=complaint):
        Transformer.load(directory)


# ---- Text -----------------------------------------------------------------------------------


@each
def test_chat_text_is_the_familys(family):
    want = json.loads((FIXTURES / family / "golden.json").read_text())
    chat = Chat(FIXTURES / family)
    assert chat.prompt(want["question"], thinking=True) == want["prompt"] + chat.think
    assert chat.prompt(want["question"], thinking=False) == want["direct"]


@pytest.mark.parametrize("family, text", [
    ("qwen2", "<|im_start|>think\nhm\n<|im_start|>answer\nAnswer: 2<|im_end|>\n"),
    ("qwen3", "<think>\nhm\n</think>\n\nAnswer: 2<|im_end|>\n"),
    ("llama", "<think>\nhm\n</think>\n\nAnswer: 2<|eot_id|>"),
    ("r1", "<think>\nhm\n</think>\n\nAnswer: 2<｜end▁of▁sentence｜>")])
def test_an_example_of_each_family(family, text):
    chat = Chat(FIXTURES / family)
    ids, first = chat.example("1+1?", " hm\n", "2")
    assert chat.decode(ids[first:]) == text and ids[:first] + chat.think == chat.prompt("1+1?")


@each
def test_text_from_outside_is_never_a_control_token(family):
    """Special added tokens and those that are none, in a question, a trace and an answer."""
    chat = Chat(FIXTURES / family)
    evil = "x" + "".join(chat.control) + "y"
    controls = set(chat.control.values())
    assert chat.decode(chat.text(evil)) == evil and not controls & set(chat.text(evil))
    def count(ids):
        return sum(i in controls for i in ids)
    assert count(chat.prompt(evil)) == count(chat.prompt("plain"))
    assert count(chat.example(evil, evil, evil)[0]) == count(chat.example("a", "b", "c")[0])


def test_the_format_can_be_chosen_and_an_unknown_one_is_refused(copied):
    assert Chat(FIXTURES / "qwen3", "qwen2.5", "s1").format == {
        "family": "qwen2.5", "thinking": "s1"}
    with pytest.raises(BadInput, match=r"not those of llama3 "
                                       r"\(known: deepseek-r1, llama3, qwen3, qwen2.5; --chat"):
        Chat(FIXTURES / "qwen3", "llama3")
    directory = copied("qwen2")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps({**tokenizer, "added_tokens": []}))
    with pytest.raises(BadInput, match="not those of a known chat format .*--chat chooses"):
        Chat(directory)
    (directory / "chat.json").write_text('{"family": "llama3", "thinking": "loud"}')
    shutil.copy(FIXTURES / "llama" / "tokenizer.json", directory)
    with pytest.raises(BadInput, match="thinking 'loud'"):
        Chat(directory)


def test_ctrl_c_while_a_tokenizer_is_read_is_no_broken_tokenizer(monkeypatch):
    def interrupted(text):
        raise KeyboardInterrupt
    monkeypatch.setattr(data.json, "loads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Chat(FIXTURES / "qwen2")


@pytest.mark.parametrize("text, complaint", [("{", "chat.json is no JSON"), ("[]", "no object")])
def test_a_broken_chat_json_is_named(copied, text, complaint):
    directory = copied("qwen2")
    (directory / "chat.json").write_text(text)
    with pytest.raises(BadInput, match=complaint):
        Chat(directory)


@pytest.mark.parametrize("config, generation, stops", [
    (7, None, {302, 7}), (None, 7, {302, 7}), (5, [6, 7], {302, 5, 6, 7}), (None, None, {302})])
def test_stops_are_all_that_are_named(copied, config, generation, stops):
    directory = copied("qwen2")
    change_config(directory, eos_token_id=config)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert Chat(directory).stops == stops


def test_a_base_models_own_end_token_stops_it(copied, run, monkeypatch):
    directory = copied("qwen2")
    row, = Sampler(Transformer.load(directory), 1, 72).generate(
        [Chat(directory).prompt("hi")], max_new_tokens=9)
    change_config(directory, eos_token_id=row.tokens[4])
    code, _, error = run("sample", "hi", "--model", directory)
    first = row.tokens.index(row.tokens[4])
    assert code == 0 and "stopped after" not in error and first <= 4


# ---- Saving ---------------------------------------------------------------------------------


@each
def test_saved_and_loaded_is_the_same(family, tmp_path):
    model, ids = Transformer.load(FIXTURES / family), golden(family)["ids"]
    model.save(tmp_path, shard_bytes=60_000)
    assert len([*tmp_path.glob("model-*-of-*.safetensors")]) > 1
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 64_000
    assert torch.equal(Transformer.load(tmp_path)(ids), model(ids))


@each
def test_five_steps_on_each_family_and_back(family, run, tmp_path):
    out = tmp_path / "out"
    code, _, error = run("train", "--model", FIXTURES / family, "--n", 8, "--batch-size", 4,
                         "--max-steps", 5, "--epochs", 3, "--out", out, "--save-dtype", "bfloat16")
    assert code == 0, error
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert ((out / "tokenizer.json").read_bytes()
            == (FIXTURES / family / "tokenizer.json").read_bytes())
    assert Chat(out).format == Chat(FIXTURES / family).format
    assert Chat(out).stops == Chat(FIXTURES / family).stops
    before = Transformer.load(FIXTURES / family).state_dict()
    after = Transformer.load(out).state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    code, printed, _ = run("sample", "1+1?", "--model", out, "--max-new-tokens", 5)
    assert code == 0 and printed.startswith("[")


def test_the_thinking_format_is_recorded(run, tmp_path):
    code, _, _ = run("train", "--model", FIXTURES / "qwen3", "--thinking", "s1", "--n", 4,
                     "--max-steps", 1, "--out", tmp_path / "out")
    assert code == 0 and Chat(tmp_path / "out").format == {"family": "qwen3", "thinking": "s1"}


# ---- Beside transformers itself -------------------------------------------------------------


@each
def test_transformers_loads_what_was_saved_here(family, run, tmp_path):
    transformers = pytest.importorskip("transformers")
    code, _, _ = run("train", "--model", FIXTURES / family, "--n", 8, "--max-steps", 5,
                     "--epochs", 5, "--batch-size", 4, "--out", tmp_path / "out")
    assert code == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out",
                                                               dtype=torch.float32)
    ids = golden(family)["ids"]
    torch.testing.assert_close(Transformer.load(tmp_path / "out")(ids), theirs(ids).logits,
                               atol=1e-4, rtol=0)
    # Not AutoTokenizer: by model_type it takes Qwen2's own splitting, whatever tokenizer.json says.
    text = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert (text("Wait, 12", add_special_tokens=False).input_ids
            == Chat(tmp_path / "out").text("Wait, 12"))


@pytest.mark.parametrize("kind, changes", [
    ("Qwen2Config", {}), ("Qwen2Config", {"tie_word_embeddings": True}),
    ("Qwen3Config", {"head_dim": 32}),
    ("LlamaConfig", {}), ("LlamaConfig", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}})])
def test_fresh_random_models_of_transformers(kind, changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind)(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=1, initializer_range=0.2, **changes)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    ours, ids = Transformer.load(tmp_path / "theirs"), torch.randint(200, (2, 50))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    (tmp_path / "ours").mkdir()
    ours.save(tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(back(ids).logits, theirs(ids).logits, atol=1e-6, rtol=0)


# ---- The hub --------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client needs, over one fixture; it notes what is asked for."""
    files, asked = {}, []

    def answer(self, body, kind="application/json", **headers):
        self.send_response(200 if body is not None else 404)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command != "HEAD" and body:
            self.wfile.write(body)

    def do_GET(self):
        self.asked.append(f"{self.command} {self.path}")
        sha = "a" * 40
        if self.path.startswith(("/api/models/someone/tiny/revision/v2",
                                 "/api/models/someone/tiny/tree/")):
            listing = [{"rfilename": name, "path": name, "type": "file", "size": len(body),
                        "oid": "0" * 40} for name, body in self.files.items()]
            whole = {"id": "someone/tiny", "sha": sha, "siblings": listing, "private": False}
            return self.answer(json.dumps(listing if "/tree/" in self.path else whole).encode())
        name = self.path.split("/")[-1].split("?")[0]
        body = self.files.get(name) if self.path.startswith("/someone/tiny/resolve/") else None
        self.answer(body, "application/octet-stream", ETag=f'"{abs(hash(name)):040x}"',
                    X_Repo_Commit=sha)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    Hub.files = {path.name: path.read_bytes() for path in (FIXTURES / "qwen3").iterdir()}
    Hub.files |= {"pytorch_model.bin": b"evil", "modeling_tiny.py": b"evil"}
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_fetched_once_and_then_works_offline(hub, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path),
                    "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def ask(name):
        return subprocess.run(
            [sys.executable, "sample.py", "hi", "--model", name, "--max-new-tokens", "3"],
            cwd=ROOT, env=environment, capture_output=True, text=True)
    first = ask("someone/tiny@v2")
    assert first.returncode == 0, first.stderr
    fetched = " ".join(Hub.asked)
    assert "model-00003-of-00003.safetensors" in fetched and "chat_template.jinja" in fetched
    assert ".bin" not in fetched and ".py" not in fetched
    missing = ask("someone/else")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: someone/else is no directory")
    assert len(missing.stderr.splitlines()) == 1
    hub.shutdown()
    hub.server_close()
    assert ask("someone/tiny@v2").stdout == first.stdout


def test_what_begins_like_a_path_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("out/student", "models/gone", str(tmp_path / "gone"),
                 "./a", "../a", "one", "a/b/c"):
        assert data.local(name) == name
    with pytest.raises(BadInput, match="config.json|tokenizer"):
        Chat("models/gone")
    assert read_config(BASE).model_type == "qwen2"
