"""The sampler against one-row-at-a-time decoding without a cache, and its steering and
streaming."""
import random

import pytest
import torch
from conftest import BASE, tiny_model
from torch._inductor import config as inductor
from torch.fx.experimental import _config as shapes

from data import BadInput, countdown_questions
from model import Transformer
from sample import Sampler, probabilities


def prompts(n=9):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (1 + i * 5 % 7,), generator=generator).tolist() for i in range(n)]


def without_layers():
    """A model in which a token's successor depends on it alone."""
    model = tiny_model()
    model.model.layers = torch.nn.ModuleList()
    return model


def greedy(model, prompt, n):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt):]


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_rows_are_what_each_prompt_gives_alone(slots):
    model = tiny_model()
    rows = list(Sampler(model, slots, 32).generate(prompts(), max_new_tokens=10))
    assert sorted(row.index for row in rows) == list(range(9))
    for row in rows:
        assert row.tokens == greedy(model, row.prompt, 10) and row.finish == "max_new_tokens"
        assert row.forced == [False] * 10


@pytest.mark.parametrize("slots", [1, 3])
def test_a_compiled_step_gives_the_same_rows_and_is_compiled_once(slots, monkeypatch):
    """The step is captured whole and called without capturing anew, whatever rows and lengths.
    The backend runs what was captured as it is: the code of inductor is not ours to test."""
    captured = []

    def backend(graph, inputs):
        captured.append(graph)
        return graph

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **how: compiled(
        step, backend=backend, fullgraph=True, **how))
    torch.compiler.reset()
    model = tiny_model()
    # Put back behind the test what the sampler sets.
    with inductor.patch(freezing=False, max_autotune=False), shapes.patch(use_duck_shape=True):
        sampler = Sampler(model, slots, 32, compiled=True)
        rows = list(sampler.generate(prompts(), max_new_tokens=10))
    assert len(captured) == 1 and len(rows) == 9, [g.code[:300] for g in captured]
    for row in rows:
        assert row.tokens == greedy(model, row.prompt, 10)


def test_the_base_says_the_same_in_any_slots(chat):
    """float32, greedy, on real weights and questions of unlike lengths: exactly the same tokens."""
    model = Transformer.load(BASE)
    asked = [chat.prompt(row["question"] * (1 + i % 3))
             for i, row in enumerate(countdown_questions("test", 12, 0))]

    def said(slots, prompts):
        return {tuple(row.prompt): row.tokens for row in
                Sampler(model, slots, 200).generate(prompts, stops=chat.stops, max_new_tokens=60)}
    alone = {tuple(prompt): tokens for one in asked for prompt, tokens in said(1, [one]).items()}
    assert said(64, asked) == said(5, asked[::-1]) == alone and len(alone) == 12


def test_stop_length_and_order():
    """A stop ends a row at once and its slot takes the next prompt; the cache's end ends a row
    too."""
    model = tiny_model()
    stop = greedy(model, prompts()[0], 3)[2]
    sampler = Sampler(model, 2, 12)
    rows = {row.index: row for row in sampler.generate(prompts(), stops={stop})}
    for row in rows.values():
        full = greedy(model, row.prompt, 12 - len(row.prompt))
        if stop in full:
            assert row.tokens == full[:full.index(stop) + 1] and row.finish == "stop"
        else:
            assert row.tokens == full and row.finish == "length"
    assert {"stop", "length"} == {row.finish for row in rows.values()}


def test_steer_replaces_and_forced_tokens_are_read_by_the_model():
    """Every third drawn token becomes 1, 2, 3: logged as forced, and what follows depends on
    them."""
    model = tiny_model()

    def steer(row, token):
        row.memory = (row.memory or 0) + 1
        return [1, 2, 3] if row.memory % 3 == 0 else [token]

    for row in Sampler(model, 4, 40).generate(prompts(), steer, max_new_tokens=15):
        assert row.forced == [False, False, True, True, True] * 3
        assert [t for t, forced in zip(row.tokens, row.forced) if forced] == [1, 2, 3] * 3
        for i, forced in enumerate(row.forced):
            if not forced:
                assert row.tokens[i] == greedy(model, row.prompt + row.tokens[:i], 1)[0]


