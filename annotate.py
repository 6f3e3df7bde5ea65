"""ASLAF, automatic step-level annotation and filtering: section 2.1 of the paper.

    python annotate.py                                     # the tiny world and its three LLMs
    python annotate.py --limit 2000 --samples 4 --split train --out rows.jsonl
    python annotate.py --labels soft --out soft.jsonl      # y = c/k in place of right or wrong
    torchrun --nproc_per_node=8 annotate.py --policies A B C --task gsm8k --split train \\
        --limit 7473 --out rows.jsonl --resume
    python annotate.py --data prm800k.jsonl --task math500 --vote-labels --out aslaf.jsonl

1. Solutions   are sampled from the first LLM of --policies, or read from --data.
2. Annotation  monte_carlo: the value of a prefix x_1..x_t is the share of rollouts from it that
               end right. first_wrong_steps: a binary search for the first wrong step.
3. Filtering   consensus: each LLM of --policies, and --judge, looks for the first wrong step by
               itself. Solutions on which they do not agree are dropped.

--out gets the labelled solutions, rows for train.py; OUT.votes all solutions, with the votes or
why they were dropped. A first wrong step is counted from 0; -1: none; None: the voter abstains.
"""
import common.early  # noqa: F401  answers --help before what is slow to import
import itertools
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

from common import run, tasks
from common.data import first_wrong
from common.models import short_name
from common.policy import add_policy_flags, load_policy_flags
from common.solutions import collect, hard_labels, judge_votes, report, warn_if_none_is_right


def soft_label(c, k):
    return c / k      # the share of k rollouts from the prefix x_1..x_t that end right


def hard_label(c):
    return c > 0      # right if any of them ends right: [c > 0] = [c / k > 0]


def monte_carlo(policy, prefixes, k, early=True):  # README, step 2
    """Values of prefixes, c / k, by k rollouts of each (Wang et al. 2024, arXiv 2312.08935).

    early: stop at a prefix's first success: it settles the hard label, but makes c / n too high.
    """
    while unknown := [p for p in dict.fromkeys(prefixes) if p.n < k and not (early and p.c > 0)]:
        # Most good prefixes succeed at once, so draw 1 rollout, then 1, 2, 4 more of each.
        counts = [min(k - p.n, max(1, p.n)) if early else k - p.n for p in unknown]
        rollouts = []
        # All prefixes of all solutions share the batches, here and in the judge.
        for p, ends in zip(unknown, policy.complete([p.node for p in unknown], counts)):
            rollouts += [(p, policy.separator.join(end.steps())) for end in ends]
        verdicts = tasks.judge_many([(p.problem, text) for p, text in rollouts])
        for (p, _), verdict in zip(rollouts, verdicts):
            p.n += 1
            p.c += verdict.ok
            p.timeouts += verdict.why == "timeout"  # counts as wrong, and is reported
    return [soft_label(p.c, p.n) for p in prefixes]


