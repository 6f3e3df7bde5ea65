"""ASLAF, automatic step-level annotation and filtering: §2.1 of the paper.

    python annotate.py                                                   # the tiny world and its three LLMs
    python annotate.py --limit 2000 --samples 4 --split train --out rows.jsonl       # rows for train.py
    torchrun --nproc_per_node=8 annotate.py --policies A B C --task gsm8k --split train --limit 7473 \\
        --out rows.jsonl --resume
    python annotate.py --data phase2_train.jsonl math-shepherd.jsonl --limit 400000 --task math500 --vote-labels \\
        --out aslaf.jsonl

1. Tasks      problems of common/tasks.py, and solutions: sampled from an LLM (--sampler), or existing rows (--data).
2. Labels     the value of a prefix x_1..x_t is the share of k rollouts from it that end right (Monte-Carlo estimate);
              its hard label says whether any did (Wang et al. 2024, arXiv 2312.08935). A binary search finds the first
              wrong step, on the assumption that wrong stays wrong (Luo et al. 2024, arXiv 2406.06592).
3. Filtering  each LLM (--policies), and an LLM as a judge (--judge), finds the first wrong step by itself; only
              solutions of which they agree are kept (--consensus).

--out gets the kept solutions as stepwise rows (format: common/data.py). Beside it, OUT.votes has one line for every
solution that was looked at, with its votes and, if it was dropped, the reason; from it --resume goes on after a kill.
Rollouts depend on the seed, the problem and the prefix alone: not on what else is in the batch, nor on the ranks.

A first wrong step is counted from 0; -1 means that there is none (as in ProcessBench), None that a voter abstains.
"""
import itertools
import json
import math
import random
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common import tasks
from common.data import first_wrong, read_set
from common.policy import add_policy_flags, load_policy_flags
from common.run import (
    TINY,
    add_run_flags,
    check_run_flags,
    command_line,
    distributed,
    journaled,
    same_flags,
    write_rows,
)

# ---------------------------------------------------------------- where is the first wrong step?

def binary_search(T, ends_right, verify_neighbours=False):
    """Generator: yields t ("is the prefix of steps 0..t still good?"), is sent a bool; returns the first wrong step.

    The whole solution needs no rollout: its value is known. T - 1 prefixes are open, so that there are T outcomes, and
    ceil(log2 T) questions find one. verify_neighbours asks about one prefix more on either side: if wrong does not stay
    wrong there, the voter abstains.
    """
    good, bad = -1, T - 1  # "bad" may be the end of a right solution: then no step is wrong
    while bad - good > 1:
        t = (good + bad) // 2
        if (yield t):
            good = t
        else:
            bad = t
    if verify_neighbours:
        for t, expected in ((good - 1, True), (bad + 1, False)):
            if 0 <= t < T - 1 and (yield t) != expected:
                return None
    return -1 if bad == T - 1 and ends_right else bad


def linear_scan(T, ends_right, verify_neighbours=False):
    """The same by asking about every prefix, in order: all values are known afterwards."""
    answers = []
    for t in range(T - 1):
        answers.append((yield t))
    return first_wrong([*answers, ends_right])


SEARCHES = {"binary": binary_search, "linear": linear_scan}


# ---------------------------------------------------------------- Monte-Carlo estimates

@dataclass(eq=False)
class Prefix:
    """The first steps of a solution as a node of an LLM's tree, and how the rollouts from it have ended so far."""
    node: object
    problem: object
    outcomes: list = field(default_factory=list)
    timeouts: int = 0


def settled(outcomes, k, stop="hard", threshold=0.0, width=0.15):
    """Do these rollouts suffice? A prefix is good when more than `threshold` of k rollouts end right (0: any).

    stop: "none" draws all k; "hard" ends when the rest cannot change that verdict, at no loss; "soft" ends when half
    of the value's 95 % Wilson interval is at most `width`.
    """
    n, right = len(outcomes), sum(outcomes)
    if n >= k:
        return True
    if stop == "hard":
        return right > threshold * k or right + (k - n) <= threshold * k
    if stop == "soft" and n:
        v, z = right / n, 1.96
        return z / (1 + z * z / n) * math.sqrt(v * (1 - v) / n + z * z / (4 * n * n)) <= width
    return False


