"""What several tests share. `python -m pytest` in the project's folder finds the programs."""
from pathlib import Path

import pytest
import torch

from data import Chat
from model import Config, Transformer

torch.set_num_threads(1)      # these models are too small to share among cores

ROOT = Path(__file__).parents[1]
BASE = ROOT / "assets" / "countdown-base"


def tiny_config(**changes):
    return Config(**{**dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.2,
        rest={"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}), **changes})


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
    return Chat(BASE)
