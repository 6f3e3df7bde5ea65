"""The judge of code (§3.1): takes the program out of a solution text and runs it on tests, in another process.

    >>> judge_many([({"kind": "call", "entry": "f", "inputs": [[1]], "outputs": [2]}, "def f(x): return x + 1")])
    ["ok"]

Tests are a dict with a "kind", and optionally "atol", "time_limit" (CPU s per test), "reference" (code), "oracle":

    call      entry, inputs [[arg, ...], ...], outputs [...] (or absent: the reference is run), example_inputs
    stdin     inputs [str], outputs [str], example_inputs
    assert    entry, test: code that defines check(candidate), or plain asserts on the program's functions
    unittest  entry, test: code with unittest.TestCase classes

How untrusted code is run. A worker ("zygote") is a small clean Python process without torch. For each program it forks
a child, which drops its rights, sets its limits, empties its environment (but for one thread to BLAS), runs the program
and writes what came out, as JSON, into a pipe.
Where Linux allows it, the worker is process 1 of its own PID namespace, so that killing "everybody"
after each program leaves nothing behind, and lives in its own network (no route anywhere), IPC and mount namespaces
(all is read-only but a small scratch folder in memory). As root the program gets a user id of its own. Expected outputs
never enter the child: they are compared in the caller.

What this does NOT protect from:
- reading: the program sees every file that its user id may read, data files with expected outputs among them;
- `assert` and `unittest` tests share their process with the program, since they patch its modules. Changed builtins or
  assert methods and results that redefine == are noticed; a search of memory for the token of success is not;
- kernel bugs, side channels, and using up to MEMORY in each of up to PROCESSES processes at once (there is no cgroup);
- where namespaces are refused (most containers, macOS) a warning names what is missing. Then only a guard inside the
  program's own process keeps it from your files, your processes and the network: a net for accidents, not a wall.
For code that is hostile on purpose rather than merely wrong, run the whole thing in a virtual machine.
"""

import ast
import atexit
import builtins
import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MEMORY = 4 << 30  # bytes of address space per process, as evalplus; numpy alone maps more than 1 GiB on many cores
PROCESSES = 64  # processes and threads of one program
FILES = 64 << 20  # bytes a program may write to one file, and to its scratch folder
OUTPUT = 16 << 20  # bytes a program may print or return
LONG = 1 << 17  # characters; a longer value is compared by its digest: HumanEval/15 returns 6.9 MB for one input
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # CPU time is what counts
SECONDS = 2.0  # CPU seconds per test when nothing better is known; multiplied by slowness()
TOTAL = 20.0  # CPU seconds for all tests of one program, beyond what the reference solution needs


def extract_code(text, problem):
    """The program in a solution text: the last fenced block that defines the entry point, else the last one, else the
    text as a completion of the prompt.

    A block or text that lacks the entry point goes behind the prompt, which holds its signature and imports.
    """
    blocks = re.findall(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", text, re.S)
    prompt, name = problem.meta.get("prompt"), re.escape((problem.tests or {}).get("entry") or "")
    defined = re.compile(rf"^\s*(?:async\s+)?(?:def|class)\s+{name}\b|^{name}\s*=", re.M)
    code = ([b for b in blocks if name and defined.search(b)] or blocks or [text])[-1]
    if not prompt or not name:
        return code
    if not defined.search(code):
        return prompt + code
    return problem.meta.get("helpers", "") + code  # HumanEval/38: the prompt defines what the body may call


# ---------------------------------------------------------------------------- values that cross the pipe

DECODE = {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict, "complex": lambda v: complex(*v),
          "int": lambda v: int(v, 16), "bytes": bytes.fromhex, "object": lambda v: ("object", v),
          "digest": lambda v: ("digest", v)}


def encode(value, rough=False):
    """A Python value -> what JSON can carry. Lists and scalars stay; others become {"t": type, "v": ...}.

    Used in both directions instead of pickle: whoever unpickles what a hostile program wrote runs its code.
    (1, {2}) -> {"t": "tuple", "v": [1, {"t": "set", "v": [2]}]}. An object of any other type becomes the text of its
    repr: two of them can be told apart, but none can pretend to equal a plain value.
    rough: equal values get equal codes, for digest(): sets and dicts sorted, floats to 6 digits, 2.0 as 2.
    """
    if type(value) is str or value is None:
        return value
    if isinstance(value, float) and rough:
        return encode(int(value)) if value.is_integer() else f"{value:.6g}"
    if isinstance(value, int) and abs(value) >= 1 << 53:
        return {"t": "int", "v": hex(value)}  # HumanEval/83 returns a million digits, and decimal takes quadratic time
    if isinstance(value, (int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(v, rough) for v in value]
    for kind in (tuple, set, frozenset, dict):
        if isinstance(value, kind):
            items = [encode(v, rough) for v in (map(list, value.items()) if kind is dict else value)]
            return {"t": kind.__name__, "v": sorted(items, key=repr) if rough and kind is not tuple else items}
    if isinstance(value, complex):
        return {"t": "complex", "v": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"t": "bytes", "v": value.hex()}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), rough)
    return {"t": "object", "v": re.sub(r" at 0x[0-9a-f]+", "", f"{type(value).__name__} {value!r}")[:1000]}


