"""The transformer against plain versions of itself, written again here in float64 loops."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from conftest import tiny_config, tiny_model

from model import BadModel, FusedLinearCrossEntropy, KVCache, Transformer, read_config, rotary


def plain_forward(state, config, ids, positions=None):
    """An independent Qwen2 in float64: one document (T,) of ids, loops over heads and tokens."""
    positions = positions or range(len(ids))
    w = {name: tensor.double() for name, tensor in state.items()}
    D, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def turn(x, position):
        out = x.clone()
        for i in range(D // 2):
            angle = torch.tensor(position * config.rope_theta ** (-2 * i / D), dtype=torch.float64)
            a, b = x[i].clone(), x[i + D // 2].clone()
            out[i] = a * angle.cos() - b * angle.sin()
            out[i + D // 2] = b * angle.cos() + a * angle.sin()
        return out

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (F.linear(h, w[p + f"self_attn.{n}_proj.weight"],
                            w[p + f"self_attn.{n}_proj.bias"]) for n in "qkv")
        rows = []
        for t in range(len(ids)):
            heads = []
            for head in range(config.num_attention_heads):
                mine = slice(head // groups * D, (head // groups + 1) * D)
                query = turn(q[t, head * D:(head + 1) * D], positions[t])
                scores = torch.stack([query @ turn(k[s, mine], positions[s])
                                      for s in range(t + 1)]) / D ** 0.5
                heads.append(scores.softmax(0) @ v[:t + 1, mine])
            rows.append(torch.cat(heads))
        x = x + F.linear(torch.stack(rows), w[p + "self_attn.o_proj.weight"])
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = F.silu(F.linear(h, w[p + "mlp.gate_proj.weight"]))
        x = x + F.linear(gate * F.linear(h, w[p + "mlp.up_proj.weight"]),
                         w[p + "mlp.down_proj.weight"])
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return F.linear(norm(x, w["model.norm.weight"]), head)


@pytest.mark.parametrize("tied", [True, False])
def test_forward_is_qwen2(tied):
    model = tiny_model(tie_word_embeddings=tied)
    ids = torch.randint(0, 64, (11,), generator=torch.Generator().manual_seed(1))
    expected = plain_forward(model.state_dict(), model.config, ids)
    torch.testing.assert_close(model(ids[None])[0].double(), expected, atol=1e-4, rtol=0)


def test_positions_are_the_callers():
    """Gaps between positions count; equal steps from another start would not show (rotary is
    relative)."""
    model, positions = tiny_model(), [0, 1, 5, 9, 10, 30]
    ids = torch.tensor([3, 1, 4, 1, 5, 9])
    expected = plain_forward(model.state_dict(), model.config, ids, positions)
    got = model(ids[None], positions=torch.tensor([positions]))[0]
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=0)


def test_angles_are_float32_under_autocast():
    """bf16 has no place for position 30,000: neighbours there would get the same angle."""
    with torch.autocast("cpu", torch.bfloat16):
        cos, sin = rotary(torch.tensor([[30000, 30001]]), tiny_config())
    assert cos.dtype == sin.dtype == torch.float32
    assert cos[0, 0, 0, 0].item() == pytest.approx(math.cos(30000), abs=1e-3)
    assert sin[0, 0, 1, 0].item() == pytest.approx(math.sin(30001), abs=1e-3)


def test_packed_documents_are_alone():
    """A packed row gives what its documents give alone: no document sees its neighbour."""
    model = tiny_model()
    docs = [torch.randint(0, 64, (1, n)) for n in (5, 1, 9)]
    packed = model(torch.cat(docs, 1), lengths=[5, 1, 9],
                   positions=torch.cat([torch.arange(n) for n in (5, 1, 9)])[None])
    alone = torch.cat([model(doc) for doc in docs], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_ragged_cache_is_the_whole_forward():
    """Prefill of rows of different lengths, then decoding them together, is the uncached
    forward."""
    model = tiny_model().eval()
    rows = [torch.randint(0, 64, (n,)).tolist() for n in (9, 4, 6)]
    cache = KVCache.empty(model.config, slots=3, length=16)
    with torch.no_grad():
        for slot, row in enumerate(rows):
            got = model(torch.tensor([row[:-3]]), cache=cache.rows(slot, slot + 1))[0, -1]
            torch.testing.assert_close(got, model(torch.tensor([row[:-3]]))[0, -1],
                                       atol=1e-5, rtol=0)
        for step in (-3, -2, -1):
            got = model(torch.tensor([[row[step]] for row in rows]), cache=cache)[:, 0]
            for b, row in enumerate(rows):
                end = len(row) + step + 1
                torch.testing.assert_close(got[b], model(torch.tensor([row[:end]]))[0, -1],
                                           atol=1e-5, rtol=0)
    assert cache.filled.tolist() == [9, 4, 6]


def test_cache_refuses_what_does_not_fit():
    model = tiny_model()
    with pytest.raises(IndexError, match="4 places"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=KVCache.empty(model.config, 1, 4))


def plain_loss(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("rows_in_chunk", [1, 3, 7, 100])
def test_fused_loss_and_gradients(rows_in_chunk):
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 8), torch.randn(23, 8)
    targets = torch.randint(0, 23, (10,))
    ours, plain = ([hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
                   for _ in range(2))
    loss = FusedLinearCrossEntropy.apply(*ours, targets, rows_in_chunk * 4 * 23)
    expected = plain_loss(*plain, targets)
    (loss * 0.3).backward()
    (expected * 0.3).backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=0)


def test_the_loss_never_holds_the_whole_logits():
    """The largest tensor made is a chunk of the supervised rows, forward and backward."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 2:
                    largest = max(largest, tensor.numel())
            return out

    hidden = torch.randn(500, 4, requires_grad=True)
    weight = torch.randn(300, 4, requires_grad=True)
    with Watch():
        FusedLinearCrossEntropy.apply(hidden, weight, torch.zeros(500, dtype=torch.long),
                                      7 * 4 * 300).backward()
    assert largest == 7 * 300


