"""Test-time scaling at equal budgets: Figures 4 and 5 (§4.2), by difficulty, and the router.

    python -m paper.figures fig4 --limit 200 --seeds 0 1 2 --tokens 8192
    python -m paper.figures router --limit 100 --seeds 100 --tokens 8192    # writes OUT/router.json

Best-of-N and MCTS are run once with the largest budget, --tokens a problem: of a smaller budget B
they have the solutions that were finished within B. Beam search plans its whole width from its
first step on, so there is a run for each of --widths. Dropped steps count, too.
"""
import math
import statistics

from common.metrics import interval, over_runs
from search import by_domain, choose, right

BINS = 5      # of difficulty, as in Snell et al. 2024 (arXiv 2408.03314), section 5
SMALLEST = 64  # tokens


def budgets(tokens):
    """64, 128, ... up to a budget."""
    return [SMALLEST << i for i in range(int(tokens / SMALLEST).bit_length())]


def run_plans(bench, args):
    """{name: rows} of best-of-N and MCTS with --tokens, and of a beam for each width."""
    policy, prm = args.policy, args.prm[0]
    many = {"n": 10 ** 6, "simulations": 1000}  # the tokens end both before
    plans = {name: bench.run(strategy, policy, prm, tokens=args.tokens, **many)
             for name, strategy in (("best-of-N", "best_of_n"), ("MCTS", "mcts"))}
    for k, m in args.widths:
        plans[f"beam {k}x{m}"] = bench.run("beam", policy, prm, k=k, m=m)
    return plans


def contestants(plans):
    """(name, rule, width or None, rows): every plan under every rule that it has."""
    for name, rows in plans.items():
        strategy, _, width = name.partition(" ")
        yield strategy, "argmax", width, rows
        yield f"{strategy}, weighted", "weighted", width, rows
        if strategy == "best-of-N":
            yield "majority", "vote", width, rows
        else:
            yield f"{strategy}, vote", "vote", width, rows
    yield "MCTS, visited", "visited", "", plans["MCTS"]


def rights(rows, rule, how, tokens):
    """One 0.0 or 1.0 a problem: is the solution right that a rule chooses within its tokens?"""
    return [float(right(row, choose(row, rule, how, limit))) for row, limit in zip(rows, tokens)]


def spent(rows, budget=math.inf):
    """Tokens that a budget of them buys, one number a problem."""
    return [min(budget, row["cost"]["policy_generated"]) for row in rows]


def fig4(bench, args, axis="tokens"):
    """Accuracy at budgets from 64 tokens to --tokens (Figure 4), or at the seconds that these take
    (Figure 5), and how far it is above the weighted vote of plain samples of the same tokens."""
    plans, points = run_plans(bench, args), []
    pools = by_domain(plans["best-of-N"])
    for line, rule, width, all_rows in contestants(plans):
        for domain, rows in by_domain(all_rows).items():
            # visits are counted at the end only
            whole = width or rule == "visited"
            for budget in [math.inf] if whole else budgets(args.tokens):
                tokens = spent(rows, budget)
                values = rights(rows, rule, args.aggregate, tokens)
                value, low, high = interval(values)
                plain = rights(pools[domain], "weighted", args.aggregate, tokens)
                point = {"series": f"{domain}, {line}", "x": statistics.fmean(tokens),
                         "value": value, "low": low, "high": high, "problems": len(rows),
                         "above the weighted vote": over_runs([values], [plain])}
                if width:
                    point["width"] = width
                if axis == "seconds":
                    point["x"] *= seconds_a_token(rows, voting=rule == "vote")
                points.append(point)
    return points


def seconds_a_token(rows, voting=False):
    """A token takes a strategy the same time early and late; a vote of samples needs no PRM."""
    seconds = sum(row["cost"]["seconds"] for row in rows)
    if voting and rows[0]["strategy"] == "best_of_n":
        seconds -= sum(row["cost"]["prm_seconds"] for row in rows)
    return seconds / max(1, sum(spent(rows)))


# ---------------------------------------------------------------- difficulty

def by_difficulty(pool, tokens):
    """Rows of plain samples -> {id: (bin, pass rate)}, 0 the hardest of BINS bins of equal size.

    The pass rate is that of the samples which a budget of `tokens` has not bought: others than
    those which are judged.
    """
    rate = {}
    for row in pool:
        late = [s["correct"] for s in row["samples"] if s["spent"] > tokens]
        rate[row["id"]] = statistics.fmean(late) if late else 0.0
    order = sorted(rate, key=rate.get)
    return {name: (i * BINS // len(order), rate[name]) for i, name in enumerate(order)}


def difficulty(bench, args):
    """Accuracy by the problem's difficulty (1 is the hardest bin), at an eighth and at half of
    --tokens. The other half of the pool says how difficult a problem is."""
    plans, points = run_plans(bench, args), []
    known = {}
    for pool in by_domain(plans["best-of-N"]).values():
        known |= by_difficulty(pool, args.tokens / 2)
    for budget in (args.tokens / 8, args.tokens / 2):
        for line, rule, _, all_rows in affordable(plans, budget):
            for domain, rows in by_domain(all_rows).items():
                for place in range(BINS):
                    part = [row for row in rows if known[row["id"]][0] == place]
                    if not part:
                        continue  # fewer problems than bins
                    values = rights(part, rule, args.aggregate, spent(part, budget))
                    value, low, high = interval(values)
                    rate = statistics.fmean(known[row["id"]][1] for row in part)
                    points.append({
                        "series": f"{domain}, {line} at {budget:.0f}", "x": place + 1,
                        "value": value, "low": low, "high": high, "problems": len(part),
                        "pass rate": rate, "tokens": statistics.fmean(spent(part, budget))})
    return points


def affordable(plans, budget):
    """The contestants of a budget: of the beams only the widest one that it pays for on average."""
    def mean(name):
        return statistics.fmean(spent(plans[name]))
    beams = [name for name in plans if name.startswith("beam")]
    paid = [name for name in beams if mean(name) <= budget] or [min(beams, key=mean)]
    widest = max(paid, key=mean)
    chosen = {name: rows for name, rows in plans.items() if name not in beams or name == widest}
    return [x for x in contestants(chosen) if x[1] in ("argmax", "weighted")]
