"""The exhibits of §4: Figures 1 to 6 (7 is 1 on another --task), Table 1, training curves.

    python -m paper.figures fig4 --limit 500 --seeds 0 1 2
    torchrun --nproc_per_node=8 -m paper.figures fig1 --prms xs=runs/prm-xs s=runs/prm-s ...

fig1    accuracy against PRM size            --prms LABEL=FOLDER ... (folders of train.py)
fig2    accuracy against training steps      --prms l=runs/prm (train.py --snapshots)
fig3    prm@N against N for label sets       --prms PRM800K=... Math-Shepherd=... ASLAF=...
fig4    accuracy against generated tokens; fig5 against seconds;
difficulty  the same by bins of difficulty; router: the best of it (all four: paper/scaling.py)
fig6    p_t around a self-correction, on average and in one solution (Figures 6 and 8)
curves  losses and validation figures        --prms runs/prm
table1  --task tiny-code --policies A=... B=... x majority, --prms Code=... Math=... (minus first)

Written to --out: NAME.png, .svg, .md and the points as .jsonl; beside them samples, scores and
searches, which all exhibits share. Intervals are 95 %, over problems, and over training runs where
--prms has several folders with one label.
"""
import json
import math
import re
import statistics
from functools import partial
from itertools import chain
from pathlib import Path

import search
from common.checkpoint import read_log
from common.data import first_wrong
from common.metrics import over_runs
from common.models import names_folder
from common.policy import add_policy_flags
from common.run import TINY, add_run_flags, command_line, expect, need_positive
from common.samples import Bench
from evaluate import check, maj_at, pass_at, powers, prm_at
from paper.drawing import draw, exact, point, write_table
from paper.scaling import TABLE_ONLY, difficulty, fig4, router
from prm_model import coloured, load_prm
from search import by_domain

PHRASES = re.compile(r"\b(?:wait|however|let me check)\b", re.IGNORECASE)  # of self-correction

# ---------------------------------------------------------------- points

def named(specs):
    """["Math=x/a", "Math=x/b", "x/c"] -> {"Math": ["x/a", "x/b"], "c": ["x/c"]}"""
    paths = {}  # one label for several training runs of a PRM (train.py --seed)
    for spec in specs:
        label, given, path = spec.partition("=")
        paths.setdefault(label if given else Path(label).name, []).append(path or label)
    return paths


def training_log(prm):
    """What train.py wrote beside a PRM: {kind: [rows]}; empty for a PRM from elsewhere."""
    kinds = {}
    for row in read_log(Path(prm)):
        kinds.setdefault(row["kind"], []).append(row)
    return kinds


def prm_runs(bench, args, policy, pool, ns):
    """Yield (label, domain, N, one list of prm@N a training run) for each of --prms."""
    # a PRM at a time: its scores of the pool are kept in --out
    for label, paths in named(args.prms).items():
        scored = [by_domain(bench.scored(pool, policy, path)) for path in paths]
        for domain in by_domain(pool):
            for n in ns:
                at_n = partial(prm_at, n=n, how=args.aggregate)
                yield label, domain, n, [list(map(at_n, run[domain])) for run in scored]


def baseline(series, x, rows, n):
    """Majority vote of n samples (1: a single sample): what there is without a PRM."""
    return point(series, x, [maj_at(r, n) for r in rows])


# ---------------------------------------------------------------- the exhibits

def fig1(bench, args):
    """prm@N against the PRM's size, with FLOPs of pre-training and reward training (6 N D)."""
    points, before, pool = [], {}, bench.run("best_of_n", args.policy)
    for label, domain, n, runs in prm_runs(bench, args, args.policy, pool, [args.n]):
        prm = named(args.prms)[label][0]
        log = training_log(prm)
        start, end = log.get("start", [{}])[0], log.get("end", [{}])[-1]
        # a PRM from elsewhere has no log: count its weights
        size = start.get("parameters") or sum(p.numel() for p in bench.prm(prm).parameters())
        base = before.get(domain)  # of the label before
        more = {"minus the one before": over_runs(runs, base)} if base else {}
        points.append(point(f"{domain}, prm@{n}", size, *runs, prm=label,
                            pretraining_flops=start.get("pretraining_flops"),
                            reward_flops=end.get("flops"), **more))
        before[domain] = runs
    sizes = {p["x"] for p in points}
    for domain, rows in by_domain(pool).items():
        for size in sorted({min(sizes), max(sizes)}):  # a level line
            points += [baseline(f"{domain}, single", size, rows, 1),
                       baseline(f"{domain}, majority", size, rows, args.n)]
    return points


