"""Budget forcing as a table of scripted tokens, and as properties of random ones: no model."""
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import BASE, tiny_model

from budget_force import Budget
from data import Chat
from sample import Sampler, Sequence

# A toy vocabulary: END ends thinking, STOP the answer, NL is the end of a line, the rest is words.
END, STOP, NL, CLOSE, WAIT, FINAL, HMM = 90, 91, 92, 93, 94, 95, 97
TEXTS = {NL: "\n", WAIT: "Wait", FINAL: "Final Answer:", HMM: "Hmm", 80: "</", 81: "think", 82: ">",
         83: ">\n\n", 84: ".</", 85: ">So", 86: ".", 87: "So"}
IDS = {text: [i] for i, text in TEXTS.items()} | {
    "": [], "Wait Wait": [WAIT, WAIT], "Wait Wait Wait": [WAIT] * 3, "Hmm Hmm": [HMM, HMM]}
TOY = dict(closing_ids=[END, CLOSE], closing_text="", end_ids={END, STOP}, turn_ids={END},
           stop_ids={STOP}, end_id=STOP, encode=IDS.get,
           decode=lambda ids: "".join(TEXTS.get(i, "x") for i in ids))
# A delimiter of plain text, usually three tokens.
PLAIN = TOY | dict(closing_ids=[80, 81, 83], closing_text="</think>", end_ids={STOP},
                   turn_ids=set())


def budget(max_thinking=-1, num_waits=0, chat=TOY, max_answer=3, **options):
    return Budget(SimpleNamespace(**chat), max_thinking, num_waits, max_answer=max_answer,
                  **options)


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
     dict(max_thinking=2, num_waits=1, wait_texts=("Wait Wait",)), [1, END, 7, STOP],
     [1, END, CLOSE, 7, STOP], 1, 0, "natural"),
    ("the answer has a budget of its own", dict(), [END, 4, 5, 6, 7, 8],
     [END, CLOSE, 4, 5, 6, STOP], 0, 0, "natural"),
    ("a full answer may end in any stop token", dict(chat=TOY | dict(stop_ids={STOP, 96})),
     [END, 4, 5, 6, 96], [END, CLOSE, 4, 5, 6, 96], 0, 0, "natural"),
    ("thinking cannot close twice", dict(), [1, END, 7, END, 8],
     [1, END, CLOSE, 7, STOP], 1, 0, "natural"),
    ("a full sequence ends it like a cut", dict(max_seq_len=13), [1, 2, 3, 4, 5, 7, 8, 9, 6],
     [1, 2, 3, 4, NL, END, CLOSE, FINAL, 7, 8, 9, STOP], 4, 0, "context"),
    ("several texts are appended in turn", dict(num_waits=3, wait_texts=("Wait", "Hmm Hmm")),
     [1, END, 2, END, 3, END, 4, END, 7, STOP],
     [1, WAIT, 2, HMM, HMM, 3, WAIT, 4, END, CLOSE, 7, STOP], 8, 3, "natural"),
    ("an end of three tokens", dict(chat=PLAIN), [1, 80, 81, 83, 7, STOP],
     [1, 80, 81, 83, 7, STOP], 1, 0, "natural"),
    ("an end in another spelling", dict(chat=PLAIN), [1, 80, 81, 82, 7, STOP],
     [1, 80, 81, 83, 7, STOP], 1, 0, "natural"),
    ("an end that begins in mid-token", dict(chat=PLAIN), [1, 84, 81, 83, 7, STOP],
     [1, 86, 80, 81, 83, 7, STOP], 2, 0, "natural"),
    ("an end that the answer shares a token with", dict(chat=PLAIN), [1, 80, 81, 85, 7, STOP],
     [1, 80, 81, 83, 87, 7, STOP], 1, 0, "natural"),
    ("the words of an end alone are thinking", dict(chat=PLAIN),
     [80, 81, 1, 82, 80, 81, 82, 7, STOP], [80, 81, 1, 82, 80, 81, 83, 7, STOP], 4, 0, "natural"),
    ("a Wait replaces all three tokens", dict(num_waits=1, chat=PLAIN),
     [1, 80, 81, 82, 2, STOP, 7, STOP], [1, WAIT, 2, 80, 81, 83, 7, STOP], 3, 1, "natural"),
    ("a Wait follows the text before an end", dict(num_waits=1, chat=PLAIN),
     [1, 84, 81, 85, 2, STOP, 7, STOP], [1, 86, WAIT, 2, 80, 81, 83, 7, STOP], 4, 1, "natural"),
    ("text before an end and a Wait are one token too many",
     dict(num_waits=1, max_thinking=2, chat=PLAIN, wait_texts=("Wait Wait",)),
     [84, 81, 83, 7, STOP], [86, 80, 81, 83, 7, STOP], 1, 0, "natural"),
    ("no plain end right after a Wait", dict(num_waits=1, chat=PLAIN),
     [1, 80, 81, 82, 80, 2, STOP, 7, STOP], [1, WAIT, 2, 80, 81, 83, 7, STOP], 3, 1, "natural"),
    ("tokens that were rolled back do not count", dict(num_waits=1, max_thinking=4, chat=PLAIN),
     [1, 80, 81, 82, 2, 3, 4, 7, STOP], [1, WAIT, 2, 3, NL, 80, 81, 83, FINAL, 7, STOP], 4, 1,
     "cut"),
    ("thinking that opens again in the answer keeps the answer", dict(chat=PLAIN),
     [1, 80, 81, 82, 80, 81, 82, 8, STOP], [1, 80, 81, 83, 80, 81, 82, STOP], 1, 0, "natural"),
    ("a control token may close again too", dict(chat=TOY | dict(turn_ids=set())),
     [1, END, 7, END, 8, STOP], [1, END, CLOSE, 7, END, 8, STOP], 1, 0, "natural"),
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
                   wait_texts=(" ".join(["Wait"] * rng.randint(1, 3)), "Wait")[:rng.randint(1, 2)],
                   chat=rng.choice([PLAIN, TOY]))
    script = rng.choices([1, 2, 3, NL, END, STOP, 80, 81, 82, 83, 84],
                         [5, 5, 5, 3, 2 * (options["chat"] is TOY), 1, 4, 4, 4, 2, 2], k=600)
    for _ in range(3):
        script[(at := rng.randrange(90)):at + 3] = [
            rng.choice([80, 84]), 81, rng.choice([82, 83, 85])]
    controller = budget(**options)
    return controller, play(controller, script, prompt=[NL] * rng.randint(1, 30))