def test_loss_counts_only_the_supervised():
    """Through forward: -100 is neither in the sum nor in the count, and gets no gradient."""
    model = tiny_model()
    ids, targets = torch.randint(0, 64, (1, 8)), torch.randint(0, 64, (1, 8))
    targets[0, [0, 3, 7]] = -100
    loss, count = model(ids, targets=targets)
    expected = F.cross_entropy(model(ids)[0], targets[0], reduction="sum", ignore_index=-100)
    assert count == 5
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    plain = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_nothing_supervised_is_zero_and_not_nan():
    model = tiny_model()
    loss, count = model(torch.zeros(1, 4, dtype=torch.long), targets=torch.full((1, 4), -100))
    loss.backward()
    assert loss.item() == 0 and count == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_frozen_head_gets_no_gradient():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8)
    FusedLinearCrossEntropy.apply(hidden, weight, torch.tensor([0, 1, 2, 3])).backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0


def test_weight_gradient_is_summed_in_float32():
    """bf16 rows in many chunks: a bf16 sum of 2,000 small terms would stop growing."""
    hidden = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, requires_grad=True)
    FusedLinearCrossEntropy.apply(hidden, weight, torch.zeros(2000, dtype=torch.long), 8).backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-1000.0], [1000.0]]))


def test_save_and_load_are_the_same_model(tmp_path):
    model = tiny_model()
    model.save(tmp_path)
    again = Transformer.load(tmp_path)
    ids = torch.arange(6)[None]
    assert torch.equal(again(ids), model(ids))
    assert "lm_head.weight" not in again.state_dict()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "Qwen2ForCausalLM"]


@pytest.mark.parametrize("change, complaint", [
    ({"model_type": "gpt2"}, "gpt2"), ({"hidden_act": "relu"}, "relu"),
    ({"use_sliding_window": True}, "sliding"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope"),
    ({"rope_scaling": {"type": "yarn"}}, "rope"),
    ({"quantization_config": {"bits": 4}}, "quantization"),
    ({"intermediate_size": 9}, "of another shape model"),
    ({"num_hidden_layers": 3}, "missing model.layers.2"),
    ({"num_hidden_layers": 1}, "extra model.layers.1")])
def test_refusals_by_name(tmp_path, change, complaint):
    tiny_model().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(BadModel, match=complaint):
        Transformer.load(tmp_path)


def test_broken_files_are_refused(tmp_path):
    with pytest.raises(BadModel, match="no config.json"):
        Transformer.load(tmp_path)
    tiny_model().save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(BadModel, match="cannot be read"):
        Transformer.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadModel, match="holds no object"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadModel, match="no JSON"):
        read_config(tmp_path)


def test_config_names_a_missing_key(tmp_path):
    tiny_config_dict = {"model_type": "qwen2", "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(tiny_config_dict))
    with pytest.raises(BadModel, match="vocab_size"):
        read_config(tmp_path)
    assert tiny_config().head_dim == 8
    with pytest.raises(BadModel, match="model_type 'gpt2' is not known"):
        tiny_config(model_type="gpt2")
