"""Problems, their loaders, and whether a solution is right, for math and code (§3.1 of the paper).

    python -m common.tasks --task tiny-code --limit 20
    python -m common.tasks --task humaneval+ --data HumanEvalPlus.jsonl.gz   # names bad references

    problems = load("math500", limit=10)
    verdicts = judge_many([(p, "... so the answer is \\\\boxed{7}.") for p in problems])

A *whole solution text* is judged. Math: its final answer is compared with the gold one. Code: its
program is run against the tests by grading/judge.py; docs/judge.md says what that leaves open.
"""
import random
from dataclasses import dataclass
from itertools import chain, repeat, zip_longest

from common.data import hub_rows, read_rows
from common.formats.loaders import TASKS, Problem, likely_tasks, own_row  # noqa: F401
from common.grading import judge
from common.grading.answers import equivalent_many, extract_answer
from common.grading.notation import normalise
from common.grading.programs import extract_code
from common.run import command_line, expect, located


@dataclass
class Verdict:
    ok: bool
    answer: str | None  # math: the extracted answer; code: None
    why: str  # "ok", "wrong answer", "no answer", "timeout", "memory", "exception: TypeError", ...


# ------------------------------------------------------------ verdicts and votes

def judge_many(items, progress=False):
    """[(problem, solution text)] -> [Verdict]. Equal programs and equal answers are judged once."""
    items = list(items)
    pairs = [(p.answer, extract_answer(text)) for p, text in items if p.domain == "math"]
    programs = [(p.tests, extract_code(text, p)) for p, text in items if p.domain == "code"]
    equal = iter(zip(pairs, equivalent_many(pairs)))
    reasons = iter(judge.judge_many(programs, progress))
    verdicts = []
    for problem, _ in items:
        if problem.domain == "code":
            answer, why = None, next(reasons)
        else:
            (gold, answer), right = next(equal)
            known = "wrong answer" if gold is not None else "no gold answer"
            wrong = known if answer is not None else "no answer"
            why = "ok" if right else wrong
        verdicts.append(Verdict(why == "ok", answer, why))
    return verdicts


def vote_keys(items):
    """[(problem, solution text)] -> a key for each: solutions with the same answer share it.

    Math: the normal form of the first equivalent answer to this problem; no answer is None. Code
    has no answer to count: a hash of what the program does on the problem's example inputs.
    """
    programs = [(p.tests or {}, p.question, extract_code(text, p)) for p, text in items
                if p.domain == "code"]
    behaviours = iter(judge.parallel(judge.behaviour, programs))
    keys = [next(behaviours) if p.domain == "code" else extract_answer(text) for p, text in items]
    forms = {}  # (problem id, question) -> {normal form: key}, in the order of first appearance
    for i, (problem, _) in enumerate(items):
        if problem.domain == "math" and keys[i] is not None:
            keys[i] = normalise(keys[i])
            forms.setdefault((problem.id, problem.question), {})[keys[i]] = None
    # round by round, the n-th answer to each problem meets the keys before it: not all pairs
    for answers in zip_longest(*map(list, forms.values())):
        rounds = [pair for pair in zip(forms.values(), answers) if pair[1] is not None]
        earlier = [list(dict.fromkeys(group.values())) for group, _ in rounds]
        pairs = [zip(keys, repeat(answer)) for keys, (_, answer) in zip(earlier, rounds)]
        equal = iter(equivalent_many(list(chain.from_iterable(pairs))))
        for (group, answer), candidates in zip(rounds, earlier):
            verdicts = dict(zip(candidates, equal))
            group[answer] = next((key for key, same in verdicts.items() if same), answer)
    # a program's hash is its own key
    return [forms.get((p.id, p.question), {}).get(key, key) for (p, _), key in zip(items, keys)]


# ------------------------------------------------------------ loading

DEFAULT = ["tiny-math", "tiny-code"]  # of every script


def each(names, data):
    """The tasks of a command. A local file holds the problems of one: if none is named, of the
    first default."""
    expect(not data or len(names) == 1 or names == DEFAULT,
           f"{data} holds the problems of one task, not of {' and '.join(names)}")
    return names[:1] if data else names