def decode(value):
    """The inverse of `encode`; objects and digests come back as (kind, text). KeyError etc. on anything malformed."""
    if isinstance(value, dict):
        return DECODE[value["t"]](decode(value["v"]))
    return [decode(v) for v in value] if isinstance(value, list) else value


def digest(value):
    """A hash that equal values share. Piece by piece: MBPP/255 returns 128 million strings."""
    kind = next((kind for kind in (list, tuple, dict) if isinstance(value, kind)), type(value))  # a Counter is a dict
    sha = hashlib.sha256(kind.__name__.encode())
    for item in value if isinstance(value, (list, tuple)) else [value]:
        sha.update(repr(encode(item, rough=True)).encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


def _short_code(value):
    """encode(), or what is long as its digest."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or len(value) <= LONG // 4:
        code = encode(value)
        if len(json.dumps(code)) <= LONG:
            return code
    return {"t": "digest", "v": digest(value)}


# ---------------------------------------------------------------------------- is an output right?


def same(out, expected, atol=1e-6):
    """Equal, floats within atol + 1e-7 relative (evalplus's rule), also inside lists, tuples and dicts; nan is nan."""
    for a, b in ((out, expected), (expected, out)):
        if isinstance(a, tuple) and len(a) == 2 and a[0] == "digest" and a != b:
            return a[1] == digest(b)
    if isinstance(expected, float) and isinstance(out, (int, float)) and not isinstance(out, bool):
        both_nan = out != out and expected != expected
        with contextlib.suppress(OverflowError):  # an int beyond all floats
            return out == expected or both_nan or abs(out - expected) <= atol + 1e-7 * abs(expected)
    if isinstance(expected, complex) and isinstance(out, complex):
        return same(out.real, expected.real, atol) and same(out.imag, expected.imag, atol)
    if isinstance(expected, (list, tuple)) and type(out) is type(expected):
        return len(out) == len(expected) and all(same(a, b, atol) for a, b in zip(out, expected))
    if isinstance(expected, dict) and isinstance(out, dict):
        return out.keys() == expected.keys() and all(same(out[k], v, atol) for k, v in expected.items())
    return out == expected


def same_text(out, expected):
    """stdin programs: equal word by word; numbers written with a point may differ by 1e-6, absolute or relative.

    Problems that accept several answers have checkers that the data sets do not ship: such answers are judged wrong.
    """
    a, b = out.split(), expected.split()
    try:
        return len(a) == len(b) and all(
            x == y or ("." in y and abs(float(x) - float(y)) <= 1e-6 * max(1.0, abs(float(y)))) for x, y in zip(a, b))
    except ValueError:
        return False


def _oracle(name, out, args, want, atol):
    """evalplus's special oracles, for tasks whose statement leaves more than one answer."""
    if name == "root":  # HumanEval/32: any zero of the polynomial, not the reference's
        return abs(sum(c * math.pow(out, k) for k, c in enumerate(args[0]))) <= atol
    if name == "set":
        return set(out) == set(want)
    if name == "truth":  # a match object, True, or whatever is not None
        return (out is None or out is False) == (want is None or want is False)
    if name == "pyramid":  # Mbpp/581: "height" may be the pyramid's own, where the reference takes the slant's
        edge, height = args
        return abs(out - round(edge**2 + 2 * edge * math.sqrt((edge / 2) ** 2 + height**2))) <= atol
    if name == "digits":  # Mbpp/558: digit by digit of two numbers padded to one length
        width = max(len(str(n)) for n in args)
        return out == sum(abs(int(x) - int(y)) for x, y in zip(*(str(n).zfill(width) for n in args)))
    return name == "anything" or (name == "zero" and out == 0)


def _right(tests, i, out):
    if tests["kind"] in ("assert", "unittest"):
        return out is True
    expected, oracle, atol = tests["outputs"][i], tests.get("oracle"), tests.get("atol") or 1e-6
    if tests["kind"] == "stdin":
        return same_text(out, expected)
    with contextlib.suppress(TypeError, ValueError, OverflowError):  # an output of a type that the oracle does not know
        if oracle and _oracle(oracle, out, tests["inputs"][i], expected, atol):
            return True
    if tests.get("json") and isinstance(expected, list) and len(expected) == 1 and same(out, expected[0], atol):
        return True  # some rows of APPS wrap the result in a list
    return oracle != "root" and same(out, expected, atol)


# ---------------------------------------------------------------------------- verdicts


def _limit(tests):
    """CPU seconds for one test: the reference solution's own time, test by test, stretches it."""
    return max(tests.get("time_limit") or SECONDS * slowness(), 4 * max(tests.get("seconds") or [0.0]))


def run_program(tests, code, inputs=None, longer=1):
    """Run a program on its tests, or on other inputs. -> (results [(status, value, seconds)], end, left something)."""
    kind = tests["kind"] if inputs is None or tests["kind"] == "stdin" else "call"
    inputs = tests.get("inputs", [[]]) if inputs is None else inputs
    limit = longer * _limit(tests)
    total = max(limit, longer * TOTAL * slowness() + 4 * sum(tests.get("seconds") or ()))
    request = {"kind": kind, "limit": limit if kind in ("call", "stdin") else total, "total": total,
               "prelude": tests.get("prelude", ""), "code": code, "entry": tests.get("entry"),
               "json": tests.get("json"),
               "test": "" if kind == "call" else tests.get("test"), "token": os.urandom(16).hex(), "stdin": "",
               "preload": [m for m in ("numpy", "pandas", "matplotlib", "math_verify") if m in code]
               + ["unittest.mock"] * ("test" in tests)}
    results = []
    if kind == "stdin":
        for text in inputs:
            start, reply = time.monotonic(), _ask({**request, "stdin": text})
            status = "ok" if reply["end"] == "done" else reply["end"]
            results.append((status, reply["out"], time.monotonic() - start))
            if status != "ok" or reply["left"]:
                break
        return results, reply["end"], reply["left"]
    reply = _ask({**request, "inputs": [encode(list(args)) for args in inputs]})
    for line in reply["out"].splitlines():
        try:
            status, value, seconds = json.loads(line)
            value = value if status != "ok" else decode(value) if kind == "call" else value == request["token"]
            results.append((str(status), value, float(seconds)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # the program wrote it, not we
            results.append(("exc", "malformed output", 0.0))
    return results, reply["end"], reply["left"]


def _reference(tests):
    """Run the reference solution: fills in tests["seconds"], its times, and where they lack (evalplus) "outputs"."""
    results, end, _ = run_program(tests, tests["reference"], longer=10)
    fine = end == "done" and all(status == "ok" for status, _, _ in results)
    tests["seconds"] = [t for _, _, t in results] if fine else []
    if "outputs" not in tests and tests["kind"] == "call":
        tests["outputs"] = [v for _, v, _ in results]
        if not fine:
            tests["broken"] = "the reference solution fails: " + next((v for s, v, _ in results if s != "ok"), end)


def _judge(tests, code):
    """-> "ok" or why not. After a timeout the reference is timed too, and a slow one stretches the limits."""
    limit = _limit(tests)  # before the run: another thread may time the reference during it
    why = _why(tests, *run_program(tests, code))
    if why == "timeout" and tests.get("reference"):
        if "seconds" not in tests:
            _reference(tests)
        if _limit(tests) > limit:
            why = _why(tests, *run_program(tests, code))
    return why


def _why(tests, results, end, left):
    if "broken" in tests:
        return tests["broken"]
    wanted = len(tests.get("outputs") or [True])
    for i, (status, value, _) in enumerate(results[:wanted]):
        if status == "exc":
            return "memory" if value == "MemoryError" else f"exception: {value}"
        if status != "ok":
            return status
        if not _right(tests, i, value):
            return "wrong answer"
    if len(results) < wanted:
        return "exited early" if end == "done" else end
    return "left processes running" if left else "ok"


def judge_many(jobs, workers=None, progress=False):
    """[(tests, program)] -> ["ok" or why not]."""
    jobs = [(t and (t["kind"] not in ("call", "stdin") or t.get("inputs") != []) and t, code) for t, code in jobs]
    lacking = [(t,) for t, _ in jobs if t and t["kind"] == "call" and "outputs" not in t]
    parallel(_reference, lacking, workers, progress)
    judged = iter(parallel(_judge, [job for job in jobs if job[0]], workers, progress))
    return [next(judged) if tests else "no tests" for tests, _ in jobs]


def behaviour(tests, question, code):
    """A hash of what a program does on example *inputs*, its outputs or how it fails: the key of majority vote.

    The expected outputs are never looked at. Without example inputs it hashes the program itself, less its layout.
    """
    inputs = tests.get("example_inputs") or (examples(question, tests["entry"]) if tests.get("entry") else None)
    if not inputs:
        try:
            return digest(ast.dump(ast.parse(code)))
        except (SyntaxError, ValueError, RecursionError):
            return "does not parse"
    results, end, _ = run_program(tests, code, inputs)
    return digest([[s, v.split() if tests["kind"] == "stdin" else v] for s, v, _ in results] + [end])


def examples(question, entry):
    """Literal arguments of the calls that a question shows: ">>> f(1, 2)" or "assert f(1, 2) == 3" -> [[1, 2]]."""
    found = []
    for line in re.findall(r"^\s*(?:>>>|assert\b)(.*)", question, re.M):
        with contextlib.suppress(SyntaxError, ValueError):
            calls = [n for n in ast.walk(ast.parse(line.strip())) if isinstance(n, ast.Call)]
            found += [[ast.literal_eval(a) for a in n.args] for n in calls if getattr(n.func, "id", None) == entry]
    return found


# ---------------------------------------------------------------------------- the caller's side of the workers

_pool = {"idle": [], "all": [], "scratch": None, "isolation": None}
_lock = threading.Lock()
os.register_at_fork(after_in_child=lambda: _pool.update(idle=[], all=[], scratch=None))  # they belong to the parent


@functools.cache
def slowness():
    """How many times slower than a 2020 laptop this machine runs plain Python, at least 1. Scales all time limits."""
    took = timeit.repeat("sum(i * i for i in range(200_000))", timer=time.process_time, repeat=3, number=1)
    return max(1.0, min(took) / 0.015)


def cores():
    """Cores for this process; torchrun's ranks share a machine."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, here // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def parallel(function, jobs, workers=None, progress=False):
    """[function(*job)] in order, equal jobs once, in as many threads as cores: they only wait for processes."""
    from tqdm import tqdm

    keys = [tuple(x if isinstance(x, str) else id(x) for x in job) for job in jobs]
    todo = dict(zip(keys, jobs))
    with ThreadPoolExecutor(max(1, min(workers or cores(), len(todo)))) as threads:
        results = threads.map(lambda job: function(*job), todo.values())
        done = dict(zip(todo, tqdm(results, "judge", len(todo), disable=None if progress and todo else True)))
    return [done[key] for key in keys]


def _start_worker():
    """Start a zygote. Warns once if this system does not isolate fully."""
    if not _pool["scratch"]:
        _pool["scratch"] = tempfile.mkdtemp(prefix="judge-")
        os.chmod(_pool["scratch"], 0o711)
        atexit.register(close)
    scratch = tempfile.mkdtemp(dir=_pool["scratch"])
    # a fixed hash seed repeats the order of sets; nothing else of our environment; fd 2 is for faults of our own
    worker = subprocess.Popen([sys.executable, "-c", "import sys; from common import judge; "
                               "judge.zygote(sys.argv[1])", scratch],
                              cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env={"PYTHONHASHSEED": "0", "PYTHONINTMAXSTRDIGITS": "0", "MPLCONFIGDIR": scratch,
                                   **THREADS})
    _pool["all"].append(worker)
    hello = worker.stdout.readline()
    if not hello:
        raise RuntimeError("the judge's worker process did not start; its error is above")
    first, _pool["isolation"] = _pool["isolation"] is None, json.loads(hello)
    missing = [name for name in ("namespaces", "readonly") if not _pool["isolation"][name]]
    if first and missing:
        warnings.warn(f"the code judge lacks {' and '.join(missing)}, which this system refuses; the docstring of "
                      "common/judge.py says what that leaves open", stacklevel=2)
    return worker


def _ask(request):
    """Send a request to an idle worker, start one if there is none. -> its reply; a dead worker is replaced later."""
    with _lock:
        worker = _pool["idle"].pop() if _pool["idle"] else _start_worker()
    line = b""
    with contextlib.suppress(OSError):  # the pipe is broken
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        worker.stdin.flush()
        if select.select([worker.stdout], [], [], 20 * request["total"] + 60)[0]:
            line = worker.stdout.readline()
    if not line:
        worker.kill()
        worker.communicate()  # no zombie, no open pipes
        with _lock, contextlib.suppress(ValueError):
            _pool["all"].remove(worker)
        return {"out": "", "end": "killed the judge", "left": False}
    _pool["idle"].append(worker)
    return json.loads(line)


def close():
    """Stop the worker processes; the next use starts new ones."""
    with _lock:
        for worker in _pool["all"]:
            worker.kill()
            worker.communicate()
        shutil.rmtree(_pool["scratch"] or "", ignore_errors=True)
        _pool.update(idle=[], all=[], scratch=None)


# ---------------------------------------------------------------------------- the worker

LIBC, LINUX = ctypes.CDLL(None, use_errno=True), sys.platform == "linux"


def zygote(scratch):
    """A worker's whole life: isolate, say hello, then one JSON request a line in, one JSON reply a line out."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    sys.path.pop(0)  # the folder of this file: a program has no business importing from it
    reply = isolation = _isolate(scratch)
    os.chdir(scratch)
    random.seed(0)  # every program starts from the same random state, so verdicts repeat
    for name in "bisect collections copy datetime decimal heapq itertools operator statistics string typing".split():
        __import__(name)  # once here rather than in every program
    while True:
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
        line = requests.readline()
        if not line:
            os._exit(0)  # the caller closed the pipe; taking the interpreter apart would only cost time
        reply = _serve(json.loads(line), scratch, isolation)


def _isolate(scratch):
    """Enter the namespaces that the kernel grants. -> what was granted."""
    uid, gid, own = os.getuid(), os.getgid(), 30000 + os.getpid() % 30000
    got = {"namespaces": False, "readonly": False, "uid": None}
    spaces = 0x68020000 | (0x10000000 if uid else 0)  # CLONE_NEWNS, NEWIPC, NEWPID, NEWNET; NEWUSER

    def enter():
        if LIBC.unshare(spaces):
            return False
        try:
            for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                if uid:
                    Path(f"/proc/self/{name}").write_text(line)
        except OSError:  # Ubuntu since 23.10 grants a user namespace, and nothing in it
            return False
        return True
    trial = os.fork() if LINUX else 0  # what is entered cannot be left: a child tries first
    if LINUX and not trial:
        os._exit(not enter())
    if LINUX and os.waitpid(trial, 0)[1] == 0 and enter():
        pid = os.fork()
        if pid:  # the launcher only waits; the worker sees its closed pipe, or dies with it
            os._exit(os.waitpid(pid, 0)[1] != 0)
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        got.update(namespaces=True, readonly=_mounts(scratch))
    if LINUX:
        LIBC.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE 0: a child of the same user id cannot trace it
        LIBC.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to us
    if uid == 0:
        with contextlib.suppress(OSError):  # root of a container that maps one user; rights are dropped all the same
            os.chown(scratch, own, own)
            got["uid"] = own
    return got


def _mounts(scratch):
    """Everything read-only, a small memory disk on the scratch folder. True if it worked."""

    def check(failed):
        if failed:
            raise OSError(ctypes.get_errno())

    def mount(source, target, kind, flags, options=""):
        source, target, kind, options = (s.encode() for s in (source, target, kind, options))
        check(LIBC.mount(source, target, kind, ctypes.c_ulong(flags), options))

    def readonly(path, on, recursive):  # mount_setattr with MOUNT_ATTR_RDONLY, Linux 5.12
        check(LIBC.syscall(442, -100, path.encode(), 0x8000 * recursive, (ctypes.c_uint64 * 4)(on, not on, 0, 0), 32))

    try:
        mount("none", "/", "", 0x44000)  # MS_REC | MS_PRIVATE: nothing we do here shows outside
        mount("tmpfs", scratch, "tmpfs", 6, f"size={FILES},nr_inodes=4096,mode=700")  # MS_NOSUID | MS_NODEV
        hidden = {}  # Python may lie in a folder that only root may enter (/root): hide all but Python there
        for prefix in sorted({sys.base_prefix, sys.prefix}) if os.getuid() == 0 else ():
            closed = [str(f) for f in reversed(Path(prefix).parents) if not f.stat().st_mode & 1]
            if closed:
                hidden[prefix] = closed[0], tempfile.mkdtemp(dir=scratch)
                mount(prefix, hidden[prefix][1], "", 0x5000)  # MS_BIND | MS_REC
        for folder in {folder for folder, _ in hidden.values()}:
            mount("tmpfs", folder, "tmpfs", 6, "mode=755")
        for prefix, (_, stage) in hidden.items():
            os.makedirs(prefix, exist_ok=True)
            mount(stage, prefix, "", 0x2000)  # MS_MOVE
            os.rmdir(stage)
        LIBC.mount(b"proc", b"/proc", b"proc", ctypes.c_ulong(14), None)  # our own processes; not in containers
        readonly("/", True, True)
        readonly(scratch, False, False)
        return True
    except OSError:
        return False  # reported to the caller in the worker's first line


def _serve(request, scratch, isolation):
    """Run one program. -> {"out": what it wrote, "end": "done" or why it ended, "left": it left processes behind}."""
    for name in request["preload"]:
        with contextlib.suppress(ImportError):  # the program will say so
            __import__(name)  # once per worker: later forks have it already
    read, write = os.pipe()
    with tempfile.TemporaryFile(dir=scratch) as stdin:  # not a pipe: fast readers ask fstat for its size
        stdin.write(request["stdin"].encode("utf-8", "surrogatepass"))
        stdin.seek(0)
        pid = os.fork()
        if not pid:
            _child(request, stdin.fileno(), write, isolation)
    os.close(write)
    out, end, code = _watch(request, read, pid)
    os.close(read)
    left = _kill_all(pid, isolation)
    if end == "done" and code:
        ends = {-signal.SIGPROF: "timeout", -signal.SIGXCPU: "timeout", 77: "memory"}
        end = ends.get(code, f"exit code {code}")
    for folder, names, _ in os.walk(scratch):  # what a program closed, only root could empty
        for path in [path for path in (os.path.join(folder, n) for n in names) if not os.path.islink(path)]:
            os.chmod(path, 0o700)
    for path in Path(scratch).iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return {"out": out.decode("utf-8", "replace"), "end": end, "left": left}


def _watch(request, read, pid):
    """Read what a child writes until it ends or has to. -> (bytes, "done" or why it has to end, its exit code)."""
    # CPU time is what the limits count, so a busy machine fails nobody. The wall clock ends programs that sleep, and
    # fork bombs: ten times the CPU seconds that may pass before the next line of results, or in all.
    patience, final = 10 * request["limit"] + 2, time.monotonic() + 10 * request["total"] + 2
    data, code, eof, deadline = bytearray(), None, False, time.monotonic() + patience
    while True:
        if not eof and select.select([read], [], [], 0.02 if code is None else 0)[0]:
            chunk = os.read(read, 1 << 20)
            data += chunk
            eof = not chunk
            if b"\n" in chunk and request["kind"] == "call":  # one more test is through
                deadline = time.monotonic() + patience
        elif code is not None:
            return data, "done", code
        elif eof:  # a child may close its pipe and live
            time.sleep(5e-4)
        if code is None:
            ended, status = os.waitpid(pid, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if ended else None
        if len(data) > OUTPUT or time.monotonic() > min(deadline, final):
            return data, "output limit" if len(data) > OUTPUT else "timeout", code


def _kill_all(pid, isolation):
    """Kill and reap everything that the child started. -> was there anything left to kill?"""
    left = False
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # on macOS orphans are not our children
                os.killpg(pid, signal.SIGKILL)
            return left
        time.sleep(1e-4 * left)
        left = True
        if isolation["namespaces"]:
            os.kill(-1, signal.SIGKILL)  # we are process 1: this is everybody, at one stroke, fork bombs too
            continue
        # on Linux orphans become our children, so round after round all of them
        orphans = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split() if LINUX else ()
        for kill, target in [(os.killpg, pid), *((os.kill, int(orphan)) for orphan in orphans)]:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already
                kill(target, signal.SIGKILL)


# ---------------------------------------------------------------------------- in the child


def _child(request, stdin, out, isolation):
    """Drop every right, set the limits, run the program, never return. Results go to fd 3, a stdin program's to 1."""
    code = 1
    try:
        os.dup2(stdin, 0)
        os.dup2(out, 3)
        os.closerange(4, 256)
        os.dup2(1, 2)  # nowhere
        os.environ.clear()
        os.environ.update(THREADS)
        os.setsid()
        own = isolation["uid"]
        if own:
            os.setgroups([])
            os.setgid(own)
            os.setuid(own)
        if LINUX:
            LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG, which a change of user id clears
            LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: set-user-id programs give nothing
            LIBC.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # none, in a user namespace too
        limits = {"CPU": math.ceil(request["total"]), "AS": MEMORY, "FSIZE": FILES, "NOFILE": 128, "CORE": 0,
                  "STACK": 64 << 20}
        if own or isolation["namespaces"]:  # else the user's other processes count too, and the guard refuses forks
            limits["NPROC"] = PROCESSES
        for name, value in limits.items():
            with contextlib.suppress(ValueError, OSError):  # macOS refuses some; on Linux a lower one holds already
                resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value + (name == "CPU")))
        if not isolation["readonly"]:
            _guard(own)
        code = (_run_stdin if request["kind"] == "stdin" else _run_calls)(request) or 0
    except MemoryError:
        code = 77
    finally:
        os._exit(code)


def _guard(own_user):
    """Where the kernel gives no namespaces: refuse what harms the user, from inside the program's own process.

    A net for accidents such as os.kill(-1, 9), not a wall: C code gets around it. At least a hook cannot be removed.
    """
    scratch, writing = os.path.realpath("."), os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    changes = {"os." + n for n in "chmod chown link mkdir remove rename rmdir symlink truncate utime".split()}
    changes |= {"shutil.rmtree"}
    refused = ("socket.",) if own_user else ("socket.", "os.kill", "os.fork", "os.exec", "os.posix_spawn", "os.system",
                                             "os.spawn", "subprocess.", "ctypes.dlopen")

    def hook(event, args):
        paths = args[:2] if event in changes else args[:1] if event == "open" and args[2] & writing else ()
        paths = [os.path.realpath(os.fsdecode(p)) for p in paths if isinstance(p, (str, bytes, os.PathLike))]
        if event.startswith(refused) or not all(p.startswith(scratch) or p == os.devnull for p in paths):
            raise PermissionError(f"{event} in a program that is judged")

    sys.addaudithook(hook)


def _load(request):
    """Execute the program as a fresh __main__; returns its namespace."""
    signal.setitimer(signal.ITIMER_PROF, request["limit"])  # CPU time; its signal kills, so there is nothing to catch
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    for source in (request["prelude"], request["code"]):  # apart: a program may begin with "from __future__"
        exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _run_stdin(request):
    os.dup2(3, 1)
    os.close(3)
    sys.stdin, sys.stdout, sys.argv = open(0, closefd=False), open(1, "w", closefd=False), ["main.py"]
    sys.__stdin__, sys.__stdout__ = sys.stdin, sys.stdout
    code = 0
    try:
        _load(request)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        code = 77 if isinstance(error, MemoryError) else 1
    threading._shutdown()  # programs that start a thread for its bigger stack and do not join it
    atexit._run_exitfuncs()  # fast writers print here
    sys.stdout.flush()
    return code & 0xFF


def _run_calls(request):
    """Write a line for each list of arguments: ["ok", encoded value, CPU s] or ["exc", the type's name, CPU s]."""
    changed, function = _watch_judges() if request["test"] else None, None
    for args in request["inputs"]:
        start = time.process_time()
        try:
            if function is None:
                space, name = _load(request), request["entry"]
                if request["test"]:
                    function = functools.partial(_run_tests, request, space, changed)
                else:
                    function = space[name] if name in space else getattr(space["Solution"](), name)  # LeetCode's form
            signal.setitimer(signal.ITIMER_PROF, request["limit"])
            start = time.process_time()
            value = function(*decode(args))
            line = "ok", _short_code(json_form(value) if request["json"] else value), time.process_time() - start
        except BaseException as error:  # SystemExit too: a program that leaves has not answered
            line = "exc", type(error).__name__, time.process_time() - start
        data = json.dumps(line).encode() + b"\n"
        while data:
            data = data[os.write(3, data) :]
        if function is None:
            break


def json_form(value):
    """The expected outputs of APPS are JSON, which has no tuples."""
    return [json_form(v) for v in value] if isinstance(value, (list, tuple)) else value


def _watch_judges():
    """-> a function that says whether anything that judges the program has changed since now."""
    import unittest
    import unittest.mock

    watched = (builtins, json, os, unittest, unittest.TestCase, unittest.TestSuite, unittest.TestLoader)
    before = [dict(vars(x)) for x in watched]
    # new names are fine: modules load parts of themselves late
    return lambda: any(vars(x).get(k) is not v for x, names in zip(watched, before) for k, v in names.items())


def _run_tests(request, space, changed):
    """Asserts, check(candidate) or unittest classes, in the program's namespace. -> the token, or an exception."""
    import unittest

    function = space.get(request["entry"])

    @functools.wraps(function)
    def plain(*args, **kwargs):
        value = function(*args, **kwargs)
        if any("__eq__" in vars(c) for c in type(value).__mro__ if c.__module__ == "__main__"):
            raise TypeError("a result that redefines ==")
        return value

    if isinstance(function, types.FunctionType):
        space[request["entry"]] = plain
    ran = False
    if not changed():
        ran = request["kind"] == "assert"
        exec(compile(request["test"], "<tests>", "exec", dont_inherit=True), space)
        if "def check(" in request["test"]:
            space["check"](space[request["entry"]])
        for case in [c for c in space.values() if isinstance(c, type) and issubclass(c, unittest.TestCase)]:
            suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
            ran = ran or suite.countTestCases() > 0
            suite.debug()  # raises what a test raises; a skipped test does too
    if changed() or not ran:
        raise PermissionError("the program changes what judges it")
    return request["token"]
