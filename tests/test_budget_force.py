"""Budget forcing as a table of scripted tokens, and as properties of random ones: no model."""
import random

import pytest
import torch
from conftest import BASE, tiny_model

from budget_force import (Budget, Setting, any_right, first_that_fits, gain, measure, most_voted,
                          scaling, spans, summarise, wilson)
from data import BadInput, Chat
from sample import Row, Sampler

# A toy vocabulary: END ends thinking, STOP the answer, NL is a line end; the rest is words.
END, STOP, NL, CLOSE, WAIT, FINAL, OPEN, HMM = 90, 91, 92, 93, 94, 95, 96, 97


def budget(max_thinking=-1, waits=0, **changes):
    return Budget(max_thinking, waits, **{**dict(
        close=[END, CLOSE], wait=[[WAIT]], final=[FINAL], newline=[NL], line_ends=frozenset({NL}),
        ends=frozenset({(END,), (STOP,)}), stop=STOP, max_answer=3), **changes})


# A closing of three words of plain text, each of which may also be written for itself.
PLAIN = dict(close=[80, 81, 82], ends=frozenset({(80, 81, 82), (80, 81, 83), (STOP,)}))


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
    ("no room for the Wait: a natural stop", dict(max_thinking=2, waits=1, wait=[[WAIT, WAIT]]),
     [1, END, 7, STOP], [1, END, CLOSE, 7, STOP], 1, 0, "natural"),
    ("the answer's own budget", dict(), [END, 4, 5, 6, 7, 8],
     [END, CLOSE, 4, 5, 6, STOP], 0, 0, "natural"),
    ("thinking cannot close twice", dict(), [1, END, 7, END, 8],
     [1, END, CLOSE, 7, STOP], 1, 0, "natural"),
    ("the context ends it like a cut", dict(room=13), [1, 2, 3, 4, 5, 7, 8, 9, 6],
     [1, 2, 3, 4, NL, END, CLOSE, FINAL, 7, 8, 9, STOP], 4, 0, "context"),
    ("what is appended, in turn", dict(waits=3, wait=[[WAIT], [HMM, HMM]]),
     [1, END, 2, END, 3, END, 4, END, 7, STOP],
     [1, WAIT, 2, HMM, HMM, 3, WAIT, 4, END, CLOSE, 7, STOP], 8, 3, "natural"),
    ("a closing of three tokens", PLAIN, [1, 80, 81, 82, 7, STOP],
     [1, 80, 81, 82, 7, STOP], 1, 0, "natural"),
    ("and in another spelling", PLAIN, [1, 80, 81, 83, 7, STOP],
     [1, 80, 81, 82, 7, STOP], 1, 0, "natural"),
    ("its words alone are thinking", PLAIN, [80, 81, 1, 82, 80, 81, 82, 7, STOP],
     [80, 81, 1, 82, 80, 81, 82, 7, STOP], 4, 0, "natural"),
    ("a Wait takes all three away", dict(waits=1, **PLAIN), [1, 80, 81, 82, 2, STOP, 7, STOP],
     [1, WAIT, 2, 80, 81, 82, 7, STOP], 3, 1, "natural"),
    ("what was withdrawn is not paid", dict(waits=1, max_thinking=4, **PLAIN),
     [1, 80, 81, 82, 2, 3, 4, 7, STOP], [1, WAIT, 2, 3, NL, 80, 81, 82, FINAL, 7, STOP], 4, 1,
     "cut"),
    ("it cannot close twice either", PLAIN, [1, STOP, 7, 80, 81, 82, 8],
     [1, 80, 81, 82, 7, STOP], 1, 0, "natural"),
    ("nor does what we put in count", dict(close=[CLOSE, 80, 81], ends=PLAIN["ends"]),
     [1, STOP, 82, 7, STOP], [1, CLOSE, 80, 81, 82, 7, STOP], 1, 0, "natural"),
    ("the opening goes in where the prompt lacks it", dict(open=[OPEN, NL], max_thinking=2),
     [9, 1, 2, 3, 7, STOP], [OPEN, NL, 1, 2, NL, END, CLOSE, FINAL, 7, STOP], 2, 0, "cut"),
    ("it is in the prompt already", dict(open=[NL]), [1, END, 7, STOP],
     [1, END, CLOSE, 7, STOP], 1, 0, "natural"),
    ("a grace to finish the line", dict(max_thinking=4, grace=0.5), [1, NL, 2, 3, NL, 4, 7, STOP],
     [1, NL, 2, 3, NL, END, CLOSE, FINAL, 7, STOP], 5, 0, "cut"),
    ("and no more than the grace", dict(max_thinking=4, grace=0.5), [1, 2, 3, 4, 5, 6, 8, 7, STOP],
     [1, 2, 3, 4, 5, 6, NL, END, CLOSE, FINAL, 7, STOP], 6, 0, "cut"),
    ("no grace at a line's end", dict(max_thinking=2, grace=0.9), [1, NL, 2, 7, STOP],
     [1, NL, END, CLOSE, FINAL, 7, STOP], 2, 0, "cut"),
    ("thinking that goes round", dict(repeats=2, max_thinking=99), [1, 2] * 30 + [7, STOP],
     [1, 2] * 11 + [NL, END, CLOSE, FINAL, 2, 1, 2, STOP], 22, 0, "repetition"),
])
def test_scripted(what, made, script, expected, thinking, waits, ended):
    row = play(budget(**made), script)
    assert row.tokens == expected, what
    assert (row.memory.tokens, row.memory.waits, row.memory.ended) == (thinking, waits, ended)
    assert all(row.forced[i] for i, token in enumerate(row.tokens) if token in (WAIT, CLOSE, FINAL))


