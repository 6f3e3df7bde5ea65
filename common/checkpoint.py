"""How a run of train.py survives a kill and outgrows one GPU. Nothing of the paper is in here.

    OUT/*.safetensors, config.json ...   the best PRM so far (--prm OUT of the other scripts)
    OUT/log.jsonl                        one line a step
    OUT/checkpoint-STEP                  weights, moments, counters, until the run has ended
    OUT/step-STEP                        with --snapshots the PRM of each evaluation

A folder appears whole or not at all. torch.distributed.checkpoint stores each tensor once, whatever
the number of ranks: a run may go on with more or fewer of them, if ranks x --accumulate stays.
"""
import json
import math
import os
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.utils.logging import disable_progress_bar

from common.run import expect, gather, is_first, whole_lines, write_rows


@contextmanager
def preemption():
    """A list that a SIGTERM appends to: finish the step, save, exit 0."""
    stop = []
    before = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def check_out_folder(out, resume, overwrite, total, trained):
    """Before any training: a ValueError, on every rank, if --out is taken or cannot be written.

    total, trained: numbers of parameters. Weights in fp32 (of the PRM and the checkpoint) and two
    moments are on disk twice while a new file replaces an old one.
    """
    problem, needed = None, 16 * (total + trained)
    resumable = resume and (out / "log.jsonl").exists()
    if out.is_dir() and any(out.iterdir()) and not overwrite and not resumable:
        problem = "is taken: --resume goes on with it, --overwrite starts it again"
    elif is_first():
        try:
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()  # root may write where the mode forbids it: try
            replaced = [*out.glob("*.safetensors"), *out.glob("checkpoint*/*")]
            free = shutil.disk_usage(out).free + sum(file.stat().st_size for file in replaced)
            if free <= needed:
                problem = f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        except OSError as error:
            problem = f"cannot be written: {error.strerror}"
    problem = gather(problem)[0]
    expect(not problem, f"--out {out} {problem}")


def shard(prm, device, bf16):
    """--fsdp: spread each layer's weights, gradients and moments over the ranks.

    Rank 0 has read the weights. The other ranks have empty shapes and receive their shards.
    """
    whole = prm.state_dict()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None,
                                  reduce_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for part in [*prm.backbone.layers, prm]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    if not is_first():
        prm.to_empty(device=device)
    options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    states.set_model_state_dict(prm, whole if is_first() else {}, options=options)
    for buffer in prm.buffers():  # the rotary frequencies are in no state dict
        dist.broadcast(buffer, 0)


def save_prm(out, prm, best, snapshot=None):
    """Write the PRM as it is now to the folder `snapshot`, and to OUT if it is the best.

    A kill amid these moves leaves no or not all weights in OUT, never a mixture of two PRMs;
    --resume comes by here again and moves the rest.
    """
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = states.get_model_state_dict(prm, options=options)  # a collective: on every rank
    disable_progress_bar()  # of transformers, amid the lines of the log
    if is_first() and snapshot:
        prm.save(out / snapshot, state)
    if is_first() and best:
        prm.save(out / "best", state)
        for old in out.glob("model*.safetensors*"):  # the new ones may be fewer files
            old.unlink()
        files = sorted((out / "best").iterdir(), key=lambda file: file.name.startswith("model"))
        for file in files:  # backbone last: a kill must not leave it beside the old head
            os.replace(file, out / file.name)
        (out / "best").rmdir()


def save_checkpoint(out, model, optimizer, progress):
    """Write OUT/checkpoint-STEP, at once or not at all. Only then the checkpoint before it goes."""
    partial, final = out / "checkpoint.partial", out / f"checkpoint-{progress['step']:08d}"
    weights, moments = states.get_state_dict(model, optimizer)
    try:
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=partial,
                 no_dist=not dist.is_initialized())
    except CheckpointException as error:  # no Exception: a full disk would be a page of traceback
        raise OSError(f"{partial}: {str(error).strip().splitlines()[-1]}") from None
    if is_first():
        (partial / "progress.json").write_text(json.dumps(progress))
        os.replace(partial, final)
        for old in set(out.glob("checkpoint-*")) - {final}:
            shutil.rmtree(old)


def write_log(out, kind, step, figures, of="", more=()):
    """Append a row to OUT/log.jsonl, on rank 0, and print it in short, with more words."""
    if is_first():
        with open(out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")
        short = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in figures.items()}
        words = [f"{name} {value}" for name, value in short.items() if value is not None]
        print(f"{kind} {step}{of}:", *words, *more, flush=True)


def read_log(out):
    """The rows of OUT/log.jsonl, without a line that a kill has cut off; [] if there is no file."""
    file = out / "log.jsonl"
    return [json.loads(line) for line in whole_lines(file)] if file.exists() else []


def begin(out, resume, settings, model, optimizer):
    """Start a run, or load weights and moments from its last checkpoint -> progress, a dict:

    step (optimizer steps done), best and best_step (validation loss), worse (evaluations since),
    settings, totals (what the log counts). Cuts off the log behind that step, and removes the other
    files of a killed run. ValueError: --resume with other settings.
    """
    # one process that saves alone is warned that there is no process group
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
    totals = {"tokens": 0, "seconds": 0.0, "flops": 0, "flops_with_attention": 0}
    progress = {"step": 0, "best": math.inf, "best_step": 0, "worse": 0, "settings": settings,
                "totals": totals}
    checkpoint = max(out.glob("checkpoint-*"), default=None) if resume else None
    if checkpoint:
        progress |= json.loads((checkpoint / "progress.json").read_text())
        changed = [f"--{name.replace('_', '-')} was {value}, is {settings.get(name)}"
                   for name, value in progress["settings"].items() if settings.get(name) != value]
        expect(not changed, f"--resume: not the run of {checkpoint}: {'; '.join(changed)}")
        weights, moments = states.get_state_dict(model, optimizer)  # dcp fills these in place
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=checkpoint,
                 no_dist=not dist.is_initialized())
        states.set_state_dict(model, optimizer, model_state_dict=weights,
                              optim_state_dict=moments)
    progress["totals"] = Counter(progress["totals"])
    gather("every rank has read before rank 0 removes files")
    if is_first():
        rows = read_log(out) if checkpoint else []
        write_rows(out / "log.jsonl", [row for row in rows if row["step"] <= progress["step"]])
        stale = set(out.glob("checkpoint*")) - {checkpoint}
        for folder in stale if checkpoint else stale.union(out.glob("step-*")):
            shutil.rmtree(folder)
    return progress


def finish(out):
    """Remove the checkpoints. The best PRM stays."""
    for folder in out.glob("checkpoint*") if is_first() else ():
        shutil.rmtree(folder)
    gather("OUT is whole when any rank returns")
