"""Metrics, tables and figures: §3.2 (prm@N, maj@N, pass@N, erroneous steps) and §4 (Figures 1-6, Table 1).

    python evaluate.py                                                    # the tiny world: prm@N, maj@N, pass@N
    python evaluate.py --samples samples.jsonl [--score --prm runs/prm]   # anybody's sample rows (see common/data.py)
    python evaluate.py --first-error processbench --data gsm8k.json --limit 400 --prm runs/prm
    python evaluate.py --exhibit fig4 --limit 500 --seeds 0 1 2           # a figure: PNG, SVG, JSONL and Markdown
    torchrun --nproc_per_node=8 evaluate.py --policy Qwen/Qwen2.5-Coder-7B-Instruct --prm runs/prm \\
        --task humaneval+ --strategies best_of_n majority --N 8 --out runs/eval

--exhibit  fig1  accuracy against PRM size           --prms xs=runs/prm-xs s=runs/prm-s ... (folders of train.py)
           fig2  accuracy against training steps     --prms runs/prm (its snapshots, see train.py --snapshots)
           fig3  prm@N against N for label sets      --prms PRM800K=... Math-Shepherd=... ASLAF=...
           fig4  accuracy against generated tokens, fig5 against seconds, for the four strategies
           fig6  p_t around a self-correction, on average and in one solution (Figures 6 and 8)
           curves  losses and validation figures     --prms runs/prm
           table1  --task tiny-code --policies A=... B=... x majority, --prms Code=... Math=... (minus the first)

prm@N      is the sample with the highest aggregated score right?  maj@N: is the most frequent answer?  wmaj@N: the same
           with each vote weighed by its score.  pass@N: is any sample?  All from one pool of --n samples a problem,
           --subset average (over all subsets of N; for the votes, over 64 random ones) or first (the first N).
interval   95 % percentile bootstrap over problems, and over training runs of a PRM where --prms has several with one
           label. Differences are paired over problems, z in standard errors.
--json     {"settings": ..., "metrics": {domain: {name: {N: {"value", "low", "high"}}, "paired": [...]}}, "beam" and
           "mcts": {domain: {...}}, "cost": {strategy: {...}}}, or beside settings "first_error" or "points" alone.

Samples, scores and searches are kept in --out, one file for each setting: what is done is not done again.
"""
import argparse
import hashlib
import itertools
import json
import math
import random
import statistics
from functools import cached_property, partial
from pathlib import Path

import torch

import search
from common import tasks
from common.data import first_wrong, read_rows, read_set
from common.loaders import own_row
from common.metrics import auc_pairs, interval, over_runs, paired
from common.policy import add_policy_flags, load_policy_flags
from common.run import TINY, add_run_flags, check_run_flags, command_line, distributed, gather, journaled
from prm_model import AGGREGATIONS, aggregate, coloured, load_prm
from search import by_domain
from similarity import phrase_pattern

# ---------------------------------------------------------------- one problem's value of a metric at N

def rewards(row, how):
    """Aggregated score of each sample; an unfinished one ranks below all others."""
    return [-1.0 if s.get("end") == "length" else aggregate(s["scores"], how) for s in row["samples"]]


def pass_at(row, n, subset="average"):
    """Is any of N right? Average over all subsets of N out of M samples, c of them right: 1 - C(M-c, N) / C(M, N)
    (Chen et al. 2021, arXiv 2107.03374)."""
    right = [s["correct"] for s in row["samples"]]
    if subset == "first":
        return float(any(right[:n]))
    return 1 - math.comb(len(right) - sum(right), n) / math.comb(len(right), n)


def prm_at(row, n, subset="average", how="prod"):
    """Is the best-scored of N right? Average over all subsets of N out of M: the sample ranked r (from 0) is the best
    of C(M-1-r, N-1) of them. Ties go to the first."""
    reward = rewards(row, how)
    order = sorted(range(len(reward) if subset == "average" else n), key=lambda i: (-reward[i], i))
    right = [row["samples"][i]["correct"] for i in order]
    if subset == "first":
        return float(right[0])
    M = len(right)
    return sum(y * math.comb(M - 1 - r, n - 1) for r, y in enumerate(right)) / math.comb(M, n)


def maj_at(row, n, subset="average", how=None, rounds=64):
    """Is the most frequent answer of N right? how: weigh each vote by its score. Ties go to the first."""
    M, rng = len(row["samples"]), random.Random(f"{row['id']} {n}")
    weight, keys = rewards(row, how) if how else [1.0] * M, [s["answer"] for s in row["samples"]]

    def right(chosen):
        return row["samples"][chosen[search.mode([keys[i] for i in chosen], [weight[i] for i in chosen])]]["correct"]
    if subset == "first" or n == M:
        return float(right(range(n)))
    if n == 1:
        return statistics.fmean(s["correct"] for s in row["samples"])
    return statistics.fmean(right(sorted(rng.sample(range(M), n))) for _ in range(rounds))


