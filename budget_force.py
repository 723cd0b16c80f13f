"""Budget forcing (s1, section 3.1), then its evaluation: accuracy against thinking tokens.

python budget_force.py                              compares base and student on Countdown
python budget_force.py "Use 3, 5 and 2 with ..."    prints one answer as it is generated
"""
import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import data
import sample
from recipe import cli, countdown, grading, remote, report, rows
from recipe.report import Setting

# ---- Budget ---------------------------------------------------------------------------------


@dataclass
class Budget:
    """Controls how long a model thinks, one token at a time.

                    wants to end, Waits are left: "Wait"
                   .--------.
                   v        |
        thinking --+--------'-- wants to end: closing delimiter ---------> answering --> end
                   |                                                           ^
                   '-- no tokens remain: closing delimiter, "Final Answer:" ---'

    Maximum: after `max_thinking` tokens the closing delimiter and "Final Answer:" are appended, on
    a new line, and the model answers.
    Minimum: the first `num_waits` times that the model wants to end its thinking, "Wait" is
    appended instead if it fits. The token after a "Wait" cannot end the thinking again.
    One exact budget: `max_thinking` bounds the thinking as a whole, all extensions included. Each
    sampled token of thinking counts, and each token of a "Wait"; delimiters and "Final Answer:" do
    not count. The answer has its own budget, `max_answer`.

    A Budget is a `controller`: called with a sequence and the token just sampled, it returns the
    tokens to append instead. It sees tokens, never the model.
    """
    chat: data.Chat                     # delimiters and stop tokens
    max_thinking: int = -1              # tokens; 0 answers at once, -1 is no limit
    num_waits: int = 0                  # how many ends of thinking are replaced
    wait_texts: tuple[str, ...] = ("Wait",)     # several are used in turn
    max_answer: int = 32                # sampled tokens of the answer
    repeats: int = 0                    # 20 tokens that occur so often end the thinking; 0: never
    max_seq_len: float = math.inf       # tokens of prompt, thinking and answer together

    def __post_init__(self):
        if self.max_thinking < -1 or self.num_waits < 0 or not all(self.wait_texts):
            raise ValueError("max_thinking < -1, num_waits < 0, or a Wait without text")
        encode = self.chat.encode
        self.wait_ids = [encode(text) for text in self.wait_texts]
        self.newline, self.final = encode("\n"), encode("Final Answer:")

    def __call__(self, sequence: sample.Sequence, token: int) -> list[int]:
        sequence.state = state = sequence.state or ThinkingState()
        if state.ended:
            return self.continue_answer(sequence, token)
        # The minimum: "Wait" replaces an end of thinking.
        if end := self.remove_end(sequence, token):
            before, after = end
            wait = before + self.wait_ids[state.waits % len(self.wait_ids)]
            if state.waits < self.num_waits and len(wait) <= self.remaining(sequence)[0]:
                state.waits += 1
                sequence.banned = self.chat.end_ids | {self.chat.closing_ids[0]}
                return wait
            return self.close(sequence, "natural", before, self.chat.closing_ids, after)
        # The maximum: the answer begins when no tokens remain.
        remaining, reason = self.remaining(sequence)
        if self.repeats and sequence.is_repeating(self.repeats):
            remaining, reason = 0, "repetition"
        if remaining <= 0:
            last = (sequence.tokens or sequence.prompt)[-1:]
            newline = [] if self.chat.decode(last).endswith("\n") else self.newline
            return self.close(sequence, reason, [], newline + self.chat.closing_ids, self.final)
        return [token]

    def remaining(self, sequence: sample.Sequence) -> tuple[float, str]:
        """How many more tokens of thinking fit, and what ends the thinking after them."""
        budget = self.max_thinking if self.max_thinking >= 0 else math.inf
        context = self.max_seq_len - len(sequence.prompt) - self.closing_length
        limit, reason = (budget, "cut") if budget <= context else (context, "context")
        # All tokens so far are thinking: sampled before and after each "Wait", and the Waits.
        return limit - len(sequence.tokens), reason

    def max_new_tokens(self, sequence: sample.Sequence) -> float:
        """How many tokens can be sampled before the thinking, or then the answer, is full."""
        if (state := sequence.state) and state.ended:
            return self.max_answer + state.sampled_start - len(sequence.tokens)
        return self.remaining(sequence)[0]

    @property
    def closing_length(self) -> int:
        """How many tokens must fit after the thinking: the delimiter and the answer."""
        return len(self.newline + self.chat.closing_ids + self.final) + self.max_answer + 1

    def remove_end(self, sequence: sample.Sequence, token: int) -> tuple[list, list] | None:
        """Removes the delimiter that `token` completes; None where it completes none.

        Returns the tokens of thinking before it, and of the answer after it. A delimiter in plain
        text may share tokens with them: `.</`, `think`, `>\\n\\n`.
        """
        if token in self.chat.end_ids:
            return [], []
        if not (closing := self.chat.closing_text):
            return None
        tail = [*sequence.tokens[1 - len(closing):], token]     # each token is a character or more
        if closing not in self.chat.decode(tail):
            return None
        while closing in self.chat.decode(tail[1:]):
            tail.pop(0)
        sequence.rollback(len(tail) - 1)
        before, _, after = self.chat.decode(tail).partition(closing)
        return self.chat.encode(before), self.chat.encode(after.lstrip())

    def close(self, sequence: sample.Sequence, reason: str, thinking: list, closing: list,
              answer: list) -> list[int]:
        """Ends the thinking; returns its last tokens, the delimiter and the answer's first ones."""
        state = sequence.state
        state.ended, state.thinking_tokens = reason, len(sequence.tokens) + len(thinking)
        state.answer_start = state.thinking_tokens + len(closing)
        state.sampled_start = state.answer_start + len(answer)
        return thinking + closing + answer

    def continue_answer(self, sequence: sample.Sequence, token: int) -> list[int]:
        """Ends the answer when its budget is spent, or when it would begin another turn."""
        is_full = self.max_new_tokens(sequence) <= 0
        is_over = token not in self.chat.stop_ids and (is_full or token in self.chat.turn_ids)
        return [self.chat.end_id] if is_over else [token]


