"""Shared by all scripts: ranks, rows that survive kills, one-line errors, and the common flags.

    rank, world, device = distributed(args.device)
    rows = journaled("runs/rows.jsonl", problems, solve_chunk, resume=args.resume)
"""
import argparse
import atexit
import glob
import json
import math
import os
import pickle
import re
import sys
import threading
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError  # a full disk
from tqdm import tqdm

from common import early

TINY = Path(__file__).resolve().parents[1] / "tiny"  # the models and rows of this repository
PARTS = ".part[0-9]*"  # beside --out: the rows of each rank until the end
PAUSE = 30  # seconds between lines of progress where there is no terminal


def distributed(device=None):
    """(rank, world size, device) of this process. Under torchrun, starts the process group.

    The default device is cuda:LOCAL_RANK, or the CPU where there is no GPU. CPU and GPU take the
    same path: gloo carries tensors on the CPU. ValueError: this machine has no such device.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    on_gpu = device.startswith("cuda")
    expect(device == "cpu" or on_gpu and torch.cuda.is_available(),
           f"--device {device}: there is none here; cpu, cuda or cuda:N is expected")
    if on_gpu:
        torch.cuda.set_device(device)
    # torchrun with one process makes a group, too: DDP and --fsdp can be tried on one GPU
    if (world > 1 or dist.is_torchelastic_launched()) and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        # ranks that finish early wait for the last one, which may take hours
        dist.init_process_group(backend, timeout=timedelta(days=2))
        # the group's threads would outlive the interpreter, and abort the process
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        # nccl's shutdown waits for the other ranks, which may wait for one that fails
        sys.excepthook = lambda *error, show=sys.excepthook: (show(*error), leave(1))
    return rank_and_world()[0], world, device


def leave(code):
    """End this process at once, without the functions that atexit would call."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def gather(value):
    """[value of rank 0, value of rank 1, ...], on every rank. Also serves as a barrier."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first():
    """Is this rank 0? By torchrun's word: there may be no process group yet."""
    return os.environ.get("RANK", "0") == "0"


def bar(total, desc, **keywords):
    """A tqdm bar, of rank 0; where there is no terminal, a line every half minute, in a log say."""
    if not is_first():
        keywords["disable"] = True
    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, **keywords)
    line = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}\n"
    first = min(5, PAUSE)  # seconds to the first line
    progress = tqdm(total=total, desc=desc, bar_format=line, mininterval=PAUSE, miniters=0,
                    delay=first, position=0, **keywords)  # another one moves the cursor
    if not progress.disable:
        progress.last_print_t -= PAUSE - first
        threading.Thread(target=show_life, args=(progress,), daemon=True).start()
    return progress


def show_life(progress):
    """Write the line although nothing has been finished meanwhile, until the bar is closed."""
    while not progress.disable:
        time.sleep(PAUSE / 10)
        if not progress.disable and time.time() - progress.last_print_t >= PAUSE:
            progress.refresh()
            progress.last_print_t = time.time()


def journaled(out, items, make, names=None, chunk=100, resume=False, desc="problems"):
    """make(list of items) -> their rows, for all items on all ranks; every rank returns all rows.

    Each item has an id, or `names` gives the ids of its rows. The rows are returned, and written to
    the JSONL file `out` (None: no file), in the order of the items, whatever the number of ranks.
    Finished rows are appended to one part file a rank: after `kill -9`, `resume` reads these and
    makes only the missing rows. ValueError: two rows with one id, or a file that cannot be resumed.
    """
    names = names or (lambda item: [item["id"] if isinstance(item, dict) else item.id])
    ids = list(chain.from_iterable(names(item) for item in items))
    repeated = [repr(name) for name, count in Counter(ids).items() if count > 1]
    expect(not repeated, f"{len(repeated)} ids occur more than once, {''.join(repeated[:1])} among "
           "them")
    rank, world = rank_and_world()
    finished = {} if out is None else collect(Path(out), resume)
    # an item with several rows is made again unless all of its rows are there
    todo = [item for item in items if not finished.keys() >= set(names(item))][rank::world]
    rows = []
    with bar(len(todo), desc, disable=not todo) as progress:
        for start in range(0, len(todo), chunk):
            batch = todo[start:start + chunk]
            rows += (new := make(batch))
            if out is not None:
                with open(f"{out}.part{rank}", "a", encoding="utf-8") as file:
                    file.write(jsonl(new))  # a kill cuts the last line at most
            progress.update(len(batch))
    finished |= {row["id"]: row for row in chain.from_iterable(gather(rows))}
    rows = [finished.pop(name) for name in ids if name in finished]
    if out is not None:
        merge(Path(out), [*rows, *finished.values()])  # rows of other items stay, at the end
    return rows


def collect(out, resume):
    """{id: row} of what a killed run left in `out` and its part files, which become one file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [file for file in (out, *beside(out, PARTS)) if file.exists()]
    finished = {}
    for file in files if resume else ():
        for number, line in enumerate(whole_lines(file), 1):
            with located(f"{file}:{number}: not a row that --resume could keep"):
                row = json.loads(line)
                finished[row["id"]] = row
    gather("every rank has read before rank 0 writes")
    merge(out, finished.values() if files else None)
    return finished


def merge(out, rows):
    """Rank 0 writes the rows (None: there are none to write) and removes the part files."""
    if is_first() and rows is not None:
        write_rows(out, rows)
        for part in beside(out, PARTS):
            part.unlink()
    gather("rank 0 has written before any rank goes on")


def whole_lines(file):
    """A file's lines as bytes, without a last line that a kill or a full disk has cut off."""
    return file.read_bytes().split(b"\n")[:-1]


