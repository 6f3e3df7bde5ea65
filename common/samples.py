"""Sample rows (format: common/data.py): anybody's are read, checked and judged; ours are made once.

A file is named by what it holds, as in best_of_n-16-tiny-A.jsonl; the settings that its rows depend
on stand beside it (.flags), and rows of other settings are refused, not mixed.
"""
import argparse
import hashlib
import math
import re
import sys
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch

from common import run, tasks
from common.data import plain, read_rows, texts
from common.formats.converters import one_a_problem, sample_row
from common.formats.loaders import own_row
from common.grading.judge import has_tests
from common.models import is_address
from common.policy import load_policy_flags
from common.run import expect, located
from common.server import identity

# ---------------------------------------------------------------- anybody's

def check_samples(row, scores):
    """Raise a ValueError that names what the metrics need and this row has not. Makes the samples'
    scores probabilities. scores: what they are, probabilities or logits; None: they are not read.
    """
    for key, kind in (("id", (str, int)), ("question", str), ("samples", list)):
        expect(isinstance(row.get(key), kind), f"no {key}")
    expect(row["samples"], "no samples: no solution was finished within its budget of tokens")
    expect(isinstance(row.get("tests") or {}, dict), "tests: an object is expected")
    expect(row.get("domain") in (None, "", "math", "code"),
           f"domain: math or code is expected, not {row.get('domain')!r}")
    picked, n = row.get("picked"), len(row["samples"])
    expect(picked is None or isinstance(picked, int) and 0 <= picked < n,
           f"picked: {picked!r} is no index of {n} samples")
    own_row(row, 0)  # a ValueError for tests of an unknown kind, or without inputs to try
    for sample in row["samples"]:
        expect(isinstance(sample, dict) and texts(sample.get("steps")),
               "a sample without steps, which are texts")
        sample["scores"] = probabilities(sample.get("scores"), scores, len(sample["steps"]))
        expect(sample.get("correct", False) in (True, False), "correct: true or false is expected")
        tokens = sample.get("tokens", 0)
        expect(isinstance(tokens, int) and tokens >= 0,
               f"tokens: a number from 0 upwards is expected, not {tokens!r}")
        expect(isinstance(sample.get("answer"), str | int | float | None),
               "answer: a text is expected, or null")
        # search.py --question writes that nothing is correct, since it has no answer
        expect("correct" in sample and "strategy" not in row or can_judge(row),
               "nothing to judge by: neither correct, nor an answer, nor tests; --task TASK "
               "[--data FILE] says where they are")


def probabilities(scores, kind, steps):
    """One for each step, or one in all, an outcome reward. None: no PRM has been there."""
    if kind is None or scores is None:
        return None
    expect(isinstance(scores, list) and all(isinstance(x, int | float | None) for x in scores),
           "scores: a list of numbers is expected, or null")
    expect(len(scores) in (1, steps), f"{len(scores)} scores for {steps} steps")
    if None in scores:
        return None
    expect(all(map(math.isfinite, scores)), "scores: a number is not finite")  # it has no rank
    if kind == "logits":
        scores = torch.tensor(scores, dtype=torch.double).sigmoid().tolist()
    for x in scores:
        expect(0 <= x <= 1, f"scores: {x} is no probability: --scores logits takes them for "
               "logits, p = 1 / (1 + exp(-x)); --score --prm PRM makes new ones")
    return scores


def can_judge(row):
    """Has this row, or problem as a dict, an answer or tests that try something?"""
    return has_tests(row.get("tests")) or row.get("answer") not in (None, "", [])