# RECIPE's table of what the published code does; `...` is what the model then says. Each line is
# (what, budget, waits, what the model draws, what the row is). Its faults are the last lines: an
# extension gets what is left and not a budget anew, an overrun is cut with `Final Answer:`, and
# with nothing left nothing is asked for.
@pytest.mark.parametrize("what, most, waits, drawn, expected", [
    ("maximum", 3, 0, "a b c d ...", "a b c | close final ... stop"),
    ("a line end already there", 3, 0, "a b | d ...", "a b | close final ... stop"),
    ("minimum", -1, 1, "a close b close ...", "a wait b close ... stop"),
    ("the end of the turn", -1, 1, "a stop b stop ...", "a wait b close ... stop"),
    ("no end right behind it", -1, 1, "a close stop close b close ...",
     "a wait b close ... stop"),
    ("a natural stop", 9, 0, "a b close ...", "a b close ... stop"),
    ("fault 1: one budget", 4, 2, "a b close c d ...", "a b wait c | close final ... stop"),
    ("fault 2: an overrun", 3, 1, "a close b c ...", "a wait b | close final ... stop"),
    ("fault 3: nothing left", 2, 2, "a b close ...", "a b close ... stop"),
    ("fault 3: no budget at all", 0, 2, "a ...", "close final ... stop"),
])
def test_the_published_semantics_without_their_faults(what, most, waits, drawn, expected):
    ids = {"|": [NL], "close": [END, CLOSE], "stop": [STOP], "wait": [WAIT], "final": [FINAL],
           "...": [7, 8]}

    def tokens(text):
        return [i for word in text.split() for i in ids.get(word, [ord(word[0])])]
    script = [i for i in tokens(drawn) if i != CLOSE] + [STOP]
    assert play(budget(most, waits), script).tokens == tokens(expected), what


