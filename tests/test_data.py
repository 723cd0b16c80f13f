"""Loss mask, packing, the order of an epoch, and the command line of data.py."""
import itertools
import json
import random

import pytest
import torch
from conftest import BASE

import data
from data import collate, count_tokens, epoch_batches, pack_sequences, shift_labels
from recipe import cli, cost


def random_examples(n, longest, seed=0):
    rng = random.Random(seed)
    return [([rng.randint(0, 99) for _ in range(rng.randint(2, longest))], 1) for _ in range(n)]


def test_labels_are_shifted_by_one():
    assert shift_labels([5, 6, 7, 8], 2) == [-100, 7, 8, -100]
    assert shift_labels([5, 6, 7], 1) == [6, 7, -100]


def test_packing_keeps_every_token_once_and_restarts_positions():
    examples = random_examples(40, 50)
    rows, documents = [collate(row) for row in pack_sequences(examples, 64)], []
    for row in rows:
        assert row["ids"].shape == row["positions"].shape == row["labels"].shape
        assert row["ids"].shape[1] == sum(row["lengths"]) <= 64
        for ids, positions, labels in zip(*(row[key][0].split(row["lengths"])
                                            for key in ("ids", "positions", "labels")),
                                          strict=True):
            assert positions.tolist() == list(range(len(ids)))
            assert labels.tolist() == shift_labels(ids.tolist(), 1)
            documents.append(ids.tolist())
    assert sorted(documents) == sorted(ids for ids, _ in examples)
    assert count_tokens(examples) / (64 * len(rows)) > 0.9      # best fit leaves little space


def test_rows_of_s1s_lengths_are_full():
    """1,000 traces with a mean of about 4,700 tokens, in rows of 32,768."""
    rng = random.Random(0)
    lengths = [min(30000, round(rng.lognormvariate(8.25, 0.62))) for _ in range(1000)]
    assert 4000 < sum(lengths) / 1000 < 5400
    packed = pack_sequences([([0] * n, 1) for n in lengths], 32768)
    assert sorted(len(ids) for row in packed for ids, _ in row) == sorted(lengths)
    assert all(count_tokens(row) <= 32768 for row in packed)
    assert sum(lengths) / (32768 * len(packed)) >= 0.95


def test_the_longest_example_is_placed_first():
    examples = [([0] * n, 1) for n in (4, 4, 6, 6)]
    assert [count_tokens(row) for row in pack_sequences(examples, 10)] == [10, 10]


def test_processes_share_the_tokens_of_a_step_evenly():
    """s1's lengths, sixteen examples a step: no process waits long."""
    rng, busy = random.Random(0), {}
    for processes in (2, 4, 8):
        used = slots = 0
        for _ in range(20):
            examples = [([0] * min(30000, round(rng.lognormvariate(8.25, 0.62))), 1)
                        for _ in range(16)]
            lengths = [count_tokens(row) for row in pack_sequences(examples, 32768, processes)]
            used += sum(lengths)
            slots += cost.token_slots(lengths, processes)
        busy[processes] = used / slots
    assert busy[2] > 0.95 and busy[4] > 0.9 and busy[8] > 0.6


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_get_rows_of_similar_length(processes):
    examples = random_examples(40, 50)
    rows = pack_sequences(examples, 200, processes)
    assert sorted(ids for row in rows for ids, _ in row) == sorted(ids for ids, _ in examples)
    assert all(count_tokens(row) <= 200 for row in rows)
    rounds = -(-len(pack_sequences(examples, 200)) // processes)
    assert -(-len(rows) // processes) == rounds                 # no further round
    lengths = [count_tokens(row) for row in rows]
    slots = processes * sum(max(lengths[i:i + processes]) for i in range(0, len(rows), processes))
    assert sum(lengths) / slots > 0.85


def test_the_order_is_a_function_of_seed_and_epoch():
    examples = list(range(10))
    batches = list(epoch_batches(examples, 4, 0, 0))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(itertools.chain(*batches)) == examples
    assert batches == list(epoch_batches(examples, 4, 0, 0))
    assert batches != list(epoch_batches(examples, 4, 0, 1))
    assert batches != list(epoch_batches(examples, 4, 1, 0))


@pytest.mark.parametrize("device, capability, stored, expected", [
    ("cuda:1", "", {}, "bfloat16"), ("mps", "amx_bf16", {"dtype": "bfloat16"}, "float32"),
    ("cpu", "", {"dtype": "bfloat16"}, "float32"),
    ("cpu", "avx512_bf16", {"dtype": "float32"}, "float32"),
    ("cpu", "avx512_bf16", {"torch_dtype": "bfloat16"}, "bfloat16"),
    ("cpu", "amx_bf16", {"dtype": "bfloat16"}, "bfloat16")])
def test_bf16_where_the_device_and_the_model_have_it(monkeypatch, device, capability, stored,
                                                      expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    assert cli.default_dtype(device, stored) == expected


def test_escape_leaves_no_control_character():
    assert cli.escape("a\x1b[31m\n\x07é") == "a\\x1b[31m\n\\x07é"


def test_show_marks_what_is_supervised(run, monkeypatch):
    code, printed, _ = run("data", "show", "--n", 1)
    assert code == 0 and "<|im_start|>assistant\n[<|im_start|>think\n" in printed
    assert printed.endswith("\n]\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\033[32m<|im_start|>think" in run("data", "show", "--n", 1)[1]


def test_show_prints_the_system_prompt_in_use(run):
    assert "You are Qwen" in run("data", "show", "--n", 1)[1]
    printed = run("data", "show", "--n", 1, "--system", "Be brief.")[1]
    assert "<|im_start|>system\nBe brief.<|im_end|>" in printed and "Qwen" not in printed


def test_stats_count_the_tokens_of_examples(run, tmp_path):
    rows = [{"question": "q", "thinking": "1" * n, "answer": "5"} for n in (5, 50, 500)]
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, printed, _ = run("data", "stats", path)
    lengths = [len(data.Chat(BASE).example("q", row["thinking"], "5")[0]) for row in rows]
    assert code == 0 and f"3 examples, {sum(lengths):,} tokens" in printed
    assert f"median {lengths[1]:,}, longest {lengths[2]:,}" in printed