@dataclass
class ThinkingState:
    """What a Budget keeps in `sequence.state`. Positions are those of `sequence.tokens`."""
    waits: int = 0                      # how many were appended
    ended: str | None = None            # why: natural, cut, context (sequence full) or repetition
    thinking_tokens: int = 0            # set when the thinking ends
    answer_start: int | None = None     # after the closing delimiter
    sampled_start: int | None = None    # after "Final Answer:", where there is one


# ---- The paper's methods --------------------------------------------------------------------


class Method(NamedTuple):
    """A way to control thinking (s1, sections 3.1 and 3.2)."""
    length_prompt: str | None = None    # what the question asks for: tokens, steps or class
    enforced: bool = True               # whether the controller enforces max_thinking
    controller: type | None = Budget    # None: answers without thinking
    aggregate: Callable = lambda samples: samples[0]    # one row of a question's samples


METHODS = {"direct": Method(controller=None), "budget": Method(),
           "tokens": Method("tokens", enforced=False), "tokens+budget": Method("tokens"),
           "steps": Method("steps", enforced=False), "steps+budget": Method("steps"),
           "class": Method("class", enforced=False), "coverage": Method(aggregate=report.coverage),
           "majority": Method(aggregate=lambda samples: report.majority(samples, grading.equal)),
           "rejection": Method(aggregate=report.rejection)}


