"""Sets of solutions with a known first wrong step: read, drawn, scored, and split in two."""
import hashlib
import math
import statistics
from itertools import accumulate

from common import tasks
from common.data import first_wrong, read_rows, read_set
from common.run import expect, journaled, located

PROCESSBENCH = ("gsm8k", "math", "olympiadbench", "omnimath")


def read_first_errors(args):
    """{name: [(question, steps, first wrong step or -1, row)]} of the sets of --first-error.

    A set is a file or hub set of step labels in any schema of common/data.py, or processbench:
    its four splits, or one of them: processbench:math. --limit: that many of each, drawn at random.
    """
    sets = {}
    for name in args.first_error:
        task, _, split = name.partition(":")
        if task not in tasks.TASKS:
            rows = tasks.drawn([row for _, row in read_set(name)], args.limit, args.seed)
            # labels of each step, as of PRM800K or Math-Shepherd: the first below 0.5
            sets[name] = [(r["prompt"], r["completions"], first_wrong(r["labels"]), r)
                          for r in rows]
            continue
        expect(task == "processbench", f"--first-error {name}: rows without a first error")
        # the four splits are four files on the hub; a local file is one of them
        for part in [split] if split or args.data else PROCESSBENCH:
            problems = tasks.load(task, args.data, part or None, args.limit, args.seed)
            sets[part or name] = [(p.question, p.meta["steps"], p.meta["label"], {})
                                   for p in problems]
    return sets


def score_first_errors(bench, args):
    """{name: [(question, p of each step, first wrong step or -1)]}: by --prm, or of --samples,
    whose rows {"id", "scores"} belong to the set's rows in any order."""
    # a PRM of others may not run here, but its scores are often published
    given = step_scores(args.samples) if args.samples else None
    scored = {}
    for name, items in read_first_errors(args).items():
        def score(numbers, items=items):
            questions, solutions, _, _ = zip(*(items[i] for i in numbers))
            scores = bench.prm(args.prm[0]).score(questions, solutions)
            return [{"id": i, "scores": p} for i, p in zip(numbers, scores)]
        if given is None:
            rows = journaled(None, range(len(items)), score, names=lambda i: [i],
                             chunk=args.concurrent, desc=f"first errors of {name}")
            scores = [row["scores"] for row in rows]
        else:
            scores = [of_steps(given, row, steps) for _, steps, _, row in items]
        scored[name] = [(q, p, y) for p, (q, _, y, _) in zip(scores, items)]
    return scored


def step_scores(file):
    """{id: scores} of rows {"id", "scores"}. ReasonEval has three classes: that a step is wrong,
    right, or right and needed; the last two are its validity."""
    scores = {}
    for number, row in read_rows(file):
        with located(f"{file}:{number}"):
            p = [sum(x[1:]) if isinstance(x, list) else x for x in row["scores"]]
            # ROSCOE's, say, are none, and a threshold of 0.5 would say nothing about them
            expect(all(0 <= x <= 1 + 1e-6 for x in p),  # also false for nan
                   "scores: a probability for each step is expected")
            scores[row["id"]] = p
    return scores


def of_steps(given, row, steps):
    """Scores of a row's steps; a step of several sentences is as good as the worst of them."""
    p = given.get(row.get("id"))
    expect(p is not None, f"--samples has no scores for id {row.get('id')!r}")
    # a PRM that judged whole steps has as many scores as steps
    if len(p) != len(steps) and "sentences" in row:
        ends = list(accumulate(row["sentences"]))
        p = [min(p[end - n:end], default=math.nan) for n, end in zip(row["sentences"], ends)]
    expect(len(p) == len(steps) and not any(map(math.isnan, p)),
           f"--samples, id {row.get('id')!r}: {len(p)} scores for {len(steps)} steps")
    return p


def halves(name, items):
    """([(p, y)] of one half, {question: [(p, y)]} of the other). A hash of the question decides:
    solutions of one problem stay together. ValueError: too few."""
    choose, test = [], {}
    for question, p, y in items:
        if hashlib.blake2b(question.encode()).digest()[0] % 2:
            test.setdefault(question, []).append((p, y))
        else:
            choose.append((p, y))
    expect(choose and test, f"{name}: {len(items)} solutions are too few to split; --threshold "
           "0.5 needs no other half")
    return choose, test


def with_mean(figures):
    """Adds the mean over several sets, of each share and of F1, as ProcessBench has it."""
    if len(figures) == 1:
        return figures
    means = {}
    for key in ("erroneous", "correct", "F1"):
        # the mean of the sets' F1, not the F1 of their means
        means[key] = statistics.fmean(f[key] or 0.0 for f in figures.values())
    return figures | {"mean": means}
