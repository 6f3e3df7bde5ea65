"""Train a process reward model: §2.2 and Appendix B.2 of the paper, read from top to bottom.

    python train.py --samples 6000 --epochs 1 --batch-size 64             # a laptop: the tiny world, under two minutes
    python train.py --data trl-lib/math_shepherd --model Qwen/Qwen2.5-0.5B --batch-tokens 16384 --out runs/prm
    torchrun --nproc_per_node=8 train.py --data a.jsonl:0.5 b.jsonl:0.5 --model Qwen/Qwen2.5-7B --batch-tokens 16384 \\
        --accumulate 4 --checkpointing --lr 1e-5 --lr-head 1e-4 --out runs/prm       # add --fsdp from 14B on

--out becomes the PRM itself (`--prm runs/prm` of the other scripts): always the best one so far by validation. Beside
it grow log.jsonl (one line a step; rows of kind start, train, eval, end) and, until the run has ended, checkpoint-STEP
(weights, moments, counters), from which --resume goes on with the very losses of a run that was never stopped.

One optimizer step is --accumulate micro-batches on each rank; a micro-batch is at most --batch-size rows and at most
--batch-tokens tokens, padding included. All randomness is a function of (--seed, epoch, number of the micro-batch):
two ranks do exactly what one rank does with twice the accumulation, and no generator's state needs to be saved.
fp32 weights, gradients and two moments take 16 bytes a parameter, over all ranks together with --fsdp.

Shapes: B rows of a micro-batch, T tokens (padded on the right), M labelled steps.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from prm_model import load_prm
from rows import distributed, read_rows

HERE = Path(__file__).parent
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12}  # dense bf16 FLOP/s
FREE = ("out", "resume", "overwrite", "plot", "json", "log_every", "device", "accumulate")  # may change at --resume

# ---------------------------------------------------------------- data: stepwise rows, and the two original schemas

# One encoded solution. steps: which step (from 0) each label belongs to; where: file:line, for messages.
Row = namedtuple("Row", "ids positions labels steps where")


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
    return [{"prompt": row["question"]["problem"], "completions": s, "labels": v} for s, v in rows]


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


def guess_format(row):
    if isinstance(row.get("label"), dict):
        return "prm800k"
    return "math-shepherd" if "input" in row and "label" in row else "stepwise"


def check(row):
    """Raise a ValueError that names the field if this is no stepwise row. A label is in [0, 1], or None: not known."""
    prompt, steps, labels = (row.get(k) for k in ("prompt", "completions", "labels"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("prompt: a text is expected")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
        raise ValueError("completions: a list of texts is expected")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise ValueError(f"labels: {len(steps)} are expected, one for each of completions, not {labels!r:.60}")
    for y in labels:
        if y is not None and not (isinstance(y, (bool, int, float)) and 0 <= y <= 1):
            raise ValueError(f"labels: {y!r} is not in [0, 1]")


def read_set(name, form="auto", neutral="good"):
    """Yield (where, stepwise row) of a JSONL file or of a hub set's train split."""
    if Path(name).is_file():
        found = ((f"{name}:{number}", row) for number, row in read_rows(name))
    elif name.endswith((".jsonl", ".gz", ".json")):
        raise ValueError(f"{name}: no such file")
    else:
        from datasets import load_dataset
        try:
            found = ((f"{name}[{i}]", row) for i, row in enumerate(load_dataset(name, split="train")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{name}: no such file, and the hub gave: {str(error).splitlines()[0]}") from error
    for where, raw in found:
        schema = guess_format(raw) if form == "auto" else form
        try:
            for row in FORMATS[schema](raw, neutral):
                check(row)
                yield where, row
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{where}: not a {schema} row ({error!r})") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def load_data(specs, form, neutral, samples, limit, seed):
    """All sets of --data as one list of (where, row): at most `samples` of each, drawn at random (§3.1, Table 3).

    Weights ("a.jsonl:0.5") are shares: the largest mixture with these shares in which no row occurs twice.
    """
    sets = []
    for spec in specs:
        name, _, weight = spec.rpartition(":")
        if not name or not re.fullmatch(r"\d*\.?\d+", weight):
            name, weight = spec, None
        rows = list(itertools.islice(tqdm(read_set(name, form, neutral), f"read {name}", leave=False), limit or None))
        if not rows:
            raise ValueError(f"{name}: no rows")
        random.Random(f"{seed} {name}").shuffle(rows)  # by name: the draw does not depend on the other sets
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


def encode_rows(prm, found, max_length, mask_after_first_error=False, progress=True):
    """(where, stepwise row) pairs -> Rows, exactly as prm.encode() joins them, tokenised many steps at a time.

    What follows the last labelled step cannot change the loss and is cut off. Rows left without any label (all beyond
    max_length, or none known) are dropped.
    """
    rows, prompts = [], {}
    for start in tqdm(range(0, len(found), 1000), "encode", disable=not progress, leave=False):
        part = found[start:start + 1000]
        texts = [s for _, r in part for s in r["completions"]]
        steps = iter(prm.tokenizer(texts, add_special_tokens=False)["input_ids"])
        for where, row in part:
            if row["prompt"] not in prompts:
                prompts[row["prompt"]] = prm.encode_prompt(row["prompt"])
            ids, kept = list(prompts[row["prompt"]]), []
            masked = False
            for t, y in enumerate(row["labels"]):
                ids += next(steps) + prm.separator_ids
                if y is not None and not masked and len(ids) <= max_length:
                    kept.append((len(ids) - 1, float(y), t))
                masked = masked or (mask_after_first_error and y is not None and y < 0.5)
            if kept:
                positions, labels, index = zip(*kept)
                rows.append(Row(torch.tensor(ids[:positions[-1] + 1], dtype=torch.int32), torch.tensor(positions),
                                torch.tensor(labels), torch.tensor(index), where))
    return rows


def plan(lengths, group, batch_size, batch_tokens, seed=0, epoch=0):
    """One epoch as a list of optimizer steps, each a list of at most `group` micro-batches of row numbers.

    Rows of similar length share a micro-batch: shuffle, sort inside windows of about 32 micro-batches (up and down in
    turn, so that windows join without a jump), cut, shuffle the micro-batches. The same on every rank, and for every
    number of ranks with the same group = ranks x accumulation.
    """
    rng, order = random.Random(f"{seed} {epoch}"), list(range(len(lengths)))
    rng.shuffle(order)
    window = 32 * min(batch_size, max(1, batch_tokens * len(lengths) // max(1, sum(lengths))))
    parts = [sorted(order[a:a + window], key=lengths.__getitem__, reverse=bool(a // window % 2))
             for a in range(0, len(order), window)]
    batches, longest = [[]], 0
    for i in itertools.chain(*parts):
        longest = max(longest, lengths[i])
        if batches[-1] and (len(batches[-1]) == batch_size or longest * (len(batches[-1]) + 1) > batch_tokens):
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    rng.shuffle(batches)
    return [batches[a:a + group] for a in range(0, len(batches), group)]


def get_batch(data, rows, device):
    """Row numbers -> ids (B, T), and for each labelled step its row (M), position (M) and label (M).

    No rows (a rank that has nothing left in an epoch's last step) give one padding token and M = 0: a zero gradient.
    """
    chosen = [data[i] for i in rows]
    if not chosen:
        none = torch.zeros(0, dtype=torch.long, device=device)
        return torch.zeros(1, 1, dtype=torch.long, device=device), none, none, none.float()
    ids_BT = pad_sequence([r.ids for r in chosen], batch_first=True).long()
    rows_M = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(r.labels) for r in chosen]))
    positions_M, labels_M = torch.cat([r.positions for r in chosen]), torch.cat([r.labels for r in chosen])
    return tuple(x.to(device, non_blocking=True) for x in (ids_BT, rows_M, positions_M, labels_M))


# ---------------------------------------------------------------- loss and validation

def prm_loss(logits_M, labels_M):
    """Step-level binary cross-entropy, Eq. 2 -> (sum over the M labelled steps, M).

        - [y log p + (1 - y) log(1 - p)],  p = sigmoid(logit),  y in [0, 1]: soft labels are used as they are

    Not a mean: ranks and micro-batches hold different M, and the loop divides once, by the M of the whole step.
    """
    return F.binary_cross_entropy_with_logits(logits_M, labels_M, reduction="sum"), len(labels_M)


def auc_pairs(p, right):
    """(U, pairs): of all pairs of a right and a wrong step, how many rank the right one higher (ties count half)."""
    n1, n0 = int(right.sum()), int((~right).sum())
    _, inverse, counts = p.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse]  # from 1, ties share their mean rank
    return float(ranks[right].sum()) - n1 * (n1 + 1) / 2, n1 * n0


def metrics(logits_M, labels_M, steps_M):
    """Validation figures of all steps of all ranks together; "right" is a label of 0.5 or more, in all but the loss,
    Brier score and calibration error, which take soft labels as they are.

    auc_within compares steps at the same place t only (pairs pooled over t): a PRM that merely learnt that later steps
    are worse gets 0.5 there. f1_wrong: F1 of the wrong class at p < 0.5. ece: 15 equal bins.
    """
    p, y, right = logits_M.double().sigmoid(), labels_M.double(), labels_M >= 0.5
    wrong, said = ~right, p < 0.5
    u, pairs = auc_pairs(p, right)
    places = [auc_pairs(p[steps_M == t], right[steps_M == t]) for t in steps_M.unique()]
    u_within, pairs_within = (sum(x) for x in zip(*places))
    gaps = torch.zeros(15, dtype=torch.float64).index_add_(0, (p * 15).long().clamp(max=14), p - y)
    return {"loss": float(prm_loss(logits_M.double(), y)[0]) / len(p),
            "accuracy": float((said == wrong).double().mean()),
            "auc": u / pairs if pairs else None, "auc_within": u_within / pairs_within if pairs_within else None,
            "f1_wrong": 2 * int((wrong & said).sum()) / max(1, int(wrong.sum() + said.sum())),
            "brier": float(((p - y) ** 2).mean()), "ece": float(gaps.abs().sum()) / len(p),
            "steps": len(p), "right": float(right.double().mean())}


@torch.no_grad()
def evaluate(model, data, batches, rank, world, device, autocast):
    """metrics() of `data`, shared out over the ranks. The (logit, label, step) triples are gathered: no histograms."""
    model.eval()
    found = []
    for batch in batches:
        rows = batch[rank] if rank < len(batch) else []  # an empty one keeps --fsdp's ranks in step
        with autocast():
            logits_M = model(*get_batch(data, rows, device)[:3]).cpu()
        if rows:
            found.append((logits_M, *(torch.cat(x) for x in zip(*((data[i].labels, data[i].steps) for i in rows)))))
    parts = [found]
    if world > 1:
        dist.all_gather_object(parts := [None] * world, found)
    model.train()
    return metrics(*(torch.cat(x) for x in zip(*itertools.chain(*parts))))


def plot(out):
    """OUT/log.jsonl -> OUT/curves.png: the losses, and the validation figures whose leap is Figure 2's emergence."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    log = [row for _, row in read_rows(Path(out) / "log.jsonl")]
    train, val = ([r for r in log if r["kind"] == kind] for kind in ("train", "eval"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    left.plot([r["step"] for r in train], [r["loss"] for r in train], lw=0.6, label="training loss")
    left.plot([r["step"] for r in val], [r["loss"] for r in val], marker=".", label="validation loss")
    for key in ("auc", "auc_within", "accuracy", "f1_wrong"):
        right.plot([r["step"] for r in val], [r[key] for r in val], marker=".", label=key)
    for axis in (left, right):
        axis.set_xlabel("optimizer step")
        axis.legend()
    figure.tight_layout()
    figure.savefig(Path(out) / "curves.png", dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------- files

def take_out(out, resume, overwrite, needed):
    """What keeps --out from being written, or None: asked before anything is trained."""
    taken = [f.name for f in out.iterdir()] if out.is_dir() else []
    if taken and not resume and not overwrite:
        return f"--out {out} is taken: --resume goes on with it, --overwrite starts it again"
    if taken and not {"log.jsonl", "prm_head.safetensors"} & set(taken):
        return f"--out {out} holds other things than a PRM: not touched"
    try:
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
        (out / ".room").write_bytes(b"0" * 4096)
        (out / ".room").unlink()
    except OSError as error:
        return f"--out {out} cannot be written: {error.strerror}"
    return None if free > needed else f"--out {out} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def promote(out):
    """Move the PRM in OUT/best up to OUT, file by file. Killed on the way, --resume finds OUT/best and finishes it."""
    for file in sorted((out / "best").iterdir() if (out / "best").exists() else []):
        os.replace(file, out / file.name)
    shutil.rmtree(out / "best", ignore_errors=True)


def save_best(out, prm, model, dtype, rank):
    """The PRM as it is now becomes OUT. dtype: of the files; the fp32 weights stay in the checkpoint."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        prm.save(out / "best", {k: v.to(dtype) for k, v in state.items()})
        promote(out)


def save_checkpoint(out, model, optimizer, progress, rank, world):
    """OUT/checkpoint-STEP appears at once or not at all, and only then the one before it goes."""
    partial, final = out / "checkpoint.partial", out / f"checkpoint-{progress['step']:08d}"
    if final.exists():
        return
    weights, moments = get_state_dict(model, optimizer)
    with warnings.catch_warnings():  # that one process saves alone
        warnings.simplefilter("ignore", UserWarning)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=partial, no_dist=world == 1)
    if rank == 0:
        (partial / "progress.json").write_text(json.dumps(progress))
        os.replace(partial, final)
        for old in out.glob("checkpoint-*"):
            if old != final:
                shutil.rmtree(old)


def load_checkpoint(folder, model, optimizer, world):
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(state, checkpoint_id=folder, no_dist=world == 1)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


# ---------------------------------------------------------------- the script

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument_group("data").add_argument
    a("--data", nargs="+", default=[str(HERE / "tiny" / "rows.jsonl.gz")], metavar="SET[:SHARE]",
      help="JSONL files or hub sets, each optionally with its share of the mixture")
    a("--format", default="auto", choices=["auto", *FORMATS], help="schema of the sets (default: told by their fields)")
    a("--neutral", default="good", choices=["good", "bad", "drop"], help="what PRM800K's rating 0 means (default good)")
    a("--samples", type=int, default=400_000, help="rows drawn at random from each set (default 400000, as in §3.1)")
    a("--limit", type=int, default=0, help="read only the first rows of each set")
    a("--mask-after-first-error", action="store_true", help="no loss on the steps after the first wrong one")
    a("--max-length", type=int, default=2048, help="tokens; what lies beyond is cut off (default 2048)")
    a("--val-data", nargs="+", metavar="SET[:SHARE]", help="validation sets (default: problems held out of --data)")
    a("--val-fraction", type=float, default=0.05, help="share of the problems held out (default 0.05)")
    a("--val-samples", type=int, default=2000, help="held-out rows to evaluate on at most (default 2000)")
    a = parser.add_argument_group("model").add_argument
    a("--model", default=str(HERE / "tiny" / "l"), help="backbone, or a PRM to go on from: folder or hub id")
    a("--separator", help="what ends a step (default: what the model's folder says, else an empty line)")
    a("--dropout", type=float, default=0.1, help="in the head (default 0.1)")
    a("--freeze-backbone", action="store_true", help="train the head only")
    a = parser.add_argument_group("optimization").add_argument
    a("--batch-size", type=int, default=32, help="rows of a micro-batch at most (default 32)")
    a("--batch-tokens", type=int, default=65536, help="tokens of a micro-batch at most, with padding (default 65536)")
    a("--accumulate", type=int, default=1, help="micro-batches on each rank for one optimizer step (default 1)")
    a("--lr", type=float, help="peak (default 1e-3 below 100 M parameters, else 1e-5)")
    a("--lr-head", type=float, help="peak for the head (default --lr)")
    a("--weight-decay", type=float, default=0.1, help="on matrices only (default 0.1)")
    a("--warmup", type=float, default=0.05, help="share of the steps (default 0.05); then a cosine down to a tenth")
    a("--clip", type=float, default=1.0, help="largest gradient norm (default 1)")
    a("--epochs", type=int, default=3)
    a("--max-steps", type=int, default=0, help="stop after so many optimizer steps (default: all epochs)")
    a("--eval-every", type=int, default=25, help="steps between evaluations (default 25), each with a checkpoint")
    a("--patience", type=int, default=10, help="evaluations without a new best before stopping (default 10; 0: never)")
    a("--stop-on", default="loss", choices=["loss", "auc"], help="validation figure that decides the best")
    a("--seed", type=int, default=0)
    a = parser.add_argument_group("machine").add_argument
    a("--out", default="runs/prm", help="folder of the PRM, its log and its checkpoints (default runs/prm)")
    a("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    a("--overwrite", action="store_true", help="start again where a run is already")
    a("--device", help="cpu, cuda, cuda:1 (default: the GPU of this rank, where there is one)")
    a("--dtype", choices=["float32", "bfloat16"], help="of the arithmetic; weights are fp32 (default bfloat16 on cuda)")
    a("--save-dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the PRM's files")
    a("--fsdp", action="store_true", help="shard weights, gradients and moments over the ranks")
    a("--checkpointing", action="store_true", help="recompute activations layer by layer: less memory, a third slower")
    a("--compile", action="store_true", help="torch.compile the backbone: minutes at first, pays on long runs")
    a("--pretraining-tokens", type=float, help="of the backbone, for its FLOPs (default 18e12 for Qwen2.5)")
    a("--log-every", type=int, default=1, help="steps between printed lines; log.jsonl has them all")
    a("--plot", action="store_true", help="draw OUT/curves.png in the end")
    a("--json", action="store_true", help="print nothing to stdout but the result, as JSON")
    args = parser.parse_args(argv)
    for name in "batch-size batch-tokens accumulate epochs eval-every samples max-length log-every".split():
        if getattr(args, name.replace("-", "_")) < 1:
            parser.error(f"--{name} must be at least 1")
    return parser, args


def main(argv=None):
    parser, args = parse(argv)
    stop = []
    before = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))  # pre-emption: finish the step, save, exit 0
    try:
        return train(args, stop)
    except (ValueError, OSError) as error:
        parser.exit(2, f"train.py: error: {error}\n")
    finally:
        signal.signal(signal.SIGTERM, before)


