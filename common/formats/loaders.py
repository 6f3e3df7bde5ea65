"""One function a benchmark: a row of its data set -> a Problem. tasks.load() reads the rows."""
import ast
import base64
import contextlib
import decimal
import io
import json
import pickle
import re
import zlib
from dataclasses import dataclass, field
from itertools import chain

from common.formats.converters import first_error_labels
from common.grading.answers import extract_answer
from common.grading.inside import encode
from common.grading.judge import decode, slowness
from common.grading.notation import normalise
from common.grading.programs import examples
from common.run import expect


@dataclass
class Problem:
    id: str
    question: str
    domain: str  # "math" | "code"
    answer: str | list[str] | None = None  # a list: any of them is right
    tests: dict | None = None  # code; common/grading/judge.py says what is in it
    meta: dict = field(default_factory=dict)


WORKED = re.compile(r"####|\\boxed|^A:", re.MULTILINE)  # a solution where an answer is expected


def _math(row, n):
    """MATH-500, AIME, GSM8K, PRM800K in the schemas of the hub and of the original releases."""
    if isinstance(row.get("question"), dict):  # openai/prm800k: the problem and its answer
        row = {**row, **row["question"]}
    text = next(row[k] for k in ("problem", "question", "Problem") if isinstance(row.get(k), str))
    golds = ("answer", "ground_truth_answer", "extracted_groundtruth", "Answer", "final_answer",
             "ground_truth", "solution")
    gold = next((row[k] for k in golds if row.get(k) is not None), None)
    if gold is None and "label" not in row:  # PRM800K has problems without an answer
        raise KeyError("answer")
    meta = {k: row[k] for k in ("solution", "subject", "level") if row.get(k) is not None}
    if isinstance(gold, str) and WORKED.search(gold):
        meta["solution"] = re.sub(r"<<.*?>>", "", gold)  # GSM8K's calculator marks
    gold = gold_answer(gold)
    if "level" in meta:  # 2 in one copy of MATH-500, "Level 2" in the other
        meta["level"] = int(re.sub(r"\D", "", str(meta["level"])) or 0)
    if isinstance(gold, str) and re.fullmatch(r"-?\d{1,3}(,\d{3})+|0\d+", gold):
        gold = normalise(gold)  # GSM8K's "1,234", AIME's "033"
    name = next((row[k] for k in ("unique_id", "id", "ID", "problem_idx") if row.get(k)), n)
    return Problem(str(name), text, "math", gold, meta=meta)


def gold_answer(answer):
    """As text, or a list of texts any of which is right (OlympiadBench's final_answer). Of a worked
    solution (GSM8K's) what it ends in."""
    if isinstance(answer, list):
        return list(map(str, answer))
    if WORKED.search(str(answer)):
        return extract_answer(answer)
    return None if answer is None else str(answer)


def _first_error(row, n):
    """ProcessBench: steps and the index of the first wrong one, from 0; -1 = no error."""
    meta = {"steps": list(row["steps"]), "label": int(row["label"])}
    first_error_labels(meta["steps"], meta["label"])  # a ValueError if it is no step's
    return Problem(str(row["id"]), row["problem"], "math", meta=meta)


# Tasks whose statement leaves more than one answer: evalplus's eval/_special_oracle.py
ORACLES = {
    "find_zero": "root", "are_equivalent": "anything", "sum_div": "zero",
    "surface_Area": "pyramid", "digit_distance_nums": "digits",
    **dict.fromkeys(["similar_elements", "find_char_long", "common_in_nested_lists", "Diff",
                     "extract_singly", "larg_nnum", "intersection_array",
                     "find_dissimilar"], "set"),
    **dict.fromkeys(["check_str", "text_match_three", "text_starta_endb"], "truth"),
}


