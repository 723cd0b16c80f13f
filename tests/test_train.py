"""train.py: the loss of a step, the loop, the result, several processes, stop and resume."""
import contextlib
import importlib.util
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import BASE, tiny_model

import data
import train
from model import Block, FusedLinearCrossEntropy, Transformer
from recipe import checkpoint, cost, countdown

CPU = torch.device("cpu")


def command(tiny, out, *arguments):
    """10 examples, 4 a step, 2 epochs: 6 steps."""
    return ["--model", tiny, "--out", out, "--n", 10, "--batch-size", 4, "--epochs", 2, *arguments]


def call(*arguments):
    """Runs train.py in this process without capturing, for forked processes."""
    sys.argv = ["train.py", *map(str, arguments)]
    train.main()


def forked(function, **environment):
    """Runs `function` in a fork, which saves starting Python. Returns its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update({key: str(value) for key, value in environment.items()})
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            function()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)      # sys.stderr is captured in the parent
    finally:
        os._exit(code)


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def distributed(num_processes, function, seconds=150):
    """Runs `function` in several processes, as torchrun does. All must succeed in time: processes
    that wait for each other for ever are killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [forked(function, WORLD_SIZE=num_processes, RANK=rank, LOCAL_RANK=rank,
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(num_processes)]

    def kill():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    timer = threading.Timer(seconds, kill)
    timer.start()
    codes = [exit_code(pid) for pid in pids]
    timer.cancel()
    assert codes == [0] * num_processes


def weights(directory):
    return safetensors.torch.load_file(directory / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [row["loss"] for row in read_metrics(out)]


def val_losses(out):
    return [row.get("val_loss") for row in read_metrics(out)]


def held_out_loss(directory, n=5):
    """The mean over the supervised tokens of Countdown's held-out traces, computed plainly."""
    chat, model, total, count = data.Chat(directory), Transformer.load(directory), 0, 0
    for trace in countdown.traces(n, 0, split="tune"):
        ids, start = chat.example(*trace)
        logits = model(torch.tensor([ids]))[0, start - 1:-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]),
                                                   reduction="sum").item()
        count += len(ids) - start
    return total / count


def checkpoints(out):
    return sorted(path.name for path in Path(f"{out}.steps").glob("*"))


@pytest.fixture
def trained(run, tiny, tmp_path):
    """trained("name", flags...) trains one epoch: (weights, losses, standard output)."""
    def call(name, *arguments):
        out = tmp_path / name
        code, printed, error = run("train", *command(tiny, out, "--epochs", 1, *arguments))
        assert code == 0, error
        return weights(out), losses(out), printed
    return call


@pytest.fixture(autouse=True)
def restore_signal_handler():
    before = [(signum, signal.getsignal(signum)) for signum in (signal.SIGINT, signal.SIGTERM)]
    yield
    for signum, handler in before:
        signal.signal(signum, handler)


# ---- The loss of a step ---------------------------------------------------------------------


def unequal_examples(n=16, vocab_size=64):
    """Examples of 4 to about 200 tokens; from a few to most tokens are supervised."""
    rng = random.Random(0)
    lengths = [4 + int(200 * rng.random() ** 4) for _ in range(n)]
    return [([rng.randrange(vocab_size) for _ in range(T)], rng.randrange(1, T)) for T in lengths]


def test_the_gradient_does_not_depend_on_rows_and_processes(tmp_path, monkeypatch):
    """One row, rows as long as the longest example, an example per row, two processes."""
    batch, found = unequal_examples(), {}
    longest = max(len(ids) for ids, _ in batch)
    tiny_model().save(tmp_path)

    def compute(max_tokens):
        model = tiny_model()
        loss, capacity = train.accumulate_gradients(model, batch, max_tokens, CPU)
        found[capacity // max_tokens] = {name: p.grad for name, p in model.named_parameters()}, loss

    compute(99999)
    compute(longest)
    assert 3 < max(found) < 16
    with monkeypatch.context() as patch:
        patch.setattr(data, "pack_sequences", lambda batch, *_: [[example] for example in batch])
        compute(longest)
    assert len(found) == 3 and {1, 16} < found.keys()

    def process():
        torch.distributed.init_process_group("gloo")
        args = SimpleNamespace(scratch=False, gradient_checkpointing=False, compile=False)
        rank, model = torch.distributed.get_rank(), train.load_model(args, tmp_path, CPU, 2, False)
        loss, _ = train.accumulate_gradients(model, batch, longest, CPU, False, rank, 2)
        gathered = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        if rank == 0:
            safetensors.torch.save_file({**gathered, "loss": loss}, tmp_path / "two")
        torch.distributed.barrier()
    distributed(2, process)
    loaded = safetensors.torch.load_file(tmp_path / "two")
    found["two processes"] = loaded, loaded.pop("loss")

    expected, mean = found.pop(1)
    for gradients, loss in found.values():
        torch.testing.assert_close(loss, mean, atol=1e-5, rtol=0)
        for name in expected:
            torch.testing.assert_close(gradients[name], expected[name], atol=1e-5, rtol=0)


def test_the_loss_is_the_mean_over_the_tokens_of_the_step(trained):
    """The same steps with all examples in one row and with about one example per row."""
    whole, expected, _ = trained("a", "--tokens-per-batch", 99999)
    parts, found, _ = trained("b", "--tokens-per-batch", 330)
    assert found == pytest.approx(expected, abs=1e-5)
    # Adam divides the gradient by its own size, so rounding in a gradient near zero moves a weight
    # by much of a step. The losses above are the strict check.
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-3, rtol=0)


