"""The four search strategies of §4.2 and B.4: best-of-N, beam search, MCTS, majority voting.

    python search.py --strategy beam                 # the tiny world, shipped with this repository
    python search.py --strategy mcts --textbook      # as Appendix B.4 has it, without our additions
    python search.py --strategy mcts --task tiny-code --tokens 2000      # a budget for each problem
    python search.py --strategy beam --question "Ann has 7 shells. In January she finds 5. In \\
February she doubles them. In March she loses 9. In April she finds 6. How many now?"
    python search.py --strategy best_of_n --task math500 --policy Qwen/Qwen2.5-7B-Instruct \\
        --prm Qwen/Qwen2.5-Math-PRM-7B
    torchrun --nproc_per_node=8 search.py --strategy beam --task gsm8k --limit 1319 --policy ... \\
        --prm ... --out beam.jsonl

A strategy is a generator for one problem. It yields a Request, "sample n next steps below these
nodes" (or whole solutions), and is sent the new nodes; each brings node.p = p_t, the PRM's
probability that its step is correct. common/driver.py batches the requests of many problems.
The file has the textbook first, then our additions to it, then rows, report and flags.

A node of the tree is one step, and stands for the action that leads to it: a state s is the path
from the root to a node, an action a is a child, so N[child] is N(s, a) and Q[child] is Q(s, a).

Symbols: N solutions; K paths kept; M steps sampled below a path; R_i reward of solution i, made of
its p_t by --aggregate; A_i its answer.
"""
import math
from collections import Counter, defaultdict
from functools import partial
from itertools import chain

from tqdm import tqdm

from common import run, tasks
from common.driver import Request, Search, run_together
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
    of R_i (Snell et al. 2024, arXiv 2408.03314). None, no answer, is no vote.
    """
    votes = Counter()
    for i, answer in enumerate(answers):
        if answer is not None:
            # a solution that was cut off has the reward -1: it may not take weight from others
            votes[answer] += max(0.0, weights[i]) if weights else 1.0
    return answers.index(max(votes, key=votes.get)) if votes else 0


def best_of_n(root, n, **_):
    """B.4.1: N whole solutions, of which arg_max() takes the one with the highest reward."""
    yield Request([root], n, whole=True)


majority_vote = best_of_n  # B.4.4: the same N solutions, of which mode() takes the common answer


def beam(root, k, m, path_score, **_):  # README, step 6
    """B.4.2: expand each of K paths by M steps, keep the K best, until all of them are finished.

        Top Paths = Select Top K from { sum_{t=1..T} R(x_t) },   R(x_t) = p_t

    k = 1 is the step-by-step decoding of Appendix C. path_score(node) is the sum above.
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


def mcts(root, m, simulations, c, reward, **_):  # README, step 6
    """B.4.3: Monte Carlo tree search. Returns the visits N and each expanded node's children."""
    N = Counter()
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
    return N, children


def simulate_and_back_up(path, N, Q, reward):
    """Phases 3 and 4 of MCTS for a path from the root to a leaf."""
    end = path[-1]
    if end.end is None:                                     # 3. simulation: one rollout to the end
        [[end]] = yield Request([end], 1, whole=True)
    # The PRM values the rollout, never the right answer. Cut off, a rollout answers nothing: 0.
    value = 0.0 if end.end == "length" else reward(end)
    for node in path:                                       # 4. backpropagation of the mean
        N[node] += 1
        Q[node] += (value - Q[node]) / N[node]


TEXTBOOK = {"best_of_n": best_of_n, "beam": beam, "mcts": mcts, "majority": majority_vote}


# ------------------------------------------------------------ our additions (docs/results.md)

PRUNE = 0.2  # Appendix D.3 names no threshold; this one is ours


def merge(steps):
    """Equal samples are one action: keep the first of equal texts below one parent."""
    distinct = {}
    for step in steps:
        distinct.setdefault((step.text, step.end is None), step)
    return list(distinct.values())


def prune(nodes, threshold):
    """Appendix D.3: drop steps with p_t below the threshold, unless no other is left."""
    return [node for node in nodes if node.p >= threshold] or nodes


def unsure(steps):
    """Appendix D.2 asks for more breadth where scores are low, or PRMs disagree on the best step.
    The paper names no thresholds; 0.8 and 0.2 are ours, and not tuned."""
    best = max(steps, key=lambda step: step.p)
    return best.p < 0.8 or max(best.scores) - min(best.scores) > 0.2


