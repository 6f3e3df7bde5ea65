"""Problems, their loaders, and whether a solution is right, for math and for code (§3.1 of the paper: tasks and data).

    python -m common.tasks --task tiny-code --limit 20
    python -m common.tasks --task humaneval+ --data HumanEvalPlus.jsonl.gz   # names reference solutions that fail

    problems = load("math500", limit=10)
    verdicts = judge_many([(p, "... so the answer is \\\\boxed{7}.") for p in problems])

A *whole solution text* is judged. Math: the final answer is taken out of it and compared with the gold one. Code: the
program is taken out and run against the tests in the sandbox of judge.py, whose docstring says what that leaves open.
"""
import itertools
import pickle
import time
import zlib
from dataclasses import dataclass

from common import judge
from common.answers import equivalent_many, extract_answer, normalise
from common.data import hub_rows, read_rows
from common.judge import extract_code
from common.loaders import TASKS, Problem, own_row  # noqa: F401 (Problem: for those who import tasks)
from common.run import command_line


@dataclass
class Verdict:
    ok: bool
    answer: str | None  # math: the extracted answer; code: None
    why: str  # "ok", "wrong answer", "no answer", "timeout", "memory", "exception: TypeError", ...


# ---------------------------------------------------------------------------- verdicts and votes


def judge_many(items, workers=None, progress=False):
    """[(problem, solution text)] -> [Verdict]. Texts that hold the same program or answer are judged once."""
    items = list(items)
    found = [extract_answer(t) if p.domain == "math" else extract_code(t, p) for p, t in items]
    equal = iter(equivalent_many([(p.answer, f) for (p, _), f in zip(items, found) if p.domain == "math"]))
    jobs = [(p.tests, f) for (p, _), f in zip(items, found) if p.domain == "code"]
    whys, verdicts = iter(judge.judge_many(jobs, workers, progress)), []
    for (problem, _), answer in zip(items, found):
        why = (next(whys) if problem.domain == "code" else "ok" if next(equal) else "no answer" if answer is None else
               "no gold answer" if problem.answer is None else "wrong answer")
        verdicts.append(Verdict(why == "ok", answer if problem.domain == "math" else None, why))
    return verdicts


def vote_keys(items):
    """[(problem, solution text)] -> for each a string that solutions with the same answer share, None if no answer.

    Math: equivalent answers of one problem share the first one's normal form. Code has no answer string to count, so
    the key is a hash of what the program does on the problem's example inputs.
    """
    code = [(p.tests or {}, p.question, extract_code(t, p)) for p, t in items if p.domain == "code"]
    hashes, forms = iter(judge.parallel(judge.behaviour, code)), {}
    keys = [next(hashes) if p.domain == "code" else extract_answer(t) for p, t in items]
    for (problem, _), key in zip(items, keys):
        if problem.domain == "math" and key is not None:
            forms.setdefault((problem.id, problem.question), {})[normalise(key)] = None
    # round by round: the n-th answer of each problem is compared with one representative of each group before it
    groups = {name: [] for name in forms}
    for answers in itertools.zip_longest(*map(list, forms.values())):
        new = {name: answer for name, answer in zip(forms, answers) if answer is not None}
        pairs = [(key, answer) for name, answer in new.items() for key in groups[name]]
        equal = dict(zip(pairs, equivalent_many(pairs)))
        for name, answer in new.items():
            forms[name][answer] = next((key for key in groups[name] if equal[key, answer]), answer)
            if forms[name][answer] == answer:
                groups[name].append(answer)
    return [forms[p.id, p.question][normalise(key)] if p.domain == "math" and key is not None else key
            for (p, _), key in zip(items, keys)]


