"""Plumbing of annotate.py: where solutions come from, and what becomes of them."""
import itertools
import json
import re
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common import tasks
from common.data import first_wrong, plain, read_set
from common.driver import warn_once
from common.formats.loaders import gold_answer
from common.models import short_name
from common.run import expect, write_rows


@dataclass(eq=False)
class Solution:
    """A solution of a problem on its way to labels: what annotate.py fills in, field by field."""
    problem: tasks.Problem
    id: str = ""
    source: str = ""
    steps: list | None = None        # None: still to be sampled
    ends_right: bool | None = None   # None: breaks off before an answer
    end: str | None = None           # as Node.end
    given: bool = False              # from --data
    label: int | None = None         # the first wrong step by the labels that --data brings
    why: str = ""                    # the judge's words: common/tasks.py, Verdict
    votes: dict = field(default_factory=dict)         # {voter: first wrong step}
    voter_values: list = field(default_factory=list)  # of each voter c / k of every prefix
    rollouts: int = 0
    timeouts: int = 0
    dropped: str | None = None       # the reason; None: kept
    first_error: int | None = None   # by consensus
    labels: list | None = None

    def values(self):
        """The mean over voters of each prefix's value, None where no voter needed it."""
        means = []
        for values in zip(*self.voter_values):
            known = [v for v in values if v is not None]
            means.append(round(statistics.fmean(known), 4) if known else None)
        return means or [None] * len(self.steps)

    def record(self):
        """A line of OUT.votes, and of OUT if it is kept."""
        return {"id": self.id, "domain": self.problem.domain, "source": self.source,
                "prompt": self.problem.question, "completions": self.steps, "labels": self.labels,
                "correct": self.ends_right, "why": self.why, "votes": self.votes,
                "first_error": self.first_error, "values": self.values(),
                "rollouts": self.rollouts, "timeouts": self.timeouts, "dropped": self.dropped}


def hard_labels(place, T):
    """The labels of T steps by the first wrong one: wrong stays wrong."""
    return [place < 0 or t < place for t in range(T)]


# ---------------------------------------------------------------- where solutions come from

def collect(args):
    """The solutions of each problem, by the flags of annotate.py -> [[Solution, ...], ...]."""
    problems = []
    for task in tasks.each(args.task, args.task_data):
        tiny, limit = task.startswith("tiny"), args.limit
        if args.data:  # a row may be about any problem; but those of the tiny world have no end
            limit = max(100, args.limit) if tiny else None
        split = args.split or ("train" if tiny else None)
        problems += tasks.load(task, args.task_data, split, limit, args.seed)
    if args.data:
        return given_solutions(args.data, problems, args.limit, args.vote_labels or "good")
    source = f"sampled from {short_name(args.policies[0])}"
    groups = []
    for p in problems:
        groups.append([Solution(p, f"{p.id}-{i}", source) for i in range(args.samples)])
    return groups


def given_solutions(files, problems, limit=None, neutral="good"):
    """The rows of existing sets, the solutions of one problem together.

    A row's problem is the one with its question, or the row brings an "answer" of its own.
    limit: rows of each file; neutral: what PRM800K's neutral rating counts as.
    """
    known = {plain(p.question): p for p in problems}
    groups, used = {}, Counter()
    for file in files:
        for where, row in itertools.islice(read_set(file, neutral), limit):
            domain = row.get("domain") or "math"
            expect(domain in ("math", "code") and isinstance(row.get("id", ""), (str, int)),
                   f"{where}: domain: math or code is expected, id: a text")
            question = plain(row["prompt"])
            if question not in known:
                known[question] = tasks.Problem(f"q{len(known)}", row["prompt"], domain)
            problem = known[question]
            if problem.answer is None and row.get("answer") is not None:
                problem.answer = gold_answer(row["answer"])
            name = row.get("id") or where
            used[name] += 1
            if used[name] > 1:  # a PRM800K record has many rows, and two files may share ids
                name = f"{name}#{used[name]}"
            groups.setdefault(question, []).append(
                Solution(problem, name, row.get("source") or file, row["completions"],
                         given=True, label=first_wrong(row["labels"])))
    expect(groups, f"{' '.join(files)}: no rows")
    return list(groups.values())


def warn_if_none_is_right(solutions):
    """A gold answer of a form that no LLM gives makes all solutions wrong: say so before hours."""
    if len(solutions) >= 20 and not any(s.ends_right for s in solutions):
        first = solutions[0]
        expected = str(first.problem.answer or "to pass its tests")[-60:]
        warn_once(f"warning: none of the first {len(solutions)} solutions is right. To "
                  f"{first.problem.id} {expected!r} is expected, the first solution ends in "
                  f"{''.join(first.steps)[-60:]!r}")


# ---------------------------------------------------------------- an LLM that reads solutions

def judge_votes(policy, solutions):
    """An instruction LLM names first wrong steps, in one greedy answer a solution (paper 3.1)."""
    roots = []
    for i, s in enumerate(solutions):
        numbered = "\n\n".join(f"Step {t}: {step}" for t, step in enumerate(s.steps, 1))
        question = f"Problem: {s.problem.question}\n\n{numbered}"
        roots.append(policy.root(f"{s.problem.id} {i}", question, "judge"))
    answers = ["\n".join(end.steps()) for [end] in policy.complete(roots, 1)]
    return [parse_verdict(text, len(s.steps)) for text, s in zip(answers, solutions)]