def read_samples(args):
    """Sample rows of --samples, anybody's (formats/converters.py). "correct" and "answer" may be
    missing: the judge gives them, by the row's answer or tests, or those of --task and --data."""
    file, rows, lines, known = args.samples, [], {}, {}
    # rows of the tiny world have their answers
    named = [task for task in tasks.each(args.task, args.data) if not task.startswith("tiny")]
    expect(named or not args.data,
           f"--data {args.data} beside --samples: --task says what it holds")
    for task in named:
        for p in tasks.load(task, args.data):
            # by id and by question: other projects number a set's problems in their own way
            known |= {p.id: p, plain(p.question): p}
    for number, row in one_a_problem(converted(file)):
        with located(f"{file}:{number}"):
            complete(row, known)
            check_samples(row, None if args.score else args.scores)
            expect(lines.setdefault(row["id"], number) == number,
                   f"id {row['id']!r} is that of line {lines[row['id']]}, too")
        row["domain"] = row.get("domain") or ("code" if row.get("tests") else "math")
        rows.append(row)
    expect(rows, f"{file}: no rows")
    return run.journaled(None, rows, judged, desc="judged")  # each rank its share


def converted(file):
    """Yield (line, sample row) of a file in any known form."""
    for number, row in read_rows(file):
        with located(f"{file}:{number}"):
            yield number, sample_row(row)


def complete(row, known):
    """Give a row what its problem has: the question, the answer or tests, and programs' steps."""
    key = row.get("id")
    problem = known.get(key if isinstance(key, int) else str(key))
    problem = problem or known.get(plain(str(row.get("question", ""))))
    programs = [s for s in row.get("samples") or () if isinstance(s, dict) and "steps" not in s
                and ("solution" in s or "completion" in s)]
    # of another set: to judge only the rest would change the figures
    expect(problem or not known, f"id {key!r}: no such problem in --task")
    expect(problem or not programs,
           "programs without tests: --task humaneval+ (or mbpp+, ...) [--data FILE]")
    if problem:
        row["question"], row["id"] = problem.question, problem.id
        for name in ("answer", "tests"):
            if row.get(name) is None and getattr(problem, name) is not None:
                row[name] = getattr(problem, name)
    for s in programs:  # a completion goes on from the prompt, in the middle of a function
        code = s.pop("solution", None) or problem.meta["prompt"] + s.pop("completion")
        s["steps"] = [f"```python\n{code}\n```"]


def judged(rows):
    """The rows, with "correct" and "answer" of each sample that had none."""
    unjudged, solutions = [], []
    for row in rows:
        new = [s for s in row["samples"] if not {"correct", "answer"} <= s.keys()]
        problem = own_row(row, 0)
        solutions += [(problem, "\n\n".join(s["steps"])) for s in new]
        unjudged += new
    keys = tasks.vote_keys(solutions)
    for s, verdict, key in zip(unjudged, tasks.judge_many(solutions), keys, strict=True):
        s["correct"], s["answer"] = s.get("correct", verdict.ok), s.get("answer", key)
    return rows


def measurable(rows, names, ns=None):
    """Those of the metrics that these rows have what it takes for; says what is left out.
    ValueError: fewer samples than the largest of ns."""
    say = print if run.is_first() else str  # each rank comes here
    fewest = min(len(row["samples"]) for row in rows)
    expect(not ns or max(ns) <= fewest, f"--N {max(ns or [0])}: a problem has {fewest} samples")
    samples = list(chain.from_iterable(row["samples"] for row in rows))
    lacking = sum(s["scores"] is None for s in samples)
    if lacking:
        say(f"{lacking} of {len(samples)} samples have no scores: no prm@N, no weighted vote "
            "(--score makes them)")
        names = [name for name in names if " by " not in name]
    elif any(len(s["scores"]) < len(s["steps"]) for s in samples):
        expect(all(len(s["scores"]) == 1 for s in samples),
               "some samples have a score for each step, others one in all")
        say("scores: one for each solution, an outcome reward; all aggregations are the same")
        first = next(name for name in names if name.startswith("prm by"))
        names = [name for name in names if not name.startswith("prm by") or name == first]
    if all(s["answer"] is None for s in samples):
        say("no sample has an answer: no vote")
        names = [name for name in names if "maj" not in name]
    return names


