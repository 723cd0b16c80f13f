"""The sampler against one-row-at-a-time decoding without a cache, and its steering and
streaming."""
import pytest
import torch
from conftest import tiny_model

from data import BadInput
from sample import Sampler


def prompts(n=9):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 64, (1 + i * 5 % 7,), generator=generator).tolist() for i in range(n)]


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


def test_draws_depend_on_seed_and_index_alone():
    model = tiny_model()

    def drawn(slots, seed=0, some=prompts()):
        rows = Sampler(model, slots, 32).generate(some, max_new_tokens=12, temperature=1.0,
                                                  seed=seed)
        return {row.index: row.tokens for row in rows}
    assert drawn(2) == drawn(7) != drawn(7, seed=1)
    assert drawn(4, some=prompts()[:3]) == {i: drawn(2)[i] for i in range(3)}
    assert len({tuple(tokens) for tokens in drawn(4, some=[[5]] * 6).values()}) > 1


def test_temperature_draws_from_the_distribution():
    """2,000 draws of the first token against the softmax: total variation under 0.1.

    With 64 likely tokens and 2,000 draws the expected distance is about
    0.5 * sqrt(64 / 2000) = 0.09 for a uniform distribution, and less for a peaked one, as here.
    """
    model = tiny_model()
    counts = torch.zeros(64)
    for row in Sampler(model, 50, 4).generate([[5]] * 2000, max_new_tokens=1, temperature=0.7):
        counts[row.tokens[0]] += 1
    with torch.no_grad():
        expected = (model(torch.tensor([[5]]))[0, -1] / 0.7).softmax(0)
    assert (counts / 2000 - expected).abs().sum() / 2 < 0.1


@pytest.mark.parametrize("prompt", [[], [1] * 8, [1] * 99])
def test_a_prompt_that_does_not_fit_is_refused_before_any_work(prompt):
    sampler = Sampler(tiny_model(), 2, 8)
    with pytest.raises(BadInput, match="does not fit"):
        next(sampler.generate([[1], prompt]))
    assert sampler.computed == 0
