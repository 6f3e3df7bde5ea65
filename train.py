"""Train a process reward model: §2.2 and Appendix B.2 of the paper, read from top to bottom.

    python train.py                              # a laptop: the tiny world, two or three minutes
    python train.py --data trl-lib/math_shepherd --model Qwen/Qwen2.5-0.5B --out runs/prm
    torchrun --nproc_per_node=8 train.py --data rows.jsonl --model Qwen/Qwen2.5-7B --fsdp \\
        --checkpointing --lr 1e-5 --lr-head 1e-4 --out runs/prm     # up to 3B on 80 GB: no --fsdp

--out becomes the PRM itself (`--prm runs/prm` of the other scripts): always the best one so far by
validation loss. Beside it grow log.jsonl, one line a step (kinds start, train, eval, end), and a
checkpoint, from which --resume goes on with the losses of a run that was never stopped.

One optimizer step takes --accumulate micro-batches on each rank; a micro-batch has at most
--batch-size rows and --batch-tokens tokens with padding. All randomness is a function of --seed,
the step and the micro-batch's number: two ranks do exactly what one rank does with twice the
accumulation, and no generator's state needs to be saved. Soft labels (annotate.py --labels soft)
are used as they are.

Shapes: B rows of a micro-batch, T tokens (padded on the right), M labelled steps. With
--freeze-backbone a row's T entries are states of h numbers, one a label, in place of tokens.
"""
import common.early  # noqa: F401  answers --help before what is slow to import
import math
import time
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common.checkpoint import (
    begin,
    check_out_folder,
    finish,
    preemption,
    read_log,
    save_checkpoint,
    save_prm,
    shard,
    write_log,
)
from common.data import load_data, split
from common.examples import HeadOnly, encode_rows, get_batch, keep_states, label_text, plan
from common.metrics import accounting, metrics, peak_memory, step_flops
from common.run import TINY, command_line, distributed, gather, need_positive, share, whole
from prm_model import load_prm

WEIGHT_DECAY = 0.1        # on matrices only
BETAS = (0.9, 0.95)       # of AdamW
WARMUP = 0.05             # share of the steps; then a cosine down to a tenth
CLIP = 1.0                # largest norm of the gradient
# --resume may change these; of accumulate, its product with the number of ranks may not.
FREE = ("out", "resume", "overwrite", "device", "accumulate")


def prm_loss(logits_M, labels_M):  # README, step 5
    """Step-level binary cross-entropy, Eq. 2 before its division by N -> the sum over M steps.

        L = -1/N sum_i [ y_i log p_i + (1 - y_i) log(1 - p_i) ],   p_i = sigmoid(logit_i)

    Not a mean: N counts the labelled steps of all micro-batches of all ranks, which hold different
    M. The loop divides, once, where it calls backward(), and has rows_M: the solution of each step.
    The validation loss, by which the best PRM is kept, is Eq. 2 as well (common/metrics.py).
    """
    return F.binary_cross_entropy_with_logits(logits_M, labels_M, reduction="sum")


def schedule(step, steps):
    """Learning rate over its peak: linear warm-up, then a cosine from 1 to 0.1 at the last step."""
    warmup = max(1, round(WARMUP * steps))
    done = max(0, step + 1 - warmup) / max(1, steps - warmup)
    return min(1, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * done))


@torch.no_grad()
def validate(model, examples, batches, device, autocast, multiple=1):
    """metrics() of the batches of all ranks. All logits are gathered, since the AUC of all steps is
    no mean of the ranks' AUCs."""
    model.eval()
    outputs = []
    for numbers in batches:
        *inputs, labels_M, steps_M = get_batch(examples, numbers, device, multiple)
        with autocast():
            outputs.append((model(*inputs), labels_M, steps_M))
    model.train()
    columns = [torch.cat(column).cpu() for column in zip(*outputs)]  # the GPU waits once
    return metrics(*(torch.cat(column) for column in zip(*gather(columns))))


def parameter_groups(prm, lr, lr_head):
    """AdamW's groups: decay on matrices only, a learning rate of its own for the new head."""
    groups = []
    for part, peak_lr in ((prm.backbone, lr), (prm.head, lr_head or lr)):
        trained = [p for p in part.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim > 1]
        vectors = [p for p in trained if p.ndim <= 1]
        groups.append({"params": matrices, "weight_decay": WEIGHT_DECAY, "peak_lr": peak_lr})
        groups.append({"params": vectors, "weight_decay": 0.0, "peak_lr": peak_lr})
    return [group for group in groups if group["params"]]  # a frozen backbone has none