def fig2(bench, args):
    """prm@N, and validation AUC, against the PRM's training steps."""
    points, pool, prms = [], bench.run("best_of_n", args.policy), named(args.prms)
    for label, (path, *_) in prms.items():
        snapshots = sorted(Path(path).glob("step-*"))
        of = f" of {label}" if len(prms) > 1 else ""
        for folder in snapshots:
            step = int(folder.name.removeprefix("step-"))
            for domain, rows in by_domain(bench.scored(pool, args.policy, str(folder))).items():
                right = [prm_at(r, args.n, args.aggregate) for r in rows]
                points.append(point(f"{domain}, prm@{args.n}{of}", step, right, prm=label))
        for row in training_log(path).get("eval", []):
            if row["auc"] is not None:
                points.append(exact(f"validation, step AUC{of}", row["step"], row["auc"],
                                    problems=None, prm=label))
    return points


def fig3(bench, args):
    """prm@N against N for PRMs from different label sets, beside majority vote."""
    points, first, pool = [], {}, bench.run("best_of_n", args.policy)
    for domain, rows in by_domain(pool).items():
        points += [baseline(f"{domain}, majority", n, rows, n) for n in powers(args.n)]
    for label, domain, n, runs in prm_runs(bench, args, args.policy, pool, powers(args.n)):
        base = first.setdefault((domain, n), runs)  # of the first label
        more = {"minus the first": over_runs(runs, base)} if runs is not base else {}
        points.append(point(f"{domain}, {label}", n, *runs, **more))
    return points


def fig6(bench, args):
    """Does p_t rise again when a mistake is corrected (Figures 6 and 8)?

    Mean p_t around the step after a mistake that the PRM notices (p < 0.5): "corrected", that step
    corrects it and the solution ends right; "not corrected", none does and it ends wrong.
    """
    pool, points = bench.run("best_of_n", args.policy), []
    for label, (prm, *_) in named(args.prms or args.prm).items():
        groups, corrections = {"corrected": [], "not corrected": []}, 0
        for row in bench.scored(pool, args.policy, prm):
            for s in row["samples"]:
                # the first step that corrects itself; 0 if there is none: the first has no mistake
                says = next((i for i, x in enumerate(s["steps"]) if PHRASES.search(x)), 0)
                low = first_wrong(s["scores"]) + 1  # one past the first that the PRM calls wrong
                corrections += bool(s["correct"] and says)
                if s["correct"] and says and s["scores"][says - 1] < 0.5:
                    groups["corrected"].append((row, s["scores"], says, s["steps"]))
                elif not s["correct"] and not says and low:
                    groups["not corrected"].append((row, s["scores"], low, s["steps"]))
        noticed = groups["corrected"]
        expect(noticed, f"{label} notices no mistake of {corrections} corrected ones: raise "
               "--limit or --n")
        # in full: the solution whose p moves most
        row, scores, _, steps = max(noticed, key=lambda x: max(x[1]) - min(x[1]))
        if bench.rank == 0:
            print(f"\n{label} notices {len(noticed)} of {corrections} mistakes that are corrected "
                  f"with success, as in\n{row['question']}")
            print(*map(coloured, steps, scores), sep="\n")
        for kind, group in groups.items():
            for domain in by_domain(pool):
                points += around(f"{domain}, {label}, {kind}",
                                 [x for x in group if x[0]["domain"] == domain])
    return points


def around(series, group):
    """Points at -2 .. 3 steps from the one in question: the interval is over problems."""
    points = []
    for at in range(-2, 4):
        p = {}  # {problem: [p of the step]}
        for row, scores, i, _ in group:
            if 0 <= i + at < len(scores):
                p.setdefault(row["id"], []).append(scores[i + at])
        if p:
            points.append(point(series, at, [statistics.fmean(x) for x in p.values()],
                                solutions=sum(map(len, p.values()))))
    return points


def table1(bench, args):
    """Policies x {single, majority, each PRM} on the code tasks: a row for each, as Markdown."""
    points = []
    for name, (policy, *_) in named(args.policies).items():
        samples, first = bench.run("best_of_n", policy), {}
        pool = by_domain(samples)
        for domain, rows in pool.items():
            points += [baseline(f"{name}, {domain}: single", 1, rows, 1),
                       baseline(f"{name}, {domain}: majority", args.n, rows, args.n)]
        for label, domain, _, runs in prm_runs(bench, args, policy, samples, [args.n]):
            single = [pass_at(r, 1) for r in pool[domain]]
            more = {"minus single": over_runs(runs, [single])}
            if first.setdefault(domain, runs) is not runs:
                more["minus the first"] = over_runs(runs, first[domain])
            points.append(point(f"{name}, {domain}: PRM-{label}", args.n, *runs, **more))
    return points


