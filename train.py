"""Train a process reward model: §2.2 and Appendix B.2 of the paper, read from top to bottom.

    python train.py                                         # a laptop: the tiny world, two or three minutes
    python train.py --data trl-lib/math_shepherd --model Qwen/Qwen2.5-0.5B --out runs/prm
    torchrun --nproc_per_node=8 train.py --data a.jsonl:0.5 b.jsonl:0.5 --model Qwen/Qwen2.5-7B --batch-tokens 16384 \\
        --fsdp --checkpointing --lr 1e-5 --lr-head 1e-4 --out runs/prm   # up to 3B on 80 GB: without --fsdp

--out becomes the PRM itself (`--prm runs/prm` of the other scripts): always the best one so far by validation loss.
Beside it grow log.jsonl (one line a step; kinds start, train, eval, end: `evaluate.py --exhibit curves` draws them) and
a checkpoint, from which --resume goes on with the very losses of a run that was never stopped (common/checkpoint.py).

One optimizer step is --accumulate micro-batches on each rank; a micro-batch is at most --batch-size rows and at most
--batch-tokens tokens with padding (but bf16's to a multiple of 8). All randomness is a function of (--seed, epoch,
number of the micro-batch): two ranks do exactly what one rank does with twice the accumulation, and no generator needs
to be saved. Weights, gradients and two moments in fp32 take 16 bytes a parameter; --fsdp spreads them over the ranks.

Shapes: B rows of a micro-batch, T tokens (padded on the right), M labelled steps.
"""
import json
import math
import random
import signal
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from common.checkpoint import begin, finish, read_log, save_checkpoint, save_prm, shard, take_out
from common.data import FORMATS, load_data, split
from common.metrics import metrics, peak_flops, peak_memory, step_flops
from common.run import TINY, command_line, distributed, gather, need_positive
from prm_model import load_prm

# What may change at --resume; of accumulate, its product with the number of ranks may not: settings["group"].
FREE = ("out", "resume", "overwrite", "device", "accumulate", "peak_tflops")

# One encoded solution. steps: which step (from 0) each label belongs to; where: file:line, for messages.
Row = namedtuple("Row", "ids positions labels steps where")
NONE = torch.zeros(0, dtype=torch.long)
EMPTY = Row(torch.zeros(1, dtype=torch.long), NONE, NONE.float(), NONE, "")  # one token, no label: a zero gradient


# ---------------------------------------------------------------- rows in, tensors out

def encode_rows(prm, found, max_length, mask_after_first_error=False):
    """(where, stepwise row) pairs -> Rows, encoded as the PRM will read them when it scores.

    What follows the last labelled step cannot change the loss and is cut off. Rows left without any label (all beyond
    max_length, or none known) are dropped.
    """
    rows = []
    for where, row in tqdm(found, "encode", disable=None, leave=False):
        ids, positions = prm.encode(row["prompt"], row["completions"])
        kept, masked = [], False
        for t, (at, y) in enumerate(zip(positions, row["labels"])):
            if y is not None and not masked and at < max_length:
                kept.append((at, float(y), t))
            masked = masked or (mask_after_first_error and y is not None and y < 0.5)
        if kept:
            positions, labels, steps = (torch.tensor(x) for x in zip(*kept))
            rows.append(Row(torch.tensor(ids[:positions[-1] + 1]), positions, labels, steps, where))
    return rows


def plan(lengths, group, batch_size, batch_tokens, seed=0, epoch=0):
    """One epoch as a list of optimizer steps, each a list of at most `group` micro-batches of row numbers.

    Rows of similar length share a micro-batch: shuffle, sort each 32 micro-batches' worth of rows, cut, shuffle the
    micro-batches. The same on every rank, and for every number of ranks with the same group = ranks x accumulation.
    """
    rng, order, batches = random.Random(f"{seed} {epoch}"), list(range(len(lengths))), []
    rng.shuffle(order)
    for a in range(0, len(order), 32 * batch_size):
        batches.append([])
        for i in sorted(order[a:a + 32 * batch_size], key=lengths.__getitem__):
            if len(batches[-1]) == batch_size or lengths[i] * (len(batches[-1]) + 1) > batch_tokens:
                batches.append([])
            batches[-1].append(i)
    rng.shuffle(batches)
    return [batches[a:a + group] for a in range(0, len(batches), group)]