def _evalplus(row, n):
    """HumanEval(+) and MBPP(+): evalplus's release files, the hub's sets, and the originals."""
    name, prompt, entry = str(row["task_id"]), row["prompt"], row.get("entry_point")
    human = "canonical_solution" in row and not name.startswith("Mbpp")
    if human:
        reference = prompt + row["canonical_solution"]
        helpers = prompt[:re.search(rf"^def {entry}\b", prompt, re.M).start()]
    else:
        reference = row.get("code") or row["canonical_solution"]
        helpers = ""
    if entry is None:
        entry = _first_called(row["test_list"][0], reference)
        prompt = f'"""\n{prompt}\n{row["test_list"][0]}\n"""\n'
    root = human and entry == "find_zero"  # its test has no outputs: a root is right within 1e-4
    atol = row.get("atol") or (1e-4 if root else 0)
    tests = {"entry": entry, "reference": reference, "atol": atol}
    if entry in ORACLES and human == root:
        tests["oracle"] = ORACLES[entry]
    if "base_input" in row:  # the release file: inputs without outputs, which the reference gives
        inputs = [*row["base_input"], *(row["plus_input"] or [])]
        shown = examples(row.get("assertion") or "", entry)
        if shown and shown[0]:
            # the example's last argument stands for all that follow
            forms = [*shown[0], *[shown[0][-1]] * max(map(len, inputs), default=0)]
            inputs = [list(map(_typed, args, forms)) for args in inputs]
        tests.update(kind="call", inputs=inputs,
                     example_inputs=inputs[:len(row["base_input"])][:8])
    else:
        code = row.get("test") or "\n".join([*row.get("test_imports", ()), *row["test_list"]])
        tests.update(_table(code))
    return Problem(name if "/" in name else f"Mbpp/{name}", prompt, "code", tests=tests,
                   meta={"prompt": prompt, "helpers": helpers})


def _first_called(test, reference):
    """MBPP names no entry point: it is the reference's function that the first test calls."""
    defined = {node.name for node in ast.parse(reference).body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    called = [node.func for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call)]
    return next(f.id for f in called if isinstance(f, ast.Name) and f.id in defined)


def _table(code):
    """Test code -> tests: calls where it holds evalplus's literal list `inputs`, else asserts."""
    lists = {}
    for node in ast.walk(ast.parse(code)):
        name = getattr(node.targets[0], "id", None) if isinstance(node, ast.Assign) else None
        if name in ("inputs", "results"):
            with contextlib.suppress(ValueError):  # no literals: the reference gives the results
                key = "inputs" if name == "inputs" else "outputs"
                lists[key] = ast.literal_eval(node.value)
    if "inputs" in lists:
        return {"kind": "call", "example_inputs": lists["inputs"][:3], **lists}
    return {"kind": "assert", "test": code}


def _typed(value, form):
    """Give JSON the types of an example: [[1, 2], [3]] like [(0, 0)] -> [(1, 2), (3,)];
    "2j" like 0 -> 2j.

    Containers are typed by depth, as tuples where the example has both; the last depth stands for
    all below it.
    """
    number = isinstance(form, (int, complex))
    if isinstance(value, str) and number and re.fullmatch(r"[-+.\dej()]+", value):
        return complex(value)
    kinds, level = [], [form]
    while level := [v for v in level if isinstance(v, (list, tuple, set, dict))]:
        types = {type(v) for v in level}
        kinds.append(next((kind for kind in (tuple, set) if kind in types), list))
        items = [v.values() if isinstance(v, dict) else v for v in level]
        level = list(chain.from_iterable(items))

    def convert(value, kinds):
        below = kinds[1:] or kinds
        if isinstance(value, dict):
            return {k: convert(v, below) for k, v in value.items()}
        return kinds[0](convert(v, below) for v in value) if isinstance(value, list) else value

    return convert(value, kinds if len(kinds) > 1 else [*kinds, list])


def _bigcodebench(row, n):
    prompt, entry = row["complete_prompt"], row["entry_point"]
    tests = {"kind": "unittest", "entry": entry, "test": row["test"], "time_limit": 20.0,
             "reference": prompt + row["canonical_solution"]}
    helpers = row["code_prompt"].split(f"def {entry}")[0]
    return Problem(row["task_id"], prompt, "code", tests=tests,
                   meta={"prompt": prompt, "helpers": helpers})