def metric(name):
    """"prm@N by min" and the like, without the @N: "pass", "maj", "wmaj by prod", "prm by prod"."""
    kind, _, how = name.partition(" by ")
    return {"pass": pass_at, "maj": maj_at, "wmaj": partial(maj_at, how=how), "prm": partial(prm_at, how=how)}[kind]


def powers(n):
    """1, 2, 4, ... n"""
    return sorted({min(n, 2 ** i) for i in range(n.bit_length() + 1)})


def at_budget(row, tokens, how="prod"):
    """Best-of-N by the first samples that fit into `tokens` (one at least): what the same tokens buy without search."""
    fits = sum(total <= tokens for total in itertools.accumulate(s["tokens"] for s in row["samples"]))
    return prm_at(row, max(1, fits), "first", how)


def anytime(row, tokens=math.inf, seconds=math.inf):
    """Is a search's best answer right when this much is spent? Its curve says what that answer was (search.py)."""
    best = [i for t, s, i in row["curve"] if t <= tokens and s <= seconds]
    return float(bool(best) and row["samples"][best[-1]]["correct"])


# ---------------------------------------------------------------- erroneous step identification (§3.2)

def first_error_figures(found, threshold):
    """found: [(p of each step, first wrong step or -1)]. The PRM says that the first step with p < threshold is wrong.

    As ProcessBench (Zheng et al. 2024, arXiv 2412.06559): the share of erroneous solutions whose first wrong step is
    found, the share of correct ones in which none is, and F1, their harmonic mean (None without solutions of both
    kinds). Steps after the first wrong one have no label; precision, recall, F1 of the others are of the wrong class.
    """
    said = [next((t for t, p in enumerate(scores) if p < threshold), -1) for scores, _ in found]
    hit = {bad: [s == y for s, (_, y) in zip(said, found) if (y >= 0) == bad] for bad in (True, False)}
    wrong, right = (statistics.fmean(hit[bad]) if hit[bad] else 0.0 for bad in (True, False))
    steps = [(p, y < 0 or t < y) for scores, y in found for t, p in enumerate(scores[:y + 1] if y >= 0 else scores)]
    tp = sum(p < threshold and not ok for p, ok in steps)
    flagged, bad = sum(p < threshold for p, _ in steps), sum(not ok for _, ok in steps)
    precision, recall = tp / max(1, flagged), tp / max(1, bad)
    u, pairs = auc_pairs(torch.tensor([p for p, _ in steps]), torch.tensor([ok for _, ok in steps]))
    return {"threshold": threshold, "erroneous": wrong, "correct": right,
            "F1": statistics.harmonic_mean([wrong, right]) if all(hit.values()) else None,
            "step precision": precision, "step recall": recall,
            "step F1": statistics.harmonic_mean([precision, recall]),
            "step AUC": u / pairs if pairs else None, "solutions": len(found), "steps": len(steps)}


def first_error(args, bench):
    """Figures at the threshold that is best on one half of the solutions (by a hash of the question), on the other."""
    if args.first_error in tasks.TASKS:
        problems = tasks.load(args.first_error, args.data, args.split, args.limit)
        if any("label" not in p.meta for p in problems):
            raise ValueError(f"--first-error {args.first_error}: its rows have no label of a first error")
        items = [(p.question, p.meta["steps"], p.meta["label"]) for p in problems]
    else:
        rows = itertools.islice(read_set(args.first_error, args.format), args.limit)
        items = [(row["prompt"], row["completions"], first_wrong(row["labels"])) for _, row in rows]

    def score(some):
        found = bench.prm(args.prm[0]).score([items[i][0] for i in some], [items[i][1] for i in some])
        return [{"id": i, "scores": x} for i, x in zip(some, found)]
    rows = journaled(None, range(len(items)), score, names=lambda i: [i], chunk=args.concurrent, desc="first-error")
    scores = [r["scores"] for r in gather(rows)[0]]
    half = [hashlib.blake2b(q.encode()).digest()[0] % 2 for q, _, _ in items]
    dev, test = ([(p, y) for p, (_, _, y), h in zip(scores, items, half) if h == side] for side in (0, 1))
    if not dev or not test:
        raise ValueError(f"{args.first_error}: {len(items)} solutions are too few to choose a threshold apart")
    key = "F1" if len({y >= 0 for _, _, y in items}) == 2 else "step F1"  # F1 needs solutions of both kinds
    best = max((t / 50 for t in range(1, 50)), key=lambda t: first_error_figures(dev, t)[key] or 0.0)
    figures = first_error_figures(test, best)
    groups = {}  # solutions of one problem stay together
    for p, (question, _, y), side in zip(scores, items, half):
        groups.setdefault(question, []).extend([(p, y)] * side)
    _, low, high = interval([x for x in groups.values() if x],
                            lambda some: first_error_figures(sum(some, []), best)[key] or 0.0, 200)
    rng = random.Random(0)  # guessing: the same solutions with p uniform in (0, 1)
    chance = first_error_figures([([rng.random() for _ in scores], y) for scores, y in test], 0.5)[key]
    return figures | {f"{key} low": low, f"{key} high": high, f"{key} of chance": chance}


