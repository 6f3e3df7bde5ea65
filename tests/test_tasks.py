"""Answers and loaders. Rows are made here in the schemas of the real data sets, which are used where they exist."""

import base64
import gzip
import json
import os
import pickle
import threading
import zlib
from pathlib import Path

import pytest

from common import judge, loaders, tasks
from common.answers import equivalent_many, extract_answer
from common.tasks import Problem, judge_many, load, vote_keys

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def stop_workers():
    yield
    judge.close()


def real(name):
    if not (DATA / name).exists():
        pytest.skip(f"no {name} here")
    return str(DATA / name)


# ---------------------------------------------------------------------------- math


@pytest.mark.parametrize("text, want", [
    (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"first \boxed{1}, no: \boxed{\text{2 {a} b}} done", r"\text{2 {a} b}"),
    (r"\boxed{5} and then it breaks off \boxed{\frac{1", "5"),
    ("48/2 = <<48/2=24>>24 clips.\n#### 1,234", "1,234"),
    ("The answer is 3.14. I am sure.", "3.14"),
    ("**Answer:** $x+1$", "x+1"),
    ("Final Answer: The final answer is $7$. I hope it is correct.", "7"),
    ("The answer is\n12", "12"),
    (r"\fbox{7}", "7"),
    ("#### Step 1: add\nThe answer is 7.", "7"),  # a heading
    ("so\n#### 18\n\nQuestion: and then?", "18"),
    ("so\n#### x+1\n", "x+1"),
    ("We get 5 and then 6", None),
    ("", None),
])
def test_extract_answer(text, want):
    assert extract_answer(text) == want


@pytest.mark.parametrize("gold, pred, want", [
    ("1", "21", False),  # a right answer is not a substring
    ("21", "1", False),
    ("1234", "1{,}234", True),
    ("1234", r"\$1,234", True),
    ("33", "033", True),
    ("18", "18 dollars per day", True),
    ("7", "7 million dollars", False),
    ("7", "7 squared", False),
    ("5", "5.0", True),
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{1}{2}", r"\dfrac12", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
    (r"(3, \frac{\pi}{2})", r"(\frac{\pi}{2}, 3)", False),
    (r"\frac{\pi}{2}", "pi/2", True),
    (r"2\sqrt{2}", r"\sqrt{8}", True),
    (r"x^2+2x+1", "(x+1)^2", True),
    (r"\text{Evelyn}", "Evelyn", True),
    (r"90^\circ", "90^{\\circ}", True),
    (r"\frac{1}{2}", r"\frac{1}{3}", False),
    ("52_8", "52_{8}", True),
    ("52_8", "52_{9}", False),
    ("5", None, False),
    ("5", "", False),
])
def test_equivalent(gold, pred, want):
    assert equivalent_many([(gold, pred)]) == [want]


def test_an_answer_that_hangs_is_unequal_and_the_rest_goes_on(monkeypatch):
    monkeypatch.setattr(judge, "slowness", lambda: 0.2)  # a limit of one CPU second
    pairs = [(r"\frac12", "0.5"), ("7", "9^{9^{9^{9^{9}}}}!"), (r"\frac13", r"\frac{2}{6}")]
    assert equivalent_many(pairs) == [True, False, True]


def test_equivalence_works_in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(equivalent_many([(r"\frac{3}{4}", "0.75")])))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize("task, name", [("math500", "math500/test.jsonl"), ("gsm8k", "gsm8k/test.jsonl"),
                                        ("aime24", "aime/aime24.jsonl")])
def test_references_grade_right_and_a_constant_wrong(task, name):
    problems = load(task, data=real(name))
    assert all(v.ok for v in judge_many([(p, f"so \\boxed{{{p.answer}}}") for p in problems]))
    constant = judge_many([(p, r"\boxed{123454321}") for p in problems[:30]])
    assert not any(v.ok for v in constant) and {v.why for v in constant} == {"wrong answer"}


