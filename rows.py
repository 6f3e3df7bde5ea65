"""Rows on disk, and who writes which: the JSONL formats that the scripts share, and how they survive kills and ranks.
Also what all scripts share: ranks (distributed, gather), the command line whose errors are one line (command_line), and
flags that mean the same everywhere (add_run_flags, same_flags). At the end of the file: stepwise rows out of files, hub
sets and the original schemas of PRM800K and Math-Shepherd.

Stepwise rows (annotate.py writes, train.py reads; TRL's format, so hub sets load as they are):
    {"prompt": str, "completions": [str, ...], "labels": [bool or float, ...]}, and optionally id, domain, source,
    values (Monte-Carlo estimate of each step; too high where rollouts stopped early), rollouts, votes, first_error
Sample rows (search.py and evaluate.py write and read; other projects' outputs convert in a few lines):
    {"id", "domain", "question", "answer" or "tests", "picked": int, "cost": {...},
     "samples": [{"steps": [str], "scores": [float] or null, "answer": str or null, "correct": bool, "tokens": int}]}
    and of each sample optionally "end": "eos", "answer", or "length" (cut off: ranks below all others). search.py adds
    "strategy", "vote" (index that the vote picks), "curve" ([tokens, seconds, sample] whenever the best answer changed:
    Figures 4 and 5), "overshoot" (tokens) and "compared"
"""
import argparse
import atexit
import glob
import gzip
import hashlib
import json
import os
import random
import re
import sys
import zlib
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


def read_rows(file):
    """Yield (line number, row) of a JSONL file, or (row number, row) of a JSON array; .gz or not. What is no JSON
    object is a ValueError file:line."""
    number = 0
    with (gzip.open if str(file).endswith(".gz") else open)(file, "rt", encoding="utf-8") as lines:
        try:
            array = lines.read(1) == "["
            lines.seek(0)
            for number, text in enumerate([lines.read()] if array else lines, 1):
                if not text.strip():
                    continue
                found = json.loads(text)
                for n, row in enumerate(found, 1) if array else [(number, found)]:
                    if not isinstance(row, dict):
                        raise ValueError(f"{file}:{n}: a JSON object is expected, not {type(row).__name__}")
                    yield n, row
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{error.lineno if array else number}: not JSON ({error})") from error
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:  # the last three: a broken .gz
            raise ValueError(f"{file}:{number + 1}: {error}") from error


def hub_rows(name, *where, **keywords):
    """("NAME:NUMBER", row) of a data set on the hub. where, keywords: what load_dataset takes."""
    import datasets
    try:
        rows = datasets.load_dataset(*where, **keywords)
    except Exception as error:  # the hub client raises many kinds; each of them means that there is no data
        why = (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise ConnectionError(f"cannot load {name} from the hub: {why}. Pass a local copy: --data FILE (annotate.py: "
                              "--task-data FILE), .jsonl, .json or .gz") from None
    return ((f"{name}:{n}", row) for n, row in enumerate(rows, 1))


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
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
                                timeout=timedelta(days=2))  # ranks meet when all are done, and some are done early
        # Left to the interpreter's end, the group's threads may still run then, and the process aborts.
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        # But nccl's end waits for the other ranks, who may wait for this one: a rank that fails must not come there.
        sys.excepthook = lambda *error, show=sys.excepthook: (show(*error), leave(1))
    return (dist.get_rank() if world > 1 else 0), world, device


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


# ---------------------------------------------------------------- stepwise rows, and the two original schemas

def first_wrong(labels):
    """The first step whose label says wrong, from 0; -1 where there is none (as in ProcessBench). None is no label."""
    return next((t for t, y in enumerate(labels) if y is not None and y < 0.5), -1)


def from_prm800k(row, neutral="good"):
    """A PRM800K record -> stepwise rows: the path that was followed, and one row for each rated alternative to it.

    A path step carries the rating of the completion chosen there; a human's text (chosen_completion null) was never
    rated, label None. Alternatives repeat the path before them unlabelled, so that each rating is used once.
    Ratings: 1 good, -1 bad, 0 neutral (`neutral`: "good", "bad", or "drop": no label), null no label.
    """
    y = {1: 1.0, -1: 0.0, 0: {"good": 1.0, "bad": 0.0, "drop": None}[neutral], None: None}
    if row["label"]["finish_reason"] == "bad_problem":
        return []
    path, labels, rows = [], [], []
    for step in row["label"]["steps"]:
        completions, chosen, human = step["completions"] or [], step["chosen_completion"], step["human_completion"]
        for i, c in enumerate(completions):
            if i != chosen and y[c["rating"]] is not None:
                rows.append((path + [c["text"]], [None] * len(path) + [y[c["rating"]]]))
        if chosen is None and not human:
            break  # found_error, give_up: nothing was chosen, the record ends
        path = path + [human["text"] if chosen is None else completions[chosen]["text"]]
        labels = labels + [None if chosen is None else y[completions[chosen]["rating"]]]
    rows = [(path, labels), *rows] if path else rows
    answer = {"answer": row["question"]["ground_truth_answer"]} if row["question"].get("ground_truth_answer") else {}
    return [{"prompt": row["question"]["problem"], "completions": s, "labels": v, **answer} for s, v in rows]


