"""recipe/cost.py: floating-point operations, memory, time and price of a run."""
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import Config, Transformer
from recipe.cost import default_row, flops, memory, print_memory, print_time, token_slots

QWEN_7B = Config(152064, 3584, 18944, 28, 28, 4)
QWEN_32B = Config(152064, 5120, 27648, 64, 40, 8)
# s1's fine-tuning (section 4.1), at the 20% of an H100's peak that its 26 minutes come to.
S1 = {"devices": 16, "device_tflops": 989, "device_memory_gb": 80, "mfu": 0.2, "usd_per_hour": 2,
      "epochs": 5, "batch_size": 16, "tokens_per_batch": 32768, "gradient_checkpointing": True,
      "dtype": None}


def flags(**changes):
    return SimpleNamespace(**{**S1, **changes})


def count_parameters(config):
    """Returns (parameters of the model, parameters of a block)."""
    with torch.device("meta"):
        model = Transformer(config)
    return tuple(sum(p.numel() for p in module.parameters())
                 for module in (model, model.model.layers[0]))


def last_number(text, word):
    """Returns the number before a word: last_number("2 apples", " apples") is 2."""
    return float(text.split(word)[0].split()[-1].replace(",", ""))


def test_flops_are_those_that_pytorch_counts():
    """For matrix products. Attention, which PyTorch counts without the causal mask, is checked
    through its part of our own sum."""
    config, T = Config(64, 32, 48, 2, 4, 2, tie_word_embeddings=True), 40
    ids = torch.arange(T)[None]
    labels = torch.where(ids < 10, -100, ids)
    with FlopCounterMode(display=False) as counter:
        loss, _ = Transformer(config).init_weights(0)(ids, labels=labels)
        loss.backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counted.items() if op in ("aten.mm", "aten.addmm", "aten.bmm"))
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * T * T
    assert products == pytest.approx(flops(config, [T], T - 10) - attention, rel=1e-6)
    two = flops(config, [10, 30], 0)
    assert two - flops(config, [40], 0) == pytest.approx(-attention * (1 - (100 + 900) / 1600))


def test_token_slots_count_the_longest_row_of_each_round():
    assert token_slots([5, 3, 2], 2) == 2 * 5 + 2 * 2
    assert token_slots([5, 3, 2], 1) == 10
    assert token_slots([5, 3, 2], 4) == 20
    assert token_slots([], 2) == 0


def test_memory_of_a_device():
    """Against numbers that are written out for one small model."""
    config = SimpleNamespace(hidden_size=8, num_hidden_layers=3, vocab_size=100, head_dim=2,
                             num_attention_heads=4, num_key_value_heads=2, intermediate_size=20)
    # Per token: 6 tensors of width 8, q and the output of 4 heads, k and v of 2, 4 of width 20.
    block = 2 * (6 * 8 + 2 * 4 * 2 + 2 * 2 * 2 + 4 * 20)
    found = memory(config, 5000, 700, 10, 1, gradient_checkpointing=False)
    assert list(found.values()) == [16 * 5000, 10 * 3 * block, 4 * 800, 2 * (800 + 3 * 700)]
    found = memory(config, 5000, 700, 10, 1, False, "float32")
    assert list(found.values()) == [16 * 5000, 10 * 3 * 2 * block, 4 * 800]
    found = memory(config, 5000, 700, 10, 4, gradient_checkpointing=True)
    assert list(found.values()) == [16 * 5000 / 4, 10 * (3 * 16 + block), 4 * 800, 2 * 800,
                                    2 * (800 + 2 * 700)]


def test_a_row_on_a_cpu_needs_a_gigabyte_of_activations():
    smol = Config(49152, 576, 1536, 30, 9, 3, "llama")
    assert default_row(smol, "cuda", "float32", False) == 8192
    # Per token and layer: 6 * 576 + 2 * 12 * 64 + 4 * 1536 numbers.
    assert default_row(smol, "cpu", "float32", False) == 10**9 // (30 * 4 * 11136) == 748
    assert default_row(smol, "cpu", "bfloat16", False) == 1496
    assert default_row(smol, "cpu", "float32", True) > 8 * 748
    assert default_row(Config(1408, 128, 384, 4, 4, 2), "cpu", "float32", False) == 8192


def test_s1_takes_26_minutes(capsys):
    """1,000 traces of 4,700 tokens, sixteen a step: the last step of an epoch has only eight."""
    rows = [[4700] * 16] * 62 + [[4700] * 8]
    print_memory(flags(), QWEN_32B, *count_parameters(QWEN_32B))
    print_time(flags(), QWEN_32B, 315, [4700] * 1000, 4400 * 1000, rows)
    printed = capsys.readouterr().out
    assert "32,763,876,352 parameters" in printed and "80 GB: fits" in printed
    assert "315 steps, 23,500,000 tokens" in printed and "devices 99.2% busy" in printed
    minutes = last_number(printed, " minutes")
    assert 26 * 0.85 < minutes < 26 * 1.15
    hours = last_number(printed, " device-hours")
    assert hours == pytest.approx(16 * minutes / 60, abs=0.02)     # minutes have one decimal
    assert last_number(printed, " dollars") == pytest.approx(2 * hours, abs=0.02)


def test_a_run_may_stop_within_an_epoch(capsys):
    """--max-steps 10 is 160 examples of an epoch of 1,000."""
    args = flags(devices=1, usd_per_hour=None)
    print_time(args, QWEN_7B, 10, [4700] * 1000, 4400 * 1000, [])
    printed = capsys.readouterr().out
    work = flops(QWEN_7B, [4700], 4400) * 160
    assert f"10 steps, {160 * 4700:,} tokens, {work:.3g} FLOPs" in printed
    assert last_number(printed, " minutes") == pytest.approx(work / (989e12 * 0.2) / 60, abs=0.05)
    assert "busy" not in printed and "dollars" not in printed


def test_the_memory_says_what_would_make_it_fit(capsys):
    sizes = count_parameters(QWEN_7B)
    print_memory(flags(gradient_checkpointing=False, devices=8, device_memory_gb=40),
                 QWEN_7B, *sizes)
    assert "does not fit, --gradient-checkpointing makes it fit" in capsys.readouterr().out
    print_memory(flags(devices=1), QWEN_7B, *sizes)
    assert "does not fit, use more --devices" in capsys.readouterr().out
    print_memory(flags(devices=1, gradient_checkpointing=False), QWEN_7B, *sizes)
    assert "does not fit, use more --devices" in capsys.readouterr().out


def test_the_printed_memory_is_a_sum(capsys):
    sizes = count_parameters(QWEN_7B)
    print_memory(flags(), QWEN_7B, *sizes)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{sizes[0]:,} parameters; memory of each of 16 devices:"
    parts = [float(line.split()[0]) for line in lines[1:]]
    assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=0.05)   # two decimals each
    expected = memory(QWEN_7B, *sizes, 32768, 16, gradient_checkpointing=True)
    assert parts[:-1] == pytest.approx([size / 1e9 for size in expected.values()], abs=0.01)


def test_without_a_peak_there_is_no_time():
    with pytest.raises(ValueError, match="--device-tflops"):
        print_time(flags(device_tflops=None), QWEN_7B, 10, [4700], 4400, [])