def get_batch(data, rows, device, multiple=1):
    """Row numbers -> ids (B, T), and of each labelled step its row (M), position (M), label (M) and place (M).
    T is rounded up to a multiple: bf16 matrix units want 8, and CPUs build (and keep) a kernel for each shape."""
    chosen = [data[i] for i in rows] or [EMPTY]  # a rank that has nothing left in an epoch's last step
    ids_BT = pad_sequence([r.ids for r in chosen], batch_first=True)
    ids_BT = F.pad(ids_BT, (0, -ids_BT.shape[1] % multiple))
    rows_M = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(r.labels) for r in chosen]))
    at_M = (torch.cat([getattr(r, k) for r in chosen]) for k in ("positions", "labels", "steps"))
    return tuple(x.to(device, non_blocking=True) for x in (ids_BT, rows_M, *at_M))


# ---------------------------------------------------------------- loss and validation

def prm_loss(logits_M, labels_M):
    """Step-level binary cross-entropy, Eq. 2 before its division by N, here M -> (sum over M labelled steps, M).

        - [y log p + (1 - y) log(1 - p)],  p = sigmoid(logit),  y in [0, 1]: soft labels are used as they are

    Not a mean: ranks and micro-batches hold different M, and the loop divides once, by the M of the whole step.
    """
    return F.binary_cross_entropy_with_logits(logits_M, labels_M, reduction="sum"), len(labels_M)


@torch.no_grad()
def evaluate(model, data, batches, device, autocast, multiple=1):
    """metrics() over the batches of all ranks. Every step's logit, label and place are gathered: the AUC of all steps
    is no mean of the ranks' AUCs."""
    model.eval()
    found = []
    for rows in batches:
        *inputs, labels_M, steps_M = get_batch(data, rows, device, multiple)
        with autocast():
            found.append((model(*inputs), labels_M, steps_M))
    model.train()
    own = [torch.cat(x).cpu() for x in zip(*found)]  # once: a GPU need not wait for each batch
    return metrics(*(torch.cat(x) for x in zip(*gather(own))))


# ---------------------------------------------------------------- the script

