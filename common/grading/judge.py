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

Inputs go in by a pipe, outputs come out as JSON and are compared here: the expected outputs of call
and stdin tests never enter. docs/judge.md says what none of this protects from.
"""
import ast
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

from common.grading.inside import answer, plain
from common.grading.programs import examples, parsed
from common.grading.sandbox import execute

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
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, here // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def parallel(function, jobs, progress=False):
    """[function(*job)] in order, equal jobs once, in as many threads as cores: they only wait."""
    from tqdm import tqdm

    keys = [tuple(x if isinstance(x, str) else id(x) for x in job) for job in jobs]
    todo = dict(zip(keys, jobs))
    with ThreadPoolExecutor(cores()) as threads:
        results = threads.map(lambda job: function(*job), todo.values())
        quiet = None if progress and todo else True
        done = dict(zip(todo, tqdm(results, "judge", len(todo), disable=quiet)))
    return [done[key] for key in keys]


# ------------------------------------------------------------ one program

def limit_of(tests):
    """CPU seconds for one test: the reference's own time, test by test, stretches it."""
    slowest = max(tests.get("seconds") or [0.0])
    return max(tests.get("time_limit") or SECONDS * slowness(), 4 * slowest)


def run_program(tests, code, longer=1):
    """Run a program on its tests. -> [(status, answer, CPU s)]

    The answer to each input: JSON text, or what a stdin program printed. It may answer to fewer;
    the last status is then the reason. status: "ok", "exception: TypeError", "timeout", ...
    """
    kind, limit, token = tests["kind"], longer * limit_of(tests), os.urandom(16).hex()
    total = max(limit, longer * TOTAL * slowness() + 4 * sum(tests.get("seconds") or ()))
    request = {"kind": kind, "code": code.removeprefix("\ufeff"), "entry": tests.get("entry"),
               "inputs": tests["inputs"] if kind in ("call", "stdin") else [[]],
               "test": tests["test"] if kind in ("assert", "unittest") else None,
               "contest": bool(tests.get("contest")), "token": token, "total": total,
               "limit": limit if kind in ("call", "stdin") else total}
    answers = []
    if kind == "stdin":
        for text in request["inputs"]:
            data, end, seconds = execute({**request, "inputs": [text]})
            answers.append((end or "ok", data.decode("utf-8", "replace"), seconds))
            if end:
                break
        return answers
    data, end, _ = execute(request)
    # a line for each input: what more there is, the program has made up
    number = len(request["inputs"])
    answers = [reply(line) for line in data.split(b"\n", number)[:-1]]
    if kind != "call":
        passed = f'"{token}"'
        answers = [(status if text == passed or status != "ok" else "wrong answer", text, seconds)
                   for status, text, seconds in answers]
    if len(answers) < number and all(status == "ok" for status, *_ in answers):
        answers.append((end or "exited early", "", 0.0))
    return [(end, "", 0.0)] if end == "left processes running" else answers


def reply(line):
    """A line of inside.py's, or what a program wrote in its place. -> (status, answer, CPU s)"""
    match = re.fullmatch(r"(ok|exc) (\d{1,9}\.\d{6}) (.*)", line.decode("utf-8", "replace"), re.S)
    if not match:
        return "malformed answer", "", 0.0
    status, seconds, text = match.groups()
    if status == "exc":
        status = "memory" if text == "MemoryError" else f"exception: {text[:100]}"
    return status, text, float(seconds)


def run_reference(tests):
    """Fills in tests["seconds"], and where they lack (evalplus) the "expected" outputs."""
    answers = run_program(tests, tests["reference"], longer=10)
    broken = [status for status, *_ in answers if status != "ok"]
    tests["seconds"] = [] if broken else [seconds for *_, seconds in answers]
    if "outputs" not in tests and tests["kind"] == "call":
        tests["expected"] = [text for _, text, _ in answers]
        if broken:
            tests["broken"] = "the reference solution fails: " + broken[0]


def judge(tests, code):
    """-> "ok" or why not. After a timeout the reference is timed: a slow one stretches limits."""
    if not has_tests(tests):
        return "no tests"
    limit = limit_of(tests)  # before the run: another thread may time the reference during it
    why = verdict(tests, run_program(tests, code))
    if why == "timeout" and tests.get("reference"):
        if "seconds" not in tests:
            run_reference(tests)
        if limit_of(tests) > limit:
            why = verdict(tests, run_program(tests, code))
    return why


def verdict(tests, answers):
    if "broken" in tests:
        return tests["broken"]
    for i, (status, text, _) in enumerate(answers):
        if status != "ok":
            return status
        if tests["kind"] == "stdin" and not same_text(text, tests["outputs"][i]):
            return "wrong answer"
        if tests["kind"] == "call":
            if "expected" not in tests:  # once for all programs
                tests["expected"] = list(map(answer, tests["outputs"]))
            if not right(text, tests["expected"][i], tests["inputs"][i], tests.get("oracle"),
                         tests.get("atol") or 1e-6, tests.get("wrapped")):
                return "wrong answer"
    return "ok"


# ------------------------------------------------------------ is an output right?

# Compared here, in the caller, as evalplus, LiveCodeBench and APPS compare. What a program sent
# stays JSON: none of it is hashed, calls code, or is compared in more than linear time.
DECODE = {
    "tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict, "bytes": bytes.fromhex,
    "int": lambda v: int(v, 16), "complex": lambda v: complex(*v),
    "object": lambda v: ("object", v),
}


