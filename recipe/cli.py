"""What the command lines of all programs share: flags, errors, and finding a model's directory."""
import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import safetensors

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def resolve_model(name: str, weights: bool = True) -> str:
    """The directory of a model. A hub id, owner/name or owner/name@revision, is downloaded: only
    safetensors and text, never pickles or code."""
    owner = Path(name).parts[:1]
    is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", name)
    if not is_hub_id or owner == ("out",) or Path(*owner).exists():
        return name
    import huggingface_hub
    name, _, revision = name.partition("@")
    patterns = ["*.safetensors"] * weights + ["*.json", "*.jinja", "*.txt"]
    try:
        return huggingface_hub.snapshot_download(name, revision=revision or None,
                                                 allow_patterns=patterns)
    except Exception as error:                  # its HTTP library raises a dozen kinds
        raise ValueError(f"{name} is neither a directory nor on the hub: {error}") from None


def add_device_arguments(add: Callable) -> None:
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cuda, cpu or mps")
    add("--dtype", choices=("float32", "bfloat16"), help="to compute in (default: bfloat16 on "
        "CUDA, and for a model stored in it on a CPU that has it)")


def default_dtype(device: str, config: dict) -> str:
    """bfloat16 on CUDA, and on a CPU that computes in it for a model that is stored in it."""
    import torch
    cpu = getattr(torch.cpu, "get_capabilities", dict)()        # newer versions of PyTorch
    has_bf16 = device == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    is_stored = "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    return "bfloat16" if device.startswith("cuda") or has_bf16 and is_stored else "float32"


def check_url(base_url: str, allow_http: bool = False) -> str:
    """Returns the base URL; ValueError if the key must not be sent there."""
    url = base_url.rstrip("/").removesuffix("/chat/completions")
    form = r"https?://([\w.-]+|\[::1\])(:\d+)?(/[\w.~%:/+-]*)?"
    if not re.fullmatch(form, url, re.ASCII) or urlsplit(url).port == 0:
        raise ValueError("--base-url is not of the form https://host:port/path")
    if url.startswith("http:") and not allow_http and urlsplit(url).hostname not in LOOPBACK:
        raise ValueError("--base-url: http sends key and questions unencrypted (--allow-http)")
    return url


@contextlib.contextmanager
def exit_on_user_error(debug: bool = False) -> Iterator[None]:
    """Turn what a user can cause into one line on standard error and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                     # the reader of `python data.py show | head` is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, RuntimeError, safetensors.SafetensorError) as error:
        out_of_memory = type(error).__name__ == "OutOfMemoryError"      # torch's, a RuntimeError
        if debug or isinstance(error, RuntimeError) and not out_of_memory:
            raise
        if out_of_memory:
            error = ("out of memory: a smaller --tokens-per-batch, --gradient-checkpointing, a "
                     "smaller --max-num-seqs or --max-seq-len needs less")
        print("error:", " ".join(escape(str(error)).split()), file=sys.stderr)
        sys.exit(2)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with --debug, one line for a bad flag, and the defaults in --help."""

    def __init__(self, description: str):
        super().__init__(description=description)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add_argument(self, *names, **options):
        if options.get("default") not in (None, "", [], argparse.SUPPRESS) and "help" in options:
            options["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **options)

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def at_least(minimum: float, kind: type = int, maximum: float = math.inf) -> Any:
    """The `type` of a flag that takes a number from `minimum` to `maximum`."""
    def number(text):
        with contextlib.suppress(ValueError):
            if minimum <= kind(text) <= maximum:
                return kind(text)
        raise argparse.ArgumentTypeError(
            f"expected a number from {minimum} to {maximum}, got {text!r}")
    return number


def escape(text: str) -> str:
    """The text with control characters spelled out, so that data cannot steer the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text)