def vote(policy, solutions, k=8, search="binary", stop="hard", threshold=0.0, width=0.15, verify_neighbours=False):
    """One LLM's opinion of many solutions -> [{"first_error", "values", "rollouts", "timeouts"}], values[t] None where
    not asked; a rollout that the judge could not finish counts as wrong, and as a timeout.

    solutions: [(problem, steps, ends_right)]; ends_right None: it breaks off before an answer, and so its last step is
    asked about, too. Rollouts of all prefixes, solutions and problems share their batches; equal prefixes share their
    rollouts, and all prefixes of a problem share the tree cache (common/cache.py). With early stopping the rollouts
    are drawn in rounds of 1, 1, 2, 4, ...
    """
    prefixes, plans, asking, out = {}, [], {}, []

    def prefix(problem, steps):
        key = (problem.id, *steps)
        if key not in prefixes:
            prefixes[key] = Prefix(policy.adopt(prefix(problem, steps[:-1]).node, steps[-1]) if steps else
                                   policy.root(problem.id, problem.question, problem.domain), problem)
        return prefixes[key]

    def advance(i, answer):
        problem, steps, _ = solutions[i]
        try:
            t = plans[i].send(answer)
            asking[i] = (t, prefix(problem, steps[:t + 1]))
        except StopIteration as end:
            out[i]["first_error"] = end.value
            asking.pop(i, None)

    for i, (_, steps, ends_right) in enumerate(solutions):
        open_end = ends_right is None  # as if another step followed, which is right whenever the last one is
        plans.append(SEARCHES[search](len(steps) + open_end, open_end or ends_right, verify_neighbours))
        out.append({"first_error": None, "rollouts": 0, "timeouts": 0,
                    "values": [None] * (len(steps) - 1) + [None if open_end else float(ends_right)]})
        advance(i, None)
    while asking:
        open_ = list({p: None for _, p in asking.values() if not settled(p.outcomes, k, stop, threshold, width)})
        counts = [k - len(p.outcomes) if stop == "none" else min(k - len(p.outcomes), max(1, len(p.outcomes)))
                  for p in open_]
        ends = policy.complete([p.node for p in open_], counts)
        texts = [(p.problem, policy.separator.join(end.steps())) for p, group in zip(open_, ends) for end in group]
        verdicts = iter(tasks.judge_many(texts))
        for p, group in zip(open_, ends):
            new = [next(verdicts) for _ in group]
            p.outcomes += [v.ok for v in new]
            p.timeouts += sum(v.why == "timeout" for v in new)
        for i in list(asking):
            while i in asking and settled(asking[i][1].outcomes, k, stop, threshold, width):
                t, p = asking[i]
                out[i]["values"][t] = statistics.fmean(p.outcomes)
                out[i]["rollouts"] += len(p.outcomes)
                out[i]["timeouts"] += p.timeouts
                advance(i, sum(p.outcomes) > threshold * (len(p.outcomes) if stop == "soft" else k))
    return out


# ---------------------------------------------------------------- an LLM as the judge

def ask_judge(policy, solutions):
    """§3.1: an instruction LLM names the first wrong step -> [first error or None]. One greedy answer a solution."""
    roots = []
    for i, (problem, steps, _) in enumerate(solutions):
        numbered = "\n\n".join(f"Step {t}: {s}" for t, s in enumerate(steps, 1))
        roots.append(policy.root(f"{problem.id} {i}", f"Problem: {problem.question}\n\n{numbered}", "judge"))
    return [parse_verdict("\n".join(end.steps()), len(s[1])) for s, [end] in zip(solutions, policy.complete(roots, 1))]


def parse_verdict(text, T):
    """"... First wrong step: 3" -> 2; "First wrong step: none" -> -1; anything else, or a step that is not there, is
    an abstention (None). Only the last line counts, and it must hold nothing else."""
    last = text.strip().rpartition("\n")[2]
    found = re.fullmatch(r"\W*first wrong step:?\W*(\d+|none)\W*", last, re.IGNORECASE)
    if found is None:
        return None
    if found[1].lower() == "none":
        return -1
    return int(found[1]) - 1 if 1 <= int(found[1]) <= T else None


# ---------------------------------------------------------------- consensus and agreement

