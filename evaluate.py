"""Evaluation, §3.2: prm@N, maj@N, pass@N, and finding the first wrong step of a solution.

    python evaluate.py                                           # the tiny world
    python evaluate.py --samples samples.jsonl [--score --prm runs/prm]   # anybody's sample rows
    python evaluate.py --first-error processbench --threshold 0.5 --prm runs/prm  # its four splits
    torchrun --nproc_per_node=8 evaluate.py --policy Qwen/Qwen2.5-7B-Instruct --prm runs/prm \\
        --task gsm8k --strategies best_of_n majority beam --N 8 --out runs/eval
    python evaluate.py --exhibit fig4 --limit 500    # the same as python -m paper.figures fig4 ...

Models, problems and the settings of the searches are flags of search.py (python search.py --help).
Intervals are 95 % over problems; differences are paired over problems. Rows are made once: --out
is a folder of files named by what they hold (best_of_n-16-tiny-A-tiny-prm.jsonl), each with its
settings beside it (.flags). Rows of other settings are refused, of older code not: --overwrite.
--json: {"settings", "metrics": {domain: {name: {N: {"value", "low", "high"}}, "paired": [...]}},
"beam", "mcts": {domain: ...}, "cost": {strategy: ...}}, or {"settings", "first_error": {set: ...}}.
"""
import common.early  # noqa: F401  answers --help before what is slow to import
import json
import math
import random
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

import search
from common.first_errors import halves, score_first_errors, with_mean
from common.metrics import interval, paired, wrong_class
from common.policy import add_policy_flags
from common.results import bounds, print_figures
from common.run import TINY, add_run_flags, check_run_flags, command_line, share
from common.samples import Bench, measurable, read_samples
from prm_model import AGGREGATIONS, load_prm

# ------------------------------------------------ metrics at N, of one problem with M samples

def prm_at(row, n, how="prod"):
    """prm@N: is the sample of the highest reward R_i right (best-of-N, B.4.1)?

    The mean over all subsets of N of the M samples. Sort them by reward: the one of rank r (from 0)
    is the best of a subset if the N - 1 others come from the M - 1 - r that rank below it:

        prm@N = sum_r y_r C(M-1-r, N-1) / C(M, N),     y_r = 1 if the sample of rank r is right
    """
    reward, M = search.rewards(row["samples"], how), len(row["samples"])
    order = sorted(range(M), key=lambda i: -reward[i])  # stable: ties go to the first
    y = [row["samples"][i]["correct"] for i in order]
    # C(m, N-1) is 0 for m < N - 1: a sample that low is never the best of N
    return sum(y[r] * math.comb(M - 1 - r, n - 1) for r in range(M)) / math.comb(M, n)


def pass_at(row, n):
    """pass@N: is any sample right? An upper bound of prm@N.

    The mean over all subsets of N, where c of the M samples are right (arXiv 2107.03374):

        pass@N = 1 - C(M-c, N) / C(M, N)
    """
    y = [s["correct"] for s in row["samples"]]
    # the subsets without a right sample are drawn from the M - c wrong ones
    return 1 - math.comb(len(y) - sum(y), n) / math.comb(len(y), n)


def maj_at(row, n, how=None, rounds=64):
    """maj@N: is Mode({A_1, ..., A_N}), the most frequent answer, right (B.4.4)?

    how: wmaj@N, in which each vote weighs its sample's reward. The mean over `rounds` random
    subsets of N, the same ones in every run: a mode has no closed form.
    """
    M, y = len(row["samples"]), [s["correct"] for s in row["samples"]]
    answers = [s["answer"] for s in row["samples"]]
    weights = [max(0.0, r) for r in search.rewards(row["samples"], how)] if how else [1.0] * M

    def right(subset):  # in sampling order: ties go to the first
        chosen = search.mode([answers[i] for i in subset], [weights[i] for i in subset])
        return y[subset[chosen]]
    if n == M:
        return float(right(range(M)))
    if n == 1:  # a vote of one: a single sample
        return statistics.fmean(y)
    rng = random.Random(f"{row['id']} {n}")
    return statistics.fmean(right(sorted(rng.sample(range(M), n))) for _ in range(rounds))


def metric(name):
    """(function of (row, N), title) of "pass", "maj", "wmaj by prod", "prm by min", ..."""
    kind, by, how = name.partition(" by ")
    functions = {"pass": pass_at, "maj": maj_at, "wmaj": partial(maj_at, how=how),
                 "prm": partial(prm_at, how=how)}
    return functions[kind], f"{kind}@{{}}{by}{how}"


def powers(n):
    """1, 2, 4, ... n"""
    return sorted({min(n, 2 ** i) for i in range(n.bit_length() + 1)})


# ------------------------------------------------ erroneous step identification

