"""The four search strategies of §4.2 and B.4: best-of-N, beam search, MCTS, majority voting.

    python search.py --strategy beam                 # the tiny world, shipped with this repository
    python search.py --strategy mcts --textbook      # as Appendix B.4 has it, without our additions
    python search.py --strategy mcts --until 0.5 --tokens 2000   # a budget; ends once R_i >= 0.5
    python search.py --strategy beam --question "Ann has 7 shells. In January she finds 5. In \\
February she doubles them. In March she loses 9. In April she finds 6. In May she buys 8. How \\
many now?"
    python search.py --strategy best_of_n --task math500 --policy Qwen/Qwen2.5-7B-Instruct \\
        --prm Qwen/Qwen2.5-Math-PRM-7B
    torchrun --nproc_per_node=8 search.py --strategy beam --task gsm8k --limit 1319 --policy ...

A strategy is a generator for one problem; common/driver.py batches many. It yields a Request,
"sample n next steps below these nodes" (or whole solutions), and is sent the new nodes; each brings
node.p = p_t, the PRM's probability that its step is correct, and node.end: None if it goes on,
"length" if it is cut off, else "eos" or "answer". Its arguments are the flags by name (n for the
paper's N, k, m, c ...), reward(node) = R_i, path_score(node) = sum of p_t, N = visits and left() =
unspent tokens. It only samples: choose() picks from *all* nodes that have ended, rollouts, too.

A node of the tree is one step, and stands for the action that leads to it: a state s is the path
from the root to a node, an action a is a child, so N[child] is N(s, a) and Q[child] is Q(s, a).
"""
import common.early  # noqa: F401  answers --help before what is slow to import
import math
from collections import Counter, defaultdict
from functools import partial
from itertools import chain

from common import router, run, tasks
from common.driver import Request, Search, run_together
from common.page import Page, search_tree
from common.policy import add_policy_flags, load_policy_flags
from common.results import by_domain, compare, report, right, sample_rows, show  # noqa: F401
from prm_model import AGGREGATIONS, aggregate, load_prm

# ------------------------------------------------------------ the textbook: Appendix B.4


def arg_max(rewards):  # README, step 6
    """B.4.1: index of the best solution, arg max_i R_i. The first of equals wins."""
    return max(range(len(rewards)), key=rewards.__getitem__)  # max() keeps the first


def mode(answers, weights=None):  # README, step 6
    """B.4.4: index of the first solution with the most frequent answer, Mode({A_1, ..., A_N}).

    weights: the R_i make it the PRM-weighted vote, arg max over answers of their solutions' sum
    of R_i (Snell et al. 2024, arXiv 2408.03314), and of that answer's solutions the best one wins.
    None, no answer, is no vote.
    """
    votes = Counter()
    for i, answer in enumerate(answers):
        if answer is not None:
            # a solution that was cut off has the reward -1: it may not take weight from others
            votes[answer] += max(0.0, weights[i]) if weights else 1.0
    if not votes:
        return 0
    winner = max(votes, key=votes.get)
    # programs that agree on the example inputs still differ elsewhere: not just any of them
    equals = [i for i, answer in enumerate(answers) if answer == winner]
    return max(equals, key=weights.__getitem__) if weights else equals[0]


def best_of_n(root, n, **_):
    """B.4.1: N whole solutions, of which arg_max() takes the one with the highest reward."""
    yield Request([root], n, whole=True)


majority_vote = best_of_n  # B.4.4: the same N solutions, of which mode() takes the common answer


def beam(root, k, m, path_score, **_):  # README, step 6
    """B.4.2: expand each of K paths by M steps, keep the K best, until all of them are finished.

        Top Paths = Select Top K from { sum_{t=1..T} R(x_t) },   R(x_t) = p_t

    k = 1 is the step-by-step decoding of Appendix C. path_score(node) is the sum above: it ranks
    paths on the way. Of those that ended choose() takes the best R_i.
    """
    paths = [root]
    while live := [node for node in paths if node.end is None]:
        groups = yield Request(live, m)  # expansion: M next steps below each, scored
        finished = [node for node in paths if node.end]  # they stay, and compete with longer ones
        candidates = finished + list(chain.from_iterable(groups))
        paths = sorted(candidates, key=path_score, reverse=True)[:k]  # stable: first of equals