def consensus(votes, how="all"):
    """The first wrong step that enough voters name, or None. how: "all", "majority", or a number of voters."""
    needed = {"all": len(votes), "majority": len(votes) // 2 + 1}.get(how) or int(how)
    [(place, count)] = Counter(v for v in votes if v is not None).most_common(1) or [(None, 0)]
    return place if count >= needed else None


def fleiss_kappa(table):
    """Agreement beyond chance of n raters on items; table: one list of n votes an item (Fleiss 1971,
    doi 10.1037/h0031619). 1: always agree, 0: as often as by chance. None without two raters and two categories."""
    n = len(table[0]) if table else 0
    if n < 2:
        return None
    observed = statistics.fmean((sum(c * c for c in Counter(votes).values()) - n) / (n * (n - 1)) for votes in table)
    chance = sum((c / (n * len(table))) ** 2 for c in Counter(itertools.chain(*table)).values())
    return None if chance == 1 else (observed - chance) / (1 - chance)


# ---------------------------------------------------------------- from problems to rows

def annotate(jobs, voters, judge, args):
    """jobs: [(problem, [(id, steps, end, source, own first error)])] -> one record a solution (see the top). end: as
    Node.end, or "given" for a solution of --data, which may break off before its answer."""
    records, todo = [], []
    judged = iter(tasks.judge_many([(p, args.join.join(steps)) for p, solutions in jobs for _, steps, *_ in solutions]))
    for problem, solutions in jobs:
        verdicts, seen = [next(judged) for _ in solutions], set()
        # a given solution may be the beginning of one, as PRM800K's rated alternatives are
        right = [None if s[2] == "given" and v.why == "no answer" else v.ok for s, v in zip(solutions, verdicts)]
        for (name, steps, end, source, own), verdict, ends_right in zip(solutions, verdicts, right):
            known = problem.tests if problem.domain == "code" else problem.answer is not None
            reason = ("no answer is known" if not known else "unfinished" if end == "length" else
                      "the judge timed out" if verdict.why == "timeout" else
                      "duplicate" if tuple(steps) in seen else
                      "too short" if len(steps) < args.min_steps else "too long" if len(steps) > args.longest else
                      f"{'always' if right[0] else 'never'} solved" if len(set(right)) == 1 and len(right) > 1
                      and ends_right is not None and not args.keep_unanimous else None)
            seen.add(tuple(steps))
            records.append({"id": name, "domain": problem.domain, "source": source, "prompt": problem.question,
                            "completions": steps, "correct": ends_right, "why": verdict.why, "votes": {},
                            "values": [None] * len(steps), "rollouts": 0, "timeouts": 0, "dropped": reason})
            if reason is None:
                todo.append((records[-1], (problem, steps, ends_right)))
                if args.vote_labels and own is not None:
                    records[-1]["votes"]["labels"] = own
    options = {x: getattr(args, x) for x in ("k", "search", "stop", "threshold", "width", "verify_neighbours")}
    for name, policy in voters.items():
        for (record, _), mine in zip(todo, vote(policy, [s for _, s in todo], **options)):
            record["votes"][name] = mine["first_error"]
            record["rollouts"] += mine["rollouts"]
            record["timeouts"] += mine["timeouts"]
            record.setdefault("by", []).append(mine["values"])
    if judge is not None:
        for (record, _), place in zip(todo, ask_judge(judge, [s for _, s in todo])):
            record["votes"]["judge"] = place
    for record, _ in todo:
        values = [[v for v in at if v is not None] for at in zip(*record.pop("by"))]
        record["values"] = [round(statistics.fmean(at), 4) if at else None for at in values]
        record["first_error"] = place = consensus(list(record["votes"].values()), args.consensus)
        if place is None:
            record["dropped"] = "no consensus"
        elif args.labels == "soft":
            record["labels"] = record["values"]
        else:
            record["labels"] = [place < 0 or t < place for t in range(len(record["completions"]))]
    return records


def balance(records, seed):
    """Drop solutions, at random, until each domain has as many without an error as with one."""
    for domain in {r["domain"] for r in records}:
        kept = [r for r in records if r["domain"] == domain and not r["dropped"]]
        sides = [[r for r in kept if (r["first_error"] < 0) == right] for right in (True, False)]
        fewest = min(map(len, sides))
        for side in sides:
            for r in random.Random(f"{seed} {domain}").sample(side, len(side) - fewest):
                r["dropped"] = "balance"


def summarise(records, voters):
    """What was kept and dropped, how well the voters agree, and what it cost. Costs of tokens are of this process."""
    voted = [r for r in records if r["votes"]]
    names = list(voted[0]["votes"]) if voted else []
    tables = [[r["votes"].get(n) for n in names] for r in voted]
    tables = [t for t in tables if None not in t]
    kept = [r for r in records if not r["dropped"]]

    def share(key):
        sizes = Counter(key(r) for r in voted)
        return {str(x): round(Counter(key(r) for r in kept)[x] / sizes[x], 4) for x in sorted(sizes)}
    return {"solutions": len(records), "voted on": len(voted), "kept": len(kept),
            "labels": sum(len(r["labels"]) for r in kept), "solutions with an error": sum(
                r["first_error"] >= 0 for r in kept),
            "dropped": dict(Counter(r["dropped"] for r in records if r["dropped"])),
            "verdicts": dict(Counter(r["why"] for r in records)), "timeouts": sum(r["timeouts"] for r in records),
            "kept by source": share(lambda r: r["source"]), "kept by domain": share(lambda r: r["domain"]),
            "kept by steps": share(lambda r: len(r["completions"])),
            "agreement": {f"{a} / {b}": round(statistics.fmean(t[i] == t[j] for t in tables), 4)
                          for (i, a), (j, b) in itertools.combinations(enumerate(names), 2)} if tables else {},
            "abstentions": {n: sum(r["votes"].get(n) is None for r in voted) for n in names},
            "Fleiss' kappa": fleiss_kappa(tables),
            "rollouts": sum(r["rollouts"] for r in records),
            "rollouts per solution and LLM": sum(r["rollouts"] for r in voted) / max(1, len(voted) * len(voters)),
            "tokens generated": sum(p.generated for p in voters.values()),
            "tokens prefilled": sum(p.prefilled for p in voters.values())}


def collect(args):
    """[(problem, None)] to sample solutions of, or [(problem, solutions)] of --data, each (id, steps, end, source,
    own first error). A row's problem is found by its question among --task's problems, or it brings its "answer"."""
    problems = []
    for task in args.task:
        tiny = task.startswith("tiny")
        limit = args.limit if not args.data else max(100, args.limit) if tiny else None  # the tiny world has no end
        problems += tasks.load(task, args.task_data, args.split or ("train" if tiny else None), limit, args.seed)
    if not args.data:
        return [(p, None) for p in problems]
    known = {" ".join(p.question.split()): p for p in problems}
    found, used = {}, Counter()
    for file in args.data:
        for where, row in itertools.islice(read_set(file, args.format, args.neutral), args.limit):
            if row.get("domain") not in (None, "math", "code") or not isinstance(row.get("id", ""), (str, int)):
                raise ValueError(f"{where}: domain: math or code is expected, id: a text")
            question = " ".join(row["prompt"].split())
            if question not in known:
                known[question] = tasks.Problem(f"q{len(known)}", row["prompt"], row.get("domain") or "math")
            if known[question].answer is None and row.get("answer") is not None:
                known[question].answer = str(row["answer"])
            name = row.get("id") or where
            used[name] += 1
            if used[name] > 1:  # a PRM800K record has many rows, and two files may use the same ids
                name = f"{name}#{used[name]}"
            found.setdefault(question, []).append((name, row["completions"], "given", row.get("source") or file,
                                                   first_wrong(row["labels"])))
    return [(known[q], solutions) for q, solutions in found.items()]


def parse(argv):
    parser = command_line(__doc__)
    a = parser.add_argument
    a("--policies", nargs="+", default=[str(TINY / x) for x in "ABC"], help="the LLMs that roll out and vote")
    a("--judge", help="an instruction LLM that votes by reading the solution")
    a("--sampler", help="the LLM that writes the solutions (default: the first of --policies)")
    a("--sampler-temperature", type=float, help="of the solutions: higher for rarer mistakes (--temperature)")
    a("--samples", type=int, default=4, help="solutions a problem (4)")
    a("--data", nargs="+", help="existing solutions to annotate instead: JSONL files or hub sets")
    a("--format", choices=["auto", "stepwise", "prm800k", "math-shepherd"], default="auto", help="of --data")
    a("--neutral", choices=["good", "bad", "drop"], default="good", help="PRM800K's neutral rating")
    a("--vote-labels", action="store_true", help="the labels that --data brings are a voter, too")
    a("--task", nargs="+", default=["tiny-math", "tiny-code"], help="tasks of common/tasks.py")
    a("--task-data", help="local file instead of the hub")
    a("--split", help="of --task (the tiny world: train)")
    a("--k", type=int, default=8, help="rollouts a prefix, at most (8)")
    a("--search", choices=SEARCHES, default="binary")
    a("--verify-neighbours", action="store_true", help="abstain where wrong does not stay wrong")
    a("--stop", choices=["none", "hard", "soft"], default="hard", help="when to stop rolling out early (hard)")
    a("--threshold", type=float, default=0.0, help="a prefix is good when more of its rollouts end right (0)")
    a("--width", type=float, default=0.15, help="--stop soft: half the interval of the value (0.15)")
    a("--labels", choices=["hard", "soft"], default="hard", help="soft: the values (needs --search linear)")
    a("--consensus", default="all", help="all, majority, or a number of voters")
    a("--min-steps", type=int, default=2)
    a("--longest", type=int, default=64, help="steps of the longest solution kept (64)")
    a("--keep-unanimous", action="store_true", help="keep problems whose samples are all right or all wrong")
    a("--balance", action="store_true", help="as many solutions with as without an error")
    a("--concurrent", type=int, default=200, help="problems annotated together (200)")
    add_policy_flags(parser)
    add_run_flags(parser, limit=50)
    args = parser.parse_args(argv)
    check_run_flags(parser, args, "k", "samples", "concurrent")
    voters = len(args.policies) + bool(args.judge) + args.vote_labels
    if args.consensus not in ("all", "majority") and not (args.consensus.isdigit()
                                                          and 1 <= int(args.consensus) <= voters):
        parser.error(f"--consensus: all, majority, or 1 to {voters}, not {args.consensus}")
    if args.labels == "soft" and (args.search != "linear" or args.stop == "hard"):
        parser.error("--labels soft needs every value: --search linear --stop none (or soft)")
    return parser, args


def main(argv=None):
    parser, args = parse(argv)
    started = time.perf_counter()
    with parser:
        rank, _, device = distributed(args.device)
        jobs = collect(args)
        voters = {}
        for i, path in enumerate(args.policies):
            name = next(x for x in (Path(path).name, path, *(f"{path}#{n}" for n in range(2, 99))) if x not in voters)
            # Each voter has random numbers of its own: by the same ones they would be lucky and unlucky together.
            voters[name] = load_policy_flags(args, device, path, seed=f"{args.seed}#{i}" if i else args.seed)
        sampler = next(iter(voters.values()))
        if args.sampler or args.sampler_temperature is not None:
            heat = args.temperature if args.sampler_temperature is None else args.sampler_temperature
            sampler = load_policy_flags(args, device, args.sampler or args.policies[0], temperature=heat)
        judge = load_policy_flags(args, device, args.judge, temperature=0, max_steps=1) if args.judge else None
    args.join = sampler.separator
    source = f"sampled from {Path(args.sampler or args.policies[0]).name}"

    def names(job):
        problem, given = job
        return [s[0] for s in given] if given else [f"{problem.id}-{i}" for i in range(args.samples)]

    def make(some):
        fresh = [sampler.root(p.id, p.question, p.domain) for p, given in some if given is None]
        groups = iter(sampler.complete(fresh, args.samples))
        return annotate([(p, given or [(f"{p.id}-{i}", end.steps(), end.end, source, None)
                                       for i, end in enumerate(next(groups))]) for p, given in some],
                        voters, judge, args)
    with parser:
        same_flags(parser, args)
        records = journaled(f"{args.out}.votes" if args.out else None, jobs, make, names, args.concurrent, args.resume)
    if rank == 0:
        if args.balance:
            balance(records, args.seed)
        kept = [r for r in records if not r["dropped"]]
        if args.out:
            write_rows(args.out, [{k: r[k] for k in ("id", "domain", "source", "prompt", "completions", "labels",
                                                     "values", "rollouts", "votes", "first_error")} for r in kept])
        summary = {**summarise(records, voters), "seconds": round(time.perf_counter() - started, 1)}
        summary["seconds per label"] = summary["seconds"] / max(1, summary["labels"])
        for r in [r for r in kept if r["first_error"] >= 0][:1]:  # one to look at
            steps = "\n".join(f"  {'+' if y else '-'} {step}" for step, y in zip(r["completions"], r["labels"]))
            print(f"\n{r['prompt']}\n{steps}\n  first wrong step, from 0: {r['votes']}\n")
        print("\n".join(f"{key}: {value}" for key, value in summary.items()))
        if args.json:
            Path(args.json).write_text(json.dumps({"args": vars(args), **summary}, indent=1) + "\n")


if __name__ == "__main__":
    main()
