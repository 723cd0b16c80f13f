"""Rows of files and datasets as questions and traces, and JSONL files that grow a row at a time.

Datasets keep the same things in different columns and shapes. This file knows the shapes of s1K,
OpenThoughts, Bespoke-Stratos, OpenR1-Math, Mixture-of-Thoughts and LIMO (traces), and of MATH500,
AIME, GSM8K, GPQA, MMLU, ARC, OlympiadBench and NuminaMath (questions). `--columns` names others.
"""
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from recipe.grading import extract_answer

Trace = tuple[str, str, str]            # question, thinking, answer

# Where a value is found, in any case: the first column that is not empty. {teacher}: whose, where
# a row has the traces of two.
COLUMNS = {
    "question": ("question", "problem", "prompt"),
    "thinking": ("thinking", "message_thinking", "thinking_trajectories",
                 "{teacher}_thinking_trajectory"),
    "answer": ("attempt", "{teacher}_attempt", "answer", "message_content"),
    "reference": ("reference", "gtruth_answer", "correct answer", "final_answer", "answerkey",
                  "answer"),
    "options": ("options", "choices"), "conversation": ("messages", "conversations")}
TEACHERS = ("deepseek", "gemini")
LETTERS = "ABCDEFGHIJ"
FORMATS = {".parquet": "parquet", ".csv": "csv"}        # read by the library `datasets`


def add_row_arguments(add) -> None:
    add("--split", help="split of a dataset that has several")
    add("--columns", type=parse_columns, metavar="question=NAME,answer=NAME",
        help="columns of a file with unusual names")


def add_trace_arguments(add) -> None:
    add_row_arguments(add)
    add("--teacher", choices=TEACHERS, default=TEACHERS[0],
        help="whose traces, of rows that have both (s1K-1.1)")


def parse_columns(text: str) -> dict[str, str]:
    """The value of --columns: {our name: the file's}."""
    columns = dict(pair.split("=", 1) for pair in text.split(","))
    if not columns.keys() <= {"question", "thinking", "answer"}:
        raise ValueError("the names are question, thinking and answer")
    return columns


# ---- Reading --------------------------------------------------------------------------------


