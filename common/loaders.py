"""One function for each benchmark: a row of its data set -> a Problem. tasks.load() reads the rows."""
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

from common import judge
from common.answers import extract_answer, normalise
from common.judge import slowness


@dataclass
class Problem:
    id: str
    question: str
    domain: str  # "math" | "code"
    answer: str | None = None
    tests: dict | None = None  # code; common/judge.py says what is in it
    meta: dict = field(default_factory=dict)


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


def _contest(name, question, inputs, outputs, entry=None, shown=(), solutions=(), seconds=4.0, wrapped=False,
             **meta):
    """The shared end of the contest loaders: stdin tests, or calls if a function is named."""
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs but {len(outputs)} outputs")
    if entry:
        tests, shown = {"kind": "call", "entry": entry, "json": True, "wrapped": wrapped}, shown or inputs[:2]
    else:
        inputs, outputs = (["\n".join(v) if isinstance(v, list) else v for v in side] for side in (inputs, outputs))
        asked, tests = " ".join(question.split()), {"kind": "stdin"}
        stated = [v for v in inputs if v.strip() and " ".join(v.split()) in asked]  # only what the statement shows
        shown = shown or stated[:4] or inputs[:1]
    tests.update(inputs=inputs, outputs=outputs, example_inputs=shown, time_limit=seconds * slowness(),
                 prelude="contest", reference=solutions[0] if solutions else None)
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
                    cases.get("fn_name"), wrapped=True,
                    solutions=json.loads(solutions) if isinstance(solutions, str) else solutions)


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
