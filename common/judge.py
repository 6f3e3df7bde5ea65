"""The judge of code (§3.1): runs programs that models wrote, each in a process of its own.

    >>> tests = {"kind": "call", "entry": "f", "inputs": [[1]], "outputs": [2]}
    >>> judge_many([(tests, "def f(x): return x + 1")])
    ["ok"]

Tests are a dict with a "kind", and optionally "atol", "time_limit" (CPU s per test), "oracle",
"reference" (code), "prelude" ("contest", or code that runs before the program):

    call      entry, inputs [[arg, ...], ...], outputs [...] (or absent: the reference is run)
    stdin     inputs [str], outputs [str]
    assert    entry, test: code that defines check(candidate), or asserts on the program's functions
    unittest  entry, test: code with unittest.TestCase classes

In the order of a program's life: programs.py takes it out of a solution text, sandbox.py starts a
fresh and isolated interpreter, inside.py (and inside_tests.py, for the last two kinds) calls it
there, and outputs.py compares. Inputs go in by a pipe and outputs come out as JSON: expected
outputs of call and stdin tests never enter. As root the program gets another user id.

What this does NOT protect from:
- `assert` and `unittest` tests share their process with the program, since they patch its modules.
  Changed builtins or assert methods, names of the tests and results that redefine == are noticed.
  A search of memory for the token of success, or a module that the tests import later, is not;
- kernel bugs, side channels, and MEMORY in each of PROCESSES processes (there is no cgroup);
- CPU time that short-lived grandchildren use unseen: then the wall clock ends the program;
- where namespaces are refused (some containers, macOS) one warning says so. Programs then see your
  files, and only a guard in their own process keeps them from changing these and from the network;
  starting processes is refused to them. The guard is a net for accidents, not a wall.
Run code that is hostile on purpose in a virtual machine.
"""
import ast
import functools
import json
import os
import time
import timeit
from concurrent.futures import ThreadPoolExecutor

from common.inside import digest
from common.outputs import decode, encode, right, same, same_text  # noqa: F401 (for callers)
from common.programs import contest_prelude, examples, extract_code, parsed  # noqa: F401
from common.sandbox import REQUEST, close, execute, sandbox  # noqa: F401

SECONDS = 2.0  # CPU seconds per test when nothing better is known; times slowness()
TOTAL = 20.0  # CPU seconds of all tests of a program, beyond what the reference solution needs


@functools.cache
def slowness():
    """How many times slower than a 2020 laptop this machine runs Python, at least 1."""
    took = timeit.repeat("sum(i * i for i in range(200_000))", timer=time.process_time, repeat=3,
                         number=1)
    return max(1.0, min(took) / 0.015)


