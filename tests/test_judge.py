"""The code judge. The hostile programs below are run: each must be judged wrong and leave nothing running."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest

from common.grading import judge, sandbox
from common.grading.inside import answer, encode
from common.grading.judge import decode
from common.grading.programs import examples, extract_code
from common.tasks import Problem, judge_many, vote_keys

LINUX = sys.platform.startswith("linux")


@pytest.fixture(scope="module", autouse=True)
def stop_programs():
    yield
    sandbox.close()


# ---------------------------------------------------------------------------- values and comparison


@pytest.mark.parametrize("value", [None, True, 3, 10**40, 1.5, "é\n", [1, [2]], (1, (2,)), {1, 2}, frozenset({(1, 2)}),
                                   {1: "a", (1, 2): [3]}, 2 + 3j, b"\x00\xff", float("inf")])
def test_values_cross_the_pipe(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("out, expected, want", [
    (0.1 + 0.2, 0.3, True), (0.31, 0.3, False), ([1, 2], (1, 2), False), ({"a": 1.0}, {"a": 1.0 + 1e-9}, True),
    (float("nan"), float("nan"), True), (True, 1.0, True), (3, 3.0, True), ("1", 1, False),
    ([[1.0]], [[1.0, 2.0]], False), (10**400, 2.5, False), (1e20, 10**20, True), (float(2**60), 2**60 + 1, False), ([1.1000000000000002e300] * 450, [1.1e300] * 450, True)],
    ids=lambda v: str(v)[:30])
def test_same(out, expected, want):
    assert judge.same(encode(out), encode(expected)) is want
    assert judge.right(answer(out), answer(expected), []) is want  # as texts, long ones as digests


@pytest.mark.parametrize("out, expected, want", [
    ("1 2\n3\n", "1 2 \n3", True), ("0.3333333", "0.33333334", True), ("1", "2", False), ("12", "1 2", False),
    ("", "1", False)])
def test_same_text(out, expected, want):
    assert judge.same_text(out, expected) is want


@pytest.mark.parametrize("out, expected, want", [
    ("2.0", "2", True), ("2", "2.0", True), ("1e3", "1000", True), ("2.5", "2", False),
    ("12345678901234567891", "12345678901234567890", False), ("nan", "1", False), ("1_0", "10", False),
    ("9" * 10**6, "1", False)], ids=lambda v: str(v)[:20])
def test_numbers_on_stdout_are_equal_as_numbers(out, expected, want):
    assert judge.same_text(out, expected) is want


# ---------------------------------------------------------------------------- hostile programs

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
    "writes elsewhere": ("open('WHERE/was_here', 'w').write('x')\n", "Error|exit code"),
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
SLOW = ("endless loop", "endless output", "memory bomb", "fork bomb", "ignores its limits")  # each waits for a limit


def running():
    """The processes that have inside.py in their command line: spawners and their forks."""
    found, boot = [], b"spawner(int(sys.argv[1])"
    for p in filter(str.isdigit, os.listdir("/proc")):
        try:
            if boot in Path(f"/proc/{p}/cmdline").read_bytes():
                found.append(int(p))
        except OSError:
            pass  # ended meanwhile
    return found


def children_of(pid, deep=True):
    """Those of running() that a process has started, and theirs: other judges may be at work on this machine."""
    judges, found = set(running()), []
    for p in judges:
        try:
            above = parent(p)
            while deep and above in judges:
                above = parent(above)
        except OSError:
            continue  # ended meanwhile
        if above == pid:
            found.append(p)
    return found


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kind_of(kind):
    """A problem of this kind with short limits, and a right program for it."""
    problem = Problem(kind, "q", "code", tests={**KINDS[kind], "time_limit": 0.3})
    return problem, MAIN if kind == "stdin" else GOOD


def verdict(code, kind="call", **tests):
    """Why a program fails, or "ok"."""
    problem, _ = kind_of(kind)
    problem.tests.update({"time_limit": 2.0, **tests})
    return judge_many([(problem, code)])[0].why


@pytest.mark.skipif(not LINUX, reason="full isolation needs Linux")
@pytest.mark.parametrize("name, kind", [(name, kind) for name in HOSTILE for kind in KINDS
                                        if name not in SLOW or kind in ("call", "stdin")])
def test_hostile_program(name, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "TOTAL", 0.3)
    monkeypatch.setenv("SECRET", "42")
    outside = ("opens a socket", "writes elsewhere", "leaves a daemon")
    if name in outside and sandbox.sandbox()[1] != "namespaces":
        pytest.skip("no namespaces: the warning and the docstring say so")
    tmp_path.chmod(0o777)
    problem, good = kind_of(kind)
    with socket.create_server(("127.0.0.1", 0)) as server:
        code, why = HOSTILE[name]
        code = code.replace("WHERE", str(tmp_path)).replace("PORT", str(server.getsockname()[1]))
        code += "\n" + good if "def f" not in code else "\n"
        (got,) = judge_many([(problem, code)])
    assert not got.ok
    assert re.search(why, got.why), got
    assert len(children_of(os.getpid())) <= 2 * len(sandbox.IDLE)  # a spawner, and unshare before it
    assert not (tmp_path / "was_here").exists()


def test_a_right_program_after_a_hostile_one():
    assert verdict(HOSTILE["kill the judge"][0]) != "ok"
    assert verdict(GOOD) == "ok"


# ---------------------------------------------------------------------------- what comes back

REPLY = """
import os
def f(x):
    for fd in range(3, 20):
        try: os.write(fd, REPLY)
        except OSError: pass
    os._exit(0)