def make_prompt(chat: data.Chat, question: str, setting: Setting, step_tokens=40) -> list[int]:
    """The question as token ids, with the length prompt of the method."""
    kind, limit = METHODS[setting.method].length_prompt, setting.max_thinking
    limits = {"tokens": limit, "steps": max(1, limit // step_tokens),
              "class": "short" if limit >= 0 else "long"}
    question = countdown.ask_for_length(question, kind, limits.get(kind))
    return chat.prompt(question, thinking=METHODS[setting.method].controller is not None)


def requested_settings(args) -> list[Setting]:
    """The settings that the flags ask for: each method with its numbers."""
    budgets = [{"max_thinking": n} for n in args.budgets]
    waits = [{"num_waits": n} for n in args.num_waits if n]
    limits = [budget for budget in budgets if budget["max_thinking"] > 0]
    votes = [{"samples": n} for n in args.samples]
    numbers = {"direct": [{"max_thinking": 0}], "budget": budgets + waits,
               "class": [{"max_thinking": countdown.SHORT}, {"min_thinking": countdown.SHORT}],
               "rejection": [limit | votes[-1] for limit in limits],
               "majority": votes, "coverage": votes}
    settings = [Setting(name, **own) for name in args.method for own in numbers.get(name, limits)]
    if not settings:
        raise ValueError("these methods need one of --budgets above 0")
    if args.temperature == 0 and any(setting.samples > 1 for setting in settings):
        raise ValueError("samples of a question differ only with a --temperature above 0")
    return settings


# ---- Evaluation -----------------------------------------------------------------------------


def is_correct(text: str, reference: str | dict) -> bool:
    """Whether the answer in `text`, which follows the thinking, is right."""
    if isinstance(reference, dict):
        return countdown.check(grading.extract_answer(text), reference)
    return grading.grade(text, reference)


def make_row(sequence: sample.Sequence, chat: data.Chat, question: dict) -> dict:
    """The row of a finished sequence. Only what follows the first end of thinking is graded."""
    state = sequence.state or ThinkingState(ended="none", answer_start=0)
    end = len(sequence.tokens) - (sequence.finish_reason == "stop")
    answer = chat.decode(sequence.tokens[state.answer_start:end])
    is_cut = sequence.finish_reason != "stop" or sequence.forced[-1]
    return {**question, "text": chat.decode(sequence.tokens),
            "found": grading.extract_answer(answer),
            "correct": is_correct(answer, question["answer"]), "waits": state.waits,
            "thinking_tokens": state.thinking_tokens, "ended": state.ended,
            "answered": "cut" if is_cut else "natural", "finish": sequence.finish_reason,
            "tokens": len(sequence.tokens),
            "forced_spans": report.forced_spans(sequence.tokens, sequence.forced, chat.decode)}


def prepare(chat: data.Chat, questions: list[dict], setting: Setting, args,
            max_seq_len: int) -> tuple[list[list[int]], Budget | None]:
    """The prompts of a setting and its controller; ValueError if the longest does not fit."""
    method = METHODS[setting.method]
    budget = method.controller and method.controller(
        chat, setting.max_thinking if method.enforced else -1, setting.num_waits,
        tuple(args.wait_text), args.max_answer, args.repeats, max_seq_len)
    prompts = [make_prompt(chat, question["question"], setting) for question in questions]
    length = max(map(len, prompts)) + (max(0, budget.max_thinking) if budget else 0)
    length += budget.closing_length if budget else args.max_answer
    if length > max_seq_len:
        raise ValueError(f"prompt, budget and answer are {length} tokens, and only {max_seq_len} "
                         f"fit into a sequence ({report.setting_name(asdict(setting))})")
    return prompts, budget


def evaluate(sampler, chat: data.Chat, questions: list[dict], setting: Setting, args, label: str,
             file, done: dict) -> list[dict]:
    """One row per question: from `done` {hash of all it depends on: row}, else new in `file`."""
    method, params = METHODS[setting.method], sample.sampling_params(args)
    prompts, budget = prepare(chat, questions, setting, args, sampler.max_seq_len)
    weights = sampler.model if args.base_url else [      # a server's weights go by their name
        str(sampler.dtype), *([path.name, path.stat().st_size, path.stat().st_mtime_ns]
                              for path in sorted(chat.directory.glob("*.safetensors")))]
    common = {"model": label, **asdict(setting), "seed": args.seed}
    identity = [common, weights, chat.settings, sampler.max_seq_len, params, args.max_answer,
                args.repeats, args.wait_text, report.graders(questions, grading.grader_name())]
    keys = [rows.request_key(*identity, *pair) for pair in zip(questions, prompts, strict=True)]
    missing = [i for i, key in enumerate(keys) if key not in done]
    sequences = sampler.generate([prompts[i] for i in missing], budget, setting.samples,
                                 None if budget else args.max_answer, chat.stop_ids, **params)
    samples = defaultdict(dict)
    for seq in tqdm(sequences, total=len(missing) * setting.samples, leave=False, disable=None):
        i = missing[seq.index]
        samples[i][seq.sample] = make_row(seq, chat, questions[i])
        if len(samples[i]) == setting.samples:
            row = method.aggregate([samples[i][k] for k in sorted(samples[i])])
            done[keys[i]] = {"key": keys[i], **common, **row}
            rows.append_jsonl(file, done[keys[i]])
    return [done[key] for key in keys]


# ---- The program ----------------------------------------------------------------------------


def watch(args) -> None:
    """Prints the answer to one question as the model generates it."""
    sampler, chat = (remote if args.base_url else sample).load_sampler(args.model[0], args, 1)
    budget = Budget(chat, args.budgets[-1], args.num_waits[0], tuple(args.wait_text),
                    args.max_answer, args.repeats, sampler.max_seq_len)
    state = sample.stream(sampler, chat, chat.prompt(args.question), budget,
                          max_rollback=len(chat.closing_text), stop_ids=chat.stop_ids,
                          **sample.sampling_params(args)).state
    print(f"({state.thinking_tokens} thinking tokens, {state.waits} Wait, ended: {state.ended})")


def compare(args) -> None:
    """Evaluates base and models; prints the tables and writes the directory --out."""
    requested, base_settings = requested_settings(args), [Setting("direct", 0), Setting("budget")]
    engine, base = (remote, "") if args.base_url else (sample, args.base)
    names = [base] * (base not in ("", *args.model)) + list(dict.fromkeys(args.model))
    labels = [Path(name).absolute().name for name in names]
    labels = labels if len(set(labels)) == len(names) else names
    questions = (rows.load_questions(args.questions, args.split, args.seed, True,
                                     args.columns)[:args.n] if args.questions else
                 countdown.questions(args.split or "test", args.n or 500, args.seed))
    settings = {name: requested if name in args.model else base_settings for name in names}
    for name in names:                          # what does not fit is an error now, not after hours
        chat, max_seq_len = engine.load_chat(name, args)
        for setting in settings[name]:
            prepare(chat, questions, setting, args, min(args.max_seq_len, max_seq_len))
    out, file, done = open_rows(args)
    graders = report.graders(questions, grading.grader_name())
    width = max(16, *map(len, labels))
    print(f"{len(questions)} questions, seed {args.seed}, graded by {', '.join(graders)}. First:",
          cli.escape(questions[0]["question"]), json.dumps(questions[0]["answer"]), "",
          report.header(width), sep="\n", flush=True)
    results = []
    for name, label in zip(names, labels, strict=True):
        sampler, chat = engine.load_sampler(name, args, args.max_num_seqs)
        for setting in settings[name]:
            answers = evaluate(sampler, chat, questions, setting, args, label, file, done)
            results.append((report.measure(answers, label, setting, args.seed), answers))
            print(report.table_row(results[-1][0], width), flush=True)
    report.finish(results, out, graders, labels[0] if names[0] not in args.model else None)


def open_rows(args) -> tuple:
    """The directory --out, the file of rows in it, and what that holds {key: row}."""
    model = Path(args.model[0])
    out = Path(args.out or (model if model.is_dir() else Path("out", model.name)) / "eval")
    out.mkdir(parents=True, exist_ok=True)
    file, done = rows.open_jsonl(out / "rows.jsonl")
    if args.overwrite:
        file.truncate(0)
    return out, file, {} if args.overwrite else done


def main() -> None:
    parser, positive = cli.ArgumentParser(__doc__.split("\n")[0]), cli.at_least(1)
    add = parser.add_argument
    add("question", nargs="?", help="watch this one, written before the flags: last "
        "of --budgets, first of --num-waits")
    data.add_model_arguments(add, nargs="+", default=["out/student"])
    add("--base", default="assets/countdown-base", help="model to compare with, '' for none")
    add("--out", help="directory of the results (default: eval in the first model's)")
    add("--overwrite", action="store_true", help="delete the rows in --out first")
    add("--method", nargs="+", choices=METHODS, default=["budget"],
        help="tokens, steps and class ask for a length in the question")
    add("--budgets", type=cli.at_least(-1), nargs="+", default=[0, 16, 32, 64, 96, 128, -1],
        help="thinking tokens at most; -1 is no limit")
    add("--num-waits", type=cli.at_least(0), nargs="+", default=[1, 2],
        help="Waits, in runs without a limit; 0 for no such run")
    add("--wait-text", action="append", help="what is appended (default: Wait); repeat it: in turn")
    add("--max-answer", type=positive, help="tokens of an answer (default: 32, a file 1024)")
    add("--samples", type=positive, nargs="+", default=[1, 2, 4, 8],
        help="per question: majority, coverage; the last one: rejection")
    add("--questions", help="file of questions with answers (default: Countdown)")
    rows.add_row_arguments(add)
    add("--n", type=positive, help="number of questions (default: Countdown 500, a file all)")
    add("--max-num-seqs", type=positive, help="side by side (default: what 4 GB hold, 256 at most)")
    add("--max-seq-len", type=positive, help="of prompt and answer (default: 768; a file: all)")
    add("--base-url", help="of a vLLM server that generates, such as http://localhost:8000/v1")
    add("--served-model-name", help="the model's name there (default: as in --model)")
    add("--allow-http", action="store_true", help="send the key, VLLM_API_KEY, unencrypted")
    add("--draw", nargs="+", metavar="RUNS", help="only table and curve of these runs.jsonl")
    sample.add_sampling_arguments(add)
    args = parser.parse_args()
    args.wait_text = args.wait_text or ["Wait"]
    # Countdown needs little. The Sampler bounds max_seq_len by the model's context.
    args.max_answer = args.max_answer or (1024 if args.questions else 32)
    args.max_seq_len = args.max_seq_len or (2**20 if args.questions else 768)
    with cli.exit_on_user_error(args.debug):
        if args.draw:
            runs = [run for path in args.draw for _, run in rows.read_rows(path)]
            report.redraw(runs, Path(args.draw[0]).parent)
        else:
            (watch if args.question else compare)(args)


if __name__ == "__main__":
    main()