def parse_verdict(text, T):
    """"... First wrong step: 3" -> 2; "First wrong step: none" -> -1; anything else, or a step
    that is not there, is an abstention (None). The last line counts, and must hold no more."""
    line = text.strip().rpartition("\n")[2]
    match = re.fullmatch(r"\W*first wrong step:?\W*(\d+|none)\W*", line, re.IGNORECASE)
    if match is None:
        return None
    if match[1].lower() == "none":
        return -1
    return int(match[1]) - 1 if 1 <= int(match[1]) <= T else None


# ---------------------------------------------------------------- what became of them

def counts(voted):
    """What became of solutions that were voted on."""
    kept = [r for r in voted if not r["dropped"]]
    return {"voted on": len(voted), "kept": len(kept),
            "share": round(len(kept) / max(1, len(voted)), 4),
            "labels": sum(len(r["labels"]) for r in kept),
            "with an error": sum(r["first_error"] >= 0 for r in kept)}


def counts_by(voted, key):
    """{value of key: counts of the solutions that have it}"""
    groups = {}
    for r in voted:
        groups.setdefault(r[key], []).append(r)
    return {name: counts(group) for name, group in sorted(groups.items())}


def agreement(voted, names):
    """{"A / B": the share of solutions on which A and B vote the same}, where nobody abstains."""
    # otherwise pairs would be compared on different solutions
    votes = [r["votes"] for r in voted if None not in map(r["votes"].get, names)]
    shares = {}
    for a, b in itertools.combinations(names, 2) if votes else ():
        shares[f"{a} / {b}"] = round(statistics.fmean(v[a] == v[b] for v in votes), 4)
    return shares


def summarise(records):
    """Figures of all solutions: how many were kept, why others were dropped, who agrees."""
    voted = [r for r in records if r["votes"]]
    names = list(dict.fromkeys(itertools.chain.from_iterable(r["votes"] for r in voted)))
    abstentions = Counter()
    for r in voted:
        abstentions.update(name for name in names if r["votes"].get(name) is None)
    return {"solutions": len(records), **counts(voted),
            "dropped": Counter(r["dropped"] for r in records if r["dropped"]),
            "verdicts": Counter(r["why"] for r in records),
            "by domain": counts_by(voted, "domain"), "by source": counts_by(voted, "source"),
            "two voters agree": agreement(voted, names), "abstentions": abstentions,
            "timeouts": sum(r["timeouts"] for r in records),
            "rollouts": sum(r["rollouts"] for r in records)}


def show(record):
    """Print one labelled solution."""
    print(f"\n{record['prompt']}")
    for label, step in zip(record["labels"], record["completions"]):
        sign = f"{label:.2f}"  # a soft label
        if isinstance(label, bool):
            sign = "+" if label else "-"
        print(f"  {sign} {step}")
    votes = ", ".join(f"{name} {place}" for name, place in record["votes"].items())
    print(f"first wrong step, counted from 0: {votes}\n")


def table(summary):
    """Print the summary in a few lines."""
    print(f"{'':<24}{'voted on':>10}{'kept':>8}{'share':>8}{'steps':>8}{'with an error':>15}")
    for name, n in [*summary["by domain"].items(), *summary["by source"].items()]:
        print(f"  {name[-22:]:<22}{n['voted on']:>10}{n['kept']:>8}{n['share']:>8.2f}"
              f"{n['labels']:>8}{n['with an error']:>15}")
    reasons = ", ".join(f"{n} {why}" for why, n in summary["dropped"].items())
    print(f"{summary['solutions']} solutions, dropped: {reasons or 'none'}")
    for title in ("two voters agree", "abstentions"):
        if figures := summary[title]:
            print(f"{title}: " + ", ".join(f"{name} {x:.3g}" for name, x in figures.items()))
    speed = ""
    if "seconds per label" in summary:
        speed = f", {summary['seconds per label']:.3f} s a labelled step"
    print(f"{summary['rollouts']:,} rollouts ({summary['timeouts']} timed out), "
          f"{summary['rollouts per solution and LLM']:.1f} a solution and LLM; this run: "
          f"{summary['tokens generated']:,} tokens generated, {summary['seconds']:.0f} s{speed}")


def report(records, voters, args, seconds):
    """Write the labelled solutions and the summary. Tokens are those of this process alone."""
    kept = [r for r in records if not r["dropped"]]
    summary, seconds = summarise(records), round(seconds, 1)
    votes = summary["voted on"] * len(voters)
    summary |= {"rollouts per solution and LLM": summary["rollouts"] / max(1, votes),
                "tokens generated": sum(p.generated for p in voters.values()),
                "tokens prefilled": sum(p.prefilled for p in voters.values()),
                "seconds": seconds}
    if summary["labels"] and not args.resume:  # these are of all runs
        summary["seconds per label"] = seconds / summary["labels"]
    if erroneous := [r for r in kept if r["first_error"] >= 0]:
        show(erroneous[0])  # one to look at
    table(summary)
    if args.out:
        write_rows(args.out, kept)
        print(f"written: {args.out}, {len(kept)} labelled solutions; {args.out}.votes, all votes")
    else:
        print("nothing is written: pass --out FILE to keep the labels")
    if args.json:
        Path(args.json).write_text(json.dumps({"args": vars(args), **summary}, indent=1) + "\n")