def train(args, stop):
    # -------- setup: one process or one of torchrun's; CPU (gloo) and GPU (nccl) take the same path
    rank, world, device = distributed(args.device)
    device, out = torch.device(device), Path(args.out)
    group, master = args.accumulate * world, rank == 0
    if args.fsdp and world == 1:
        raise ValueError("--fsdp needs torchrun and more than one process")
    bf16 = (args.dtype or ("bfloat16" if device.type == "cuda" else "float32")) == "bfloat16"
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # warns of in-place changes, of which there are none
    disable_progress_bar()  # of transformers, at each loading and saving

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def barrier():
        if world > 1:
            dist.barrier()

    def say(text):
        if master:
            print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    def log(kind, step, **figures):
        if master:
            with open(out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")

    log_file = out / "log.jsonl"
    if args.resume and log_file.exists() and any(row["kind"] == "end" for _, row in read_rows(log_file)):
        say(f"{out}: this run has ended already")
        return None

    # -------- data: all rows of all sets, split by problem
    found = load_data(args.data, args.format, args.neutral, args.samples, args.limit, args.seed)
    if args.val_data:
        val_found = load_data(args.val_data, args.format, args.neutral, args.samples, args.limit, args.seed)
        asked = {row["prompt"] for _, row in val_found}
        train_found = [(where, row) for where, row in found if row["prompt"] not in asked]
    else:
        held = [held_out(row["prompt"], args.val_fraction) for _, row in found]
        train_found = [x for x, h in zip(found, held) if not h]
        val_found = [x for x, h in zip(found, held) if h]
    val_found = val_found[:args.val_samples]
    if not val_found or not train_found:
        problems = len({row["prompt"] for _, row in found})
        raise ValueError(f"{'validation' if train_found else 'training'} would be empty: {problems} problems, "
                         f"--val-fraction {args.val_fraction}")

    # -------- model: with --fsdp only rank 0 reads the weights, the others make empty shapes and receive their shards
    prm = load_prm(args.model, "meta" if args.fsdp and rank else "cpu" if args.fsdp else device, torch.float32,
                   seed=args.seed, fresh=True, dropout=args.dropout,
                   **({"separator": args.separator} if args.separator else {}))
    prm.train()
    config = prm.backbone.config
    if args.freeze_backbone:
        prm.backbone.requires_grad_(False)
    if args.compile:
        prm.backbone.compile(dynamic=True)
    if args.checkpointing:
        prm.backbone.activation_checkpointing_enable()
    # N counts what multiplies activations: the embedding is looked up, and the LM head is gone
    N = sum(p.numel() for p in prm.parameters()) - prm.backbone.get_input_embeddings().weight.numel()
    trained = sum(p.numel() for p in prm.parameters() if p.requires_grad)
    total = sum(p.numel() for p in prm.parameters())
    problem = [take_out(out, args.resume, args.overwrite, needed=2 * (8 * total + 8 * trained)) if master else None]
    if world > 1:
        dist.broadcast_object_list(problem)
    if problem[0]:
        raise ValueError(problem[0])

    longest = min(args.max_length, args.batch_tokens, config.max_position_embeddings)
    data = encode_rows(prm, train_found, longest, args.mask_after_first_error, master)
    val = encode_rows(prm, val_found, longest, args.mask_after_first_error, master)
    if not data or not val:
        raise ValueError(f"no row has a label within {longest} tokens (--max-length, --batch-tokens, the model)")
    lengths = [len(r.ids) for r in data]
    plans = [step for epoch in range(args.epochs)
             for step in plan(lengths, group, args.batch_size, args.batch_tokens, args.seed, epoch)]
    plans = plans[:args.max_steps or None]
    val_plan = plan([len(r.ids) for r in val], world, args.batch_size, args.batch_tokens)

    if args.fsdp:
        mesh = dist.device_mesh.init_device_mesh(device.type, (world,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else None
        whole = prm.state_dict() if master else {}
        for part in [*prm.backbone.layers, prm]:
            fully_shard(part, mesh=mesh, **({"mp_policy": policy} if policy else {}))
        if not master:
            prm.to_empty(device=device)
        set_model_state_dict(prm, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
        for buffer in prm.buffers():  # the rotary frequencies are in no state dict
            dist.broadcast(buffer, 0)
        model = prm
    else:
        ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(prm, device_ids=ids, gradient_as_bucket_view=True) if world > 1 else prm

    # -------- optimizer: decay on matrices only, a learning rate of its own for the new head
    lr = args.lr or (1e-3 if total < 100e6 else 1e-5)
    groups = [{"params": [p for n, p in prm.named_parameters() if p.requires_grad and (p.ndim > 1) == matrix
                          and n.startswith("head.") == head],
               "weight_decay": args.weight_decay * matrix, "peak": (args.lr_head or lr) if head else lr}
              for head in (False, True) for matrix in (False, True)]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=True)

    def schedule(step):
        """Linear warm-up, then a cosine from 1 down to 0.1 at the last step."""
        warmup = max(1, round(args.warmup * len(plans)))
        done = max(0, step + 1 - warmup) / max(1, len(plans) - warmup)
        return min(1, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * done))

    # -------- what came out of all this, before the first step
    settings = {k: v for k, v in vars(args).items() if k not in FREE} | {"group": group, "rows": len(data)}
    progress = {"step": 0, "best": None, "best_step": 0, "bad": 0, "tokens": 0, "seconds": 0.0, "flops": 0.0,
                "flops_with_attention": 0.0, "settings": settings}
    checkpoints = sorted(out.glob("checkpoint-*")) if args.resume else []
    if checkpoints:
        progress |= json.loads((checkpoints[-1] / "progress.json").read_text())
        changed = [f"--{k.replace('_', '-')} was {v}, is {settings.get(k)}" for k, v in progress["settings"].items()
                   if settings.get(k) != v]
        if changed:
            raise ValueError(f"--resume: not the run of {checkpoints[-1]}: {'; '.join(changed)}")
        load_checkpoint(checkpoints[-1], model, optimizer, world)
    barrier()
    if master:  # no other rank looks at OUT from here on
        kept = [row for _, row in read_rows(log_file) if row["step"] <= progress["step"]] if checkpoints else []
        for old in [] if checkpoints else out.glob("checkpoint-*"):
            shutil.rmtree(old)
        shutil.rmtree(out / "checkpoint.partial", ignore_errors=True)
        promote(out)
        (out / "log.jsonl.partial").write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(out / "log.jsonl.partial", log_file)
    labels = torch.cat([r.labels for r in data])
    quantiles = torch.tensor(lengths, dtype=torch.float).quantile(torch.tensor([0.1, 0.5, 0.9, 1.0])).tolist()
    pretraining = args.pretraining_tokens or (18e12 if "Qwen2.5" in args.model else None)
    start = dict(rows=len(data), val_rows=len(val), dropped=len(train_found) + len(val_found) - len(data) - len(val),
                 labels=len(labels), right=float((labels >= 0.5).float().mean()), tokens=sum(lengths),
                 length_quantiles=quantiles, parameters=total, N=N, trained=trained, optimizer_steps=len(plans), lr=lr,
                 pretraining_flops=6 * N * pretraining if pretraining else None, world=world, settings=settings)
    if not checkpoints:
        log("start", 0, **start)
    say("\n".join(f"{k}: {v}" for k, v in start.items() if k != "settings"))
    say(f"first row ({data[0].where}), tokens and the labels they carry:")
    carried = dict(zip(data[0].positions.tolist(), data[0].labels.tolist()))
    tokens = enumerate(prm.tokenizer.batch_decode([[i] for i in data[0].ids.tolist()]))
    say(" ".join(repr(token)[1:-1] + (f" <{carried[i]:g}>\n" if i in carried else "") for i, token in tokens))

    # -------- the loop
    peak = next((f for name, f in PEAK.items() if device.type == "cuda" and name in torch.cuda.get_device_name()), None)
    saved = getattr(torch, args.save_dtype)
    if progress["step"] == 0:
        figures = evaluate(prm, val, val_plan, rank, world, device, autocast)
        log("eval", 0, **figures)
        say("eval 0 " + show(figures))
    for step in range(progress["step"], len(plans)):
        started, micros = time.perf_counter(), plans[step]
        M = sum(len(data[i].labels) for rows in micros for i in rows)  # of all ranks: each of them knows the plan
        micros = micros + [[]] * (-len(micros) % world)
        mine = list(enumerate(micros))[rank::world]
        loss_sum, seen = torch.zeros((), device=device), []
        for k, (j, rows) in enumerate(mine):
            ids_BT, rows_M, positions_M, labels_M = get_batch(data, rows, device)
            torch.manual_seed((args.seed * len(plans) + step) * group + j)  # dropout: a function of the micro-batch
            last = k == len(mine) - 1  # gradients are exchanged once, with the last micro-batch
            if args.fsdp:
                model.set_requires_gradient_sync(last)
            with nullcontext() if last or model is prm else model.no_sync():
                with autocast():
                    logits_M = model(ids_BT, rows_M, positions_M)
                micro_sum, _ = prm_loss(logits_M, labels_M)
                (micro_sum * (world / M)).backward()  # the exchange takes the mean over ranks: undo it
            loss_sum += micro_sum.detach()
            seen.append((rows, rows_M, logits_M.detach()))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        norm = float(norm.full_tensor() if args.fsdp else norm)
        loss_sum = loss_sum.double().cpu()
        if world > 1:
            dist.all_reduce(loss_sum)
        loss = float(loss_sum) / M
        if not math.isfinite(loss + norm):  # the same on all ranks; the weights are still those of the step before
            bad = [data[rows[i]].where for rows, rows_M, z in seen for i in rows_M[~z.isfinite()].unique().tolist()]
            everywhere = [bad]
            if world > 1:
                dist.all_gather_object(everywhere := [None] * world, bad)
            bad = list(itertools.chain(*everywhere)) or [data[i].where for rows in micros for i in rows]
            raise ValueError(f"step {step + 1}: loss {loss}, gradient norm {norm}, on {', '.join(bad[:8])}"
                             f"{' ...' if len(bad) > 8 else ''}. {out} keeps the best PRM and the last checkpoint")
        for g in optimizer.param_groups:
            g["lr"] = g["peak"] * schedule(step)
        optimizer.step()
        optimizer.zero_grad()

        seconds = time.perf_counter() - started
        row_lengths = [lengths[i] for rows in micros for i in rows]
        padded = sum(len(rows) * max(lengths[i] for i in rows) for rows in micros if rows)
        flops, flops_attention = step_flops(N, config, row_lengths, args.freeze_backbone)
        progress["step"], progress["seconds"] = step + 1, progress["seconds"] + seconds
        progress["tokens"] += sum(row_lengths)
        progress["flops"] += flops
        progress["flops_with_attention"] += flops + flops_attention
        figures = dict(loss=loss, norm=norm, lr=lr * schedule(step), labels=M, tokens=progress["tokens"],
                       tokens_per_second=sum(row_lengths) / seconds, padding=1 - sum(row_lengths) / padded,
                       seconds=progress["seconds"], flops=progress["flops"],
                       flops_with_attention=progress["flops_with_attention"],
                       mfu=(flops + flops_attention) / seconds / world / peak if peak else None)
        log("train", step + 1, **figures)
        if (step + 1) % args.log_every == 0:
            say(f"step {step + 1}/{len(plans)} loss {loss:.4f} norm {norm:.2f} lr {figures['lr']:.1e} "
                f"{figures['tokens_per_second']:.0f} tokens/s padding {figures['padding']:.1%} "
                f"{progress['seconds']:.0f}s")

        # -------- validation: keep the best, stop when it is long ago
        done, stopped = step + 1 == len(plans), False
        if (step + 1) % args.eval_every == 0 or done:
            figures = evaluate(prm, val, val_plan, rank, world, device, autocast)
            log("eval", step + 1, **figures)
            value = figures["loss"] if args.stop_on == "loss" else -(figures["auc"] or 0)
            better = progress["best"] is None or value < progress["best"]
            verdict = torch.tensor([better, not better and 0 < args.patience <= progress["bad"] + 1])
            if world > 1:
                dist.broadcast(verdict, 0)  # rank 0 decides for all: a rounding error must not part the ranks
            better, stopped = verdict.tolist()
            say(f"eval {step + 1} {show(figures)}{' *' if better else ''}")
            if better:
                progress.update(best=value, best_step=step + 1, bad=0)
                save_best(out, prm, model, saved, rank)
            else:
                progress["bad"] += 1
        if done or stopped:
            break
        told = torch.tensor(int(bool(stop)))  # asked last, so that a SIGTERM never costs another step
        if world > 1:
            dist.all_reduce(told)
        if (step + 1) % args.eval_every == 0 or told:
            save_checkpoint(out, model, optimizer, progress, rank, world)
        if told:
            say(f"SIGTERM: saved at step {step + 1}, --resume goes on from there")
            return None

    # -------- the end: the best PRM stays, what resuming needed goes
    memory = (torch.cuda.max_memory_allocated() if device.type == "cuda" else
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    result = {k: progress[k] for k in ("best_step", "best", "tokens", "flops", "seconds")}
    result.update(stopped_early=stopped, peak_memory=memory)
    log("end", progress["step"], **result)
    if master:
        for old in out.glob("checkpoint*"):
            shutil.rmtree(old)
        if args.plot:
            plot(out)
    say(f"the best PRM, of step {progress['best_step']}, is in {out}")
    if args.json and master:
        print(json.dumps(result))
    barrier()
    return result


def show(figures):
    return " ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())


def step_flops(N, config, lengths, frozen):
    """(6 N D, what attention adds): a forward takes 2 N a token, the backward twice that; QK' and PV of a causal row of
    n tokens take 2 h n^2 a layer forward, h = heads x head size. A frozen backbone has no backward."""
    k, heads = 1 if frozen else 3, config.num_attention_heads
    h = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * k * N * sum(lengths), 2 * k * h * config.num_hidden_layers * sum(n * n for n in lengths)


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