def uct_select(s, children, N, Q, c):  # README, step 6
    """The child to follow:  UCT(s, a) = Q(s, a) + c * sqrt(ln N(s) / N(s, a))   (B.4.3)

    Q(s, a)  mean value backed up through child a, in [0, 1]; c is in the same units
    N(s, a)  times a was followed;  N(s)  visits of s
    An unvisited child wins outright; of equals the first: a seed always grows the same tree.
    """
    def uct(a):
        return Q[a] + c * math.sqrt(math.log(N[s]) / N[a]) if N[a] else math.inf
    return max(children, key=uct)


def mcts(root, m, simulations, c, reward, N, **_):  # README, step 6
    """B.4.3: Monte Carlo tree search. N: an empty Counter of visits, which the driver keeps."""
    Q = defaultdict(float)
    children = {}
    for _ in range(simulations):
        path = [root]
        while path[-1] in children:                         # 1. selection, by UCT
            path.append(uct_select(path[-1], children[path[-1]], N, Q, c))
        if path[-1].end is None:                            # 2. expansion: M next steps
            [children[path[-1]]] = yield Request([path[-1]], m)
            path.append(children[path[-1]][0])  # none has been visited: take the first
        yield from simulate_and_back_up(path, N, Q, reward)


def simulate_and_back_up(path, N, Q, reward):
    """Phases 3 and 4 of MCTS for a path from the root to a leaf."""
    last = path[-1]
    if last.end is None:                                    # 3. simulation: one rollout to the end
        [[last]] = yield Request([last], 1, whole=True)
    # The PRM values the rollout, never the right answer. Cut off, a rollout answers nothing: 0.
    value = 0.0 if last.end == "length" else reward(last)
    for node in path:                                       # 4. backpropagation of the mean
        N[node] += 1
        Q[node] += (value - Q[node]) / N[node]


# with --textbook; without it beam and mcts run with what stands below: STRATEGIES
TEXTBOOK = {"best_of_n": best_of_n, "beam": beam, "mcts": mcts, "majority": majority_vote}

# ------------------------------------------------------------ our additions (docs/results.md)

PRUNE = 0.2  # Appendix D.3 names no threshold; this one is ours
ROUND = 4    # samples that --until draws at once


def merge(steps):
    """Equal samples are one action: keep the first of equal texts below one parent."""
    distinct = {}
    for step in steps:
        distinct.setdefault((step.text, step.end is None), step)
    return list(distinct.values())


def prune(nodes, threshold):
    """Appendix D.3: drop steps with p_t below the threshold, unless no other is left."""
    return [node for node in nodes if node.p >= threshold] or nodes


def beam_extended(root, k, m, path_score, threshold=PRUNE, **_):
    """Beam search with merged equal steps, shared breadth and pruning.

    Merging leaves fewer than K paths; these share the samples, so that each step still draws as
    many as K paths would. The first step does, too: K * M from the prompt.
    """
    paths = [root]
    while live := [node for node in paths if node.end is None]:
        finished = [node for node in paths if node.end]
        breadth = m * (k - len(finished)) // len(live)  # a finished path needs no samples
        groups = yield Request(live, breadth)
        candidates = finished + list(chain.from_iterable(map(merge, groups)))
        paths = sorted(prune(candidates, threshold), key=path_score, reverse=True)[:k]
        for node in set(chain.from_iterable(groups)).difference(paths):
            node.forget()  # a dropped path's keys and values are most of the tree's memory


def mcts_extended(root, m, simulations, c, reward, N, threshold=PRUNE, **_):
    """MCTS with merged equal steps, pruning, late expansion and progressive widening.

    An LLM's actions cannot be listed, and M first samples may all be wrong: a node draws M more at
    each square number of visits (Coulom 2007, https://inria.hal.science/inria-00149266). A leaf is
    rolled out on its first visit and expanded on its second: most leaves are visited once.
    """
    Q = defaultdict(float)
    children = {}
    drawn = Counter()
    for _ in range(simulations):
        path = [root]
        while path[-1] in children and drawn[path[-1]] >= m * math.isqrt(N[path[-1]]):
            path.append(uct_select(path[-1], children[path[-1]], N, Q, c))
        leaf = path[-1]
        if leaf.end is None and (leaf is root or N[leaf]):
            [steps] = yield Request([leaf], m)
            drawn[leaf] += m
            children[leaf] = prune(merge(children.get(leaf, []) + steps), threshold)
            for node in set(steps).difference(children[leaf]):
                node.forget()
            path.append(uct_select(leaf, children[leaf], N, Q, c))
        yield from simulate_and_back_up(path, N, Q, reward)


