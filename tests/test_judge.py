"""The code judge. The hostile programs below are run: each must be judged wrong, leave nothing running, and not spoil
the next verdict."""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from common import judge
from common.judge import decode, encode
from common.tasks import Problem, judge_many, vote_keys


@pytest.fixture(scope="module", autouse=True)
def stop_workers():
    yield
    judge.close()


# ---------------------------------------------------------------------------- values and comparison


@pytest.mark.parametrize("value", [None, True, 3, 10**40, 1.5, "é\n", [1, [2]], (1, (2,)), {1, 2}, frozenset({(1, 2)}),
                                   {1: "a", (1, 2): [3]}, 2 + 3j, b"\x00\xff", float("inf")])
def test_values_cross_the_pipe(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize("out, expected, want", [
    (0.1 + 0.2, 0.3, True), (0.31, 0.3, False), ([1, 2], (1, 2), False), ({"a": 1.0}, {"a": 1.0 + 1e-9}, True),
    (float("nan"), float("nan"), True), (True, 1.0, True), (3, 3.0, True), ("1", 1, False),
    ([[1.0]], [[1.0, 2.0]], False), (("digest",), 2, False), (10**400, 2.5, False)])
def test_same(out, expected, want):
    assert judge.same(out, expected) is want


@pytest.mark.parametrize("out, expected, want", [
    ("1 2\n3\n", "1 2 \n3", True), ("0.3333333", "0.33333334", True), ("1", "2", False), ("12", "1 2", False),
    ("", "1", False)])
def test_same_text(out, expected, want):
    assert judge.same_text(out, expected) is want


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
    "skipped tests": ("import unittest\nunittest.TestCase.__unittest_skip__ = True\n"
                      "unittest.TestCase.__unittest_skip_why__ = ''\ndef f(x): return 0\nprint(0)", ""),
    "hidden tests": ("import sys, types\nsys.modules['__main__'] = types.ModuleType('m')\n"
                     "def load_tests(*a): return __import__('unittest').TestSuite()\ndef f(x): return 0\nprint(0)", ""),
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
                           "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
                           "timeout|exit code -9"),  # the worker's wall clock or the kernel's hard limit, what is first
}


def running():
    """Count the workers' processes and what they forked: each carries the scratch folder in its command line."""
    scratch, found = judge._pool["scratch"].encode(), 0
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
    monkeypatch.setattr(judge, "TOTAL", 1.0)
    monkeypatch.setenv("SECRET", "42")
    tmp_path.chmod(0o777)
    tmp_path.parent.chmod(0o755)
    server = socket.create_server(("127.0.0.1", 0))
    problem, good = kind_of(kind)
    assert judge_many([(problem, good)])[0].ok
    isolation, before = judge._pool["isolation"], running()
    for name, (code, why) in HOSTILE.items():
        needs = {"opens a socket": "namespaces", "writes elsewhere": "readonly"}.get(name)
        if needs and not isolation[needs]:
            continue  # the warning and the docstring say so
        code = code.replace("WHERE", str(tmp_path)).replace("PORT", str(server.getsockname()[1]))
        code += "\n" + good if "def f" not in code else "\n"
        (verdict,) = judge_many([(problem, code)])
        assert not verdict.ok and re.search(why, verdict.why), (name, verdict)
        assert judge_many([(problem, good + "# " + name)])[0].ok, f"after {name}"
        assert running() <= before, f"{name} left something running"
    server.close()
    assert not (tmp_path / "was_here").exists()


def test_unusual_but_right():
    """A program that closes a folder it made, and one that begins with an import from __future__ behind a prelude."""
    problem, _ = kind_of("call")
    closes = "import os\nos.mkdir('a')\nopen('a/f', 'w').close()\nos.chmod('a', 0o500)\n" + GOOD
    future = Problem("p", "q", "code", tests={**problem.tests, "prelude": "import math\n"})
    items = [(problem, closes), (future, "from __future__ import annotations\n" + GOOD), (problem, GOOD)]
    assert [v.why for v in judge_many(items, workers=1)] == ["ok"] * 3


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.getuid() != 0, reason="needs root to drop a right")
def test_root_without_namespaces_still_judges_and_cleans_up():
    """As in most containers: root, but no CAP_SYS_ADMIN. The user id and its process limit remain."""
    script = textwrap.dedent("""
        import os, sys, warnings
        sys.path[:0] = [%r, %r]
        import test_judge as t
        from common import judge
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            problem, good = t.kind_of("call")
            first, = t.judge_many([(problem, good)])
        if first.why != "ok": print("unreadable", first); sys.exit()  # Python lies where only root can read
        assert len(caught) == 1 and "namespaces" in str(caught[0].message), caught
        before = t.running()
        judge.TOTAL = 1.0
        for name in ("fork bomb", "kill the judge", "leaves a daemon", "reads the environment"):
            assert not t.judge_many([(problem, t.HOSTILE[name][0] + "\\n" + good)])[0].ok, name
            assert t.judge_many([(problem, good + "#" + name)])[0].ok, name
            assert t.running() <= before, name
        print("fine")
    """) % (str(Path(judge.__file__).parents[1]), str(Path(__file__).parent))
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
        from common import judge
        judge._guard(False)
        open("inside", "w").write("x"); os.rename("inside", "renamed"); open("renamed").read(); open(os.devnull, "w")
        for attack in (lambda: open("../outside", "w"), lambda: os.kill(os.getpid(), 0), lambda: os.remove("../x"),
                       lambda: os.rename("renamed", "../y"), socket.socket, lambda: subprocess.run(["true"])):
            try: attack()
            except PermissionError: print("refused")
    """)
    command = [sys.executable, "-c", script, str(Path(judge.__file__).parents[1])]
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
    assert verdict("from collections import Counter\ndef f(x): return Counter(range(x))", inputs=[[30000]],
                   outputs=[{i: 1 for i in range(30000)}])


def test_duplicates_are_judged_once(monkeypatch):
    asked, ask = [], judge._ask
    monkeypatch.setattr(judge, "_ask", lambda request: asked.append(1) or ask(request))
    problem = Problem("d", "q", "code", tests=KINDS["call"])
    verdicts = judge_many([(problem, GOOD)] * 5 + [(problem, f"```\n{GOOD}\n```")] * 5)
    assert all(v.ok for v in verdicts) and len(asked) <= 2


def test_workers_restart_after_close_and_leave_nothing():
    problem = Problem("d", "q", "code", tests=KINDS["call"])
    assert judge_many([(problem, GOOD)])[0].ok
    scratch = judge._pool["scratch"]
    judge.close()
    assert not os.path.exists(scratch)
    assert judge_many([(problem, GOOD)])[0].ok


# ---------------------------------------------------------------------------- majority vote


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
    assert judge.examples(">>> f([1, 2], 'a)')\n3\nassert f(3) == g(4)", "f") == [[[1, 2], "a)"], [3]]
    meta = {"prompt": "import os\ndef f(x):\n", "helpers": "import os\n"}
    problem = Problem("p", "q", "code", tests={"entry": "f"}, meta=meta)
    assert judge.extract_code("    return x", problem) == "import os\ndef f(x):\n    return x"
    assert judge.extract_code("```python\ndef f(x): pass\n```", problem) == "import os\ndef f(x): pass"
    twice = "```python\ndef f(x): return 1\n```\nfor example\n```python\nprint(f(2))\n```"
    assert judge.extract_code(twice, problem) == "import os\ndef f(x): return 1"  # what defines it, not what calls it