def test_the_first_loss_is_that_of_a_plain_computation(trained, tiny):
    _, found, _ = trained("a", "--batch-size", 10)
    chat, model = data.Chat(tiny), Transformer.load(tiny)
    total = count = 0
    for trace in countdown.traces(10, 0):
        ids, start = chat.example(*trace)
        logits = model(torch.tensor([ids]))[0, start - 1:-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]),
                                                   reduction="sum").item()
        count += len(ids) - start
    assert found[0] == pytest.approx(total / count, abs=1e-4)


# ---- The loop -------------------------------------------------------------------------------


def test_the_loop_is_the_recipes(trained, tiny):
    """Against a plain loop: AdamW with (0.9, 0.95), no decay of vectors, clipping, schedule,
    order of the epochs."""
    found, _, _ = trained("a", "--epochs", 2, "--weight-decay", 0.1, "--grad-clip", 0.5)
    chat, model = data.Chat(tiny), Transformer.load(tiny)
    examples = [chat.example(*trace) for trace in countdown.traces(10, 0)]
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)]
               for name, p in model.named_parameters()}
    batches = [batch for epoch in (0, 1) for batch in data.epoch_batches(examples, 4, 0, epoch)]
    for step, batch in enumerate(batches):
        model.zero_grad()
        logits = [model(torch.tensor([ids]))[0, start - 1:-1] for ids, start in batch]
        answers = torch.cat([torch.tensor(ids[start:]) for ids, start in batch])
        torch.nn.functional.cross_entropy(torch.cat(logits), answers).backward()
        norm = sum(p.grad.pow(2).sum() for p in model.parameters()) ** 0.5
        lr = train.learning_rate(step, 6, 2e-3, 0.05)
        for name, p in model.named_parameters():
            g, (m, v) = p.grad * min(1, 0.5 / norm), moments[name]
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.95).addcmul_(g, g, value=0.05)
            p.data *= 1 - lr * (0.1 if p.dim() == 2 else 0)
            p.data -= (lr * m / (1 - 0.9 ** (step + 1))
                       / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8))
    # The mean, for the reason given above. A wrong beta, decay, clip, rate or order gives 5e-4 and
    # more.
    for name, p in model.named_parameters():
        assert (found[name] - p.data).abs().mean() < 1e-4, name


def test_schedule():
    rates = [train.learning_rate(step, 100, 1.0, 0.05) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and max(rates) == 1.0
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert 0 < rates[-1] < 0.001


def test_a_rerun_gives_the_same_bits_and_another_seed_does_not(trained):
    first, found, _ = trained("a")
    again, _, _ = trained("b")
    other, _, _ = trained("c", "--seed", 1)
    assert equal(first, again) and not equal(first, other)
    assert len(found) == 3                          # 10 examples by 4: 4, 4, 2


def test_training_learns(trained):
    _, found, printed = trained("a", "--epochs", 20, "--lr", 1e-2)
    assert found[-1] < 0.5 * found[0]
    assert "60 steps" in printed


def test_examples_that_are_too_long_are_dropped_and_counted(trained, tiny):
    lengths = [len(data.Chat(tiny).example(*trace)[0]) for trace in countdown.traces(10, 0)]
    limit = sorted(lengths)[6]
    _, _, printed = trained("a", "--max-seq-len", limit)
    kept = sum(length <= limit for length in lengths)
    assert f"{kept} examples, {sum(n for n in lengths if n <= limit):,} tokens" in printed
    assert f"{10 - kept} dropped as longer than {limit}" in printed


def test_pretraining_from_random_weights(run, trained, tiny, tmp_path):
    """On rows of token ids, as the base model is pre-trained; all tokens are supervised."""
    spec = importlib.util.spec_from_file_location("pretrain", BASE / "pretrain.py")
    pretrain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrain)
    documents = [{"ids": ids} for ids in pretrain.documents(20, 0, data.Chat(tiny))]
    path = tmp_path / "base.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in documents))
    _, found, printed = trained("a", "--scratch", "--data", path, "--n", 7)
    examples = [(row["ids"], 1) for row in documents[:7]]
    assert f"7 examples, {data.count_tokens(examples):,} tokens" in printed
    batch = next(iter(data.epoch_batches(examples, 4, 0, 0)))
    model = Transformer(train.read_config(tiny)).init_weights(0)
    assert found[0] == pytest.approx(
        train.accumulate_gradients(model, batch, 9999, CPU)[0].item(), abs=1e-5)