# ---------------------------------------------------------------- ours, made once

def name_of(path):
    """A short name of a model or file: the last two parts of its path, and of a folder a hash that
    tells x/a/prm from y/a/prm. tiny/A -> tiny-A; runs/a/prm -> a-prm-5d17"""
    name = re.sub(r"[^\w.+-]+", "-", "-".join(Path(path).parts[-2:]))
    if not Path(path).exists() or Path(path).resolve().parent == run.TINY:
        return name  # a hub id or an address, and what comes with the repository
    digest = hashlib.blake2b(str(Path(path).resolve()).encode(), digest_size=2)
    return f"{name}-{digest.hexdigest()}"


def written(path):
    """[path, when the file, or the weights in the folder, were written]: a model that was trained
    again under the same name is another. So is another one that a server has loaded."""
    if is_address(path):
        return [path, *identity(path)]
    path = Path(path)
    files = [path, *sorted(path.glob("*.safetensors"))]
    name = path.resolve() if path.exists() else path  # a hub id stays as it is
    return [str(name), *(f.stat().st_mtime_ns for f in files if f.is_file())]


def keep_one(load):
    """load(path), kept until another path is asked for: keeps one model in memory."""
    kept = {}

    def get(path):
        if path not in kept:
            kept.clear()  # the old model goes before the new one comes
            kept[path] = load(path)
        return kept[path]
    return get


def load_problems(args, rank):
    """The problems of --task; prints those whose own reference solutions fail: that is no model's
    fault. The tiny world makes a set of problems for each of args.seeds."""
    problems = []
    for task in tasks.each(args.task, args.data):
        for seed in args.seeds if task.startswith("tiny") and not args.data else [0]:
            problems += tasks.load(task, args.data, None, args.limit, seed)
    judged = [p for p in problems if can_judge(vars(p))]
    expect(judged, f"--task {' '.join(args.task)}: neither answers nor tests, nothing can be "
           "judged")
    code = [p for p in judged if (p.tests or {}).get("reference")]
    if rank == 0 and len(judged) < len(problems):
        print(f"left out, without answer and tests: {len(problems) - len(judged)} problems")
    if rank == 0 and code:
        tasks.print_references(code)
    return judged