def curves(bench, args):
    """What train.py logged: the losses, and validation figures (Figure 2's leap is seen there)."""
    points, keys = [], ["loss", "auc", "auc_within", "accuracy", "f1_wrong"]
    for label, paths in named(args.prms).items():
        for path in paths:
            name, log = label if len(paths) == 1 else Path(path).name, training_log(path)
            expect(log, f"{path}/log.jsonl: no such file, or nothing in it")
            for kind, key in [("train", "loss"), *(("eval", key) for key in keys)]:
                points += [exact(f"{name}, {kind} {key}", row["step"], row[key])
                           for row in log.get(kind, ()) if row[key] is not None]
    return points


# ---------------------------------------------------------------- main

# name: (function, title, x label, scale of x, y label)
EXHIBITS = {
    "fig1": (fig1, "Best-of-N against the size of the PRM",
             "parameters of the PRM", "decades", "accuracy"),
    "fig2": (fig2, "Best-of-N against the training of the PRM",
             "training steps", "powers", "accuracy"),
    "fig3": (fig3, "PRMs from different labels", "N", "powers", "accuracy of prm@N"),
    "fig4": (fig4, "Search strategies at equal tokens",
             "generated tokens a problem", "powers", "accuracy"),
    "fig5": (partial(fig4, axis="seconds"), "Search strategies at equal time",
             "seconds a problem", "decades", "accuracy"),
    "difficulty": (difficulty, "Search strategies by the problem's difficulty",
                   "difficulty (1: hardest)", "linear", "accuracy"),
    "router": (router, "The best strategy for a budget",
               "generated tokens a problem", "powers", "accuracy"),
    "fig6": (fig6, "Does p rise where a mistake is corrected? (dashed: where it is not)",
             "step (-1: the mistake)", "linear", "mean p of the step"),
    "table1": (table1, "Policies and PRMs on code", "N", "powers", "accuracy"),
    "curves": (curves, "Training of the PRM", "optimizer step", "powers", "share")}


BUDGETED = ("fig4", "fig5", "difficulty", "router")  # the others end by --n and --simulations


def parse(argv):
    parser = command_line(__doc__)
    a = parser.add_argument
    a("exhibit", choices=EXHIBITS)
    a("--prms", nargs="+", default=[], help="LABEL=FOLDER ...; several training runs: one label")
    llms = [f"{x}={TINY / x}" for x in "ABC"]
    a("--policies", nargs="+", default=llms, help="table1: LABEL=FOLDER of the LLMs")
    a("--widths", nargs="+", default=["1x4", "2x4", "4x4", "4x8"], help="fig4, fig5: beams KxM")
    a("--seeds", type=int, nargs="+", default=[0], help="sets of problems of the tiny world")
    search.add_search_flags(parser)
    add_policy_flags(parser, str(TINY / "A"))
    add_run_flags(parser, limit=100)
    a("--tokens", type=int, default=2048, help="fig4, fig5, difficulty, router: budget (2048)")
    args = parser.parse_args(argv)
    check(parser, args)
    need_positive(parser, args, "tokens")
    if args.exhibit not in BUDGETED:
        args.tokens = math.inf
    if not all(re.fullmatch(r"[1-9]\d*x[1-9]\d*", width) for width in args.widths):
        parser.error("--widths: KxM, as in 4x4")
    args.widths = [tuple(map(int, width.split("x"))) for width in args.widths]
    for path in chain.from_iterable(named(args.prms).values()):  # before hours of sampling
        if names_folder(path) and not Path(path).is_dir():
            parser.error(f"--prms {path}: no such folder")
        if args.exhibit == "fig2" and not list(Path(path).glob("step-*")):
            parser.error(f"--prms {path} has no snapshots: train it with --snapshots")
    if args.exhibit in ("curves", "fig1", "fig2", "fig3", "table1") and not args.prms:
        parser.error(f"{args.exhibit} needs --prms LABEL=FOLDER ... (recipes/tiny.sh trains them)")
    return parser, args


def main(argv=None):
    parser, args = parse(argv)
    make, title, *axes = EXHIBITS[args.exhibit]
    with parser:
        bench = Bench(parser, args, load_prm, search.solve)
        points = make(bench, args)
        if bench.rank > 0:
            return
        print(write_table(args.exhibit, points, args.out, *axes))
        if args.exhibit not in ("table1", "router"):
            drawn = [p for p in points if not p["series"].endswith(TABLE_ONLY)]
            draw(args.exhibit, drawn, args.out, title, *axes)
        if args.json:
            result = {"settings": {k: str(v) for k, v in vars(args).items()}, "points": points}
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nwritten: {args.out}/{args.exhibit}.*")


if __name__ == "__main__":
    main()
