"""train.py: gradients however a step is cut, several processes, crash and resume, cost."""
import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import tiny_model
from torch.utils.flop_counter import FlopCounterMode

import train
from bench import QWEN, S1
from data import BadInput, deal, tokens_in
from model import Block, FusedLinearCrossEntropy, Transformer


def forked(function, **environment):
    """The process id of a copy of this process that runs `function` and ends: Python is up."""
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
        traceback.print_exc()
    finally:
        os._exit(code)


def two(function):
    """Run `function` in two processes that find each other; both must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [forked(function, WORLD_SIZE=2, RANK=rank, LOCAL_RANK=rank,
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in (0, 1)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]


def command(tiny, out, *arguments):
    return ["--model", tiny, "--out", out, "--n", 10, "--batch-size", 4, "--epochs", 2, *arguments]


def call(*arguments):
    """train.py in this process, without capturing: for forked ones."""
    sys.argv = ["train.py", *map(str, arguments)]
    train.main()


def weights(directory):
    return safetensors.torch.load_file(directory / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---- Gradients ------------------------------------------------------------------------------


def unequal(n=16, vocabulary=64):
    """Examples from 4 to about 200 tokens, from a few to most of them supervised."""
    rng = random.Random(0)
    lengths = [4 + int(200 * rng.random() ** 4) for _ in range(n)]
    return [([rng.randrange(vocabulary) for _ in range(T)], rng.randrange(1, T))
            for T in lengths]


def test_a_step_is_the_same_in_one_row_in_sixteen_and_on_two_processes(tmp_path, monkeypatch):
    batch, found = unequal(), {}
    longest = max(len(ids) for ids, _ in batch)
    for room in (99999, longest):
        model = tiny_model()
        loss, rows = train.gradients(model, batch, room, "cpu")
        found[len(rows)] = {name: p.grad for name, p in model.named_parameters()}, loss
    rows_of_longest = max(found)
    assert 3 < rows_of_longest < 16
    with monkeypatch.context() as patch:        # a row for each sequence
        patch.setattr(train, "deal", lambda batch, room, world: [[example] for example in batch])
        model = tiny_model()
        loss, rows = train.gradients(model, batch, longest, "cpu")
        found[len(rows)] = {name: p.grad for name, p in model.named_parameters()}, loss
    assert sorted(found) == [1, rows_of_longest, 16]

    def process():
        torch.distributed.init_process_group("gloo")
        rank, model = torch.distributed.get_rank(), tiny_model()
        train.share(model, "cpu", 2, autocast=False)
        loss, _ = train.gradients(model, batch, longest, "cpu", False, rank, 2)
        gathered = {name: train.whole(p.grad).contiguous() for name, p in model.named_parameters()}
        if rank == 0:
            safetensors.torch.save_file({**gathered, "loss": loss}, tmp_path / "two")
        torch.distributed.destroy_process_group()
    two(process)
    loaded = safetensors.torch.load_file(tmp_path / "two")
    found["two processes"] = loaded, loaded.pop("loss")

    expected, mean = found.pop(1)
    for gradients, loss in found.values():
        torch.testing.assert_close(loss, mean, atol=1e-5, rtol=0)
        for name in expected:
            torch.testing.assert_close(gradients[name], expected[name], atol=1e-5, rtol=0)


def test_two_processes_train_as_one_does(run, tiny, tmp_path):
    arguments = ("--n", 40, "--tokens-per-batch", 400, "--max-steps", 20)
    code, _, error = run("train", *command(tiny, tmp_path / "one", *arguments))
    assert code == 0, error
    two(lambda: call(*command(tiny, tmp_path / "two", *arguments)))
    assert len(losses(tmp_path / "two")) == 20
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    one, shared = (Transformer.load(tmp_path / name) for name in ("one", "two"))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(shared(ids), one(ids), atol=2e-2, rtol=0)  # Adam: see test_programs


def test_recomputation_changes_the_memory_and_not_the_gradient():
    """What is kept for backward is counted as it is kept."""
    found = []
    for recompute in (False, True):
        model, kept = tiny_model(), []
        model.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t,
                                                      lambda t: t):
            ids = torch.arange(60)[None]
            loss, _ = model(ids, targets=ids)
        loss.backward()
        found.append((sum(kept), {name: p.grad for name, p in model.named_parameters()}))
    (plain, expected), (less, got) = found
    assert less < plain / 2
    assert same(got, expected)


def test_recompute_runs_each_block_again_to_the_same_end(run, tiny, tmp_path, monkeypatch):
    calls, found, forward = [], [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda *inputs: calls.append(1) or forward(*inputs))
    for name, flags in (("plain", ()), ("recomputed", ("--recompute",))):
        calls.clear()
        assert run("train", *command(tiny, tmp_path / name, *flags))[0] == 0
        found.append((len(calls), weights(tmp_path / name)))
    (once, plain), (twice, recomputed) = found
    assert twice == 2 * once > 0 and same(plain, recomputed)


def test_compile_compiles_the_loss_and_the_parts_of_a_block(run, tiny, tmp_path, monkeypatch):
    """What is captured runs as it is, to the same bits: inductor's code is not ours to test."""
    captured, compiled = [], torch.compile

    def backend(graph, inputs):
        captured.append(graph)
        return graph
    monkeypatch.setattr(torch, "compile", lambda step, **how: compiled(
        step, **how | {"backend": backend}))
    monkeypatch.setattr(FusedLinearCrossEntropy, "compiled", False)     # put back behind the test
    torch.compiler.reset()
    for name, flags in (("plain", ()), ("compiled", ("--compile",))):
        assert run("train", *command(tiny, tmp_path / name, *flags))[0] == 0
        assert bool(captured) == bool(flags)
    code = " ".join(graph.code for graph in captured)
    assert "silu" in code and "rms_norm" in code and "softmax" in code
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "compiled"))


