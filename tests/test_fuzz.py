"""What comes from outside is refused in one line: a little of each target of tests/fuzz.py, and one
case of each fault that it has found."""
import json
import shutil
import time
from types import SimpleNamespace

import pytest

import data
import fuzz
from conftest import ROOT
from data import BadInput, Chat, load_questions, quality, right, split_message, tokens_used
from model import INDEX, BadModel, Transformer, read_config

FIXTURES = ROOT / "tests" / "fixtures"
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
          "original_max_position_embeddings": 32}
DEEP, DIGITS = "[" * 100_000, "9" * 5000


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_few_inputs_of_each_target(name):
    line, faults = fuzz.fuzz(name, 60 if name == "chat" else 150, seed=1)
    assert not faults, line


@pytest.mark.parametrize("changed, said", [
    ({"vocab_size": 10**30}, "vocab_size"), ({"num_hidden_layers": 10**9}, "layers"),
    ({"intermediate_size": 10**17}, "layers with"), ({"head_dim": 2 * 10**17}, "layers with"),
    ({"rope_parameters": {"rope_theta": 10**30}}, "rope_theta"), ({"rms_norm_eps": 10**400}, "eps"),
    ({"tie_word_embeddings": "false"}, "not true or false"),
    ({"rope_parameters": {**LLAMA3, "factor": 0}}, "factor"),
    ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4}}, "below")])
