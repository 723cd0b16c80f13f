"""Rows of files as questions and traces, and JSONL files that grow."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from recipe import rows


def write(path, *objects):
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))
    return path


# ---- Traces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text, message", [
    ("", "is empty"), ("\n\n", "is empty"), ('{"question": "q"}\n{oops', "row 2: not JSON"),
    ("[1, 2", "not JSON"), ("[]", "is empty"),
    ('{"question": "q"}\n7', "row 2: not an object"), ("[" * 99999, "not JSON"),
    ('{"thinking": "t", "answer": "a"}', "no question.*row 1"),
    ('{"question": "q", "thinking": "t", "answer": " "}', "no answer.*row 1"),
    ('[{"question": "q", "thinking": "t", "answer": 5}]', "no answer.*row 1")])
def test_bad_traces_are_named(tmp_path, text, message):
    path = tmp_path / "traces.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        rows.load_traces(path)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        rows.read_rows(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary: not JSON"):
        rows.read_rows(tmp_path / "binary")


def test_traces_under_either_name_as_lines_or_list(tmp_path):
    ours = write(tmp_path / "a.jsonl", {"question": "q", "thinking": "t", "answer": "a"})
    theirs = tmp_path / "b.json"
    theirs.write_text("\ufeff" + json.dumps(
        [{"problem": "q", "gtruth_answer": "0", "message_thinking": "t", "message_content": "a"}]))
    assert rows.load_traces(ours) == rows.load_traces(theirs) == [("q", "t", "a")]


def test_traces_of_s1k(tmp_path):
    old = {"question": "q", "solution": "s", "thinking_trajectories": ["t"], "attempt": "a"}
    new = {"question": "q", "solution": "s", "gemini_thinking_trajectory": "gt",
           "gemini_attempt": "ga", "deepseek_thinking_trajectory": "dt", "deepseek_attempt": "da"}
    path = write(tmp_path / "s1k.jsonl", old, new)
    assert rows.load_traces(path) == [("q", "t", "a"), ("q", "dt", "da")]
    assert rows.load_traces(path, teacher="gemini")[1] == ("q", "gt", "ga")


def test_rows_that_are_not_used_are_counted_by_reason(tmp_path, capsys):
    good = {"question": "q", "thinking": "t", "answer": "a"}
    path = write(tmp_path / "t.jsonl", good, {**good, "unfit": "length"}, {**good, "thinking": ""},
                 {**good, "unfit": "length"}, good)
    assert len(rows.load_traces(path)) == 2
    error = capsys.readouterr().err
    assert "3 of 5 rows not used (2 unfit (length), 1 no thinking), first row 2" in error


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(r'{"question": "q\ud800", "thinking": "t", "answer": "a"}')
    assert rows.load_traces(path) == [("q?", "t", "a")]


@pytest.mark.parametrize("row, correct", [
    # OpenThoughts, with a system prompt beside the conversation
    ({"system": "s", "conversations": [
        {"from": "user", "value": "q"}, {"from": "assistant", "value":
         "<|begin_of_thought|>\n\nt\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\na\n\n"
         "<|end_of_solution|>"}]}, None),
    # Bespoke-Stratos, with a system prompt in it
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                        {"from": "gpt", "value": "<think>t</think>a"}]}, None),
    # OpenR1-Math-220k: the first generation that is right
    ({"problem": "q", "solution": "s", "answer": "5", "generations": ["<think>x</think>y",
      "<think>t</think>a"], "correctness_math_verify": [False, True], "messages": []}, True),
    ({"problem": "q", "answer": "5", "generations": ["<think>t</think>a", "z"],
      "correctness_math_verify": [False, False]}, False),
    # Mixture-of-Thoughts
    ({"messages": [{"role": "user", "content": "q"},
                   {"role": "assistant", "content": "<think>\nt\n</think>\n\na"}]}, None),
    # LIMO
    ({"question": "q", "solution": "t", "answer": "a"}, None),
    # s1K_tokenized
    ({"text": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
              "<|im_start|>assistant\n<|im_start|>think\nt\n<|im_start|>answer\na<|im_end|>"},
     None)])
def test_traces_of_the_fields_datasets(tmp_path, row, correct):
    (found, trace), = rows.usable_traces(write(tmp_path / "t.jsonl", row))
    assert tuple(part.strip() for part in trace) == ("q", "t", "a")
    assert found.get("correct") is correct


@pytest.mark.parametrize("row, reason", [
    ({"question": "q", "thinking": "t", "answer": "a</think>b"}, "a thinking tag in the answer"),
    ({"messages": [{"role": "user", "content": "q"},
                   {"role": "assistant", "content": "t</think><think>a"}]}, "a thinking tag"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
     "no thinking"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 2},
     "not one question and one answer"),
    ({"messages": ["q"]}, "an unknown shape"), ({"messages": "q"}, "an unknown shape"),
    ({"question": "q", "generations": 5}, "an unknown shape")])
def test_traces_that_are_not_understood_are_never_used(tmp_path, row, reason):
    with pytest.raises(ValueError, match=reason):
        rows.load_traces(write(tmp_path / "t.jsonl", row))


def test_columns_of_their_own_come_before_a_conversation(tmp_path):
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "no tags"}]
    row = {"question": "q", "thinking": "t", "answer": "a", "messages": turns, "generations": ["y"],
           "text": "z"}
    assert rows.load_traces(write(tmp_path / "t.jsonl", row)) == [("q", "t", "a")]


def test_columns_can_be_mapped(tmp_path):
    path = write(tmp_path / "t.jsonl", {"ask": "q", "cot": "t", "say": "a", "key": "5"})
    with pytest.raises(ValueError, match="no question.*the columns are ask, cot, say, key"):
        rows.load_traces(path)
    columns = rows.parse_columns("question=ask,thinking=cot,answer=say")
    assert rows.load_traces(path, columns=columns) == [("q", "t", "a")]
    question, = rows.load_questions(path, columns=rows.parse_columns("question=ask,answer=key"))
    assert question == {"question": "q", "answer": "5"}
    for text in ("question", "reply=a"):
        with pytest.raises(ValueError):
            rows.parse_columns(text)


def test_token_rows(tmp_path):
    found = rows.read_rows(write(tmp_path / "t.jsonl", {"ids": [3, 4, 5]}))
    assert rows.token_examples(found, 6) == [([3, 4, 5], 1)]
    for ids in ([3], [3, 5], [3, -1], [3, True], "34", None):
        with pytest.raises(ValueError, match="row 1: not a list of two or more token ids below 5"):
            rows.token_examples(rows.read_rows(write(tmp_path / "t.jsonl", {"ids": ids})), 5)


# ---- Questions ------------------------------------------------------------------------------


def load(tmp_path, *objects, **options):
    return rows.load_questions(write(tmp_path / "q.jsonl", *objects), **options)


def test_questions_under_the_names_of_datasets(tmp_path):
    assert load(tmp_path, {"problem": "p", "solution": "s", "answer": "5", "level": 1},
                {"question": "q", "answer": 23}) == [
        {"question": "p", "answer": "5"}, {"question": "q", "answer": "23"}]
    assert load(tmp_path, {"question": "q", "solution": "so \\boxed{7}."})[0]["answer"] == "7"
    assert load(tmp_path, {"question": "q", "answer": {"numbers": [1], "target": 1}}) == [
        {"question": "q", "answer": {"numbers": [1], "target": 1}}]
    assert load(tmp_path, {"question": "q"}, need_answer=False) == [
        {"question": "q", "answer": None}]
    for row, message in (({"question": "q"}, "no answer"), ({"answer": "5"}, "no question")):
        with pytest.raises(ValueError, match=rf"{message}\), first row 1; the columns are "):
            load(tmp_path, row)


def test_options_are_shuffled_by_seed(tmp_path):
    gpqa = {"Question": "Which?", "Correct Answer": "yes", "Incorrect Answer 1": "no",
            "Incorrect Answer 2": "maybe", "Incorrect Answer 3": "never"}
    letters = set()
    for seed in range(20):
        made, = load(tmp_path, gpqa, seed=seed)
        assert f"{made['answer']}) yes" in made["question"] and "D) " in made["question"]
        assert load(tmp_path, gpqa, seed=seed) == [made]
        letters.add(made["answer"])
    assert letters == set("ABCD")
    with pytest.raises(ValueError, match="two options that are the same"):
        load(tmp_path, {**gpqa, "Incorrect Answer 1": " yes"})
    # Columns that are null make no multiple choice.
    blank = {"question": "q", "answer": "5", "Incorrect Answer 1": None}
    assert load(tmp_path, blank) == [{"question": "q", "answer": "5"}]


@pytest.mark.parametrize("row, question, answer", [
    ({"question": "q", "answer": "3 + 4 = <<3+4=7>>7 eggs\n#### 1,007"}, "q", "1,007"),      # GSM8K
    ({"Problem": "q", "Answer": 23}, "q", "23"),                                            # AIME
    ({"question": "q", "choices": ["w", "x", "y"], "answer": 2, "subject": "s"},            # MMLU
     "q\n\nA) w\nB) x\nC) y", "C"),
    ({"question": "q", "answerKey": "B",                                                    # ARC
      "choices": {"text": ["x", "y"], "label": ["A", "B"]}}, "q\n\nA) x\nB) y", "B"),
    ({"question": "q", "answerKey": "2", "choices": {"text": ["x", "y"], "label": ["1", "2"]}},
     "q\n\nA) x\nB) y", "B"),
    ({"question": "q", "options": ["x", "y"], "answer": "y"}, "q\n\nA) x\nB) y", "B"),
    ({"question": "q", "options": {"A": "x", "B": "y"}, "answer": "(B)"}, "q\n\nA) x\nB) y", "B"),
    ({"question": "q", "options": ["x", "y"], "answer": "B"}, "q\n\nA) x\nB) y", "B"),
    ({"question": "q", "options": [], "answer": "5"}, "q", "5"),
    ({"question": "q", "solution": ["so 5"], "final_answer": ["5"]}, "q", "5"),    # OlympiadBench
    ({"question": "q", "solution": ["so $\\boxed{5}$"], "final_answer": None}, "q", "5"),
    ({"problem": "q", "solution": "so $\\boxed{5}$."}, "q", "5"),                      # NuminaMath
    ({"question": "q", "answer": ["7"]}, "q", "7"),
    ({"question": "q", "answer": 0}, "q", "0"),
    ({"question": "q", "solution": "128", "cot_type": "math"}, "q", "128")])                # s1K
def test_questions_of_the_fields_datasets(tmp_path, row, question, answer):
    assert load(tmp_path, row) == [{"question": question, "answer": answer}]


@pytest.mark.parametrize("row", [
    {"question": "q", "answer": "proof"}, {"question": "q", "answer": "NotFound"},
    {"question": "q", "options": ["x", "y"], "answer": "z"},
    {"question": "q", "choices": ["x", "y"], "answer": 2},
    {"problem": "q", "solution": "A proof in prose. " * 20}, {"question": "q", "answer": []},
    {"question": "q", "choices": ["x", "x"], "answer": 1},
    {"question": "q", "choices": "xy", "answer": "x"}])
def test_a_reference_that_cannot_be_read_is_refused(tmp_path, row):
    with pytest.raises(ValueError, match="1 of 1 rows not used"):
        load(tmp_path, row)


def test_one_bad_row_is_counted_and_the_others_are_asked(tmp_path, capsys):
    found = load(tmp_path, {"question": "q", "answer": "5"}, {"question": "r", "answer": "proof"})
    assert found == [{"question": "q", "answer": "5"}]
    assert "1 of 2 rows not used (1 no answer), first row 2" in capsys.readouterr().err


# ---- Datasets -------------------------------------------------------------------------------


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="`pip install datasets`"):
        rows.read_rows("owner/name")


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "HF_DATASETS_OFFLINE", True)
    library.disable_progress_bars()
    return library


def test_parquet_and_csv(datasets, tmp_path):
    made = datasets.Dataset.from_list([{"question": "q", "answer": "5"}])
    made.to_parquet(tmp_path / "q.parquet")
    made.to_csv(tmp_path / "q.csv")
    for name in ("q.parquet", "q.csv"):
        question, = rows.load_questions(tmp_path / name)
        assert question == {"question": "q", "answer": "5"}


def test_a_folder_of_several_splits_asks_for_one(datasets, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", {"question": "seen", "answer": "5"})
    write(folder / "test.jsonl", {"question": "held out", "answer": "5"})
    question, = rows.load_questions(folder, "test")
    assert question["question"] == "held out"
    for split in (None, "validation"):
        with pytest.raises(ValueError, match="--split is one of train, test"):
            rows.load_questions(folder, split)


def test_what_is_no_dataset_is_one_clear_error(datasets, tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing")
    for source in (tmp_path / "bad.parquet", tmp_path / "nowhere", "owner/missing"):
        with pytest.raises(ValueError, match="not a dataset that can be loaded"):
            rows.read_rows(source)


# ---- JSONL ----------------------------------------------------------------------------------


def test_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    for torn in ('{"', '{"key": "b", "te'):
        path.write_text('{"key": "a"}\n' + torn)
        file, found = rows.open_jsonl(path)
        rows.append_jsonl(file, {"key": "c"})
        file.close()
        assert list(found) == ["a"] and path.read_text() == '{"key": "a"}\n{"key": "c"}\n'


def test_a_last_line_without_its_line_break_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "teacher": {"key": "a"}}')
    file, found = rows.open_jsonl(path)
    rows.append_jsonl(file, {"key": "b"})
    file.close()
    assert list(found) == ["a"] and len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("content", [
    b"my notes", b"my notes\n", b'{"question": "q"}\n', b"[1]\n", b"\n", b'{"key": "a"}\nnotes',
    b'{"question": "\xed\xa0\x80", "teacher": {"key": "k"}}\n', b"[" * 100_000 + b"\n"])
def test_a_file_of_another_kind_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a row of this program"):
        rows.open_jsonl(path)
    assert path.read_bytes() == content


def test_a_file_has_one_writer(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "rows.jsonl"
    file, _ = rows.open_jsonl(path)
    second = subprocess.run(
        [sys.executable, "-c", f"from recipe import rows; rows.open_jsonl({str(path)!r})"],
        cwd=ROOT, capture_output=True, text=True)
    file.close()
    assert second.returncode and "another process is writing to it" in second.stderr


def test_the_key_is_a_function_of_all_parts():
    keys = {rows.request_key(*parts) for parts in (
        ("a", 1), ("a", 2), ("b", 1), ("a", {"x": 1}), ("a", {"x": 2}))}
    assert len(keys) == 5
    assert rows.request_key({"x": 1, "y": 2}) == rows.request_key({"y": 2, "x": 1})


def test_why_a_trace_is_unfit():
    question = {"question": "q", "answer": "5"}
    row = rows.trace_row(question, " t ", " a ", "stop", model="m", key="k")
    assert row == {"question": "q", "thinking": "t", "answer": "a", "gtruth_answer": "5",
                   "teacher": {"finish": "stop", "model": "m", "key": "k"}}
    for thinking, answer, finish, unfit in (
            ("t", "a", "length", "length"), ("t", "a", None, "no finish reason"),
            ("", "a", "stop", "no thinking"), ("t", " ", "stop", "no answer")):
        assert rows.trace_row(question, thinking, answer, finish)["unfit"] == unfit