def adaptive_breadth(live, breadth):
    """Appendix D.2: half of the samples first; where those leave us unsure, as many as planned."""
    groups = yield Request(live, max(1, breadth // 2))
    hard = [node for node, steps in zip(live, groups) if unsure(steps)]
    second = (yield Request(hard, breadth)) if hard else []
    additional = dict(zip(hard, second))
    return [steps + additional.get(node, []) for node, steps in zip(live, groups)]


def beam_extended(root, k, m, path_score, threshold=PRUNE, adaptive=False, **_):
    """Beam search with merged equal steps, shared breadth, pruning and, if asked, adaptive breadth.

    Merging leaves fewer than K paths; these share the samples, so that each step still draws as
    many as K paths would. The first step does, too: K * M from the prompt.
    """
    paths = [root]
    while live := [node for node in paths if node.end is None]:
        finished = [node for node in paths if node.end]
        breadth = m * (k - len(finished)) // len(live)  # a finished path needs no samples
        if adaptive:
            groups = yield from adaptive_breadth(live, breadth)
        else:
            groups = yield Request(live, breadth)
        candidates = finished + list(chain.from_iterable(map(merge, groups)))
        paths = sorted(prune(candidates, threshold), key=path_score, reverse=True)[:k]
        for node in set(chain.from_iterable(groups)).difference(paths):  # K * M - K are dropped
            node.forget()  # a dropped path's keys and values are most of the tree's memory


def mcts_extended(root, m, simulations, c, reward, threshold=PRUNE, **_):
    """MCTS with merged equal steps, pruning, late expansion and progressive widening.

    An LLM's actions cannot be listed, and M first samples may all be wrong: a node draws M more at
    each square number of visits (Coulom 2007, https://inria.hal.science/inria-00149266). A leaf is
    rolled out on its first visit and expanded on its second: most leaves are visited once.
    """
    N = Counter()
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
    return N, children


def samples_within(root, left, n=math.inf, **_):
    """Best-of-N under a budget of tokens: rounds of as many samples as the longest one so far lets
    fit into left() tokens; the first round is one sample."""
    drawn = 0
    longest = 0
    while drawn < n:
        fit = max(1, int(left() // longest)) if longest else 1
        [ends] = yield Request([root], min(fit, n - drawn), whole=True)
        longest = max([longest, 1, *(end.tokens() for end in ends)])
        drawn += len(ends)


STRATEGIES = {**TEXTBOOK, "beam": beam_extended, "mcts": mcts_extended}


# ------------------------------------------------------------ from problems to sample rows

def solve(problems, strategy, policy, prms, args, budgets=None):
    """Search all problems -> (searches, sample rows). budgets: generated tokens for each problem
    (default: args.tokens for all). Batches hold all problems; a row depends on its own alone."""
    def reward(node, how=args.aggregate):
        return aggregate([step.p for step in node.path() if step.text and step.p is not None], how)
    options = vars(args) | {"reward": reward, "path_score": partial(reward, how="sum")}
    if budgets:
        options["n"] = math.inf  # as many samples as the budget buys
    plan = (STRATEGIES | TEXTBOOK if args.textbook else STRATEGIES)[strategy]
    if plan is best_of_n and (budgets or args.tokens < math.inf):
        plan = samples_within
    # the id fixes the random numbers: whatever shares the batch, the samples are the same
    roots = [policy.root(p.id, p.question, p.domain) for p in problems]
    limits = budgets or [args.tokens] * len(problems)
    searches = [Search(root, plan, options, limit) for root, limit in zip(roots, limits)]
    with tqdm(total=len(searches), desc=strategy, leave=False, disable=None) as progress:
        run_together(searches, policy, prms, progress)
    rule = args.choose or ("vote" if strategy == "majority" else "argmax")
    return searches, sample_rows(problems, searches, strategy, choose, rule, policy.separator)


def choose(rule, search, rewards, answers):
    """--choose: index of the winner among search.finished, None if that is empty. It holds every
    solution that ended, also those that fell out of the beam, and MCTS's rollouts."""
    if not rewards:
        return None
    if rule in ("vote", "weighted"):
        return mode(answers, rewards if rule == "weighted" else None)
    if rule == "visited" and search.result:  # not when the budget ended the search
        N, children = search.result
        node = search.root
        while node in children:
            node = max(children[node], key=N.__getitem__)
        below = [i for i, (_, _, end) in enumerate(search.finished) if node in end.line()]
        return max(below, key=rewards.__getitem__, default=arg_max(rewards))
    return arg_max(rewards)


# ------------------------------------------------------------ main

def add_search_flags(parser):
    """The flags that solve() reads; evaluate.py has them as well. Capitals: torchrun on Python
    before 3.12 takes --n for a flag of its own, even after the script's name."""
    a = parser.add_argument
    a("--task", nargs="+", default=["tiny-math", "tiny-code"], help="TASK or TASK:SPLIT")
    a("--data", help="local file instead of the hub")
    a("--n", "--N", type=int, default=16, help="best-of-N, majority: samples (16)")
    a("--k", "--K", type=int, default=4, help="beam: paths kept, K (4)")
    a("--m", "--M", type=int, default=4, help="beam, MCTS: steps sampled below a path, M (4)")
    a("--c", type=run.amount, default=0.5, help="MCTS: c of UCT, in units of Q (0.5)")
    a("--simulations", type=int, default=32, help="MCTS: visits of the root (32)")
    a("--textbook", action="store_true", help="beam, MCTS as in B.4, without our additions")
    a("--adaptive", action="store_true", help="beam: more samples where the PRM is unsure (D.2)")
    a("--choose", choices=["argmax", "weighted", "vote", "visited"],
      help="the solution: best reward, PRM-weighted or plain vote of the answers, or MCTS's most "
           "visited (default: vote for majority, else argmax)")
    a("--aggregate", choices=AGGREGATIONS, default="prod", help="R_i from its p_t (prod)")
    a("--prm", nargs="+", default=[str(run.TINY / "prm")], help="folders or hub ids: mean p_t")
    a("--concurrent", type=int, default=100, help="problems searched together (100)")


def parse(argv):
    parser = run.command_line(__doc__)
    a = parser.add_argument
    a("--strategy", required=True, choices=STRATEGIES)
    a("--tokens", type=int, default=math.inf, help="budget: generated tokens a problem")
    a("--question", help="your own question, of math")
    add_search_flags(parser)
    add_policy_flags(parser, str(run.TINY / "A"))
    run.add_run_flags(parser, limit=50, summary=False)
    args = parser.parse_args(argv)
    run.check_run_flags(parser, args, "n", "k", "m", "simulations", "tokens", "concurrent")
    if args.strategy == "mcts" and args.aggregate == "sum":
        parser.error("--aggregate sum is not in [0, 1], which UCT needs")
    if args.adaptive and (args.strategy != "beam" or args.textbook):
        parser.error("--adaptive is for --strategy beam, without --textbook")
    if args.choose == "visited" and args.strategy != "mcts":
        parser.error("--choose visited is for --strategy mcts, which counts visits")
    if args.question is not None and not args.question.strip():
        parser.error("--question is empty")
    return parser, args


def main(argv=None):
    parser, args = parse(argv)
    with parser:
        rank, _, device = run.distributed(args.device)
        problems = []
        for task in args.task if not args.question else ():
            problems += tasks.load(task, args.data, limit=args.limit, seed=args.seed)
        if args.question:
            problems.append(tasks.Problem("question", args.question, "math"))
        policy = load_policy_flags(args, device)
        prms = [load_prm(path, device, args.dtype) for path in args.prm]
    shown = set()  # domains of which a solution has been printed

    def search_chunk(chunk):
        searches, rows = solve(chunk, args.strategy, policy, prms, args)
        pools = rows
        if args.strategy not in ("best_of_n", "majority"):  # the same tokens without search
            budgets = [max(1, search.generated) for search in searches]
            _, pools = solve(chunk, "best_of_n", policy, prms, args, budgets)
        for search, row, pool in zip(searches, rows, pools):
            row["compared"] = compare(row, pool)
            if rank == 0 and row["domain"] not in shown:
                show(search, row)
                shown.add(row["domain"])
        return rows
    with parser:
        run.same_flags(parser, args)
        rows = run.journaled(args.out, problems, search_chunk, chunk=args.concurrent,
                         resume=args.resume)
    if rank == 0 and not args.question:
        report(rows, args)


if __name__ == "__main__":
    main()
