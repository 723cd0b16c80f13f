"""The sampler against decoding one sequence at a time without a cache; controllers; streaming."""
import random
import sys
from collections import deque

import pytest
import torch
from conftest import BASE, tiny_model

import sample
from model import Config, Transformer
from recipe import countdown
from sample import Sampler, Sequence, probabilities, stream


def prompts(n=9):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (1 + i * 5 % 7,), generator=generator).tolist() for i in range(n)]


def model_without_layers():
    """A model in which the next token depends on the last one only."""
    model = tiny_model()
    model.model.layers = torch.nn.ModuleList()
    return model


def greedy(model, prompt, n):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt):]


def record_batches(model):
    """A list to which each forward pass appends the shape of its ids, (B, T)."""
    shapes = []
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    return shapes


def num_tokens(shapes):
    return sum(B * T for B, T in shapes)


# ---- Batching -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_seqs", [1, 3, 16])
def test_each_prompt_gives_what_it_gives_alone(max_num_seqs):
    model = tiny_model()
    sequences = list(Sampler(model, max_num_seqs, 32).generate(prompts(), max_new_tokens=10))
    assert sorted(seq.index for seq in sequences) == list(range(9))
    for seq in sequences:
        assert seq.tokens == greedy(model, seq.prompt, 10)
        assert seq.finish_reason == "max_new_tokens" and seq.forced == [False] * 10


def test_as_many_slots_as_4_gb_of_cache_hold():
    def slots(layers, max_seq_len):
        with torch.device("meta"):
            config = Config(10, 9 * 64, 10, layers, 9, 3, "llama", max_position_embeddings=10**6)
            return Sampler(Transformer(config), max_seq_len=max_seq_len).max_num_seqs
    assert slots(30, 768) == 4 * 10**9 // (30 * 2 * 3 * 64 * 768 * 4) == 113
    assert slots(30, 10**6) == 1
    assert slots(1, 768) == 256


def test_the_base_gives_the_same_tokens_in_any_batch(chat):
    """float32, greedy, with real weights and questions of different lengths: identical tokens."""
    model = Transformer.load(BASE)
    asked = [chat.prompt(row["question"] * (1 + i % 3))
             for i, row in enumerate(countdown.questions("test", 12, 0))]

    def generate(max_num_seqs, prompts):
        return {tuple(seq.prompt): seq.tokens for seq in Sampler(model, max_num_seqs, 200).generate(
            prompts, stop_ids=chat.stop_ids, max_new_tokens=60)}
    alone = {prompt: tokens for one in asked for prompt, tokens in generate(1, [one]).items()}
    assert generate(64, asked) == generate(5, asked[::-1]) == alone and len(alone) == 12


def test_stop_and_length():
    """A stop token ends a sequence and frees its slot; a full slot ends it too."""
    model = tiny_model()
    stop = greedy(model, prompts()[0], 3)[2]
    sequences = list(Sampler(model, 2, 12).generate(prompts(), stop_ids={stop}))
    for seq in sequences:
        full = greedy(model, seq.prompt, 12 - len(seq.prompt))
        if stop in full:
            assert seq.tokens == full[:full.index(stop) + 1] and seq.finish_reason == "stop"
        else:
            assert seq.tokens == full and seq.finish_reason == "length"
    assert {"stop", "length"} == {seq.finish_reason for seq in sequences}


def test_a_free_slot_takes_the_next_prompt_at_once():
    """One sequence of nine tokens and four of three in two slots: the second slot serves three of
    the four while the first is busy, and is idle only in the step that prefills."""
    sampler, busy = Sampler(tiny_model(), 2, 12), []
    decode = sampler.decode
    sampler.decode = lambda running: busy.append(len(running)) or decode(running)

    def controller(seq, token):
        last = len(seq.tokens) == (8, 2, 2, 2, 2)[seq.index]
        return [63] if last else [min(token, 62)]

    sequences = list(sampler.generate([[1, 2]] * 5, controller, stop_ids={63}))
    assert [seq.index for seq in sequences] == [1, 2, 0, 3, 4]
    assert busy == [2, 2, 1, 2, 2, 1, 2, 2, 1, 1]