def beside(out, pattern):
    """Files named like `out`, followed by the pattern. The name itself may contain [ or *."""
    return sorted(out.parent.glob(glob.escape(out.name) + pattern))


def begun(out):
    """Files of an earlier run: `out` or, if that run was killed, OUT.part0 or OUT.votes.part0."""
    return [f for f in (out, *beside(out, ".votes*"), *beside(out, PARTS)) if f.exists()]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_rows(file, rows):
    """Write a JSONL file that a kill leaves either old or new."""
    partial = Path(f"{file}.partial")
    partial.write_text(jsonl(rows), encoding="utf-8")
    os.replace(partial, file)


# what reading a row of another form, or unpacking what is in it, raises
ROW_ERRORS = (ValueError, LookupError, TypeError, AttributeError, StopIteration, SyntaxError,
              EOFError, RecursionError, zlib.error, pickle.UnpicklingError)


@contextmanager
def located(place):
    """What is wrong with a row becomes a ValueError "PLACE: why"."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{place}: no field {error}") from error
    except ROW_ERRORS as error:
        raise ValueError(f"{place}: {str(error) or 'not such a row'}") from error


def expect(condition, message):
    """ValueError unless the condition holds."""
    if not condition:
        raise ValueError(message)


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of thirty flags before it.

    `with parser:` turns what the user can mend (ValueError, OSError, ImportError, a full disk,
    Ctrl-C) into one line as well.
    """

    args = None

    def parse_known_args(self, *words):  # parse_args() calls it
        self.args, rest = super().parse_known_args(*words)
        return self.args, rest

    def error(self, message, code=2):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        if dist.is_initialized():
            leave(code)  # see distributed()
        self.exit(code)

    def __enter__(self):
        early.flags_are_fine()

    def __exit__(self, kind, error, trace):
        if isinstance(error, (ValueError, OSError, ImportError, SafetensorError)):
            self.error(str(error))
        if isinstance(error, KeyboardInterrupt):
            resumable = getattr(self.args, "out", None) and hasattr(self.args, "resume")
            hint = "; the same command with --resume goes on from there" if resumable else ""
            self.error(f"stopped by Ctrl-C{hint}", code=130)  # 128 + SIGINT, as a shell has it


def command_line(description):
    as_written = argparse.RawDescriptionHelpFormatter
    return CommandLine(description=description, formatter_class=as_written)


def bounded(low, high, words, kind=float):
    """A type of flag: a number from low to high."""
    def number(text):
        if not low <= (value := kind(text)) <= high:  # also false for nan
            raise argparse.ArgumentTypeError(f"{words} is expected, not {text}")
        return value
    return number


share = bounded(0, 1, "a share from 0 to 1")
amount = bounded(0, sys.float_info.max, "a finite number from 0 upwards")
whole = bounded(0, sys.maxsize, "a whole number from 0 upwards", int)
natural = bounded(1, sys.maxsize, "a whole number from 1 upwards", int)


def pattern(text):
    """A type of flag: the text of a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def new_file(text):
    """A type of flag: a file to be written, whose folder must be there before any work."""
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder")
    return text


def need_positive(parser, args, *names):
    """Exit with one line if one of these flags is given and is 0, negative, nan or inf."""
    for name in names:
        value = getattr(args, name)
        if value == parser.get_default(name):
            continue  # not given; a default may be inf: no limit
        if not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {value}")


def add_run_flags(parser, limit=None, summary=True):
    """The flags that mean the same in every script. summary: has --overwrite and --json, too."""
    a = parser.add_argument
    a("--limit", type=int, default=limit, help="problems, or rows of each file "
      f"({limit or '100, first errors: all'}: raise it for a whole set)")
    a("--seed", type=int, default=0)
    a("--device", help="default: cuda if there is one, else cpu")
    a("--dtype", choices=["float32", "bfloat16", "float16"],
      help="default: bfloat16 on cuda, float32 elsewhere")
    a("--out", help="where the result goes")
    a("--resume", action="store_true", help="go on with --out")
    if summary:
        a("--overwrite", action="store_true", help="replace --out")
        a("--json", type=new_file, help="write the summary here, too")


def check_run_flags(parser, args, *positive):
    """Exit with one line if a flag named in `positive` is not positive, or --out is taken."""
    need_positive(parser, args, "limit", *positive)
    if args.out and not (args.resume or getattr(args, "overwrite", False)):
        for file in begun(Path(args.out)):
            other = "--overwrite" if hasattr(args, "overwrite") else "another --out"
            parser.error(f"{file} exists: pass --resume to go on with it, or {other}")


# flags that may change, since no row depends on them
FREE = ("limit", "concurrent", "no_baseline", "device", "html", "json", "out", "resume",
        "overwrite")


def served(*models):
    """The names of those models that servers have, None for others."""
    return [getattr(model, "served", None) for model in models]


def same_flags(parser, args, **more):
    """Exit with one line if --resume would mix rows of different flags. OUT.flags keeps them.
    more: what the rows depend on beside the flags."""
    if not args.out or not is_first():
        return
    out = Path(args.out)
    file = Path(f"{out}.flags")
    flags = {name: value for name, value in vars(args).items() if name not in FREE} | more
    if args.resume and begun(out) and file.exists():
        before = json.loads(file.read_text())
        for name in flags:
            if name in before and before[name] != flags[name]:  # a new flag may be missing
                flag = f"--{name.replace('_', '-')}" if hasattr(args, name) else name
                parser.error(f"{out} was begun with {flag} {before[name]}, not {flags[name]}: "
                             "take another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(file, [flags])  # a kill leaves no half of it