def load(task, data=None, split=None, limit=None, seed=0):
    """A task's problems, in file order. data: a local .json, .jsonl or .gz file in place of the hub.

    split, or in task "TASK:SPLIT": the hub's split; for livecodebench a window of contest
    dates "2024-08-01:2025-02-01" (end excluded).
    seed: only for the tiny world, which makes its problems. Raises ValueError "FILE:LINE: what is wrong".
    """
    if ":" in task:
        task, _, split = task.partition(":")
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    make, hub, default, files = TASKS[task]
    first, _, last = split.partition(":") if task == "livecodebench" and ":" in (split or "") else ("", "", "")
    split = default if first or last else split or default
    if data:
        rows = ((f"{data}:{n}", row) for n, row in read_rows(data))
    elif hub:
        rows = _hub_rows(task, hub, split, files)
    else:
        from tiny import world

        if split not in world.STEPS:
            raise ValueError(f"{task}: no split {split!r}; there are {', '.join(world.STEPS)}")
        made = world.problems(task.removeprefix("tiny-"), split=split, n=100 if limit is None else limit, seed=seed)
        rows = ((f"{task}:{n}", row) for n, row in enumerate(made, 1))
    problems, seen = [], set()
    for where, row in rows:
        if limit is not None and len(problems) >= limit:
            break
        try:
            own = "id" in row and "question" in row and ("answer" in row or "tests" in row)
            problem = (own_row if own else make)(row, len(problems))
            if not problem.question.strip():
                raise ValueError("empty question")
            if not own and problem.id == str(len(problems)):  # no id: its number alone would be in other tasks, too
                problem.id = f"{task}-{problem.id}"
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration, SyntaxError, zlib.error,
                EOFError, pickle.UnpicklingError) as e:
            what = f"no field {e}" if isinstance(e, KeyError) else str(e) or "not a row of this task"
            raise ValueError(f"{where}: {what}") from None
        outside = (first or last) and not first <= problem.meta["date"][:10] < (last or "9")
        if not outside and not (task == "prm800k" and problem.question in seen):  # which has many rows to a problem
            problems.append(problem)
            seen.add(problem.question)
    return problems


def _hub_rows(task, hub, split, files):
    name = f"{task} ({hub}, split {split})"
    if not files:
        return hub_rows(name, *hub.split(":"), split=split)
    path = f"hf://datasets/{hub}/{files.format(split=split)}"
    return hub_rows(name, "parquet" if path.endswith("parquet") else "json", data_files=path, split="train")


def reference_rate(problems, progress=False):
    """Judge the reference solutions. -> (passed, how many there are, {failing id: why}).

    Look at this before scoring a benchmark: what its own solutions fail says something about this machine (a missing
    library, a slow disk) or about the data (problems with several right answers), not about a model.
    """
    have = [p for p in problems if (p.tests or {}).get("reference") or p.answer is not None]
    shown = [f"\\boxed{{{p.answer}}}" if p.domain == "math" else f"```\n{p.tests['reference']}\n```" for p in have]
    verdicts = judge_many(list(zip(have, shown)), progress=progress)
    return sum(v.ok for v in verdicts), len(have), {p.id: v.why for p, v in zip(have, verdicts) if not v.ok}


def main(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("--task", default="tiny-math", choices=TASKS)
    parser.add_argument("--data", help="local file (.jsonl, .json, .gz) in place of the hub")
    parser.add_argument("--split", help="split on the hub; for livecodebench a window of dates FROM:TO")
    parser.add_argument("--limit", type=int, help="the first so many problems only")
    parser.add_argument("--seed", type=int, default=0, help="of the tiny world's problems")
    args = parser.parse_args(argv)
    with parser:
        problems = load(args.task, args.data, args.split, args.limit, args.seed)
    for p in problems[:2]:
        print(f"[{p.id}] {p.question.strip()}\n  -> {p.answer if p.domain == 'math' else str(p.tests)[:300]}\n")
    start = time.monotonic()
    right, total, failing = reference_rate(problems, progress=True)
    print(f"{len(problems)} problems; reference solutions right: {right} of {total}, {time.monotonic() - start:.1f} s")
    for name, why in failing.items():
        print(f"  {name}: {why}")


if __name__ == "__main__":
    main()