def test_a_forced_token_costs_itself_only():
    """No second prefill: tokens computed are the prompt's and the row's, but for the last one."""
    sampler = Sampler(tiny_model(), 1, 40)
    row, = sampler.generate([[1, 2, 3]], lambda row, token: [token, 7, 8], max_new_tokens=12)
    assert sampler.computed == 3 + 11


def test_banned_tokens_are_not_drawn():
    model = tiny_model()
    first = greedy(model, [5], 1)[0]

    def steer(row, token):
        row.memory = [*(row.memory or []), token]
        row.banned = {token}
        return [token]

    row, = Sampler(model, 2, 40).generate([[5]], steer, max_new_tokens=20)
    assert row.memory[0] == first and all(a != b for a, b in zip(row.memory, row.memory[1:]))


def test_draws_depend_on_seed_prompt_and_sample_alone():
    """Whatever the slots, the order of the prompts, and what else is asked."""
    model = tiny_model()

    def drawn(slots, seed=0, some=prompts(), samples=2):
        rows = Sampler(model, slots, 32).generate(some, max_new_tokens=12, temperature=1.0,
                                                  seed=seed, samples=samples)
        return {(*row.prompt, "sample", row.sample): row.tokens for row in rows}
    assert drawn(2) == drawn(7) != drawn(7, seed=1)
    assert drawn(4) == drawn(3, some=prompts()[::-1]) and len(drawn(4)) == 18
    alone = drawn(4, some=prompts()[3:5], samples=1)
    assert alone == {key: drawn(2)[key] for key in alone}
    assert len({tuple(tokens) for tokens in drawn(4, some=[[5]], samples=6).values()}) > 1


def test_forced_tokens_use_up_no_draw():
    """Each drawn token takes the next number of random.Random("seed prompt sample"), no other."""
    model = without_layers()
    forced, = Sampler(model, 1, 40).generate([[7]], lambda row, token: [token] if row.tokens
                                             else [9, 8, 7], temperature=1.0, max_new_tokens=12)
    assert forced.tokens[:3] == [9, 8, 7]
    draws = random.Random("0 [7] 0")
    draws.random()                                  # of the token that was replaced
    expected, token = [], 7
    for _ in range(9):
        sums = probabilities(model(torch.tensor([[token]]))[0]).cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(sums, draws.random() * sums[:, -1:], right=True).item()
        expected.append(token)
    assert forced.tokens[3:] == expected


def test_samples_of_a_prompt_share_one_prefill():
    """Tokens computed: each prompt once, and each row's but for the last. Greedy samples agree."""
    for slots in (1, 2, 3, 16):
        sampler = Sampler(tiny_model(), slots, 32)
        rows = list(sampler.generate(prompts(), samples=3, max_new_tokens=5))
        assert sampler.computed == sum(map(len, prompts())) + 27 * 4 and not sampler.prefilled
        assert sorted((row.index, row.sample) for row in rows) == [
            (index, sample) for index in range(9) for sample in range(3)]
        for row in rows:
            assert row.tokens == greedy(sampler.model, row.prompt, 5)


def test_samples_that_copy_a_reading_say_the_same_in_any_slots():
    """Some end, and others are moved into their slots, before these have taken a single step."""
    found = []
    for slots in (1, 6):
        rows = Sampler(tiny_model(), slots, 40).generate(
            [[1 + i] * (2 + 3 * i % 7) for i in range(20)], samples=4, max_new_tokens=20,
            stops=set(range(24)), temperature=1.0)
        found.append({(row.index, row.sample): row.tokens for row in rows})
    assert found[0] == found[1] and len(found[0]) == 80


def test_withdrawn_tokens_are_as_if_they_had_never_been():
    """Twice a row's last three tokens are taken back for two others; what follows knows only
    those."""
    model, log = tiny_model(), []

    def steer(row, token):
        if len(row.tokens) == 6 and len(log) < 4:
            log.append(row.index)
            row.withdraw(3)
            return [1, 2]
        return [token]

    for row in Sampler(model, 2, 40).generate(prompts()[:2], steer, max_new_tokens=12):
        assert len(row.tokens) == len(row.forced) == 12
        for i, forced in enumerate(row.forced):
            if not forced:
                assert row.tokens[i] == greedy(model, row.prompt + row.tokens[:i], 1)[0]
        assert row.tokens[3:5] == [1, 2] and row.forced.count(True) == 2
    assert sorted(log) == [0, 0, 1, 1]


