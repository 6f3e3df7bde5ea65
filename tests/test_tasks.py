"""Answers, loaders and the code judge. The hostile programs below are run: each must be judged wrong, leave nothing
running, and not spoil the next verdict. Rows are made here in the schemas of the real data sets."""

import base64
import gzip
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import textwrap
import threading
import zlib
from pathlib import Path

import pytest

import tasks
from tasks import Problem, decode, encode, equivalent, equivalent_many, extract_answer, judge_many, load, vote_keys

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="module", autouse=True)
def stop_workers():
    yield
    tasks.close()


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
    assert equivalent(gold, pred) is want


def test_an_answer_that_hangs_is_unequal_and_the_rest_goes_on(monkeypatch):
    monkeypatch.setattr(tasks, "slowness", lambda: 0.2)  # a limit of one CPU second
    pairs = [(r"\frac12", "0.5"), ("7", "9^{9^{9^{9^{9}}}}!"), (r"\frac13", r"\frac{2}{6}")]
    assert equivalent_many(pairs) == [True, False, True]


def test_equivalence_works_in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(equivalent(r"\frac{3}{4}", "0.75")))
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


# ---------------------------------------------------------------------------- values and comparison


@pytest.mark.parametrize("value", [None, True, 3, 10**40, 1.5, "é\n", [1, [2]], (1, (2,)), {1, 2}, frozenset({(1, 2)}),
                                   {1: "a", (1, 2): [3]}, 2 + 3j, b"\x00\xff", float("inf")])
def test_values_cross_the_pipe(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize("out, expected, want", [
    (0.1 + 0.2, 0.3, True), (0.31, 0.3, False), ([1, 2], (1, 2), False), ({"a": 1.0}, {"a": 1.0 + 1e-9}, True),
    (float("nan"), float("nan"), True), (True, 1.0, True), (3, 3.0, True), ("1", 1, False),
    ([[1.0]], [[1.0, 2.0]], False)])
def test_same(out, expected, want):
    assert tasks.same(out, expected) is want


@pytest.mark.parametrize("out, expected, want", [
    ("1 2\n3\n", "1 2 \n3", True), ("0.3333333", "0.33333334", True), ("1", "2", False), ("12", "1 2", False),
    ("", "1", False)])
def test_same_text(out, expected, want):
    assert tasks.same_text(out, expected) is want


# ---------------------------------------------------------------------------- the judge

GOOD = "def f(x):\n    return x + 1\n"
MAIN = "print(int(input()) + 1)\n"
KINDS = {
    "call": {"kind": "call", "entry": "f", "inputs": [[1], [2]], "outputs": [2, 3]},
    "assert": {"kind": "assert", "entry": "f", "test": "def check(candidate):\n    assert candidate(1) == 2\n"
               "    assert candidate(2) == 3\n"},
    "unittest": {"kind": "unittest", "entry": "f", "test": "import unittest\nclass T(unittest.TestCase):\n"
                 "    def test(self):\n        self.assertEqual(f(1), 2)\n        self.assertTrue(f(2) == 3)\n"},
    "stdin": {"kind": "stdin", "inputs": ["1\n", "2\n"], "outputs": ["2\n", "3\n"]},
}
HOSTILE = {
    "endless loop": ("while True: pass", "timeout"),
    "endless output": ("while True: print('x' * 1000)", "timeout|output limit"),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(1 << 28))", "memory|MemoryError|timeout"),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout"),
    "deep recursion": ("def g(n): return g(n + 1) + 1\ng(0)", "RecursionError|exit code|timeout"),
    "kill the judge": ("import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)\nos._exit(0)", ""),
    "sys.exit": ("import sys\nsys.exit(0)", ""),
    "os._exit": ("import os\nos._exit(0)", ""),
    "patched builtins": ("import builtins\nbuiltins.all = lambda *a: True\nbuiltins.AssertionError = SystemExit\n"
                         "def f(x): return 0\nprint(0)", ""),
    "patched assert helpers": ("import unittest\nT = unittest.TestCase\nT.assertEqual = T.assertTrue = lambda *a: 0\n"
                               "def f(x): return 0\nprint(0)", ""),
    "equal to everything": ("class E:\n    __hash__ = None\n    def __eq__(s, o): return True\n"
                            "    def __repr__(s): return '2'\ndef f(x): return E()\nprint(0)", ""),
    "writes elsewhere": ("open('WHERE/was_here', 'w').write('x')\n", "OSError|PermissionError|exit code"),
    "opens a socket": ("import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=1)", "Error|exit code"),
    "reads the environment": ("import os\nos.environ['SECRET']", "KeyError|exit code"),
    "leaves a daemon": ("import os, time\nif os.fork() == 0:\n    os.setsid()\n"
                        "    if os.fork() == 0: time.sleep(1000)\n    os._exit(0)",
                        "left processes running|exited early"),
    "prints success": ("print('ok'); print('[\"ok\", true, 0]')\nimport os\nfor fd in range(1, 60):\n"
                       "    try: os.write(fd, b'[\"ok\", true, 0]\\n')\n    except OSError: pass\nos._exit(0)", ""),
    "ignores its limits": ("import signal\nsignal.signal(signal.SIGPROF, signal.SIG_IGN)\nsignal.setitimer(2, 0)\n"
                           "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "timeout"),
}