def first_wrong_steps(paths, ends_right, estimate):  # README, step 3
    """The first wrong step of every solution by binary search (Luo et al. 2024, arXiv 2406.06592).

    paths       of each solution its prefixes; path[t] are the steps 0..t
    ends_right  of each solution; None: it breaks off before an answer
    estimate    prefixes -> values, as monte_carlo
    returns     (first wrong steps, values[i][t]); a value is None where none was needed
    Assumes that wrong stays wrong. Then at most ceil(log2 T) values, of T, find where it begins:
    T = 7 steps with a known end take 3 values, 24 rollouts at most of k = 8. With T = 4, a wrong
    end and V = 1, .5, 0: step 2 (from 0) is the first wrong one, and V(3) is not asked for.
    """
    values = [[None] * len(path) for path in paths]
    # The end of a solution needs no rollout: the judge has seen it. One that breaks off does.
    last = [len(path) - (right is not None) for path, right in zip(paths, ends_right)]
    low = [-1] * len(paths)  # the steps up to low are right
    high = list(last)  # the first wrong step is after low, and at most at high
    while halving := [i for i in range(len(paths)) if high[i] - low[i] > 1]:
        middle = [(low[i] + high[i]) // 2 for i in halving]
        # All solutions halve together, so that they share the batches of rollouts.
        estimates = estimate([paths[i][t] for i, t in zip(halving, middle)])
        for i, t, value in zip(halving, middle, estimates):
            values[i][t] = value
            if hard_label(value):
                low[i] = t
            else:
                high[i] = t
    # high has not moved: no prefix was wrong, so the end is the first wrong step, or nothing is
    clean = [right is not False and h == n for right, h, n in zip(ends_right, high, last)]
    return [-1 if all_right else h for all_right, h in zip(clean, high)], values


def linear_scan(paths, ends_right, estimate):
    """As first_wrong_steps, by the values of all prefixes: soft labels need every one."""
    unknown = [path[:len(path) - (right is not None)] for path, right in zip(paths, ends_right)]
    every = iter(estimate(list(itertools.chain.from_iterable(unknown))))
    places, values = [], []
    for path, prefixes, right in zip(paths, unknown, ends_right):
        known = list(itertools.islice(every, len(prefixes)))
        places.append(first_wrong([*map(hard_label, known), right]))
        values.append(known + [None] * (len(path) - len(known)))  # as above: not the end
    return places, values


def consensus(votes, how="all"):  # README, step 4
    """The first wrong step that enough voters name, or None: paper 2.1, "data filtering".

    "Only those *steps* where all LLMs agree on the error location are retained". We retain whole
    *solutions*: voters that name the same first wrong step agree on every step, and a PRM is
    trained on whole solutions. Where they differ, the steps before both places are lost.
    how: "all", "majority", or a number of voters. An abstention (None) agrees with nobody.
    """
    needed = {"all": len(votes), "majority": len(votes) // 2 + 1}.get(how) or int(how)
    counts = Counter(vote for vote in votes if vote is not None)
    place, count = max(counts.items(), key=lambda item: item[1], default=(None, 0))
    return place if count >= needed else None


# ---------------------------------------------------------------- one LLM's votes

@dataclass(eq=False)  # compared by identity: prefixes() makes equal prefixes one object
class Prefix:
    """The steps x_1..x_t of a solution, and the rollouts from there."""
    problem: tasks.Problem
    node: object       # x_t in the tree of an LLM: common/policy.py, Node
    n: int = 0         # rollouts drawn
    c: int = 0         # of these, how many end right
    timeouts: int = 0  # and how many the judge could not finish


def prefixes(policy, solutions):
    """For each solution its prefixes. Equal prefixes are one object, so they share rollouts."""
    tree, paths = {}, []
    for s in solutions:
        if s.problem.id not in tree:
            root = policy.root(s.problem.id, s.problem.question, s.problem.domain)
            tree[s.problem.id] = Prefix(s.problem, root)
        path = [tree[s.problem.id]]  # in one tree a problem, with one cache: common/cache.py
        for t, step in enumerate(s.steps, 1):
            key = (s.problem.id, *s.steps[:t])
            if key not in tree:
                tree[key] = Prefix(s.problem, policy.adopt(path[-1].node, step))
            path.append(tree[key])
        paths.append(path[1:])  # without the question
    return paths


def rollout_votes(policy, solutions, k=8, search=first_wrong_steps, early=True):
    """One LLM's votes on Solutions -> [{"first_error", "values", "rollouts", "timeouts"}]."""
    paths = prefixes(policy, solutions)
    estimate = partial(monte_carlo, policy, k=k, early=early)
    places, values = search(paths, [s.ends_right for s in solutions], estimate)
    votes = []
    for s, path, place, known in zip(solutions, paths, places, values):
        drawn = [p for p, value in zip(path, known) if value is not None]
        if s.ends_right is not None:
            known[-1] = float(s.ends_right)  # seen by the judge
        votes.append({"first_error": place, "values": known, "rollouts": sum(p.n for p in drawn),
                      "timeouts": sum(p.timeouts for p in drawn)})
    return votes


# ---------------------------------------------------------------- from solutions to labels

def write_solutions(sampler, groups):  # README, step 1
    """Step 1: sample the solutions that are not written yet. groups: of one problem each."""
    unwritten = [group for group in groups if group[0].steps is None]
    problems = [group[0].problem for group in unwritten]
    roots = [sampler.root(p.id, p.question, p.domain) for p in problems]
    for group, ends in zip(unwritten, sampler.complete(roots, [len(g) for g in unwritten])):
        for s, end in zip(group, ends):
            s.steps, s.end = end.steps(), end.end  # whole solutions, cut into steps


def why_dropped(s, earlier, unanimous):
    """Why solution s is not voted on, or None. earlier: the solutions of its problem before it;
    unanimous: all solutions of the problem are right, or all are wrong."""
    if not (s.problem.tests if s.problem.domain == "code" else s.problem.answer is not None):
        return "no answer is known"
    if s.end == "length":
        return "unfinished"
    if s.why == "timeout":
        return "the judge timed out"
    if s.steps in [other.steps for other in earlier]:
        return "duplicate"
    if len(s.steps) < 2:
        return "too short"  # its only step is as right as its answer
    if unanimous:  # too easy or too hard: such a problem teaches little
        return "always solved" if s.ends_right else "never solved"
    return None


def candidates(groups, separator, keep_unanimous=False):
    """Which solutions are voted on? Judges all, and says of the others why not."""
    solutions = list(itertools.chain.from_iterable(groups))
    texts = [(s.problem, separator.join(s.steps)) for s in solutions]
    for s, verdict in zip(solutions, tasks.judge_many(texts)):
        s.why = verdict.why
        # A given solution without an answer is the beginning of one: neither right nor wrong.
        s.ends_right = None if s.given and s.why == "no answer" else verdict.ok
    for group in groups:
        right = [s.ends_right for s in group]
        unanimous = len(group) > 1 and len(set(right)) == 1 and right[0] is not None
        for i, s in enumerate(group):
            s.dropped = why_dropped(s, group[:i], unanimous and not keep_unanimous)
    return [s for s in solutions if s.dropped is None]


def annotate(solutions, voters, judge=None, k=8, labels="hard", how="all", vote_labels=False):
    """Steps 2 and 3: voters {name: LLM}, the judge, who reads only, and the labels that came with
    the solutions (vote_labels) name first wrong steps; solutions on which they agree get labels."""
    if labels == "outcome":  # all steps as right as the answer (Cobbe et al., arXiv 2110.14168)
        voters = {}  # no rollouts
        for s in solutions:
            s.votes["answer"] = {True: -1, False: 0, None: None}[s.ends_right]
    # Hard labels need one border and one success; soft labels need k rollouts of every prefix.
    search, early = (linear_scan, False) if labels == "soft" else (first_wrong_steps, True)
    for s in solutions:
        if vote_labels and s.label is not None:
            s.votes["labels"] = s.label
    for name, policy in voters.items():
        for s, vote in zip(solutions, rollout_votes(policy, solutions, k, search, early)):
            s.votes[name] = vote["first_error"]
            s.voter_values.append(vote["values"])
            s.rollouts += vote["rollouts"]
            s.timeouts += vote["timeouts"]
    for s, place in zip(solutions, judge_votes(judge, solutions) if judge else ()):
        s.votes["judge"] = place
    for s in solutions:
        place = s.first_error = consensus(list(s.votes.values()), how)
        if place is None:
            s.dropped = "no consensus"
        else:  # hard: wrong stays wrong; soft: the mean c / k of all voters
            s.labels = s.values() if labels == "soft" else hard_labels(place, len(s.steps))


# ---------------------------------------------------------------- the command

def parse(argv):
    parser = run.command_line(__doc__)
    a = parser.add_argument
    policies = [str(run.TINY / x) for x in "ABC"]
    a("--policies", nargs="+", default=policies, help="the LLMs that vote; the first one samples")
    a("--judge", help="an instruction LLM that votes by reading the solution")
    a("--samples", type=int, default=4, help="solutions a problem (4)")
    a("--sampler-temperature", type=run.amount, help="of the solutions: hot for rare mistakes")
    a("--data", nargs="+", help="existing solutions to annotate: JSONL files or hub sets")
    a("--vote-labels", nargs="?", const="good", choices=["good", "bad", "drop"],
      help="the labels of --data vote, too, PRM800K's neutral rating counting as this (good)")
    a("--task", nargs="+", default=tasks.DEFAULT, help="tasks of common/tasks.py")
    a("--task-data", help="local file in place of the hub")
    a("--split", help="of --task (the tiny world: train)")
    a("--k", type=int, default=8, help="rollouts a prefix, at most (8)")
    a("--labels", choices=["hard", "soft", "outcome"], default="hard",
      help="soft: the values, c / k; outcome: the answer's for all steps, no rollouts (hard)")
    a("--consensus", default="all", help="all, majority, or a number of voters")
    a("--keep-unanimous", action="store_true", help="keep problems always or never solved")
    a("--concurrent", type=int, default=200, help="problems annotated together (200)")
    add_policy_flags(parser, without=["--separator"])
    run.add_run_flags(parser, limit=50)
    args = parser.parse_args(argv)
    if args.labels == "outcome":
        del args.policies[1:]  # nobody but the sampler is asked
    run.check_run_flags(parser, args, "k", "samples", "concurrent")
    most = len(args.policies) + bool(args.judge) + bool(args.vote_labels)
    if args.consensus not in ["all", "majority", *map(str, range(1, most + 1))]:
        parser.error(f"--consensus: all, majority, or 1 to {most}, not {args.consensus}")
    return parser, args


def load_voters(args, device):
    voters = {}  # by the name of the folder, or by the path where two folders share a name
    for i, path in enumerate(args.policies):
        names = [short_name(path), path, *(f"{path}#{n}" for n in range(2, i + 2))]
        name = next(name for name in names if name not in voters)
        # With the same random numbers, voters would be lucky and unlucky together.
        seed = f"{args.seed}#{i}" if i else args.seed
        voters[name] = load_policy_flags(args, device, path, seed=seed)
    return voters


def main(argv=None):
    parser, args = parse(argv)
    started = time.perf_counter()
    with parser:
        rank, _, device = run.distributed(args.device)
        groups = collect(args)
        voters = load_voters(args, device)
        sampler = next(iter(voters.values()))
        if (heat := args.sampler_temperature) is not None:
            sampler = load_policy_flags(args, device, args.policies[0], temperature=heat)
        judge = args.judge and load_policy_flags(  # one answer, not a solution in steps
            args, device, args.judge, temperature=0, max_steps=1)

        def make(groups):
            write_solutions(sampler, groups)
            solutions = candidates(groups, sampler.separator, args.keep_unanimous)
            warn_if_none_is_right(list(itertools.chain.from_iterable(groups)))
            annotate(solutions, voters, judge, args.k, args.labels, args.consensus,
                     args.vote_labels)
            return [s.record() for s in itertools.chain.from_iterable(groups)]
        run.same_flags(parser, args, models=run.served(*voters.values(), judge))
        # Appends each --concurrent problems, so that --resume continues after a kill.
        records = run.journaled(args.out and f"{args.out}.votes", groups, make,
                                lambda group: [s.id for s in group], args.concurrent, args.resume)
    if rank == 0:
        report(records, voters, args, time.perf_counter() - started)


if __name__ == "__main__":
    main()