def test_one_prefill_is_limited_in_its_tokens(monkeypatch):
    """At most MAX_PREFILL padded tokens, but always one prompt; the tokens stay the same."""
    model = tiny_model()
    expected = {seq.index: seq.tokens for seq in
                Sampler(model, 16, 32).generate(prompts(), max_new_tokens=5)}
    monkeypatch.setattr(sample, "MAX_PREFILL", 14)
    shapes = record_batches(model)
    for some in (prompts(), [list(range(1, 21))] * 3):
        found = {seq.index: seq.tokens for seq in
                 Sampler(model, 16, 32).generate(some, max_new_tokens=5)}
        assert len(found) == len(some) and (some != prompts() or found == expected)
    prefills = [(B, T) for B, T in shapes if T > 1]
    assert all(B * T <= 14 or B == 1 for B, T in prefills) and max(prefills)[0] == 2


@pytest.mark.parametrize("prompt", [[], [1] * 8, [1] * 99])
def test_a_prompt_that_does_not_fit_is_refused_before_any_work(prompt):
    model = tiny_model()
    shapes = record_batches(model)
    with pytest.raises(ValueError, match=f"{len(prompt)} tokens does not fit: 1 to 7"):
        next(Sampler(model, 2, 8).generate([[1], prompt]))
    assert not shapes


def test_no_sequence_is_longer_than_the_model_has_positions():
    sampler = Sampler(tiny_model(max_position_embeddings=16), 2, 99)
    seq, = sampler.generate([[1, 2, 3]])
    assert sampler.max_seq_len == 16 == len(seq.prompt + seq.tokens)
    assert seq.finish_reason == "length" and sampler.cache.layers[0][0].shape[2] == 16


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_weights_on_the_cpu_change_their_layout_only(tied):
    model, ids = tiny_model(tie_word_embeddings=tied), torch.tensor([[1, 2, 3]])
    before, logits = {name: p.clone() for name, p in model.named_parameters()}, model(ids)
    for _ in range(2):                                  # a model can have several samplers
        sampler = Sampler(model, 2, 8)
        torch.testing.assert_close(model(ids), logits)
        hidden = model.hidden_states(ids, torch.arange(3)[None], lengths=[3])
        torch.testing.assert_close(sampler.lm_head(hidden), logits)
    for name, p in model.named_parameters():
        assert p.is_mkldnn == name.endswith("proj.weight"), name
        assert torch.equal(p.to_dense() if p.is_mkldnn else p, before[name])
    assert sampler.lm_head.weight.is_mkldnn


def test_bf16_weights_are_packed_only_where_onednn_supports_bf16(monkeypatch):
    packed = []
    monkeypatch.setattr(Sampler, "pack_weights", lambda sampler: packed.append(sampler))
    for supported in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda s=supported: s)
        sampler = Sampler(tiny_model().bfloat16(), 2, 8)
    assert packed == [sampler]


# ---- Controllers ----------------------------------------------------------------------------


def test_forced_tokens_are_recorded_and_the_model_reads_them():
    """A controller turns every third sampled token into 1, 2, 3."""
    model = tiny_model()

    def controller(seq, token):
        seq.state = (seq.state or 0) + 1
        return [1, 2, 3] if seq.state % 3 == 0 else [token]

    for seq in Sampler(model, 4, 40).generate(prompts(), controller, max_new_tokens=15):
        assert seq.forced == [False, False, True, True, True] * 3
        assert [t for t, f in zip(seq.tokens, seq.forced, strict=True) if f] == [1, 2, 3] * 3
        for i, forced in enumerate(seq.forced):
            if not forced:
                assert seq.tokens[i] == greedy(model, seq.prompt + seq.tokens[:i], 1)[0]


