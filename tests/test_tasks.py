"""Answers, loaders, votes: on rows in the schemas of the real data sets, and on these if there."""

import base64
import gzip
import json
import os
import pickle
import threading
import zlib
from pathlib import Path

import pytest

from common import tasks
from common.formats import loaders
from common.grading import answers, judge, sandbox
from common.grading.answers import equivalent_many, extract_answer
from common.tasks import Problem, judge_many, load, vote_keys

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def stop_workers():
    yield
    sandbox.close()


def real(name):
    if not (DATA / name).exists():
        pytest.skip(f"no {name} here")
    return str(DATA / name)


# ------------------------------------------------------------ math


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


def test_a_worker_that_was_killed_meanwhile_makes_no_answer_unequal():
    assert equivalent_many([(r"\frac12", "0.5")]) == [True]
    for worker in answers._idle:
        worker.kill()
        worker.wait()
    assert equivalent_many([(r"\frac13", r"\frac{2}{6}"), (r"\frac15", "0.2")]) == [True, True]


def test_equivalence_works_in_a_thread():
    verdicts = []
    pairs = [(r"\frac{3}{4}", "0.75")]
    thread = threading.Thread(target=lambda: verdicts.extend(equivalent_many(pairs)))
    thread.start()
    thread.join()
    assert verdicts == [True]


@pytest.mark.parametrize("task, name", [
    ("math500", "math500/test.jsonl"), ("gsm8k", "gsm8k/test.jsonl"),
    ("aime24", "aime/aime24.jsonl")])
def test_references_grade_right_and_a_constant_wrong(task, name):
    problems = load(task, data=real(name))
    assert all(v.ok for v in judge_many([(p, f"so \\boxed{{{p.answer}}}") for p in problems]))
    constant = judge_many([(p, r"\boxed{123454321}") for p in problems[:30]])
    assert {(v.ok, v.why) for v in constant} == {(False, "wrong answer")}


def test_tests_travel_through_json():
    tests = {"kind": "call", "entry": "f", "inputs": [[1j, {2}], [(1, 2), {(0, 1): 2}]],
             "outputs": [(3,), 1 << 60]}
    assert loaders.unpacked(json.loads(json.dumps(loaders.packed(tests)))) == tests


def test_tests_that_were_not_packed_stay_as_they_are():
    tests = {"kind": "call", "inputs": [[{"a": 1}]]}
    assert loaders.unpacked(tests) == tests


def test_a_problem_with_an_empty_list_of_tests():
    tests = {"kind": "stdin", "inputs": [], "outputs": []}
    assert judge.judge_many([(tests, "print(1)")]) == ["no tests"]


@pytest.mark.parametrize("task, row", [("gsm8k", {"question": "q", "answer": "#### 1"}),
                                       ("aime24", {"problem": "q", "answer": "1"})])
def test_numbers_without_ids_do_not_collide_between_tasks(tmp_path, task, row):
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    assert load(task, tmp_path / "x.jsonl")[0].id == f"{task}-0"


def test_an_archive_that_breaks_off_is_named(tmp_path):
    whole = gzip.compress(b'{"question": "Q", "answer": "#### 1"}\n' * 200)
    (tmp_path / "cut.gz").write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"cut.gz:\d+: .*end-of-stream"):
        load("gsm8k", data=tmp_path / "cut.gz")


