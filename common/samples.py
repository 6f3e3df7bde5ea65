"""Sample rows: anybody's are read, checked and judged; ours are made once, in files.

The format is in common/data.py. A file is named by what it holds, as in best_of_n-16-tiny-A.jsonl;
the settings that its rows depend on stand beside it (.flags), and rows of other settings are
refused, not mixed.
"""
import argparse
import hashlib
import math
import re
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

from common import tasks
from common.data import first_wrong, read_rows, read_set
from common.loaders import own_row
from common.policy import load_policy_flags
from common.run import TINY, distributed, gather, journaled, same_flags

# ---------------------------------------------------------------- anybody's

def check_samples(row):
    """Raise a ValueError that names what the metrics need and this row has not."""
    for key, kind in (("id", (str, int)), ("question", str), ("samples", list)):
        if not isinstance(row.get(key), kind):
            raise ValueError(f"no {key}")
    if not row["samples"]:
        raise ValueError("no samples: no solution was finished within its budget of tokens")
    if not isinstance(row.get("tests") or {}, dict):
        raise ValueError("tests: an object is expected")
    for sample in row["samples"]:
        if not isinstance(sample, dict):
            raise ValueError("a sample that is no object")
        check_sample(sample)
        if "correct" not in sample and row.get("answer") is None and not row.get("tests"):
            raise ValueError("nothing to judge by: neither correct, nor an answer, nor tests")


def check_sample(sample):
    """The same for one sample of a row."""
    steps, p = sample.get("steps"), sample.get("scores")
    if not isinstance(steps, list) or not steps or not all(isinstance(x, str) for x in steps):
        raise ValueError("a sample without steps, which are texts")
    if p is not None:
        if not isinstance(p, list) or not all(isinstance(x, int | float | None) for x in p):
            raise ValueError("scores: a list of numbers is expected, or null")
        if not all(x is None or math.isfinite(x) for x in p):
            raise ValueError("scores: a number is not finite")  # it would have no rank
        if len(p) != len(steps):
            raise ValueError(f"{len(p)} scores for {len(steps)} steps")
    if sample.get("correct", False) not in (True, False):
        raise ValueError("correct: true or false is expected")
    if not isinstance(sample.get("answer"), str | int | float | None):
        raise ValueError("answer: a text is expected, or null")


def read_samples(file):
    """Sample rows of a JSONL file. "correct" and "answer" may be missing: the judge gives them."""
    rows = []
    for number, row in read_rows(file):
        try:
            check_samples(row)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from None
        row["domain"] = row.get("domain") or ("code" if row.get("tests") else "math")
        rows.append(row)
    if not rows:
        raise ValueError(f"{file}: no rows")
    unjudged = []
    for row in rows:
        for s in row["samples"]:
            scores = s.get("scores")
            s["scores"] = None if scores and None in scores else scores  # no PRM: a list of null
            if "correct" not in s or "answer" not in s:
                unjudged.append((s, (own_row(row, 0), "\n\n".join(s["steps"]))))
    texts = [text for _, text in unjudged]
    for (s, _), verdict, key in zip(unjudged, tasks.judge_many(texts), tasks.vote_keys(texts)):
        s["correct"], s["answer"] = s.get("correct", verdict.ok), s.get("answer", key)
    return rows


def has_scores(row):
    return all(s["scores"] is not None for s in row["samples"])


def read_first_errors(args):
    """[(question, steps, first wrong step or -1)] of ProcessBench or of stepwise rows."""
    if args.first_error.partition(":")[0] in tasks.TASKS:  # processbench has a label -1 .. T-1
        problems = tasks.load(args.first_error, args.data, limit=args.limit)
        if any("label" not in p.meta for p in problems):
            raise ValueError(f"--first-error {args.first_error}: rows without a first error")
        return [(p.question, p.meta["steps"], p.meta["label"]) for p in problems]
    rows = islice(read_set(args.first_error), args.limit)
    # labels of each step, as of PRM800K or Math-Shepherd: the first below 0.5
    return [(r["prompt"], r["completions"], first_wrong(r["labels"])) for _, r in rows]


# ---------------------------------------------------------------- ours, made once

def name_of(path):
    """A short name of a model or file: the last two parts of its path, and of a folder a hash that
    tells x/a/prm from y/a/prm. tiny/A -> tiny-A; runs/a/prm -> a-prm-5d17"""
    name = re.sub(r"[^\w.+-]+", "-", "-".join(Path(path).parts[-2:]))
    if not Path(path).exists() or Path(path).resolve().parent == TINY:
        return name  # a hub id or an address, and what comes with the repository
    digest = hashlib.blake2b(str(Path(path).resolve()).encode(), digest_size=2)
    return f"{name}-{digest.hexdigest()}"


def written(path):
    """[path, when the file, or the weights in the folder, were written]: a model that was trained
    again under the same name is another."""
    path = Path(path)
    files = [path, *sorted(path.glob("*.safetensors"))]
    name = path.resolve() if path.exists() else path  # a hub id stays as it is
    return [str(name), *(f.stat().st_mtime_ns for f in files if f.is_file())]