def running():
    """Count the workers' processes and what they forked: each carries the scratch folder in its command line."""
    scratch, found = tasks._pool["scratch"].encode(), 0
    for p in filter(str.isdigit, os.listdir("/proc")):
        try:
            found += scratch in Path(f"/proc/{p}/cmdline").read_bytes()
        except OSError:
            pass  # ended meanwhile
    return found


def kind_of(kind):
    """A problem of this kind with short limits, and a right program for it."""
    problem = Problem(kind, "q", "code", tests={**KINDS[kind], "time_limit": 0.3})
    return problem, MAIN if kind == "stdin" else GOOD


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="full isolation needs Linux")
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_programs(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TOTAL", 1.0)
    monkeypatch.setenv("SECRET", "42")
    tmp_path.chmod(0o777)
    tmp_path.parent.chmod(0o755)
    server = socket.create_server(("127.0.0.1", 0))
    problem, good = kind_of(kind)
    assert judge_many([(problem, good)])[0].ok
    isolation, before = tasks._pool["isolation"], running()
    for name, (code, why) in HOSTILE.items():
        if name == "opens a socket" and not isolation["net"] or name == "writes elsewhere" and not isolation["mount"]:
            continue  # the warning and the docstring say so
        code = code.replace("WHERE", str(tmp_path)).replace("PORT", str(server.getsockname()[1]))
        code += "\n" + good if "def f" not in code else "\n"
        (verdict,) = judge_many([(problem, code)])
        assert not verdict.ok and re.search(why, verdict.why), (name, verdict)
        assert judge_many([(problem, good + "# " + name)])[0].ok, f"after {name}"
        assert running() <= before, f"{name} left something running"
    server.close()
    assert not (tmp_path / "was_here").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.getuid() != 0, reason="needs root to drop a right")
def test_root_without_namespaces_still_judges_and_cleans_up():
    """As in most containers: root, but no CAP_SYS_ADMIN. The user id and its process limit remain."""
    script = textwrap.dedent("""
        import os, sys, warnings
        sys.path[:0] = [%r, %r]
        import tasks, test_tasks as t
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            problem, good = t.kind_of("call")
            first, = tasks.judge_many([(problem, good)])
        if first.why != "ok": print("unreadable", first); sys.exit()  # Python lies where only root can read
        assert len(caught) == 1 and "namespace" in str(caught[0].message), caught
        before = t.running()
        tasks.TOTAL = 1.0
        for name in ("fork bomb", "kill the judge", "leaves a daemon", "reads the environment"):
            assert not tasks.judge_many([(problem, t.HOSTILE[name][0] + "\\n" + good)])[0].ok, name
            assert tasks.judge_many([(problem, good + "#" + name)])[0].ok, name
            assert t.running() <= before, name
        print("fine")
    """) % (str(Path(tasks.__file__).parent), str(Path(__file__).parent))
    drop = "import ctypes, os, sys\nctypes.CDLL(None).prctl(24, 21)\nos.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", drop, sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "unreadable" in done.stdout:
        pytest.skip("this Python can be read by root only")
    assert done.stdout.strip() == "fine", done.stderr