def first_error_figures(solutions, threshold):
    """How well "the first step with p_t < threshold is the first wrong step" holds.

    solutions: [(p of each step, index of the first wrong step or -1)].
    erroneous  share of the erroneous solutions whose first wrong step is found
    correct    share of the correct solutions in which no step is called wrong
    F1         harmonic mean of the two (ProcessBench, arXiv 2412.06559); None if one kind is absent
    step ...   of the wrong class, the mean F1 of both, and AUC, over single steps
    solution   the same over solutions, by their lowest p_t (ReasonEval, arXiv 2404.05692)
    """
    hits, p, right = {True: [], False: []}, [], []  # hits of the erroneous, and of the correct
    for scores, y in solutions:
        called = next((t for t, x in enumerate(scores) if x < threshold), -1)
        hits[y >= 0].append(called == y)
        labelled = range(len(scores) if y < 0 else y + 1)  # later steps have no label
        p += [scores[t] for t in labelled]
        right += [t != y for t in labelled]
    erroneous, correct = (statistics.fmean(x) if x else 0.0 for x in hits.values())
    f1 = statistics.harmonic_mean([erroneous, correct]) if all(hits.values()) else None
    double = partial(torch.tensor, dtype=torch.float64)
    lowest = double([min(scores) for scores, _ in solutions])
    return {"threshold": threshold, "erroneous": erroneous, "correct": correct, "F1": f1,
            **wrong_class("step", double(p), torch.tensor(right), threshold),
            **wrong_class("solution", lowest, torch.tensor([y < 0 for _, y in solutions]),
                          threshold), "solutions": len(solutions), "steps": len(p)}


def first_error(bench, args):
    """{set: figures}: of all solutions at --threshold, as ProcessBench is published; without it on
    one half of them, at the threshold that is best on the other half."""
    figures = {}
    for name, items in score_first_errors(bench, args).items():
        if args.wrong_below is None:
            figures[name] = at_the_best_threshold(*halves(name, items))
        else:
            figures[name] = first_error_figures([item[1:] for item in items], args.wrong_below)
    return with_mean(figures)


def at_the_best_threshold(choose, problems):
    """choose [(p, y)], problems {question: [(p, y)]}: an interval draws problems, not solutions."""
    test = sum(problems.values(), [])
    # F1 needs erroneous and correct solutions
    key = "F1" if len({y >= 0 for _, y in choose + test}) == 2 else "step F1"

    def value(solutions, threshold):  # None, where a draw has solutions of one kind only, is 0
        return first_error_figures(solutions, threshold)[key] or 0.0
    best = max((t / 50 for t in range(1, 50)), key=partial(value, choose))
    _, low, high = interval([*problems.values()], lambda drawn: value(sum(drawn, []), best), 200)
    # the chance level: p uniform in (0, 1) on the same solutions
    rng = random.Random(0)
    guesses = [([rng.random() for _ in p], y) for p, y in test]
    return first_error_figures(test, best) | {
        f"{key} low": low, f"{key} high": high, f"{key} of chance": value(guesses, 0.5)}


# ------------------------------------------------ the report

def report(rows, names, ns=None):
    """Print the metrics of each domain; returns what --json writes of them."""
    ns, out = ns or powers(min(len(r["samples"]) for r in rows)), {}
    for domain, problems in search.by_domain(rows).items():
        print(f"\n{domain}: {len(problems)} problems, {len(problems[0]['samples'])} samples each, "
              f"mean over subsets of N\n{'N':<22}" + "".join(f"{n:>18}" for n in ns))
        values, out[domain] = {}, {"paired": []}
        for name in names:
            (function, title), out[domain][name] = metric(name), {}
            line = f"{title.format('N'):<22}"
            for n in ns:
                values[name, n] = [function(row, n) for row in problems]  # one a problem
                v, low, high = interval(values[name, n])
                line += f"{v:>6.3f} {bounds(low, high)}"
                out[domain][name][n] = {"value": v, "low": low, "high": high}
            print(line)
        best, most = names[0], ns[-1]
        # best-of-N against the vote and a single sample; without a PRM there is nothing to compare
        rivals = [("maj", most), ("pass", 1)] if best.startswith("prm") else []
        for other, n in [rival for rival in rivals if rival in values]:
            d, se, z = paired(values[best, most], values[other, n])
            rival = "single" if n == 1 else f"{other}@{n}"
            print(f"{metric(best)[1].format(most)} - {rival}: {difference(d, se, z)}")
            out[domain]["paired"] += [{"a": best, "b": other, "N": n, "difference": d, "se": se,
                                       "z": z}]
    return out


def difference(mean, se, z):
    return f"{mean:+.3f}" + (f" ± {1.96 * se:.3f}, {z:+.1f} standard errors" if se else "")


def right_within(tokens, rows, rule, how):
    """Is the solution right that a rule chooses within so many tokens? One a problem."""
    return [search.right(row, search.choose(row, rule, how, limit))
            for row, limit in zip(rows, tokens)]