def test_traces_of_a_file(trained, tmp_path):
    (tmp_path / "r1.json").write_text(json.dumps([
        {"problem": "1+1?", "message_thinking": "Okay, so 1+1. " * 9,
         "message_content": r"\boxed{2}"},
        {"question": "1+2?", "deepseek_thinking_trajectory": "long " * 99,
         "gemini_thinking_trajectory": "short", "deepseek_attempt": "3", "gemini_attempt": "3"}]))
    _, _, deepseek = trained("a", "--data", tmp_path / "r1.json", "--max-steps", 1)
    _, _, gemini = trained("b", "--data", tmp_path / "r1.json", "--teacher", "gemini")
    tokens = [int(printed.split("2 examples, ")[1].split()[0]) for printed in (deepseek, gemini)]
    assert tokens[0] > tokens[1] + 90


def test_lengths_are_written_into_the_questions(trained, tiny):
    chat = data.Chat(tiny)
    _, _, printed = trained("a", "--ask", "tokens", "class")
    traces = countdown.add_length_prompts(countdown.traces(10, 0, countdown.GIVE_UP, 2),
                                          lambda text: len(chat.encode(text)), ["tokens", "class"])
    examples = [chat.example(*trace) for trace in list(traces)[:10]]
    assert f"10 examples, {data.count_tokens(examples):,} tokens" in printed


# ---- The held-out loss ----------------------------------------------------------------------


def test_the_held_out_loss_is_printed_after_each_epoch_and_changes_no_bit(trained, tmp_path):
    flags = ("--epochs", 2, "--max-steps", 5)               # 3 steps per epoch
    expected, plain, _ = trained("plain", *flags)
    found, same, printed = trained("a", *flags, "--val", "countdown", "--val-n", 5,
                                   "--tokens-per-batch", 8192)
    assert equal(found, expected) and same == plain
    assert "5 held-out examples" in printed
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    values = val_losses(tmp_path / "a")
    assert [value is not None for value in values] == [False, False, True, False, True]
    for line, value in zip(lines, values, strict=True):
        assert ("val loss" in line) == (value is not None)
        assert value is None or f"  val loss {value:.4f}  " in line
    assert values[-1] == pytest.approx(held_out_loss(tmp_path / "a"), abs=1e-4)


def test_held_out_traces_are_neither_trained_on_nor_test_questions():
    held_out, trained_on = (countdown.traces(466, 0, split="tune"), countdown.traces(3491, 0))
    tested = {row["question"].split("make")[1] + str(sorted(row["answer"]["numbers"]))
              for row in countdown.questions("test", 707, 0)}
    asked = [{question.split("make")[1] + str(sorted(map(int, re.findall(r"\d+", question)[:3])))
              for question, *_ in traces} for traces in (held_out, trained_on)]
    assert len(asked[0]) == 466 and not asked[0] & (asked[1] | tested)