def test_a_machine_without_git_trains_too(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert train.origin(1)["commit"] == "unknown"


def test_bfloat16_computes_in_bfloat16_over_float32_weights(run, tiny, tmp_path):
    for dtype in ("float32", "bfloat16"):
        assert run("train", *command(tiny, tmp_path / dtype, "--dtype", dtype))[0] == 0
    assert losses(tmp_path / "bfloat16") != losses(tmp_path / "float32")
    assert losses(tmp_path / "bfloat16") == pytest.approx(losses(tmp_path / "float32"), abs=0.1)
    assert all(p.dtype == torch.float32 for p in weights(tmp_path / "bfloat16").values())


def test_the_written_weights_are_of_the_dtype_asked_for(run, tiny, tmp_path):
    assert run("train", *command(tiny, tmp_path / "a", "--save-dtype", "bfloat16"))[0] == 0
    assert all(p.dtype == torch.bfloat16 for p in weights(tmp_path / "a").values())


def test_rows_are_full():
    """s1's lengths: 1,000 with a mean of about 4,700 tokens into rows of 32,768."""
    rng = random.Random(0)
    lengths = [min(30000, round(rng.lognormvariate(8.25, 0.62))) for _ in range(1000)]
    assert 4000 < sum(lengths) / 1000 < 5400
    rows = deal([([0] * T, 1) for T in lengths], 32768)
    assert sorted(len(ids) for row in rows for ids, _ in row) == sorted(lengths)
    assert all(tokens_in(row) <= 32768 for row in rows)
    assert sum(lengths) / (32768 * len(rows)) >= 0.95


def test_processes_share_a_steps_tokens_evenly():
    """s1's lengths, sixteen a step: no process waits long, and none has nothing to do."""
    rng, busy = random.Random(0), {}
    for world in (2, 4, 8):
        used = taken = 0
        for _ in range(20):
            batch = [([0] * min(30000, round(rng.lognormvariate(8.25, 0.62))), 1)
                     for _ in range(16)]
            rows = [tokens_in(row) for row in deal(batch, 32768, world)]
            assert sum(rows) == sum(len(ids) for ids, _ in batch) and max(rows) <= 32768
            assert len(rows) <= -(-len(deal(batch, 32768)) // world) * world
            used, taken = used + sum(rows), taken + train.places(rows, world)
        busy[world] = used / taken
    assert busy[2] > 0.95 and busy[4] > 0.9 and busy[8] > 0.6
    assert train.places([5, 3, 2], 2) == 14


# ---- Crash and resume -----------------------------------------------------------------------


def interrupt(monkeypatch, step):
    """Ctrl-C while the line of this step is being printed, the first time it is."""
    whole, done = train.line, []

    def line(row, steps):
        if row["step"] == step and not done:
            done.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return whole(row, steps)
    monkeypatch.setattr(train, "line", line)


@pytest.fixture(autouse=True)
def signals():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("step", [0, 2, 3])                # 3 steps an epoch: its middle, its end
def test_ctrl_c_saves_and_resume_is_bitwise(run, tiny, tmp_path, monkeypatch, step):
    assert run("train", *command(tiny, tmp_path / "whole"))[0] == 0
    interrupt(monkeypatch, step)
    code, printed, error = run("train", *command(tiny, tmp_path / "parts"))
    assert code == 130 and "--resume" in printed and "Traceback" not in error
    assert not (tmp_path / "parts").exists()
    code, printed, _ = run("train", *command(tiny, tmp_path / "parts", "--resume"))
    assert code == 0 and f"step {step + 1}\n" in printed
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert not (tmp_path / "parts.steps").exists()


def test_a_stopped_run_is_not_begun_anew_by_mistake(run, tiny, tmp_path, monkeypatch):
    interrupt(monkeypatch, 1)
    assert run("train", *command(tiny, tmp_path / "a"))[0] == 130
    code, _, error = run("train", *command(tiny, tmp_path / "a"))
    assert code == 2 and "a.steps" in error and (tmp_path / "a.steps" / "00000002").exists()
    assert run("train", *command(tiny, tmp_path / "a", "--resume"))[0] == 0
    said = json.loads((tmp_path / "a" / "run.json").read_text())["command"]
    assert said.startswith("python train.py") and "--resume" not in said


def test_ctrl_c_to_one_of_two_processes_stops_both(tiny, tmp_path, monkeypatch):
    """The other may be on another machine, where no terminal reaches it."""
    whole, arguments = train.line, command(tiny, tmp_path / "a", "--tokens-per-batch", 400)

    def line(row, steps):
        if row["step"] == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGINT)
        return whole(row, steps)
    monkeypatch.setattr(train, "line", line)

    def process():
        with pytest.raises(SystemExit) as stop:
            call(*arguments)
        assert stop.value.code == 130
    two(process)
    assert [path.name for path in (tmp_path / "a.steps").iterdir()] == ["00000002"]
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()
    two(lambda: call(*arguments, "--resume"))
    assert len(losses(tmp_path / "a")) == 6
    said = json.loads((tmp_path / "a" / "run.json").read_text())["command"]
    assert said.startswith("torchrun --nproc-per-node 2 -- train.py")


def test_checkpoints_come_when_asked_for_and_the_newest_stays(run, tiny, tmp_path, monkeypatch):
    kept = []
    save = train.save

    def watched(directory, *rest):
        steps = tmp_path / "a.steps"
        kept.append([path.name for path in steps.iterdir()] if steps.exists() else [])
        save(directory, *rest)
    monkeypatch.setattr(train, "save", watched)
    assert run("train", *command(tiny, tmp_path / "a", "--save-every", 2))[0] == 0
    assert kept == [[], ["00000002"], ["00000004"]]     # behind step 2, 4 and, the end, 6


def test_a_run_that_differs_is_not_resumed(run, tiny, tmp_path, monkeypatch):
    interrupt(monkeypatch, 1)
    assert run("train", *command(tiny, tmp_path / "a"))[0] == 130
    before = weights(tmp_path / "a.steps" / "00000002")
    for change, said in ((("--lr", 1e-4), "--lr was 0.002, is 0.0001"),
                         (("--tokens-per-batch", 512), "--tokens-per-batch was 8192, is 512"),
                         (("--seed", 1), "--seed was 0, is 1"), (("--n", 11), "--data was")):
        code, _, error = run("train", *command(tiny, tmp_path / "a", "--resume", *change))
        assert code == 2 and said in error and error.count("\n") == 1, error
    assert same(weights(tmp_path / "a.steps" / "00000002"), before)
    assert run("train", *command(tiny, tmp_path / "b", "--resume"))[0] == 2


def test_a_half_written_checkpoint_is_passed_over_and_named(run, tiny, tmp_path, monkeypatch):
    interrupt(monkeypatch, 1)
    run("train", *command(tiny, tmp_path / "a"))
    half = tmp_path / "a.steps" / "00000003.draft"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"\0" * 10)
    code, printed, _ = run("train", *command(tiny, tmp_path / "a", "--resume"))
    assert code == 0 and f"passed over {half}" in printed and "step 2\n" in printed