def test_random_streams_keep_every_promise():
    """Thinking within its budget, one delimiter, an answer after it, no more Waits than asked."""
    rng = random.Random(0)
    seen = set()
    for _ in range(4000):
        most, waits, answer = rng.choice([-1, 0, 1, 5, 20]), rng.randint(0, 4), rng.randint(1, 4)
        wait = [[WAIT] * rng.randint(1, 3), [WAIT]][:rng.randint(1, 2)]
        changes = rng.choice([PLAIN, {}]) | rng.choice([{}, {"grace": 0.4}, {"repeats": 1}]) | (
            rng.choice([{}, {"open": [OPEN]}]))
        steer = budget(most, waits, wait=wait, max_answer=answer, room=70, **changes)
        script = rng.choices([1, 2, 3, NL, END, STOP, 80, 81, 82, 83],
                             [5, 5, 5, 3, 2 * ("close" not in changes), 1, 4, 4, 4, 2], k=600)
        for _ in range(3):
            script[(at := rng.randrange(90)):at + 3] = [80, 81, rng.choice([82, 83])]
        row = play(steer, script, prompt=[NL] * rng.randint(1, 30))
        text, thought, close = row.tokens, row.memory, steer.close
        closings = [i for i in range(len(text)) if text[i:i + len(close)] == close]
        assert len(closings) == 1
        start = len(changes.get("open", []))
        assert thought.start == start and text[:start] == changes.get("open", [])
        thinking = text[start:closings[0]]
        if thought.ended != "natural" and len(thinking) > thought.tokens:
            assert thinking.pop() == NL
        assert len(thinking) == thought.tokens
        assert most < 0 or thought.tokens <= most + int(most * changes.get("grace", 0))
        assert text[-1] == STOP and text.count(STOP) == 1 and len(row.forced) == len(text)
        appended = sum(len(wait[i % len(wait)]) for i in range(thought.waits))
        assert text.count(WAIT) == appended and thought.waits <= waits
        assert text.count(FINAL) == (thought.ended != "natural")
        assert text[thought.answer:thought.begin] == [FINAL] * text.count(FINAL)
        assert len(text) - thought.begin <= answer + 1
        assert len(row.prompt) + len(text) <= 70
        assert all(row.forced[i] for i, token in enumerate(text) if token in (WAIT, FINAL, OPEN))
        assert thought.answered in ("natural", "cut")
        seen |= {thought.ended, thought.answered}
    assert seen == {"natural", "cut", "context", "repetition"}


def test_what_is_logged_is_what_the_model_read():
    """On a real model: each sampled token is the likeliest behind the logged ones, whatever was
    withdrawn or forced before it. Ids of the toy vocabulary, moved to where the model has them."""
    model = tiny_model(initializer_range=0.5, vocab_size=16)
    withdrawn = 0
    for first in range(16):
        for most, waits in ((-1, 2), (12, 1), (0, 0)):
            steer = Budget(most, waits, close=[1, 2], wait=[[5], [6, 6]], final=[7], newline=[8],
                           line_ends=frozenset({8}), stop=9, max_answer=4, room=40, ends=frozenset(
                               {(9,), *((a, b) for a in range(0, 16, 2) for b in (1, 3, 10))}))
            banned = {}

            def spy(row, token):
                nonlocal withdrawn
                before = len(row.tokens)
                instead = steer(row, token)
                withdrawn += before > len(row.tokens)
                banned[len(row.tokens) + len(instead)] = set(row.banned)
                return instead
            row, = Sampler(model, 2, 40).generate([[first, 8]], spy, stops={9})
            for i, forced in enumerate(row.forced):
                if not forced:
                    logits = model(torch.tensor([row.prompt + row.tokens[:i]]))[0, -1]
                    logits[list(banned.get(i, ()))] = -torch.inf
                    assert row.tokens[i] == logits.argmax()
    assert withdrawn > 10


def test_budget_of_a_real_tokenizer(chat):
    made = Budget.of(chat, 5, 1)
    assert chat.decode(made.close) == "<|im_start|>answer\n"
    assert [chat.decode(wait) for wait in made.wait] == ["Wait"]
    assert chat.text("ok\n")[-1] in made.line_ends and chat.text("ok")[-1] not in made.line_ends
    plain = Chat(BASE, thinking="think")            # <think> is no token of this tokenizer
    texts = {chat.decode(end) for end in plain.ends if len(end) > 1}
    assert texts == {"</think>", "</think>\n", "</think>\n\n"} and (chat.end,) in plain.ends
    assert tuple(plain.answer) in plain.ends
    for bad in (dict(max_thinking=-2), dict(waits=-1)):
        with pytest.raises(BadInput):
            Budget.of(chat, **bad)


