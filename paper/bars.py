"""Is the tiny world honest? Its policy, PRM and search strategies on held-out problems.

    python -m paper.bars                     # 500 problems a domain; some 40 minutes on one core
    python -m paper.bars --limit 50 --strategies beam mcts --out runs/bars
    python -m paper.bars --prm truth         # the world's own grading: what search alone loses

1. The policy: mean single sample, majority@16 and pass@16.
2. The PRM: AUC of p_t against the true label of each step of the policy's own solutions, over all
   steps and among steps at the same position (knowing that later steps are worse is worth nothing).
3. Strategies, paired problem by problem: best-of-16 against majority@16 (the same samples); beam
   and MCTS against best-of-N that gets, for each problem, as many tokens as the search took.

Flags are those of evaluate.py. ± is half a 95 % interval over problems, z is in standard errors.
"""
import itertools
import json
import statistics
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

import search
from common.metrics import auc_pairs, interval, paired
from common.samples import Bench
from evaluate import parse, pass_at, prm_at
from prm_model import AGGREGATIONS, load_prm
from tiny import world


class Truth:
    """Scores steps as the world grades them, 1 or 0: a PRM that is never wrong."""
    tokens = 0

    def __init__(self, raw):
        self.raw = {p["question"]: p for p in raw.values()}

    def score_nodes(self, leaves):
        scores = {}
        for leaf in leaves:
            right, last = iter(world.grade(self.raw[leaf.root().text], leaf.steps())), True
            for node in leaf.path():
                last = next(right) if node.text else last  # no text: only the end-of-text token
                if node.p is None:
                    scores[node] = float(last)
        return scores


def spread(values, statistic=statistics.fmean, rounds=1000):
    """The statistic of a list with one entry a problem, and half its 95 % interval."""
    value, low, high = interval(values, statistic, rounds)
    return value, (high - low) / 2


def auc(problems, same_position=False):
    """Probability that a right step scores above a wrong one, over all pairs of steps, or over the
    pairs at one position. problems: for each problem its steps as (position, p, right)."""
    places = defaultdict(lambda: ([], []))
    for t, p, right in itertools.chain(*problems):
        place = places[t if same_position else 0]
        place[0].append(p)
        place[1].append(right)
    counts = [auc_pairs(torch.tensor(p), torch.tensor(y)) for p, y in places.values()]
    return sum(u for u, _ in counts) / max(1, sum(pairs for _, pairs in counts))


def difference(name, a, b):
    mean, se, z = paired(a, b)
    print(f"   {name:<52}{mean:+.3f} ± {1.96 * se:.3f}   {z:+.1f} standard errors")
    return mean, se


def right(rows, rule=None):
    """Of each row: is the picked solution right, or the one that another rule chooses?"""
    return [search.right(row, search.choose(row, rule, "prod") if rule else row["picked"])
            for row in rows]


def spent(rows):
    return [row["cost"]["policy_generated"] for row in rows]


def graded_steps(pool, raw):
    """For each problem its steps as (position, p, right): of all samples, and of each sample only
    up to its first wrong step."""
    steps, first = [], []
    for row in pool:
        steps.append([])
        first.append([])
        for s in row["samples"]:
            grades = world.grade(raw[row["id"]], s["steps"])
            graded = list(zip(itertools.count(), s["scores"], grades))
            steps[-1] += graded
            first[-1] += graded[:grades.index(False) + 1] if False in grades else graded
    return steps, first


def policy_and_prm(pool, raw):
    """1 and 2: {name: (value, half an interval)}."""
    n, (steps, first) = len(pool[0]["samples"]), graded_steps(pool, raw)
    print(f"{len(pool)} problems, {sum(map(len, steps)):,} steps")
    at_place = partial(auc, same_position=True)
    out = {"single": spread([pass_at(row, 1) for row in pool]),
           f"majority@{n}": spread(right(pool, "vote")),
           f"pass@{n}": spread([pass_at(row, n) for row in pool]),
           "step AUC": spread(steps, auc, rounds=100),
           "step AUC at the same position": spread(steps, at_place, rounds=100),
           "the same, up to the first wrong step": spread(first, at_place, rounds=100)}
    for how in AGGREGATIONS:
        out[f"best-of-{n} by {how}"] = spread([prm_at(row, n, how) for row in pool])
    for name, (value, width) in out.items():
        print(f"   {name:<52}{value:.3f} ± {width:.3f}")
    difference(f"best-of-{n} - majority@{n}", right(pool), right(pool, "vote"))
    return out


def measure(searches, plain):
    """3: searches and plain samples of their tokens, {strategy: rows}, of one domain."""
    out = {}
    for strategy, rows in searches.items():
        tokens, out[strategy] = statistics.fmean(spent(rows)), spread(right(rows))
        title = f"{strategy}, {tokens:.0f} generated tokens a problem"
        print("   {:<52}{:.3f} ± {:.3f}".format(title, *out[strategy]))
        out[f"{strategy} - best-of-N"] = difference(
            f"{strategy} - best-of-N at these tokens", right(rows), right(plain[strategy]))
        difference(f"{strategy} - majority at these tokens", right(rows),
                   right(plain[strategy], "vote"))
    if {"beam", "mcts"} <= searches.keys():
        beam, mcts = searches["beam"], searches["mcts"]
        costs = [f"{statistics.fmean(spent(rows)):.0f}" for rows in (mcts, beam)]
        title = f"mcts - beam ({costs[0]} tokens against {costs[1]})"
        out["mcts - beam"] = difference(title, right(mcts), right(beam))
    return out


def main(argv=None):
    defaults = ["--limit", "500", "--strategies", "beam", "mcts", "--out", "runs/bars"]
    parser, args = parse([*defaults, *(sys.argv[1:] if argv is None else argv)], __doc__)
    args.seeds, raw = [args.seed], {}
    for domain in ("math", "code"):
        raw |= {p["id"]: p for p in world.problems(domain, "test", args.limit, seed=args.seed)}

    def load(path, *rest):
        return Truth(raw) if path == "truth" else load_prm(path, *rest)
    with parser:
        bench, models = Bench(parser, args, load, search.solve), (args.policy, args.prm[0])
        pool, searches, plain = bench.run("best_of_n", *models), {}, {}
        for strategy in [x for x in args.strategies if x not in ("best_of_n", "majority")]:
            searches[strategy] = bench.run(strategy, *models)
            budgets = {row["id"]: max(1, row["cost"]["policy_generated"])
                       for row in searches[strategy]}
            plain[strategy] = bench.run("best_of_n", *models, budgets=budgets)

    def of(runs, domain):
        return {name: search.by_domain(rows)[domain] for name, rows in runs.items()}
    figures = {}
    for domain, rows in search.by_domain(pool).items() if bench.rank == 0 else ():
        print(f"\n{domain}: ", end="")
        figures[domain] = policy_and_prm(rows, raw) | measure(of(searches, domain),
                                                              of(plain, domain))
    if args.json and bench.rank == 0:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