def test_kill_at_any_moment_leaves_a_whole_checkpoint(tiny, tmp_path):
    """SIGKILL at random moments, twenty times; what is left always loads, and goes on to the same
    end as a run that nobody killed."""
    out, whole = tmp_path / "a", tmp_path / "whole"

    def start(out, *more):
        return forked(lambda: call(*command(tiny, out, "--epochs", 20, *more)))

    def goes_on():
        there = any(path.name.isdecimal() for path in (tmp_path / "a.steps").glob("*"))
        return start(out, "--save-every", 1, *(["--resume"] if there else []))

    def end(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert end(start(whole)) == 0
    rng, killed = random.Random(0), 0
    while killed < 20:
        pid = goes_on()
        time.sleep(rng.uniform(0.02, 0.25))
        os.kill(pid, signal.SIGKILL)
        if end(pid) == 0:                       # it had come to its end: again from the beginning
            assert same(weights(out), weights(whole))
            shutil.rmtree(out)
            continue
        killed += 1
        if list((tmp_path / "a.steps").glob("*[0-9]")):
            checkpoint, state = train.newest(out)
            Transformer.load(checkpoint)
            assert state["step"] == int(checkpoint.name)
    assert out.exists() or end(goes_on()) == 0
    assert same(weights(out), weights(whole))


def test_a_full_disk_leaves_the_last_checkpoint(run, tiny, tmp_path, monkeypatch):
    interrupt(monkeypatch, 1)
    run("train", *command(tiny, tmp_path / "a"))

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)       # writing beyond it is an error then
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with open(tmp_path / "error", "w") as error, contextlib.redirect_stderr(error):
            call(*command(tiny, tmp_path / "a", "--resume", "--save-every", 1))
    pid = forked(full)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    error = (tmp_path / "error").read_text()
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert train.newest(tmp_path / "a")[1]["step"] == 2
    assert run("train", *command(tiny, tmp_path / "a", "--resume"))[0] == 0