def test_measures():
    rows = [{"correct": i < 30, "thinking_tokens": 10.0, "found": None if i > 37 else "5"}
            for i in range(40)]
    run = measure(rows, method="budget", max_thinking=16, waits=0)
    assert (run["n"], run["correct"], run["accuracy"], run["thinking_tokens"],
            run["unanswered"]) == (40, 30, 0.75, 10.0, 2)
    low, high = wilson(30, 40)
    assert low == pytest.approx(0.5981, abs=1e-4) and high == pytest.approx(0.8581, abs=1e-4)
    assert wilson(0, 40)[0] == 0 and wilson(40, 40)[1] == 1
    others = [{"correct": i < 20} for i in range(40)]
    mean, low, high, p = gain(rows, others)
    assert mean == 25 and low == pytest.approx(25 - 1.96 * 100 * (0.25 * 0.75 / 40) ** 0.5)
    assert p == pytest.approx(2 / 2 ** 10)          # ten questions, all of them won
    mixed = [{"correct": i in (0, 1, 2)} for i in range(8)], [{"correct": i == 7} for i in range(8)]
    assert gain(*mixed)[3] == pytest.approx(2 * (1 + 4) / 16) and gain(rows, rows)[3] == 1


def a_run(tokens, accuracy, max_thinking=None, kept=True, n=1000, **changes):
    rows = [{"correct": i < round(n * accuracy), "thinking_tokens": tokens} for i in range(n)]
    return dict(method="budget", waits=0, kept=kept) | changes, rows


def test_summary():
    """Control, Scaling and Performance on numbers worked by hand: 20 points a doubling, then 10."""
    runs = [a_run(0, 0.1), a_run(16, 0.2), a_run(32, 0.4), a_run(64, 0.5)]
    found = summarise([*runs, a_run(99, 0.9, kept=None, waits=1)])
    assert found["control"] == 100 and found["performance"] == 90
    assert found["scaling_points_per_doubling"] == pytest.approx((20 + 15 + 10) / 3)
    low, high = found["scaling_points_per_doubling_interval"]
    assert 13 < low < 15 < high < 17
    per_token = (20 / 16 + 30 / 48 + 10 / 32) / 3
    assert found["scaling_points_per_1000_tokens"] == pytest.approx(1000 * per_token)
    assert summarise([*runs[1:], a_run(70, 0.5, kept=False)])["control"] == 75
    alone = summarise([a_run(5, 0.5, kept=None)])
    assert alone["control"] is None and alone["scaling_points_per_doubling"] is None


def test_the_papers_axis():
    """Its tables 12 to 14 give the printed Scaling only with log2 of the tokens (RECIPE, part 4);
    here two runs, and one pair that is too close to count."""
    assert scaling([16, 32], [0.2, 0.4]) == pytest.approx(20)
    assert 19 < scaling([16, 32, 64, 64.05], [0.2, 0.4, 0.6, 0.594]) < 21
    assert scaling([0, 64], [0.1, 0.4]) is None


def row(**changes):
    return dict(found="1", correct=False, ended="natural", thinking_tokens=10) | changes


def test_methods_fold_samples():
    cut, right, other = row(ended="cut"), row(found="2", correct=True), row(found="3")
    assert first_that_fits([cut, right, other]) == {**right, "tries": 2}
    none = first_that_fits([cut, {**cut, "correct": True}])
    assert (none["found"], none["correct"], none["tries"]) == (None, False, 2)
    silent = row(found=None)
    assert most_voted([other, right, silent, silent, silent, right])["found"] == "2"
    assert most_voted([other, right, right, other])["found"] == "3"         # the earliest of equals
    assert most_voted([other, right])["thinking_tokens"] == 20
    assert most_voted([silent, silent])["found"] is None
    assert any_right([other, silent, right])["correct"] and not any_right([other])["correct"]
    assert any_right([other, silent, right])["thinking_tokens"] == 30


def test_settings_say_and_check_what_they_ask():
    assert Setting("budget", 64).question("q", 8) == "q"
    assert Setting("tokens", 64).question("q", 8) == "q Think for up to 64 tokens."
    assert Setting("steps+budget", 64).question("q", 8) == "q Think for up to 8 steps."
    assert Setting("class", 100).question("q", 8) == "q Think for a short time."
    assert Setting("class").question("q", 8) == "q Think for a long time."
    assert Setting("tokens", 64).kept(64) and not Setting("tokens", 64).kept(64.1)
    assert Setting("class").kept(101) and not Setting("class").kept(100)
    assert Setting("budget").kept(5) is None and Setting("direct", 0).kept(0) is None


def test_spans():
    assert spans([False, True, True, False, True]) == [[1, 3], [4, 5]]
    assert spans([]) == [] and spans([True]) == [[0, 1]]