def test_tests_travel_through_json():
    tests = {"kind": "call", "entry": "f", "inputs": [[1j, {2}], [(1, 2), {(0, 1): 2}]], "outputs": [(3,), 1 << 60]}
    assert loaders.unpacked(json.loads(json.dumps(loaders.packed(tests)))) == tests
    assert loaders.unpacked({"kind": "call", "inputs": [[{"a": 1}]]}) == {"kind": "call", "inputs": [[{"a": 1}]]}
    assert judge.judge_many([({"kind": "stdin", "inputs": [], "outputs": []}, "print(1)")]) == ["no tests"]


def test_numbers_without_ids_do_not_collide_between_tasks(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n')
    assert [load(t, tmp_path / "x.jsonl")[0].id for t in ("gsm8k", "aime24")] == ["gsm8k-0", "aime24-0"]


def test_an_archive_that_breaks_off_is_named(tmp_path):
    (tmp_path / "whole.gz").write_bytes(gzip.compress(b'{"question": "Q", "answer": "#### 1"}\n' * 200))
    (tmp_path / "cut.gz").write_bytes((tmp_path / "whole.gz").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut.gz:\d+: .*end-of-stream"):
        load("gsm8k", data=tmp_path / "cut.gz")


def test_vote_keys_of_math():
    p, q = Problem("p", "q", "math", "0.5"), Problem("q", "other", "math", "7")
    texts = [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", "no idea", r"\boxed{\dfrac12}", r"\boxed{7}"]
    a, b, none, c, d = vote_keys([(p, t) for t in texts])
    assert a == b == c != d and none is None
    assert vote_keys([(q, r"\boxed{7.0}")]) == ["7"]


def test_vote_keys_of_code_without_tests():
    stack = Problem("q", "Write a stack.\n>>> s.push(1)\n", "code")
    a, b, c = vote_keys([(stack, t) for t in ("x = 1", "x  =  1  # one", "x = 2")])
    assert a == b != c


def test_problems_without_tests_or_answer():
    items = [(Problem("a", "q", "code"), "x = 1"), (Problem("b", "q", "math"), r"\boxed{1}"),
             (Problem("c", "q", "math", "1"), "?")]
    assert [v.why for v in judge_many(items)] == ["no tests", "no gold answer", "no answer"]
    assert vote_keys(items)[1:] == ["1", None]


# ---------------------------------------------------------------------------- loaders

LCB = {"question_id": "1_A", "question_content": "Add one.", "contest_date": "2024-09-01T00:00:00", "metadata": "{}",
       "starter_code": "", "difficulty": "easy", "platform": "codeforces",
       "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}])}
HIDDEN = json.dumps([{"input": "5\n", "output": "6\n", "testtype": "stdin"}])


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


ADD = "def add(a, b):\n    return a + b\n"
HUMAN = {"task_id": "HumanEval/0", "prompt": 'def add(a, b):\n    """>>> add(1, 2)\n    3\n    """\n',
         "canonical_solution": "    return a + b\n", "entry_point": "add"}
ROWS = {
    "gsm8k": ("gsm8k", {"question": "Q", "answer": "2*3 = <<2*3=6>>6\n#### 1,234"}),
    "math500": ("math500", {"problem": "Q", "solution": "S", "answer": "1234", "level": "Level 2", "unique_id": "a/1"}),
    "aime24": ("aime24", {"problem": "Q", "extracted_groundtruth": "033", "url": "u"}),
    "aime24-hub": ("aime24", {"id": 1, "problem": "Q", "solution": r"\boxed{033}"}),
    "prm800k": ("prm800k", {"question": {"problem": "Q", "ground_truth_answer": "33"}, "label": {"steps": []}}),
    "processbench": ("processbench", {"id": "x", "problem": "Q", "steps": ["a", "b"], "label": 1, "generator": "g",
                                      "final_answer_correct": False}),
    "humaneval": ("humaneval+", {**HUMAN, "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n"}),
    "humaneval+": ("humaneval+", {**HUMAN, "base_input": [[1, 2]], "plus_input": [[0.5, 1]], "atol": 0}),
    "humaneval+hub": ("humaneval+", {**HUMAN, "test": "def check(candidate):\n    inputs = [[1, 2]]\n"
                                     "    results = [3]\n"}),
    "mbpp": ("mbpp+", {"task_id": 2, "prompt": "Add.", "code": ADD, "test_imports": ["import math"],
                       "test_list": ["assert add(1, 2) == math.floor(3.5)"]}),
    "mbpp+": ("mbpp+", {"task_id": "Mbpp/3", "prompt": '"""\nLast.\n"""\n', "entry_point": "last", "atol": 0,
                        "canonical_solution": "def last(t):\n    assert type(t) is tuple\n    return t[-1:]\n",
                        "assertion": "assert last((1, 2)) == (2,)", "base_input": [[[1, 2]]], "plus_input": [[[]]]}),
    "bigcodebench": ("bigcodebench", {
        "task_id": "BigCodeBench/0", "complete_prompt": "def task_func(a):\n    '''Add one.'''\n", "libs": "['random']",
        "canonical_solution": "    return a + 1\n", "code_prompt": "def task_func(a):\n", "entry_point": "task_func",
        "test": "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
                "        self.assertEqual(task_func(1), 2)\n"}),
    "livecodebench": ("livecodebench", {**LCB, "private_test_cases": packed(HIDDEN)}),
    "livecodebench-functional": ("livecodebench", {
        **LCB, "metadata": '{"func_name": "add"}', "private_test_cases": "[]", "public_test_cases": json.dumps(
            [{"input": '[1]\n{"a": 2}', "output": "[1]", "testtype": "functional"}])}),
    "apps": ("apps", {
        "problem_id": 7, "question": "Add one.\nInput\n1\n", "starter_code": "",
        "solutions": json.dumps(["print(int(input())+1)"]),
        "input_output": json.dumps({"inputs": ["9\n", "1\n"], "outputs": ["10\n", "2\n"]})}),
    "apps-call": ("apps", {
        "problem_id": 8, "question": "Pair.", "starter_code": "class Solution:",
        "solutions": json.dumps(["class Solution:\n    def pair(self, a: List[int]):\n        return (a[0], a[0])\n"]),
        "input_output": json.dumps({"fn_name": "pair", "inputs": [[[1]]], "outputs": [[[1, 1]]]})}),
    "taco": ("taco", {"question": "Add one.", "solutions": "[]", "starter_code": "", "difficulty": "EASY",
                      "input_output": json.dumps({"inputs": ["1"], "outputs": ["2"]})}),
    "codecontests": ("codecontests", {
        "name": "c", "description": "Add one.", "public_tests": {"input": ["1\n"], "output": ["2\n"]},
        "private_tests": {"input": ["2\n"], "output": ["3\n"]}, "generated_tests": {"input": [], "output": []},
        "time_limit": {"seconds": 3, "nanos": 0},
        "solutions": {"language": [2, 3], "solution": ["C++", "print(int(input())+1)"]}}),
    "own-math": ("tiny-math", {"id": 1, "question": "Q", "answer": 33}),
    "own-code": ("tiny-code", {"id": 2, "question": "Q", "tests": {
        "kind": "call", "entry": "add", "inputs": [[1, 2]], "outputs": [3], "reference": ADD}}),
}


def load_row(tmp_path, name):
    task, row = ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (problem,) = load(task, data=str(path))
    return problem


@pytest.mark.parametrize("name", ROWS)
def test_each_schema_loads_and_its_reference_passes(tmp_path, name):
    problem = load_row(tmp_path, name)
    assert problem.domain == ("math" if problem.tests is None else "code")
    right, total, failing = tasks.reference_rate([problem])
    assert (right, failing) == (total, {})
    assert total == (name not in ("processbench", "livecodebench", "livecodebench-functional", "taco"))


def test_what_the_loaders_take_from_the_rows(tmp_path):
    got = {name: load_row(tmp_path, name) for name in ROWS}
    assert [got[n].answer for n in ("gsm8k", "math500", "aime24", "aime24-hub", "prm800k", "own-math")] == [
        "1234", "1234", "33", "33", "33", "33"]
    assert got["math500"].meta["level"] == 2 and "<<" not in got["gsm8k"].meta["solution"]
    assert got["processbench"].meta["label"] == 1
    assert got["humaneval"].tests["kind"] == got["mbpp"].tests["kind"] == "assert"
    assert got["humaneval+hub"].tests["outputs"] == [3] and got["humaneval+"].tests["kind"] == "call"
    assert got["mbpp+"].tests["inputs"] == [[(1, 2)], [()]]
    assert got["livecodebench"].tests["inputs"] == ["1\n", "5\n"]
    assert got["livecodebench"].tests["example_inputs"] == ["1\n"]
    assert got["livecodebench-functional"].tests["inputs"] == [[[1], {"a": 2}]]
    assert got["apps"].tests["example_inputs"] == ["1\n"]  # the one that the statement shows
    assert got["codecontests"].tests["reference"].startswith("print")


def test_a_mutated_reference_fails(tmp_path):
    changes = [("humaneval", "+", "-"), ("humaneval+", "+", "-"), ("mbpp", "+", "*"), ("mbpp+", "-1:", ":1"),
               ("bigcodebench", "+ 1", "+ 2"), ("apps", "+1", "+2"), ("apps-call", "a[0])", "0)")]
    for name, old, new in changes:
        problem = load_row(tmp_path, name)
        (verdict,) = judge_many([(problem, problem.tests["reference"].replace(old, new))])
        assert verdict == tasks.Verdict(False, None, verdict.why) and verdict.why != "ok", name


@pytest.mark.parametrize("line, what", [
    ('{"question": "Q"}', "answer"), ("{oops", "not JSON"), ('["a"]', "list|str"),
    ('{"question": " ", "answer": "1"}', "empty")])
def test_a_malformed_row_is_named(tmp_path, line, what):
    path = tmp_path / "bad.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"question": "Q", "answer": "#### 1"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl\.gz:2: .*({what})"):
        load("gsm8k", data=str(path))


def test_json_array_gz_limit_and_dates(tmp_path):
    rows = [{**LCB, "question_id": str(n), "private_test_cases": HIDDEN, "question_content": f"Q{n}",
             "contest_date": f"2024-0{n}-01"} for n in range(1, 7)]
    path = tmp_path / "lcb.json"
    path.write_text(json.dumps(rows))
    assert [p.id for p in load("livecodebench", data=path, split="2024-03-01:2024-05-01")] == ["3", "4"]
    assert [p.id for p in load("livecodebench", data=path, limit=2)] == ["1", "2"]


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/was_here",)

    path = tmp_path / "lcb.jsonl"
    path.write_text(json.dumps({**LCB, "private_test_cases": packed(Evil())}))
    with pytest.raises(ValueError, match="lcb.jsonl:1: .*system"):
        load("livecodebench", data=str(path))
    assert not (tmp_path / "was_here").exists()


def test_apps_has_integers_that_int_refuses():
    row = {"question": "Q", "input_output": '{"fn_name": "f", "inputs": [[1%s]], "outputs": [2]}' % ("0" * 5000)}
    assert loaders._apps(row, 0).tests["inputs"] == [[10**5000]]


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(OSError("no route\nmore")))
    with pytest.raises(ConnectionError, match=r"cannot load gsm8k .*no route.*--data FILE") as error:
        load("gsm8k")
    assert "\n" not in str(error.value)


def test_the_command_line_names_failing_references(tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    bad = {"kind": "call", "entry": "f", "inputs": [[1]], "outputs": [2], "reference": "def f(x): return x"}
    path.write_text(json.dumps({"id": "p1", "question": "Q", "tests": bad}) + "\n")
    tasks.main(["--task", "tiny-code", "--data", str(path)])
    assert "right: 0 of 1" in (out := capsys.readouterr().out) and "p1: wrong answer" in out
    with pytest.raises(SystemExit):
        tasks.main(["--task", "tiny-code", "--data", str(tmp_path / "none.jsonl")])
    assert "none.jsonl" in capsys.readouterr().err


# ---------------------------------------------------------------------------- real benchmarks, where the data is


def test_humaneval_references_pass_and_mutants_fail():
    problems = load("humaneval+", data=real("humaneval/HumanEval.jsonl.gz"))
    right, total, failing = tasks.reference_rate(problems)
    assert (right, total, failing) == (164, 164, {})
    stub = [(p, f"```\n{p.meta['prompt']}    return 987654321\n```") for p in problems[:40]]
    assert not any(v.ok for v in judge_many(stub))
