"""The transformer compared with plain implementations in float64 loops."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from model import FusedLinearCrossEntropy, KVCache, rotary_embedding


def plain_forward(state, config, ids, positions=None):
    """Logits (T, V) of one document (T,) by an independent Qwen2: loops over heads and tokens."""
    positions = positions or range(len(ids))
    w = {name: tensor.double() for name, tensor in state.items()}
    D, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def rotate(x, position):
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
                shared = slice(head // groups * D, (head // groups + 1) * D)
                query = rotate(q[t, head * D:(head + 1) * D], positions[t])
                scores = torch.stack([query @ rotate(k[s, shared], positions[s])
                                      for s in range(t + 1)]) / D ** 0.5
                heads.append(scores.softmax(0) @ v[:t + 1, shared])
            rows.append(torch.cat(heads))
        x = x + F.linear(torch.stack(rows), w[p + "self_attn.o_proj.weight"])
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = F.silu(F.linear(h, w[p + "mlp.gate_proj.weight"]))
        x = x + F.linear(gate * F.linear(h, w[p + "mlp.up_proj.weight"]),
                         w[p + "mlp.down_proj.weight"])
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return F.linear(norm(x, w["model.norm.weight"]), head)


@pytest.mark.parametrize("tied", [True, False])
def test_forward_computes_qwen2(tied):
    model = tiny_model(tie_word_embeddings=tied)
    ids = torch.randint(0, 64, (11,), generator=torch.Generator().manual_seed(1))
    expected = plain_forward(model.state_dict(), model.config, ids)
    torch.testing.assert_close(model(ids[None])[0].double(), expected, atol=1e-4, rtol=0)


def test_forward_uses_the_given_positions():
    """Positions with gaps: equal steps from another start would not show, RoPE is relative."""
    model, positions = tiny_model(), [0, 1, 5, 9, 10, 30]
    ids = torch.tensor([3, 1, 4, 1, 5, 9])
    expected = plain_forward(model.state_dict(), model.config, ids, positions)
    got = model(ids[None], positions=torch.tensor([positions]))[0]
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=0)


def test_rotary_embedding_is_float32_under_autocast():
    """bf16 rounds positions 30,000 and 30,001 to the same number."""
    with torch.autocast("cpu", torch.bfloat16):
        cos, sin = rotary_embedding(torch.tensor([[30000, 30001]]), tiny_config())
    assert cos.dtype == sin.dtype == torch.float32
    assert cos[0, 0, 0, 0].item() == pytest.approx(math.cos(30000), abs=1e-3)
    assert sin[0, 0, 1, 0].item() == pytest.approx(math.sin(30001), abs=1e-3)


def test_packed_documents_do_not_see_each_other():
    """A packed row has the logits of its documents one by one."""
    model = tiny_model()
    docs = [torch.randint(0, 64, (1, n)) for n in (5, 1, 9)]
    packed = model(torch.cat(docs, 1), lengths=[5, 1, 9],
                   positions=torch.cat([torch.arange(n) for n in (5, 1, 9)])[None])
    alone = torch.cat([model(doc) for doc in docs], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_cached_decoding_of_ragged_rows_equals_the_full_forward():
    """Prefill of rows of different lengths, then decoding them as one batch."""
    model = tiny_model().eval()
    rows = [torch.randint(0, 64, (n,)).tolist() for n in (9, 4, 6)]
    cache = KVCache.allocate(model.config, max_num_seqs=3, max_seq_len=16)
    with torch.no_grad():
        for slot, row in enumerate(rows):
            got = model(torch.tensor([row[:-3]]), cache=cache.slots(slot, slot + 1))[0, -1]
            torch.testing.assert_close(got, model(torch.tensor([row[:-3]]))[0, -1],
                                       atol=1e-5, rtol=0)
        for step in (-3, -2, -1):
            got = model(torch.tensor([[row[step]] for row in rows]), cache=cache)[:, 0]
            for b, row in enumerate(rows):
                end = len(row) + step + 1
                torch.testing.assert_close(got[b], model(torch.tensor([row[:end]]))[0, -1],
                                           atol=1e-5, rtol=0)
    assert cache.lengths.tolist() == [9, 4, 6]


def test_a_copied_slot_continues_like_the_original():
    model = tiny_model().eval()
    cache = KVCache.allocate(model.config, max_num_seqs=2, max_seq_len=8)
    with torch.no_grad():
        model(torch.randint(0, 64, (1, 5)), cache=cache.slots(1, 2))
        cache.copy(cache.slots(1, 2), 0)
        assert cache.lengths.tolist() == [5, 5]
        logits = model(torch.tensor([[7], [7]]), cache=cache)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=0)
    assert all(torch.equal(k[0], k[1]) and torch.equal(v[0], v[1]) for k, v in cache.layers)


def test_a_full_cache_is_an_error():
    model = tiny_model()
    with pytest.raises(ValueError, match="4 positions, 5 are needed"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=KVCache.allocate(model.config, 1, 4))


def test_gradient_checkpointing_changes_no_gradient():
    model, ids = tiny_model(), torch.randint(0, 64, (1, 12))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        loss, _ = model(ids, labels=ids)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def plain_loss(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("rows_in_chunk", [1, 3, 7, 100])
def test_fused_loss_and_gradients_equal_those_of_cross_entropy(rows_in_chunk):
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 8), torch.randn(23, 8)
    labels = torch.randint(0, 23, (10,))
    ours, plain = ([hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
                   for _ in range(2))
    loss = FusedLinearCrossEntropy.apply(*ours, labels, rows_in_chunk * 4 * 23)
    expected = plain_loss(*plain, labels)
    (loss * 0.3).backward()
    (expected * 0.3).backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=0)


def test_the_loss_allocates_one_chunk_of_logits():
    """The largest tensor of forward and backward has the size of a chunk of rows."""
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


def test_the_loss_counts_only_supervised_tokens():
    """Label -100 adds nothing to the sum, the count and the gradients."""
    model = tiny_model()
    ids, labels = torch.randint(0, 64, (1, 8)), torch.randint(0, 64, (1, 8))
    labels[0, [0, 3, 7]] = -100
    loss, count = model(ids, labels=labels)
    expected = F.cross_entropy(model(ids)[0], labels[0], reduction="sum", ignore_index=-100)
    assert count == 5
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    plain = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_without_supervised_tokens_the_loss_is_zero():
    model = tiny_model()
    loss, count = model(torch.zeros(1, 4, dtype=torch.long), labels=torch.full((1, 4), -100))
    loss.backward()
    assert loss.item() == 0 and count == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_a_frozen_output_weight_gets_no_gradient():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8)
    FusedLinearCrossEntropy.apply(hidden, weight, torch.tensor([0, 1, 2, 3])).backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0


def test_the_weight_gradient_is_summed_in_float32():
    """bf16 rows in many chunks: a bf16 sum of 2,000 small terms stops growing."""
    hidden = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, requires_grad=True)
    FusedLinearCrossEntropy.apply(hidden, weight, torch.zeros(2000, dtype=torch.long), 8).backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-1000.0], [1000.0]]))


def test_backward_twice_without_a_new_forward_is_an_error():
    """Backward scales the stored gradient in place, so a second one must not return it again."""
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = FusedLinearCrossEntropy.apply(hidden, weight, torch.tensor([0, 1, 2, 3]))
    (loss * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss * 2).backward()


def test_init_weights_depends_only_on_the_seed():
    a, b, c = (tiny_model().init_weights(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])
    assert a["model.layers.0.self_attn.q_proj.weight"].std().item() == pytest.approx(0.2, rel=0.1)
    assert a["model.layers.0.mlp.down_proj.weight"].std().item() == pytest.approx(0.1, rel=0.1)
    assert (a["model.norm.weight"] == 1).all()
    assert (a["model.layers.0.self_attn.q_proj.bias"] == 0).all()