# ---------------------------------------------------------------- samples, scores and searches, each done once

def written(path):
    """A local path and when the file, or the weights in the folder, were written: a model trained again is another."""
    path = Path(path)
    return [str(path), *(f.stat().st_mtime_ns for f in [path, *sorted(path.glob("*.safetensors"))] if f.is_file())]


def one(load):
    """load(path), kept until another path is asked for. The old one goes before the new one comes."""
    kept = {}

    def get(path):
        if path not in kept:
            kept.clear()
            kept[path] = load(path)
        return kept[path]
    return get


class Bench:
    """Models, loaded when they are first needed, and the folder of what was done."""

    def __init__(self, args):
        self.args, self.out, self.made = args, Path(args.out), set()
        self.rank, _, device = distributed(args.device)
        # one of each at a time: an exhibit goes through dozens of PRMs, one after the other
        self.policy = one(lambda path: load_policy_flags(args, device, path))
        self.prm = one(lambda path: load_prm(path, device, args.dtype, max_batch_tokens=args.max_batch_tokens))

    @cached_property
    def problems(self):
        a = self.args
        found = [p for task in a.task for seed in (a.seeds if task.startswith("tiny") else [0])
                 for p in tasks.load(task, a.data, a.split, a.limit, seed)]
        code = [p for p in found if (p.tests or {}).get("reference")]
        if code and self.rank == 0:  # what its own solutions fail is not the model's fault
            right, total, failing = tasks.reference_rate(code, progress=True)
            print("\n".join([f"reference solutions right: {right} of {total}",
                             *(f"  {name}: {why}" for name, why in failing.items())]))
        return found

    def once(self, name, settings, items, make):
        """make(some items) -> rows with an "id", for all items, over all ranks, kept in a file named after settings."""
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()
        file = self.out / "done" / f"{name}-{digest}.jsonl"
        resume = self.args.resume or file in self.made  # with --overwrite each file is made once more, and then shared
        self.made.add(file)
        return gather(journaled(file, items, make, chunk=self.args.concurrent, resume=resume, desc=name))[0]

    def settings(self, *flags):
        """What a file of rows depends on: the sampling, and these flags of the search."""
        sampling = ("temperature", "top_p", "max_step_tokens", "max_steps", "max_solution_tokens", "separator",
                    "policy_model", "chat_tokenizer", "dtype", "seed", "task", "split")
        return {"data": self.args.data and written(self.args.data),
                **{name: getattr(self.args, name) for name in (*sampling, *flags)}}

    def run(self, strategy, policy, prm=None, **options):
        """Sample rows of a strategy; best_of_n without a PRM is the plain pool of samples."""
        args = argparse.Namespace(**{**vars(self.args), **options})
        flags = {"beam": ["k", "m", "prune", "adaptive"],
                 "mcts": ["m", "simulations", "c", "choose", "prune"]}.get(strategy, [])
        settings = [strategy, written(policy), prm and written(prm),
                    self.settings(*flags, *(["aggregate", "textbook"] if prm else [])), options]
        return self.once(f"{strategy}-{Path(policy).name}", settings, self.problems, lambda some: search.solve(
            some, strategy, self.policy(policy), [self.prm(prm)] if prm else [], args)[1])

    def same_tokens(self, pool, policy, prm, *searches):
        """The pool with as many samples more as the dearest of these searches' tokens buy for each problem: what
        at_budget() compares them with. The same samples, and then the next ones."""
        budgets = {}
        for r in (r for rows in searches for r in rows):
            budgets[r["id"]] = max(1, r["cost"]["policy_generated"], budgets.get(r["id"], 0))
        have = {r["id"]: sum(s["tokens"] for s in r["samples"]) for r in pool}
        short = [p for p in self.problems if have[p.id] < budgets[p.id]]
        settings = [written(policy), written(prm), self.settings("aggregate"), [(p.id, budgets[p.id]) for p in short]]
        more = {r["id"]: r for r in self.once(
            f"budget-{Path(policy).name}", settings, short, lambda some: search.solve(
                some, "best_of_n", self.policy(policy), [self.prm(prm)], self.args, [budgets[p.id] for p in some])[1])}
        return [more.get(r["id"], r) for r in pool]

    def scored(self, pool, policy, prm):
        """The pool's rows with another PRM's scores."""
        def make(some):
            texts = list(dict.fromkeys((r["question"], tuple(s["steps"])) for r in some for s in r["samples"]))
            found = dict(zip(texts, self.prm(prm).score(*zip(*texts))))
            return [{"id": r["id"], "scores": [found[r["question"], tuple(s["steps"])] for s in r["samples"]]}
                    for r in some]
        settings = [written(policy), written(prm), len(pool[0]["samples"]), self.settings()]
        kept = self.once(f"scores-{Path(prm).name}", settings, pool, make)
        return [{**r, "samples": [{**s, "scores": x} for s, x in zip(r["samples"], k["scores"], strict=True)]}
                for r, k in zip(pool, kept, strict=True)]


