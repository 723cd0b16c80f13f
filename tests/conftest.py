"""What several tests share. `python -m pytest` in the project's folder finds the programs."""
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
import tqdm

import budget_force
import data
import sample
import train
from model import Config, Transformer

torch.set_num_threads(1)      # these models are too small to share among cores
# tqdm's own lock is shared by forked processes: a test that kills one which holds it would wait for
# ever.
tqdm.tqdm.set_lock(threading.RLock())

ROOT = Path(__file__).parents[1]
BASE = ROOT / "assets" / "countdown-base"
PROGRAMS = {"train": train, "sample": sample, "budget_force": budget_force, "data": data}


def tiny_config(**changes):
    return Config(**{**dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.2, rest={
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}),
        **changes})


def tiny_model(seed=0, **changes):
    """Random weights, biases and norms too, so that a forgotten one shows."""
    model = Transformer(tiny_config(**changes)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture(scope="session")
def chat():
    return data.Chat(BASE)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A directory with a tiny random model over the base's tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_model(vocab_size=1408).save(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, directory)
    return directory


@pytest.fixture
def run(monkeypatch, capsys):
    """run("train", "--n", 8) is `python train.py --n 8`: (exit code, standard output, standard
    error)."""
    def call(program, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, arguments)])
        code = 0
        try:
            PROGRAMS[program].main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return call