def cores():
    """Cores for this process; torchrun's ranks share a machine."""
    here = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        here = len(os.sched_getaffinity(0))
    return max(1, here // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def parallel(function, jobs, workers=None, progress=False):
    """[function(*job)] in order, equal jobs once, in as many threads as cores: they only wait."""
    from tqdm import tqdm

    keys = [tuple(x if isinstance(x, str) else id(x) for x in job) for job in jobs]
    todo = dict(zip(keys, jobs))
    with ThreadPoolExecutor(max(1, min(workers or cores(), len(todo)))) as threads:
        results = threads.map(lambda job: function(*job), todo.values())
        quiet = None if progress and todo else True
        done = dict(zip(todo, tqdm(results, "judge", len(todo), disable=quiet)))
    return [done[key] for key in keys]


def limit_of(tests):
    """CPU seconds for one test: the reference's own time, test by test, stretches it."""
    slowest = max(tests.get("seconds") or [0.0])
    return max(tests.get("time_limit") or SECONDS * slowness(), 4 * slowest)


def run_program(tests, code, inputs=None, longer=1, rough=False):
    """Run a program on its tests, or on other inputs. -> (lines, how it ended, token)."""
    kind = "call" if inputs is not None and tests["kind"] != "stdin" else tests["kind"]
    limit, token = longer * limit_of(tests), os.urandom(16).hex()
    total = max(limit, longer * TOTAL * slowness() + 4 * sum(tests.get("seconds") or ()))
    prelude = tests.get("prelude") or ""
    request = {
        **REQUEST, "kind": kind, "limit": limit if kind in ("call", "stdin") else total,
        "total": total, "code": code.removeprefix("\ufeff"), "entry": tests.get("entry"),
        "inputs": tests.get("inputs", [[]]) if inputs is None else inputs, "rough": rough,
        "prelude": contest_prelude(code) if prelude == "contest" else prelude,
        "test": tests.get("test", "") if kind in ("assert", "unittest") else "", "token": token,
        "json": bool(tests.get("json"))}
    if kind in ("assert", "unittest"):
        request["inputs"] = [[]]
    lines, end, _ = execute(sandbox(), request)
    return lines, end, token


def run_reference(tests):
    """Fills in tests["seconds"], and where they lack (evalplus) "outputs"."""
    lines, end, _ = run_program(tests, tests["reference"], longer=10)
    fine = end == "end" and all(status == "ok" for status, *_ in lines)
    tests["seconds"] = [seconds for _, seconds, _ in lines] if fine else []
    if "outputs" not in tests and tests["kind"] == "call":
        tests["outputs"] = [decode(json.loads(text)) for status, _, text in lines if status == "ok"]
        if not fine:
            why = next((text for status, _, text in lines if status != "ok"), end)
            tests["broken"] = "the reference solution fails: " + why.strip('"')


def judge(tests, code):
    """-> "ok" or why not. After a timeout the reference is timed: a slow one stretches limits."""
    limit = limit_of(tests)  # before the run: another thread may time the reference during it
    why = verdict(tests, *run_program(tests, code))
    if why == "timeout" and tests.get("reference"):
        if "seconds" not in tests:
            run_reference(tests)
        if limit_of(tests) > limit:
            why = verdict(tests, *run_program(tests, code))
    return why


def verdict(tests, lines, end, token):
    if "broken" in tests:
        return tests["broken"]
    wanted = len(tests.get("outputs") or [True])
    for i, (status, _, text) in enumerate(lines[:wanted]):
        if status == "exc":
            name = text.strip('"')[:100]
            return "memory" if name == "MemoryError" else f"exception: {name}"
        if status != "ok":
            return status.replace("_", " ")[:100]
        if not right(tests, i, text, token):
            return "wrong answer"
    if len(lines) < wanted:
        return "left processes running" if end == "left" else end.replace("end", "exited early")
    return "left processes running" if end == "left" else "ok"


def judge_many(jobs, workers=None, progress=False):
    """[(tests, program)] -> ["ok" or why not]."""
    jobs = [(tests if tests and has_tests(tests) else None, code) for tests, code in jobs]
    lacking = [(t,) for t, _ in jobs if t and t["kind"] == "call" and "outputs" not in t]
    parallel(run_reference, lacking, workers, progress)
    todo = [job for job in jobs if job[0]]
    judged = iter(parallel(judge, todo, workers, progress))
    return [next(judged) if tests else "no tests" for tests, _ in jobs]


def has_tests(tests):
    return bool(tests.get("inputs") if tests["kind"] in ("call", "stdin") else tests.get("test"))


def behaviour(tests, question, code):
    """A hash of what a program does on example *inputs*: the key of majority vote.

    The expected outputs are never looked at. Without example inputs it hashes the program itself,
    less its layout.
    """
    inputs = tests.get("example_inputs")
    if not inputs and tests.get("entry"):
        inputs = examples(question, tests["entry"])
    if not inputs:
        tree = parsed(code)
        return digest(ast.dump(tree)) if tree else "does not parse"
    lines, end, _ = run_program(tests, code, inputs, rough=True)
    texts = [text for _, _, text in lines]
    if tests["kind"] == "stdin":
        texts = [" ".join(text.replace("\\n", " ").split()) for text in texts]
    return digest([*(status for status, *_ in lines), *texts, end])