# 1/2 = 0.5 = 1/2, no answer, 7: the key is the normal form of the first
@pytest.mark.parametrize("texts, want", [
    ([r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", "no idea", r"\boxed{\dfrac12}", r"\boxed{7}"],
     [r"\frac{1}{2}", r"\frac{1}{2}", None, r"\frac{1}{2}", "7"]),
    ([r"\boxed{0.5}", r"\boxed{\frac{1}{2}}"], ["0.5", "0.5"]),
    ([r"\boxed{7.0}"], ["7"]), ([r"\boxed{x+1}", r"\boxed{1+x}"], ["x+1", "x+1"])])
def test_vote_keys_of_math(texts, want):
    problem = Problem("p", "q", "math", "0.5")
    assert vote_keys([(problem, text) for text in texts]) == want


def test_vote_keys_of_two_problems_do_not_mix():
    p, q = Problem("p", "q", "math", "0.5"), Problem("q", "other", "math", "7")
    items = [(p, r"\boxed{0.5}"), (q, r"\boxed{\frac12}"), (p, r"\boxed{\frac12}")]
    assert vote_keys(items) == ["0.5", r"\frac{1}{2}", "0.5"]


def test_vote_keys_of_code_without_tests():
    stack = Problem("q", "Write a stack.\n>>> s.push(1)\n", "code")
    a, b, c = vote_keys([(stack, t) for t in ("x = 1", "x  =  1  # one", "x = 2")])
    assert a == b
    assert a != c


def test_problems_without_tests_or_answer():
    items = [(Problem("a", "q", "code"), "x = 1"), (Problem("b", "q", "math"), r"\boxed{1}"),
             (Problem("c", "q", "math", "1"), "?")]
    assert [v.why for v in judge_many(items)] == ["no tests", "no gold answer", "no answer"]
    assert vote_keys(items)[1:] == ["1", None]


# ------------------------------------------------------------ loaders

LCB = {"question_id": "1_A", "question_content": "Add one.", "contest_date": "2024-09-01T00:00:00",
       "metadata": "{}", "starter_code": "", "difficulty": "easy", "platform": "codeforces",
       "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}])}
HIDDEN = json.dumps([{"input": "5\n", "output": "6\n", "testtype": "stdin"}])
FUNCTIONAL = {"input": '[1]\n{"a": 2}', "output": "[1]", "testtype": "functional"}


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


ADD = "def add(a, b):\n    return a + b\n"
PAIR = "class Solution:\n    def pair(self, a: List[int]):\n        return (a[0], a[0])\n"
HUMAN = {"task_id": "HumanEval/0", "entry_point": "add",
         "prompt": 'def add(a, b):\n    """>>> add(1, 2)\n    3\n    """\n',
         "canonical_solution": "    return a + b\n"}
CHECK = "def check(candidate):\n    "
ROWS = {
    "gsm8k": ("gsm8k", {"question": "Q", "answer": "2*3 = <<2*3=6>>6\n#### 1,234"}),
    "math500": ("math500", {"problem": "Q", "solution": "S", "answer": "1234", "level": "Level 2",
                            "unique_id": "a/1"}),
    "aime24": ("aime24", {"problem": "Q", "extracted_groundtruth": "033", "url": "u"}),
    "aime24-hub": ("aime24", {"id": 1, "problem": "Q", "solution": r"\boxed{033}"}),
    "aime26": ("aime26", {"problem_idx": 4, "problem": "Q", "answer": 33}),
    "gsm8k-solutions": ("gsm8k", {"question": "Q", "ground_truth": "6*7 = <<6*7=42>>42\nA: 42"}),
    "several": ("math500", {"problem": "Q", "final_answer": ["1/2", "0.5"]}),
    "prm800k": ("prm800k", {"question": {"problem": "Q", "ground_truth_answer": "33"},
                            "label": {"steps": []}}),
    "processbench": ("processbench", {
        "id": "x", "problem": "Q", "steps": ["a", "b"], "label": 1, "generator": "g",
        "final_answer_correct": False}),
    "humaneval": ("humaneval+", {**HUMAN, "test": CHECK + "assert candidate(1, 2) == 3\n"}),
    "humaneval+": ("humaneval+", {**HUMAN, "base_input": [[1, 2]], "plus_input": [[0.5, 1]],
                                  "atol": 0}),
    "humaneval+hub": ("humaneval+", {**HUMAN, "test": CHECK + "inputs = [[1, 2]]\n"
                                                              "    results = [3]\n"}),
    "mbpp": ("mbpp+", {"task_id": 2, "prompt": "Add.", "code": ADD, "test_imports": ["import math"],
                       "test_list": ["assert add(1, 2) == math.floor(3.5)"]}),
    "mbpp+": ("mbpp+", {
        "task_id": "Mbpp/3", "prompt": '"""\nLast.\n"""\n', "entry_point": "last", "atol": 0,
        "canonical_solution": "def last(t):\n    assert type(t) is tuple\n    return t[-1:]\n",
        "assertion": "assert last((1, 2)) == (2,)", "base_input": [[[1, 2]]],
        "plus_input": [[[]]]}),
    "bigcodebench": ("bigcodebench", {
        "task_id": "BigCodeBench/0", "libs": "['random']", "entry_point": "task_func",
        "complete_prompt": "def task_func(a):\n    \'\'\'Add one.\'\'\'\n",
        "canonical_solution": "    return a + 1\n", "code_prompt": "def task_func(a):\n",
        "test": "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
                "        self.assertEqual(task_func(1), 2)\n"}),
    "livecodebench": ("livecodebench", {**LCB, "private_test_cases": packed(HIDDEN)}),
    "livecodebench-functional": ("livecodebench", {
        **LCB, "metadata": '{"func_name": "add"}', "private_test_cases": "[]",
        "public_test_cases": json.dumps([FUNCTIONAL])}),
    "apps": ("apps", {
        "problem_id": 7, "question": "Add one.\nInput\n1\n", "starter_code": "",
        "solutions": json.dumps(["print(int(input())+1)"]),
        "input_output": json.dumps({"inputs": ["9\n", "1\n"], "outputs": ["10\n", "2\n"]})}),
    "apps-call": ("apps", {
        "problem_id": 8, "question": "Pair.", "starter_code": "class Solution:",
        "solutions": json.dumps([PAIR]),
        "input_output": json.dumps({"fn_name": "pair", "inputs": [[[1]]], "outputs": [[[1, 1]]]})}),
    "taco": ("taco", {
        "question": "Add one.", "solutions": "[]", "starter_code": "", "difficulty": "EASY",
        "input_output": json.dumps({"inputs": ["1"], "outputs": ["2"]})}),
    "codecontests": ("codecontests", {
        "name": "c", "description": "Add one.",
        "public_tests": {"input": ["1\n"], "output": ["2\n"]},
        "private_tests": {"input": ["2\n"], "output": ["3\n"]},
        "generated_tests": {"input": [], "output": []}, "time_limit": {"seconds": 3, "nanos": 0},
        "solutions": {"language": [2, 3], "solution": ["C++", "print(int(input())+1)"]}}),
    "own-worked": ("gsm8k", {"id": "a", "question": "Q", "answer": "6*7 = 42\n#### 42"}),
    "own-math": ("tiny-math", {"id": 1, "question": "Q", "answer": 33}),
    "own-code": ("tiny-code", {"id": 2, "question": "Q", "tests": {
        "kind": "call", "entry": "add", "inputs": [[1, 2]], "outputs": [3], "reference": ADD}}),
}
NO_REFERENCE = ("processbench", "livecodebench", "livecodebench-functional", "taco")


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
    assert total == (name not in NO_REFERENCE)


@pytest.mark.parametrize("name, want", [
    ("gsm8k", "1234"), ("math500", "1234"), ("aime24", "33"), ("aime24-hub", "33"),
    ("aime26", "33"), ("gsm8k-solutions", "42"), ("several", ["1/2", "0.5"]),
    ("prm800k", "33"), ("own-math", "33"), ("own-worked", "42"), ("processbench", None), ("apps", None)])
def test_gold_answers(tmp_path, name, want):
    assert load_row(tmp_path, name).answer == want


@pytest.mark.parametrize("name, key, want", [
    ("math500", "level", 2), ("gsm8k", "solution", "2*3 = 6\n#### 1,234"),
    ("processbench", "label", 1)])
def test_what_is_kept_beside_the_answer(tmp_path, name, key, want):
    assert load_row(tmp_path, name).meta[key] == want


@pytest.mark.parametrize("name, key, want", [
    ("humaneval", "kind", "assert"), ("mbpp", "kind", "assert"), ("humaneval+", "kind", "call"),
    ("humaneval+hub", "outputs", [3]), ("mbpp+", "inputs", [[(1, 2)], [()]]),
    ("livecodebench", "inputs", ["1\n", "5\n"]), ("livecodebench", "example_inputs", ["1\n"]),
    ("livecodebench-functional", "inputs", [[[1], {"a": 2}]]),
    ("apps", "example_inputs", ["1\n"]),  # the one that the statement shows
    ("codecontests", "reference", "print(int(input())+1)"),
    ("codecontests", "inputs", ["1\n", "2\n"])])
def test_tests_of_the_rows(tmp_path, name, key, want):
    assert load_row(tmp_path, name).tests[key] == want


@pytest.mark.parametrize("name, old, new", [
    ("humaneval", "+", "-"), ("humaneval+", "+", "-"), ("mbpp", "+", "*"), ("mbpp+", "-1:", ":1"),
    ("bigcodebench", "+ 1", "+ 2"), ("apps", "+1", "+2"), ("apps-call", "a[0])", "0)")])
def test_a_mutated_reference_fails(tmp_path, name, old, new):
    problem = load_row(tmp_path, name)
    (verdict,) = judge_many([(problem, problem.tests["reference"].replace(old, new))])
    assert not verdict.ok
    assert verdict.answer is None
    assert verdict.why != "ok"


def test_a_row_of_another_task_is_told_its_task(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"question": "Q", "answer": "#### 1"}\n')
    with pytest.raises(ValueError, match=r"x.jsonl:1: this is no row of tiny-math but of gsm8k"):
        load("tiny-math", data=str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("line, what", [
    ('{"question": "Q"}', "answer"), ("{oops", "not JSON"), ('["a"]', "list|str"),
    ('{"question": ' + "[" * 100_000, "nested too deeply"),
    ('{"question": " ", "answer": "1"}', "empty")],
    ids=["no answer", "no JSON", "a list", "depth", "empty"])
def test_a_malformed_row_is_named(tmp_path, line, what):
    path = tmp_path / "bad.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"question": "Q", "answer": "#### 1"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl\.gz:2: .*({what})"):
        load("gsm8k", data=str(path))


@pytest.mark.parametrize("options, want", [
    ({"split": "2024-03-01:2024-05-01"}, "34"), ({"split": "2024-05-01:"}, "56"),
    ({"split": ":2024-03-01"}, "12"), ({"limit": 2}, "12"),
    ({"split": "2024-03-01:", "limit": 2}, "34")])
def test_contest_dates_and_limit(tmp_path, options, want):
    rows = []
    for n in range(1, 7):
        rows.append({**LCB, "question_id": str(n), "private_test_cases": HIDDEN,
                     "question_content": f"Q{n}", "contest_date": f"2024-0{n}-01"})
    path = tmp_path / "lcb.json"
    path.write_text(json.dumps(rows))
    assert [p.id for p in load("livecodebench", data=path, **options)] == list(want)


def test_prm800k_has_many_rows_to_a_problem(tmp_path):
    rows = [{"question": {"problem": q, "ground_truth_answer": "1"}, "label": {}} for q in "aabab"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [p.question for p in load("prm800k", data=tmp_path / "x.jsonl")] == ["a", "b"]


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
    cases = '{"fn_name": "f", "inputs": [[1%s]], "outputs": [2]}' % ("0" * 5000)
    problem = loaders._apps({"question": "Q", "input_output": cases}, 0)
    assert problem.tests["inputs"] == [[10**5000]]


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **keywords):
        raise OSError("no route\nmore")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = r"cannot load gsm8k .*no route.*--data FILE"
    with pytest.raises(ConnectionError, match=message) as error:
        load("gsm8k")
    assert "\n" not in str(error.value)


def test_the_command_line_names_failing_references(tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    bad = {"kind": "call", "entry": "f", "inputs": [[1]], "outputs": [2],
           "reference": "def f(x): return x"}
    path.write_text(json.dumps({"id": "p1", "question": "Q", "tests": bad}) + "\n")
    tasks.main(["--task", "tiny-code", "--data", str(path)])
    out = capsys.readouterr().out
    assert "right: 0 of 1" in out
    assert "p1: wrong answer" in out


def test_the_command_line_names_a_missing_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tasks.main(["--task", "tiny-code", "--data", str(tmp_path / "none.jsonl")])
    assert "none.jsonl" in capsys.readouterr().err


# ------------------------------------------------------------ real benchmarks, where the data is


def test_humaneval_references_pass_and_mutants_fail():
    problems = load("humaneval+", data=real("humaneval/HumanEval.jsonl.gz"))
    right, total, failing = tasks.reference_rate(problems)
    assert (right, total, failing) == (164, 164, {})
    stub = [(p, f"```\n{p.meta['prompt']}    return 987654321\n```") for p in problems[:40]]
    assert not any(v.ok for v in judge_many(stub))


@pytest.mark.parametrize("names, data, want", [
    (["tiny-math", "tiny-code"], None, ["tiny-math", "tiny-code"]), (["tiny-math", "tiny-code"], "f", ["tiny-math"]),
    (["gsm8k"], "f", ["gsm8k"]), (["gsm8k", "math500"], "f", None)])
def test_a_local_file_is_read_once(names, data, want):
    """Own rows would occur once for each of the default tasks."""
    if want:
        assert tasks.each(names, data) == want
    else:
        with pytest.raises(ValueError, match="the problems of one task, not of gsm8k and math500"):
            tasks.each(names, data)