def test_what_is_not_finite_never_touches_the_weights(run, tiny, tmp_path, monkeypatch):
    whole, seen = train.gradients, []

    def gradients(model, batch, *rest):
        loss, rows = whole(model, batch, *rest)
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if len(seen) == 3:
            next(model.parameters()).grad[0, 0] = math.nan
        return loss, rows
    monkeypatch.setattr(train, "gradients", gradients)
    code, _, error = run("train", *command(tiny, tmp_path / "a", "--save-every", 2))
    assert code == 2 and "step 3: loss" in error and "gradient nan" in error
    assert "examples begin with: '<|im_start|>" in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()
    checkpoint, _ = train.newest(tmp_path / "a")
    assert same(weights(checkpoint), {name: seen[-1][name] for name in weights(checkpoint)})


# ---- Cost -----------------------------------------------------------------------------------


def test_flops_are_those_that_pytorch_counts():
    """Of the matrix products; attention, which it counts in full, is half of that here."""
    model, T = tiny_model(), 40
    ids = torch.arange(T)[None]
    targets = torch.where(ids < 10, -100, ids)
    with FlopCounterMode(display=False) as counter:
        loss, _ = model(ids, targets=targets)
        loss.backward()
    c = model.config
    attention = 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * T * T
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counted.items() if op in ("aten.mm", "aten.addmm", "aten.bmm"))
    ours = train.flops(c, [T], T - 10) - attention
    assert products == pytest.approx(ours, rel=1e-6)
    two = train.flops(c, [10, 30], 0)
    assert two - train.flops(c, [40], 0) == pytest.approx(-attention * (1 - (100 + 900) / 1600))


