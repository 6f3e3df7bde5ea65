"""Test-time scaling at equal budgets: Figures 4 and 5 (§4.2), by difficulty, and the router.

    python -m paper.figures fig4 --limit 200 --seeds 0 1 2 --tokens 8192
    python -m paper.figures router --limit 200 --seeds 0 1 2 --tokens 8192    # OUT/router.json

Best-of-N and MCTS are run once with the largest budget, --tokens a problem: of a smaller budget B
they have the solutions that were finished within B, and with --until those before the search would
have ended. A beam plans its whole width from its first step on, so there is a run for each of
--widths. Dropped steps count, too.
"""
import json
import math
import statistics
from collections import namedtuple
from pathlib import Path

from common.metrics import over_runs
from common.router import frontier, read_routes
from common.samples import name_of
from evaluate import right_within
from paper.drawing import exact, point
from search import ROUND, by_domain, rewards

BINS = 5       # of difficulty, as in Snell et al. 2024 (arXiv 2408.03314), section 5
SMALLEST = 64  # tokens
UNTIL = 0.5    # R_i at which the adaptive lines end a problem's search: the PRM thinks it is right

TABLE_ONLY = (", vote", ", visited", "beam, weighted", ", router")  # lines that are not drawn
FLAGS = ("strategy", "k", "m", "choose", "until")  # what tells one line from another

# A line of Figure 4: rows of one strategy, and the flags of search.py that choose from them
Line = namedtuple("Line", "name rows flags")


def budgets(tokens):
    """64, 128, ... up to a budget."""
    return [SMALLEST << i for i in range(int(tokens / SMALLEST).bit_length())]


def run_plans(bench, args):
    """Lines of Figure 4: every strategy under every rule that it has."""
    policy, prm = args.policy, args.prm[0]
    many = {"n": 10 ** 6, "simulations": 1000}  # the tokens end both before
    pool = bench.run("best_of_n", policy, prm, tokens=args.tokens, **many)
    trees = bench.run("mcts", policy, prm, tokens=args.tokens, **many)
    lines = []
    for name, strategy, rows in (("best-of-N", "best_of_n", pool), ("MCTS", "mcts", trees)):
        flags = {"strategy": strategy, **many}
        lines += [Line(name, rows, flags | {"choose": "argmax"}),
                  Line(f"{name}, weighted", rows, flags | {"choose": "weighted"}),
                  Line(f"{name}, until", rows, flags | {"choose": "weighted", "until": UNTIL})]
    lines += [Line("majority", pool, {"strategy": "majority", **many, "choose": "vote"}),
              Line("MCTS, vote", trees, {"strategy": "mcts", **many, "choose": "vote"}),
              Line("MCTS, visited", trees, {"strategy": "mcts", **many, "choose": "visited"})]
    for k, m in args.widths:
        rows = bench.run("beam", policy, prm, k=k, m=m, tokens=math.inf)
        for rule in ("argmax", "weighted", "vote"):
            name = "beam" if rule == "argmax" else f"beam, {rule}"
            flags = {"strategy": "beam", "k": k, "m": m, "choose": rule}
            lines.append(Line(name, rows, flags))
    return lines


def routed(lines, prm):
    """The routes of the router.json beside a PRM, as lines of one point each; no file, no lines.
    Held out only if they were measured on other problems."""
    for route in read_routes(prm):
        for line in lines:
            if all(line.flags.get(name) == route.get(name) for name in FLAGS):
                yield Line("router", line.rows, line.flags | {"tokens": route.get("tokens")})


def spent(line, row, budget, how):
    """Tokens that a search with these flags takes of a budget."""
    tokens = min(budget, row["cost"]["policy_generated"])
    if until := line.flags.get("until"):
        # best-of-N looks after its first sample, then after each round; MCTS after each request, of
        # M steps at most: here it stops within one, up to M - 1 steps early
        step = ROUND if line.flags["strategy"] == "best_of_n" else 1
        R = rewards(row["samples"], how)
        for i in [0, *range(step, len(R), step)]:
            if max(R[:i + 1]) >= until:
                return min(tokens, row["samples"][i]["spent"])
    return tokens


def measured(line, args):
    """Yield (budget, [tokens spent], [right or not]) of each budget: lists, one entry a problem."""
    limits = budgets(args.tokens)
    if line.flags["strategy"] == "beam":  # planned for its width
        limits = [math.inf]
    if line.flags["choose"] == "visited":  # visits are counted at the end only
        limits = [args.tokens]
    if "tokens" in line.flags:  # of a route; None: without a budget
        limits = [line.flags["tokens"] or math.inf]
    for budget in limits:
        tokens = [spent(line, row, budget, args.aggregate) for row in line.rows]
        yield budget, tokens, right_within(tokens, line.rows, line.flags["choose"], args.aggregate)


