"""The judge of code (§3.1): runs programs that models wrote, and compares what they return.

    >>> tests = {"kind": "call", "entry": "f", "inputs": [[1]], "outputs": [2]}
    >>> judge_many([(tests, "def f(x): return x + 1")])
    ["ok"]

Tests are a dict with a "kind", and optionally "atol", "time_limit" (CPU s per test), "oracle",
"reference" (code), "contest" (True: with the names that contest graders lend):

    call      entry, inputs [[arg, ...], ...], outputs [...] (or absent: the reference is run)
    stdin     inputs [str], outputs [str]
    assert    entry, test: code that defines check(candidate), or asserts on the program's functions
    unittest  entry, test: code with unittest.TestCase classes

In the order of a program's life: programs.py takes it out of a solution text, sandbox.py isolates
it, inside.py calls it there, and outputs.py compares. Inputs go in by a pipe and outputs come out
as JSON: expected outputs of call and stdin tests never enter. As root it gets another user id.

What this does NOT protect from:
- `assert` and `unittest` tests share their process with the program, since they patch its modules.
  Changed builtins or assert methods, names of the tests and results that redefine == are noticed.
  A search of memory for the token of success, or a module that the tests import later, is not;
- kernel bugs, side channels, and MEMORY in each of PROCESSES processes (there is no cgroup);
- two programs that plan together and run one after the other: they may pass on a message through
  the kernel (a keyring). Files, processes and shared memory do not outlive a program;
- CPU time that short-lived grandchildren use unseen: then the wall clock ends the program;
- where namespaces are refused (some containers, macOS) one warning says so. Programs then see your
  files, and only a guard in their own process keeps them from changing these and from the network;
  starting processes is refused to them. The guard is a net for accidents, not a wall.
Run code that is hostile on purpose in a virtual machine.
"""
import ast
import functools
import hashlib
import json
import os
import re
import time
import timeit
from concurrent.futures import ThreadPoolExecutor

from common.grading.outputs import answer, decode, encode, plain, right, same, same_text  # noqa: F401
from common.grading.programs import examples, extract_code, parsed  # noqa: F401
from common.grading.sandbox import close, execute  # noqa: F401

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


# ------------------------------------------------------------ one program

def limit_of(tests):
    """CPU seconds for one test: the reference's own time, test by test, stretches it."""
    slowest = max(tests.get("seconds") or [0.0])
    return max(tests.get("time_limit") or SECONDS * slowness(), 4 * slowest)


def run_program(tests, code, inputs=None, longer=1):
    """Run a program on its tests, or on other inputs. -> ([(status, answer, CPU s)], token)

    The answer to each input: JSON text, or what a stdin program printed. It may answer to fewer;
    the last status is then the reason. status: "ok", "exception: TypeError", "timeout", ...
    """
    kind = "call" if inputs is not None and tests["kind"] != "stdin" else tests["kind"]
    if inputs is None:
        inputs = tests["inputs"] if kind in ("call", "stdin") else [[]]
    limit, token = longer * limit_of(tests), os.urandom(16).hex()
    total = max(limit, longer * TOTAL * slowness() + 4 * sum(tests.get("seconds") or ()))
    request = {"kind": kind, "code": code.removeprefix("\ufeff"), "entry": tests.get("entry"),
               "inputs": inputs, "test": tests["test"] if kind in ("assert", "unittest") else "",
               "contest": bool(tests.get("contest")), "token": token, "total": total,
               "limit": limit if kind in ("call", "stdin") else total}
    answers = []
    if kind == "stdin":
        for text in inputs:
            data, end, seconds = execute({**request, "inputs": [text]})
            status = "ok" if end == "exited early" else end
            answers.append((status, data.decode("utf-8", "replace"), seconds))
            if status != "ok":
                break
        return answers, token
    data, end, _ = execute(request)
    # a line for each input: what more there is, the program has made up
    lines = data.split(b"\n", len(inputs))[:-1][:len(inputs)]
    for line in lines:
        status, seconds, text = [*line.decode("utf-8", "replace").split(" ", 2), "", ""][:3]
        if status == "exc":
            name = text.strip('"')[:100]
            status = "memory" if name == "MemoryError" else f"exception: {name}"
        elif status != "ok" or not re.fullmatch(r"\d{1,9}\.\d{6}", seconds):
            status, seconds = "malformed answer", "0"  # the program has written it
        answers.append((status, text, float(seconds)))
    if len(lines) < len(inputs) and all(status == "ok" for status, *_ in answers):
        answers.append((end, "", 0.0))
    if end == "left processes running":
        answers[0] = (end, "", 0.0)
    return answers, token


def run_reference(tests):
    """Fills in tests["seconds"], and where they lack (evalplus) the "expected" outputs."""
    answers, _ = run_program(tests, tests["reference"], longer=10)
    broken = [status for status, *_ in answers if status != "ok"]
    tests["seconds"] = [] if broken else [seconds for *_, seconds in answers]
    if "outputs" not in tests and tests["kind"] == "call":
        tests["expected"] = [text for _, text, _ in answers]
        if broken:
            tests["broken"] = "the reference solution fails: " + broken[0]


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


def verdict(tests, answers, token):
    if "broken" in tests:
        return tests["broken"]
    for i, (status, text, _) in enumerate(answers):
        if status != "ok":
            return status
        if tests["kind"] == "stdin":
            correct = same_text(text, tests["outputs"][i])
        elif tests["kind"] == "call":
            correct = right(text, tests["expected"][i], tests["inputs"][i], tests.get("oracle"),
                            tests.get("atol") or 1e-6, tests.get("wrapped"))
        else:
            correct = text == f'"{token}"'
        if not correct:
            return "wrong answer"
    return "ok"


# ------------------------------------------------------------ many programs

def judge_many(jobs, workers=None, progress=False):
    """[(tests, program)] -> ["ok" or why not]."""
    jobs = [(tests if tests and has_tests(tests) else None, code) for tests, code in jobs]
    calls = {id(t): t for t, _ in jobs if t and t["kind"] == "call" and "expected" not in t}
    for tests in calls.values():
        if "outputs" in tests:
            tests["expected"] = [answer(value) for value in tests["outputs"]]
    lacking = [(tests,) for tests in calls.values() if "outputs" not in tests]
    parallel(run_reference, lacking, workers, progress)
    judged = iter(parallel(judge, [job for job in jobs if job[0]], workers, progress))
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
    if inputs:
        answers, _ = run_program(tests, code, inputs)
        parts = [f"{status} {answer_key(tests, text)}" for status, text, _ in answers]
    else:
        tree = parsed(code)
        parts = [ast.dump(tree) if tree else "does not parse"]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def answer_key(tests, text):
    """A text that equal answers share: floats to six digits, sets in one order."""
    if tests["kind"] == "stdin":
        return " ".join(text.split())
    try:
        return plain(json.loads(text), digits=6)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return text
