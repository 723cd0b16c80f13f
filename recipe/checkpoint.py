"""Checkpoints of train.py, from which a run continues with the same bits.

    OUT.steps/00000012/rank-00000.safetensors   what rank 0 holds of the weights and AdamW's state
    OUT.steps/00000012/state.json               the step, the run, and the metrics so far

Every rank writes and reads its own file: no process gathers the state, and the time does not grow
with the number of processes. A directory is filled under a draft name, flushed to the disk, then
renamed, so a kill or a full disk at any moment leaves the last whole checkpoint.
"""
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor


def check_output(out: Path, steps: Path, overwrite: bool, resume: bool) -> None:
    """ValueError if a run that writes `out` would destroy something."""
    if out.exists() and not (overwrite and (out / "run.json").is_file()):
        raise ValueError(f"{out} exists: choose another --out, or --overwrite a result of train.py")
    if any(steps.glob("*")) and not overwrite and not resume:
        raise ValueError(f"{steps} holds a stopped run: --resume or --overwrite it")
    out.parent.mkdir(parents=True, exist_ok=True)


def local_state(model, optimizer) -> dict[str, torch.Tensor]:
    """What this rank holds of the weights and of the optimizer's state, by name."""
    state = {}
    for name, p in model.named_parameters():
        for key, tensor in {"weight": p.detach(), **optimizer.state[p]}.items():
            state[f"{name}.{key}"] = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return state


def save(steps: Path, step: int, run: dict, metrics: list, model, optimizer, rank: int) -> None:
    """Writes a checkpoint after `step` steps, then removes the ones before it."""
    final = steps / f"{step:08}"
    draft = final.with_suffix(".draft")
    draft.mkdir(parents=True, exist_ok=True)
    shard = draft / f"rank-{rank:05}.safetensors"
    try:
        save_file(local_state(model, optimizer), shard)
    except SafetensorError as error:            # the disk is full, for example
        raise OSError(f"{shard}: {error}") from None
    flush(shard)
    if dist.is_initialized():
        dist.barrier()                          # every rank's file is on the disk
    if rank > 0:
        return
    state = {"step": step, "run": run, "metrics": metrics}
    (draft / "state.json").write_text(json.dumps(state), encoding="utf-8")
    commit(draft, final)
    for path in steps.iterdir():
        if path != final:
            shutil.rmtree(path)


def load_latest(steps: Path, run: dict, model, optimizer, rank: int) -> tuple[int, list]:
    """Loads the newest checkpoint; returns its step and metrics. ValueError if its run differs."""
    for path in steps.glob("*.draft"):
        print(f"skipped {path}: incomplete")
    newest = max(steps.glob("*[0-9]"), default=None)
    if newest is None:
        raise ValueError(f"{steps} holds no checkpoint to resume from")
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    different = [f"{key} was {state['run'].get(key)}, is {run[key]}" for key in run
                 if state["run"].get(key) != run[key]]
    if different:
        raise ValueError(f"{newest} is of another run: {'; '.join(different)}")
    for p in model.parameters():                # AdamW allocates these in its first step
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    with safe_open(newest / f"rank-{rank:05}.safetensors", framework="pt") as file:
        for name, tensor in local_state(model, optimizer).items():
            tensor.copy_(file.get_tensor(name))
    print(f"resumed from {newest}, step {state['step']}", flush=True)
    return state["step"], state["metrics"]


def commit(draft: Path, final: Path) -> None:
    """Flushes a directory to the disk, then gives it its final name."""
    flush(*draft.iterdir(), draft)
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    flush(final.parent)


def flush(*paths: Path) -> None:
    for path in paths if os.name == "posix" else ():        # Windows cannot open a directory
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