def train(args, stop):
    """The run. stop: a list that a SIGTERM appends to."""
    # -------- setup: one process or torchrun's; CPU (gloo) and GPU (nccl) take the same path
    rank, world, device = distributed(args.device)
    device = torch.device(device)
    out = Path(args.out)
    master = rank == 0
    group = args.accumulate * world  # micro-batches of an optimizer step
    if args.fsdp and (args.freeze_backbone or not dist.is_initialized()):
        raise ValueError("--fsdp needs torchrun, and a backbone that is trained")
    default_dtype = "bfloat16" if device.type == "cuda" else "float32"
    bf16 = (args.dtype or default_dtype) == "bfloat16"
    multiple = 8 if bf16 else 1  # of padded lengths: bf16 matrix units want it
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32

    def log(kind, step, **figures):
        more = []
        if kind == "train":  # the validations come on top
            more = [f"left {figures['seconds'] / step * (len(plans) - step) / 60:.1f} min"]
        write_log(out, kind, step, figures, f" of {len(plans)}", more)

    if args.resume and any(row["kind"] == "end" for row in read_log(out)):
        print(f"{out}: this run has ended already; other flags need another --out")
        return finish(out)

    # -------- data: all rows of all sets, split by problem
    load = partial(load_data, neutral=args.neutral, samples=args.samples, seed=args.seed)
    rows, val_rows = split(load(args.data), load(args.val_data or []), args.val_fraction,
                           args.val_samples)

    # -------- model, in fp32; with --fsdp only rank 0 reads the weights
    unsharded = "cpu" if master else "meta"
    prm = load_prm(args.model, unsharded if args.fsdp else device, "float32", args.seed, fresh=True,
                   dropout=args.dropout).train()
    config = prm.backbone.config
    if args.freeze_backbone:
        prm.backbone.requires_grad_(False).eval()  # no dropout: its states are always the same
    if args.checkpointing:
        prm.backbone.activation_checkpointing_enable()
    total = sum(p.numel() for p in prm.parameters())
    trained = sum(p.numel() for p in prm.parameters() if p.requires_grad)
    # what multiplies activations (§4.1's 6 N D): embeddings are looked up
    parameters = total - prm.backbone.get_input_embeddings().weight.numel()
    check_out_folder(out, args.resume, args.overwrite, total, trained)

    longest = min(args.batch_tokens, config.max_position_embeddings)
    data = encode_rows(prm, rows, longest, args.mask_after_first_error)
    val = encode_rows(prm, val_rows, longest, args.mask_after_first_error)
    if not data or not val:
        raise ValueError(f"no row has a label within {longest} tokens (--batch-tokens, the model)")
    lengths = [len(example.ids) for example in data]
    plans = []
    for epoch in range(args.epochs):
        plans += plan(lengths, group, args.batch_size, args.batch_tokens, args.seed, epoch)
    if master and args.max_steps and len(plans) < args.max_steps:
        print(f"--max-steps {args.max_steps}: --epochs {args.epochs} has {len(plans)}")
    plans = plans[:args.max_steps]
    val_lengths = [len(example.ids) for example in val]
    val_plan = plan(val_lengths, world, args.batch_size, args.batch_tokens)
    val_batches = [micros[rank] if rank < len(micros) else [] for micros in val_plan]

    if master:  # which token carries the label? Look, before hours are spent
        print(f"first row ({data[0].where}):\n{label_text(prm.tokenizer, data[0])}")
    model = prm
    if args.freeze_backbone:  # it runs once over all examples, not once in each epoch
        data, val = (keep_states(prm, part, args.batch_tokens, device, autocast, multiple)
                     for part in (data, val))
        model = HeadOnly(prm.head)
    scorer = model  # validation exchanges no gradients
    if args.fsdp:
        shard(prm, device, bf16)
    elif dist.is_initialized():
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # -------- optimizer
    lr = args.lr or (3e-4 if total < 100e6 else 1e-5)
    groups = parameter_groups(prm, lr, args.lr_head)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)

    # -------- where the run stands: at its beginning, or where its last checkpoint was written
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    settings |= {"group": group, "rows": len(data)}
    progress = begin(out, args.resume, settings, model, optimizer)
    totals = progress["totals"]
    if not progress["step"]:
        if args.freeze_backbone:  # 1: keep_states() has gone forward only
            flops, attention = step_flops(parameters, config, lengths + val_lengths, 1)
            totals.update(flops=flops, flops_with_attention=flops + attention)
        labels = torch.cat([example.labels for example in data])
        seen = getattr(config, "pretraining_tokens", 18e12 if "Qwen2.5" in args.model else None)
        quantiles = torch.tensor(lengths).float().quantile(torch.tensor([0.1, 0.5, 0.9, 1.0]))
        log("start", 0, rows=len(data), val_rows=len(val),
            dropped=len(rows) + len(val_rows) - len(data) - len(val), labels=len(labels),
            right=float((labels >= 0.5).float().mean()), tokens=sum(lengths),
            length_quantiles=quantiles.tolist(), parameters=total, active_parameters=parameters,
            trained=trained, world=world, optimizer_steps=len(plans), lr=lr, settings=settings,
            pretraining_flops=6 * parameters * seen if seen else None)
        log("eval", 0, **validate(scorer, val, val_batches, device, autocast, multiple))

    # -------- the loop
    for step in range(progress["step"], len(plans)):
        started = time.perf_counter()
        # pad with empty micro-batches: a rank that had fewer would keep the others waiting for ever
        micros = plans[step] + [[]] * (-len(plans[step]) % world)
        N = sum(len(data[i].labels) for i in chain.from_iterable(micros))  # of all ranks
        loss_sum = torch.zeros((), device=device)
        outputs = []
        for j in range(rank, len(micros), world):
            ids_BT, rows_M, positions_M, labels_M, _ = get_batch(data, micros[j], device, multiple)
            # dropout is a function of the micro-batch, not of the rank
            torch.manual_seed((args.seed * len(plans) + step) * group + j)
            # DDP exchanges gradients with the last micro-batch only. FSDP does with each one: until
            # gradients are exchanged, every rank holds all of them, in fp32.
            model.require_backward_grad_sync = j + world >= len(micros)
            with autocast():
                logits_M = model(ids_BT, rows_M, positions_M)
            micro_sum = prm_loss(logits_M, labels_M)
            # Eq. 2's division by N. The exchange averages gradients over ranks: times world, a sum
            (micro_sum * (world / N)).backward()
            loss_sum += micro_sum.detach()
            outputs.append((micros[j], rows_M, logits_M.detach()))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        norm = float(norm.full_tensor() if args.fsdp else norm)
        loss = sum(gather(float(loss_sum))) / N
        if not math.isfinite(loss + norm):  # on all ranks alike; the weights are still those before
            raise ValueError(f"step {step + 1}: loss {loss}, gradient norm {norm}, on "
                             f"{broken_rows(data, outputs, micros)}. {out} keeps the best PRM and "
                             "the last checkpoint")
        for part in optimizer.param_groups:
            part["lr"] = part["peak_lr"] * schedule(step, len(plans))
        optimizer.step()
        # DDP's buckets are the gradients: freeing them would leave both in memory
        optimizer.zero_grad(set_to_none=not dist.is_initialized())
        progress["step"] = step + 1
        flops = (6 * trained * N, 0)  # 6 N D of a head alone, which sees labels, and no attention
        if not args.freeze_backbone:
            row_lengths = [lengths[i] for i in chain.from_iterable(micros)]
            flops = step_flops(parameters, config, row_lengths)
        figures = accounting(micros, lengths, multiple, flops, time.perf_counter() - started,
                             device, totals)
        log("train", step + 1, loss=loss, norm=norm, lr=lr * schedule(step, len(plans)), labels=N,
            **figures)

        # -------- validation, often at first, where abilities emerge (Figure 2): keep the best
        due = (step + 1) % args.eval_every == 0
        last = step + 1 == len(plans)
        stopped = False
        if due or last or (step + 1).bit_count() == 1:  # also after 1, 2, 4, 8 ... steps
            figures = validate(scorer, val, val_batches, device, autocast, multiple)
            log("eval", step + 1, **figures)
            better = gather(figures["loss"] < progress["best"])[0]  # rank 0 decides for all
            progress["worse"] = 0 if better else progress["worse"] + 1
            stopped = 0 < args.patience <= progress["worse"]  # early stopping, B.2
            if better:
                progress |= {"best": figures["loss"], "best_step": step + 1}
            if better or args.snapshots:
                name = f"step-{step + 1:06d}" if args.snapshots else None
                save_prm(out, prm, better, name)
        if last or stopped:
            break
        told = any(gather(bool(stop)))  # asked last, so that a SIGTERM never costs another step
        if due or told:
            save_checkpoint(out, model, optimizer, progress)
        if told:
            print(f"SIGTERM: saved at step {step + 1}, --resume goes on from there")
            return None

    # -------- the end: the best PRM stays, what resuming needed goes
    result = dict(best=progress["best"], best_step=progress["best_step"], stopped_early=stopped,
                  **totals, peak_memory=peak_memory(device))
    log("end", progress["step"], **result)
    finish(out)
    if master:
        print(f"the best PRM, of step {progress['best_step']}, is in {out}")
    return result