def test_held_out_traces_of_a_file(run, trained, tiny, tmp_path):
    rows = [dict(zip(("question", "thinking", "answer"), trace, strict=True))
            for trace in countdown.traces(5, 0, split="tune") + countdown.traces(3, 0)]
    for name, part in (("new", rows[:5]), ("known", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    trained("a", "--val", tmp_path / "new.jsonl")
    assert val_losses(tmp_path / "a")[-1] == pytest.approx(held_out_loss(tmp_path / "a"), abs=1e-4)
    trained("b", "--val", tmp_path / "known.jsonl", "--val-n", 5)
    assert val_losses(tmp_path / "b") == val_losses(tmp_path / "a")
    code, _, error = run("train", *command(tiny, tmp_path / "c", "--val", tmp_path / "known.jsonl"))
    assert code == 2 and "3 of the held-out questions are trained on too" in error


# ---- Safety, memory, speed --------------------------------------------------------------------


def test_a_loss_that_is_not_finite_never_reaches_the_weights(run, tiny, tmp_path, monkeypatch):
    compute, seen = train.accumulate_gradients, []

    def broken(model, batch, *rest):
        result = compute(model, batch, *rest)
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if len(seen) == 3:
            next(model.parameters()).grad[0, 0] = math.nan
        return result
    monkeypatch.setattr(train, "accumulate_gradients", broken)
    code, _, error = run("train", *command(tiny, tmp_path / "a", "--save-every", 2))
    assert code == 2 and "step 3: loss" in error and "gradient norm nan" in error
    assert "examples begin with ['<|im_start|>" in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()
    saved = safetensors.torch.load_file(
        tmp_path / "a.steps" / "00000002" / "rank-00000.safetensors")
    assert all(torch.equal(saved[f"{name}.weight"], p) for name, p in seen[-1].items())


def test_gradient_checkpointing_saves_memory_and_changes_no_bit(run, tiny, tmp_path, monkeypatch):
    kept, found, calls, forward = [], [], [], Block.forward
    for checkpointing in (False, True):
        model = tiny_model()
        model.gradient_checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t,
                                                      lambda t: t):
            ids = torch.arange(60)[None]
            loss, _ = model(ids, labels=ids)
        loss.backward()
        found.append((sum(kept), {name: p.grad for name, p in model.named_parameters()}))
        kept.clear()
    (plain, expected), (less, gradients) = found
    assert less < plain / 2 and equal(gradients, expected)

    monkeypatch.setattr(Block, "forward", lambda *inputs: calls.append(1) or forward(*inputs))
    found = []
    for name, flags in (("plain", ()), ("checkpointing", ("--gradient-checkpointing",))):
        calls.clear()
        assert run("train", *command(tiny, tmp_path / name, *flags))[0] == 0
        found.append((len(calls), weights(tmp_path / name)))
    (once, expected), (twice, result) = found
    assert twice == 2 * once > 0 and equal(result, expected)


def test_compile_compiles_the_loss_and_parts_of_a_block(run, tiny, tmp_path, monkeypatch):
    """What is captured runs uncompiled, to the same bits: inductor's code is not ours to test."""
    captured, compiled = [], torch.compile

    def backend(graph, inputs):
        captured.append(graph)
        return graph
    monkeypatch.setattr(torch, "compile", lambda step, **options: compiled(
        step, **options | {"backend": backend}))
    monkeypatch.setattr(FusedLinearCrossEntropy, "compiled", False)     # restored after the test
    torch.compiler.reset()
    for name, flags in (("plain", ()), ("compiled", ("--compile",))):
        assert run("train", *command(tiny, tmp_path / name, *flags))[0] == 0
        assert bool(captured) == bool(flags)
    code = " ".join(graph.code for graph in captured)
    assert "silu" in code and "rms_norm" in code and "softmax" in code
    assert equal(weights(tmp_path / "plain"), weights(tmp_path / "compiled"))


def test_bfloat16_computes_in_bfloat16_over_float32_weights(trained):
    full, expected, _ = trained("a", "--dtype", "float32")
    half, found, _ = trained("b", "--dtype", "bfloat16")
    assert found != expected and found == pytest.approx(expected, abs=0.1)
    assert all(p.dtype == torch.float32 for p in half.values())


def test_save_dtype_is_the_dtype_of_the_written_weights(trained):
    written, _, _ = trained("a", "--save-dtype", "bfloat16")
    assert all(p.dtype == torch.bfloat16 for p in written.values())


# ---- The result -----------------------------------------------------------------------------


def test_the_result_is_a_model_directory(trained, tmp_path):
    trained("deep/student")
    out = tmp_path / "deep" / "student"
    assert {path.name for path in out.iterdir()} >= {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat.json", "model.safetensors", "metrics.jsonl", "run.json"}
    assert [path.name for path in out.parent.iterdir()] == ["student"]
    assert json.loads((out / "run.json").read_text())["arguments"]["n"] == 10
    Transformer.load(out)


def test_the_recorded_command_repeats_the_run(run, trained, tmp_path):
    trained("a student", "--seed", 3)
    out = tmp_path / "a student"
    first = (out / "model.safetensors").read_bytes()
    recorded = json.loads((out / "run.json").read_text())
    python, program, *words = shlex.split(recorded["command"])
    assert (python, program) == ("python", "train.py")
    assert (recorded["threads"], recorded["processes"]) == (1, 1)
    assert recorded["versions"]["torch"] == torch.__version__
    code, _, error = run("train", *words, "--overwrite")
    assert code == 0, error
    again = json.loads((out / "run.json").read_text())
    assert (out / "model.safetensors").read_bytes() == first
    assert again["data"] == recorded["data"] and len(recorded["data"]) == 16
    trained("b", "--seed", 4)
    assert json.loads((tmp_path / "b" / "run.json").read_text())["data"] != recorded["data"]


def test_git_is_not_needed(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    trained("a", "--max-steps", 1)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["commit"] == "unknown"


def test_every_step_is_a_line_and_a_row_and_totals_are_printed(run, tiny, tmp_path):
    code, printed, _ = run("train", *command(tiny, tmp_path / "a", "--device-tflops", 1,
                                             "--usd-per-hour", 7200))
    assert code == 0
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    table = read_metrics(tmp_path / "a")
    assert len(lines) == len(table) == 6
    for line, row in zip(lines, table, strict=True):
        assert f"loss {row['loss']:.4f}" in line and f"norm {row['grad_norm']:.3f}" in line
        assert f"{row['tokens'] / row['seconds']:,.0f} tokens/s" in line
        assert f"MFU {100 * row['mfu']:.1f}%" in line
        assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / 1e12)
        assert row["memory_bytes"] > 0
    spent, tokens = (sum(row[key] for row in table) for key in ("seconds", "tokens"))
    assert f"{2 * spent:.2f} dollars" in printed
    assert f"{sum(row['flops'] for row in table):.3g} FLOPs" in printed
    assert f"rows {100 * tokens / (6 * 8192):.1f}% full" in printed    # each step fits into a row
    assert f"6 steps, {tokens:,} tokens" in printed


def test_memory_is_unknown_on_windows(monkeypatch):
    assert cost.peak_memory(CPU) > 10**7
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "resource", None)
        patch.setattr(os, "name", "nt")
        found = cost.peak_memory(CPU)
    assert found == 0


def test_the_cost_needs_no_weights_and_writes_nothing(run, tiny, tmp_path):
    bare = shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    code, printed, error = run("train", *command(
        bare, tmp_path / "a", "--cost", "--device-tflops", 1, "--devices", 2,
        "--tokens-per-batch", 500))
    assert code == 0, error
    examples = [data.Chat(bare).example(*trace) for trace in countdown.traces(10, 0)]
    config, tokens = train.read_config(bare), 2 * data.count_tokens(examples)
    flops = 2 * sum(cost.flops(config, [len(ids)], len(ids) - start) for ids, start in examples)
    assert f"6 steps, {tokens:,} tokens, {flops:.3g} FLOPs" in printed
    packed = [[data.count_tokens(row) for row in data.pack_sequences(batch, 500, 2)]
              for batch in data.epoch_batches(examples, 4, 0, 0)]
    busy = tokens / 2 / sum(cost.token_slots(lengths, 2) for lengths in packed)
    assert f"devices {100 * busy:.1f}% busy" in printed
    with torch.device("meta"):
        assert f"{sum(p.numel() for p in Transformer(config).parameters()):,} parameters" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


# ---- Several processes ----------------------------------------------------------------------


def test_two_processes_train_like_one(run, tiny, tmp_path):
    arguments = ("--n", 40, "--tokens-per-batch", 400, "--max-steps", 8)
    code, _, error = run("train", *command(tiny, tmp_path / "one", *arguments))
    assert code == 0, error

    def process():
        with open(tmp_path / f"printed by {os.environ['RANK']}", "w") as file, \
                contextlib.redirect_stdout(file):
            call(*command(tiny, tmp_path / "two", *arguments))
    distributed(2, process)
    assert "8 steps" in (tmp_path / "printed by 0").read_text()
    assert (tmp_path / "printed by 1").read_text() == ""
    assert len(losses(tmp_path / "two")) == 8
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    one, two = (Transformer.load(tmp_path / name) for name in ("one", "two"))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(two(ids), one(ids), atol=2e-2, rtol=0)       # Adam: see above


def test_a_process_takes_its_gpu_before_anything_else(run, tiny, tmp_path, monkeypatch):
    def stop(device):
        raise ValueError(f"set {device}")
    for key, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "set_device", stop)
    code, _, error = run("train", *command(tiny, tmp_path / "a", "--scratch", "--device", "cuda"))
    assert (code, error) == (2, "error: set cuda:1\n")