"""
REPLIES = {
    "400 digits": rb'ok 1' + b"0" * 400 + b" 2\n",
    "a complex number of 10**400": b'ok 1.000000 {"t": "complex", "v": [1' + b"0" * 400 + b", 0]}\n",
    "10,000 digits": b"ok 1.000000 " + b"1" * 10000 + b"\n",
    "no JSON": b"ok 1.000000 {{{\n" * 9,
    "no UTF-8": b"ok 1.000000 \xff\n\xff \xff \xff\n",
    "an unknown type": b'ok 1.000000 {"t": "x", "v": 1}\n',
    "no type": b'ok 1.000000 {"v": 1}\n',
    "a list as a type": b'ok 1.000000 {"t": [], "v": 1}\n',
    "a number as a list": b'ok 1.000000 {"t": "tuple", "v": 1}\nok 1.000000 {"t": "dict", "v": 1}\nok 1.000000 {"t": "set", "v": 1}\n',
    "a set": b'ok 1.000000 {"t": "set", "v": [{"t": "set", "v": 1}]}\n',
    "a digest": b'ok 1.000000 {"t": "digest", "v": [1]}\n',
    "an int": b'ok 1.000000 {"t": "int", "v": []}\n',
}


@pytest.mark.parametrize("expected", [2, [2], (2,), {2}, {2: 2}, 2.5, 2j, "2", b"2", None],
                         ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("name", REPLIES)
def test_a_malformed_reply_is_a_verdict(name, expected):
    assert verdict(REPLY.replace("REPLY", repr(REPLIES[name])), outputs=[expected, 3]) != "ok"


@pytest.mark.parametrize("reply", ["b'ok 1.000000 ' + b'[' * 100000 + b'\\n'", "b'ok 1.000000 [' + b'[],' * 4000000 + b'[]]\\n'",
                                   "b'x' * 10000000 + b' 1 2\\n'", "b'\\n' * 10000000", "b'ok 1.000000 2\\n' * 3000000"],
                         ids=["deep", "millions of lists", "a long status", "millions of lines", "millions of answers"])
def test_a_long_reply_is_a_verdict(reply):
    start = time.monotonic()
    assert verdict(REPLY.replace("REPLY", reply), outputs=[[], 3]) != "ok"
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("value, wrong", [
    ("[0.5] * 40000", "['0.5'] * 40000"), ("list(range(40000))", "[str(n) for n in range(40000)]"),
    ("'x' * 5000000", "'x' * 4999999 + 'y'")])
def test_long_values_are_told_apart(value, wrong):
    outputs = [eval(value)]
    assert verdict(f"def f(x): return {value}", inputs=[[1]], outputs=outputs) == "ok"
    assert verdict(f"def f(x): return {wrong}", inputs=[[1]], outputs=outputs) == "wrong answer"


@pytest.mark.parametrize("expected", [{1, 2}, {1: 2}], ids=["set", "dict"])
def test_integers_that_collide_in_their_hash_take_linear_time(expected):
    colliding = [{"t": "int", "v": hex(n * (2**61 - 1))} for n in range(50_000)]
    kind = type(expected).__name__
    items = [[v, 1] for v in colliding] if kind == "dict" else colliding
    start = time.process_time()
    assert not judge.right(json.dumps({"t": kind, "v": items}), answer(expected), [])
    assert time.process_time() - start < 20


def test_a_long_number_on_stdout_takes_linear_time():
    assert verdict("print('7' * 10**7)", "stdin") == "wrong answer"


# ---------------------------------------------------------------------------- tests that share the process

LIAR = "class E:\n    __hash__ = object.__hash__\n    def __eq__(s, o): return True\n"
CHEATS = {
    "mock.ANY": "import unittest.mock\ndef f(x): return unittest.mock.ANY",
    "an int with its own ==": "class E(int):\n    def __eq__(s, o): return True\ndef f(x): return E(0)",
    "a float with its own -": "class E(float):\n    def __sub__(s, o): return 0.0\n    def __eq__(s, o): return True\n"
                              "def f(x): return E(0)",
    "another module's name": LIAR + "E.__module__ = 'builtins'\ndef f(x): return E()",
    "behind lru_cache": "import functools\n" + LIAR + "@functools.lru_cache\ndef f(x): return E()",
    "behind partial": "import functools\n" + LIAR + "def g(x): return E()\nf = functools.partial(g)",
    "a callable object": LIAR + "class F:\n    def __call__(s, x): return E()\nf = F()",
    "compiled elsewhere": "exec(compile('class E:\\n    def __eq__(s, o): return True', '<string>', 'exec'))\n"
                          "def f(x): return E()",
    "compiled under a file's name": "exec(compile('class E:\\n    def __eq__(s, o): return True', 'x.py', 'exec'))\n"
                                    "def f(x): return E()",
    "a callable ==": "class A:\n    def __call__(s, *a): return True\nclass E:\n    __eq__ = A()\n"
                     "def f(x): return E()",
    "a metaclass": "class M(type):\n    def __eq__(s, o): return True\n    __hash__ = type.__hash__\n"
                   "class E(metaclass=M): pass\ndef f(x): return E",
    "a false unittest": "import sys, types\nfake = types.ModuleType('unittest')\nclass TestCase: pass\n"
                        "fake.TestCase = TestCase\nsys.modules['unittest'] = fake\ndef f(x): return 0",
    "the default loader": "import unittest\nunittest.defaultTestLoader.testMethodPrefix = 'none'\n"
                          "unittest.defaultTestLoader.getTestCaseNames = lambda *a: []\ndef f(x): return 0",
    "the loader's class": "import unittest\nunittest.TestLoader.testMethodPrefix = 'none'\ndef f(x): return 0",
    "unittest.case": "import unittest.case\nunittest.case._Outcome = None\ndef f(x): return 0",
    "the judge's own names": LIAR + "import __main__\n__main__.COMPARING = []\ndef f(x): return E()",
    "another type's ==": "class E(int): __eq__ = int.__ge__\ndef f(x): return E(9)",
    "a dataclass and exec": "from dataclasses import dataclass\n@dataclass\nclass E:\n    a: int\nspace = {}\n"
                            "exec('def g(s, o): return True', space)\nE.__eq__ = space['g']\ndef f(x): return E(0)",
    "while testing": "def f(x):\n    import builtins\n    builtins.AssertionError = SystemExit\n    return 0",
}


def test_a_module_that_the_tests_import_is_as_it_was():
    test = "import json\ndef check(f):\n    assert json.loads('2') == f(1)\n"
    code = "import json\njson.loads = lambda text: 0\ndef f(x): return 0"
    assert verdict(code, "assert", test=test) != "ok"
    assert verdict("import json\n" + GOOD, "assert", test=test) == "ok"


@pytest.mark.parametrize("kind", ["assert", "unittest"])
@pytest.mark.parametrize("name", CHEATS)
def test_a_program_that_cheats_its_tests(name, kind):
    assert verdict(CHEATS[name], kind) != "ok"


@pytest.mark.parametrize("test", [
    "assert [f(1), f(2)] == [2, 3]", "assert {'a': f(1)} == {'a': 2}", "assert f(1)[0] == 2", "assert f(1) == 2"])
def test_a_liar_in_a_container(test):
    for result in ("[E()]", "(E(),)", "{'a': E()}", "E()"):
        assert verdict(LIAR + f"def f(x): return {result}", "assert", test=test + "\n") != "ok"


@pytest.mark.parametrize("name, test", [
    ("abs", "abs(f(1) - 2) < 1e-6"), ("sorted", "sorted(f(1)) == [1]"), ("len", "len(f(1)) == 3"),
    ("isclose", "isclose(f(1), 2)"), ("all", "all([f(1) == 2])"), ("isinstance", "isinstance(f(1), str)")])
def test_the_programs_own_builtins_are_not_the_tests(name, test):
    results = {"abs": 0, "sorted": [1], "len": 3}
    code = f"def {name}(*a, **k): return {results.get(name, True)}\ndef f(x): return 7"
    assert verdict(code, "assert", test=f"assert {test}\n") != "ok"


@pytest.mark.parametrize("there", [True, False])
def test_tests_may_patch_what_the_referee_uses(there):
    code = "import collections, os\ndef f(x):\n    os.path.exists('x')\n    return collections.Counter([x])\n"
    test = ("import unittest\nfrom unittest.mock import patch\nclass T(unittest.TestCase):\n"
            f"    @patch('os.path.exists', return_value={there})\n    def test(self, exists):\n"
            "        self.assertEqual(f(1), {1: 1})\n        exists.assert_called_once_with('x')\n")
    assert verdict(code, "unittest", test=test) == "ok"


@pytest.mark.parametrize("kind", ["assert", "unittest"])
def test_honest_results_of_other_types(kind):
    """A dataclass, a Counter, a named tuple, and a helper of the program that the tests use."""
    code = textwrap.dedent("""
        import collections, dataclasses, fractions
        @dataclasses.dataclass
        class P:
            x: int
        N = collections.namedtuple("N", "a b")
        def helper(x): return x + 1
        def f(x): return P(x), collections.Counter([x]), N(1, 2), fractions.Fraction(1, x), lambda: 1
    """)
    test = "r = f(2)\nassert r[:3] == (P(2), {2: 1}, (1, 2))\nassert r[3] * 2 == 1\nassert helper(3) == 4\n"
    if kind == "unittest":
        body = textwrap.indent(test, " " * 8)
        test = f"import unittest\nclass T(unittest.TestCase):\n    def test(self):\n{body}"
    assert verdict(code, kind, test=test) == "ok"


def test_expected_outputs_are_not_in_the_process():
    """A walk through all frames and objects finds no earlier program's answer and no expected output."""
    code = textwrap.dedent("""
        import gc, sys
        def f(x):
            frame, things = sys._getframe(), gc.get_objects()
            while frame:
                things += [*frame.f_locals.values(), *frame.f_globals.values()]
                frame = frame.f_back
            wanted = int("24" + "601")
            for thing in things:
                if isinstance(thing, dict): thing = list(thing.values())
                if isinstance(thing, (list, tuple)) and any(type(v) is int and v == wanted for v in thing):
                    return wanted
            return 0
    """)
    assert verdict("def f(x): return int('246' + '01')", inputs=[[1]], outputs=[24601]) == "ok"
    assert verdict(code, inputs=[[1]], outputs=[24601]) == "wrong answer"


