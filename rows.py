"""Rows on disk, and who writes which: the JSONL formats that the scripts share, and how they survive kills and ranks.

Stepwise rows (annotate.py writes, train.py reads; TRL's format, so hub sets load as they are):
    {"prompt": str, "completions": [str, ...], "labels": [bool or float, ...]}, and optionally id, domain, source,
    values (Monte-Carlo estimate of each step), rollouts, votes, first_error
Sample rows (search.py and evaluate.py write and read; other projects' outputs convert in a few lines):
    {"id", "domain", "question", "answer" or "tests", "picked": int, "cost": {...},
     "samples": [{"steps": [str], "scores": [float] or null, "answer": str or null, "correct": bool, "tokens": int}]}
"""
import gzip
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist


def read_rows(file):
    """Yield (line number, row) of a JSONL file, .gz or not. A line that is no JSON object is a ValueError file:line."""
    opened = gzip.open(file, "rt", encoding="utf-8") if str(file).endswith(".gz") else open(file, encoding="utf-8")
    with opened as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}:{number}: not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{file}:{number}: a JSON object is expected, not {type(row).__name__}")
                yield number, row


def distributed(device=None):
    """(rank, world size, device) of this process, with the process group up when started by torchrun.

    One path for CPU and GPU: without --device it is cuda:LOCAL_RANK where there is one, and gloo carries the CPU.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device in (None, "cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() or device else "cpu"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return (dist.get_rank() if world > 1 else 0), world, device


class Journal:
    """Rows of an --out file, keyed by "id": whole lines are appended as they are finished, one part file a rank, and
    merged into one file in the end. After `kill -9` at any moment, what was appended is found again (--resume)."""

    def __init__(self, out, rank=0, resume=False):
        self.out, self.rank, self.rows = Path(out) if out else None, rank, []
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.part = self.out.with_name(f"{self.out.name}.part{rank}")
        files = [f for f in [self.out, *sorted(self.out.parent.glob(self.out.name + ".part*"))] if f.exists()]
        if resume:
            found = {}
            for file in files:
                text = file.read_text(encoding="utf-8")
                for line in text[:text.rfind("\n") + 1].splitlines():  # a line cut off by a kill was not finished
                    row = json.loads(line)
                    found[row["id"]] = row
            self.rows = list(found.values())
        if dist.is_initialized():
            dist.barrier()  # every rank has read before anyone writes
        if rank == 0:
            if self.rows:
                self._replace(self.rows)
            for file in files:
                if file != self.out or not resume:
                    file.unlink(missing_ok=True)
        if dist.is_initialized():
            dist.barrier()

    def append(self, rows):
        if self.out is not None and rows:
            with open(self.part, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
                file.flush()
                os.fsync(file.fileno())

    def finish(self, rows, order, world):
        """All ranks' rows on rank 0, in the order of the ids given; --out is replaced at once by the whole."""
        if world > 1:
            gathered = [None] * world if self.rank == 0 else None
            dist.gather_object(rows, gathered)
            rows = [r for part in gathered for r in part] if self.rank == 0 else []
        by_id = {r["id"]: r for r in rows}
        rows = [by_id[i] for i in order if i in by_id]
        if self.out is not None and self.rank == 0:
            self._replace(rows)
            for part in self.out.parent.glob(self.out.name + ".part*"):
                part.unlink()
        return rows

    def _replace(self, rows):
        partial = self.out.with_name(self.out.name + ".partial")
        partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        os.replace(partial, self.out)


def add_run_flags(parser, limit=None):
    """The flags that mean the same in every script."""
    a = parser.add_argument
    a("--limit", type=int, default=limit, help=f"problems or rows to use ({limit or 'all'})")
    a("--seed", type=int, default=0)
    a("--device", help="default: cuda if there is one, else cpu")
    a("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on cuda, float32 elsewhere")
    a("--out", help="where the result goes")
    a("--resume", action="store_true", help="go on with --out")
    a("--overwrite", action="store_true", help="replace --out")
    a("--json", help="write the summary here, too")


def check_run_flags(parser, args, *positive):
    """Exit with one line when a flag named in `positive` is not, or --out is taken."""
    for name in ("limit", *positive):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    if args.out and Path(args.out).exists() and not (args.resume or args.overwrite):
        parser.error(f"{args.out} exists: pass --resume to go on with it, or --overwrite")
