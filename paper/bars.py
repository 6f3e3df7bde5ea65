"""Is the tiny world honest? Measure its policy, its PRM and the search strategies on held-out problems.

    python -m paper.bars                            # 500 problems of each domain; some 40 minutes on one core
    python -m paper.bars --limit 50 --strategies beam mcts
    python -m paper.bars --prm truth                # the world's own grading in place of a PRM: what search alone loses

1. The policy: mean single sample, majority@16 and pass@16.
2. The PRM: AUC of p_t against the true label of each step, over all steps and among steps at the same position (so
   that knowing that later steps are worse is worth nothing), on the policy's own solutions.
3. Strategies, each pair compared problem by problem: best-of-16 against majority@16 (the same samples), and beam and
   MCTS against best-of-N at the same number of generated tokens. A budget is a mean over problems: each problem's
   best-of-N gets as many tokens as the strategy took for it.

± is half a 95 % bootstrap interval over problems; a difference of z standard errors is paired over problems.
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
from common.metrics import (
    auc_pairs,
    interval,
    paired,
)
from common.policy import load_policy_flags
from common.run import command_line, need_folder
from prm_model import load_prm
from tiny import world


class Truth:
    """Scores steps as the world grades them, 1 or 0: a PRM that is never wrong."""
    tokens = 0

    def __init__(self):
        self.raw = {}  # question: problem of the world

    def score_nodes(self, leaves):
        found = {}
        for leaf in leaves:
            right, last = iter(world.grade(self.raw[leaf.root().text], leaf.steps())), True
            for node in leaf.path():
                last = next(right) if node.text else last  # no text: only the end-of-text token
                if node.p is None:
                    found[node] = float(last)
        return found


def spread(values, statistic=statistics.fmean, rounds=1000):
    """The statistic of a list with one entry a problem, and half its 95 % bootstrap interval."""
    value, low, high = interval(values, statistic, rounds)
    return value, (high - low) / 2


def auc(problems, same_position=False):
    """Probability that a right step scores above a wrong one, over all pairs, or all pairs of steps at one position.
    problems: for each problem its steps as (position, p, right)."""
    places = defaultdict(list)
    for t, p, right in itertools.chain(*problems):
        places[t if same_position else 0].append((p, right))
    found = [auc_pairs(torch.tensor([p for p, _ in x]), torch.tensor([y for _, y in x])) for x in places.values()]
    return sum(u for u, _ in found) / max(1, sum(pairs for _, pairs in found))


def difference(name, a, b):
    mean, se, z = paired(a, b)
    print(f"   {name:<52}{mean:+.3f} ± {1.96 * se:.3f}   {z:+.1f} standard errors")
    return mean, se


def measure(domain, args, flags, policy, prms):
    problems = tasks.load(f"tiny-{domain}", limit=args.limit, seed=args.seed)
    raw = {p["id"]: p for p in world.problems(domain, "test", args.limit, seed=args.seed)}
    for prm in prms:
        if isinstance(prm, Truth):
            prm.raw = {p["question"]: p for p in raw.values()}
    started = time.time()

    def solve(strategy, budgets=None, **options):
        rows = []
        for i in range(0, len(problems), 100):
            _, new = search.solve(problems[i:i + 100], strategy, policy, prms,
                                  argparse.Namespace(**{**vars(flags), **options}),
                                  budgets=budgets[i:i + 100] if budgets else None)
            rows += new
        return rows

    def right(rows, key="picked"):
        return [search.right(r, r[key]) for r in rows]
    pool = solve("best_of_n", n=16)
    correct = [[s["correct"] for s in r["samples"]] for r in pool]
    out = {"single": spread([statistics.fmean(c) for c in correct]), "majority@16": spread(right(pool, "vote")),
           "pass@16": spread([any(c) for c in correct])}
    graded = [[list(zip(itertools.count(), s["scores"], world.grade(raw[r["id"]], s["steps"]))) for s in r["samples"]]
              for r in pool]
    steps = [list(itertools.chain(*own)) for own in graded]
    first = [[x for s in own for x in s[:next((t + 1 for t, _, y in s if not y), None)]] for own in graded]
    out["step AUC"] = spread(steps, auc, rounds=100)
    out["step AUC at the same position"] = spread(steps, lambda x: auc(x, same_position=True), rounds=100)
    out["the same, up to the first wrong step"] = spread(first, lambda x: auc(x, same_position=True), rounds=100)
    print(f"\n{domain}: {len(problems)} problems, {sum(map(len, steps)):,} steps")
    for how in search.AGGREGATIONS:
        best = [max(r["samples"], key=lambda s: search.aggregate(s["scores"], how))["correct"] for r in pool]  # noqa: B023
        out[f"best-of-16 by {how}"] = spread(best)
    for name, (value, width) in out.items():
        print(f"   {name:<52}{value:.3f} ± {width:.3f}")
    difference("best-of-16 - majority@16", right(pool), right(pool, "vote"))
    beams = None
    for strategy in args.strategies:
        rows = solve(strategy)
        plain = solve("best_of_n", budgets=[max(1, r["cost"]["policy_generated"]) for r in rows])
        tokens = statistics.fmean(r["cost"]["policy_generated"] for r in rows)
        out[strategy] = spread(right(rows))
        value, width = out[strategy]
        print(f"   {strategy + f', {tokens:.0f} generated tokens a problem':<52}{value:.3f} ± {width:.3f}")
        out[f"{strategy} - best-of-N"] = difference(f"{strategy} - best-of-N at these tokens", right(rows),
                                                    right(plain))
        difference(f"{strategy} - majority at these tokens", right(rows), right(plain, "vote"))
        if strategy == "beam":
            beams = rows
        elif strategy == "mcts" and beams:
            out["mcts - beam"] = difference(f"mcts - beam ({tokens:.0f} tokens against "
                                            f"{statistics.fmean(r['cost']['policy_generated'] for r in beams):.0f})",
                                            right(rows), right(beams))
    print(f"   {(time.time() - started) / 60:.1f} minutes")
    return out


def main(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("--limit", type=int, default=500, help="problems of each domain (500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", nargs="*", default=["beam", "mcts"], choices=["beam", "mcts"])
    parser.add_argument("--domains", nargs="+", default=["math", "code"])
    parser.add_argument("--json", help="write the figures here")
    args, rest = parser.parse_known_args(argv)  # what is left are flags of search.py
    _, flags = search.parse(["--strategy", "beam", "--seed", str(args.seed), *rest])
    need_folder(parser, args, "json")
    with parser:
        policy = load_policy_flags(flags, "cpu")
        prms = [Truth() if p == "truth" else load_prm(p) for p in flags.prm]
    print(f"{torch.get_num_threads()} threads; policy {flags.policy}, PRM {' '.join(flags.prm)}")
    found = {domain: measure(domain, args, flags, policy, prms) for domain in args.domains}
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