def fig4(bench, args, axis="tokens"):
    """Accuracy at budgets from 64 tokens to --tokens (Figure 4), or at the seconds that these take
    (Figure 5), and how far it is above the weighted vote of plain samples of the same tokens."""
    lines, points = run_plans(bench, args), []
    pool = {row["id"]: row for row in lines[0].rows}
    for line in [*lines, *routed(lines, args.prm[0])]:
        for _, tokens, values in measured(line, args):
            for domain in by_domain(line.rows):
                part = [i for i, row in enumerate(line.rows) if row["domain"] == domain]
                rows, correct = [line.rows[i] for i in part], [values[i] for i in part]
                x = statistics.fmean(tokens[i] for i in part)
                # the rival spends as much on each problem as this line on average
                plain = right_within([x] * len(rows), [pool[row["id"]] for row in rows],
                                     "weighted", args.aggregate)
                if axis == "seconds":
                    x *= seconds_a_token(rows, line.flags["choose"])
                more = {"above the weighted vote": over_runs([correct], [plain])}
                if line.flags["strategy"] == "beam":
                    more["width"] = "{k}x{m}".format(**line.flags)
                points.append(point(f"{domain}, {line.name}", x, correct, **more))
    return sorted(points, key=lambda p: (p["series"], p["x"]))


def seconds_a_token(rows, rule):
    """A token takes a strategy the same time early and late; a vote of samples needs no PRM."""
    seconds = sum(row["cost"]["seconds"] for row in rows)
    if rule == "vote" and rows[0]["strategy"] == "best_of_n":
        seconds -= sum(row["cost"]["prm_seconds"] for row in rows)
    return seconds / max(1, sum(row["cost"]["policy_generated"] for row in rows))


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
    lines, points = run_plans(bench, args), []
    known = {}
    for pool in by_domain(lines[0].rows).values():
        known |= by_difficulty(pool, args.tokens / 2)
    for budget in (args.tokens / 8, args.tokens / 2):
        for line in affordable(lines, budget):
            for place in range(BINS):
                for domain in by_domain(line.rows):
                    part = [row for row in line.rows
                            if row["domain"] == domain and known[row["id"]][0] == place]
                    if part:  # none: there are fewer problems than bins
                        tokens = [spent(line, row, budget, args.aggregate) for row in part]
                        values = right_within(tokens, part, line.flags["choose"],
                                              args.aggregate)
                        rate = statistics.fmean(known[row["id"]][1] for row in part)
                        more = {"pass rate": rate, "tokens": statistics.fmean(tokens)}
                        series = f"{domain}, {line.name} at {budget:.0f}"
                        points.append(point(series, place + 1, values, **more))
    return points


def affordable(lines, budget):
    """The best rule of each strategy; of the beams the widest that a budget pays for on average."""
    beams = [line for line in lines if line.name == "beam"]

    def cost(line):
        return statistics.fmean(row["cost"]["policy_generated"] for row in line.rows)
    paid = [line for line in beams if cost(line) <= budget] or [min(beams, key=cost)]
    plain = [line for line in lines if line.name in ("best-of-N, weighted", "MCTS, weighted")]
    return [*plain, max(paid, key=cost)]


# ---------------------------------------------------------------- the router

def router(bench, args):
    """The frontier of accuracy against mean tokens, over all problems, as OUT/router.json."""
    routes = []
    for line in run_plans(bench, args):
        for budget, tokens, values in measured(line, args):
            flags = line.flags | ({"tokens": budget} if budget < math.inf else {})
            routes.append(flags | {"generated": round(statistics.fmean(tokens)),
                                   "accuracy": round(statistics.fmean(values), 3)})
    n = len(bench.problems)
    best = frontier(routes, n)
    if bench.rank == 0:
        file = Path(args.out) / "router.json"
        result = {"policy": name_of(args.policy), "prm": name_of(args.prm[0]), "problems": n,
                  "seeds": args.seeds, "routes": best}
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{file}: copy it beside the PRM for search.py --strategy auto --tokens B")
    points, names = [], (*FLAGS, "tokens")
    for r in best:
        more = {name: r.get(name) for name in names}
        points.append(exact("all, router", r["generated"], r["accuracy"], problems=n, **more))
    return points
