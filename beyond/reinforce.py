"""Put the ability that search finds back into the policy: policy gradients with a PRM's rewards.

    python -m beyond.reinforce                          # policy A of the tiny world
    python -m beyond.reinforce --credit prm             # reward and truth part: reward hacking
    python -m beyond.reinforce --credit prm --verified 0.1
    python -m beyond.reinforce --distil beam            # expert iteration: beyond/distil.py
    torchrun --nproc_per_node=8 -m beyond.reinforce --policy Qwen/Qwen2.5-1.5B-Instruct \\
        --prm runs/prm --task gsm8k --limit 7473 --out runs/policy

The talk wants to "aggregate the ability from exploration in test-time scaling back into the model
itself" (slide 9) and to "integrate PRM signals into RL fine-tuning" (slide 24). One step:

1. Sample G solutions of each of P problems: sample_groups().
2. Score every step with the frozen PRM, judge the answers: score_and_judge().
3. Make an advantage for every token. How is the idea to compare: CREDITS.
4. Take a step of the clipped policy gradient: objective(), k3(), update().
5. Now and then evaluate on held-out problems: reward against truth, evaluate().

Of PPO there is no critic and no GAE: the solutions of a group are each other's baseline (GRPO,
arXiv 2402.03300). --out becomes the policy itself. Beside it grow log.jsonl and the judged samples
of each evaluation; a killed or stopped run goes on with --resume as if nothing had been.

Shapes: G solutions of a group, S tokens of a solution, M tokens of a micro-batch's solutions.
"""
import copy
import math
import random
import time
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from beyond.distil import STRATEGIES, choose_by_search
from beyond.rollouts import (
    account,
    check_problems,
    check_separators,
    columns,
    evaluate,
    is_verified,
    log_probs,
    sample_groups,
    save_policy,
    score_and_judge,
)
from common import run, tasks
from common.cache import batches
from common.checkpoint import (
    begin,
    check_out_folder,
    finish,
    preemption,
    read_log,
    save_checkpoint,
    write_log,
)
from common.models import is_address
from common.policy import add_policy_flags, load_policy_flags
from prm_model import AGGREGATIONS, aggregate, load_prm

CLIP_NORM = 1.0  # largest norm of the gradient
FREE = ("out", "resume", "overwrite", "device", "steps", "batch_tokens")  # for --resume


# ------------------------------------------------------------ 3. credit: which token gets how much

def group_relative(rewards):
    """GRPO's advantage, (R_i - mean) / std over the group (G); equal rewards give zeros."""
    R = torch.tensor(rewards, dtype=torch.float64)
    return ((R - R.mean()) / (R.std(correction=0) + 1e-6)).float()


def return_to_go(group, rewards):
    """Rewards of each solution's steps -> for each token what is still to come, minus a baseline.

        A_i(n) = sum of r_it over steps t that end at token n or later  -  its mean over the group

    A solution that has ended has nothing to come. The baseline depends on the place n of the token
    alone: a mean over steps would change where a solution is cut into more of them (PURE, issue 2).
    """
    returns = []
    for s, r in zip(group, rewards):
        to_go = torch.tensor(r).flip(0).cumsum(0).flip(0)
        returns.append(to_go.repeat_interleave(torch.tensor(s.lengths)))
    baseline = pad_sequence(returns, batch_first=True).mean(0)
    return [g - baseline[:len(g)] for g in returns]


def outcome(group, args):
    """The judged answer, no PRM:  A_i = (R_i - mean) / std,  R_i = 1 if right (GRPO, 2402.03300)"""
    A = group_relative([float(s.right) for s in group])
    return [a.expand(len(s.ids)) for a, s in zip(A, group)]


def prm(group, args):
    """The same with R_i = --aggregate of the PRM's p_t, by default their product."""
    A = group_relative([aggregate(s.p, args.aggregate) for s in group])
    return [a.expand(len(s.ids)) for a, s in zip(A, group)]


def sum_form(group, args):
    """A step is worth its p_t, and earns what follows:  G_t = sum_{u >= t} p_u.

    One more step is one more reward: this form pays for length, and for cutting a step in two."""
    return return_to_go(group, [s.p for s in group])


def min_form(group, args):
    """PURE (Cheng et al. 2025, arXiv 2504.15275): the return is about the worst step's p.

        G_t = sum_{u >= t} w_u p_u,   w = softmax(-p / T),  T = 0.1

    With equal p a longer solution has more to come at each place: this form, too, pays for length.
    """
    rewards = []
    for s in group:
        p = torch.tensor(s.p)
        rewards.append((torch.softmax(-p / 0.1, 0) * p).tolist())
    return return_to_go(group, rewards)


def progress_form(group, args):
    """A step is worth its progress, p_t - p_{t-1} (PAV, Setlur et al. 2024, arXiv 2410.08146).

    No baseline is needed: p_{t-1} is that of the prefix. p_0 = 1, since nothing is wrong so far."""
    advantages = []
    for s in group:
        p = torch.tensor([1.0, *s.p])
        advantages.append(p.diff().repeat_interleave(torch.tensor(s.lengths)))
    return advantages