def samples_in_rounds(root, left, n, until, **_):
    """Best-of-N in rounds: one sample, then as many as fit left() if all are as long as that.
    With --until ROUND at most, and the driver ends the search after one that is good enough."""
    drawn = longest = 0
    while drawn < n:
        most = left() / longest if longest else 1
        fit = min(most, n - drawn, ROUND if until < math.inf else n)
        [ends] = yield Request([root], max(1, int(fit)), whole=True)
        longest = max([longest, 1, *(end.tokens() for end in ends)])
        drawn += len(ends)


STRATEGIES = {**TEXTBOOK, "beam": beam_extended, "mcts": mcts_extended}
# the defaults of --choose; B.4.3 names no rule for MCTS
RULES = defaultdict(lambda: "argmax", majority="vote", mcts="weighted")


# ------------------------------------------------------------ from problems to sample rows

def solve(problems, strategy, policy, prms, args, budgets=None):
    """Search all problems -> (searches, sample rows). budgets: generated tokens for each problem
    (default: args.tokens for all). Batches hold all problems; a row depends on its own alone."""
    def reward(node, how=args.aggregate):  # R_i of a solution in the tree; of a row's: rewards()
        return aggregate([step.p for step in node.path() if step.text and step.p is not None], how)
    run.expect(args.aggregate != "sum" or strategy != "mcts" and args.until == math.inf,
               "--aggregate sum is not in [0, 1], which UCT and --until need")
    options = vars(args) | {"reward": reward, "path_score": partial(reward, how="sum")}
    if budgets:
        options |= {"n": math.inf, "until": math.inf}  # as many samples as the budget buys
    plan = (STRATEGIES | TEXTBOOK if args.textbook else STRATEGIES)[strategy]
    if plan is best_of_n and (budgets or min(args.tokens, args.until) < math.inf):
        plan = samples_in_rounds
    # the id fixes the random numbers: whatever shares the batch, the samples are the same
    roots = [policy.root(p.id, p.question, p.domain) for p in problems]
    limits = budgets or [args.tokens] * len(problems)
    searches = [Search(root, plan, options, limit) for root, limit in zip(roots, limits)]
    with run.bar(len(searches), strategy, leave=False) as progress:
        run_together(searches, policy, prms, progress)
    rows = sample_rows(problems, searches, strategy, policy.separator)
    for row in rows:
        row["rule"] = args.choose or RULES[strategy]
        row["picked"] = choose(row, row["rule"], args.aggregate)
    return searches, rows


def choose(row, rule, how, tokens=math.inf):
    """--choose: index of a sample row's best solution, None if there is none. Every solution that
    ended counts, also one that fell out of the beam, and each of MCTS's rollouts.

    tokens: a smaller budget, of which the search would have got the first solutions only.
    """
    samples = [s for s in row["samples"] if s["spent"] <= tokens]
    R = rewards(samples, how)
    if not samples:
        return None
    if rule == "visited":  # lists compare from the root on: the most visited child each time
        return max(range(len(R)), key=lambda i: (samples[i].get("visits", []), R[i]))
    if rule == "argmax":
        return arg_max(R)
    return mode([s["answer"] for s in samples], R if rule == "weighted" else None)


def rewards(samples, how):
    """R_i of each sample; one that was cut off has no answer and ranks below all others."""
    R = []
    for s in samples:
        p = [x for x in s["scores"] if x is not None]
        R.append(-1.0 if s.get("end") == "length" else aggregate(p, how))
    return R


# ------------------------------------------------------------ main