def named(specs):
    """["Math=runs/a", "Math=runs/b", "runs/c"] -> {"Math": ["runs/a", "runs/b"], "c": ["runs/c"]}: one label for
    several training runs of a PRM (--seed of train.py)."""
    found = {}
    for spec in specs:
        label, given, path = spec.partition("=")
        found.setdefault(label if given else Path(label).name, []).append(path or label)
    return found


# ---------------------------------------------------------------- the exhibits: lists of points

def point(series, x, *runs, **more):
    """runs: one value a problem, for each training run of the PRM; the interval covers both."""
    value, low, high = over_runs(runs)
    if len(runs) > 1:
        more["each run"] = " ".join(f"{statistics.fmean(run):.3f}" for run in runs)
    return {"series": series, "x": x, "value": value, "low": low, "high": high, "problems": len(runs[0]), **more}


def exact(series, x, value, **more):
    """A point without an interval."""
    return {"series": series, "x": x, "value": value, "low": value, "high": value, **more}


def training_log(prm):
    """What train.py wrote beside a PRM: {kind: [rows]}; empty for a PRM from elsewhere."""
    log, kinds = Path(prm) / "log.jsonl", {}
    for _, row in read_rows(log) if log.exists() else ():
        kinds.setdefault(row["kind"], []).append(row)
    return kinds


def prm_runs(bench, policy, pool, ns):
    """Yield (label, domain, N, one list of prm@N a training run) for each of --prms."""
    for label, paths in named(bench.args.prms).items():
        scored = [by_domain(bench.scored(pool, policy, path)) for path in paths]
        for domain, n in itertools.product(by_domain(pool), ns):
            yield label, domain, n, [[prm_at(r, n, how=bench.args.aggregate) for r in run[domain]] for run in scored]


def fig1(bench, args):
    """Accuracy of prm@N against the PRM's size, with the FLOPs of pre-training and of reward training (6 N D)."""
    points, before, pool = [], {}, bench.run("best_of_n", args.policy, n=args.n)
    for label, domain, n, runs in prm_runs(bench, args.policy, pool, [args.n]):
        prm = named(args.prms)[label][0]
        log = training_log(prm)
        start, end = log.get("start", [{}])[0], log.get("end", [{}])[-1]
        size = start.get("parameters") or sum(p.numel() for p in bench.prm(prm).parameters())
        more = {"minus the one before": over_runs(runs, before[domain])} if domain in before else {}
        points.append(point(f"{domain}, prm@{n}", size, *runs, prm=label,
                            pretraining_flops=start.get("pretraining_flops"), reward_flops=end.get("flops"), **more))
        before[domain] = runs
    return points, "parameters of the PRM", "accuracy", "log"


def fig2(bench, args):
    """Accuracy of prm@N, and validation AUC, against the PRM's training steps."""
    pool, points = bench.run("best_of_n", args.policy, n=args.n), []
    for label, (path, *_) in named(args.prms).items():
        of, snapshots = f" of {label}" if len(named(args.prms)) > 1 else "", sorted(Path(path).glob("step-*"))
        if not snapshots:
            raise ValueError(f"{path} has no snapshots: train it with --snapshots")
        for folder in snapshots:
            for domain, rows in by_domain(bench.scored(pool, args.policy, str(folder))).items():
                points.append(point(f"{domain}, prm@{args.n}{of}", int(folder.name[5:]),
                                    [prm_at(r, args.n, how=args.aggregate) for r in rows], prm=label))
        points += [exact(f"validation: step AUC{of}", e["step"], e["auc"], problems=None, prm=label)
                   for e in training_log(path).get("eval", []) if e["auc"] is not None]
    return points, "training steps of the PRM", "accuracy", "symlog"