def main(argv=None):
    parser = command_line(__doc__)
    a = parser.add_argument_group("data").add_argument
    a("--data", nargs="+", metavar="SET[:SHARE]", help="JSONL files or hub sets (default: the tiny world's rows)")
    a("--format", default="auto", choices=["auto", *FORMATS], help="schema of the sets (default: told by their fields)")
    a("--neutral", default="good", choices=["good", "bad", "drop"], help="what PRM800K's rating 0 means (default good)")
    a("--samples", type=int, help="rows drawn at random from each set (400000 as in §3.1; without --data 6000)")
    a("--mask-after-first-error", action="store_true", help="no loss on the steps after the first wrong one")
    a("--max-length", type=int, default=2048, help="tokens; what lies beyond is cut off (default 2048)")
    a("--val-data", nargs="+", metavar="SET[:SHARE]", help="validation sets (default: problems held out of --data)")
    a("--val-fraction", type=float, default=0.05, help="share of the problems held out (default 0.05)")
    a("--val-samples", type=int, default=1000, help="held-out rows to evaluate on at most (default 1000)")
    a = parser.add_argument_group("model").add_argument
    a("--model", default=str(TINY / "l"), help="backbone, or a PRM to go on from: folder or hub id")
    a("--dropout", type=float, default=0.1, help="in the head (default 0.1)")
    a("--freeze-backbone", action="store_true", help="train the head only")
    a = parser.add_argument_group("optimization").add_argument
    a("--batch-size", type=int, default=16, help="rows of a micro-batch at most (default 16)")
    a("--batch-tokens", type=int, default=16384, help="tokens of a micro-batch at most, with padding (default 16384)")
    a("--accumulate", type=int, default=4, help="micro-batches on each rank for one optimizer step (default 4)")
    a("--lr", type=float, help="peak (default 3e-4 below 100 M parameters, else 1e-5)")
    a("--lr-head", type=float, help="peak for the head (default --lr)")
    a("--weight-decay", type=float, default=0.1, help="on matrices only (default 0.1)")
    a("--warmup", type=float, default=0.05, help="share of the steps (default 0.05); then a cosine down to a tenth")
    a("--clip", type=float, default=1.0, help="largest gradient norm (default 1)")
    a("--epochs", type=int, default=1)
    a("--max-steps", type=int, help="stop after so many optimizer steps (default: all epochs)")
    a("--eval-every", type=int, default=50, help="steps between evaluations (default 50; also at 1, 2, 4, 8, 16 ...)")
    a("--patience", type=int, default=10, help="evaluations without a new best before stopping (default 10; 0: never)")
    a("--seed", type=int, default=0)
    a = parser.add_argument_group("machine").add_argument
    a("--out", default="runs/prm", help="folder of the PRM, its log and its checkpoints (default runs/prm)")
    a("--snapshots", action="store_true", help="keep the PRM of every evaluation in OUT/step-N (evaluate.py, Figure 2)")
    a("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    a("--overwrite", action="store_true", help="start again where a run is already")
    a("--device", help="cpu, cuda, cuda:1 (default: the GPU of this rank, where there is one)")
    a("--dtype", choices=["float32", "bfloat16"], help="of the arithmetic; weights are fp32 (default bfloat16 on cuda)")
    a("--attention", default="sdpa", choices=["sdpa", "eager", "flash_attention_2"], help="eager: for bf16 on a CPU")
    a("--peak-tflops", type=float, help="of a device: the log has its utilisation (default: by the GPU's name)")
    a("--fsdp", action="store_true", help="shard weights, gradients and moments over the ranks")
    a("--checkpointing", action="store_true", help="recompute activations layer by layer: less memory, a third slower")
    a("--compile", action="store_true", help="torch.compile the backbone: minutes at first, pays on long runs")
    args = parser.parse_args(argv)
    need_positive(parser, args, "batch_size", "batch_tokens", "accumulate", "epochs", "max_steps", "eval_every",
                  "samples", "val_samples", "max_length", "lr", "lr_head", "clip", "peak_tflops")
    args.samples = args.samples or (400_000 if args.data else 6000)
    args.data = args.data or [str(TINY / "rows.jsonl.gz")]
    stop = []
    before = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))  # pre-emption: finish the step, save, exit 0
    try:
        with parser:
            return train(args, stop)
    finally:
        signal.signal(signal.SIGTERM, before)


