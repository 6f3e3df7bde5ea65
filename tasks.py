"""Problems, their loaders, and whether a solution is right, for math and for code (§3.1 of the paper: tasks and data).

    python tasks.py --task tiny-code --limit 20
    python tasks.py --task humaneval+ --data HumanEvalPlus.jsonl.gz   # the reference solutions must pass, or are named

    problems = load("math500", limit=10)
    verdicts = judge_many([(p, "... so the answer is \\\\boxed{7}.") for p in problems])

A *whole solution text* is judged. Math: the final answer is taken out of it and compared with the gold one. Code: the
program is taken out and run against the tests in the sandbox of judge.py, whose docstring says what that leaves open.
"""

import ast
import base64
import contextlib
import decimal
import functools
import inspect
import io
import json
import pickle
import re
import time
import zlib
from dataclasses import dataclass, field

import judge
from judge import extract_code, slowness
from rows import command_line, hub_rows, read_rows


@dataclass
class Problem:
    id: str
    question: str
    domain: str  # "math" | "code"
    answer: str | None = None
    tests: dict | None = None  # code; judge.py says what is in it
    meta: dict = field(default_factory=dict)


@dataclass
class Verdict:
    ok: bool
    answer: str | None  # math: the extracted answer; code: None
    why: str  # "ok", "wrong answer", "no answer", "timeout", "memory", "exception: TypeError", ...


# ---------------------------------------------------------------------------- math: extraction and equivalence