def test_a_long_save_does_not_time_out(run, tiny, tmp_path, monkeypatch):
    def stop(backend, timeout):
        raise ValueError(f"{backend} waits {timeout.total_seconds() / 3600} hours")
    for key, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", stop)
    code, _, error = run("train", *command(tiny, tmp_path / "a"))
    assert (code, error) == (2, "error: gloo waits 2.0 hours\n")


def test_a_signal_to_one_of_three_processes_stops_all_and_resume_is_bitwise(
        run, tiny, tmp_path, monkeypatch):
    """The others may run on another machine, which no terminal reaches. 1,408 rows of a matrix do
    not divide by three. Each process writes only its shard."""
    flags = ("--tokens-per-batch", 400, "--max-steps", 4, "--val", "countdown", "--val-n", 5)
    arguments = command(tiny, tmp_path / "a", *flags)
    with monkeypatch.context() as patch:
        interrupt(patch, step=2, rank="1", signum=signal.SIGTERM)       # the end of an epoch
        save_file = checkpoint.save_file

        def slow(*arguments):                       # rank 0 must wait for the others
            time.sleep(0.3 * int(os.environ["RANK"]))
            save_file(*arguments)
        patch.setattr(checkpoint, "save_file", slow)

        def process():
            with pytest.raises(SystemExit) as stop:
                call(*arguments)
            assert stop.value.code == 143
        distributed(3, process)
    assert checkpoints(tmp_path / "a") == ["00000003"] and not (tmp_path / "a").exists()

    directory = tmp_path / "a.steps" / "00000003"
    assert sorted(path.name for path in directory.iterdir()) == [
        *(f"rank-{rank:05}.safetensors" for rank in range(3)), "state.json"]
    sizes = [sum(tensor.numel() for tensor in safetensors.torch.load_file(path).values())
             for path in directory.glob("*.safetensors")]
    parameters = list(tiny_model(vocab_size=1408).parameters())
    scalars = len(parameters)                       # AdamW's step, of each parameter
    assert sum(sizes) == 3 * sum(p.numel() for p in parameters) + 3 * scalars
    assert max(sizes) < 0.4 * sum(sizes)

    code, _, error = run("train", *arguments, "--resume")
    assert code == 2 and "processes was 3, is 1" in error
    distributed(3, lambda: call(*arguments, "--resume"))
    distributed(3, lambda: call(*command(tiny, tmp_path / "whole", *flags[:4])))     # without --val
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "a") == losses(tmp_path / "whole") and len(losses(tmp_path / "a")) == 4
    assert val_losses(tmp_path / "a")[3] == pytest.approx(held_out_loss(tmp_path / "a"), abs=1e-4)
    recorded = json.loads((tmp_path / "a" / "run.json").read_text())["command"]
    assert recorded.startswith("torchrun --nproc-per-node 3 -- train.py")