def load(task, data=None, split=None, limit=None, seed=0):
    """A task's problems, in file order. data: a local .json, .jsonl or .gz file instead of the hub.

    limit: the first so many; of ProcessBench, whose files have the erroneous solutions first, that
    many drawn at random with the seed.
    split, or in task "TASK:SPLIT": the hub's split; for livecodebench a window of contest dates
    "2024-08-01:2025-02-01" (end excluded). seed: of the tiny world's problems, too.
    ValueError "FILE:LINE: what is wrong".
    """
    if ":" in task:
        task, _, split = task.partition(":")
    expect(task in TASKS, f"unknown task {task!r}; there are {', '.join(TASKS)}")
    first, last = "", ""  # contest dates
    if task == "livecodebench" and ":" in (split or ""):
        first, _, last = split.partition(":")
        split = None if first or last else split
    name = task if split in (None, TASKS[task][2]) else f"{task}:{split}"
    problems, questions = [], set()
    for where, row in task_rows(task, data, split, limit, seed):
        if limit is not None and len(problems) >= limit and task != "processbench":
            break
        problem = to_problem(task, name, where, row, len(problems))
        if (first or last) and not first <= problem.meta["date"][:10] < (last or "9"):
            continue
        if task == "prm800k" and problem.question in questions:
            continue  # its rows are solutions, many to a problem
        problems.append(problem)
        questions.add(problem.question)
    expect(problems, f"{data or name}: no problems")
    return drawn(problems, limit, seed)


def drawn(rows, limit, seed):
    """At most `limit` rows, drawn at random, in their order."""
    if limit is None or limit >= len(rows):
        return rows
    chosen = random.Random(seed).sample(range(len(rows)), limit)
    return [rows[i] for i in sorted(chosen)]


def task_rows(task, data, split, limit, seed):
    """Yield ("FILE:LINE", row) of a local file, of the hub, or of the tiny world."""
    _, hub, default, files = TASKS[task]
    split = split or default
    if data:
        return ((f"{data}:{n}", row) for n, row in read_rows(data))
    if hub:
        name = f"{task} ({hub}, split {split})"
        if not files:
            return hub_rows(name, *hub.split(":"), split=split)
        path = f"hf://datasets/{hub}/{files.format(split=split)}"
        kind = "parquet" if path.endswith("parquet") else "json"
        return hub_rows(name, kind, data_files=path, split="train")
    from tiny import world  # a floor above this one

    expect(split in world.STEPS,
           f"{task}: no split {split!r}; there are {', '.join(world.STEPS)}")
    n = 100 if limit is None else limit
    rows = world.problems(task.removeprefix("tiny-"), split=split, n=n, seed=seed)
    return ((f"{task}:{n}", row) for n, row in enumerate(rows, 1))


def to_problem(task, name, where, row, number):
    """The Problem of a row, by the task's row function or from this project's own form.
    name: of the task and its split, for rows that have no id."""
    with located(where):
        own = "id" in row and "question" in row and ("answer" in row or "tests" in row)
        likely = () if own else likely_tasks(row)
        expect(not likely or task in likely,
               f"this is no row of {task} but of {' or '.join(likely)}: pass --task")
        problem = (own_row if own else TASKS[task][0])(row, number)
        expect(problem.question.strip(), "empty question")
        if not own and problem.id == str(number):
            problem.id = f"{name}-{number}"  # a row without id: other tasks have numbers, too
        return problem


def reference_rate(problems, progress=False):
    """Judge the reference solutions -> (passed, number of references, {failing id: why})."""
    solutions = []
    for p in problems:
        if p.domain == "math" and p.answer is not None:
            first = p.answer[0] if isinstance(p.answer, list) else p.answer
            solutions.append((p, f"\\boxed{{{first}}}"))
        elif (p.tests or {}).get("reference"):
            solutions.append((p, f"```\n{p.tests['reference']}\n```"))
    verdicts = judge_many(solutions, progress=progress)
    failing = {p.id: v.why for (p, _), v in zip(solutions, verdicts) if not v.ok}
    return sum(v.ok for v in verdicts), len(solutions), failing


def print_references(problems):
    """To be seen before a benchmark is scored: a reference that fails says something about this
    machine (a missing library, a slow disk) or the data (several right answers), not of a model."""
    right, total, failing = reference_rate(problems, progress=True)
    print(f"reference solutions right: {right} of {total}")
    for name, why in failing.items():
        print(f"  {name}: {why}")


def main(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("--task", default="tiny-math", choices=TASKS)
    parser.add_argument("--data", help="local file (.jsonl, .json, .gz) in place of the hub")
    parser.add_argument("--split", help="split on the hub; livecodebench: window of dates FROM:TO")
    parser.add_argument("--limit", type=int, help="the first so many problems only")
    parser.add_argument("--seed", type=int, default=0, help="of the tiny world's problems")
    args = parser.parse_args(argv)
    with parser:
        problems = load(args.task, args.data, args.split, args.limit, args.seed)
    for p in problems[:2]:
        goal = p.answer if p.domain == "math" else str(p.tests)[:300]
        print(f"[{p.id}] {p.question.strip()}\n  -> {goal}\n")
    print(f"{len(problems)} problems")
    print_references(problems)


if __name__ == "__main__":
    main()