def extract_answer(text):
    """The final answer in a solution text, or None.

    Looked for in this order, the last of each: \\boxed{...}, GSM8K's "#### ...", "answer is ..." or "answer: ...".
    Nothing else counts: a guess such as "the last number" rewards solutions that never committed to an answer.
    "so \\boxed{\\frac{1}{2}}." -> "\\frac{1}{2}"
    """
    for start in reversed([m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s*{", text)]):
        depth = 1
        for i in range(start, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if not depth:
                return text[start:i].strip() or None  # braces nest, so a regular expression will not do
    marked = re.findall(r"####\s*(-?\\?\$?[\d.,][^\n]*)", text) or re.findall(r"####([^\n]*)\s*\Z", text)
    if marked:  # a number, or the last line: else it is a heading in Markdown
        return marked[-1].strip() or None
    said = re.split(r"(?i)\banswer\s*(?:is\b\s*:?|:)", text)
    if len(said) == 1:
        return None
    line = re.split(r"\.(?:\s|$)", said[-1].strip(" \t\n*").split("\n")[0])[0]  # a full stop ends it, 3.14 does not
    return line.strip(" \t*$.,;") or None


@functools.lru_cache(100_000)
def normalise(answer):
    """An answer as written -> a form in which the commonest equal spellings are equal strings.

    "$1{,}234$" -> "1234"; "033" -> "33"; "\\dfrac12" -> "\\frac{1}{2}"; "\\left( 3, 4 \\right)" -> "(3,4)"
    Only rewrites that cannot make unequal answers equal belong here; math-verify judges the rest.
    """
    s = answer.strip().rstrip(".").replace("{,}", ",")
    s = re.sub(r"\\(?:(?:left|right|displaystyle|quad)(?![a-zA-Z])|[,!;: ])", "", s)
    s = re.sub(r"\\[dt]frac", r"\\frac", s).replace("\\$", "").replace("$", "").replace("\\%", "%")
    s = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*{([^{}]*)}", r"\1", s)
    s = re.sub(r"\^\s*(?:\\circ|{\s*\\circ\s*})", "°", s)
    s = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", s)
    s = re.sub(r"_{(\d+)}$", r"_\1", re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", s))  # "1 1/2" is not "11/2"
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", s):
        s = s.replace(",", "")
    return str(int(s.split(".")[0])) if re.fullmatch(r"[-+]?\d{1,999}(\.0*)?", s) else s


def equivalent_many(pairs):
    """Is each prediction equal to its gold answer? pairs [(gold, pred)] -> [bool]. None is never equal to anything.

    String equality first, two integers are decided at once, and only the rest goes to math-verify, which needs
    milliseconds a pair and can hang on odd input: it runs in the sandbox of the code judge, under its time limit
    (its own guard is SIGALRM, which fails in threads, and is switched off).
    """
    equal = {}
    for gold, pred in pairs:
        equal[gold, pred] = False
        if gold is not None and pred is not None:
            a, b = normalise(gold), normalise(pred)
            # integers, and numbers in a base: math-verify overlooks that 52_8 is not 52_9
            plain = any(re.fullmatch(form, a) and re.fullmatch(form, b) for form in (r"-?\d+", r"\w+_\d+"))
            sure = a == b or plain or not 0 < len(b) <= 1000  # no answer is longer, and its parse would take the limit
            equal[gold, pred] = a == b if sure else None
    todo = [pair for pair, known in equal.items() if known is None]
    size = max(1, min(64, len(todo) // judge.cores()))  # in chunks: a fork costs as much as a few pairs
    chunks = [(todo[i : i + size],) for i in range(0, len(todo), size)]
    for (chunk,), found in zip(chunks, judge.parallel(_verify_chunk, chunks)):
        equal.update(zip(chunk, found))
    return [equal[gold, pred] for gold, pred in pairs]


def _verify_chunk(pairs):
    """One request to the sandbox; a pair that hangs or kills the child counts as unequal, the rest goes on after it."""
    program = {"kind": "call", "entry": "math_equal", "time_limit": 0.5 * judge.slowness()}
    done = []
    while len(done) < len(pairs):
        left = pairs[len(done) :]
        results, _, _ = judge.run_program(program, inspect.getsource(math_equal), inputs=left, longer=10)
        if ("exc", "ModuleNotFoundError") in [result[:2] for result in results]:
            raise RuntimeError("math answers need math-verify: pip install 'math-verify[antlr4_13_2]'")
        done += [(status, value) == ("ok", True) for status, value, _ in results]
        done += [False] * (len(done) < len(pairs))
    return done


def math_equal(gold, pred):
    """Runs in the sandbox. math-verify wants the gold answer first: the comparison is not symmetric."""
    import re

    import math_verify

    if re.fullmatch(r"-?[\d.,]+", gold.strip()):  # math-verify knows some units, and reads others as d * o * l * ...
        no_units = ("hundred|thousand|million|billion|trillion|dozen|times|plus|minus|over|divided|squared|cubed|sqrt|"
                    "factorial|half")
        unit = rf"^(\\?\$?-?\d[\d,]*(?:\.\d+)?)\s+(?!.*\b(?:{no_units}))[A-Za-z]{{3,}}[A-Za-z ]*$"
        pred = re.sub(unit, r"\1", pred.strip())
    pred = re.sub(r"(?<![\\a-zA-Z])(pi|sqrt)(?![a-zA-Z])", r"\\\1", pred)  # "pi/2" is not p times i
    pred = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", pred)
    parsed = [math_verify.parse(f"\\boxed{{{s}}}", parsing_timeout=None) for s in (gold, pred)]
    return bool(math_verify.verify(*parsed, timeout_seconds=None))


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
    pairs = [(a, b) for group in forms.values() for n, b in enumerate(group) for a in list(group)[:n]]
    equal = dict(zip(pairs, equivalent_many(pairs)))
    for group in forms.values():
        for b in group:  # its key is that of the first earlier answer that equals it
            group[b] = next((key for a, key in group.items() if key is not None and equal[a, b]), b)
    return [forms[p.id, p.question][normalise(key)] if p.domain == "math" and key is not None else key
            for (p, _), key in zip(items, keys)]


# ---------------------------------------------------------------------------- loaders: one row of a data set
# Each takes a row and its number. What a row lacks is a KeyError, which load() turns into "FILE:LINE: no field ...".


def _math(row, n):
    """MATH-500, AIME, GSM8K, PRM800K in the schemas of the hub and of the original releases."""
    if isinstance(row.get("question"), dict):  # openai/prm800k: {"question": {"problem", "ground_truth_answer"}, ...}
        row = {**row, **row["question"]}
    text = next(row[k] for k in ("problem", "question", "Problem") if isinstance(row.get(k), str))
    golds = ("answer", "ground_truth_answer", "extracted_groundtruth", "Answer", "solution")
    gold = next((str(row[k]) for k in golds if row.get(k) is not None), None)
    if gold is None and "label" not in row:  # PRM800K has problems without an answer
        raise KeyError("answer")
    meta = {k: row[k] for k in ("solution", "subject", "level") if row.get(k) is not None}
    if gold and ("####" in gold or "\\boxed" in gold):
        meta["solution"], gold = re.sub(r"<<.*?>>", "", gold), extract_answer(gold)  # GSM8K's calculator marks
    if "level" in meta:
        meta["level"] = int(re.sub(r"\D", "", str(meta["level"])) or 0)  # 2 in one copy of MATH-500, "Level 2"
    if gold and re.fullmatch(r"-?\d{1,3}(,\d{3})+|0\d+", gold):
        gold = normalise(gold)  # GSM8K's "1,234", AIME's "033"
    return Problem(str(row.get("unique_id") or row.get("id") or row.get("ID") or n), text, "math", gold, meta=meta)


def _first_error(row, n):
    """ProcessBench: steps and the index of the first wrong one, from 0; -1 = no error."""
    meta = {"steps": list(row["steps"]), "label": int(row["label"])}
    return Problem(str(row["id"]), row["problem"], "math", meta=meta)


# evalplus's special oracles (its eval/_special_oracle.py): tasks whose statement leaves more than one answer
ORACLES = {
    "find_zero": "root", "are_equivalent": "anything", "sum_div": "zero",
    "surface_Area": "pyramid", "digit_distance_nums": "digits",
    **dict.fromkeys(["similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
                     "intersection_array", "find_dissimilar", "Diff"], "set"),
    **dict.fromkeys(["check_str", "text_match_three", "text_starta_endb"], "truth"),
}


def _evalplus(row, n):
    """HumanEval(+) and MBPP(+): evalplus's release files (inputs without outputs), the hub's and the originals."""
    prompt, human = row["prompt"], "canonical_solution" in row and not str(row["task_id"]).startswith("Mbpp")
    reference = prompt + row["canonical_solution"] if human else row.get("code") or row["canonical_solution"]
    entry = row.get("entry_point")
    if entry is None:  # MBPP names no entry point: it is the function that the first test calls
        names = {f.name for f in ast.parse(reference).body if isinstance(f, (ast.FunctionDef, ast.ClassDef))}
        called = [c.func for c in ast.walk(ast.parse(row["test_list"][0])) if isinstance(c, ast.Call)]
        entry = next(f.id for f in called if isinstance(f, ast.Name) and f.id in names)
        prompt = f'"""\n{prompt}\n{row["test_list"][0]}\n"""\n'
    root = human and entry == "find_zero"
    tests = {"entry": entry, "reference": reference, "atol": row.get("atol") or (1e-4 if root else 0)}
    if entry in ORACLES and human == root:
        tests["oracle"] = ORACLES[entry]
    if "base_input" in row:
        forms = (judge.examples(row.get("assertion") or "", entry) or [[]])[0]
        inputs = [[_typed(v, forms[min(i, len(forms) - 1)]) if forms else v for i, v in enumerate(args)]
                  for args in [*row["base_input"], *(row["plus_input"] or [])]]
        tests.update(kind="call", inputs=inputs, example_inputs=inputs[: len(row["base_input"])][:8])
    else:
        tests.update(_table(row.get("test") or "\n".join([*row.get("test_imports", ()), *row["test_list"]])))
    helpers = prompt[: re.search(rf"^def {entry}\b", prompt, re.M).start()] if human else ""
    name = str(row["task_id"])
    return Problem(name if "/" in name else f"Mbpp/{name}", prompt, "code", tests=tests,
                   meta={"prompt": prompt, "helpers": helpers})


def _table(code):
    """evalplus's self-contained tests hold literal lists `inputs` and mostly `results`: calls. Others are asserts."""
    found = {}
    for node in ast.walk(ast.parse(code)):
        name = getattr(node.targets[0], "id", None) if isinstance(node, ast.Assign) else None
        if name in ("inputs", "results"):
            with contextlib.suppress(ValueError):  # results that are not literals: the reference solution says
                found["inputs" if name == "inputs" else "outputs"] = ast.literal_eval(node.value)
    if "inputs" in found:
        return {"kind": "call", "example_inputs": found["inputs"][:3], **found}
    return {"kind": "assert", "test": code}


def _typed(value, form):
    """Give JSON the types of an example: [[1, 2], [3]] like [(0, 0)] -> [(1, 2), (3,)]; "2j" like 0 -> 2j.

    Containers are typed by depth, as tuples where the example has both; the last depth stands for all below it.
    """
    if isinstance(value, str) and isinstance(form, (int, complex)) and re.fullmatch(r"[-+.\dej()]+", value):
        return complex(value)
    kinds, level = [], [form]
    while level := [v for v in level if isinstance(v, (list, tuple, set, dict))]:
        kinds.append(next((kind for kind in (tuple, set) if kind in map(type, level)), list))
        level = [item for v in level for item in (v.values() if isinstance(v, dict) else v)]

    def convert(value, kinds):
        below = kinds[1:] or kinds
        if isinstance(value, dict):
            return {k: convert(v, below) for k, v in value.items()}
        return kinds[0](convert(v, below) for v in value) if isinstance(value, list) else value

    return convert(value, kinds if len(kinds) > 1 else [*kinds, list])


def _bigcodebench(row, n):
    tests = {"kind": "unittest", "entry": row["entry_point"], "test": row["test"], "time_limit": 20.0,
             "reference": row["complete_prompt"] + row["canonical_solution"]}
    meta = {"prompt": row["complete_prompt"], "helpers": row["code_prompt"].split(f"def {row['entry_point']}")[0]}
    return Problem(row["task_id"], row["complete_prompt"], "code", tests=tests, meta=meta)


PRELUDE = "".join(f"from {m} import *\n" for m in "typing collections functools itertools math".split()) + (
    "import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys\n"
)  # what LeetCode's statements take for granted


def _contest(name, question, inputs, outputs, entry=None, shown=(), solutions=(), seconds=4.0, **meta):
    """The shared end of the contest loaders: stdin tests, or calls if a function is named."""
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs but {len(outputs)} outputs")
    if entry:
        tests, shown = {"kind": "call", "entry": entry, "json": True, "prelude": PRELUDE}, shown or inputs[:2]
    else:
        inputs, outputs = (["\n".join(v) if isinstance(v, list) else v for v in side] for side in (inputs, outputs))
        asked, tests = " ".join(question.split()), {"kind": "stdin"}
        stated = [v for v in inputs if v.strip() and " ".join(v.split()) in asked]  # only what the statement shows
        shown = shown or stated[:4] or inputs[:1]
    tests.update(inputs=inputs, outputs=outputs, example_inputs=shown, time_limit=seconds * slowness(),
                 reference=solutions[0] if solutions else None)
    return Problem(str(name), question, "code", tests=tests, meta=meta)


def _apps(row, n):
    """APPS and TACO (JSON strings inside JSON), and the derived form of CodeContests (plain objects)."""
    def integer(digits):  # APPS has some of 9,000; int() refuses more than 4,300
        return int(digits) if len(digits) < 4000 else int(decimal.Decimal(digits))
    cases = row["tests"] if "tests" in row else json.loads(row["input_output"] or '{"inputs": [], "outputs": []}',
                                                           parse_int=integer)
    solutions = row.get("solutions") or []
    question = (row["problem"] if "problem" in row else row["question"]) + "\n\n" + (row.get("starter_code") or "")
    return _contest(row.get("problem_id", row.get("id", n)), question.rstrip(), cases["inputs"], cases["outputs"],
                    cases.get("fn_name"), solutions=json.loads(solutions) if isinstance(solutions, str) else solutions)


def _codecontests(row, n):
    """deepmind/code_contests. Python only: language 3 of its solutions is Python 3 (1 is Python 2)."""
    if "description" not in row:
        return _apps(row, n)
    sets = [row[k] for k in ("public_tests", "private_tests", "generated_tests") if row.get(k)]
    inputs, outputs = ([v for s in sets for v in s[side]] for side in ("input", "output"))
    limit = row.get("time_limit") or {}
    seconds = max(4.0, 2 * (limit.get("seconds") or 0) + (limit.get("nanos") or 0) / 5e8)  # C++'s limits, doubled
    solutions = [s for s, language in zip(row["solutions"]["solution"], row["solutions"]["language"]) if language == 3]
    return _contest(row["name"], row["description"], inputs, outputs, shown=list(row["public_tests"]["input"]),
                    solutions=solutions, seconds=seconds)


class _PlainUnpickler(pickle.Unpickler):
    """LiveCodeBench pickles a JSON string. Unpickling can call whatever find_class finds, so this one finds nothing."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name} in pickled tests")


def _livecodebench(row, n):
    hidden = row["private_test_cases"]
    if not hidden.lstrip().startswith("["):
        hidden = _PlainUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(hidden)))).load()
    shown = json.loads(row["public_test_cases"])
    cases = shown + json.loads(hidden)
    inputs, outputs, entry = [c["input"] for c in cases], [c["output"] for c in cases], None
    if cases[0]["testtype"] == "functional":  # one JSON argument a line
        entry = json.loads(row["metadata"])["func_name"]
        inputs = [[json.loads(a) for a in v.strip().split("\n")] for v in inputs]
        outputs = list(map(json.loads, outputs))
    question = f"{row['question_content']}\n\n{row.get('starter_code') or ''}".rstrip()
    return _contest(row["question_id"], question, inputs, outputs, entry, shown=inputs[: len(shown)],
                    date=str(row["contest_date"]))


def _recoded(tests, code):
    """The same with all values coded, and without what is only true of a form or a machine."""
    return {k: code(v) if k in ("inputs", "example_inputs", "outputs") else v
            for k, v in tests.items() if k not in ("packed", "seconds")}


def packed(tests):
    """Tests as JSON can carry them: MBPP+ has complex numbers, sets, and keys that are tuples."""
    return tests and {**_recoded(tests, judge.encode), "packed": True}


def unpacked(tests):
    """The inverse of packed(); tests that were written otherwise stay as they are."""
    return _recoded(tests, judge.decode) if tests and tests.get("packed") else tests


def own_row(row, n):
    """This project's own form: {"id", "question", "answer"} or {"id", "question", "tests": {...}}."""
    tests, answer = unpacked(row.get("tests")), row.get("answer")
    if tests and tests.get("kind") not in ("call", "stdin", "assert", "unittest"):
        raise ValueError(f"tests of kind {tests.get('kind')!r}")
    answer = None if answer is None else str(answer)
    return Problem(str(row["id"]), row["question"], "code" if tests else "math", answer, tests, row.get("meta") or {})


# name -> (row function, hub id, default split, data files if the hub's own loading would need a script, which
# datasets >= 4 refuses to run)
TASKS = {
    "tiny-math": (own_row, None, "test", None),
    "tiny-code": (own_row, None, "test", None),
    "gsm8k": (_math, "openai/gsm8k:main", "test", None),
    "math500": (_math, "HuggingFaceH4/MATH-500", "test", None),
    "aime24": (_math, "math-ai/aime24", "test", None),
    "aime25": (_math, "math-ai/aime25", "test", None),
    "prm800k": (_math, "tasksource/PRM800K", "test", "phase2_{split}.jsonl"),
    "processbench": (_first_error, "Qwen/ProcessBench", "gsm8k", None),
    "humaneval+": (_evalplus, "evalplus/humanevalplus", "test", None),
    "mbpp+": (_evalplus, "evalplus/mbppplus", "test", None),
    "bigcodebench": (_bigcodebench, "bigcode/bigcodebench", "v0.1.4", None),
    "bigcodebench-hard": (_bigcodebench, "bigcode/bigcodebench-hard", "v0.1.4", None),
    "livecodebench": (_livecodebench, "livecodebench/code_generation_lite", "test", "{split}*.jsonl"),
    "apps": (_apps, "codeparrot/apps", "train", "{split}.jsonl"),
    "taco": (_apps, "BAAI/TACO", "train", "ALL/{split}-*.parquet"),
    "codecontests": (_codecontests, "deepmind/code_contests", "train", None),
}


def load(task, data=None, split=None, limit=None, seed=0):
    """A task's problems, in file order. data: a local .json, .jsonl or .gz file in place of the hub.

    split: the hub's split; for livecodebench a window of contest dates "2024-08-01:2025-02-01" (end excluded).
    seed: only for the tiny world, which makes its problems. Raises ValueError "FILE:LINE: what is wrong".
    """
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