def test_random_samples_keep_every_promise():
    """Thinking within its budget, one delimiter, an answer after it, no more Waits than allowed."""
    rng, seen = random.Random(0), set()
    for _ in range(4000):
        controller, sequence = random_case(rng)
        tokens, state = sequence.tokens, sequence.state
        closing = controller.chat.closing_ids
        start = state.answer_start - len(closing)
        assert tokens[start:state.answer_start] == closing
        if not controller.chat.closing_text:        # a delimiter in plain text may come again
            assert [i for i in range(len(tokens))
                    if tokens[i:i + len(closing)] == closing] == [start]
        thinking = tokens[:start]
        assert not controller.chat.end_ids & set(thinking)
        if text := controller.chat.closing_text:
            assert text not in controller.chat.decode(thinking)
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
        first = tokens[state.answer_start:state.sampled_start]
        assert first == [FINAL] * tokens.count(FINAL) or (
            first == [87] and controller.chat.closing_text and state.ended == "natural")
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
            # Any even token, then 1, 3 or 10, is a delimiter; it may begin in an earlier token.
            ids = {"Wait": [5], "Hmm": [6, 6], "Final Answer:": [7], "\n": [8]}
            texts = {8: "\n", 10: ").(", 1: ")", 3: ")"} | {i: "(" for i in (0, 2, 4, 6, 12, 14)}
            toy = SimpleNamespace(
                closing_ids=[1, 2], closing_text="()", end_ids={9}, turn_ids=set(), stop_ids={9},
                end_id=9, encode=lambda text, ids=ids: ids.get(text, [11] * len(text)),
                decode=lambda ids, texts=texts: "".join(texts.get(i, ":") for i in ids))
            controller = Budget(toy, max_thinking, num_waits, ("Wait", "Hmm"), max_answer=4,
                                max_seq_len=40)
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
    made = Budget(chat, 5, 1)
    assert chat.decode(chat.closing_ids) == "<|im_start|>answer\n"
    assert chat.decode(made.final) == "Final Answer:" and chat.decode(made.newline) == "\n"
    assert [chat.decode(wait) for wait in made.wait_ids] == ["Wait"]
    assert chat.turn_ids == {chat.closing_ids[0]} and chat.end_id in chat.stop_ids
    assert (chat.end_ids, chat.closing_text) == (chat.stop_ids | chat.turn_ids, "")
    for bad in (dict(max_thinking=-2), dict(num_waits=-1), dict(wait_texts=("Wait", ""))):
        with pytest.raises(ValueError, match="Wait"):
            Budget(chat, **bad)


@pytest.mark.parametrize("text", ["so 5</think>", "so 5.</think>It", "so \u00e9</think>5",
                                  "</think>", "so 5 </think> <think>"])
def test_a_plain_text_delimiter_is_found_in_whatever_tokens(text):
    """`<think>` is no token of this tokenizer. The thinking keeps its text to the last letter."""
    plain = Chat(BASE, thinking="think")
    assert (plain.closing_text, plain.turn_ids) == ("</think>", set())
    before, after = text.split("</think>")
    for num_waits in (0, 1):
        sequence = play(Budget(plain, num_waits=num_waits), plain.encode(text), prompt=[5])
        while sequence.queue:
            sequence.append_token(None)
        expected = f"{before}Wait{after}" if num_waits else f"{before}</think>\n\n{after}"
        assert plain.decode(sequence.tokens) == expected


def test_the_prompt_opens_the_thinking_and_is_not_counted(chat):
    """An end as the very first token is an end of no thinking at all."""
    controller, prompt = Budget(chat), chat.prompt("Use 1 and 2.")
    assert prompt[-len(chat.opening_ids):] == chat.opening_ids
    sequence = Sequence(0, prompt)
    assert controller(sequence, chat.closing_ids[0]) == chat.closing_ids
    assert (sequence.state.thinking_tokens, sequence.state.ended) == (0, "natural")
