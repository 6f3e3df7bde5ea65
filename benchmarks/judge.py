"""How fast the judge of common/tasks.py is, beside evalplus 0.3.1, and whether their verdicts agree.

    python benchmarks/judge.py --humaneval HumanEvalPlus.jsonl.gz --math math500.jsonl --evalplus ENV/bin/python

ENV is a virtual environment of its own with `pip install evalplus==0.3.1`; without it only our side is measured.
Both sides judge the same 164 canonical solutions and the same 164 solutions that return a constant, twice: "cold"
computes the expected outputs by running the references, "warm" has them. Seconds are wall-clock and, since a busy
machine stretches these, CPU seconds of all processes. Every figure is also printed as JSON on the last line.

One verdict is known to differ: evalplus 0.3.1 fails every solution of HumanEval/32, the canonical one too, because its
special check goes on to the next test without counting the one it passed, and then finds too few.
"""

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import tasks
from common.grading import answers, judge, sandbox


def clock():
    """(wall seconds, CPU seconds of this process and of all its ended children)"""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.monotonic(), sum(u.ru_utime + u.ru_stime for u in usage)


def timed(function):
    """-> (result, wall s, CPU s). Workers are stopped inside, for only ended processes are counted."""
    wall, cpu = clock()
    result = function()
    sandbox.close()
    answers.close()
    after = clock()
    return result, after[0] - wall, after[1] - cpu


def ours(problems, solutions):
    """{(id, n): ok} over each problem's n-th solution."""
    items = [(p, text) for p in problems for text in solutions[p.id]]
    names = [(p.id, n) for p in problems for n in range(len(solutions[p.id]))]
    return {name: v.ok for name, v in zip(names, tasks.judge_many(items))}


def evalplus(python, data, solutions, workers, home):
    """The same through evalplus's command line. It keeps its expected outputs under HOME, which we lend it."""
    samples = Path(home) / "samples.jsonl"
    rows = [{"task_id": name, "solution": text} for name, texts in solutions.items() for text in texts]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = Path(str(samples).replace(".jsonl", "_eval_results.json"))
    results.unlink(missing_ok=True)
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "HUMANEVAL_OVERRIDE_PATH": str(data)}
    command = [python, "-m", "evalplus.evaluate", "--dataset", "humaneval", "--samples", str(samples),
               "--parallel", str(workers)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if not results.exists():
        raise RuntimeError(f"evalplus wrote no results: {done.stderr[-2000:]}")
    found = json.loads(results.read_text())["eval"]
    return {(name, n): row["base_status"] == row["plus_status"] == "pass"
            for name, rows in found.items() for n, row in enumerate(rows)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--humaneval", help="HumanEvalPlus.jsonl.gz of evalplus")
    parser.add_argument("--math", help="MATH-500 as jsonl")
    parser.add_argument("--evalplus", help="the Python of an environment with evalplus 0.3.1")
    parser.add_argument("--tiny", type=int, default=2000, help="tiny programs to judge")
    args = parser.parse_args(argv)
    workers = judge.cores()
    figures = {"workers": workers, "slowness": judge.slowness()}

    def report(name, count, wall, cpu, unit="programs"):
        figures[name] = {"count": count, "seconds": wall, "cpu_seconds": cpu, "per_second": count / wall}
        print(f"{name:28s} {count:5d} {unit} {wall:8.2f} s {cpu:8.2f} CPU s {count / wall:9.1f} /s "
              f"{workers * count / cpu:9.1f} /s if all {workers} cores were free", flush=True)

    tests = {"kind": "call", "entry": "f", "inputs": [[n] for n in range(10)], "outputs": [n + 1 for n in range(10)]}
    problem = tasks.Problem("tiny", "Add one.", "code", tests=tests)
    items = [(problem, f"def f(x):\n    return x + {n % 2}  # {n}\n") for n in range(args.tiny)]
    verdicts, *spent = timed(lambda: tasks.judge_many(items))
    assert [v.ok for v in verdicts] == [n % 2 == 1 for n in range(args.tiny)]
    report("tiny programs", args.tiny, *spent)

    if args.math:
        problems = tasks.load("math500", data=args.math)
        golds = [p.answer for p in problems]
        zeros = sum(tasks.normalise(gold) == "0" for gold in golds)
        for name, predictions in (("MATH-500 against itself", golds), ("MATH-500, constant 0", ["0"] * len(golds)),
                                  ("MATH-500, the next answer", golds[1:] + golds[:1])):
            pairs = list(zip(golds, predictions))
            equal, *spent = timed(lambda pairs=pairs: tasks.equivalent_many(pairs))
            report(name, len(pairs), *spent, unit="pairs   ")
            figures[name]["right"] = sum(equal)
            print(f"{'':28s} right: {sum(equal)} of {len(pairs)}" + f" ({zeros} answers are 0)" * ("0" in name[-1:]))

    if args.humaneval:
        problems = tasks.load("humaneval+", data=args.humaneval)
        solutions = {p.id: [p.tests["reference"], p.meta["prompt"] + "    return 7\n"] for p in problems}
        for state in ("cold", "warm"):
            mine, *spent = timed(lambda: ours(problems, solutions))
            report(f"HumanEval+ {state}, ours", len(mine), *spent)
        passed = sum(mine[p.id, 0] for p in problems)
        print(f"{'':28s} canonical right: {passed} of {len(problems)}; constants right: {sum(mine.values()) - passed}")
        if args.evalplus:
            with tempfile.TemporaryDirectory() as home:
                data = Path(home) / "HumanEvalPlus.jsonl"
                data.write_bytes((gzip.open if args.humaneval.endswith("gz") else open)(args.humaneval, "rb").read())
                for state in ("cold", "warm"):
                    theirs, *spent = timed(lambda: evalplus(args.evalplus, data, solutions, workers, home))
                    report(f"HumanEval+ {state}, evalplus", len(theirs), *spent)
            differ = sorted(name for name in mine if mine[name] != theirs.get(name))
            figures["verdicts that differ"] = differ
            print(f"{'':28s} verdicts that differ: {differ or 'none'}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