CREDITS = {"outcome": outcome, "prm": prm, "sum": sum_form, "min": min_form,
           "advantage": progress_form}


def assign_credit(groups, args):
    """Set the advantage (S) of each solution. Verified problems get that of their outcome."""
    for group in groups:
        form = outcome if is_verified(group[0].problem, args) else CREDITS[args.credit]
        for s, advantage in zip(group, form(group, args)):
            s.advantage = advantage


# ------------------------------------------------------------ 4. the objective, and a step on it

def objective(logp_M, old_M, advantage_M, clip):
    """PPO's clipped objective of each token (Schulman et al. 2017, arXiv 1707.06347):

        min(r A, clip(r, 1 - e, 1 + e) A),   r = pi(token) / pi_old(token)
    """
    ratio = (logp_M - old_M).exp()
    return torch.min(ratio * advantage_M, ratio.clamp(1 - clip, 1 + clip) * advantage_M)


def k3(logp_M, start_M):
    """KL(pi || start) of each token, estimated without bias and never negative:  e^d - d - 1,
    d = log start - log pi (Schulman, http://joschu.net/blog/kl-approx.html)."""
    d = start_M - logp_M
    return d.exp() - d - 1


def update(lm, start, optimizer, counts, N, args, autocast):
    """--updates steps of AdamW. -> largest norm of a gradient. start: the frozen policy, for --kl;
    counts: {solution of this rank: how often it was sampled}; N: tokens of all ranks' solutions."""
    # what has no advantage has no gradient, but counts in the mean over tokens
    rows = [s for s in counts if args.kl or s.advantage.any()]
    micros = list(batches(rows, lambda s: len(s.prompt + s.ids), args.batch_tokens, lm.device))
    old, first = {}, {}  # log-probabilities of each micro-batch: before the update, of the start
    norms = []
    for _ in range(args.updates):
        optimizer.zero_grad()
        for i, micro in enumerate(micros):
            advantage_M, weight_M = columns(micro, counts, lm.device)
            with autocast():
                logp_M = log_probs(lm, micro)
                if args.kl and i not in first:
                    with torch.no_grad():
                        first[i] = log_probs(start, micro)
            gain_M = objective(logp_M, old.setdefault(i, logp_M.detach()), advantage_M, args.clip)
            if args.kl:
                gain_M = gain_M - args.kl * k3(logp_M, first[i])
            # a mean over all tokens: no solution weighs more for being short
            (-(weight_M * gain_M).sum() / N).backward()
        for p in lm.parameters():  # by hand, not by DDP: ranks differ in their micro-batches
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if dist.is_initialized():
                dist.all_reduce(p.grad)
        norms.append(torch.nn.utils.clip_grad_norm_(lm.parameters(), CLIP_NORM))
        optimizer.step()
    return float(torch.stack(norms).max())


# ------------------------------------------------------------ the run, from top to bottom

