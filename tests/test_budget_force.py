"""Budget forcing as a table of scripted tokens, and as properties of random ones: no model."""
import random

import pytest

from budget_force import Budget, gain, measure, summarise, wilson
from data import BadInput
from sample import Row, Sampler

# A toy vocabulary: END ends thinking, STOP the answer, NL is a line end; the rest is words.
END, STOP, NL, CLOSE, WAIT, FINAL = 90, 91, 92, 93, 94, 95


def budget(max_thinking=-1, waits=0, **changes):
    return Budget(max_thinking, waits, **{**dict(
        close=[END, CLOSE], wait=[WAIT], final=[FINAL], newline=[NL], line_ends=frozenset({NL}),
        ends=frozenset({END, STOP}), stop=STOP, max_answer=3), **changes})


def play(steer, script, prompt=(NL,)):
    """What the sampler does with a row, the draws scripted; a banned draw is passed over."""
    row, script = Row(0, list(prompt)), list(script)
    while script and (not row.tokens or row.tokens[-1] != STOP or row.queue):
        if row.queue or script[0] not in row.banned:
            Sampler.take(None, row, None if row.queue else script.pop(0), steer)
        else:
            script.pop(0)
    return row


@pytest.mark.parametrize("what, made, script, expected, thinking, waits, ended", [
    ("natural stop: the delimiter alone", dict(), [1, 2, NL, END, 7, STOP],
     [1, 2, NL, END, CLOSE, 7, STOP], 3, 0, "natural"),
    ("the end of the turn ends thinking too", dict(), [1, STOP, 7, STOP],
     [1, END, CLOSE, 7, STOP], 1, 0, "natural"),
    ("cut: newline, delimiter, Final Answer", dict(max_thinking=2), [1, 2, 3, 7, STOP],
     [1, 2, NL, END, CLOSE, FINAL, 7, STOP], 2, 0, "cut"),
    ("cut at a line end: no second newline", dict(max_thinking=2), [1, NL, 3, 7, STOP],
     [1, NL, END, CLOSE, FINAL, 7, STOP], 2, 0, "cut"),
    ("budget 0: at once", dict(max_thinking=0), [1, 7, STOP],
     [END, CLOSE, FINAL, 7, STOP], 0, 0, "cut"),
    ("a stop just when the budget is spent is natural", dict(max_thinking=2), [1, 2, END, 7, STOP],
     [1, 2, END, CLOSE, 7, STOP], 2, 0, "natural"),
    ("one Wait", dict(waits=1), [1, END, 2, END, 7, STOP],
     [1, WAIT, 2, END, CLOSE, 7, STOP], 3, 1, "natural"),
    ("no stop right behind a Wait", dict(waits=1), [1, END, END, STOP, 2, END, 7, STOP],
     [1, WAIT, 2, END, CLOSE, 7, STOP], 3, 1, "natural"),
    ("two Waits, three ends", dict(waits=2), [1, END, 2, END, 3, END, 7, STOP],
     [1, WAIT, 2, WAIT, 3, END, CLOSE, 7, STOP], 5, 2, "natural"),
    ("one budget over all extensions", dict(max_thinking=4, waits=5), [1, END, 2, END, 3, 7, STOP],
     [1, WAIT, 2, WAIT, NL, END, CLOSE, FINAL, 7, STOP], 4, 2, "cut"),
    ("no room for the Wait: a natural stop", dict(max_thinking=2, waits=1, wait=[WAIT, WAIT]),
     [1, END, 7, STOP], [1, END, CLOSE, 7, STOP], 1, 0, "natural"),
    ("the answer's own budget", dict(), [END, 4, 5, 6, 7, 8],
     [END, CLOSE, 4, 5, 6, STOP], 0, 0, "natural"),
    ("thinking cannot close twice", dict(), [1, END, 7, END, 8],
     [1, END, CLOSE, 7, STOP], 1, 0, "natural"),
    ("the context ends it like a cut", dict(room=13), [1, 2, 3, 4, 5, 7, 8, 9, 6],
     [1, 2, 3, 4, NL, END, CLOSE, FINAL, 7, 8, 9, STOP], 4, 0, "context"),
])
def test_scripted(what, made, script, expected, thinking, waits, ended):
    row = play(budget(**made), script)
    assert row.tokens == expected, what
    assert (row.memory.tokens, row.memory.waits, row.memory.ended) == (thinking, waits, ended)
    assert all(row.forced[i] for i, token in enumerate(row.tokens) if token in (WAIT, CLOSE, FINAL))