def test_a_forced_token_costs_one_decode_step():
    """No second prefill: the model computes the prompt and all tokens but the last once."""
    model = tiny_model()
    shapes = record_batches(model)
    list(Sampler(model, 1, 40).generate([[1, 2, 3]], lambda seq, token: [token, 7, 8],
                                        max_new_tokens=12))
    assert shapes == [(1, 3)] + [(1, 1)] * 11


def test_a_replaced_first_token_counts_as_forced():
    assert next(Sampler(tiny_model(), 1, 9).generate(
        [[1]], lambda seq, token: [(token + 1) % 64], max_new_tokens=3)).forced == [True] * 3


def test_banned_tokens_are_not_drawn():
    model = tiny_model()
    first, drawn = greedy(model, [5], 1)[0], []

    def controller(seq, token):
        drawn.append(token)
        seq.banned = {token}
        return [token]

    list(Sampler(model, 2, 40).generate([[5]], controller, max_new_tokens=20))
    assert drawn[0] == first and len(drawn) == 20
    assert all(a != b for a, b in zip(drawn, drawn[1:], strict=False))


def test_a_ban_holds_until_the_next_draw():
    """Forced tokens that come before it do not lift it."""
    seq = Sequence(0, [1], banned={5}, queue=deque([6]))
    seq.append_token(9)
    assert seq.tokens == [6] and seq.banned == {5}
    seq.append_token(7)
    assert seq.tokens == [6, 7] and seq.banned == set()


def test_after_a_rollback_the_removed_tokens_have_no_effect():
    """Twice per sequence the last three tokens are replaced by two others."""
    model, log = tiny_model(), []

    def controller(seq, token):
        if len(seq.tokens) == 6 and log.count(seq.index) < 2:
            log.append(seq.index)
            seq.rollback(3)
            return [1, 2]
        return [token]

    for seq in Sampler(model, 2, 40).generate(prompts()[:2], controller, max_new_tokens=12):
        assert len(seq.tokens) == len(seq.forced) == 12
        for i, forced in enumerate(seq.forced):
            if not forced:
                assert seq.tokens[i] == greedy(model, seq.prompt + seq.tokens[:i], 1)[0]
        assert seq.tokens[3:5] == [1, 2] and seq.forced.count(True) == 2
    assert sorted(log) == [0, 0, 1, 1]


def test_a_token_behind_a_rollback_counts_as_forced_even_if_it_was_drawn():
    seq = Sequence(0, [1], tokens=[5, 6], forced=[False, False])

    def controller(seq, token):
        seq.rollback(1)
        return [token]
    seq.append_token(7, controller)
    assert seq.tokens == [5, 7] and seq.forced == [False, True]


def test_a_sequence_that_repeats_itself_is_stopped():
    """A model without layers ends up in a cycle: in a cycle of c tokens, each run of 20 tokens
    occurs again after c tokens."""
    sampler = Sampler(model_without_layers(), 2, 400)
    seq, = sampler.generate([[5]], max_new_tokens=300)
    assert seq.finish_reason == "max_new_tokens"
    tokens = seq.tokens
    cycle = next(c for c in range(1, 65) if tokens[100:200] == tokens[100 + c:200 + c])
    start = next(i for i in range(300) if tokens[i:200] == tokens[i + cycle:200 + cycle])
    for times in (2, 4):
        seq, = sampler.generate([[5]], max_new_tokens=300, repeats=times)
        assert seq.finish_reason == "repetition"
        assert len(seq.tokens) == start + 20 + (times - 1) * cycle


# ---- Draws and samples ----------------------------------------------------------------------


