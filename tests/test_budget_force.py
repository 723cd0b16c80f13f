"""Budget forcing as a table of scripted tokens, and as properties of random ones: no model."""
import random

import pytest
import torch
from conftest import BASE, tiny_model

from budget_force import Budget
from data import Chat
from sample import Sampler, Sequence

# A toy vocabulary: END ends thinking, STOP the answer, NL is the end of a line, the rest is words.
END, STOP, NL, CLOSE, WAIT, FINAL, HMM = 90, 91, 92, 93, 94, 95, 97


def budget(max_thinking=-1, num_waits=0, **options):
    return Budget(max_thinking, num_waits, **{**dict(
        closing=[END, CLOSE], wait_ids=[[WAIT]], final=[FINAL], newline=[NL],
        line_ends=frozenset({NL}), end_sequences=frozenset({(END,), (STOP,)}),
        stop_ids=frozenset({STOP}), end_id=STOP, max_answer=3), **options})


# A delimiter of three words of plain text, in two spellings.
PLAIN = dict(closing=[80, 81, 82],
             end_sequences=frozenset({(80, 81, 82), (80, 81, 83), (STOP,)}))


def play(controller, script, prompt=(NL,)):
    """The sequence that the sampler makes of scripted samples; a banned token is passed over."""
    sequence, script = Sequence(0, list(prompt)), list(script)
    while script and (sequence.tokens[-1:] != [STOP] or sequence.queue):
        if sequence.queue:
            sequence.append_token(None, controller)
        elif script[0] in sequence.banned:
            script.pop(0)
        else:
            sequence.append_token(script.pop(0), controller)
    return sequence


@pytest.mark.parametrize("what, options, script, expected, thinking, waits, ended", [
    ("a natural end gets the delimiter alone", dict(), [1, 2, NL, END, 7, STOP],
     [1, 2, NL, END, CLOSE, 7, STOP], 3, 0, "natural"),
    ("the end of the turn ends the thinking", dict(), [1, STOP, 7, STOP],
     [1, END, CLOSE, 7, STOP], 1, 0, "natural"),
    ("a cut gets newline, delimiter and Final Answer", dict(max_thinking=2), [1, 2, 3, 7, STOP],
     [1, 2, NL, END, CLOSE, FINAL, 7, STOP], 2, 0, "cut"),
    ("a cut at the end of a line gets no second newline", dict(max_thinking=2), [1, NL, 3, 7, STOP],
     [1, NL, END, CLOSE, FINAL, 7, STOP], 2, 0, "cut"),
    ("budget 0 answers at once", dict(max_thinking=0), [1, 7, STOP],
     [END, CLOSE, FINAL, 7, STOP], 0, 0, "cut"),
    ("an end just when the budget is spent is natural", dict(max_thinking=2), [1, 2, END, 7, STOP],
     [1, 2, END, CLOSE, 7, STOP], 2, 0, "natural"),
    ("one Wait", dict(num_waits=1), [1, END, 2, END, 7, STOP],
     [1, WAIT, 2, END, CLOSE, 7, STOP], 3, 1, "natural"),
    ("no end right after a Wait", dict(num_waits=1), [1, END, END, STOP, 2, END, 7, STOP],
     [1, WAIT, 2, END, CLOSE, 7, STOP], 3, 1, "natural"),
    ("two Waits for three ends", dict(num_waits=2), [1, END, 2, END, 3, END, 7, STOP],
     [1, WAIT, 2, WAIT, 3, END, CLOSE, 7, STOP], 5, 2, "natural"),
    ("one budget over all extensions", dict(max_thinking=4, num_waits=5),
     [1, END, 2, END, 3, 7, STOP],
     [1, WAIT, 2, WAIT, NL, END, CLOSE, FINAL, 7, STOP], 4, 2, "cut"),
    ("a Wait that does not fit into the budget",
     dict(max_thinking=2, num_waits=1, wait_ids=[[WAIT, WAIT]]), [1, END, 7, STOP],
     [1, END, CLOSE, 7, STOP], 1, 0, "natural"),
    ("the answer has a budget of its own", dict(), [END, 4, 5, 6, 7, 8],
     [END, CLOSE, 4, 5, 6, STOP], 0, 0, "natural"),
    ("thinking cannot close twice", dict(), [1, END, 7, END, 8],
     [1, END, CLOSE, 7, STOP], 1, 0, "natural"),
    ("a full sequence ends it like a cut", dict(max_seq_len=13), [1, 2, 3, 4, 5, 7, 8, 9, 6],
     [1, 2, 3, 4, NL, END, CLOSE, FINAL, 7, 8, 9, STOP], 4, 0, "context"),
    ("several texts are appended in turn", dict(num_waits=3, wait_ids=[[WAIT], [HMM, HMM]]),
     [1, END, 2, END, 3, END, 4, END, 7, STOP],
     [1, WAIT, 2, HMM, HMM, 3, WAIT, 4, END, CLOSE, 7, STOP], 8, 3, "natural"),
    ("an end of three tokens", PLAIN, [1, 80, 81, 82, 7, STOP],
     [1, 80, 81, 82, 7, STOP], 1, 0, "natural"),
    ("an end in another spelling", PLAIN, [1, 80, 81, 83, 7, STOP],
     [1, 80, 81, 82, 7, STOP], 1, 0, "natural"),
    ("the words of an end alone are thinking", PLAIN, [80, 81, 1, 82, 80, 81, 82, 7, STOP],
     [80, 81, 1, 82, 80, 81, 82, 7, STOP], 4, 0, "natural"),
    ("a Wait replaces all three tokens", dict(num_waits=1, **PLAIN),
     [1, 80, 81, 82, 2, STOP, 7, STOP], [1, WAIT, 2, 80, 81, 82, 7, STOP], 3, 1, "natural"),
    ("tokens that were rolled back do not count", dict(num_waits=1, max_thinking=4, **PLAIN),
     [1, 80, 81, 82, 2, 3, 4, 7, STOP], [1, WAIT, 2, 3, NL, 80, 81, 82, FINAL, 7, STOP], 4, 1,
     "cut"),
    ("an end of three tokens cannot come twice", PLAIN, [1, STOP, 7, 80, 81, 82, 8],
     [1, 80, 81, 82, 7, STOP], 1, 0, "natural"),
    ("forced tokens do not complete an end",
     dict(closing=[CLOSE, 80, 81], end_sequences=PLAIN["end_sequences"]),
     [1, STOP, 82, 7, STOP], [1, CLOSE, 80, 81, 82, 7, STOP], 1, 0, "natural"),
    ("thinking that repeats itself", dict(repeats=2, max_thinking=99), [1, 2] * 30 + [7, STOP],
     [1, 2] * 11 + [NL, END, CLOSE, FINAL, 2, 1, 2, STOP], 22, 0, "repetition"),
])
def test_scripted(what, options, script, expected, thinking, waits, ended):
    sequence = play(budget(**options), script)
    assert sequence.tokens == expected, what
    state = sequence.state
    assert (state.thinking_tokens, state.waits, state.ended) == (thinking, waits, ended)
    assert all(sequence.forced[i] for i, token in enumerate(sequence.tokens)
               if token in (WAIT, CLOSE, FINAL))


