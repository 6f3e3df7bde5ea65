"""From searches to judged rows on disk, and what is printed of them."""
import os
import statistics
import sys
from itertools import chain
from pathlib import Path
from textwrap import indent

from common import tasks
from common.formats.loaders import packed
from common.metrics import interval


def sample_rows(problems, searches, strategy, separator):
    """One judged row a problem (format: common/data.py), its samples in the order of finishing."""
    solutions = []
    for problem, search in zip(problems, searches):
        for _, node in search.finished:
            solutions.append((problem, separator.join(node.steps())))
    verdicts = iter(tasks.judge_many(solutions))  # of all problems at once: the judge is parallel
    keys = iter(tasks.vote_keys(solutions))
    rows = []
    for problem, search in zip(problems, searches):
        is_code = problem.domain == "code"
        goal = {"tests": packed(problem.tests)} if is_code else {"answer": problem.answer}
        cost = {"policy_generated": search.generated}
        for name in ("policy_prefilled", "prm_tokens", "seconds", "prm_seconds"):
            cost[name] = round(search.cost[name], 4)
        rows.append({
            "id": problem.id, "domain": problem.domain, "question": problem.question, **goal,
            "strategy": strategy,
            "samples": [sample(search, *x, next(keys), next(verdicts)) for x in search.finished],
            "cost": cost, "overshoot": max(0, search.generated - search.budget)})
    return rows


def sample(search, spent, node, answer, verdict):
    path = [step for step in node.path() if step.text]  # an empty step is only the end token
    new = {"steps": node.steps(), "scores": [step.p for step in path], "answer": answer,
           "correct": verdict.ok, "tokens": node.tokens(), "end": node.end, "spent": spent}
    if search.visits:  # MCTS; rolled-out steps have none
        new["visits"] = [search.visits[step] for step in path if search.visits[step]]
    return new


def right(row, i):
    """Is sample i of a row right? None, that no solution was finished, is not."""
    return bool(i is not None and row["samples"][i]["correct"])


def compare(row, pool, choose):
    """Is what plain samples of as many tokens answer right, by each rule? {rule: right, ...}

    choose(row, rule, tokens=...) is that of search.py.
    """
    tokens = row["cost"]["policy_generated"]
    fit = [s for s in pool["samples"] if s["spent"] <= tokens]
    baseline = {"single": statistics.fmean([s["correct"] for s in fit] or [0.0]),
                "samples": len(fit), "tokens": sum(s["tokens"] for s in fit)}
    for rule in ("argmax", "weighted", "vote"):
        baseline[rule] = right(pool, choose(pool, rule, tokens=tokens))
    return baseline


# ------------------------------------------------------------ what is printed

def by_domain(rows):
    """{"math": [rows], "code": [rows]}, without domains that have none."""
    parts = {}
    for row in sorted(rows, key=lambda row: row["domain"], reverse=True):  # stable within a domain
        parts.setdefault(row["domain"], []).append(row)
    return parts


def coloured(step, p):
    """Figures 6 and 8: a step behind its p_t, from red (0) to green (1) on a terminal."""
    step = step.replace("\n", "\n" + " " * 7)  # below the text, not below the number
    if not sys.stdout.isatty() and not os.environ.get("FORCE_COLOR"):
        return f"{p:.3f}  {step}"
    red = round(255 * min(1, 2 - 2 * p))  # p = 1/2 is yellow
    green = round(255 * min(1, 2 * p))
    return f"\033[38;2;{red};{green};60m{p:.3f}\033[0m  {step}"


def show(search, row, shown):
    """The chosen solution step by step; under each step what else was sampled there, with p_t.
    Of each domain one: `shown` is the set of those that have been."""
    if row["domain"] in shown:
        return
    shown.add(row["domain"])
    print(f"\n{row['question']}\n")
    if row["picked"] is None:
        print("no solution was finished")
        return
    for node in search.finished[row["picked"]][1].path():
        print(indent(coloured(node.text, node.p), "  "))
        siblings = {n.text: n for n in search.sampled if n.parent is node.parent}
        siblings.pop(node.text, None)  # rolled-out steps are not among those sampled
        for other in sorted(siblings.values(), key=lambda n: -n.p)[:3]:
            print(indent(coloured(other.text, other.p), "      | "))
    verdict = "right, " if right(row, row["picked"]) else "wrong, "
    if row.get("answer") is None and not row.get("tests"):
        verdict = ""  # nobody knows the answer of a --question
    print(f"  -> {verdict}{search.generated} tokens generated, "
          f"{len(search.sampled)} nodes in the tree\n")


def mean(rows, column, key):
    return statistics.fmean(row[column][key] for row in rows)


def report(rows, args):
    """Print for each domain accuracies, with 95 % intervals over problems, and mean costs."""
    if rows and not any(row.get("answer") is not None or row.get("tests") for row in rows):
        print("no problem has an answer or tests: nothing is judged")
        return
    names = {"beam": f"beam search {args.k}x{args.m}", "best_of_n": f"best-of-{args.n}",
             "mcts": "MCTS", "majority": f"majority of {args.n}"}
    baselines = {"argmax": "best-of-N, same tokens", "weighted": "weighted vote, same tokens",
                 "vote": "majority vote, same tokens", "single": "a single sample"}
    for domain, part in by_domain(rows).items():
        print(f"{f'{domain}, {len(part)} problems':<34}accuracy [95 %]     "
              "generated  prefilled PRM tokens   seconds / problem")
        counts = ("policy_generated", "policy_prefilled", "prm_tokens")
        spent = "".join(f"{mean(part, 'cost', count):>11.0f}" for count in counts)
        line(names.get(args.strategy, args.strategy),
             [right(row, row["picked"]) for row in part],
             f"{spent}{mean(part, 'cost', 'seconds'):>10.3f}")
        if "baseline" in part[0]:  # not with --no-baseline
            pool = mean(part, "baseline", "tokens")
            sample = pool / max(1, mean(part, "baseline", "samples"))
            for key, label in baselines.items():
                line(label, [row["baseline"][key] for row in part],
                     f"{sample if key == 'single' else pool:>11.0f}")
        if overshoot := max(row["overshoot"] for row in part):
            print(f"  the token budget was overshot by at most {overshoot} tokens")


def line(label, values, costs):
    accuracy, low, high = interval([float(value) for value in values])
    print(f"  {label:<32}{accuracy:.3f} {bounds(low, high)}{costs}")


def bounds(low, high):
    """As "[0.81, 0.97]"; blank where a bootstrap of equal values, as of one problem, has no spread.
    """
    return f"[{low:.2f}, {high:.2f}]" if high > low else " " * 12


def print_figures(figures):
    """A table of {column: {row: number}}; the mean over sets lacks rows."""
    if figures:
        print(f"{'':<22}" + "".join(f"{Path(name).name:>16.16}" for name in figures))
    for key in dict.fromkeys(chain.from_iterable(figures.values())):
        values = [column.get(key) for column in figures.values()]
        texts = [f"{v:.3f}" if isinstance(v, float) else str("" if v is None else v)
                 for v in values]
        print(f"{key:<22}" + "".join(f"{text:>16}" for text in texts))