def run_searches(bench, args, pool):
    """Beam, MCTS or yours beside best-of-N at the same tokens, and what each costs a problem."""
    out, searches, prm = {}, {"best_of_n": pool}, args.prm[0]
    for strategy in [x for x in args.strategies if x not in ("best_of_n", "majority")]:
        searches[strategy] = bench.run(strategy, args.policy, prm)
        # problem by problem: best-of-N gets as many samples as this search's tokens buy
        rivals = search.by_domain(bench.same_tokens(pool, args.policy, prm, searches[strategy]))
        out[strategy] = {}
        rule = args.choose or search.RULES[strategy]
        for domain, rows in search.by_domain(searches[strategy]).items() if bench.rank == 0 else ():
            tokens = [row["cost"]["policy_generated"] for row in rows]
            right = right_within(tokens, rows, rule, args.aggregate)
            plain = "argmax" if rule == "visited" else rule  # samples have no visits
            same = right_within(tokens, rivals[domain], plain, args.aggregate)
            (v, low, high), (d, se, z) = interval(right), paired(right, same)
            print(f"\n{domain}, {strategy} ({rule}): {v:.3f} [{low:.2f}, {high:.2f}]; above "
                  f"best-of-N ({plain}) at the same tokens: {difference(d, se, z)}")
            out[strategy][domain] = {"value": v, "low": low, "high": high, "above_best_of_n": d,
                                     "se": se, "z": z}
    for name, rows in searches.items() if bench.rank == 0 else ():
        cost = out.setdefault("cost", {})[name] = {}
        for key in rows[0]["cost"]:  # generated and prefilled tokens, tokens of the PRM, seconds
            cost[key] = statistics.fmean(r["cost"][key] for r in rows)
        print(f"{name}, a problem: " + ", ".join(f"{key} {x:.4g}" for key, x in cost.items()))
    return out


def parse(argv, doc=__doc__):
    parser = command_line(doc)
    a = parser.add_argument
    a("--samples", metavar="FILE", help="rows to evaluate instead of sampling; --task: their tests")
    a("--score", action="store_true", help="score --samples with --prm, whatever scores they have")
    a("--scores", choices=["probabilities", "logits"], default="probabilities",
      help="what those of --samples are; of logits p = 1 / (1 + exp(-x)) is taken")
    a("--first-error", metavar="SET", nargs="+", help="processbench, files or hub sets of labels")
    a("--threshold", type=share, dest="wrong_below",  # search.py has a threshold of its own
      help="of --first-error, for all solutions: 0.5 is the published one")
    a("--strategies", nargs="+", choices=search.STRATEGIES, default=["best_of_n", "majority"],
      help="best_of_n and majority come from the same samples; the others are run")
    add_run_flags(parser)
    args, rest = parser.parse_known_args(argv)
    others = command_line(doc)  # the rest says how to sample and to search, as for search.py
    search.add_search_flags(others, n="+")
    add_policy_flags(others, str(TINY / "A"))
    args, args.ns = others.parse_args(rest, args), None
    if args.limit is None and not args.first_error:
        args.limit = 100
    if isinstance(args.n, list):
        args.ns = sorted(args.n) if args.samples or len(args.n) > 1 else None
        args.n = min(args.n) if min(args.n) < 1 else max(args.n)  # check() names one below 1
    return check(parser, args)


def check(parser, args):
    """What evaluate.py and paper/figures.py check of their flags."""
    args.out = args.out or "runs/evaluate"
    args.resume = args.resume or not args.overwrite  # the folder grows
    check_run_flags(parser, args, "n", "k", "m", "simulations", "concurrent")
    args.tokens = getattr(args, "tokens", math.inf)  # else no budget but --n, --simulations ...
    args.seeds = getattr(args, "seeds", [0])
    if len(args.prm) > 1:
        parser.error("--prm takes one PRM: search.py combines, paper.figures compares several")
    return parser, args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--exhibit" in argv:  # a door to §4
        from paper import figures  # which imports this file
        at = argv.index("--exhibit")
        return figures.main([*argv[at + 1:at + 2], *argv[:at], *argv[at + 2:]])
    parser, args = parse(argv)
    how = dict.fromkeys([args.aggregate, *AGGREGATIONS])  # that of --aggregate first
    names = [*map("prm by {}".format, how), f"wmaj by {args.aggregate}", "maj", "pass"]
    result = {"settings": {k: str(v) for k, v in vars(args).items()}}
    with parser:
        bench = Bench(parser, args, load_prm, search.solve)
        if args.first_error:
            result["first_error"] = first_error(bench, args)
            print_figures(result["first_error"] if bench.rank == 0 else {})
        else:
            if args.samples:
                rows = read_samples(args)
                if args.score:
                    rows = bench.scored(rows, args.samples, args.prm[0])
                names = measurable(rows, names, args.ns)
            else:
                rows = bench.run("best_of_n", args.policy, args.prm[0])
            if bench.rank == 0:
                result["metrics"] = report(rows, names, args.ns)
            if not args.samples:
                result |= run_searches(bench, args, rows)
    if args.json and bench.rank == 0:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