def add_search_flags(parser, n=None):
    """The flags that solve() reads; evaluate.py has them as well, with n="+" for several N.
    Capitals: torchrun on Python before 3.12 takes --n for its own, even after the script's name."""
    a = parser.add_argument
    a("--task", nargs="+", default=tasks.DEFAULT, help="TASK or TASK:SPLIT")
    a("--data", help="local file instead of the hub")
    a("--n", "--N", type=int, nargs=n, default=16, help="best-of-N, majority: samples (16)")
    a("--k", "--K", type=int, default=4, help="beam: paths kept, K (4)")
    a("--m", "--M", type=int, default=4, help="beam, MCTS: steps sampled below a path, M (4)")
    a("--c", type=run.amount, default=0.5, help="MCTS: c of UCT, in units of Q (0.5)")
    a("--simulations", type=int, default=32, help="MCTS: visits of the root (32)")
    a("--textbook", action="store_true", help="beam, MCTS as in B.4, without our additions")
    a("--until", type=run.share, default=math.inf,
      help="end a problem's search after the sampling that brings this R_i (D.2; try 0.5)")
    a("--choose", choices=["argmax", "weighted", "vote", "visited"],
      help="the solution: best reward, PRM-weighted or plain vote of the answers, or MCTS's most "
           "visited (default: vote for majority, weighted for MCTS, else argmax)")
    a("--aggregate", choices=AGGREGATIONS, default="prod", help="R_i from its p_t (prod)")
    a("--prm", nargs="+", default=[str(run.TINY / "prm")], help="folders, ids, http://...: mean p")
    a("--concurrent", type=int, default=100, help="problems searched together (100)")


def parse(argv):
    parser = run.command_line(__doc__)
    a = parser.add_argument
    a("--strategy", required=True, choices=[*STRATEGIES, "auto"],
      help="auto: what common/router.py has measured to be best for a mean of --tokens")
    a("--tokens", type=int, default=math.inf, help="a problem's budget, checked before sampling")
    a("--question", help="your own question, of math")
    a("--no-baseline", action="store_true", help="no plain samples of the same tokens beside it")
    a("--html", metavar="FILE", help="a page with the trees of the first problems")
    add_search_flags(parser)
    add_policy_flags(parser, str(run.TINY / "A"))
    run.add_run_flags(parser, limit=50, summary=False)
    args = parser.parse_args(argv)
    run.check_run_flags(parser, args, "n", "k", "m", "simulations", "tokens", "concurrent")
    if args.choose == "visited" and args.strategy != "mcts":
        parser.error("--choose visited is for --strategy mcts, which counts visits")
    if args.question is not None and not args.question.strip():
        parser.error("--question is empty")
    return parser, args


def main(argv=None):
    parser, args = parse(argv)
    with parser:
        if args.strategy == "auto":
            vars(args).update(router.route(args.prm[0], args.tokens))
        rank, _, device = run.distributed(args.device)
        page = Page(args.html if rank == 0 else None)
        problems = [tasks.Problem("question", args.question, "math")] if args.question else []
        for task in tasks.each(args.task, args.data) if not args.question else ():
            problems += tasks.load(task, args.data, limit=args.limit, seed=args.seed)
        policy = load_policy_flags(args, device)
        prms = [load_prm(path, device, args.dtype) for path in args.prm]
    shown = set()  # domains of which a solution has been printed

    def search_chunk(chunk):
        searches, rows = solve(chunk, args.strategy, policy, prms, args)
        for search, row in zip(searches, rows):
            page.add(search_tree, search, row)
            if rank == 0:
                show(search, row, shown)
        return rows

    def baseline_chunk(chunk):
        budgets = [max(1, spent[problem.id]) for problem in chunk]
        return solve(chunk, "best_of_n", policy, prms, args, budgets)[1]
    with parser:
        run.same_flags(parser, args, models=run.served(policy, *prms))
        rows = pools = run.journaled(args.out, problems, search_chunk, chunk=args.concurrent,
                                     resume=args.resume)
        page.finish()
        if args.question or args.no_baseline:
            pools = []
        elif args.strategy not in ("best_of_n", "majority"):  # the same tokens without search
            spent = {row["id"]: row["cost"]["policy_generated"] for row in rows}
            pools = run.journaled(args.out and f"{args.out}.baseline", problems, baseline_chunk,
                                  chunk=args.concurrent, resume=args.resume, desc="baseline")
    for row, pool in zip(rows, pools):
        row["baseline"] = compare(row, pool, partial(choose, how=args.aggregate))
    if rank == 0 and not args.question:
        report(rows, args)


if __name__ == "__main__":
    main()
