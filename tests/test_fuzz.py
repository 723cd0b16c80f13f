"""Broken input is refused in one line: a few inputs of each target of tests/fuzz.py, and one case
of each kind of fault that it has found."""
import json
import shutil
import time

import fuzz
import pytest
from conftest import FIXTURES

from data import Chat
from model import Transformer, read_config
from recipe import grading, rows
from recipe.cli import exit_on_user_error

LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
          "original_max_position_embeddings": 32}
DEEP, DIGITS = "[" * 100_000, "9" * 5000
GOOD = {"question": "q", "thinking": "t", "answer": "5"}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_few_inputs_of_each_target(name):
    slow = name in ("config", "tokenizer", "template", "answers")
    line, faults = fuzz.run_target(name, range(30 if slow else 100), seed=1)
    assert not faults, f"{line} {faults}"


# ---- The terminal ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("a\x1b[2Jb\nc\td"), OSError("a\x1b[2Jb\nc\td")])
def test_an_error_is_one_line_without_control_characters(capsys, error):
    with pytest.raises(SystemExit), exit_on_user_error():
        raise error
    said = capsys.readouterr().err
    assert said.startswith("error: a\\x1b[2Jb c") and said.count("\n") == 1 and "\t" not in said


def test_reasons_are_printed_without_control_characters(tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps({'unfit': chr(27)})}\n")
    rows.load_traces(path)
    assert "\x1b" not in capsys.readouterr().err


# ---- Models ---------------------------------------------------------------------------------


def copy_family(name, directory):
    shutil.copytree(FIXTURES / name, directory, dirs_exist_ok=True)


@pytest.mark.parametrize("changes", [
    {"vocab_size": 10**30}, {"num_hidden_layers": 10**9}, {"intermediate_size": 10**17},
    {"head_dim": 2 * 10**17}, {"rope_parameters": {"rope_theta": 10**30}},
    {"rms_norm_eps": 10**400}, {"rope_parameters": {**LLAMA3, "factor": 0}}])
def test_absurd_sizes_are_refused_at_once(tmp_path, changes):
    copy_family("qwen2", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    start = time.process_time()
    with pytest.raises(ValueError, match="config.json"):
        Transformer.load(tmp_path)
    assert time.process_time() - start < 1


def test_deeply_nested_json_is_refused(tmp_path):
    copy_family("qwen3", tmp_path)
    (tmp_path / fuzz.INDEX).write_text(DEEP)
    with pytest.raises(ValueError, match="index"):
        Transformer.load(tmp_path)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text(DEEP)
    with pytest.raises(ValueError, match="config.json"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="tokenizer.json"):
        Chat(tmp_path)
    copy_family("llama", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(DEEP)
    with pytest.raises(ValueError, match="tokenizer_config.json"):
        Chat(tmp_path)


def test_a_config_with_nested_entries_can_be_written_again(tmp_path):
    raw, nested = (FIXTURES / "qwen2" / "config.json").read_text(), "[" * 500 + "]" * 500
    (tmp_path / "config.json").write_text(f'{raw.rstrip()[:-1]}, "other": {nested}}}')
    assert json.dumps(read_config(tmp_path).to_dict()["other"]) == nested


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "\0.safetensors",
                                  "\ud800.safetensors", "a\t.safetensors", 7, None])