def _contest(name, question, inputs, outputs, entry=None, shown=(), solutions=(), seconds=4.0,
             wrapped=False, **meta):
    """The shared end of the contest loaders: stdin tests, or calls if a function is named."""
    expect(len(inputs) == len(outputs), f"{len(inputs)} inputs but {len(outputs)} outputs")
    if entry:
        tests = {"kind": "call", "entry": entry, "wrapped": wrapped}
        shown = shown or inputs[:2]
    else:
        tests = {"kind": "stdin"}
        inputs, outputs = list(map(_joined, inputs)), list(map(_joined, outputs))
        # examples that a solution may see are those that the statement shows
        statement = " ".join(question.split())
        stated = [v for v in inputs if v.strip() and " ".join(v.split()) in statement]
        shown = shown or stated[:4] or inputs[:1]
    tests.update(inputs=inputs, outputs=outputs, example_inputs=shown, contest=True,
                 time_limit=seconds * slowness(), reference=solutions[0] if solutions else None)
    return Problem(str(name), question, "code", tests=tests, meta=meta)


def _joined(lines):
    return "\n".join(lines) if isinstance(lines, list) else lines


def _apps(row, n):
    """APPS and TACO (JSON strings inside JSON), and the derived form of CodeContests."""
    if "tests" in row:
        cases = row["tests"]
    else:
        cases = json.loads(row["input_output"] or '{"inputs": [], "outputs": []}',
                           parse_int=_integer)
    solutions = row.get("solutions") or []
    if isinstance(solutions, str):
        solutions = json.loads(solutions)
    question = row["problem"] if "problem" in row else row["question"]
    question += "\n\n" + (row.get("starter_code") or "")
    return _contest(row.get("problem_id", row.get("id", n)), question.rstrip(), cases["inputs"],
                    cases["outputs"], cases.get("fn_name"), solutions=solutions, wrapped=True)


def _integer(digits):
    """APPS has integers of 9,000 digits; int() refuses more than 4,300."""
    return int(digits) if len(digits) < 4000 else int(decimal.Decimal(digits))


def _codecontests(row, n):
    """deepmind/code_contests, its solutions in Python 3 only."""
    if "description" not in row:
        return _apps(row, n)
    inputs, outputs = [], []
    for name in ("public_tests", "private_tests", "generated_tests"):
        cases = row.get(name) or {"input": [], "output": []}
        inputs += cases["input"]
        outputs += cases["output"]
    limit = row.get("time_limit") or {}
    seconds = 2 * (limit.get("seconds") or 0) + (limit.get("nanos") or 0) / 5e8  # C++'s, doubled
    solutions = zip(row["solutions"]["solution"], row["solutions"]["language"])
    return _contest(row["name"], row["description"], inputs, outputs,
                    shown=list(row["public_tests"]["input"]),
                    solutions=[code for code, language in solutions if language == 3],  # 1 is 2.7
                    seconds=max(4.0, seconds))


class _PlainUnpickler(pickle.Unpickler):
    """LiveCodeBench pickles a JSON string. Unpickling calls what find_class finds: here nothing."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name} in pickled tests")


def _livecodebench(row, n):
    hidden = row["private_test_cases"]
    if not hidden.lstrip().startswith("["):
        pickled = zlib.decompress(base64.b64decode(hidden))
        hidden = _PlainUnpickler(io.BytesIO(pickled)).load()
    shown = json.loads(row["public_test_cases"])
    cases = shown + json.loads(hidden)
    inputs, outputs = [case["input"] for case in cases], [case["output"] for case in cases]
    entry = None
    if cases[0]["testtype"] == "functional":  # one JSON argument a line
        entry = json.loads(row["metadata"])["func_name"]
        inputs = [list(map(json.loads, v.strip().split("\n"))) for v in inputs]
        outputs = list(map(json.loads, outputs))
    question = f"{row['question_content']}\n\n{row.get('starter_code') or ''}".rstrip()
    return _contest(row["question_id"], question, inputs, outputs, entry,
                    shown=inputs[:len(shown)], date=str(row["contest_date"]))


def _recoded(tests, code):
    """Tests with all values coded, without entries that hold for one form or machine only."""
    return {k: code(v) if k in ("inputs", "example_inputs", "outputs") else v
            for k, v in tests.items() if k not in ("packed", "seconds", "expected", "broken")}


def packed(tests):
    """Tests as JSON can carry them: MBPP+ has complex numbers, sets, and keys that are tuples."""
    return tests and {**_recoded(tests, encode), "packed": True}


def unpacked(tests):
    """The inverse of packed(); tests that were written otherwise stay as they are."""
    return _recoded(tests, decode) if tests and tests.get("packed") else tests


def check_tests(tests):
    """ValueError now rather than a traceback of the judge, after all the search has been done."""
    kind, inputs = tests.get("kind"), tests.get("inputs", [])
    expect(kind in ("call", "stdin", "assert", "unittest"), f"tests of kind {kind!r}")
    expect(isinstance(tests.get("time_limit") or 0.0, (int, float)),
           f"time_limit: {tests.get('time_limit')!r} is no number of seconds")
    if kind in ("assert", "unittest"):
        return
    form = str if kind == "stdin" else (list, tuple)
    expect(inputs and all(isinstance(args, form) for args in inputs),
           f"tests of kind {kind}: inputs must be a list, each a text (stdin) or a list (call)")
    expect(len(tests.get("outputs", [] if kind == "stdin" else inputs)) == len(inputs),
           f"{len(inputs)} inputs need as many outputs")


def own_row(row, n):
    """This project's own form: {"id", "question", "answer"} or {"id", "question", "tests"}."""
    tests, answer = unpacked(row.get("tests")), row.get("answer")
    if tests:
        check_tests(tests)
    return Problem(str(row["id"]), row["question"], "code" if tests else "math",
                   gold_answer(answer), tests, row.get("meta") or {})