def test_draws_depend_on_seed_prompt_and_sample_only():
    """They do not depend on the number of slots, the order of the prompts, or other prompts."""
    model = tiny_model()

    def draw(max_num_seqs, seed=0, some=None, samples=2):
        sequences = Sampler(model, max_num_seqs, 32).generate(
            some or prompts(), max_new_tokens=12, temperature=1.0, seed=seed, samples=samples)
        return {(*seq.prompt, "sample", seq.sample): seq.tokens for seq in sequences}
    assert draw(2) == draw(7) != draw(7, seed=1)
    assert draw(4) == draw(3, some=prompts()[::-1]) and len(draw(4)) == 18
    alone = draw(4, some=prompts()[3:5], samples=1)
    assert alone == {key: draw(2)[key] for key in alone}
    assert len({tuple(tokens) for tokens in draw(4, some=[[5]], samples=6).values()}) > 1


def test_forced_tokens_use_up_no_random_number():
    """Each sampled token takes the next number of random.Random("seed prompt sample")."""
    model = model_without_layers()
    seq, = Sampler(model, 1, 40).generate(
        [[7]], lambda seq, token: [token] if seq.tokens else [9, 8, 7], temperature=1.0,
        max_new_tokens=12)
    assert seq.tokens[:3] == [9, 8, 7]
    rng = random.Random("0 [7] 0")
    rng.random()                                    # for the token that was replaced
    expected, token = [], 7
    for _ in range(9):
        sums = probabilities(model(torch.tensor([[token]]))[0]).cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(sums, rng.random() * sums[:, -1:], right=True).item()
        expected.append(token)
    assert seq.tokens[3:] == expected


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 16])
def test_samples_of_a_prompt_share_one_prefill(max_num_seqs):
    """The model computes each prompt once, and each token but a sample's last. Greedy samples
    agree, and finished sequences do not keep the prefix alive."""
    model = tiny_model()
    shapes, same_length = record_batches(model), [[i, 2, 3 * i] for i in range(9)]
    sequences = list(Sampler(model, max_num_seqs, 32).generate(same_length, samples=3,
                                                               max_new_tokens=5))
    assert num_tokens(shapes) == 9 * 3 + 27 * 4
    assert not any(seq.prefix for seq in sequences)
    assert sorted((seq.index, seq.sample) for seq in sequences) == [
        (index, number) for index in range(9) for number in range(3)]
    for seq in sequences:
        assert seq.tokens == greedy(model, seq.prompt, 5)


def test_samples_give_the_same_tokens_in_any_number_of_slots():
    """Some sequences end, and others move into their slots, before these have taken a step."""
    found = []
    for max_num_seqs in (1, 6):
        sequences = Sampler(tiny_model(), max_num_seqs, 40).generate(
            [[1 + i] * (2 + 3 * i % 7) for i in range(20)], samples=4, max_new_tokens=20,
            stop_ids=set(range(24)), temperature=1.0)
        found.append({(seq.index, seq.sample): seq.tokens for seq in sequences})
    assert found[0] == found[1] and len(found[0]) == 80


def test_temperature_draws_from_the_distribution():
    """2,000 draws of the first token against the softmax: total variation below 0.1.

    With 64 likely tokens and 2,000 draws the expected distance is about
    0.5 * sqrt(64 / 2000) = 0.09 for a uniform distribution, and less for a peaked one, as here.
    """
    model = tiny_model()
    counts = torch.zeros(64)
    for seq in Sampler(model, 50, 4).generate([[5]], samples=2000, max_new_tokens=1,
                                              temperature=0.7):
        counts[seq.tokens[0]] += 1
    with torch.no_grad():
        expected = (model(torch.tensor([[5]]))[0, -1] / 0.7).softmax(0)
    assert (counts / 2000 - expected).abs().sum() / 2 < 0.1


@pytest.mark.parametrize("filters, kept", [
    (dict(top_k=2), [1, 3]), (dict(top_p=0.4), [1]), (dict(top_p=0.41), [1, 3]),
    (dict(top_p=0.86), [0, 1, 3, 4]), (dict(top_p=1e-6), [1]), (dict(min_p=0.3), [1, 3, 4]),
    (dict(top_k=4, top_p=0.75), [1, 3, 4]), (dict(temperature=0.5, min_p=0.3), [1, 3]),
    (dict(), [0, 1, 2, 3, 4])])