def test_the_guard_refuses_where_the_kernel_does_not(tmp_path):
    script = textwrap.dedent("""
        import os, socket, subprocess, sys
        sys.path.insert(0, sys.argv[1])
        import tasks
        tasks._guard(False)
        open("inside", "w").write("x"); os.rename("inside", "renamed"); open("renamed").read(); open(os.devnull, "w")
        for attack in (lambda: open("../outside", "w"), lambda: os.kill(os.getpid(), 0), lambda: os.remove("../x"),
                       lambda: os.rename("renamed", "../y"), socket.socket, lambda: subprocess.run(["true"])):
            try: attack()
            except PermissionError: print("refused")
    """)
    command = [sys.executable, "-c", script, str(Path(tasks.__file__).parent)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["refused"] * 6, done.stderr


def test_many_ways_of_being_right_and_wrong():
    call, stdin = Problem("c", "q", "code", tests=KINDS["call"]), Problem("s", "q", "code", tests=KINDS["stdin"])
    several = [(call, GOOD), (call, f"Text.\n```python\n{GOOD}```\nmore"), (call, "```\nno\n```\n```py\n" + GOOD),
               (call, "class Solution:\n    def f(self, x): return x + 1"), (call, "def f(x): return x"),
               (call, "def f(x:"), (call, "def g(x): return x"), (call, "def f(x): return 1 / 0"), (stdin, MAIN),
               (stdin, "import threading\ndef m(): print(int(input()) + 1)\nthreading.Thread(target=m).start()"),
               (stdin, "import atexit, sys\nn = int(sys.stdin.buffer.read())\natexit.register(lambda: print(n + 1))"),
               (stdin, "if __name__ == '__main__':\n    print(int(open(0).read()) + 1)"), (stdin, "print(7)"),
               (stdin, "1/0")]
    assert [v.why for v in judge_many(several)] == [
        "ok", "ok", "ok", "ok", "wrong answer", "exception: SyntaxError", "exception: KeyError",
        "exception: ZeroDivisionError", "ok", "ok", "ok", "ok", "wrong answer", "exit code 1"]


def test_special_oracles_and_tolerance():
    def verdict(code, **tests):
        return judge_many([(Problem("o", "q", "code", tests={"kind": "call", "entry": "f", **tests}), code)])[0].ok

    assert verdict("def f(x): return [3, 1]", inputs=[[0]], outputs=[(1, 3)], oracle="set")
    assert verdict("import re\ndef f(x): return re.match('a', x)", inputs=[["a"]], outputs=[True], oracle="truth")
    assert verdict("def f(c): return -2.00001", inputs=[[[4, 0, -1]]], outputs=[2.0], oracle="root", atol=1e-3)
    assert not verdict("def f(c): return 1.0", inputs=[[[4, 0, -1]]], outputs=[2.0], oracle="root", atol=1e-3)
    assert verdict("def f(x): return list(range(10**5))", inputs=[[0]], outputs=[list(range(10**5))])  # by digest
    assert not verdict("def f(x): return list(range(1, 10**5))", inputs=[[0]], outputs=[list(range(10**5))])


def test_duplicates_are_judged_once(monkeypatch):
    asked, ask = [], tasks._ask
    monkeypatch.setattr(tasks, "_ask", lambda request: asked.append(1) or ask(request))
    problem = Problem("d", "q", "code", tests=KINDS["call"])
    verdicts = judge_many([(problem, GOOD)] * 5 + [(problem, f"```\n{GOOD}\n```")] * 5)
    assert all(v.ok for v in verdicts) and len(asked) <= 2


def test_workers_restart_after_close_and_leave_nothing():
    problem = Problem("d", "q", "code", tests=KINDS["call"])
    assert judge_many([(problem, GOOD)])[0].ok
    scratch = tasks._pool["scratch"]
    tasks.close()
    assert not os.path.exists(scratch)
    assert judge_many([(problem, GOOD)])[0].ok


def test_problems_without_tests_or_answer():
    items = [(Problem("a", "q", "code"), GOOD), (Problem("b", "q", "math"), r"\boxed{1}"),
             (Problem("c", "q", "math", "1"), "?")]
    assert [v.why for v in judge_many(items)] == ["no tests", "no gold answer", "no answer"]
    assert vote_keys(items)[1:] == ["1", None]


# ---------------------------------------------------------------------------- majority vote


def test_vote_keys_of_math():
    p, q = Problem("p", "q", "math", "0.5"), Problem("q", "other", "math", "7")
    texts = [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", "no idea", r"\boxed{\dfrac12}", r"\boxed{7}"]
    a, b, none, c, d = vote_keys([(p, t) for t in texts])
    assert a == b == c != d and none is None
    assert vote_keys([(q, r"\boxed{7.0}")]) == ["7"]


def test_vote_keys_of_code_are_behaviour_on_example_inputs():
    tests = {**KINDS["call"], "example_inputs": [[1], [5]], "outputs": ["never", "looked at"]}
    p = Problem("p", "q", "code", tests=tests)
    same = [GOOD, "def f(y):\n    return 1 + y", "```\ndef f(x): return float(x + 1)\n```"]
    other = ["def f(x): return x", "def f(x): raise ValueError", "def f(x): raise KeyError", "def f(x)"]
    keys = vote_keys([(p, code) for code in same + other])
    assert len(set(keys[:3])) == 1 and len(set(keys)) == 5
    shown = Problem("s", "Add.\n>>> f(1)\n2\n", "code", tests={**KINDS["assert"]})
    assert len(set(vote_keys([(shown, code) for code in same]))) == 1
    silent = Problem("n", "Add.", "code", tests={**KINDS["assert"]})
    assert vote_keys([(silent, GOOD)]) == vote_keys([(silent, GOOD + "\n\n# a comment")])


def test_examples_and_completion():
    assert tasks.examples(">>> f([1, 2], 'a)')\n3\nassert f(3) == g(4)", "f") == [[[1, 2], "a)"], [3]]
    meta = {"prompt": "import os\ndef f(x):\n", "helpers": "import os\n"}
    problem = Problem("p", "q", "code", tests={"entry": "f"}, meta=meta)
    assert tasks.extract_code("    return x", problem) == "import os\ndef f(x):\n    return x"
    assert tasks.extract_code("```python\ndef f(x): pass\n```", problem) == "import os\ndef f(x): pass"


# ---------------------------------------------------------------------------- real benchmarks, where the data is


def test_humaneval_references_pass_and_mutants_fail():
    problems = load("humaneval+", data=real("humaneval/HumanEval.jsonl.gz"))
    right, total, failing = tasks.reference_rate(problems)
    assert (right, total, failing) == (164, 164, {})
    stub = [(p, f"```\n{p.meta['prompt']}    return 987654321\n```") for p in problems[:40]]
    assert not any(v.ok for v in judge_many(stub))