# ---- Stop and resume ------------------------------------------------------------------------


def interrupt(monkeypatch, step, rank=None, signum=signal.SIGINT):
    """Sends Ctrl-C once, or another signal, while the line of this step is printed."""
    format_step, sent = cost.format_step, []

    def patched(row, num_steps):
        if row["step"] == step and not sent and rank in (None, os.environ.get("RANK")):
            sent.append(True)
            os.kill(os.getpid(), signum)
        return format_step(row, num_steps)
    monkeypatch.setattr(cost, "format_step", patched)


@pytest.mark.parametrize("step", [0, 2, 4])         # 3 steps per epoch: its middle, its end
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resume_is_bitwise(run, tiny, tmp_path, monkeypatch, step, signum):
    assert run("train", *command(tiny, tmp_path / "whole"))[0] == 0
    interrupt(monkeypatch, step, signum=signum)
    code, printed, error = run("train", *command(tiny, tmp_path / "parts"))
    assert code == 128 + signum and f"stopped after step {step + 1}: --resume" in printed
    assert "Traceback" not in error and not (tmp_path / "parts").exists()
    code, printed, _ = run("train", *command(tiny, tmp_path / "parts", "--resume"))
    assert code == 0 and f"step {step + 1}\n" in printed
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert not (tmp_path / "parts.steps").exists()