def from_math_shepherd(row, neutral=None):
    """A Math-Shepherd record -> [stepwise row].

    `input` has the Cyrillic tag "ки" after each step; `label` is the same text with the tags replaced by + or -. The
    sign is read at the tag's offset, since + and - also occur in sums; each tag before shifted it by one character.
    A tag inside the question is an annotation error of the set, and is ignored.
    """
    text, signs = row["input"], row["label"]
    first = re.search(r"\bstep 1:", text, re.IGNORECASE)
    begin = first.start() if first else text.find("?", 0, text.find("ки")) + 1  # a few rows number no steps
    if begin <= 0:
        raise ValueError('input: no "Step 1:" and no "?" where the question could end')
    steps, labels, a = [], [], begin
    for k, tag in enumerate(re.finditer("ки", text)):
        sign = signs[tag.start() - k:tag.start() - k + 1]
        if sign not in ("+", "-"):
            raise ValueError(f"label: {sign!r} where the tag of step {k + 1} is, + or - is expected")
        if tag.start() >= begin:
            steps.append(text[a:tag.start()].strip())
            labels.append(float(sign == "+"))
            a = tag.end()
    return [{"prompt": text[:begin].replace("ки", "").strip(), "completions": steps, "labels": labels}]


FORMATS = {"stepwise": lambda row, neutral: [row], "prm800k": from_prm800k, "math-shepherd": from_math_shepherd}


def check(row):
    """Raise a ValueError that names the field if this is no stepwise row. A label is in [0, 1], or None: not known."""
    prompt, steps, labels = (row.get(k) for k in ("prompt", "completions", "labels"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("prompt: a text is expected")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
        raise ValueError("completions: a list of texts is expected")
    "".join([prompt, *steps]).encode()  # half a surrogate pair is a ValueError here, and would be worse in a tokenizer
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise ValueError(f"labels: {len(steps)} are expected, one for each of completions, not {labels!r:.60}")
    for y in labels:
        if y is not None and not (isinstance(y, (int, float)) and 0 <= y <= 1):
            raise ValueError(f"labels: {y!r} is not in [0, 1]")


def read_set(name, form="auto", neutral="good"):
    """Yield (where, stepwise row) of a JSONL file or of a hub set's train split."""
    if Path(name).is_file():
        found = ((f"{name}:{number}", row) for number, row in read_rows(name))
    elif name.endswith((".jsonl", ".gz", ".json")):
        raise ValueError(f"{name}: no such file")
    else:
        found = hub_rows(name, name, split="train")
    for where, raw in found:
        schema = form if form != "auto" else "prm800k" if isinstance(raw.get("label"), dict) else \
            "math-shepherd" if "label" in raw and "input" in raw else "stepwise"
        try:
            for row in FORMATS[schema](raw, neutral):
                check(row)
                yield where, row
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{where}: not a {schema} row ({error!r})") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def load_data(specs, form, neutral, samples, seed):
    """All sets of --data as one list of (where, row): at most `samples` of each, drawn at random (§3.1, Table 3).

    Weights ("a.jsonl:0.5") are shares: the largest mixture with these shares in which no row occurs twice.
    """
    sets = []
    for spec in specs:
        name, _, weight = spec.rpartition(":")
        if not name or not re.fullmatch(r"\d*\.?\d+", weight):
            name, weight = spec, None
        rows = list(tqdm(read_set(name, form, neutral), f"read {name}", disable=None, leave=False))
        if not rows:
            raise ValueError(f"{name}: no rows")
        random.Random(f"{seed} {Path(name).name}").shuffle(rows)  # by name: whatever the other sets, wherever it lies
        sets.append((rows[:samples], weight))
    if any(w is not None for _, w in sets):
        if any(w is None or float(w) <= 0 for _, w in sets):
            raise ValueError("--data: give every set a weight above 0, or none of them one")
        total = min(len(rows) / float(w) for rows, w in sets)
        sets = [(rows[:round(total * float(w))], w) for rows, w in sets]
    return [row for rows, _ in sets for row in rows]


def held_out(prompt, fraction):
    """Does this problem belong to validation? A hash of the question decides: all its solutions fall on one side, and
    on the same side in every set and every run, so that PRMs trained on different sets can be compared."""
    digest = hashlib.blake2b(" ".join(prompt.split()).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") < fraction * 2 ** 48


def split(found, val_found, fraction, val_samples):
    """(training rows, validation rows) with no problem on both sides: val_found, or what is held out of `found`; of
    validation rows at most val_samples, drawn from all sets."""
    def problem(row):
        return " ".join(row["prompt"].split())  # as held_out() has it
    asked = {problem(row) for _, row in val_found or found if val_found or held_out(row["prompt"], fraction)}
    val_found = val_found or [(where, row) for where, row in found if problem(row) in asked]
    found = [(where, row) for where, row in found if problem(row) not in asked]
    if not found or not val_found:
        raise ValueError(f"{'validation' if found else 'training'} would be empty: {len(asked)} problems are held out "
                         f"(--val-fraction, --val-data), and {len(found)} rows are left to train on")
    random.Random(0).shuffle(val_found)
    return found, val_found[:val_samples]