def fig3(bench, args):
    """prm@N against N for PRMs from different label sets, beside majority vote."""
    pool, first = bench.run("best_of_n", args.policy, n=args.n), {}
    points = [point(f"{domain}, majority", n, [maj_at(r, n) for r in rows])
              for domain, rows in by_domain(pool).items() for n in powers(args.n)]
    for label, domain, n, runs in prm_runs(bench, args.policy, pool, powers(args.n)):
        base = first.setdefault((domain, n), runs)
        more = {"minus the first": over_runs(runs, base)} if runs is not base else {}
        points.append(point(f"{domain}, {label}", n, *runs, **more))
    return points, "N", "accuracy", "log"


def fig4(bench, args, axis="tokens"):
    """Accuracy against what is spent on a problem: generated tokens (Figure 4), or seconds (Figure 5).

    Best-of-N and majority: N of one pool of --n samples, at N / --n of its cost (the vote without the PRM's seconds).
    Beam: a run for each width K x M. MCTS: one run; its best answer whenever its cost had reached the x.
    """
    how, points = args.aggregate, []
    plain = bench.run("best_of_n", args.policy, args.prm[0], n=args.n)
    beams = {(k, m): bench.run("beam", args.policy, args.prm[0], k=k, m=m) for k, m in args.widths}
    trees = bench.run("mcts", args.policy, args.prm[0], simulations=args.simulations)
    pool, trees, more = by_domain(plain), by_domain(trees), by_domain(
        bench.same_tokens(plain, args.policy, args.prm[0], trees, *beams.values()))
    beams = {width: by_domain(rows) for width, rows in beams.items()}

    def cost(rows, prm=True):
        c = [r["cost"] for r in rows]
        return statistics.fmean(x["policy_generated"] if axis == "tokens" else
                                x["seconds"] - (0 if prm else x["prm_seconds"]) for x in c)

    def above(right, same):  # at the same tokens, so not in a figure of seconds
        return dict(zip(("above_best_of_n", "se", "z"), paired(right, same))) if axis == "tokens" else {}
    for domain, rows in pool.items():
        for n in powers(args.n):
            points.append(point(f"{domain}, best-of-N", cost(rows) * n / args.n, [prm_at(r, n, how=how) for r in rows],
                                N=n))
            points.append(point(f"{domain}, majority", cost(rows, prm=False) * n / args.n,
                                [maj_at(r, n) for r in rows], N=n))
        for (k, m), found in beams.items():
            right = [search.right(r, r["picked"]) for r in found[domain]]
            same = [at_budget(r, b["cost"]["policy_generated"], how) for r, b in zip(more[domain], found[domain])]
            points.append(point(f"{domain}, beam", cost(found[domain]), right, width=f"{k}x{m}", **above(right, same)))
        most = cost(trees[domain])
        for share in (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1):
            right = [anytime(r, **{axis: most * share if share < 1 else math.inf}) for r in trees[domain]]
            spent = [r["cost"]["policy_generated"] if share == 1 else most * share for r in trees[domain]]
            same = [at_budget(r, t, how) for r, t in zip(more[domain], spent)]
            points.append(point(f"{domain}, MCTS", most * share, right, **above(right, same)))
    return points, "generated tokens a problem" if axis == "tokens" else "seconds a problem", "accuracy", "log"


def fig6(bench, args):
    """Does p_t rise again when a mistake is corrected (Figures 6 and 8)? Its mean over the steps around the one after a
    mistake that the PRM notices (p < 0.5): where that step corrects it and the solution ends right; and, to compare,
    where nothing is corrected and it ends wrong. One of the former is printed in full."""
    pool, points, phrase = bench.run("best_of_n", args.policy, n=args.n), [], phrase_pattern()
    for label, (prm, *_) in named(args.prms or args.prm).items():
        groups, corrections = {"corrected": [], "not corrected": []}, 0
        for r, s in [(row, s) for row in bench.scored(pool, args.policy, prm) for s in row["samples"]]:
            says = next((i for i, x in enumerate(s["steps"]) if phrase.search(x)), 0)  # none in the first step
            low = first_wrong(s["scores"]) + 1
            corrections += bool(s["correct"] and says)
            if s["correct"] and says and s["scores"][says - 1] < 0.5:
                groups["corrected"].append((r, s, says))
            elif not s["correct"] and not says and low:
                groups["not corrected"].append((r, s, low))
        if not (noticed := groups["corrected"]):
            raise ValueError(f"{label} notices no mistake of {corrections} corrected ones: raise --limit or --n")
        row, sample, _ = max(noticed, key=lambda x: max(x[1]["scores"]) - min(x[1]["scores"]))
        if bench.rank == 0:
            print(f"\n{label} notices {len(noticed)} of {corrections} mistakes that are corrected with success, as in",
                  row["question"], *map(coloured, sample["steps"], sample["scores"]), sep="\n")
        for (kind, found), domain, at in itertools.product(groups.items(), by_domain(pool), range(-2, 4)):
            p = {}  # of each problem, so that the interval is over problems
            for r, s, i in found:
                if r["domain"] == domain and 0 <= i + at < len(s["steps"]):
                    p.setdefault(r["id"], []).append(s["scores"][i + at])
            if p:
                points.append(point(f"{domain}, {label}, {kind}", at, [statistics.fmean(x) for x in p.values()],
                                    solutions=sum(map(len, p.values()))))
    return points, "step, counted from the one after the mistake", "mean probability that the step is correct", "linear"