# RECIPE's table of what the published code does, where `...` is the answer. The last four lines
# are its faults: here an extension gets what remains of the budget and no new one, an overrun is
# cut with `Final Answer:`, and with nothing left nothing is asked for.
@pytest.mark.parametrize("what, max_thinking, num_waits, sampled, expected", [
    ("maximum", 3, 0, "a b c d ...", "a b c | close final ... stop"),
    ("a line that has ended", 3, 0, "a b | d ...", "a b | close final ... stop"),
    ("minimum", -1, 1, "a close b close ...", "a wait b close ... stop"),
    ("the end of the turn", -1, 1, "a stop b stop ...", "a wait b close ... stop"),
    ("no end right after it", -1, 1, "a close stop close b close ...",
     "a wait b close ... stop"),
    ("a natural end", 9, 0, "a b close ...", "a b close ... stop"),
    ("fault 1: one budget", 4, 2, "a b close c d ...", "a b wait c | close final ... stop"),
    ("fault 2: an overrun", 3, 1, "a close b c ...", "a wait b | close final ... stop"),
    ("fault 3: nothing left", 2, 2, "a b close ...", "a b close ... stop"),
    ("fault 3: no budget at all", 0, 2, "a ...", "close final ... stop"),
])
def test_the_published_semantics_without_their_faults(what, max_thinking, num_waits, sampled,
                                                         expected):
    ids = {"|": [NL], "close": [END, CLOSE], "stop": [STOP], "wait": [WAIT], "final": [FINAL],
           "...": [7, 8]}

    def tokens(text):
        return [i for word in text.split() for i in ids.get(word, [ord(word[0])])]
    script = [i for i in tokens(sampled) if i != CLOSE] + [STOP]
    assert play(budget(max_thinking, num_waits), script).tokens == tokens(expected), what


def random_case(rng):
    """(budget, sequence) of random options and samples."""
    options = dict(max_thinking=rng.choice([-1, 0, 1, 5, 20]), num_waits=rng.randint(0, 4),
                   max_answer=rng.randint(1, 4), repeats=rng.choice([0, 1]), max_seq_len=70,
                   wait_ids=[[WAIT] * rng.randint(1, 3), [WAIT]][:rng.randint(1, 2)],
                   **rng.choice([PLAIN, {}]))
    script = rng.choices([1, 2, 3, NL, END, STOP, 80, 81, 82, 83],
                         [5, 5, 5, 3, 2 * ("closing" not in options), 1, 4, 4, 4, 2], k=600)
    for _ in range(3):
        script[(at := rng.randrange(90)):at + 3] = [80, 81, rng.choice([82, 83])]
    controller = budget(**options)
    return controller, play(controller, script, prompt=[NL] * rng.randint(1, 30))