def test_a_signal_in_the_last_step_lets_the_run_end(run, tiny, tmp_path, monkeypatch):
    """Nothing is left to train: the model is written, not a checkpoint."""
    assert run("train", *command(tiny, tmp_path / "whole"))[0] == 0
    interrupt(monkeypatch, step=5)
    code, printed, _ = run("train", *command(tiny, tmp_path / "a"))
    assert code == 0 and "stopped" not in printed
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "whole"))
    assert checkpoints(tmp_path / "a") == []


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(monkeypatch, first, second):
    """Slurm signals torchrun and its processes, and torchrun passes it on: that is one signal."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    received = train.install_signal_handler()
    os.kill(os.getpid(), first)
    now[0] += 0.5
    os.kill(os.getpid(), first)
    assert received == [first, first]
    now[0] += 1
    with pytest.raises(SystemExit) as stop:
        os.kill(os.getpid(), second)
    assert stop.value.code == 128 + second


def test_a_stopped_run_is_not_started_over_by_mistake(run, tiny, tmp_path, monkeypatch):
    interrupt(monkeypatch, 1)
    assert run("train", *command(tiny, tmp_path / "a"))[0] == 130
    code, _, error = run("train", *command(tiny, tmp_path / "a"))
    assert code == 2 and "a.steps" in error and checkpoints(tmp_path / "a") == ["00000002"]
    assert run("train", *command(tiny, tmp_path / "a", "--resume"))[0] == 0
    recorded = json.loads((tmp_path / "a" / "run.json").read_text())["command"]
    assert recorded.startswith("python train.py") and "--resume" not in recorded


def test_save_every_keeps_the_newest_checkpoint(run, tiny, tmp_path, monkeypatch):
    kept, save = [], checkpoint.save

    def watched(*arguments):
        save(*arguments)
        kept.append(checkpoints(tmp_path / "a"))
    monkeypatch.setattr(checkpoint, "save", watched)
    assert run("train", *command(tiny, tmp_path / "a", "--save-every", 2))[0] == 0
    assert kept == [["00000002"], ["00000004"]]     # after step 6 comes the result


def test_a_run_that_differs_is_not_resumed(run, tiny, tmp_path, monkeypatch):
    interrupt(monkeypatch, 1)
    assert run("train", *command(tiny, tmp_path / "a"))[0] == 130
    shard = tmp_path / "a.steps" / "00000002" / "rank-00000.safetensors"
    before = shard.read_bytes()
    for change, message in ((("--lr", 1e-4), "lr was 0.002, is 0.0001"),
                            (("--tokens-per-batch", 512), "tokens_per_batch was 8192, is 512"),
                            (("--seed", 1), "seed was 0, is 1"), (("--n", 11), "data was")):
        code, _, error = run("train", *command(tiny, tmp_path / "a", "--resume", *change))
        assert code == 2 and message in error and error.count("\n") == 1, error
    # Another machine, whose default is another dtype.
    with monkeypatch.context() as patch:
        patch.setattr(train.cli, "default_dtype", lambda *_: "bfloat16")
        code, _, error = run("train", *command(tiny, tmp_path / "a", "--resume"))
    assert code == 2 and "dtype was float32, is bfloat16" in error
    assert shard.read_bytes() == before
    code, _, error = run("train", *command(tiny, tmp_path / "b", "--resume"))
    assert code == 2 and "no checkpoint" in error
    # What the weights do not depend on may change.
    free = ("--save-every", 9, "--save-dtype", "bfloat16", "--usd-per-hour", 1)
    assert run("train", *command(tiny, tmp_path / "a", "--resume", *free))[0] == 0


def test_an_incomplete_checkpoint_is_skipped_and_named(run, tiny, tmp_path, monkeypatch):
    interrupt(monkeypatch, 1)
    run("train", *command(tiny, tmp_path / "a"))
    draft = tmp_path / "a.steps" / "00000003.draft"
    draft.mkdir()
    (draft / "rank-00000.safetensors").write_bytes(b"\0" * 10)
    code, printed, _ = run("train", *command(tiny, tmp_path / "a", "--resume"))
    assert code == 0 and f"skipped {draft}" in printed and "step 2\n" in printed


def test_a_directory_is_on_the_disk_before_it_gets_its_name(run, tiny, tmp_path, monkeypatch):
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which file is flushed")
    flushed, fsync, rename = [], os.fsync, Path.rename

    def watched_fsync(descriptor):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watched_rename(draft, final):
        assert {draft, *draft.iterdir()} <= set(flushed)
        renamed.append(final.name)
        return rename(draft, final)
    renamed = []
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    assert run("train", *command(tiny, tmp_path / "a", "--save-every", 4))[0] == 0
    assert renamed == ["00000004", "a"]


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tiny, tmp_path):
    """SIGKILL at twenty random moments. What is left always loads, and ends in the same bits as a
    run that was not killed."""
    out, whole = tmp_path / "a", tmp_path / "whole"

    def start(out, *more):
        return forked(lambda: call(*command(tiny, out, "--epochs", 12, *more)))

    def names():
        return [name for name in checkpoints(out) if name.isdecimal()]

    def start_or_resume():
        return start(out, "--save-every", 1, *(["--resume"] if names() else ["--overwrite"]))

    assert exit_code(start(whole)) == 0
    rng, killed = random.Random(0), 0
    while killed < 20:
        pid = start_or_resume()
        time.sleep(rng.uniform(0.02, 0.25))
        os.kill(pid, signal.SIGKILL)
        if exit_code(pid) == 0:                     # it was finished: again from the start
            assert equal(weights(out), weights(whole))
            shutil.rmtree(out)
            continue
        killed += 1
        if names():
            directory = tmp_path / "a.steps" / names()[-1]
            safetensors.torch.load_file(directory / "rank-00000.safetensors")
            state = json.loads((directory / "state.json").read_text())
            assert state["step"] == int(directory.name) == len(state["metrics"])
    assert out.exists() or exit_code(start_or_resume()) == 0
    assert equal(weights(out), weights(whole))


def test_a_full_disk_leaves_the_last_checkpoint(run, tiny, tmp_path, monkeypatch):
    interrupt(monkeypatch, 1)
    run("train", *command(tiny, tmp_path / "a"))

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)       # a write beyond the limit then fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with open(tmp_path / "error", "w") as error, contextlib.redirect_stderr(error):
            call(*command(tiny, tmp_path / "a", "--resume", "--save-every", 1))
    assert exit_code(forked(full)) == 2
    error = (tmp_path / "error").read_text()
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert checkpoints(tmp_path / "a") == ["00000002", "00000003.draft"]
    assert run("train", *command(tiny, tmp_path / "a", "--resume"))[0] == 0


def test_the_old_result_stays_until_the_new_one_is_whole(run, tiny, tmp_path, monkeypatch):
    assert run("train", *command(tiny, tmp_path / "a"))[0] == 0
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    code, _, error = run("train", *command(tiny, tmp_path / "a"))
    assert code == 2 and "exists: choose another --out, or --overwrite" in error
    again = command(tiny, tmp_path / "a", "--seed", 1, "--save-every", 2, "--overwrite")
    with monkeypatch.context() as patch:
        def fail(*_):
            raise OSError("the disk is full")
        patch.setattr(Transformer, "save", fail)
        assert run("train", *again)[0] == 2
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    assert checkpoints(tmp_path / "a") == ["00000004"]
    assert run("train", *again, "--resume")[0] == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


# ---- Bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    ("--data {tmp}/none.jsonl", "No such file"), ("--data {tmp}/empty", "is empty"),
    ("--data {tmp}/torn", "row 2: not JSON"), ("--data {tmp}/unanswered", "no answer"),
    ("--data {tmp}/ids.jsonl", "row 2: not a list of two or more token ids below 1347"),
    ("--data {tmp}/one.jsonl", "two or more token ids"),
    ("--data {tmp}/two.jsonl --ask tokens", "no question"),
    ("--data {tmp}/prose --ask steps", "steps"), ("--n 99999", "99999"),
    ("--model {tmp}", "tokenizer.json"), ("--model {tmp}/file", "tokenizer"),
    ("--model {small}", "1347 tokens"), ("--n 0", "argument --n"),
    ("--max-seq-len 9", "longer than 9"), ("--out {tmp}/full", "--overwrite"),
    ("--out {tmp}/full --overwrite", "a result of train.py"), ("--out {tmp}/file/x", "File exists"),
    ("--give-up 7", "argument --give-up"), ("--nonsense", "unrecognized arguments"),
    ("--val-n 3", "--val-n needs --val"), ("--val {tmp}/none.jsonl", "No such file"),
    ("--epochs 0", "argument --epochs"), ("--epochs many", "argument --epochs"),
    ("--mfu 0 --cost", "argument --mfu"), ("--grad-clip 0", "argument --grad-clip"),
    ("--cost", "--device-tflops")])
def test_bad_input_gets_one_line_and_exit_code_2(run, tiny, tmp_path, flags, message):
    (tmp_path / "empty").write_text("")
    (tmp_path / "torn").write_text(
        '{"question": "q", "thinking": "t", "answer": "a"}\n{"question": ')
    (tmp_path / "unanswered").write_text('{"question": "q", "thinking": "t"}')
    (tmp_path / "prose").write_text('{"question": "q", "thinking": "t", "answer": "a"}\n' * 2)
    (tmp_path / "ids.jsonl").write_text('{"ids": [1, 2]}\n{"ids": [1, 99999]}\n')
    (tmp_path / "one.jsonl").write_text('{"ids": [1]}')
    (tmp_path / "two.jsonl").write_text('{"ids": [1, 2]}')
    (tmp_path / "full").mkdir()
    (tmp_path / "file").write_text("x")
    small = shutil.copytree(tiny, tmp_path / "small")
    tiny_model().save(small)
    before = sorted(tmp_path.rglob("*")) + sorted(tiny.rglob("*"))
    words = flags.format(tmp=tmp_path, small=small).split()
    words = ["--out", tmp_path / "out", *([] if "--model" in words else ["--model", tiny]), *words]
    code, _, error = run("train", *words)
    assert code == 2 and message in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if "error:" in line]) == 1
    assert sorted(tmp_path.rglob("*")) + sorted(tiny.rglob("*")) == before


def test_help_names_the_defaults(run):
    code, printed, _ = run("train", "--help")
    assert code == 0 and "passes over the examples (default: 8)" in " ".join(printed.split())
    assert "default: None" not in printed and "default: False" not in printed