PLAN = vars(S1) | {"devices": 16}


def test_the_plan_of_s1_takes_26_minutes(capsys):
    examples = [([0] * 4700, 300)] * 1000
    train.plan(SimpleNamespace(**PLAN), QWEN["32B"][1], examples, 315)
    printed = capsys.readouterr().out
    minutes = float(printed.split(" minutes")[0].split("\n")[-1])
    assert 26 * 0.85 < minutes < 26 * 1.15
    assert "32,76" in printed and "315 steps, 23,500,000 tokens" in printed
    hours = float(printed.split(" device-hours")[0].split()[-1])
    assert hours == pytest.approx(16 * minutes / 60, abs=0.02)         # minutes have one digit
    assert "it fits" in printed and "devices 99.2% busy" in printed     # 1,000 are 62.5 times 16


def test_the_plan_says_what_would_make_it_fit(capsys):
    config, examples = QWEN["7B"][1], [([0] * 4700, 300)] * 100
    train.plan(SimpleNamespace(**{**PLAN, "recompute": False, "devices": 8,
                                  "device_memory_gb": 40}), config, examples, 10)
    assert "does not fit: --recompute makes it fit" in capsys.readouterr().out
    train.plan(SimpleNamespace(**{**PLAN, "devices": 1}), config, examples, 10)
    assert "does not fit: more --devices" in capsys.readouterr().out
    with pytest.raises(BadInput, match="--device-tflops"):
        train.plan(SimpleNamespace(**{**PLAN, "device_tflops": None}), config, examples, 10)


def test_the_plan_reads_no_weights_and_writes_nothing(run, tiny, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((tiny / name).read_bytes())
    code, printed, error = run("train", *command(bare, tmp_path / "a", "--plan",
                                                 "--device-tflops", 1))
    assert code == 0 and "6 steps" in printed, error
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_every_step_is_a_line_and_a_row_and_the_end_tells_the_cost(run, tiny, tmp_path):
    code, printed, _ = run("train", *command(tiny, tmp_path / "a", "--device-tflops", 1,
                                             "--usd-per-hour", 7200))
    assert code == 0
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(rows) == 6
    for line, row in zip(lines, rows):
        assert f"loss {row['loss']:.4f}" in line and f"norm {row['grad_norm']:.3f}" in line
        assert f"{row['tokens_per_second']:,.0f} tokens/s" in line and "MFU" in line
        assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / 1e12)
        assert row["memory_bytes"] > 0
    spent = sum(row["seconds"] for row in rows)
    assert f"{2 * spent:.2f} dollars" in printed
    assert f"{sum(row['flops'] for row in rows):.3g} FLOPs" in printed
    share = sum(row["tokens"] for row in rows) / (6 * 8192)    # each step's four fit in one row
    assert f"rows {100 * share:.1f}% full" in printed
