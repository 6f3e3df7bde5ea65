"""How a run of train.py survives a kill and outgrows one GPU: the best PRM, checkpoints, --resume and --fsdp's shards.
Nothing of the paper is in here; train.py can be read without it.

    OUT/*.safetensors, config.json ...   the best PRM so far (--prm OUT of the other scripts)
    OUT/log.jsonl                        one line a step
    OUT/checkpoint-STEP                  weights, moments, counters, until the run has ended
    OUT/step-STEP                        with --snapshots the PRM of each evaluation

Folders appear whole or not at all. A checkpoint of torch.distributed.checkpoint holds each tensor once, whatever the
number of ranks, so that a run may go on with more or fewer of them (its product with --accumulate staying the same).
"""
import json
import math
import os
import shutil
import tempfile
import warnings
from collections import Counter

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from common.run import gather, whole_lines, write_rows


def is_master():
    return not dist.is_initialized() or dist.get_rank() == 0


def check_out_folder(out, resume, overwrite, total, trained):
    """Before any training: a ValueError, on every rank, if --out cannot be written. total, trained: parameters."""
    problem, needed = None, 16 * (total + trained)  # fp32: PRM and checkpoint, two moments; twice while replaced
    if out.is_dir() and any(out.iterdir()) and not overwrite and not (resume and (out / "log.jsonl").exists()):
        problem = f"--out {out} is taken: --resume goes on with it, --overwrite starts it again"
    elif is_master():
        try:
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
            replaced = [*out.glob("*.safetensors"), *out.glob("checkpoint*/*")]
            held = sum(f.stat().st_size for f in replaced)
            if (free := shutil.disk_usage(out).free + held) <= needed:
                problem = f"--out {out} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        except OSError as error:
            problem = f"--out {out} cannot be written: {error.strerror}"
    if problem := gather(problem)[0]:
        raise ValueError(problem)


def shard(prm, device, bf16):
    """--fsdp: each layer's weights, gradients and moments are spread over the ranks. Rank 0 has read the weights, the
    others have empty shapes and receive their shards."""
    whole = prm.state_dict()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for part in [*prm.backbone.layers, prm]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    if not is_master():
        prm.to_empty(device=device)
    states.set_model_state_dict(prm, whole if is_master() else {},
                                options=states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for buffer in prm.buffers():  # the rotary frequencies are in no state dict
        dist.broadcast(buffer, 0)


def save_prm(out, prm, model, best, snapshot=None):
    """The PRM as it is now becomes the folder `snapshot`, and OUT if it is the best. A kill between two files of OUT
    leaves no mixture, but none or not all of the weights; --resume comes by here again and moves them. model: prm, or
    what DDP made of it."""
    state = states.get_model_state_dict(model, options=states.StateDictOptions(full_state_dict=True, cpu_offload=True))
    if is_master() and snapshot:
        prm.save(out / snapshot, state)
    if is_master() and best:
        prm.save(out / "best", state)
        for old in out.glob("model*.safetensors*"):  # there may be more files of the old ones than of the new
            old.unlink()
        for file in (out / "best").iterdir():
            os.replace(file, out / file.name)
        (out / "best").rmdir()


def save_checkpoint(out, model, optimizer, progress):
    """OUT/checkpoint-STEP appears at once or not at all, and only then the one before it goes."""
    partial, final = out / "checkpoint.partial", out / f"checkpoint-{progress['step']:08d}"
    weights, moments = states.get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=partial, no_dist=not dist.is_initialized())
    if is_master():
        (partial / "progress.json").write_text(json.dumps(progress))
        os.replace(partial, final)
        for old in set(out.glob("checkpoint-*")) - {final}:
            shutil.rmtree(old)


def load_checkpoint(folder, model, optimizer):
    weights, moments = states.get_state_dict(model, optimizer)  # are filled in place
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder, no_dist=not dist.is_initialized())
    states.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def read_log(out):
    """The finished lines of OUT/log.jsonl, none if there is no such file."""
    file = out / "log.jsonl"
    return [json.loads(line) for line in whole_lines(file)] if file.exists() else []


def begin(out, resume, settings, model, optimizer):
    """Where a run stands: at its beginning, or where its last checkpoint was written, from which weights and moments
    are then loaded -> step: optimizer steps done; best, best_step: validation loss; worse: evaluations since; settings;
    totals: what the log counts. The log is cut off behind that step, and what else a killed run has left is removed."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")  # one process saves alone
    progress = {"step": 0, "best": math.inf, "best_step": 0, "worse": 0, "settings": settings,
                "totals": {"tokens": 0, "seconds": 0.0, "flops": 0, "flops_with_attention": 0}}
    checkpoint = max(out.glob("checkpoint-*"), default=None) if resume else None
    if checkpoint:
        progress |= json.loads((checkpoint / "progress.json").read_text())
        if changed := [f"--{k.replace('_', '-')} was {v}, is {settings.get(k)}"
                       for k, v in progress["settings"].items() if settings.get(k) != v]:
            raise ValueError(f"--resume: not the run of {checkpoint}: {'; '.join(changed)}")
        load_checkpoint(checkpoint, model, optimizer)
    progress["totals"] = Counter(progress["totals"])
    gather("a barrier: all ranks have read")
    if is_master():
        write_rows(out / "log.jsonl", [row for row in read_log(out) if checkpoint and row["step"] <= progress["step"]])
        for old in {*out.glob("checkpoint*"), *(() if checkpoint else out.glob("step-*"))} - {checkpoint}:
            shutil.rmtree(old)
    return progress


def finish(out):
    """The best PRM stays, what resuming needed goes."""
    for old in out.glob("checkpoint*") if is_master() else ():
        shutil.rmtree(old)
    gather("a barrier: OUT is whole when any rank returns")
