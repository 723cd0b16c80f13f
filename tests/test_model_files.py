"""Hugging Face directories: each family against transformers, what is refused, loading, saving."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import BASE, FIXTURES, ROOT, tiny_config, tiny_model

from data import Chat
from model import KVCache, Transformer, read_config
from sample import Sampler

FAMILIES = sorted(path.name for path in FIXTURES.iterdir())
each = pytest.mark.parametrize("family", FAMILIES)


def golden(family):
    """What transformers computed: see tests/make_fixtures.py."""
    return safetensors.torch.load_file(FIXTURES / family / "golden.safetensors")


@pytest.fixture
def copied(tmp_path):
    """copied("llama") is the directory of a copy of that fixture, which a test may change."""
    return lambda family: Path(shutil.copytree(FIXTURES / family, tmp_path / family))


def change_config(directory, **changes):
    """Set keys of config.json; a key set to `...` is removed."""
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(
        {key: value for key, value in config.items() if value is not ...}))


def edit_weights(directory, edit):
    state = safetensors.torch.load_file(directory / "model.safetensors")
    edit(state)
    safetensors.torch.save_file(state, directory / "model.safetensors")


# ---- The same numbers as transformers -------------------------------------------------------


def test_there_is_a_fixture_of_each_family():
    assert FAMILIES == ["llama", "qwen2", "qwen3", "r1"]


@each
def test_logits_gradients_and_greedy_tokens_equal_those_of_transformers(family):
    want, model = golden(family), Transformer.load(FIXTURES / family)
    torch.testing.assert_close(model(want["ids"]), want["logits"], atol=1e-4, rtol=0)
    labels = torch.nn.functional.pad(want["ids"][:, 1:], (0, 1), value=-100)
    model(want["ids"], labels=labels)[0].backward()
    for name, p in model.named_parameters():
        scale = want[f"grad.{name}"].abs().max().item()
        torch.testing.assert_close(p.grad, want[f"grad.{name}"], atol=1e-5 * scale, rtol=1e-4)
    sequence, = Sampler(model, 1, 72).generate([want["ids"][0, :8].tolist()], max_new_tokens=64)
    assert sequence.tokens == want["greedy"].tolist()


@each
def test_cached_packed_and_batched_forward_equal_the_plain_one(family):
    model, ids = Transformer.load(FIXTURES / family), golden(family)["ids"]
    close = {"atol": 1e-5, "rtol": 1e-5}
    with torch.no_grad():
        plain = model(ids)
        cache = KVCache.allocate(model.config, 2, 40)
        steps = [model(ids[:, :30], cache=cache.slots(1, 2)), *(
            model(ids[:, i:i + 1].repeat(2, 1), cache=cache)[1:] for i in range(30, 40))]
        torch.testing.assert_close(torch.cat(steps, 1), plain, **close)
        torch.testing.assert_close(model(ids.repeat(3, 1))[2:], plain, **close)
        packed = model(torch.cat((ids[:, :25], ids), 1), lengths=[25, 40],
                       positions=torch.cat((torch.arange(25), torch.arange(40)))[None])
        torch.testing.assert_close(packed[:, 25:], plain, **close)


# ---- Loading --------------------------------------------------------------------------------


@each
def test_old_and_new_keys_of_config_json_give_the_same_model(copied, family):
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


def test_a_tied_model_may_store_a_copy_of_its_embedding(copied):
    directory = copied("qwen2")
    edit_weights(directory, lambda state: state.update(
        {"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    model = Transformer.load(directory)
    assert "lm_head.weight" not in model.state_dict() and model.config.tie_word_embeddings


def test_a_separate_head_is_kept_although_the_config_says_tied(copied, tmp_path):
    directory = copied("qwen2")
    edit_weights(directory, lambda state: state.update(
        {"lm_head.weight": state["model.embed_tokens.weight"].flip(0).contiguous()}))
    model, ids = Transformer.load(directory), golden("qwen2")["ids"]
    torch.testing.assert_close(model(ids).flip(2), golden("qwen2")["logits"], atol=1e-4, rtol=0)
    model.save(tmp_path / "saved")
    assert torch.equal(Transformer.load(tmp_path / "saved")(ids), model(ids))
    assert not read_config(tmp_path / "saved").tie_word_embeddings


@each
def test_weights_have_the_dtype_asked_for(family):
    for dtype in (torch.float32, torch.bfloat16):
        assert {p.dtype for p in Transformer.load(FIXTURES / family, dtype).parameters()} == {dtype}


def test_float64_weights_are_loaded(copied):
    directory = copied("qwen2")
    edit_weights(directory, lambda state: state.update(
        {name: tensor.double() for name, tensor in state.items()}))
    ids = golden("qwen2")["ids"]
    assert torch.equal(Transformer.load(directory)(ids), Transformer.load(FIXTURES / "qwen2")(ids))


def test_stored_rotary_frequencies_are_ignored(copied):
    """Checkpoints of old versions of transformers contain this buffer."""
    directory = copied("qwen2")
    edit_weights(directory, lambda state: state.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    Transformer.load(directory)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_no_second_copy(tmp_path, dtype):
    """The files are memory-mapped and copied tensor by tensor, so anonymous memory grows by at most
    1.15 times the size of the model."""
    big = tiny_model(vocab_size=30_000, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    big.save(tmp_path, torch.bfloat16)
    size = sum(p.numel() for p in big.parameters()) * getattr(torch, dtype).itemsize
    code = f"""