def table1(bench, args):
    """Policies x {single, majority, each PRM} on the code tasks: a row for each, printed as Markdown."""
    points, n = [], args.n
    for name, (policy, *_) in named(args.policies).items():
        pool, first = bench.run("best_of_n", policy, n=n), {}
        single = {domain: [pass_at(r, 1) for r in rows] for domain, rows in by_domain(pool).items()}
        for domain, rows in by_domain(pool).items():
            points += [point(f"{name}, {domain}: single", 1, single[domain]),
                       point(f"{name}, {domain}: majority", n, [maj_at(r, n) for r in rows])]
        for label, domain, _, runs in prm_runs(bench, policy, pool, [n]):
            more = {"minus single": over_runs(runs, [single[domain]])}
            if (base := first.setdefault(domain, runs)) is not runs:
                more["minus the first"] = over_runs(runs, base)
            points.append(point(f"{name}, {domain}: PRM-{label}", n, *runs, **more))
    return points, "N", "accuracy", "linear"


def curves(bench, args):
    """What train.py logged: the losses, and the validation figures in whose leap Figure 2 sees an emergence."""
    points, drawn = [], {"train": ["loss"], "eval": ["loss", "auc", "auc_within", "accuracy", "f1_wrong"]}
    for label, path in ((x if len(paths) == 1 else Path(path).name, path)
                        for x, paths in named(args.prms).items() for path in paths):
        log = training_log(path)
        points += [exact(f"{label}, {kind} {key}", row["step"], row[key]) for kind, keys in drawn.items()
                   for key in keys for row in log.get(kind, ()) if row[key] is not None]
    return points, "optimizer step", "loss in nats, or share", "symlog"


EXHIBITS = {"fig1": fig1, "fig2": fig2, "fig3": fig3, "fig4": fig4, "fig5": partial(fig4, axis="seconds"),
            "fig6": fig6, "curves": curves, "table1": table1}


