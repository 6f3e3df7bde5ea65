"""What all scripts share: ranks (distributed, gather), rows that survive kills (journaled), one-line errors
(command_line), and flags that mean the same everywhere (add_run_flags, same_flags).
"""
import argparse
import atexit
import glob
import json
import os
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

TINY = Path(__file__).resolve().parents[1] / "tiny"  # the models and rows that come with the repository


def distributed(device=None):
    """(rank, world size, device) of this process, with the process group up when started by torchrun.

    One path for CPU and GPU: without --device it is cuda:LOCAL_RANK where there is one, and gloo carries the CPU.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device in (None, "cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() or device else "cpu"
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"--device {device}: there is none here; cpu, cuda or cuda:N is expected")
    if device != "cpu":
        torch.cuda.set_device(device)
    # torchrun starts a group of one process, too: DDP, nccl and --fsdp can be tried on one GPU
    if (world > 1 or dist.is_torchelastic_launched()) and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
                                timeout=timedelta(days=2))  # ranks meet when all are done, and some are done early
        # Left to the interpreter's end, the group's threads may still run then, and the process aborts.
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        # But nccl's end waits for the other ranks, who may wait for this one: a rank that fails must not come there.
        sys.excepthook = lambda *error, show=sys.excepthook: (show(*error), leave(1))
    return (dist.get_rank() if dist.is_initialized() else 0), world, device


def leave(code):
    """End this process at once, without what is registered for its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gather(value):
    """[value of rank 0, value of rank 1, ...], on every rank."""
    found = [value]
    if dist.is_initialized():
        dist.all_gather_object(found := [None] * dist.get_world_size(), value)
    return found


def journaled(out, items, make, names=None, chunk=100, resume=False, desc="problems"):
    """make(some items) -> their rows, for all items and over all ranks -> on rank 0 all rows, elsewhere [].

    items: each has an id, or `names` tells the ids of its rows. Rows come back, and go to the JSONL file `out` (None:
    no file), in the order of the items, whatever the number of ranks. Whole lines are appended as they are finished,
    one part file a rank: after `kill -9` at any moment, `resume` finds what was appended and makes only the rest.
    """
    names = names or (lambda item: [item["id"] if isinstance(item, dict) else item.id])
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    done, twice = {}, [name for name, n in Counter(name for x in items for name in names(x)).items() if n > 1]
    if twice:
        raise ValueError(f"{len(twice)} ids occur more than once, {twice[0]!r} among them")
    if out is not None:
        out = Path(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        files = [f for f in [out, *beside(out, ".part*")] if f.exists()]
        for file in files if resume else ():
            for n, line in enumerate(whole_lines(file), 1):
                try:
                    row = json.loads(line)
                    done[row["id"]] = row
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{file}:{n}: not a row that --resume could keep ({error!r})") from error
        gather("a barrier: every rank has read before anyone writes")
        if rank == 0 and files:
            write_rows(out, done.values())
            for part in set(files) - {out}:
                part.unlink(missing_ok=True)  # write_rows has used OUT.partial
        gather("a barrier")
    mine, rows = [x for x in items if not done.keys() >= set(names(x))][rank::world], []
    for start in tqdm(range(0, len(mine), chunk), desc, unit_scale=chunk, disable=rank > 0 or not mine or None):
        new = make(mine[start:start + chunk])
        if out is not None:
            with open(out.with_name(f"{out.name}.part{rank}"), "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in new))
        rows += new
    done |= {r["id"]: r for part in gather(rows) for r in part}
    if rank > 0:
        return []
    rows = [done.pop(name) for x in items for name in names(x) if name in done]
    if out is not None:
        write_rows(out, [*rows, *done.values()])  # what was there of other items stays, at the end
        for part in beside(out, ".part*"):
            part.unlink()
    return rows


def whole_lines(file):
    """The lines of a file that was appended to, as bytes, without a last one that a kill or a full disk has cut off."""
    return file.read_bytes().split(b"\n")[:-1]


def beside(out, pattern):
    """The files whose names are out's and then the pattern; out's own name may hold [ or *."""
    return sorted(out.parent.glob(glob.escape(out.name) + pattern))


def begun(out):
    """What a run has left at out: when it was killed, out.part0 or out.votes.part0."""
    return [f for f in (out, *beside(out, ".votes*"), *beside(out, ".part*")) if f.exists()]


def write_rows(file, rows):
    """A JSONL file, replaced as a whole or not at all."""
    partial = Path(file).with_name(Path(file).name + ".partial")
    partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    os.replace(partial, file)


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of forty flags before it. `with parser:` what the user can
    mend, a ValueError, OSError or ImportError, becomes one, too."""

    def error(self, message):
        if dist.is_initialized():
            print(f"{self.prog}: error: {message}", file=sys.stderr)
            leave(2)  # see distributed()
        self.exit(2, f"{self.prog}: error: {message}\n")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, (ValueError, OSError, ImportError)):
            self.error(str(error))


def command_line(description):
    return CommandLine(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_run_flags(parser, limit=None):
    """The flags that mean the same in every script."""
    a = parser.add_argument
    a("--limit", type=int, default=limit, help=f"problems, or rows of each file ({limit}: raise it for a whole set)")
    a("--seed", type=int, default=0)
    a("--device", help="default: cuda if there is one, else cpu")
    a("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on cuda, float32 elsewhere")
    a("--out", help="where the result goes")
    a("--resume", action="store_true", help="go on with --out")
    a("--overwrite", action="store_true", help="replace --out")
    a("--json", help="write the summary here, too")


def need_folder(parser, args, *names):
    """Exit with one line where the file that a flag names could not be written after all the work."""
    for name in names:
        if (file := getattr(args, name)) and not Path(file).absolute().parent.is_dir():
            parser.error(f"--{name} {file}: no such folder")


def need_positive(parser, args, *names):
    """Exit with one line where one of these flags is given, and not above 0."""
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")


def check_run_flags(parser, args, *positive):
    """Exit with one line when a flag named in `positive` is not, or --out is taken."""
    need_positive(parser, args, "limit", *positive)
    need_folder(parser, args, "json")
    if args.out and not (args.resume or args.overwrite):
        for file in begun(Path(args.out)):
            parser.error(f"{file} exists: pass --resume to go on with it, or --overwrite")


def same_flags(parser, args, free=("limit", "concurrent", "max_batch_tokens", "device", "json", "out", "resume",
                                   "overwrite")):
    """Exit with one line when --resume would go on with rows that other flags made. OUT.flags tells; flags in `free`
    may change: they do not change a row."""
    if args.out and os.environ.get("RANK", "0") == "0":
        out = Path(args.out)
        file, now = out.with_name(out.name + ".flags"), {k: v for k, v in vars(args).items() if k not in free}
        with parser:
            was = json.loads(file.read_text()) if args.resume and begun(out) and file.exists() else now
            for k in (k for k in now if k in was and was[k] != now[k]):
                parser.error(f"--resume: {out} was begun with --{k.replace('_', '-')} {was[k]}, not {now[k]}")
            out.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(now) + "\n")