def test_random_samples_keep_every_promise():
    """Thinking within its budget, one delimiter, an answer after it, no more Waits than allowed."""
    rng, seen = random.Random(0), set()
    for _ in range(4000):
        controller, sequence = random_case(rng)
        tokens, state, closing = sequence.tokens, sequence.state, controller.closing
        closings = [i for i in range(len(tokens)) if tokens[i:i + len(closing)] == closing]
        assert len(closings) == 1
        thinking = tokens[:closings[0]]
        if state.ended != "natural" and len(thinking) > state.thinking_tokens:
            assert thinking.pop() == NL
        assert len(thinking) == state.thinking_tokens
        assert controller.max_thinking < 0 or state.thinking_tokens <= controller.max_thinking
        assert tokens[-1] == STOP and tokens.count(STOP) == 1
        assert len(sequence.forced) == len(tokens)
        waits = controller.wait_ids
        appended = sum(len(waits[i % len(waits)]) for i in range(state.waits))
        assert tokens.count(WAIT) == appended and state.waits <= controller.num_waits
        assert tokens.count(FINAL) == (state.ended != "natural")
        final = tokens[state.answer_start:state.sampled_start]
        assert final == [FINAL] * tokens.count(FINAL)
        assert len(tokens) - state.sampled_start <= controller.max_answer + 1
        assert len(sequence.prompt) + len(tokens) <= controller.max_seq_len
        assert all(sequence.forced[i] for i, token in enumerate(tokens) if token in (WAIT, FINAL))
        seen |= {state.ended, f"answer forced to end: {sequence.forced[-1]}"}
    assert seen == {"natural", "cut", "context", "repetition", "answer forced to end: True",
                    "answer forced to end: False"}


def test_the_logged_tokens_are_what_the_model_read():
    """On a real model, each sampled token is the likeliest after the logged ones, whatever was
    rolled back or forced before it."""
    model, rolled_back = tiny_model(initializer_range=0.5, vocab_size=16), 0
    for first in range(16):
        for max_thinking, num_waits in ((-1, 2), (12, 1), (0, 0)):
            controller = Budget(
                max_thinking, num_waits, closing=[1, 2], wait_ids=[[5], [6, 6]], final=[7],
                newline=[8], line_ends=frozenset({8}), stop_ids=frozenset({9}), end_id=9,
                max_answer=4, max_seq_len=40, end_sequences=frozenset(
                    {(9,), *((a, b) for a in range(0, 16, 2) for b in (1, 3, 10))}))
            banned = {}

            def spy(sequence, token, controller=controller, banned=banned):
                nonlocal rolled_back
                length = len(sequence.tokens)
                tokens = controller(sequence, token)
                rolled_back += length > len(sequence.tokens)
                banned[len(sequence.tokens) + len(tokens)] = set(sequence.banned)
                return tokens
            sequence, = Sampler(model, 2, 40).generate([[first, 8]], spy, stop_ids={9})
            for i, forced in enumerate(sequence.forced):
                if not forced:
                    logits = model(torch.tensor([sequence.prompt + sequence.tokens[:i]]))[0, -1]
                    logits[list(banned.get(i, ()))] = -torch.inf
                    assert sequence.tokens[i] == logits.argmax()
    assert rolled_back > 10


def test_budget_of_a_real_tokenizer(chat):
    made = Budget.for_chat(chat, 5, 1)
    assert (made.max_thinking, made.num_waits) == (5, 1)
    assert chat.decode(made.closing) == "<|im_start|>answer\n"
    assert chat.decode(made.final) == "Final Answer:" and chat.decode(made.newline) == "\n"
    assert [chat.decode(wait) for wait in made.wait_ids] == ["Wait"]
    assert chat.encode("ok\n")[-1] in made.line_ends and chat.encode("ok")[-1] not in made.line_ends
    assert made.end_id == chat.end_id and made.stop_ids == chat.stop_ids
    plain = Chat(BASE, thinking="think")            # <think> is not a token of this tokenizer
    made = Budget.for_chat(plain)
    texts = {plain.decode(end) for end in made.end_sequences if len(end) > 1}
    assert texts == {"</think>", "</think>\n", "</think>\n\n"}
    assert {(chat.end_id,), tuple(plain.closing_ids)} < made.end_sequences
    for bad in (dict(max_thinking=-2), dict(num_waits=-1), dict(wait_texts=["Wait", ""])):
        with pytest.raises(ValueError, match="Wait"):
            Budget.for_chat(chat, **bad)


def test_the_prompt_opens_the_thinking_and_is_not_counted(chat):
    """An end as the very first token is an end of no thinking at all."""
    controller, prompt = Budget.for_chat(chat), chat.prompt("Use 1 and 2.")
    assert prompt[-len(chat.opening_ids):] == chat.opening_ids
    sequence = Sequence(0, prompt)
    assert controller(sequence, chat.closing_ids[0]) == chat.closing_ids
    assert (sequence.state.thinking_tokens, sequence.state.ended) == (0, "natural")