def broken_rows(data, outputs, micros):
    """file:line of the rows whose logits are not finite, of all rows if none is."""
    places = []
    for numbers, rows_M, logits_M in outputs:
        for row in rows_M[~logits_M.isfinite()].unique().tolist():
            places.append(data[numbers[row]].where)
    places = sum(gather(places), []) or [data[i].where for i in chain.from_iterable(micros)]
    return ", ".join(places[:8]) + (" ..." if len(places) > 8 else "")


# ------------------------------------------------------------ the script

def main(argv=None):
    parser = command_line(__doc__)
    a = parser.add_argument_group("data").add_argument
    a("--data", nargs="+", help="JSONL files or hub sets (the tiny world's rows)")
    a("--neutral", default="good", choices=["good", "bad", "drop"], help="PRM800K's 0 (good)")
    a("--samples", type=int, help="rows drawn from each set (400000 as in §3.1; tiny world: 6000)")
    a("--mask-after-first-error", action="store_true", help="no loss after the first wrong step")
    a("--val-data", nargs="+", help="validation sets (default: problems held out of --data)")
    a("--val-fraction", type=share, default=0.05, help="share of the problems held out (0.05)")
    a("--val-samples", type=int, default=1000, help="held-out rows to evaluate on at most (1000)")
    a = parser.add_argument_group("model").add_argument
    a("--model", default=str(TINY / "l"), help="backbone, or a PRM to go on from: folder or hub id")
    a("--dropout", type=share, default=0.1, help="in the head (0.1)")
    a("--freeze-backbone", action="store_true", help="train the head only, on states kept")
    a = parser.add_argument_group("optimization").add_argument
    a("--batch-size", type=int, default=16, help="rows of a micro-batch at most (16)")
    a("--batch-tokens", type=int, default=16384,
      help="tokens of a micro-batch at most, with padding; longer rows are cut (16384)")
    a("--accumulate", type=int, default=4, help="micro-batches of a rank in an optimizer step (4)")
    a("--lr", type=float, help="peak (3e-4 below 100 M parameters, else 1e-5)")
    a("--lr-head", type=float, help="peak for the head (--lr)")
    a("--epochs", type=int, default=1)
    a("--max-steps", type=int, help="stop after so many optimizer steps (all epochs)")
    a("--eval-every", type=int, default=50, help="steps between validations (50; also 1, 2, 4 ...)")
    a("--patience", type=whole, default=10, help="validations without a new best (10; 0: any)")
    a("--seed", type=int, default=0)
    a = parser.add_argument_group("machine").add_argument
    a("--out", default="runs/prm", help="folder of the PRM, its log and checkpoints (runs/prm)")
    a("--snapshots", action="store_true", help="keep the PRM of each validation in OUT/step-N")
    a("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    a("--overwrite", action="store_true", help="start again where a run is already")
    a("--device", help="cpu, cuda, cuda:1 (default: the GPU of this rank, where there is one)")
    a("--dtype", choices=["float32", "bfloat16"], help="arithmetic (bfloat16 on cuda)")
    a("--fsdp", action="store_true", help="shard weights, gradients and moments over the ranks")
    a("--checkpointing", action="store_true", help="recompute activations: 4/3 the time")
    args = parser.parse_args(argv)
    need_positive(parser, args, "batch_size", "batch_tokens", "accumulate", "epochs", "max_steps",
                  "eval_every", "samples", "val_samples", "lr", "lr_head")
    args.samples = args.samples or (400_000 if args.data else 6000)
    args.data = args.data or [str(TINY / "rows.jsonl.gz")]
    with preemption() as stop, parser:
        return train(args, stop)


if __name__ == "__main__":
    main()