def test_filters_remove_what_they_say(filters, kept):
    logits = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]]).log()
    p = probabilities(logits.clone(), **filters)
    assert p[0].nonzero()[:, 0].tolist() == kept
    unfiltered = (logits / filters.get("temperature", 1)).softmax(-1)
    torch.testing.assert_close(p[0, kept], unfiltered[0, kept])


def test_filters_on_ties_and_in_the_sampler():
    assert probabilities(torch.zeros(1, 5), top_k=3).count_nonzero() == 3
    model = tiny_model()
    sequences = Sampler(model, 8, 8).generate([[5]], samples=50, max_new_tokens=4,
                                              temperature=3.0, top_k=1)
    assert {tuple(seq.tokens) for seq in sequences} == {tuple(greedy(model, [5], 4))}


@pytest.mark.parametrize("top_p", [0, -1, 1.5])
def test_top_p_outside_its_range_is_refused(top_p):
    with pytest.raises(ValueError, match="top_p"):
        next(Sampler(tiny_model(), 1, 8).generate([[5]], temperature=1.0, top_p=top_p))


# ---- Streaming ------------------------------------------------------------------------------


class Scripted:
    """Stands in for a sampler: `script` is a list of (token, forced)."""

    def __init__(self, script):
        self.script = script

    def generate(self, prompts, controller, **options):
        seq = Sequence(0, prompts[0])
        for token, forced in self.script:
            if forced:
                seq.queue.append(token)
            seq.append_token(token, controller)
        seq.finish_reason = "stop"
        yield seq


def test_streaming_marks_forced_text(run, tiny, monkeypatch):
    code, printed, _ = run("sample", "What?", "--model", tiny, "--max-new-tokens", 5)
    assert code == 0 and printed.startswith("[<|im_start|>think\n]")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, printed, error = run("sample", "What?", "--model", tiny, "--max-new-tokens", 5)
    assert code == 0 and printed.startswith("\033[2;33m<|im_start|>think\n\033[0m")
    assert error == "(5 tokens, max_new_tokens)\n"
    _, printed, _ = run("sample", "What?", "--model", tiny, "--max-new-tokens", 5, "--direct")
    assert not printed.startswith("\033")


def test_half_a_character_that_was_drawn_is_not_shown_as_forced(chat, capsys):
    """It waits for its other half while tokens are sampled, and not longer."""
    first, *rest = chat.encode("é")
    steps = [(first, False), *((i, True) for i in chat.encode("Wait")), (first, False),
             *((i, False) for i in rest), (first, False)]
    shown = []

    def controller(seq, token):
        shown.append(capsys.readouterr().out)
        return [token]
    stream(Scripted(steps), chat, [1], controller)
    assert shown == ["", "\ufffd[Wait]", "", "é"] and capsys.readouterr().out == "\ufffd\n"


def test_streaming_shows_no_token_that_may_be_removed(chat, capsys):
    """The controller removes b when c is sampled."""
    a, b, c, d = (chat.encode(text)[0] for text in "abcd")

    def controller(seq, token):
        seq.rollback(token == c)
        return [token]
    stream(Scripted([(i, False) for i in (a, b, c, d)]), chat, [1], controller, max_rollback=1)
    assert capsys.readouterr().out == "a[c]d\n"


def test_streaming_escapes_control_characters(chat, capsys):
    ids = chat.encode("\x1b[2J")
    stream(Scripted([(i, False) for i in ids]), chat, [1])
    assert capsys.readouterr().out == "\\x1b[2J\n"


# ---- The program ----------------------------------------------------------------------------


def test_a_direct_answer_has_no_thinking(run, tiny):
    flags = ("sample", "q", "--model", tiny, "--max-new-tokens", 4)
    assert run(*flags)[1].startswith("[<|im_start|>think\n]")
    assert not run(*flags, "--direct")[1].startswith("[")