def draw(name, points, x_label, y_label, x_scale, out):
    """PNG and SVG with 95 % bands, the numbers as JSONL and as a Markdown table."""
    from matplotlib.figure import Figure
    (out / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    more = [k for k in dict.fromkeys(k for p in points for k in p) if k not in ("series", "x", "value", "low", "high")]
    table = [f"| | {x_label} | {y_label} | 95 % |" + "".join(f" {k} |" for k in more), "|---" * (4 + len(more)) + "|"]
    for p in points:
        cells = [p.get(k) for k in more]
        cells = [f"{c:.3g}" if isinstance(c, float) else "{:+.3f} ({:+.3f} to {:+.3f})".format(*c)
                 if isinstance(c, tuple) else "" if c is None else str(c) for c in cells]
        cells = [p["series"], f"{p['x']:.6g}", f"{p['value']:.3f}", f"{p['low']:.3f} to {p['high']:.3f}", *cells]
        table.append("| " + " | ".join(cells) + " |")
    (out / f"{name}.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    if name != "table1":
        panels = [d for d in ("math", "code") if any(p["series"].startswith(d + ", ") for p in points)] or [""]
        figure = Figure((1 + 5 * len(panels), 4.5))
        for panel, ax in zip(panels, figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]):
            for series in dict.fromkeys(p["series"] for p in points):
                domain, _, label = series.partition(", ")
                if domain in panels and domain != panel:
                    continue
                mine = sorted((p for p in points if p["series"] == series), key=lambda p: p["x"])
                x, value, low, high = ([p[k] for p in mine] for k in ("x", "value", "low", "high"))
                line, = ax.plot(x, value, marker="o", markersize=3, label=label if domain == panel else series)
                ax.fill_between(x, low, high, alpha=0.15, color=line.get_color())
            ax.set(xlabel=x_label, ylabel=y_label, xscale=x_scale, title=panel)
            ax.legend(fontsize=7)
        for suffix in ("png", "svg"):
            figure.savefig(out / f"{name}.{suffix}", bbox_inches="tight", dpi=150)


# ---------------------------------------------------------------- the report

def report(rows, names, ns, subset):
    """Print the metrics of each domain; returns what --json writes."""
    out = {}
    for domain, some in by_domain(rows).items():
        values = {name: {n: [metric(name)(row, n, subset) for row in some] for n in ns} for name in names}
        print(f"\n{domain}: {len(some)} problems, {len(some[0]['samples'])} samples each, subsets: {subset}\n"
              + f"{'N':<22}" + "".join(f"{n:>18}" for n in ns))
        out[domain] = {}
        for name in names:
            spread = {n: interval(values[name][n]) for n in ns}
            out[domain][name] = {n: dict(zip(("value", "low", "high"), s)) for n, s in spread.items()}
            print(f"{name.replace(' by', '@N by') if ' by' in name else name + '@N':<22}" + "".join(
                f"{v:>6.3f} {f'[{low:.2f}, {high:.2f}]':>11}" for v, low, high in spread.values()))
        best, out[domain]["paired"] = names[0], []  # of the metrics by the PRM, where there are any
        for other, n in (("maj", ns[-1]), ("pass", 1)) if best != "maj" else ():
            d, se, z = paired(values[best][ns[-1]], values[other][n])
            print(f"{best.replace(' by', f'@{ns[-1]} by')} - {'single' if n == 1 else f'{other}@{n}'}: "
                  f"{d:+.3f} ± {1.96 * se:.3f}, {z:+.1f} standard errors")
            out[domain]["paired"].append({"a": best, "b": other, "N": n, "difference": d, "se": se, "z": z})
    return out


def cost_table(costs, sizes):
    """Policy and PRM tokens, seconds and FLOPs (2 N a token of a forward) of each strategy, a problem. sizes: N of the
    policy (None: not known, and so are the FLOPs) and of the PRM."""
    print(f"\n{'a problem':<22}{'generated':>12}{'prefilled':>12}{'PRM tokens':>12}{'seconds':>10}{'FLOPs':>12}")
    for name, c in costs.items():
        c["flops"] = sizes[0] and 2 * (sizes[0] * (c["policy_generated"] + c["policy_prefilled"])
                                       + sizes[1] * c["prm_tokens"])
        print(f"{name:<22}{c['policy_generated']:>12.0f}{c['policy_prefilled']:>12.0f}{c['prm_tokens']:>12.0f}"
              f"{c['seconds']:>10.3f}" + (f"{c['flops']:>12.3g}" if c["flops"] else f"{'-':>12}"))
    return costs


def run_searches(bench, args, pool):
    """Beam search and MCTS, if --strategies asks for them, beside best-of-N at the same tokens, and what each costs;
    returns what --json writes. pool: the samples of best-of-N."""
    costs, out = {"best_of_n": pool}, {}
    for strategy in (x for x in args.strategies if x in ("beam", "mcts")):
        costs[strategy] = bench.run(strategy, args.policy, args.prm[0])
        more = by_domain(bench.same_tokens(pool, args.policy, args.prm[0], costs[strategy]))
        for domain, some in by_domain(costs[strategy]).items() if bench.rank == 0 else ():
            right = [search.right(r, r["picked"]) for r in some]
            same = [at_budget(r, b["cost"]["policy_generated"], args.aggregate) for r, b in zip(more[domain], some)]
            (v, low, high), (d, se, z) = interval(right), paired(right, same)
            print(f"\n{domain}, {strategy}: {v:.3f} [{low:.2f}, {high:.2f}]; above best-of-N at the same tokens: "
                  f"{d:+.3f} ± {1.96 * se:.3f}, {z:+.1f} standard errors")
            out.setdefault(strategy, {})[domain] = {"value": v, "low": low, "high": high,
                                                    "above_best_of_n": d, "se": se, "z": z}
    if bench.rank == 0:
        mean = {k: {c: statistics.fmean(r["cost"][c] for r in v) for c in v[0]["cost"]} for k, v in costs.items()}
        lm = getattr(bench.policy(args.policy), "lm", None)  # a server's size is not known
        sizes = [m and sum(p.numel() for p in m.parameters()) for m in (lm, bench.prm(args.prm[0]))]
        out["cost"] = cost_table(mean, sizes)
    return out


def read_samples(file):
    """Sample rows of anybody's, checked for what the metrics need. "correct" and "answer" may be left to the judge."""
    rows = []
    for number, row in read_rows(file):
        for key, kind in (("id", (str, int)), ("question", str), ("samples", list)):
            if not isinstance(row.get(key), kind) or row[key] == []:
                raise ValueError(f"{file}:{number}: no {key}")
        row["domain"] = row.get("domain") or ("code" if row.get("tests") else "math")
        for s in row["samples"]:
            steps = s.get("steps") if isinstance(s, dict) else None
            if not isinstance(steps, list) or not steps or not all(isinstance(x, str) for x in steps):
                raise ValueError(f"{file}:{number}: a sample without steps, which are texts")
            p = s.get("scores")
            if p is not None and not (isinstance(p, list) and all(isinstance(x, (int, float, type(None))) for x in p)):
                raise ValueError(f"{file}:{number}: scores: a list of numbers is expected, or null")
            if p is not None and len(p) != len(steps):
                raise ValueError(f"{file}:{number}: {len(p)} scores for {len(steps)} steps")
            s["scores"] = None if p is None or None in p else p  # search.py without a PRM writes a list of null
            if not isinstance(s.get("correct", False), int):
                raise ValueError(f"{file}:{number}: correct: true or false is expected")
        rows.append(row)
    if not rows:
        raise ValueError(f"{file}: no rows")
    unjudged = [(r, s) for r in rows for s in r["samples"] if "correct" not in s or "answer" not in s]
    flat = [(own_row(r, 0), "\n\n".join(s["steps"])) for r, s in unjudged]
    for (_, s), verdict, key in zip(unjudged, tasks.judge_many(flat), tasks.vote_keys(flat)):
        s["correct"], s["answer"] = s.get("correct", verdict.ok), s.get("answer", key)
    return rows


def parse(argv):
    parser = command_line(__doc__)
    a = parser.add_argument
    a("--exhibit", choices=EXHIBITS)
    a("--samples", help="sample rows to evaluate instead of sampling")
    a("--score", action="store_true", help="score --samples with --prm, whatever scores they have")
    a("--first-error", metavar="SET", help="processbench, or stepwise rows: erroneous step identification")
    a("--format", choices=["auto", "stepwise", "prm800k", "math-shepherd"], default="auto", help="of --first-error")
    a("--strategies", nargs="+", choices=search.STRATEGIES, default=["best_of_n", "majority"],
      help="beam and mcts are run, too; the others come from the pool of samples in any case")
    a("--subset", choices=["average", "first"], default="average", help="which N of the samples")
    a("--prms", nargs="+", default=[], help="exhibits: LABEL=FOLDER ...; one label may have several training runs")
    a("--policies", nargs="+", default=[f"{x}={TINY / x}" for x in "ABC"], help="table1: LABEL=FOLDER of the LLMs")
    a("--widths", nargs="+", default=["1x4", "2x4", "4x4", "4x8"], help="fig4, fig5: beams KxM")
    a("--seeds", type=int, nargs="+", default=[0], help="sets of problems of the tiny world")
    a("--split", help="of the task")
    search.add_search_flags(parser)
    add_policy_flags(parser, str(TINY / "A"))
    add_run_flags(parser, limit=100)
    parser.set_defaults(out="runs/evaluate")
    args = parser.parse_args(argv)
    args.resume = args.resume or not args.overwrite  # --out is a folder that grows
    check_run_flags(parser, args, "n", "k", "m", "simulations", "concurrent")
    args.tokens = math.inf
    try:
        args.widths = [(int(k), int(m)) for k, m in (w.split("x") for w in args.widths)]
    except ValueError:
        parser.error("--widths: KxM, as in 4x4")
    if args.exhibit in ("curves", "fig1", "fig2", "fig3", "table1") and not args.prms:
        parser.error(f"--exhibit {args.exhibit} needs --prms LABEL=FOLDER ... (recipes/tiny.sh trains them)")
    if len(args.prm) > 1:
        parser.error("--prm takes one PRM here: search.py combines several (--combine), exhibits compare them (--prms)")
    return parser, args


def main(argv=None):
    parser, args = parse(argv)
    result = {"settings": {k: str(v) for k, v in vars(args).items()}}
    out = Path(args.out)
    with parser:
        out.mkdir(parents=True, exist_ok=True)
        bench = Bench(args)
        names = [*dict.fromkeys(f"prm by {how}" for how in (args.aggregate, *AGGREGATIONS)),
                 f"wmaj by {args.aggregate}", "maj", "pass"]
        if args.first_error:
            result["first_error"] = first_error(args, bench)
            if bench.rank == 0:
                print("\n".join(f"{k:<20}{v:.3f}" if isinstance(v, float) else f"{k:<20}{v}"
                                for k, v in result["first_error"].items()))
        elif args.exhibit:
            points, *labels = EXHIBITS[args.exhibit](bench, args)
            result["points"] = points
            if bench.rank == 0:
                draw(args.exhibit, points, *labels, out)
        else:
            if args.samples:
                rows = read_samples(args.samples)
                if args.score:
                    rows = bench.scored(rows, args.samples, args.prm[0])
                elif any(s.get("scores") is None for r in rows for s in r["samples"]):
                    names = ["maj", "pass"]
            else:
                rows = bench.run("best_of_n", args.policy, args.prm[0], n=args.n)
            ns = powers(min(len(r["samples"]) for r in rows))
            if bench.rank == 0:
                result["metrics"] = report(rows, names, ns, args.subset)
            if not args.samples:
                result |= run_searches(bench, args, rows)
    if args.json and bench.rank == 0:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