def test_a_row_that_repeats_itself_is_stopped():
    """A model without layers goes round and round: a cycle of c tokens brings a run of 20 back
    every c tokens."""
    sampler = Sampler(without_layers(), 2, 400)
    row, = sampler.generate([[5]], max_new_tokens=300)
    assert row.finish == "max_new_tokens"
    cycle = next(c for c in range(1, 65) if row.tokens[100:200] == row.tokens[100 + c:200 + c])
    begin = next(i for i in range(300) if row.tokens[i:200] == row.tokens[i + cycle:200 + cycle])
    for times in (2, 4):
        row, = sampler.generate([[5]], max_new_tokens=300, repeats=times)
        assert row.finish == "repetition"
        assert len(row.tokens) == begin + 20 + (times - 1) * cycle


def test_temperature_draws_from_the_distribution():
    """2,000 draws of the first token against the softmax: total variation under 0.1.

    With 64 likely tokens and 2,000 draws the expected distance is about
    0.5 * sqrt(64 / 2000) = 0.09 for a uniform distribution, and less for a peaked one, as here.
    """
    model = tiny_model()
    counts = torch.zeros(64)
    for row in Sampler(model, 50, 4).generate([[5]], samples=2000, max_new_tokens=1,
                                              temperature=0.7):
        counts[row.tokens[0]] += 1
    with torch.no_grad():
        expected = (model(torch.tensor([[5]]))[0, -1] / 0.7).softmax(0)
    assert (counts / 2000 - expected).abs().sum() / 2 < 0.1


def test_filters_leave_out_what_they_say():
    logits = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15], [0.2, 0.2, 0.2, 0.2, 0.2]]).log()
    for filters, kept in [(dict(top_k=2), [1, 3]), (dict(top_p=0.4), [1]),
                          (dict(top_p=0.41), [1, 3]), (dict(top_p=0.86), [0, 1, 3, 4]),
                          (dict(min_p=0.3), [1, 3, 4]), (dict(top_k=4, top_p=0.75), [1, 3, 4]),
                          (dict(temperature=0.5, min_p=0.3), [1, 3]), (dict(), [0, 1, 2, 3, 4])]:
        p = probabilities(logits.clone(), **filters)
        assert p[0].nonzero()[:, 0].tolist() == kept, filters
        whole = (logits / filters.get("temperature", 1)).softmax(-1)
        torch.testing.assert_close(p[0, kept], whole[0, kept])
    assert probabilities(logits, top_k=3)[1].count_nonzero() == 3       # ties do not pass a limit
    model = tiny_model()
    rows = Sampler(model, 8, 8).generate([[5]], samples=50, max_new_tokens=4, temperature=3.0,
                                         top_k=1)
    assert {tuple(row.tokens) for row in rows} == {tuple(greedy(model, [5], 4))}


def test_a_free_slot_takes_the_next_prompt_at_once():
    """One row of nine tokens beside four of three: while it runs, its neighbour's slot serves three
    of them, idle only while a prompt is read."""
    sampler, busy = Sampler(tiny_model(), 2, 12), []
    decode = sampler.decode
    sampler.decode = lambda rows: busy.append(len(rows)) or decode(rows)

    def steer(row, token):
        return [63] if len(row.tokens) == (8, 2, 2, 2, 2)[row.index] else [min(token, 62)]

    rows = list(sampler.generate([[1, 2]] * 5, steer, stops={63}))
    assert [row.index for row in rows] == [1, 2, 0, 3, 4]
    assert busy == [2, 2, 1, 2, 2, 1, 2, 2, 1, 1]


@pytest.mark.parametrize("prompt", [[], [1] * 8, [1] * 99])
def test_a_prompt_that_does_not_fit_is_refused_before_any_work(prompt):
    sampler = Sampler(tiny_model(), 2, 8)
    with pytest.raises(BadInput, match="does not fit"):
        next(sampler.generate([[1], prompt]))
    assert sampler.computed == 0
