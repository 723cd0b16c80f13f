"""Fixtures that several test files share."""
import importlib
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
import tqdm

ROOT = Path(__file__).parents[1]
BASE = ROOT / "assets" / "countdown-base"
FIXTURES = ROOT / "tests" / "fixtures"
sys.path.insert(0, str(ROOT))

from data import Chat  # noqa: E402
from model import Config, Transformer  # noqa: E402

torch.set_num_threads(1)      # these models are too small to share among cores
# Forked processes share tqdm's default lock: one that is killed while it holds the lock would block
# all later progress bars.
tqdm.tqdm.set_lock(threading.RLock())


def tiny_config(**changes):
    return Config(**{**dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.2, extra={
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}),
        **changes})


def tiny_model(seed=0, **changes):
    """A model of random weights. Biases and norms are random too, so that omitting one shows."""
    model = Transformer(tiny_config(**changes)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return model


class ReplyHandler(BaseHTTPRequestHandler):
    """What the handlers of the loopback servers share."""
    wbufsize = -1                                   # a reply is one packet

    def read_json(self):
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def send_reply(self, status: int, headers: dict, text: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def chat():
    return Chat(BASE)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A directory with a tiny random model and the base's tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_model(vocab_size=1408).save(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BASE / name, directory)
    return directory


@pytest.fixture
def run(monkeypatch, capsys):
    """run("train", "--n", 8) is `python train.py --n 8`, run("recipe.teacher", ...) is
    `python -m recipe.teacher ...`: (exit code, standard output, standard error)."""
    def call(program, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, arguments)])
        code = 0
        try:
            code = importlib.import_module(program).main() or 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return call