def test_a_shard_has_a_plain_file_name(tmp_path, name):
    copy_family("qwen3", tmp_path / "model")
    shutil.copy(FIXTURES / "qwen2" / "model.safetensors", tmp_path / "x.safetensors")
    (tmp_path / "model" / fuzz.INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        Transformer.load(tmp_path / "model")


# ---- Tokenizers -----------------------------------------------------------------------------


def change_tokenizer(family, directory, change):
    """A copy of a family's directory in which `change` edits the JSON of the tokenizer."""
    copy_family(family, directory)
    path = directory / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def rename_token(old, new):
    """A change for `change_tokenizer`: an added token gets another name, or is removed (None)."""
    def change(raw):
        raw["added_tokens"] = [token | {"content": new} if token["content"] == old else token
                               for token in raw["added_tokens"] if new or token["content"] != old]
    return change


def test_a_panic_of_the_tokenizers_library_is_an_error(tmp_path):
    def change(raw):
        raw["model"]["continuing_subword_prefix"] = "x" * 50        # longer than what is merged
    change_tokenizer("qwen2", tmp_path, change)
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        Chat(tmp_path)


@pytest.mark.parametrize("family, name", [
    ("r1", "<｜end▁of▁sentence｜>"), ("llama", "<|eot_id|>"), ("qwen2", "<|im_end|>")])
def test_an_answer_ends_with_a_control_token(tmp_path, family, name):
    change_tokenizer(family, tmp_path, rename_token(name, None))
    with pytest.raises(ValueError):
        Chat(tmp_path)


def test_control_tokens_have_the_ids_of_the_library(tmp_path):
    def change(raw):                                # the library numbers them in its own way
        rename_token("<|end_of_text|>", None)(raw)
        raw["added_tokens"] = [token | {"id": token["id"] + 5} for token in raw["added_tokens"]]
    change_tokenizer("llama", tmp_path, change)
    chat = Chat(tmp_path)
    assert chat.decode([chat.end_id]) == "<|eot_id|>"


@pytest.mark.parametrize("name", ["{", "question"])
def test_a_control_token_does_not_break_the_prompt(tmp_path, name):
    change_tokenizer("r1", tmp_path, rename_token("<think>", name))
    chat = Chat(tmp_path)
    assert "2+3?" in chat.decode(chat.prompt("2+3?"))


def test_the_longest_control_token_counts(tmp_path):
    change_tokenizer("qwen2", tmp_path, rename_token("<|endoftext|>", "<"))
    chat = Chat(tmp_path)
    assert chat.decode([chat.end_id]) == "<|im_end|>"


@pytest.mark.parametrize("template", fuzz.TEMPLATES)
def test_a_hostile_template_ends_soon(tmp_path, template):
    """It is refused, or does no harm."""
    copy_family("qwen2", tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.write_text(template + path.read_text(), encoding="utf-8", errors="replace")
    start = time.process_time()
    fuzz.accepts(fuzz.use_chat, tmp_path)
    assert time.process_time() - start < 5


# ---- Rows -----------------------------------------------------------------------------------


def test_numbers_of_thousands_of_digits_are_named_by_their_place(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"question": "q"}}\n{{"question": {DIGITS}}}\n')
    with pytest.raises(ValueError, match="row 2: not JSON"):
        rows.read_rows(path)
    path.write_text(f"[{DIGITS}]")
    with pytest.raises(ValueError, match="t.jsonl: not JSON"):
        rows.read_rows(path)


@pytest.mark.parametrize("row", [
    {"question": 7, "answer": "5"}, {"question": " ", "answer": "5"},
    {"question": "q", "solution": "so \\boxed{5"}, {"question": "q", "answer": [[]]},
    {"question": "q", "Incorrect Answer 1": "b"},
    {"question": "q", "Correct Answer": {"x": 1}, "Incorrect Answer 1": "b"},
    {"question": "q", "Correct Answer": "a"} | {f"Incorrect Answer {i}": "b" for i in range(8)},
    {"question": "q", "Correct Answer": "2", "Incorrect Answer 1": "2 "}])
def test_questions_that_cannot_be_graded_are_counted(tmp_path, capsys, row):
    (tmp_path / "q.jsonl").write_text(f"{json.dumps({'question': 'q', 'answer': '5'})}\n"
                                      f"{json.dumps(row)}")
    assert len(rows.load_questions(tmp_path / "q.jsonl")) == 1
    assert "1 of 2 rows not used" in capsys.readouterr().err


def test_empty_columns_are_passed_over(tmp_path):
    """A table of several sources has every column in every row."""
    table = [{"question": "q", "answer": None, "solution": "so \\boxed{5}."},
             {"problem": "1+1?", "answer": "2", "Incorrect Answer 1": None}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, table)))
    assert rows.load_questions(tmp_path / "q.jsonl") == [
        {"question": "q", "answer": "5"}, {"question": "1+1?", "answer": "2"}]


def test_the_box_stays_in_every_option(tmp_path):
    row = {"Question": "q", "Correct Answer": "\\boxed{5}", "Incorrect Answer 1": "\\boxed{6}"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    assert "\\boxed{5}" in rows.load_questions(tmp_path / "q.jsonl")[0]["question"]


# ---- Answers --------------------------------------------------------------------------------


def test_no_answer_takes_long():
    start = time.process_time()
    grading.equal("5" + "a" * 60 + "!", "5")                # a unit, but for its end
    assert time.process_time() - start < 1


def test_the_end_of_a_long_answer_counts():
    assert grading.equal("1" * 1000 + "2", "1" * 1000 + "2")
    assert not grading.equal("1" * 1000 + "2", "1" * 1000 + "3")
