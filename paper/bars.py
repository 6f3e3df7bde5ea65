"""Is the tiny world honest? Its policy, PRM and search strategies on held-out problems.

    python -m paper.bars                     # 500 problems a domain; some 40 minutes on one core
    python -m paper.bars --limit 50 --strategies beam mcts
    python -m paper.bars --prm truth         # the world's own grading: what search alone loses

1. The policy: mean single sample, majority@16 and pass@16.
2. The PRM: AUC of p_t against the true label of each step of the policy's own solutions, over all
   steps and among steps at the same position (knowing that later steps are worse is worth nothing).
3. Strategies, paired problem by problem: best-of-16 against majority@16 (the same samples); beam
   and MCTS against best-of-N that gets, for each problem, as many tokens as the search took.

± is half a 95 % interval over problems; z is paired over problems, in standard errors.
"""
import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch

import search
from common import tasks
from common.metrics import auc_pairs, interval, paired
from common.policy import load_policy_flags
from common.run import command_line, need_folder
from evaluate import pass_at
from prm_model import AGGREGATIONS, aggregate, load_prm
from tiny import world


class Truth:
    """Scores steps as the world grades them, 1 or 0: a PRM that is never wrong."""
    tokens = 0

    def __init__(self):
        self.raw = {}  # question: problem of the world

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


def right(rows, key="picked"):
    return [search.right(r, r[key]) for r in rows]


def spent(rows):
    return [r["cost"]["policy_generated"] for r in rows]


def graded_steps(pool, raw):
    """For each problem its steps as (position, p, right): of all samples, and of each sample only
    up to its first wrong step."""
    steps, first = [], []
    for row in pool:
        steps.append([])
        first.append([])
        for s in row["samples"]:
            grades = world.grade(raw[row["id"]], s["steps"])
            own = list(zip(itertools.count(), s["scores"], grades))
            steps[-1] += own
            first[-1] += own[:grades.index(False) + 1] if False in grades else own
    return steps, first


def policy_and_prm(pool, raw):
    """1 and 2: {name: (value, half an interval)}."""
    single = [pass_at(r, 1) for r in pool]
    out = {"single": spread(single), "majority@16": spread(right(pool, "vote")),
           "pass@16": spread([pass_at(r, 16) for r in pool])}
    steps, first = graded_steps(pool, raw)

    def at_place(x):
        return auc(x, same_position=True)
    out["step AUC"] = spread(steps, auc, rounds=100)
    out["step AUC at the same position"] = spread(steps, at_place, rounds=100)
    out["the same, up to the first wrong step"] = spread(first, at_place, rounds=100)
    print(f", {sum(map(len, steps)):,} steps")
    for how in AGGREGATIONS:
        picked = []
        for row in pool:
            rewards = [aggregate(s["scores"], how) for s in row["samples"]]
            picked.append(row["samples"][rewards.index(max(rewards))]["correct"])
        out[f"best-of-16 by {how}"] = spread(picked)
    for name, (value, width) in out.items():
        print(f"   {name:<52}{value:.3f} ± {width:.3f}")
    return out


def measure(domain, args, flags, policy, prms):
    problems = tasks.load(f"tiny-{domain}", limit=args.limit, seed=args.seed)
    raw = {p["id"]: p for p in world.problems(domain, "test", args.limit, seed=args.seed)}
    for prm in prms:
        if isinstance(prm, Truth):
            prm.raw = {p["question"]: p for p in raw.values()}
    started = time.time()

    def solve(strategy, budgets=None, **options):
        rows, options = [], argparse.Namespace(**{**vars(flags), **options})
        for i in range(0, len(problems), 100):  # the trees of 100 problems in memory
            limits = budgets[i:i + 100] if budgets else None
            rows += search.solve(problems[i:i + 100], strategy, policy, prms, options, limits)[1]
        return rows
    pool = solve("best_of_n", n=16)
    print(f"\n{domain}: {len(problems)} problems", end="")
    out, searches = policy_and_prm(pool, raw), {}
    difference("best-of-16 - majority@16", right(pool), right(pool, "vote"))
    for strategy in args.strategies:
        rows = searches[strategy] = solve(strategy)
        plain = solve("best_of_n", budgets=[max(1, tokens) for tokens in spent(rows)])
        tokens, out[strategy] = statistics.fmean(spent(rows)), spread(right(rows))
        title = f"{strategy}, {tokens:.0f} generated tokens a problem"
        print("   {:<52}{:.3f} ± {:.3f}".format(title, *out[strategy]))
        out[f"{strategy} - best-of-N"] = difference(
            f"{strategy} - best-of-N at these tokens", right(rows), right(plain))
        difference(f"{strategy} - majority at these tokens", right(rows), right(plain, "vote"))
    if {"beam", "mcts"} <= searches.keys():
        beam, mcts = searches["beam"], searches["mcts"]
        costs = [f"{statistics.fmean(spent(rows)):.0f}" for rows in (mcts, beam)]
        title = f"mcts - beam ({costs[0]} tokens against {costs[1]})"
        out["mcts - beam"] = difference(title, right(mcts), right(beam))
    print(f"   {(time.time() - started) / 60:.1f} minutes")
    return out


def main(argv=None):
    parser = command_line(__doc__)
    a = parser.add_argument
    a("--limit", type=int, default=500, help="problems of each domain (500)")
    a("--seed", type=int, default=0)
    a("--strategies", nargs="*", default=["beam", "mcts"], choices=["beam", "mcts"])
    a("--domains", nargs="+", default=["math", "code"])
    a("--json", help="write the figures here")
    args, rest = parser.parse_known_args(argv)  # what is left are flags of search.py
    _, flags = search.parse(["--strategy", "beam", "--seed", str(args.seed), *rest])
    need_folder(parser, args, "json")
    with parser:
        policy = load_policy_flags(flags, "cpu")
        prms = [Truth() if p == "truth" else load_prm(p) for p in flags.prm]
    print(f"{torch.get_num_threads()} threads; policy {flags.policy}, PRM {' '.join(flags.prm)}")
    figures = {domain: measure(domain, args, flags, policy, prms) for domain in args.domains}
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