import sys, threading, time, torch
from model import Transformer
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status")
                if l.startswith("RssAnon")) * 1024
Transformer.load({str(FIXTURES / "qwen2")!r})       # memory that the libraries take once
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


# ---- What is refused ------------------------------------------------------------------------


@pytest.mark.parametrize("family, change, complaint", [
    ("qwen2", {"model_type": "mistral"}, "model_type 'mistral' is not supported"),
    ("qwen2", {"model_type": "gpt2"}, "model_type 'gpt2'"),
    ("qwen2", {"model_type": ...}, "model_type None"),
    ("qwen3", {"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"),
    ("qwen2", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
    ("qwen2", {"rope_parameters": ..., "rope_scaling": {"type": "yarn"}}, "rope_type 'yarn'"),
    ("llama", {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 4.0}},
     "rope_type 'linear'"),
    ("llama", {"rope_parameters": 7}, "config.json cannot be used"),
    ("llama", {"rope_parameters": {"rope_type": "llama3"}}, ": factor is missing"),
    ("qwen2", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ("qwen2", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window True is not supported"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention True"),
    ("qwen2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config .*gptq"),
    ("llama", {"attention_bias": True}, "attention_bias True is not supported"),
    ("llama", {"mlp_bias": True}, "mlp_bias True is not supported"),
    ("qwen2", {"tie_word_embeddings": "false"}, "tie_word_embeddings 'false'"),
    ("qwen2", {"vocab_size": ...}, "vocab_size is missing"),
    ("qwen2", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
    ("qwen2", {"hidden_size": "32"}, "hidden_size .* not a valid int: '32'"),
    ("qwen2", {"hidden_size": 32.0}, "hidden_size .* not a valid int: 32.0"),
    ("qwen2", {"hidden_size": True}, "hidden_size .* not a valid int: True"),
    ("qwen2", {"rms_norm_eps": -1e-6}, "rms_norm_eps .* not a valid float: -1e-06"),
    ("qwen2", {"num_hidden_layers": 0}, "num_hidden_layers .* not a valid int: 0"),
    ("qwen2", {"num_hidden_layers": 10**9}, "num_hidden_layers .* not a valid int"),
    ("qwen2", {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
    ("qwen3", {"head_dim": 16.0}, "head_dim is 16.0"),
    ("qwen3", {"head_dim": 7}, "head_dim is 7")])
def test_a_config_is_refused_by_name_before_any_weight_is_read(copied, family, change, complaint):
    directory = copied(family)
    change_config(directory, **change)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ValueError, match=complaint):
        Transformer.load(directory)


def test_a_broken_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        Transformer.load(tmp_path)
    for text in ("[]", "{", "[" * 100_000, "\xff", '{"rope_scaling": [1]}'):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="config.json cannot be used: ."):
            read_config(tmp_path)


@pytest.mark.parametrize("edit, complaint", [
    (lambda state: (state.pop("model.norm.weight"), state.pop("model.layers.1.mlp.up_proj.weight")),
     'Missing key.*"model.layers.1.mlp.up_proj.weight", "model.norm.weight"'),
    (lambda state: state.update({"model.extra": torch.ones(1)}), 'Unexpected key.*"model.extra"'),
    (lambda state: state.update({"model.norm.weight": torch.ones(31)}),
     "size mismatch for model.norm.weight"),
    (lambda state: state.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
     "quantised weights: model.norm.weight"),
    (lambda state: state.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}),
     "quantised weights: model.norm.weight")])
def test_tensors_that_do_not_fit_are_named(copied, edit, complaint):
    directory = copied("qwen2")
    edit_weights(directory, edit)
    with pytest.raises(ValueError, match=complaint) as refusal:
        Transformer.load(directory)
    assert "\n" not in str(refusal.value) and str(directory) in str(refusal.value)


@pytest.mark.parametrize("change, complaint", [
    ({"intermediate_size": 9}, "size mismatch for model"),
    ({"num_hidden_layers": 3}, 'Missing key.*"model.layers.2'),
    ({"num_hidden_layers": 1}, 'Unexpected key.*"model.layers.1')])
def test_sizes_that_do_not_fit_the_weights_are_named(copied, change, complaint):
    directory = copied("qwen2")
    change_config(directory, **change, layer_types=...)
    with pytest.raises(ValueError, match=complaint):
        Transformer.load(directory)


def rename_shard(to):
    def edit(directory):
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.norm.weight"] = to
        path.write_text(json.dumps(index))
    return edit


def write_weights(content):
    return lambda directory: (directory / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize("family, edit, complaint", [
    ("qwen2", lambda d: write_weights((d / "model.safetensors").read_bytes()[:-9])(d),
     "model.safetensors cannot be read"),
    ("qwen2", write_weights(b"\xff" * 999), "model.safetensors cannot be read"),
    ("qwen2", write_weights(b""), "model.safetensors cannot be read"),
    ("qwen2", write_weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
     "Git LFS pointer"),
    ("qwen2", lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
     "cannot be read as safetensors: .*No such file"),
    ("qwen2", lambda d: (d / "model.safetensors").unlink(), "No such file"),
    ("qwen3", rename_shard("../model-00001-of-00003.safetensors"), "not a plain file name"),
    ("qwen3", rename_shard("/etc/passwd"), "not a plain file name"),
    ("qwen3", rename_shard("model.bin"), "model.bin cannot be read"),
    ("qwen3", rename_shard(7), "index.json cannot be read"),
    ("qwen3", rename_shard(".."), "cannot be read"),
    ("qwen3", rename_shard("\0.safetensors"), "cannot be read"),
    ("qwen3", rename_shard("gone.safetensors"), "No such file"),
    ("qwen3", lambda d: (d / "model-00002-of-00003.safetensors").unlink(), "No such file"),
    ("qwen3", lambda d: (d / "model.safetensors.index.json").write_text("[]"),
     "index.json cannot be read"),
    ("qwen3", lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
     "Missing key")])
def test_broken_weights_are_refused(copied, family, edit, complaint):
    directory = copied(family)
    for weights in FIXTURES.glob("qwen3/*.safetensors"):        # targets of paths that lead outside
        shutil.copy(weights, directory.parent)
    edit(directory)
    with pytest.raises(ValueError, match=complaint):
        Transformer.load(directory)


def test_a_pickle_is_never_opened(copied):
    """A shard that the index calls model.bin, and that would be executed as a pickle."""
    directory = copied("qwen3")
    torch.save({"model.norm.weight": torch.ones(32)}, directory / "model.bin")
    rename_shard("model.bin")(directory)
    with pytest.raises(ValueError, match="model.bin cannot be read as safetensors"):
        Transformer.load(directory)


# ---- Saving ---------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same_model(tmp_path):
    model = tiny_model()
    model.save(tmp_path)
    again = Transformer.load(tmp_path)
    ids = torch.arange(6)[None]
    assert torch.equal(again(ids), model(ids))
    assert "lm_head.weight" not in again.state_dict()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "Qwen2ForCausalLM"]


@each
def test_shards_and_their_index_are_the_same_model(family, tmp_path):
    model, ids = Transformer.load(FIXTURES / family), golden(family)["ids"]
    model.save(tmp_path, shard_bytes=60_000)
    assert len([*tmp_path.glob("model-*-of-*.safetensors")]) > 1
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 64_000
    assert torch.equal(Transformer.load(tmp_path)(ids), model(ids))


def test_the_files_of_an_earlier_model_are_removed(tmp_path):
    """Whichever layout comes second: a reader must not find the first one's weights."""
    (tmp_path / "model-old.safetensors").write_bytes(b"not ours")
    for seed, shard_bytes in enumerate((5e9, 20_000, 30_000, 5e9)):
        model = tiny_model(seed)
        model.save(tmp_path, shard_bytes=shard_bytes)
        loaded = Transformer.load(tmp_path).state_dict()
        assert all(torch.equal(p, loaded[name]) for name, p in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "model-old.safetensors", "model.safetensors"]


def test_the_directory_may_be_a_string_and_is_made(tmp_path):
    model = tiny_model()
    model.save(f"{tmp_path}/new/model")
    assert torch.equal(Transformer.load(f"{tmp_path}/new/model")(torch.arange(6)[None]),
                       model(torch.arange(6)[None]))


def test_a_model_is_saved_in_its_own_dtype_or_another(tmp_path):
    for dtype, name in ((None, "float32"), (torch.bfloat16, "bfloat16")):
        tiny_model().save(tmp_path, dtype)
        state = safetensors.torch.load_file(tmp_path / "model.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {getattr(torch, name)}
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == name


def test_a_rank_without_a_directory_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save(None)
    assert not [*tmp_path.iterdir()]


def test_three_ranks_load_and_save_their_shards(tmp_path):
    """Three ranks cannot share the rows evenly, and the last one has none of the 4 of k_proj.
    Rank 0 holds one file at a time, the others one tensor."""
    tiny_model(num_key_value_heads=1, head_dim=4).save(tmp_path / "source")
    (tmp_path / "program.py").write_text("""
import os, sys, torch, weakref
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from model import Transformer
torch.distributed.init_process_group("gloo")
mesh = torch.distributed.init_device_mesh("cpu", (3,))
model = Transformer.load("source", prepare=lambda model: fully_shard(model, mesh=mesh))
rows = sum(p.to_local().shape[0] for p in model.parameters())
assert rows < 0.5 * sum(p.shape[0] for p in model.parameters()), rows
rank, gather, gathered, most = torch.distributed.get_rank(), DTensor.full_tensor, [], []
def watched(tensor):
    whole = gather(tensor)
    gathered.append(weakref.ref(whole))
    most.append(sum(t.nbytes for ref in gathered if (t := ref()) is not None))
    return whole
DTensor.full_tensor = watched
model.save("saved" if rank == 0 else None)
assert max(most) > 50_000 if rank == 0 else max(most) < 9_000, most
most.clear()
model.save("parts" if rank == 0 else None, shard_bytes=10_000)
assert max(most) <= 10_000 if rank == 0 else max(most) < 9_000, most
torch.distributed.barrier()
os._exit(0)         # gloo's threads sometimes abort while the interpreter shuts down
""")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", "3", "program.py"], cwd=tmp_path, check=True,
                   env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    source, saved = (safetensors.torch.load_file(tmp_path / name / "model.safetensors")
                     for name in ("source", "saved"))
    assert source.keys() == saved.keys()
    assert all(torch.equal(source[name], saved[name]) for name in source)
    parts = Transformer.load(tmp_path / "parts").state_dict()
    assert all(torch.equal(source[name], parts[name]) for name in source)


def test_keys_of_config_json_that_are_not_used_are_kept(tmp_path):
    config = read_config(BASE)
    assert config.extra["eos_token_id"] == 1346 and config.model_type == "qwen2"
    raw = json.loads((BASE / "config.json").read_text())
    assert raw.items() <= config.to_dict().items()
    assert tiny_config().head_dim == 8


@each
def test_five_steps_on_each_family_and_back(family, run, tmp_path):
    out = tmp_path / "out"
    code, _, error = run("train", "--model", FIXTURES / family, "--n", 8, "--batch-size", 4,
                         "--max-steps", 5, "--epochs", 3, "--out", out, "--save-dtype", "bfloat16")
    assert code == 0, error
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert ((out / "tokenizer.json").read_bytes()
            == (FIXTURES / family / "tokenizer.json").read_bytes())
    assert Chat(out).settings == Chat(FIXTURES / family).settings
    assert Chat(out).stop_ids == Chat(FIXTURES / family).stop_ids
    before = Transformer.load(FIXTURES / family).state_dict()
    after = Transformer.load(out).state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    code, printed, _ = run("sample", "1+1?", "--model", out, "--max-new-tokens", 5)
    assert code == 0 and printed.startswith("[")


# ---- With transformers installed ------------------------------------------------------------


@each
def test_transformers_loads_what_train_saved(family, run, tmp_path):
    transformers = pytest.importorskip("transformers")
    code, _, _ = run("train", "--model", FIXTURES / family, "--n", 8, "--max-steps", 5,
                     "--epochs", 5, "--batch-size", 4, "--out", tmp_path / "out")
    assert code == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out",
                                                               dtype=torch.float32)
    ids = golden(family)["ids"]
    torch.testing.assert_close(Transformer.load(tmp_path / "out")(ids), theirs(ids).logits,
                               atol=1e-4, rtol=0)
    # AutoTokenizer would replace the pre-tokenizer of tokenizer.json by that of the model_type.
    text = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert (text("Wait, 12", add_special_tokens=False).input_ids
            == Chat(tmp_path / "out").encode("Wait, 12"))


@pytest.mark.parametrize("kind, changes", [
    ("Qwen2Config", {}), ("Qwen2Config", {"tie_word_embeddings": True}),
    ("Qwen3Config", {"head_dim": 32}),
    ("LlamaConfig", {}), ("LlamaConfig", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}})])
def test_random_models_of_transformers_and_back(kind, changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind)(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=1, initializer_range=0.2, **changes)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    ours, ids = Transformer.load(tmp_path / "theirs"), torch.randint(200, (2, 50))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    ours.save(tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(back(ids).logits, theirs(ids).logits, atol=1e-6, rtol=0)
