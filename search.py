"""The four search strategies of §4.2 and Appendices B.4, C and D: best-of-N, beam search, MCTS, majority voting.

    python search.py --strategy beam                                     # the tiny world, shipped with this repository
    python search.py --strategy mcts --task tiny-code --tokens 2000      # stops a problem after 2,000 generated tokens
    python search.py --strategy beam --question "Ann has 7 shells. In January she finds 5. In February she doubles \\
them. In March she loses 9. In April she finds 6. In May she loses 4. How many now?"
    python search.py --strategy best_of_n --task math500 --limit 500 --policy Qwen/Qwen2.5-7B-Instruct \\
        --prm Qwen/Qwen2.5-Math-PRM-7B
    torchrun --nproc_per_node=8 search.py --strategy beam --task gsm8k --limit 1319 --policy ... --prm ... \\
        --out beam.jsonl

Each strategy is a generator: it yields a Request ("expand these nodes into n steps each", or to the end) and is sent
the new nodes, with node.p set to the PRM's probability that the step is correct. `drive` advances the searches of many
problems together and answers all their pending requests in one batch, so that the strategies can be read one problem
at a time, as in the paper, and a GPU still sees full batches.
"""
import json
import math
import statistics
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from textwrap import indent

from tqdm import tqdm

from common import tasks
from common.loaders import packed
from common.metrics import mean_se
from common.policy import add_policy_flags, load_policy_flags
from common.run import TINY, add_run_flags, check_run_flags, command_line, distributed, journaled, same_flags
from prm_model import AGGREGATIONS, aggregate, coloured, load_prm, score_steps


@dataclass
class Request:
    nodes: list
    n: int               # samples for each node
    whole: bool = False  # to the end of the solution, not of the step


# ---------------------------------------------------------------- the strategies