def decode(code):
    """The inverse of encode(), for what is trusted; an object comes back as ("object", repr)."""
    if isinstance(code, dict):
        return DECODE[code["t"]](decode(code["v"]))
    return [decode(v) for v in code] if isinstance(code, list) else code


def same(out, expected, atol=1e-6):
    """Two codes: equal, floats within atol + 1e-7 relative (evalplus's rule), also in containers.

    A list is no tuple, but a set is a frozenset.
    """
    if isinstance(out, dict) and out["t"] == "int" and isinstance(expected, float):
        out = int(out["v"], 16)
    if isinstance(expected, dict) and expected["t"] == "int" and isinstance(out, float):
        return out == int(expected["v"], 16)  # 1e20 is 10**20
    if isinstance(expected, float) and isinstance(out, (int, float)):
        with contextlib.suppress(OverflowError):  # an int beyond all floats
            both_nan = out != out and expected != expected
            return out == expected or both_nan or abs(out - expected) <= atol + 1e-7 * abs(expected)
    if isinstance(out, list) and isinstance(expected, list):
        return len(out) == len(expected) and all(map(same, out, expected, [atol] * len(out)))
    if not isinstance(out, dict) or not isinstance(expected, dict):
        return type(out) not in (dict, list) and out == expected
    kind, a, b = expected["t"], out["v"], expected["v"]
    if "set" in kind:
        return "set" in out["t"] and {plain(v) for v in a} == {plain(v) for v in b}
    if kind != out["t"]:
        return False
    if kind == "dict":
        a, b = [{plain(key): value for key, value in side} for side in (a, b)]
        return a.keys() == b.keys() and all(same(a[key], value, atol) for key, value in b.items())
    return same(a, b, atol)


NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4})?")


def same_text(out, expected):
    """stdin programs: equal word by word, numbers as numbers; with a point, to 1e-6.

    Problems with several right answers have checkers that the data sets do not ship: such answers
    are judged wrong.
    """
    a, b = out.split(), expected.split()
    return len(a) == len(b) and all(x == y or same_number(x, y) for x, y in zip(a, b))


def same_number(x, y):
    # no test prints longer ones, and a megabyte of digits would take minutes to convert
    if max(len(x), len(y)) > 400 or not NUMBER.fullmatch(x) or not NUMBER.fullmatch(y):
        return False
    near = "." in y and abs(float(x) - float(y)) <= 1e-6 * max(1.0, abs(float(y)))
    return near or Decimal(x) == Decimal(y)


def oracle_accepts(name, out, args, expected, atol):
    """evalplus's special oracles, for tasks whose statement leaves more than one answer."""
    if name == "set":
        a, b = (code["v"] if isinstance(code, dict) else code for code in (out, expected))
        return same({"t": "set", "v": a}, {"t": "set", "v": b})
    if name == "truth":  # a match object, True, or whatever is not None
        return (out is None or out is False) == (expected is None or expected is False)
    if name == "anything":
        return True
    if name == "root":  # HumanEval/32: any zero of the polynomial, not the reference's
        return abs(sum(c * math.pow(out, k) for k, c in enumerate(args[0]))) <= atol
    if name == "pyramid":  # Mbpp/581: "height" may be the pyramid's own; the reference's is slant
        edge, height = args
        return abs(out - round(edge**2 + 2 * edge * math.hypot(edge / 2, height))) <= atol
    if name == "digits":  # Mbpp/558: digit by digit of two numbers padded to one length
        width = max(len(str(n)) for n in args)
        pairs = zip(*(str(n).zfill(width) for n in args))
        return out == sum(abs(int(x) - int(y)) for x, y in pairs)
    return name == "zero" and out == 0


def right(text, expected, args, oracle=None, atol=1e-6, wrapped=False):
    """Is a JSON text that a program sent right? expected: another one. Malformed is wrong."""
    if text == expected and oracle != "root":
        return True
    # what is far longer than the right answer is not read at all; 16 digits may stand for one
    if len(text) > 1 << 16 and len(text) > 20 * len(expected):
        return False
    try:
        out, expected = json.loads(text), json.loads(expected)
        if wrapped and isinstance(expected, list) and len(expected) == 1:
            if same(out, expected[0], atol):
                return True  # some rows of APPS wrap the result in a list
        equal = oracle != "root" and same(out, expected, atol)
        return equal or oracle_accepts(oracle, out, args, expected, atol)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        return False


# ------------------------------------------------------------ many programs

def judge_many(jobs, progress=False):
    """[(tests, program)] -> ["ok" or why not]."""
    lacking = [(tests,) for tests, _ in jobs if has_tests(tests) and tests["kind"] == "call"
               and not {"outputs", "expected"} & tests.keys()]
    parallel(run_reference, lacking, progress)
    return parallel(judge, jobs, progress)


def has_tests(tests):
    key = "inputs" if tests and tests["kind"] in ("call", "stdin") else "test"
    return bool(tests and tests.get(key))


def behaviour(tests, question, code):
    """A hash of what a program does on example *inputs*: the key of majority vote.

    The expected outputs are never looked at. Without example inputs it hashes the program itself,
    less its layout.
    """
    inputs = tests.get("example_inputs")
    if not inputs and tests.get("entry"):
        inputs = examples(question, tests["entry"])
    if inputs:
        kind = "stdin" if tests["kind"] == "stdin" else "call"
        answers = run_program({**tests, "kind": kind, "inputs": inputs}, code)
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