def test_random_streams_keep_every_promise():
    """Thinking within its budget, one delimiter, an answer after it, no more Waits than asked."""
    rng = random.Random(0)
    for _ in range(2000):
        most, waits, answer = rng.choice([-1, 0, 1, 5, 20]), rng.randint(0, 4), rng.randint(1, 4)
        wait = [WAIT] * rng.randint(1, 3)
        steer = budget(most, waits, wait=wait, max_answer=answer, room=60)
        script = rng.choices([1, 2, 3, NL, END, STOP], [5, 5, 5, 3, 2, 1], k=400)
        row = play(steer, script, prompt=[NL] * rng.randint(1, 30))
        text, thought = row.tokens, row.memory
        closing = text.index(CLOSE) - 1
        thinking = text[:closing]
        if thought.ended != "natural" and len(thinking) > thought.tokens:
            assert thinking.pop() == NL
        assert len(thinking) == thought.tokens and (most < 0 or thought.tokens <= most)
        assert text.count(CLOSE) == text.count(END) == 1
        assert text[-1] == STOP and text.count(STOP) == 1
        assert text.count(WAIT) == thought.waits * len(wait) and thought.waits <= waits
        assert text.count(FINAL) == (thought.ended != "natural")
        assert len(text) - thought.begin <= answer + 1
        assert len(row.prompt) + len(text) <= 60


def test_budget_of_a_real_tokenizer(chat):
    made = Budget.of(chat, 5, 1)
    assert chat.decode(made.close) == "<|im_start|>answer\n" and chat.decode(made.wait) == "Wait"
    assert chat.text("ok\n")[-1] in made.line_ends and chat.text("ok")[-1] not in made.line_ends
    for bad in (dict(max_thinking=-2), dict(waits=-1)):
        with pytest.raises(BadInput):
            Budget.of(chat, **bad)


def test_measures():
    rows = [{"correct": i < 30, "thinking_tokens": 10.0} for i in range(40)]
    run = measure(rows, method="budget", max_thinking=16, waits=0)
    assert (run["n"], run["correct"], run["accuracy"], run["thinking_tokens"]) == (
        40, 30, 0.75, 10.0)
    low, high = wilson(30, 40)
    assert low == pytest.approx(0.5981, abs=1e-4) and high == pytest.approx(0.8581, abs=1e-4)
    assert wilson(0, 40)[0] == 0 and wilson(40, 40)[1] == 1
    others = [{"correct": i < 20} for i in range(40)]
    mean, low, high = gain(rows, others)
    assert mean == 25 and low == pytest.approx(25 - 1.96 * 100 * (0.25 * 0.75 / 40) ** 0.5)


def a_run(tokens, accuracy, **changes):
    return {**dict(method="budget", max_thinking=tokens, waits=0, thinking_tokens=tokens,
                   accuracy=accuracy), **changes}


def test_summary():
    """Control, Scaling and Performance on numbers worked by hand: 20 points a doubling, then 10."""
    runs = [a_run(0, 0.1), a_run(16, 0.2), a_run(32, 0.4), a_run(64, 0.5)]
    others = [a_run(99, 0.9, max_thinking=-1, waits=1), a_run(0, 0.95, method="direct")]
    found = summarise(runs + others)
    assert found["control"] == 100 and found["performance"] == 90
    assert found["scaling_points_per_doubling"] == pytest.approx((20 + 15 + 10) / 3)
    assert summarise([*runs[1:], a_run(70, 0.5, max_thinking=64)])["control"] == 75


def test_scaling_is_not_ruled_by_two_runs_that_thought_alike():
    runs = [a_run(16, 0.2), a_run(32, 0.4), a_run(64, 0.600), a_run(64.05, 0.594, max_thinking=-1)]
    assert 19 < summarise(runs)["scaling_points_per_doubling"] < 21