def best_of_n(root, n, left, **_):
    """N whole solutions; the one with the highest reward R_i wins (B.4.1), which pick() decides.

    left() is the number of tokens that may still be generated. Under a budget of tokens the samples come in rounds,
    each as large as the longest solution so far lets it be: the first is one sample. A budget of seconds is not seen
    here: all N are one call.
    """
    drawn, longest = 0, math.inf
    while drawn < n:
        take = n - drawn if left() == math.inf else max(1, min(n - drawn, int(left() // max(1, longest))))
        [ends] = yield Request([root], take, whole=True)
        longest = max([end.tokens() for end in ends] + [0 if drawn == 0 else longest])
        drawn += take


majority = best_of_n  # the same samples; only pick() differs: the mode of their answers (B.4.4)


def beam(root, k, m, prune=0.0, adaptive=False, path_score=None, **_):
    """K paths, M expansions of each, the top K by cumulative score (B.4.2). k = 1 is the decoding of Appendix C.

        Top Paths = Select Top K from { sum_{t=1..T} R(x_t) },   R(x_t) = p_t

    Finished paths stay and compete. Equal steps are merged, and so fewer than K paths may be left: they share the
    samples, so that each step considers as many as K paths would have. The first does, too: K * M from the prompt.
    """
    beams = [root]
    while live := [node for node in beams if node.end is None]:
        breadth = m * (k - len(beams) + len(live)) // len(live)
        groups = yield Request(live, breadth if not adaptive else max(1, breadth // 2))
        if adaptive:  # Appendix D.2: the other half, and as many again, only where no step is surely good
            hard = [node for node, steps in zip(live, groups) if unsure(steps)]
            if hard:
                more = dict(zip(hard, (yield Request(hard, breadth))))
                groups = [steps + more.get(node, []) for node, steps in zip(live, groups)]
        candidates = [node for node in beams if node.end] + [s for steps in groups for s in merge(steps)]
        kept = [node for node in candidates if node.p >= prune] or candidates  # Appendix D.3
        beams = sorted(kept, key=path_score, reverse=True)[:k]  # stable: ties keep sampling order
        for dropped in {s for steps in groups for s in steps}.difference(beams):
            dropped.forget()  # most of the tree's memory


def mcts(root, m, simulations, c, simulate="rollout", prune=0.0, reward=None, adaptive=False, **_):
    """Monte Carlo tree search (B.4.3). Node.p and rollouts are valued by the PRM alone, never by the right answer.

    N[s]  visits;  Q[s]  mean value backed up through s;  children[s]  its sampled steps, duplicates merged;  drawn[s]
    how many were sampled. An LLM's actions cannot be listed, and M first steps may all be wrong: a node draws M more at
    each square number of visits (progressive widening: Coulom 2007, https://inria.hal.science/inria-00149266). It is
    closed when nothing below it is left to try: selection passes it by. When the root is closed, all may draw M more.
    """
    N, Q, drawn, children, closed, extra = Counter(), defaultdict(float), Counter(), {}, set(), 0

    def allowed(s):
        return extra + m * math.isqrt(max(1, N[s]))

    while N[root] < simulations:
        if root in closed:
            closed, extra = {s for s in closed if s.end}, extra + m
        path = [root]                                                       # 1. selection
        while path[-1] in children and drawn[path[-1]] >= allowed(path[-1]):
            path.append(uct_select(path[-1], [s for s in children[path[-1]] if s not in closed], N, Q, c))
        leaf = path[-1]
        if leaf.end is None and (leaf is root or N[leaf]):                  # 2. expansion of a node seen before
            [steps] = yield Request([leaf], m * (1 + (adaptive and leaf in children and unsure(children[leaf]))))
            drawn[leaf] += m  # an adaptive one, too: what is drawn never passes what is allowed
            steps = merge(children.get(leaf, []) + steps)
            children[leaf] = [s for s in steps if s.p >= prune] or steps
            path.append(uct_select(leaf, [s for s in children[leaf] if s not in closed] or children[leaf], N, Q, c))
        end = path[-1]
        if end.end is None and simulate == "rollout":                       # 3. simulation
            [[end]] = yield Request([end], 1, whole=True)
        value = 0.0 if end.end == "length" else reward(end)                 # cut off: it answers nothing
        for node in path:                                                   # 4. backpropagation
            N[node] += 1
            Q[node] += (value - Q[node]) / N[node]
        for node in reversed(path):
            if node.end or (drawn[node] >= allowed(node) and all(s in closed for s in children[node])):
                closed.add(node)
    return N, children


def uct_select(node, children, N, Q, c):
    """The child to follow:  UCT(s, a) = Q(s, a) + c * sqrt(ln N(s) / N(s, a)).

    Q(s, a) is the mean value backed up through child a, in [0, 1]; N(s, a) its visits; N(s) the visits of the node.
    An unvisited child wins outright; ties keep sampling order, so a seed always grows the same tree.
    """
    return max(children, key=lambda a: Q[a] + c * math.sqrt(math.log(N[node]) / N[a]) if N[a] else math.inf)


def merge(steps):
    """Steps of one parent without duplicates: the first of equal texts stays."""
    seen = {}
    for step in steps:
        seen.setdefault((step.text, step.end is None), step)
    return list(seen.values())


def unsure(steps):
    """No sampled step is surely right (p >= 0.8), or the PRMs differ by more than 0.2 on the best: worth more breadth.
    Appendix D.2 asks for that and names no thresholds; these are ours, not tuned."""
    best = max(steps, key=lambda s: s.p)
    return best.p < 0.8 or max(best.scores) - min(best.scores) > 0.2


STRATEGIES = {"best_of_n": best_of_n, "beam": beam, "mcts": mcts, "majority": majority}


def pick(weights, keys=None):
    """Index of the chosen solution: the greatest reward, or with keys (the answers) the answer of the greatest total
    weight: the mode when each weighs 1. Ties go to the first."""
    if keys is None:
        return max(range(len(weights)), key=weights.__getitem__)
    votes = Counter()
    for weight, key in zip(weights, keys):
        if key is not None:
            votes[key] += max(0.0, weight)
    return keys.index(max(votes, key=votes.get)) if votes else 0


def mode(answers, weights=None):  # a stand-in for the function of the search rewrite
    return pick(weights or [1.0] * len(answers), answers)


# ---------------------------------------------------------------- the driver

@dataclass(eq=False)
class Search:
    """One problem's search and its account. Costs are this problem's share of the batches it took part in."""
    root: object
    strategy: object
    options: dict
    tokens: float = math.inf          # budget: generated tokens
    seconds: float = math.inf         # budget
    spent: int = 0
    took: float = 0.0
    prefilled: float = 0.0
    prm_tokens: float = 0.0
    prm_took: float = 0.0             # the PRM's part of `took`
    found: list = field(default_factory=list)  # (tokens, seconds, last node) of each finished solution, in order
    tried: list = field(default_factory=list)  # every node that was sampled
    result: object = None                      # what the strategy returned, if it came to its end

    def __post_init__(self):
        self.plan = self.strategy(self.root, left=lambda: self.tokens - self.spent, **self.options)
        self.request = self.answer(None)

    def answer(self, groups):
        """Send the new nodes to the strategy; its next request, or None when it is done."""
        try:
            return self.plan.send(groups)
        except StopIteration as stop:
            self.result = stop.value
            return None


def drive(searches, policy, prms=(), combine="mean", progress=None):
    """Advance all searches together until each is done or out of budget; budgets are checked before each call."""
    live = [s for s in searches if s.request]
    while live:
        for whole in (False, True):
            asked = [s for s in live if s.request and s.request.whole == whole]
            if not asked:
                continue
            started, before = time.perf_counter(), (policy.prefilled, sum(p.tokens for p in prms))
            nodes = [n for s in asked for n in s.request.nodes]
            counts = [s.request.n for s in asked for _ in s.request.nodes]
            groups = (policy.complete if whole else policy.propose)(nodes, counts)
            sampled = time.perf_counter()
            score_steps(prms, [n for group in groups for n in group], combine)
            after = (policy.prefilled - before[0], sum(p.tokens for p in prms) - before[1])
            elapsed, scoring = time.perf_counter() - started, time.perf_counter() - sampled
            groups = iter(groups)
            mine = [[next(groups) for _ in s.request.nodes] for s in asked]
            new = [sum(n.tokens() - parent.tokens() for parent, group in zip(s.request.nodes, own) for n in group)
                   for s, own in zip(asked, mine)]
            for s, own, tokens in zip(asked, mine, new):
                share = tokens / max(1, sum(new))
                s.spent += tokens
                s.took, s.prm_took = s.took + elapsed * share, s.prm_took + scoring * share
                s.prefilled, s.prm_tokens = s.prefilled + after[0] * share, s.prm_tokens + after[1] * share
                s.tried += [n for group in own for n in group]
                s.found += [(s.spent, s.took, n) for group in own for n in group if n.end]
                s.request = s.answer(own)
                if s.spent >= s.tokens or s.took >= s.seconds:
                    s.request = None
                if s.request is None:
                    s.plan.close()  # it holds left(), which holds s: the tree would wait for the garbage collector
                    for node in [s.root, *s.tried]:
                        node.forget()
        if progress is not None:  # with a real model no problem may be done for minutes: show the tokens, too
            progress.set_postfix_str(f"{sum(s.spent for s in searches)} tokens", refresh=False)
            progress.update(sum(s.request is None for s in live))
        live = [s for s in live if s.request]


# ---------------------------------------------------------------- from problems to rows

def solve(problems, strategy, policy, prms, args, budgets=None):
    """Search all problems -> sample rows. budgets: generated tokens for each problem (default: args.tokens)."""
    def reward_by(how):
        return lambda node: aggregate([n.p for n in node.path() if n.p is not None and n.text], how)
    options = {**vars(args), "reward": reward_by(args.aggregate), "path_score": reward_by(args.beam_score)}
    if budgets:
        options["n"] = math.inf  # as many samples as the budget buys
    limits = [(tokens, math.inf) for tokens in budgets] if budgets else [(args.tokens, args.seconds)] * len(problems)
    searches = [Search(policy.root(p.id, p.question, p.domain), STRATEGIES[strategy], options, *limit)
                for p, limit in zip(problems, limits)]
    with tqdm(total=len(searches), desc=strategy, leave=False, disable=None) as progress:
        drive(searches, policy, prms, args.combine, progress)
    return searches, sample_rows(problems, searches, strategy, args, policy.separator)


def sample_rows(problems, searches, strategy, args, separator):
    """One judged row a problem (format: common/data.py), its samples in the order in which they were found."""
    flat = [(p, separator.join(node.steps())) for p, s in zip(problems, searches) for _, _, node in s.found]
    verdicts, keys, rows = iter(tasks.judge_many(flat)), iter(tasks.vote_keys(flat)), []
    for p, s in zip(problems, searches):
        nodes, reward = [node for _, _, node in s.found], s.options["reward"]
        answers = [next(keys) for _ in nodes]
        rewards = [-1.0 if node.end == "length" else reward(node) for node in nodes]  # unfinished ones come last
        best = [i for _, i in accumulate(zip(rewards, range(len(nodes))), lambda a, b: b if b[0] > a[0] else a)]
        vote = pick(rewards if args.weighted else [1.0] * len(nodes), answers) if nodes else None
        picked = vote if strategy == "majority" else best[-1] if nodes else None
        if strategy == "mcts" and args.choose == "visited" and s.result is not None:
            N, children = s.result
            visited = s.root
            while visited in children:
                visited = max(children[visited], key=lambda a: N[a])
            below = [i for i, node in enumerate(nodes) if visited in [s.root, *node.path()]]
            picked = max(below, key=rewards.__getitem__, default=picked)
        rows.append({
            "id": p.id, "domain": p.domain, "question": p.question, "strategy": strategy,
            **({"tests": packed(p.tests)} if p.domain == "code" else {"answer": p.answer}),
            "samples": [{"steps": n.steps(), "scores": [x.p for x in n.path() if x.text], "answer": answer,
                         "correct": v.ok, "tokens": n.tokens(), "end": n.end}
                        for n, answer, v in zip(nodes, answers, verdicts)],
            "picked": picked, "vote": vote,
            # the best answer as a function of what has been spent: (tokens, seconds, sample) whenever it changed
            "curve": [(t, round(sec, 4), i) for i, (t, sec, _) in enumerate(s.found) if best[i] == i],
            "cost": {"policy_generated": s.spent, "policy_prefilled": round(s.prefilled, 1),
                     "prm_tokens": round(s.prm_tokens, 1), "seconds": round(s.took, 4),
                     "prm_seconds": round(s.prm_took, 4)},
            "overshoot": max(0, s.spent - s.tokens) if s.tokens < math.inf else 0})
    return rows


def right(row, i):
    """Is sample i of a row right? None, that no sample was finished, is not."""
    return bool(i is not None and row["samples"][i]["correct"])


def compare(row, pool):
    """What the report needs of a problem: the strategy's pick, and from a pool of plain samples that cost as many
    tokens: best-of-N, majority vote and the mean single sample."""
    best = pool["curve"][-1][2] if pool["curve"] else None
    return {"picked": right(row, row["picked"]), "best_of_n": right(pool, best), "majority": right(pool, pool["vote"]),
            "single": statistics.fmean([s["correct"] for s in pool["samples"]] or [0.0]),
            "pool_samples": len(pool["samples"]), "pool_tokens": pool["cost"]["policy_generated"]}


# ---------------------------------------------------------------- what is printed

def by_domain(rows):
    return {d: [r for r in rows if r["domain"] == d] for d in sorted({r["domain"] for r in rows}, reverse=True)}


def show(search, row):
    """The chosen solution step by step, and under each step what else was sampled there, with its p_t."""
    print(f"\n{row['question']}\n")
    if row["picked"] is None:
        return print("no solution was finished")
    path = search.found[row["picked"]][2].path()
    for node in path:
        print(indent(coloured(node.text, node.p), "  "))
        others = {n.text: n for n in search.tried if n.parent is node.parent and n.text != node.text}
        for other in sorted(others.values(), key=lambda n: -n.p)[:3]:
            print(indent(coloured(other.text, other.p), "      | "))
    known = row.get("answer") is not None or row.get("tests")  # not of one's own --question
    print("  -> " + ("" if not known else "right, " if row["samples"][row["picked"]]["correct"] else "wrong, ")
          + f"{row['cost']['policy_generated']} tokens generated, {len(search.tried)} nodes in the tree\n")


def report(rows, args):
    """Print the table of each domain, ± one standard error over problems; returns the summary that --json writes."""
    name = {"beam": f"beam search {args.k}x{args.m}", "best_of_n": f"best-of-{args.n}", "mcts": "MCTS",
            "majority": f"majority of {args.n}"}.get(args.strategy, args.strategy)
    summary = {}
    for domain, own in by_domain(rows).items():
        cost = {k: statistics.fmean(r["cost"][k] for r in own) for k in own[0]["cost"]}
        pool, samples = (statistics.fmean(r["compared"][k] for r in own) for k in ("pool_tokens", "pool_samples"))
        s = summary[domain] = {"problems": len(own), "cost": cost, "overshoot": max(r["overshoot"] for r in own)}
        print(f"{f'{domain}, {len(own)} problems':<34}accuracy         "
              "generated  prefilled PRM tokens   seconds / problem")
        for key, label, spent in (("picked", name, list(cost.values())[:4]),
                                  ("best_of_n", "best-of-N, same tokens", [pool]),
                                  ("majority", "majority vote, same tokens", [pool]),
                                  ("single", "a single sample", [pool / max(1, samples)])):
            s[key], s[key + "_se"] = mean_se([float(r["compared"][key]) for r in own])
            print(f"  {label:<32}{s[key]:.3f} ± {s[key + '_se']:.3f}  "
                  + "".join(f"{x:>11.0f}" for x in spent[:3]) + "".join(f"{x:>10.3f}" for x in spent[3:]))
        if s["overshoot"]:
            print(f"  the token budget was overshot by at most {s['overshoot']} tokens")
    return summary


# ---------------------------------------------------------------- main

def add_search_flags(parser):
    """The flags that solve() reads; evaluate.py has them, too. Capitals: torchrun on Python < 3.12 takes --n for one
    of its own flags, even after the script's name."""
    a = parser.add_argument
    a("--task", nargs="+", default=["tiny-math", "tiny-code"], help="tasks of common/tasks.py")
    a("--data", help="local file instead of the hub")
    a("--split", help="of the task; for livecodebench FROM:TO")
    a("--n", "--N", type=int, default=16, help="best-of-N, majority: samples (16)")
    a("--k", "--K", type=int, default=4, help="beam: paths kept, K (4)")
    a("--m", "--M", type=int, default=4, help="beam, MCTS: steps sampled from each path, M (4)")
    a("--c", type=float, default=0.5, help="MCTS: exploration constant of UCT, in units of Q (0.5)")
    a("--simulations", type=int, default=32, help="MCTS: visits of the root (32)")
    a("--simulate", choices=["rollout", "value"], default="rollout",
      help="MCTS: value a node by a rollout (as the paper), or by the reward of the path to it")
    a("--choose", choices=["best", "visited"], default="best",
      help="MCTS: the best solution, or (unless a budget ends it) the most visited")
    a("--aggregate", choices=AGGREGATIONS, default="prod", help="reward of a solution from its steps' p_t (prod)")
    a("--beam-score", choices=AGGREGATIONS, default="sum", help="beam: cumulative score of a path (sum, as the paper)")
    a("--weighted", action="store_true", help="majority: each vote weighs its solution's reward")
    a("--prune", type=float, default=0.2, help="beam, MCTS: drop steps of lower p_t, if others are left (0.2)")
    a("--adaptive", action="store_true", help="more breadth where no step is surely right or PRMs disagree")
    a("--prm", nargs="+", default=[str(TINY / "prm")], help="folders or hub ids; several are combined")
    a("--combine", choices=["mean", "min"], default="mean", help="several PRMs: average, or the most severe")
    a("--concurrent", type=int, default=100, help="problems searched together (100)")


def parse(argv):
    parser = command_line(__doc__)
    a = parser.add_argument
    a("--strategy", required=True, choices=STRATEGIES)
    a("--tokens", type=int, default=math.inf, help="budget: generated tokens a problem, checked before each call")
    a("--seconds", type=float, default=math.inf,
      help="budget: seconds a problem (its share of the batches), checked before each call; best-of-N is one call")
    a("--question", help="your own question")
    a("--domain", choices=["math", "code"], default="math", help="of --question")
    add_search_flags(parser)
    add_policy_flags(parser, str(TINY / "A"))
    add_run_flags(parser, limit=50)
    args = parser.parse_args(argv)
    check_run_flags(parser, args, "n", "k", "m", "simulations", "tokens", "seconds", "concurrent")
    if args.strategy == "mcts" and args.aggregate == "sum":
        parser.error("--aggregate sum is not in [0, 1], which UCT needs: take last, min, prod or mean")
    if args.question is not None and not args.question.strip():
        parser.error("--question is empty")
    return parser, args


def main(argv=None):
    parser, args = parse(argv)
    with parser:
        rank, _, device = distributed(args.device)
        if args.question:
            problems = [tasks.Problem("question", args.question, args.domain)]
        else:
            problems = [p for task in args.task
                        for p in tasks.load(task, args.data, args.split, args.limit, args.seed)]
        policy = load_policy_flags(args, device)
        prms = [load_prm(p, device, args.dtype, max_batch_tokens=args.max_batch_tokens) for p in args.prm]

    def make(some):
        searches, rows = solve(some, args.strategy, policy, prms, args)
        pools = rows
        if args.strategy not in ("best_of_n", "majority"):  # what the same tokens buy without search
            _, pools = solve(some, "best_of_n", policy, prms, args, budgets=[max(1, s.spent) for s in searches])
        for row, pool in zip(rows, pools):
            row["compared"] = compare(row, pool)
        for domain in {r["domain"] for r in rows} - shown if rank == 0 else ():  # one problem of each domain
            i = next(i for i, r in enumerate(rows) if r["domain"] == domain)
            show(searches[i], rows[i])
            shown.add(domain)
        return rows
    shown = set()
    with parser:
        same_flags(parser, args)
        rows = journaled(args.out, problems, make, chunk=args.concurrent, resume=args.resume)
    if rank == 0 and not args.question:
        summary = report(rows, args)
        if args.json:
            flags = {k: v for k, v in vars(args).items() if v != math.inf}
            Path(args.json).write_text(json.dumps({"args": flags, **summary}, indent=1) + "\n")


if __name__ == "__main__":
    main()