# name -> (row function, hub id, default split, data files where the hub's own loading would need a
# script, which datasets >= 4 refuses to run)
TASKS = {
    "tiny-math": (own_row, None, "test", None),
    "tiny-code": (own_row, None, "test", None),
    "gsm8k": (_math, "openai/gsm8k:main", "test", None),
    "math500": (_math, "HuggingFaceH4/MATH-500", "test", None),
    "aime24": (_math, "math-ai/aime24", "test", None),
    "aime25": (_math, "math-ai/aime25", "test", None),
    "aime26": (_math, "MathArena/aime_2026", "train", None),
    "prm800k": (_math, "tasksource/PRM800K", "test", "phase2_{split}.jsonl"),
    "processbench": (_first_error, "Qwen/ProcessBench", "gsm8k", None),
    "humaneval+": (_evalplus, "evalplus/humanevalplus", "test", None),
    "mbpp+": (_evalplus, "evalplus/mbppplus", "test", None),
    "bigcodebench": (_bigcodebench, "bigcode/bigcodebench", "v0.1.4", None),
    "bigcodebench-hard": (_bigcodebench, "bigcode/bigcodebench-hard", "v0.1.4", None),
    "livecodebench": (_livecodebench, "livecodebench/code_generation_lite", "test",
                      "{split}*.jsonl"),
    "apps": (_apps, "codeparrot/apps", "train", "{split}.jsonl"),
    "taco": (_apps, "BAAI/TACO", "train", "ALL/{split}-*.parquet"),
    "codecontests": (_codecontests, "deepmind/code_contests", "train", None),
}


# a field that rows of these tasks have and others have not; the first that is there decides
MATHS = ("math500", "aime24", "aime25", "aime26")
FIELDS = {"complete_prompt": ("bigcodebench", "bigcodebench-hard"),
          "question_content": ("livecodebench",), "input_output": ("apps", "taco"),
          "public_tests": ("codecontests",), "test_list": ("mbpp+",), "Problem": MATHS[1:],
          "problem_idx": MATHS[1:], "extracted_groundtruth": MATHS[1:], "subject": MATHS[:1],
          "level": MATHS[:1], "problem": MATHS}


def likely_tasks(row):
    """The tasks that a row may be of, by its fields; () if nobody can tell."""
    if isinstance(row.get("question"), dict) and "label" in row:
        return ("prm800k",)
    if "steps" in row and "label" in row:
        return ("processbench",)
    if "tests" in row:
        return ()
    if "####" in str(row.get("answer")) or "\nA: " in str(row.get("ground_truth")):
        return ("gsm8k",)
    if "canonical_solution" in row and "task_id" in row and "complete_prompt" not in row:
        return ("humaneval+",) if str(row["task_id"]).startswith("HumanEval") else ("mbpp+",)
    return next((tasks for field, tasks in FIELDS.items() if field in row), ())