def read_rows(source: str | Path, split: str | None = None) -> list[tuple[str, dict]]:
    """(place, row) for each row of a JSON list or JSONL file; of anything else through `datasets`.

    The place names the row in messages: "traces.jsonl, row 3".
    """
    path, place = Path(source), str(source)
    is_json = path.suffix in (".json", ".jsonl") or path.is_file() and path.suffix not in FORMATS
    if not is_json:
        return read_dataset(str(source), split)
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")     # some files begin with a byte order mark
        if text.lstrip().startswith("["):
            rows = list(enumerate(json.loads(text), 1))
        else:
            for n, line in enumerate(text.split("\n"), 1):
                place = f"{source}, row {n}"
                if line.strip():
                    rows.append((n, json.loads(line)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {error}") from None
    if not rows:
        raise ValueError(f"{source} is empty")
    for n, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{source}, row {n}: not an object")
    return [(f"{source}, row {n}", row) for n, row in rows]


def read_dataset(source: str, split: str | None) -> list[tuple[str, dict]]:
    """The rows of a parquet or CSV file, a folder, or a hub dataset (owner/name@revision)."""
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{source}: `pip install datasets` to read it") from None
    kind = FORMATS.get(Path(source).suffix)
    name, _, revision = source.partition("@")
    try:
        splits = (datasets.load_dataset(kind, data_files=source) if kind
                  else datasets.load_dataset(name, revision=revision or None))
    except Exception as error:                  # the library raises dozens of kinds
        raise ValueError(f"{source}: not a dataset that can be loaded: {error}") from None
    if split not in splits and (split or len(splits) > 1):
        raise ValueError(f"{source}: --split is one of {', '.join(splits)}")
    rows = splits[split or next(iter(splits))]
    return [(f"{source}, row {n}", row) for n, row in enumerate(rows, 1)]


def parse_rows(source: str | Path, rows: list, parse: Callable[[dict], Any]) -> list:
    """parse(row) of each row. Rows that raise ValueError are counted on standard error."""
    used, reasons, first = [], Counter(), ""
    for place, row in rows:
        try:
            used.append(parse(row))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            known = type(error) is ValueError   # the others come from values of another shape
            reasons[str(error) if known else "an unknown shape"] += 1
            first = first or place.split(", ")[-1]
    if reasons:
        unused, total = reasons.total(), len(rows)
        counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(5))
        message = f"{source}: {unused:,} of {total:,} rows not used ({counts}), first {first}"
        if not used:
            raise ValueError(f"{message}; the columns are {', '.join(map(str, rows[0][1]))}: "
                             "--columns maps them")
        print(ascii(message)[1:-1], file=sys.stderr)
    return used


def column(row: dict, name: str, teacher: str = "") -> Any:
    """The first value of COLUMNS[name] that is not empty, without halves of surrogate pairs."""
    lower = {str(key).lower(): value for key, value in row.items()}
    values = (lower.get(key.format(teacher=teacher)) for key in COLUMNS.get(name, (name,)))
    return clean(next((value for value in values if value not in (None, "", [])), None))


def clean(value: Any) -> Any:
    """A string without halves of surrogate pairs, which JSON allows and tokenizers refuse."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


# ---- Traces ---------------------------------------------------------------------------------


def usable_traces(source: str | Path, split: str | None = None, teacher: str = TEACHERS[0],
                  columns: dict | None = None, rows: list | None = None) -> list:
    """(row, trace) of each row that can be trained on. The row has `correct` where it says so."""
    def parse(row):
        row = row | {ours: row.get(theirs) for ours, theirs in (columns or {}).items()}
        return trace_of(row, teacher)
    return parse_rows(source, rows or read_rows(source, split), parse)


def load_traces(source: str | Path, *options, **more_options) -> list[Trace]:
    return [trace for _, trace in usable_traces(source, *options, **more_options)]


def trace_of(row: dict, teacher: str = TEACHERS[0]) -> tuple[dict, Trace]:
    """The row and its trace; ValueError says why it cannot be trained on."""
    if row.get("unfit"):
        raise ValueError(f"unfit ({row['unfit']})")
    question, thinking, answer = (column(row, name, teacher)
                                  for name in ("question", "thinking", "answer"))
    if thinking:
        thinking = thinking[0] if isinstance(thinking, list) else thinking  # s1K's trajectories
    elif generations := column(row, "generations"):                         # OpenR1-Math
        verdicts = list(row.get("correctness_math_verify") or [None] * len(generations))
        best = verdicts.index(True) if True in verdicts else 0
        row = row | ({} if verdicts[best] is None else {"correct": verdicts[best]})
        thinking, answer = split_thinking(str(generations[best]))
    elif turns := column(row, "conversation"):
        question, reply = read_conversation(turns)
        thinking, answer = split_thinking(reply)
    elif tokenized := S1K_TEXT.search(str(row.get("text"))):
        question, thinking, answer = tokenized.groups()
    elif answer:                                                            # LIMO
        thinking = column(row, "solution")
    for name, text in (("question", question), ("thinking", thinking), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"no {name}")
    if TAG.search(answer):
        raise ValueError("a thinking tag in the answer")
    return row, (clean(question), clean(thinking), clean(answer))


def read_conversation(turns: list) -> tuple[str, str]:
    """The question and the reply of a conversation of one exchange."""
    texts = {"user": [], "assistant": []}
    names = {"human": "user", "gpt": "assistant"}
    for turn in turns:
        role = turn.get("role") or turn.get("from")
        texts.get(names.get(role, role), []).append(str(turn.get("content") or turn.get("value")))
    if [len(found) for found in texts.values()] != [1, 1]:
        raise ValueError("a conversation that is not one question and one answer")
    return texts["user"][0], texts["assistant"][0]


S1K_TEXT = re.compile(r"<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n"
                      r"<\|im_start\|>think\n(.*)\n<\|im_start\|>answer\n(.*?)(?:<\|im_end\|>|$)",
                      re.DOTALL)
OPEN, CLOSE = (r"<(?:think|thinking|thought|\|begin_of_thought\|)>",
               r"</(?:think|thinking|thought)>|<\|end_of_thought\|>")
TAG, SOLUTION = re.compile(f"{OPEN}|{CLOSE}"), re.compile(r"<\|(?:begin|end)_of_solution\|>")


def split_thinking(text: str) -> tuple[str, str]:
    """(thinking, answer) of a reply. The opening tag may be missing: some templates write it.

        <think>so 5</think>The answer is 5.
    """
    thoughts = []
    while block := re.match(rf"\s*{OPEN}(.*?)({CLOSE}|\Z)", text, re.DOTALL):
        thoughts.append(block[1])
        text = text[block.end():]
    if not thoughts and (close := re.search(CLOSE, text)):
        thoughts, text = [text[:close.start()]], text[close.end():]
    return "\n\n".join(thoughts), SOLUTION.sub("", text)


# ---- Questions ------------------------------------------------------------------------------


def load_questions(source: str | Path, split: str | None = None, seed: int = 0,
                   need_answer: bool = True, columns: dict | None = None) -> list[dict]:
    """[{"question", "answer"}] of a file or dataset. The answer is a string, an object that the
    task's checker understands, or None where `need_answer` is False and there is none."""
    names = {"answer": "reference"}

    def parse(row):
        row = row | {names.get(ours, ours): row.get(theirs)
                     for ours, theirs in (columns or {}).items()}
        return question_of(row, seed, need_answer)
    return parse_rows(source, read_rows(source, split), parse)


def question_of(row: dict, seed: int = 0, need_answer: bool = True) -> dict:
    """The question of a row. Options of a multiple choice stand under it, and the answer is a
    letter; GPQA's, which come with the right one first, are shuffled by `seed`."""
    question, answer = column(row, "question"), reference_of(row)
    if not isinstance(question, str) or not question.strip():
        raise ValueError("no question")
    options = column(row, "options")
    wrong = [str(value) for name, value in sorted(row.items())
             if str(name).lower().startswith("incorrect answer") and value]
    if wrong and not isinstance(answer, str):
        raise ValueError("no answer")
    if wrong:
        options, right = [answer, *wrong], answer
        random.Random(f"options {seed} {question}").shuffle(options)
        answer = LETTERS[options.index(right)] if len(options) <= len(LETTERS) else None
    elif options:
        options, answer = read_options(options, answer)
    if answer is None and need_answer:
        raise ValueError("no answer")
    if options:
        texts = [str(option).strip() for option in options]
        if len(set(texts)) < len(texts):
            raise ValueError("two options that are the same")
        lines = [f"{LETTERS[i]}) {text}" for i, text in enumerate(texts)]
        question = "\n".join([question.strip(), "", *lines])
    return {"question": question, "answer": answer}


def reference_of(row: dict) -> str | dict | None:
    """The reference answer of a row, None where it has none that an answer can be held against."""
    value = column(row, "reference")
    if isinstance(value, dict):
        return value
    if value is None and isinstance(value := column(row, "solution"), str | list):
        solution = str(value[0] if isinstance(value, list) else value)
        is_short = len(solution) < 100 and "boxed" not in solution          # s1K's, not prose
        value = extract_answer(solution) or (solution if is_short else None)
    if isinstance(value, list):
        value = ", ".join(str(item) for item in value if not isinstance(item, list | dict))
    text = clean("" if value is None else str(value)).rpartition("####")[2].strip()     # GSM8K
    return None if text.lower() in ("", "proof", "notfound") else text


def read_options(options: Any, answer: str | dict | None) -> tuple[list, str | None]:
    """The options of a multiple choice as a list, and the letter of the right one; the answer is
    given as a label, an index from 0 or the text of an option."""
    labels = list(LETTERS)
    if isinstance(options, dict):               # ARC: {"text", "label"}; others: {"A": text}
        labels, options = ((options["label"], options["text"]) if "label" in options
                           else (list(options), list(options.values())))
    if not isinstance(options, list) or len(options) > len(LETTERS):
        raise ValueError(f"options that are not a list of at most {len(LETTERS)}")
    places = {str(i): i for i in range(len(options))} | {
        str(label): i for i, label in enumerate(labels[:len(options)])} | {
        str(option).strip(): i for i, option in enumerate(options)}
    place = places.get(str(answer).strip().removesuffix(")").removeprefix("("))
    return options, None if place is None else LETTERS[place]


def token_examples(rows: list[tuple[str, dict]], vocab_size: int) -> list[tuple[list[int], int]]:
    """Examples of rows {"ids": [...]}, for pre-training: tokens as they are, all supervised."""
    for place, row in rows:
        ids = row.get("ids")
        if not isinstance(ids, list) or len(ids) < 2 or not all(
                type(i) is int and 0 <= i < vocab_size for i in ids):
            raise ValueError(f"{place}: not a list of two or more token ids below {vocab_size}")
    return [(row["ids"], 1) for _, row in rows]


# ---- JSONL files that grow ------------------------------------------------------------------


def open_jsonl(path: str | Path) -> tuple[BinaryIO, dict[str, dict]]:
    """A file to append rows to, locked, and the rows that it has, by their keys.

    A last line that a kill has torn is cut off. ValueError for a file with other lines, or one
    that another process writes to.
    """
    file, rows, end = open(path, "ab"), {}, 0
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:                         # Windows, where the file is not locked
        pass
    except BlockingIOError:
        raise ValueError(f"{path}: another process is writing to it") from None
    for number, line in enumerate(Path(path).read_bytes().splitlines(keepends=True), 1):
        torn = not line.endswith(b"\n")
        try:
            row = json.loads(line.decode())
            rows[row["key"] if "key" in row else row["teacher"]["key"]] = row
            file.write(b"\n" if torn else b"")
            end += len(line)
        except (ValueError, LookupError, TypeError, RecursionError):
            if not torn or not line.startswith(b'{"'[:len(line)]):
                raise ValueError(f"{path}, line {number}: not a row of this program") from None
            file.truncate(end)
    return file, rows


def append_jsonl(file: BinaryIO, row: dict) -> None:
    """Write one whole line and flush it."""
    file.write(json.dumps(row).encode() + b"\n")
    file.flush()


def request_key(*parts: Any) -> str:
    """A hash of all that a row is a function of, under which the row is found again."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def trace_row(question: dict, thinking: str, answer: str, finish: str | None, **teacher) -> dict:
    """A row of a file of traces, of a row of `load_questions` and a reply. `unfit` says why it is
    not trained on."""
    row = {"question": question["question"], "thinking": clean(thinking).strip(),
           "answer": clean(answer).strip()}
    if question["answer"] is not None:
        row["gtruth_answer"] = question["answer"]
    if finish != "stop":
        row["unfit"] = finish or "no finish reason"
    elif not row["thinking"] or not row["answer"]:
        row["unfit"] = "no answer" if row["thinking"] else "no thinking"
    return row | {"teacher": {"finish": finish, **teacher}}