def test_absurd_sizes_are_refused_before_anything_is_built(tmp_path, changed, said):
    raw = json.loads((FIXTURES / "qwen2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changed))
    start = time.process_time()
    with pytest.raises(BadModel, match=said):
        Transformer.load(tmp_path)
    assert time.process_time() - start < 1


def test_what_is_nested_deep_is_no_json(tmp_path):
    for name in ("config.json", INDEX, "t.jsonl"):
        (tmp_path / name).write_text(DEEP + "\n")
    with pytest.raises(BadModel, match="no JSON"):
        read_config(tmp_path)
    with pytest.raises(BadInput, match="no JSON"):
        data.read_object(tmp_path / "config.json")
    with pytest.raises(BadInput, match="no row of a teacher"):
        data.open_traces(tmp_path / "t.jsonl")
    shutil.copy(FIXTURES / "qwen3" / "config.json", tmp_path)
    with pytest.raises(BadModel, match="no index"):
        Transformer.load(tmp_path)


def test_a_config_nested_deep_can_be_written_again(tmp_path):
    raw = json.loads((FIXTURES / "qwen2" / "config.json").read_text())
    nested = "[" * 500 + "]" * 500
    (tmp_path / "config.json").write_text(json.dumps(raw)[:-1] + f', "other": {nested}}}')
    assert json.dumps(read_config(tmp_path).to_dict()["other"]) == nested


@pytest.mark.parametrize("name", ["\0.safetensors", "\ud800.safetensors", "a\t.safetensors"])
def test_a_shards_name_is_one_that_a_file_can_have(tmp_path, name):
    shutil.copy(FIXTURES / "qwen3" / "config.json", tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(BadModel, match="no plain name"):
        Transformer.load(tmp_path)


@pytest.mark.parametrize("error", [BadInput("a\x1b[2Jb\nc\td"), OSError("a\x1b[2Jb\nc\td")])
def test_a_complaint_is_one_line_that_steers_no_terminal(capsys, error):
    with pytest.raises(SystemExit), data.complaints():
        raise error
    assert capsys.readouterr().err == "error: a\\x1b[2Jb c\\td\n"


def test_reasons_steer_no_terminal(tmp_path, capsys):
    good = {"question": "q", "thinking": "t", "answer": "5"}
    (tmp_path / "t.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps({'unfit': chr(27)})}\n")
    data.load_traces(tmp_path / "t.jsonl", verbose=True)
    assert "\x1b" not in capsys.readouterr().err


def test_numbers_of_thousands_of_digits_are_named_by_their_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"question": "q"}}\n{{"question": {DIGITS}}}\n')
    with pytest.raises(BadInput, match="line 2: no JSON"):
        data.read_rows(path)
    path.write_text(f"[{DIGITS}]")
    with pytest.raises(BadInput, match="t.jsonl: no JSON"):
        data.read_rows(path)


@pytest.mark.parametrize("row, said", [
    ({"question": 7, "answer": "5"}, "no question"),
    ({"question": " ", "answer": "5"}, "no question"),
    ({"question": "q", "answer": {"numbers": [1]}}, "no reference answer"),
    ({"question": "q", "answer": {"numbers": 1, "target": 1}}, "no reference answer"),
    ({"question": "q", "answer": {"numbers": [1, "x"], "target": 1}}, "no reference answer"),
    ({"question": "q", "solution": "so \\boxed{5"}, "no answer"),
    ({"question": "q", "Incorrect Answer 1": "b"}, "no answer"),
    ({"question": "q", "Correct Answer": "a"} | {f"Incorrect Answer {i}": "b" for i in range(8)},
     "8 options"),
    ({"question": "q", "Correct Answer": "2", "Incorrect Answer 1": "2 "}, "the same")])
def test_questions_that_cannot_be_graded_are_named(tmp_path, row, said):
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    with pytest.raises(BadInput, match=f"line 1: .*{said}"):
        load_questions(tmp_path / "q.jsonl", graded="Incorrect Answer 1" not in row)


def test_a_column_of_nothing_is_no_column(tmp_path):
    """A table of several sources has every column in every row."""
    rows = [{"question": "q", "answer": None, "solution": "so \\boxed{5}."},
            {"problem": "1+1?", "answer": "2", "Incorrect Answer 1": None}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_questions(tmp_path / "q.jsonl") == [
        {"question": "q", "answer": "5"}, {"question": "1+1?", "answer": "2"}]


def test_half_a_surrogate_pair_is_mended(tmp_path):
    row = {"question": "a\ud800", "thinking": "b\ud800", "answer": "c\ud800"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    assert data.load_traces(tmp_path / "t.jsonl") == [("a?", "b?", "c?")]
    assert load_questions(tmp_path / "t.jsonl") == [{"question": "a?", "answer": "c?"}]


def test_verdicts_of_references_of_every_type(tmp_path):
    assert right({"gtruth_answer": 5}, ("q", "t", "Answer: 5")) is True
    with pytest.raises(BadInput, match="no reference answer"):
        right({"gtruth_answer": {"x": 1}}, ("q", "t", "Answer: 5"))
    good = {"question": "q", "thinking": "t", "answer": "5"}
    (tmp_path / "p.jsonl").write_text(json.dumps(good))
    (tmp_path / "v.jsonl").write_text(json.dumps({"question": ["q"], "correct": True}))
    data.select(SimpleNamespace(
        pool=tmp_path / "p.jsonl", benchmarks=[], verdicts=[tmp_path / "v.jsonl"], words=8, n=1,
        out=tmp_path / "o.jsonl", overwrite=False, method="s1k", seed=0, domain=None, sources=[],
        verbose=False, seed_length=0, teacher="deepseek"))


@pytest.mark.parametrize("said", [{"family": ["qwen3"]}, {"thinking": {"s1": 1}}])
def test_a_format_is_a_name(tmp_path, said):
    shutil.copy(FIXTURES / "qwen2" / "tokenizer.json", tmp_path)
    (tmp_path / "chat.json").write_text(json.dumps(said))
    with pytest.raises(BadInput, match="known"):
        Chat(tmp_path)


def test_stop_tokens_are_tokens(tmp_path):
    shutil.copy(FIXTURES / "qwen2" / "tokenizer.json", tmp_path)
    config = {"eos_token_id": [True, -1, 0, 10**30, 10**6]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    chat = Chat(tmp_path)
    assert chat.stops == {chat.end, 0}


def test_a_panic_of_the_tokenizers_library_is_one_line(tmp_path):
    raw = json.loads((FIXTURES / "qwen2" / "tokenizer.json").read_text())
    raw["model"]["continuing_subword_prefix"] = "x" * 50        # longer than what is merged
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(BadInput, match="cannot be read as a tokenizer"):
        Chat(tmp_path)


def rename(source, target, old, new):
    """A copy of a tokenizer with an added token renamed, or left out."""
    raw = json.loads((FIXTURES / source / "tokenizer.json").read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if new or token["content"] != old]
    for token in raw["added_tokens"]:
        token["content"] = new if token["content"] == old else token["content"]
    (target / "tokenizer.json").write_text(json.dumps(raw))


def test_a_turn_ends_with_a_control_token(tmp_path):
    for source, name in (("r1", "<｜end▁of▁sentence｜>"), ("llama", "<|end_header_id|>")):
        rename(source, tmp_path, name, None)
        with pytest.raises(BadInput, match="known chat format"):
            Chat(tmp_path)


def test_control_tokens_have_the_ids_of_the_library(tmp_path):
    rename("llama", tmp_path, "<|end_of_text|>", None)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["id"] += 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    chat = Chat(tmp_path)
    assert chat.decode([chat.end]) == "<|eot_id|>"


@pytest.mark.parametrize("name", ["{", "question"])
def test_a_control_token_does_not_tear_a_template(tmp_path, name):
    rename("r1", tmp_path, "<think>", name)
    chat = Chat(tmp_path)
    assert "2+3?" in chat.decode(chat.prompt("2+3?"))


def test_the_longest_control_token_counts(tmp_path):
    rename("qwen2", tmp_path, "<|endoftext|>", "<")
    chat = Chat(tmp_path)
    assert chat.decode([chat.end]) == "<|im_end|>"


def test_what_is_gone_on_with_can_be_read(tmp_path):
    path, line = tmp_path / "t.jsonl", b'{"question": "\xed\xa0\x80", "teacher": {"key": "k"}}\n'
    path.write_bytes(line)
    with pytest.raises(BadInput, match="no row of a teacher"):
        data.open_traces(path)
    assert path.read_bytes() == line


@pytest.mark.parametrize("read, written, total", [
    (5, -10, 0), (-5, 10, 0), (10**400, 5, 0), (5, 10**400, 0), (10**400, 5, 0.5)])
def test_a_usage_that_cannot_be_is_none(read, written, total):
    assert tokens_used({"prompt_tokens": read, "completion_tokens": written,
                        "total_tokens": total}) is None


@pytest.mark.parametrize("call", [
    lambda: data.equal("5" + "a" * 60 + "!", "5"),                      # a unit, if not for the end
    lambda: quality({}, (" " * 50_000 + "x", "t", "a")),                # a drawing's beginning
    lambda: quality({}, ("\n" * 50_000 + "x", "t", "a")),               # a number's
    lambda: split_message({"content": "<think></think>" * 100_000})])
def test_no_text_takes_a_second(call):
    start = time.process_time()
    call()
    assert time.process_time() - start < 1


def test_the_end_of_a_long_answer_counts():
    assert data.equal("1" * 1000 + "2", "1" * 1000 + "2")
    assert not data.equal("1" * 1000 + "2", "1" * 1000 + "3")


def test_wrong_options_are_written_as_the_right_one(tmp_path):
    row = {"Question": "q", "Correct Answer": "\\boxed{5}", "Incorrect Answer 1": "\\boxed{6}"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    assert "\\boxed{5}" in load_questions(tmp_path / "q.jsonl")[0]["question"]