class Once:
    """The folder --out: a file of rows is made once, and continued after a kill."""
    SAMPLING = ("temperature", "top_p", "max_step_tokens", "max_steps", "max_solution_tokens",
                "separator", "policy_model", "dtype", "seed")

    def __init__(self, parser, args):
        self.parser, self.args, self.made = parser, args, set()

    def rows(self, name, settings, items, make, names=None):
        """Rows of all items, from OUT/NAME.jsonl or by make(items), over all ranks.

        settings: dict of what the rows depend on beside the sampling flags and --data. --task and
        --limit are none of it: a file may hold the rows of more problems than are asked for.
        """
        file = Path(self.args.out) / f"{name}.jsonl"
        # with --overwrite a run makes each file once more, then shares it
        resume = not self.args.overwrite or file in self.made
        self.made.add(file)
        settings = {**{flag: getattr(self.args, flag) for flag in self.SAMPLING}, **settings,
                    "data": self.args.data and written(self.args.data)}
        same_flags(self.parser, argparse.Namespace(**settings, out=str(file), resume=resume),
                   free=("out", "resume"))
        return gather(journaled(file, items, make, names, self.args.concurrent, resume, name))[0]


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
    for task in args.task:
        for seed in args.seeds if task.startswith("tiny") else [0]:
            problems += tasks.load(task, args.data, None, args.limit, seed)
    code = [p for p in problems if (p.tests or {}).get("reference")]
    if code and rank == 0:
        right, total, failing = tasks.reference_rate(code, progress=True)
        print(f"reference solutions right: {right} of {total}")
        for name, why in failing.items():
            print(f"  {name}: {why}")
    return problems


class Bench:
    """Models and problems, loaded when first needed, and the rows that are made with them.

    load_prm and solve are given: prm_model.py and search.py stand above common/ and import it.
    """
    # the flags that a strategy's rows depend on
    SEARCHES = {"best_of_n": ("n", "tokens", "until"),
                "beam": ("k", "m", "textbook", "until"),
                "mcts": ("m", "simulations", "c", "textbook", "tokens", "until", "aggregate")}

    def __init__(self, parser, args, load_prm, solve):
        self.args, self.once, self.solve = args, Once(parser, args), solve
        self.rank, _, device = distributed(args.device)
        self.policy = keep_one(lambda path: load_policy_flags(args, device, path))
        self.prm = keep_one(lambda path: load_prm(path, device, args.dtype))

    @cached_property
    def problems(self):
        return load_problems(self.args, self.rank)

    def run(self, strategy, policy, prm=None, budgets=None, **options):
        """Rows of a strategy; best_of_n without a PRM samples a pool for many PRMs to score.

        budgets: {problem id: generated tokens that it may cost}, for the problems named there.
        """
        args = argparse.Namespace(**{**vars(self.args), **options})
        settings = {name: vars(args).get(name) for name in self.SEARCHES[strategy]}
        size = {"best_of_n": args.n, "beam": f"{args.k}x{args.m}",
                "mcts": args.simulations}[strategy]
        if "tokens" in settings and args.tokens < math.inf:
            size = f"{args.tokens}-tokens"
        problems, prms = self.problems, [prm] if prm else []
        # whoever reads the rows chooses: their "picked" is no setting
        settings |= {"policy": written(policy), "prm": [written(p) for p in prms]}

        def key(p):  # with the budget: another one makes another row
            return f"{p.id} {budgets[p.id]}" if budgets else p.id
        if budgets is not None:
            problems, size = [p for p in problems if p.id in budgets], "tokens"
            settings["n"] = None

        def make(problems):
            limits = [budgets[p.id] for p in problems] if budgets else None
            models = self.policy(policy), [self.prm(p) for p in prms]
            _, rows = self.solve(problems, strategy, *models, args, limits)
            return [row | {"id": key(p)} for row, p in zip(rows, problems)]
        name = "-".join([strategy, str(size), *map(name_of, [policy, *prms])])
        return self.once.rows(name, settings, problems, make, lambda p: [key(p)])

    def same_tokens(self, pool, policy, prm, *searches):
        """The pool, with more samples until each problem has cost what its dearest search did."""
        dearest, short = {}, {}
        for row in chain(*searches):
            tokens = max(1, row["cost"]["policy_generated"])
            dearest[row["id"]] = max(tokens, dearest.get(row["id"], 0))
        for row in pool:
            if sum(s["tokens"] for s in row["samples"]) < dearest[row["id"]]:
                short[row["id"]] = dearest[row["id"]]
        extended = {row["id"]: row for row in self.run("best_of_n", policy, prm, budgets=short)}
        rows = []
        for row in pool:
            longer = extended.get(f"{row['id']} {short.get(row['id'])}", row)
            rows.append({**longer, "id": row["id"]})
        return rows

    def scored(self, pool, policy, prm):
        """The pool's rows with another PRM's scores. policy: whose samples, or the file of them."""
        def make(batch):
            distinct = {}  # equal samples are scored once
            for row in batch:
                for s in row["samples"]:
                    distinct[row["question"], tuple(s["steps"])] = None
            p = dict(zip(distinct, self.prm(prm).score(*zip(*distinct))))
            rows = []
            for row in batch:
                scores = [p[row["question"], tuple(s["steps"])] for s in row["samples"]]
                rows.append({"id": row["id"], "scores": scores})
            return rows
        n = len(pool[0]["samples"])
        scores = self.once.rows(
            f"scores-{n}-{name_of(policy)}-{name_of(prm)}",
            {"policy": written(policy), "prm": written(prm), "n": n}, pool, make)
        rows = []
        for row, new in zip(pool, scores, strict=True):
            pairs = zip(row["samples"], new["scores"], strict=True)
            rows.append({**row, "samples": [{**s, "scores": p} for s, p in pairs]})
        return rows