# ---------------------------------------------------------------------------- limits

BURN = {
    "the profiling timer is off": "import signal\nsignal.setitimer(signal.ITIMER_PROF, 0)\nwhile True: pass",
    "signals are ignored": "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
                           "    except (OSError, ValueError): pass\nwhile True: pass",
    "a forked child burns": "import os\nif os.fork() == 0:\n    while True: pass\nos.wait()",
    "two processes burn": "import os\nos.fork()\nwhile True: pass",
    "a thread burns": "import threading, time\ndef g():\n    while True: pass\nthreading.Thread(target=g).start()\n"
                      "time.sleep(100)",
}


@pytest.mark.skipif(not LINUX, reason="needs /proc")
@pytest.mark.parametrize("name", BURN)
def test_cpu_time_is_limited_whatever_the_program_does(name, monkeypatch):
    monkeypatch.setattr(judge, "TOTAL", 0.3)
    problem, good = kind_of("call")
    assert judge_many([(problem, BURN[name] + "\n" + good)])[0].why == "timeout"


# ---------------------------------------------------------------------------- what the sandbox closes


@pytest.fixture
def isolated():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if sandbox.sandbox()[1] != "namespaces":
            pytest.skip("no namespaces here")


def test_a_socket_in_the_file_system_is_not_reached(isolated, tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        code = f"import socket\nsocket.socket(socket.AF_UNIX).connect({str(tmp_path / 's')!r})\n" + GOOD
        assert verdict(code) == "exception: FileNotFoundError"


def test_files_of_the_caller_are_not_seen(isolated, tmp_path):
    (tmp_path / "outputs").write_text("2")
    assert verdict(f"open({str(tmp_path / 'outputs')!r})\n{GOOD}") == "exception: FileNotFoundError"


def test_system_v_memory_dies_with_the_program(isolated):
    before = Path("/proc/sysvipc/shm").read_text()
    code = "import ctypes\nassert ctypes.CDLL(None).shmget(4242, 1 << 20, 0o1600) >= 0\n" + GOOD
    assert verdict(code) == "ok"
    assert Path("/proc/sysvipc/shm").read_text() == before


RIGHT = {
    "a pool": "from multiprocessing import Pool\ndef g(x): return x + 1\n"
              "def f(x):\n    with Pool(2) as p: return p.map(g, [x])[0]",
    "an open pool": "from multiprocessing import Pool\ndef g(x): return x + 1\ndef f(x): return Pool(2).map(g, [x])[0]",
    "a lock": "from multiprocessing import Lock\ndef f(x):\n    with Lock(): return x + 1",
    "a subprocess": "import subprocess\ndef f(x): return int(subprocess.check_output(['echo', str(x + 1)]))",
    "devices": "open('/dev/null', 'w').write('x')\nopen('/dev/urandom', 'rb').read(1)\n" + GOOD,
    "a temporary file": "import tempfile\ntempfile.TemporaryFile().write(b'x')\n" + GOOD,
    "a thousand nested folders": "import os\nfor n in range(1000):\n    os.mkdir('a')\n    os.chdir('a')\n" + GOOD,
    "a closed folder": "import os\nos.mkdir('a')\nopen('a/f', 'w').close()\nos.chmod('a', 0o500)\n" + GOOD,
    "a thread that is not joined": "import threading, time\n"
                                   "threading.Thread(target=time.sleep, args=(99,)).start()\n" + GOOD,
    "a byte order mark": "\ufeff" + GOOD,
    "shared memory": "from multiprocessing.shared_memory import SharedMemory\nm = SharedMemory(create=True, size=9)\n"
                     "m.close()\nm.unlink()\n" + GOOD,
    "a server of its own": "import socket\ns = socket.create_server(('127.0.0.1', 0))\n"
                           "socket.create_connection(s.getsockname()).close()\n" + GOOD,
    "a Fraction that is a number": "from fractions import Fraction\ndef f(x): return Fraction(2 * x + 2, 2)",
}


@pytest.mark.parametrize("name", RIGHT)
def test_unusual_but_right(name, isolated):
    assert verdict(RIGHT[name]) == "ok"


def test_programs_start_from_the_same_random_state():
    code = "import random\ndef f(x): return random.random()"
    assert len({judge.run_program(KINDS["call"], code)[0][1] for _ in range(3)}) == 1


def test_stdin_has_a_name(isolated):
    assert verdict("print(int(open('/dev/stdin').read()) + 1)", "stdin") == "ok"


def test_more_than_1024_files_open_in_the_caller():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    files = [open(os.devnull) for _ in range(1100)]
    try:
        assert verdict(GOOD) == "ok"
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(not LINUX, reason="needs Linux")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["KILL", "TERM"])
def test_the_tree_dies_with_the_caller(number):
    script = textwrap.dedent("""
        import sys
        sys.path.insert(0, sys.argv[1])
        from common.grading import judge, sandbox
        sandbox.sandbox()
        print("starts", flush=True)
        tests = {"kind": "call", "entry": "f", "inputs": [[1]], "outputs": [2], "time_limit": 60.0}
        judge.judge_many([(tests, "import os, time\\nos.fork()\\nos.fork()\\ntime.sleep(1000)")])
    """)
    command = [sys.executable, "-c", script, str(Path(judge.__file__).parents[2])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as caller:
        assert caller.stdout.readline() == b"starts\n"
        deadline, started = time.monotonic() + 60, []
        while len(started) < 4 and time.monotonic() < deadline:  # four, and the commands before them
            time.sleep(0.1)
            started = children_of(caller.pid)
        time.sleep(0.2)
        started = children_of(caller.pid)
        caller.send_signal(number)
    assert len(started) >= 4
    deadline = time.monotonic() + 20
    while set(started) & set(running()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(started) & set(running())


@pytest.mark.skipif(not LINUX or os.getuid() != 0, reason="needs root to drop rights")
@pytest.mark.parametrize("rights", ["-sys_admin", "-all"])
def test_without_namespaces(rights, tmp_path):
    """As in most containers. As root a user id per program remains, if it can read Python."""
    script = textwrap.dedent("""
        import json, os, sys, time, warnings
        sys.path.insert(0, sys.argv[1])
        from common.grading import judge, sandbox
        sandbox.bubblewrap = sandbox.unshare = lambda uid: ["false"]
        tests, good, *hostile = json.loads(sys.argv[2])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert judge.judge_many([(tests, good)]) == ["ok"]
        assert ["namespaces" in str(w.message) for w in caught] == [True], caught
        for code in hostile:
            print(judge.judge_many([(tests, code)])[0])
        assert judge.judge_many([(tests, "import statistics, decimal\\n" + good)]) == ["ok"]
    """)
    hostile = [HOSTILE[name][0].replace("WHERE", str(tmp_path)) + "\n" + GOOD
               for name in ("kill the judge", "writes elsewhere", "leaves a daemon")]
    arguments = [str(Path(judge.__file__).parents[2]), json.dumps([KINDS["call"], GOOD, *hostile])]
    command = ["setpriv", f"--bounding-set={rights}", "--inh-caps=-all", sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    verdicts = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "ok" not in verdicts[:2]
    time.sleep(0.5)
    assert children_of(1, deep=False) == []  # orphans
    assert not (tmp_path / "was_here").exists()


def test_a_python_below_tmp_is_isolated_as_well(tmp_path):
    """Programs have a /tmp of their own, which may not hide the Python that runs them."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    ask = "from common.grading.sandbox import sandbox; print(sandbox()[1])"
    modes = [subprocess.run([python, "-W", "ignore", "-c", ask], cwd=Path(judge.__file__).parents[2], text=True,
                            capture_output=True).stdout for python in (sys.executable, str(tmp_path / "venv/bin/python"))]
    assert modes[0] == modes[1] != ""


def test_the_guard_refuses_where_the_kernel_does_not(tmp_path):
    script = textwrap.dedent("""
        import os, socket, subprocess, sys
        sys.path.insert(0, sys.argv[1])
        from common.grading import inside
        inside.guard("guard")
        open("inside", "w").write("x")
        os.rename("inside", "renamed")
        open("renamed").read()
        open(os.devnull, "w")
        for attack in (lambda: open("../outside", "w"), lambda: os.kill(os.getpid(), 0), lambda: os.remove("../x"),
                       lambda: os.rename("renamed", "../y"), lambda: socket.create_connection(("127.0.0.1", 9)),
                       lambda: subprocess.run(["true"])):
            try: attack()
            except PermissionError: print("refused")
    """)
    command = [sys.executable, "-c", script, str(Path(judge.__file__).parents[2])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["refused"] * 6, done.stderr


# ---------------------------------------------------------------------------- as the benchmarks' own graders

CONTEST = {"contest": True}
ASKS = '\nif __name__ == "__main__":\n    print(f(int(input())))\n'
GRADED = {  # name: (program, kind, tests, verdict)
    "a name of the prelude": ("pass", "call", {**CONTEST, "entry": "factorial"}, "exception: KeyError"),
    "Solution.count": ("class Solution:\n    def count(self, a): return a + 1", "call", {**CONTEST, "entry": "count"},
                       "ok"),
    "Solution first": ("def f(x): return 0\nclass Solution:\n    def f(self, a): return a + 1", "call", CONTEST, "ok"),
    "a function beside Solution": ("class Solution:\n    pass\n" + GOOD, "call", CONTEST, "ok"),
    "pow of three": ("def f(a): return pow(a, 10, 1000)", "call", {**CONTEST, "inputs": [[1]], "outputs": [1]}, "ok"),
    "builtins": ("def f(a): return a + (type(eval('1')) is int) * (max(sum([1]), 0))", "call", CONTEST, "ok"),
    "heappush": ("def f(a):\n    h = []\n    heappush(h, a + 1)\n    return heapq.heappop(h)", "call", CONTEST, "ok"),
    "bisect_left": ("def f(a): return bisect_left([0, 1, 2, 3], a) + 1", "call", CONTEST, "ok"),
    "deepcopy, randint": ("def f(a): return deepcopy([a])[0] + randint(1, 1)", "call", CONTEST, "ok"),
    "sys's names": ("setrecursionlimit(maxsize // 2 ** 40)\ndef f(a): return a + 1", "call", CONTEST, "ok"),
    "imports on stdin": ("def g(a: List[int]) -> int: return gcd(a[0], 0)\nprint(g([int(input())]) + 1)", "stdin",
                         CONTEST, "ok"),
    "no prelude elsewhere": ("def f(a): return gcd(a, 0) + 1", "call", {}, "exception: NameError"),
    "3,000 deep": ("def g(n): return n and 1 + g(n - 1)\ndef f(x): return g(3000) - 2999 + x", "call", CONTEST, "ok"),
    "30,000 deep on stdin": ("def g(n): return n and 1 + g(n - 1)\nprint(g(30000) - 29999 + int(input()))", "stdin",
                             CONTEST, "ok"),
    "imported for call": (GOOD + ASKS, "call", {}, "ok"),
    "imported for assert": (GOOD + ASKS, "assert", {}, "ok"),
    "imported for unittest": (GOOD + ASKS, "unittest", {}, "ok"),
    "run for stdin": ("def f(x): return x + 1" + ASKS, "stdin", {}, "ok"),
    "[2] for 2": ("def f(x): return [x + 1]", "call", CONTEST, "wrong answer"),
    "2 for [2]": (GOOD, "call", {**CONTEST, "outputs": [[2], [3]]}, "wrong answer"),
    "2 for [2] in APPS": (GOOD, "call", {**CONTEST, "wrapped": True, "outputs": [[2], [3]]}, "ok"),
    "a tuple for a list": ("def f(x): return (x, (x,))", "call", {**CONTEST, "outputs": [[1, [1]], [2, [2]]]}, "ok"),
    "2.0 for 2": ("print(float(input()) + 1)", "stdin", {}, "ok"),
    "a future import": ("from __future__ import annotations\n" + GOOD, "call", CONTEST, "ok"),
}


@pytest.mark.parametrize("name", GRADED)
def test_graded_as_the_benchmark_does(name):
    code, kind, tests, why = GRADED[name]
    assert verdict(code, kind, **tests) == why


PROMPT = {"prompt": "import os\ndef f(x):\n", "helpers": "import os\nK = 1\n"}
PROMPTED = {  # name: (program, verdict)
    "an assert of its own": (GOOD + "assert f(1) == 3", "ok"),
    "a call of its own": (GOOD + "print(f(None))", "ok"),
    "needs a constant": ("N = 1\nM = N\ndef f(x): return x + M\nM2 = 1 / 0", "ok"),
    "needs a table": ("T = {}\nT[1] = 2\nT[2] = 3\ndef f(x): return T[x]\nT[None]", "ok"),
    "needs helpers": ("def g(x): return x + K\nclass C:\n    h = staticmethod(g)\ndef f(x): return C.h(x)", "ok"),
    "a future import": ("from __future__ import annotations\ndef f(x: int): return x + K", "ok"),
    "a decorator": ("import functools\n@functools.lru_cache(None)\ndef f(x): return x + 1\nf([])", "ok"),
    "prose around": ("Sure, here it is:\n\n" + GOOD + "\nI hope that this helps!", "ok"),
    "a wrong one": ("def f(x): return x\nassert f(1) == 1", "wrong answer"),
    "a completion": ("    return x + 1\n", "ok"),
}


@pytest.mark.parametrize("name", PROMPTED)
def test_programs_with_a_prompt_are_sanitized(name):
    code, why = PROMPTED[name]
    problem = Problem("p", "q", "code", tests=KINDS["call"], meta=PROMPT)
    assert judge_many([(problem, code)])[0].why == why


def test_sanitizing_can_be_turned_off():
    problem = Problem("p", "q", "code", tests=KINDS["call"], meta={**PROMPT, "sanitize": False})
    assert judge_many([(problem, GOOD + "assert f(1) == 3")])[0].why == "exception: AssertionError"


BLOCKS = {
    "in a list item": ("1. First:\n\n   ```python\n   def f(x):\n       return 1\n   ```\n",
                       "def f(x):\n    return 1"),
    "after a list marker": ("- ```python\n  def f(x):\n      return 1\n  ```\n", "def f(x):\n    return 1"),
    "indented by four": ("    ```py\n    x = 1\n    ```", "x = 1"),
    "a stray closing fence": ("x = 1\nprint(x)\n```\n", "x = 1\nprint(x)"),
    "a fence in a docstring": ('```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n```\n',
                               'def f():\n    """\n    ```\n    f()\n    ```\n    """'),
    "not closed": ("Text\n```python\nx = 1", "x = 1"),
    "four backticks": ("````python\nx = '''\n```\n'''\n````\nmore", "x = '''\n```\n'''"),
    "tildes": ("~~~python\nx = '''\n```\n'''\n~~~", "x = '''\n```\n'''"),
    "sample output after it": ("```python\nprint(1)\n```\nOutput:\n```\n1\n```", "print(1)"),
    "untagged, sample output": ("```\nprint(1)\n```\nOutput:\n```\n1 2\n```", "print(1)"),
    "untagged, an output that parses": ("```\nprint(1)\n```\nOutput:\n```\n1\n```", "print(1)"),
    "the last tagged": ("```python\nprint(1)\n```\n```python\nprint(2)\n```", "print(2)"),
    "in a quotation": ("> So:\n> ```python\n> def f(x):\n>     return 1\n> ```", "def f(x):\n    return 1"),
    "another language after it": ("```python\nx = 1\n```\n```java\nint x = 2;\n```", "x = 1"),
    "thought before it": ("<think>```python\nx = 2\n```</think>\n```python\nx = 1\n```", "x = 1"),
    "Windows line ends": ("```python\r\nx = 1\r\n```\r\n", "x = 1"),
    "no fence": ("x = 1", "x = 1"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_fenced_blocks(name):
    text, want = BLOCKS[name]
    problem = Problem("p", "q", "code", tests={"kind": "stdin"})
    assert extract_code(text, problem).strip() == want


@pytest.mark.parametrize("text", [
    "```\n" + "\n" * 100_000, "```" * 50_000, "`" * 100_000, "```\n" * 50_000, "    " * 100_000 + "x", "(" * 50_000,
    "- " * 50_000 + "```", "\n" * 100_000, "def " * 50_000, "def x\n" * 20_000], ids=lambda t: ascii(t[:12]))
@pytest.mark.parametrize("meta", [{}, PROMPT], ids=["bare", "prompt"])
def test_extraction_is_linear(text, meta):
    start = time.process_time()
    extract_code(text, Problem("p", "q", "code", tests={"kind": "call", "entry": "f"}, meta=meta))
    assert time.process_time() - start < 5


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
    def passes(code, **tests):
        return judge_many([(Problem("o", "q", "code", tests={"kind": "call", "entry": "f", **tests}), code)])[0].ok

    assert passes("def f(x): return [3, 1]", inputs=[[0]], outputs=[(1, 3)], oracle="set")
    assert passes("import re\ndef f(x): return re.match('a', x)", inputs=[["a"]], outputs=[True], oracle="truth")
    assert passes("def f(c): return -2.00001", inputs=[[[4, 0, -1]]], outputs=[2.0], oracle="root", atol=1e-3)
    assert not passes("def f(c): return 1.0", inputs=[[[4, 0, -1]]], outputs=[2.0], oracle="root", atol=1e-3)
    assert passes("def f(x): return list(range(10**5))", inputs=[[0]], outputs=[list(range(10**5))])  # by digest
    assert not passes("def f(x): return list(range(1, 10**5))", inputs=[[0]], outputs=[list(range(10**5))])
    assert passes("from collections import Counter\ndef f(x): return Counter(range(x))", inputs=[[30000]],
                   outputs=[{i: 1 for i in range(30000)}])


def test_duplicates_are_judged_once(monkeypatch):
    sandbox.sandbox()
    runs, execute = [], judge.execute
    monkeypatch.setattr(judge, "execute", lambda request: runs.append(1) or execute(request))
    problem = Problem("d", "q", "code", tests=KINDS["call"])
    verdicts = judge_many([(problem, GOOD)] * 5 + [(problem, f"```\n{GOOD}```")] * 5)
    assert all(v.ok for v in verdicts)
    assert len(runs) == 1


def test_close_kills_what_runs():
    tests = {**KINDS["call"], "time_limit": 60.0}
    thread = threading.Thread(target=judge.judge_many, args=([(tests, "import time\ntime.sleep(1000)")],))
    thread.start()
    while len(sandbox.LIVE) == len(sandbox.IDLE):
        time.sleep(0.05)
    time.sleep(0.5)
    sandbox.close()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert verdict(GOOD) == "ok"


# ---------------------------------------------------------------------------- majority vote


def test_vote_keys_of_code_are_behaviour_on_example_inputs():
    tests = {**KINDS["call"], "example_inputs": [[1], [5]], "outputs": ["never", "looked at"]}
    p = Problem("p", "q", "code", tests=tests)
    same = [GOOD, "def f(y):\n    return 1 + y", "```\ndef f(x): return float(x + 1)\n```"]
    other = ["def f(x): return x", "def f(x): raise ValueError", "def f(x): raise KeyError", "def f(x)"]
    keys = vote_keys([(p, code) for code in same + other])
    assert len(set(keys[:3])) == 1
    assert len(set(keys)) == 5
    shown = Problem("s", "Add.\n>>> f(1)\n2\n", "code", tests={**KINDS["assert"]})
    assert len(set(vote_keys([(shown, code) for code in same]))) == 1
    silent = Problem("n", "Add.", "code", tests={**KINDS["assert"]})
    assert vote_keys([(silent, GOOD)]) == vote_keys([(silent, GOOD + "\n\n# a comment")])


def test_examples_and_completion():
    assert examples(">>> f([1, 2], 'a)')\n3\nassert f(3) == g(4)", "f") == [[[1, 2], "a)"], [3]]
    meta = {"prompt": "import os\ndef f(x):\n", "helpers": "import os\n"}
    problem = Problem("p", "q", "code", tests={"entry": "f"}, meta=meta)
    assert extract_code("    return x", problem) == "import os\ndef f(x):\n    return x"
    assert extract_code("```python\ndef f(x): pass\n```", problem) == "import os\ndef f(x):\n    pass"
    twice = "```python\ndef f(x): return 1\n```\nfor example\n```python\nprint(f(2))\n```"
    assert extract_code(twice, problem) == "import os\ndef f(x):\n    return 1"  # what defines it, not what calls it