class Bench:
    """Models and problems, loaded when first needed, and the rows that are made with them: once, in
    files of --out, which a run continues after a kill.

    load_prm and solve are given: prm_model.py and search.py stand above common/ and import it.
    """
    # the flags that all rows depend on, and those that a strategy's rows depend on; one of your own
    # depends on OTHERS, to which a flag of its own belongs, too
    SAMPLING = ("temperature", "top_p", "max_solution_tokens", "separator",
                "thinking", "dtype", "seed")
    SEARCHES = {"best_of_n": ("n", "tokens", "until"),
                "beam": ("k", "m", "textbook", "until"),
                "mcts": ("m", "simulations", "c", "textbook", "tokens", "until", "aggregate")}
    OTHERS = ("n", "k", "m", "simulations", "c", "textbook", "tokens", "until", "aggregate")

    def __init__(self, parser, args, load_prm, solve):
        self.parser, self.args, self.solve, self.made = parser, args, solve, set()
        self.rank, _, device = run.distributed(args.device)
        self.policy = keep_one(lambda path: load_policy_flags(args, device, path))
        self.prm = keep_one(lambda path: load_prm(path, device, args.dtype))

    @cached_property
    def problems(self):
        return load_problems(self.args, self.rank)

    def once(self, name, settings, items, make, names=None):
        """Rows of all items, from OUT/NAME.jsonl or by make(items), over all ranks.

        settings: dict of what the rows depend on beside the sampling flags and --data. --task and
        --limit are none of it: a file may hold the rows of more problems than are asked for.
        """
        args, file = self.args, Path(self.args.out) / f"{name}.jsonl"
        # with --overwrite a run makes each file once more, then shares it
        resume = not args.overwrite or file in self.made
        if resume and file.exists() and file not in self.made and self.rank == 0:
            print(f"{file} has rows already. After an edit of the code: --overwrite",
                  file=sys.stderr)
        self.made.add(file)
        settings = {**{flag: getattr(args, flag) for flag in self.SAMPLING}, **settings,
                    "data": args.data and written(args.data)}
        run.same_flags(self.parser, argparse.Namespace(**settings, out=str(file), resume=resume))
        return run.journaled(file, items, make, names, args.concurrent, resume, name)

    def run(self, strategy, policy, prm=None, budgets=None, **options):
        """Rows of a strategy; best_of_n without a PRM samples a pool for many PRMs to score.

        budgets: {problem id: generated tokens that it may cost}, for the problems named there.
        """
        args = argparse.Namespace(**{**vars(self.args), **options})
        prms = [prm] if prm else []
        # whoever reads the rows chooses: their "picked" is no setting
        flags = self.SEARCHES.get(strategy, self.OTHERS)
        settings = {name: vars(args).get(name) for name in flags}
        if settings["until"] < math.inf:  # which R_i ends the search
            settings["aggregate"] = args.aggregate
        settings |= {"policy": written(policy), "prm": [written(p) for p in prms]}
        sizes = {"best_of_n": args.n, "mcts": args.simulations}
        problems, size = self.problems, sizes.get(strategy, f"{args.k}x{args.m}")
        if "tokens" in settings and args.tokens < math.inf:
            size = f"{args.tokens}-tokens"
        if budgets is not None:
            problems, size = [p for p in problems if p.id in budgets], "tokens"
            settings["n"] = None

        def key(p):  # with the budget: another one makes another row
            return f"{p.id} {budgets[p.id]}" if budgets else p.id

        def make(problems):
            limits = [budgets[p.id] for p in problems] if budgets else None
            models = self.policy(policy), [self.prm(p) for p in prms]
            _, rows = self.solve(problems, strategy, *models, args, limits)
            return [row | {"id": key(p)} for row, p in zip(rows, problems)]
        name = "-".join([strategy, str(size), *map(name_of, [policy, *prms])])
        return self.once(name, settings, problems, make, lambda p: [key(p)])

    def same_tokens(self, pool, policy, prm, search):
        """The pool, with more samples until each problem has cost what its search did."""
        cost = {row["id"]: max(1, row["cost"]["policy_generated"]) for row in search}
        short = {}
        for row in pool:
            if sum(s["tokens"] for s in row["samples"]) < cost[row["id"]]:
                short[row["id"]] = cost[row["id"]]
        longer = {row["id"]: row for row in self.run("best_of_n", policy, prm, budgets=short)}
        rows = []
        for row in pool:
            more = longer.get(f"{row['id']} {short.get(row['id'])}", row)
            rows.append({**more, "id": row["id"]})
        return rows

    def scored(self, pool, policy, prm):
        """The pool's rows with another PRM's scores. policy: whose samples, or the file of them."""
        def make(batch):
            pairs = {}  # of each row
            for row in batch:
                pairs[row["id"]] = [(row["question"], tuple(s["steps"])) for s in row["samples"]]
            distinct = dict.fromkeys(chain(*pairs.values()))  # equal solutions are scored once
            p = dict(zip(distinct, self.prm(prm).score(*zip(*distinct))))
            return [{"id": name, "scores": [*map(p.get, of)]} for name, of in pairs.items()]
        n, rows = len(pool[0]["samples"]), []
        settings = {"policy": written(policy), "prm": written(prm), "n": n}
        name = f"scores-{n}-{name_of(policy)}-{name_of(prm)}"
        for row, new in zip(pool, self.once(name, settings, pool, make), strict=True):
            pairs = zip(row["samples"], new["scores"], strict=True)
            rows.append({**row, "samples": [{**s, "scores": p} for s, p in pairs]})
        return rows