def train(args, stop):
    # -------- setup: one process or one of torchrun's; CPU (gloo) and GPU (nccl) take the same path
    rank, world, device = distributed(args.device)
    device, out = torch.device(device), Path(args.out)
    group, master = args.accumulate * world, rank == 0
    if args.fsdp and not dist.is_initialized():
        raise ValueError("--fsdp needs torchrun")
    bf16 = (args.dtype or ("bfloat16" if device.type == "cuda" else "float32")) == "bfloat16"  # CPUs: with AMX
    multiple = 8 if bf16 else 1
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    disable_progress_bar()  # of transformers, at each loading and saving
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)

    def log(kind, step, **figures):
        if master:
            with open(out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")
            print(f"{kind} {step}:", *(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                                       for k, v in figures.items() if v is not None), flush=True)

    if args.resume and "end" in {row["kind"] for row in read_log(out)}:
        print(f"{out}: this run has ended already")
        return finish(out)

    # -------- data: all rows of all sets, split by problem
    load = partial(load_data, form=args.format, neutral=args.neutral, samples=args.samples, seed=args.seed)
    found, val_found = split(load(args.data), load(args.val_data or []), args.val_fraction, args.val_samples)

    # -------- model: with --fsdp only rank 0 reads the weights
    prm = load_prm(args.model, ("meta" if rank else "cpu") if args.fsdp else device, seed=args.seed, fresh=True,
                   dropout=args.dropout, dtype="float32").train()
    prm.backbone.set_attn_implementation(args.attention)
    config = prm.backbone.config
    if args.freeze_backbone:
        prm.backbone.requires_grad_(False)
    if args.compile:
        prm.backbone.compile(dynamic=True)
    if args.checkpointing:
        prm.backbone.activation_checkpointing_enable()
    total = sum(p.numel() for p in prm.parameters())
    trained = sum(p.numel() for p in prm.parameters() if p.requires_grad)
    N = total - prm.backbone.get_input_embeddings().weight.numel()  # what multiplies activations: these are looked up
    take_out(out, args.resume, args.overwrite, total, trained)

    longest = min(args.max_length, args.batch_tokens, config.max_position_embeddings)
    data, val = (encode_rows(prm, x, longest, args.mask_after_first_error) for x in (found, val_found))
    if not data or not val:
        raise ValueError(f"no row has a label within {longest} tokens (--max-length, --batch-tokens, the model)")
    lengths = [len(r.ids) for r in data]
    plans = [step for epoch in range(args.epochs)
             for step in plan(lengths, group, args.batch_size, args.batch_tokens, args.seed, epoch)][:args.max_steps]
    val_plan = [step[rank] if rank < len(step) else []
                for step in plan([len(r.ids) for r in val], world, args.batch_size, args.batch_tokens)]

    model = prm
    if args.fsdp:
        shard(prm, device, bf16)
    elif dist.is_initialized():
        model = DistributedDataParallel(prm, gradient_as_bucket_view=True)

    # -------- optimizer: decay on matrices only, a learning rate of its own for the new head
    lr = args.lr or (3e-4 if total < 100e6 else 1e-5)
    groups = [{"params": [p for n, p in prm.named_parameters() if p.requires_grad and (p.ndim > 1) == matrix
                          and n.startswith("head.") == head],
               "weight_decay": args.weight_decay * matrix, "peak_lr": (args.lr_head or lr) if head else lr}
              for head in (False, True) for matrix in (False, True)]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95), fused=True)

    def schedule(step):
        """Linear warm-up, then a cosine from 1 down to 0.1 at the last step."""
        warmup = max(1, round(args.warmup * len(plans)))
        done = max(0, step + 1 - warmup) / max(1, len(plans) - warmup)
        return min(1, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * done))

    # -------- where the run stands: at its beginning, or where its last checkpoint was written
    settings = {k: v for k, v in vars(args).items() if k not in FREE} | {"group": group, "rows": len(data)}
    progress = begin(out, args.resume, settings, model, optimizer)
    totals = progress["totals"]
    if not progress["step"]:
        labels = torch.cat([r.labels for r in data])
        seen = getattr(config, "pretraining_tokens", 18e12 if "Qwen2.5" in args.model else None)
        log("start", 0, rows=len(data), val_rows=len(val), dropped=len(found) + len(val_found) - len(data) - len(val),
            labels=len(labels), right=float((labels >= 0.5).float().mean()), tokens=sum(lengths),
            length_quantiles=torch.tensor(lengths).float().quantile(torch.tensor([0.1, 0.5, 0.9, 1.0])).tolist(),
            parameters=total, N=N, trained=trained, world=world, optimizer_steps=len(plans), lr=lr, settings=settings,
            pretraining_flops=6 * N * seen if seen else None)
        log("eval", 0, **evaluate(prm, val, val_plan, device, autocast, multiple))
    if master:
        print(f"first row ({data[0].where}), tokens and the labels they carry:\n{prm.label_text(*data[0][:3])}")

    # -------- the loop
    peak = args.peak_tflops * 1e12 if args.peak_tflops else peak_flops(device)
    for step in range(progress["step"], len(plans)):
        started = time.perf_counter()
        micros = plans[step] + [[]] * (-len(plans[step]) % world)  # as many for each rank, or one would wait for ever
        M = sum(len(data[i].labels) for rows in micros for i in rows)  # of all ranks: each of them knows the plan
        loss_sum, done = torch.zeros((), device=device), []
        for j in range(rank, len(micros), world):
            ids_BT, rows_M, positions_M, labels_M, _ = get_batch(data, micros[j], device, multiple)
            torch.manual_seed((args.seed * len(plans) + step) * group + j)  # dropout: a function of the micro-batch
            # DDP exchanges gradients with the last micro-batch only (its no_sync(), without indentation), FSDP with
            # each: until they are exchanged, each rank holds all of them, in fp32
            model.require_backward_grad_sync = j + world >= len(micros)
            with autocast():
                logits_M = model(ids_BT, rows_M, positions_M)
            micro_sum, _ = prm_loss(logits_M, labels_M)
            (micro_sum * (world / M)).backward()  # the exchange takes the mean over ranks: undo it
            loss_sum += micro_sum.detach()
            done.append((micros[j], rows_M, logits_M.detach()))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        norm = float(norm.full_tensor() if args.fsdp else norm)
        loss = sum(gather(float(loss_sum))) / M
        if not math.isfinite(loss + norm):  # the same on all ranks; the weights are still those of the step before
            where = [data[rows[i]].where for rows, rows_M, z in done for i in rows_M[~z.isfinite()].unique().tolist()]
            where = sum(gather(where), []) or [data[i].where for rows in micros for i in rows]
            raise ValueError(f"step {step + 1}: loss {loss}, gradient norm {norm}, on {', '.join(where[:8])}"
                             f"{' ...' if len(where) > 8 else ''}. {out} keeps the best PRM and the last checkpoint")
        for g in optimizer.param_groups:
            g["lr"] = g["peak_lr"] * schedule(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not dist.is_initialized())  # DDP's buckets stay: else both are held

        seconds = time.perf_counter() - started
        row_lengths = [lengths[i] for rows in micros for i in rows]
        padded = sum(len(rows) * -(-max(lengths[i] for i in rows) // multiple) * multiple for rows in micros if rows)
        flops, attention = step_flops(N, config, row_lengths, args.freeze_backbone)
        totals.update(tokens=sum(row_lengths), seconds=seconds, flops=flops, flops_with_attention=flops + attention)
        progress["step"] = step + 1
        log("train", step + 1, loss=loss, norm=norm, lr=lr * schedule(step), labels=M,
            tokens_per_second=sum(row_lengths) / seconds, padding=1 - sum(row_lengths) / padded,
            mfu=(flops + attention) / seconds / world / peak if peak else None, **totals)

        # -------- validation, often at first, where abilities emerge (Figure 2): keep the best, stop without a new one
        due, last, stopped = (step + 1) % args.eval_every == 0, step + 1 == len(plans), False
        if due or last or (step + 1).bit_count() == 1:  # also after 1, 2, 4, 8 ... steps
            figures = evaluate(prm, val, val_plan, device, autocast, multiple)
            log("eval", step + 1, **figures)
            better = gather(figures["loss"] < progress["best"])[0]  # rank 0 decides for all
            progress["worse"] = 0 if better else progress["worse"] + 1
            stopped = 0 < args.patience <= progress["worse"]
            if better:
                progress |= {"best": figures["loss"], "best_step": step + 1}
            if better or args.snapshots:
                save_prm(out, prm, model, better, f"step-{step + 1:06d}" if args.snapshots else None)
        if last or stopped:
            break
        told = any(gather(bool(stop)))  # asked last, so that a SIGTERM never costs another step
        if due or told:
            save_checkpoint(out, model, optimizer, progress)
        if told:
            print(f"SIGTERM: saved at step {step + 1}, --resume goes on from there")
            return None

    # -------- the end: the best PRM stays, what resuming needed goes
    result = dict(best=progress["best"], best_step=progress["best_step"], stopped_early=stopped, **totals,
                  peak_memory=peak_memory(device))
    log("end", progress["step"], **result)
    finish(out)
    if master:
        print(f"the best PRM, of step {progress['best_step']}, is in {out}")
    return result


if __name__ == "__main__":
    main()