def train(args, stop):
    """The run. stop: a list that a SIGTERM appends to."""
    # -------- setup: CPU (gloo) and GPU (nccl) take the same path, alone and under torchrun
    rank, world, device = run.distributed(args.device)
    out = Path(args.out)
    bf16 = args.dtype == "bfloat16" or args.dtype is None and device.startswith("cuda")
    autocast = partial(torch.autocast, device.split(":")[0], torch.bfloat16, enabled=bf16)

    def log(kind, step, **figures):
        write_log(out, kind, step, figures)

    if args.resume and any(row["kind"] == "end" for row in read_log(out)):
        print(f"{out}: this run has ended already")
        return finish(out)

    # -------- problems: the training split of the tasks; they are evaluated on their own split
    problems, held_out = [], []
    for task in tasks.each(args.task, args.data or args.val_data):
        problems += tasks.load(task, args.data, "train", args.limit, args.seed)
        held_out += tasks.load(task, args.val_data, None, args.val_problems, args.seed)
    check_problems(problems, held_out, args)

    # -------- models: the policy in fp32, which small updates need; PRM and start are frozen
    args.dtype = "float32"
    policy = load_policy_flags(args, device)
    lm = policy.lm
    start = copy.deepcopy(lm).requires_grad_(False) if args.kl else None
    scorer = load_prm(args.prm, device, "bfloat16" if bf16 else "float32")
    check_separators(policy, scorer)
    trained = sum(p.numel() for p in lm.parameters())
    check_out_folder(out, args.resume, args.overwrite, trained, trained)
    lr = args.lr or (3e-4 if trained < 100e6 else 1e-6)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def report(step):
        with autocast():
            figures = evaluate(policy, scorer, held_out, args.aggregate,
                               out / f"samples-{step:06d}.jsonl")
        for domain, part in figures.items():
            log("eval", step, domain=domain, **part)

    # -------- where the run stands: at its beginning, or where its last checkpoint was written
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    progress = begin(out, args.resume, settings | {"bf16": bf16}, lm, optimizer)
    totals = progress["totals"]
    if not progress["step"]:
        log("start", 0, problems=len(problems), held_out=len(held_out), parameters=trained,
            world=world, lr=lr, settings=settings)
        report(0)

    # -------- the loop
    an_epoch = len(problems) // args.problems  # steps
    for step in range(progress["step"], args.steps):
        started = time.perf_counter()
        before = policy.generated
        epoch, at = divmod(step, an_epoch)
        order = random.Random(f"{args.seed} {epoch}").sample(problems, len(problems))
        batch = order[at * args.problems:(at + 1) * args.problems][rank::world]

        # 1. to 3. of this rank's problems; a group is never divided among ranks
        with autocast():
            if args.distil:
                groups = choose_by_search(policy, scorer, batch, args, f"step {step} ")
            else:
                groups = sample_groups(policy, batch, args.group, f"step {step} ")
            counts = Counter(chain.from_iterable(groups))  # equal samples are one row, weighted
            if not args.distil:
                score_and_judge(scorer, list(counts), policy.separator)
                assign_credit(groups, args)
        sums = Counter()
        for part in run.gather(account(counts, args.aggregate, policy.generated - before)):
            sums.update(part)
        N = max(1, sums["tokens"])  # of all ranks

        norm = update(lm, start, optimizer, counts, N, args, autocast)  # 4.
        run.expect(math.isfinite(norm), f"step {step + 1}: the gradient's norm is {norm}")
        totals.update(tokens=sums["generated"], seconds=time.perf_counter() - started)
        progress["step"] = step + 1
        n = max(1, sums["samples"])
        log("train", step + 1, right=sums["right"] / n, reward=sums["reward"] / n, length=N / n,
            entropy=sums["nats"] / N, distinct=sums["distinct"] / n, norm=norm,
            tokens=totals["tokens"], seconds=totals["seconds"])

        # -------- 5. evaluation; a checkpoint
        last = step + 1 == args.steps
        due = (step + 1) % args.eval_every == 0
        if due or last:
            report(step + 1)
        told = any(run.gather(bool(stop)))  # asked last, so that a SIGTERM never costs another step
        if last:
            break
        if due or told:
            save_checkpoint(out, lm, optimizer, progress)
        if told:
            return print(f"SIGTERM: saved at step {step + 1}, --resume goes on from there")

    if rank == 0:
        save_policy(out, policy)
        print(f"the policy is in {out}")
    log("end", progress["step"], tokens=totals["tokens"], seconds=totals["seconds"])
    finish(out)


# ------------------------------------------------------------ the script

def main(argv=None):
    parser = run.command_line(__doc__)
    a = parser.add_argument_group("problems and models").add_argument
    a("--task", nargs="+", default=tasks.DEFAULT, help="(those of the tiny world)")
    a("--data", help="local file of training problems instead of the hub")
    a("--val-data", help="local file of held-out problems")
    a("--limit", type=int, default=600, help="training problems of each task (600)")
    a("--val-problems", type=int, default=64, help="held-out problems of each task (64)")
    a("--prm", default=str(run.TINY / "prm"), help="folder or hub id")
    a("--aggregate", choices=AGGREGATIONS, default="prod", help="R_i from its p_t (prod)")
    add_policy_flags(parser, str(run.TINY / "A"), without=("--thinking", "--temperature",
                                                           "--top-p"))
    a = parser.add_argument_group("learning").add_argument
    a("--credit", choices=CREDITS, default="outcome", help="what an advantage is made of (outcome)")
    a("--verified", type=run.share, default=0.0, help="share of problems credited by outcome (0)")
    a("--distil", choices=STRATEGIES, help="expert iteration instead of --credit")
    a("--steps", type=int, default=100)
    a("--problems", type=int, default=24, help="of a step, on all ranks (24)")
    a("--group", type=int, default=8, help="solutions of each problem, G (8)")
    a("--updates", type=int, default=1, help="steps of gradient on the same solutions (1)")
    a("--clip", type=run.amount, default=0.2, help="e of the clipped objective (0.2)")
    a("--kl", type=run.amount, default=0.0, help="weight of KL(policy || start) (0)")
    a("--lr", type=float, help="3e-4 below 100 M parameters, else 1e-6")
    a("--eval-every", type=int, default=20, help="steps between evaluations, checkpoints (20)")
    a("--seed", type=int, default=0)
    a = parser.add_argument_group("machine").add_argument
    a("--batch-tokens", type=int, default=4096, help="padded tokens of a forward with gradient")
    a("--out", default="runs/policy", help="folder of the policy, log and samples (runs/policy)")
    a("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    a("--overwrite", action="store_true", help="start again where a run is already")
    a("--device", help="default: cuda if there is one, else cpu")
    a("--dtype", choices=["float32", "bfloat16"], help="arithmetic (bfloat16 on cuda)")
    args = parser.parse_args(argv)
    run.need_positive(parser, args, "limit", "val_problems", "steps", "problems", "updates", "lr",
                  "eval_every", "batch_tokens")
    if args.group < 2:
        parser.error(f"--group {args.group}: comparing solutions takes 2 or more of them")
    if is_address(args.policy):
        parser.error(f"--policy {args.policy}: a server's weights cannot be trained")
    with preemption() as stop, parser:
        return train(args, stop)


if __name__ == "__main__":
    main()
