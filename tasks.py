"""Problems and their judges, for math and for code (§3.1 of the paper: tasks and data).

    python tasks.py --task tiny-code --limit 20
    python tasks.py --task humaneval+ --data HumanEvalPlus.jsonl.gz   # the reference solutions must pass, or are named

    problems = load("math500", limit=10)
    verdicts = judge_many([(p, "... so the answer is \\\\boxed{7}.") for p in problems])

A judge says whether a *whole solution text* is right. Math: the final answer is taken out of the text and compared with
the gold one. Code: the program is taken out and run against the tests, in another process.

How untrusted code is run. A worker ("zygote") is a small clean Python process without torch. For each program it forks
a child, which drops its rights, sets its limits (CPU time, address space, processes, file size; output and wall clock
are the worker's), empties its environment, runs the program and writes what came out, as JSON, into a pipe. Where Linux
allows it, the worker is process 1 of its own PID namespace, so that killing "everybody" after each program leaves
nothing behind, and lives in its own network (no route anywhere), IPC and mount namespaces (all is read-only but a small
scratch folder in memory). As root the program gets a user id of its own. Expected outputs never enter the child: they
are compared in the caller. Tests that come as `assert` code run in a second child, which holds stubs that send the
arguments over a pipe; a program cannot reach the process that judges it.

What this does NOT protect from:
- reading: the program sees every file that its user id may read, data files with expected outputs among them;
- `unittest` tests (BigCodeBench) share their process with the program: they must, since they patch its modules. Changed
  builtins or assert methods and results that redefine == are noticed; a search of memory for the success token is not;
- kernel bugs, side channels, and using up to MEMORY in each of up to PROCESSES processes at once (there is no cgroup);
- where namespaces are refused (most containers, macOS) a warning names what is missing. Then only a guard inside the
  program's own process keeps it from your files, your processes and the network: a net for accidents, not a wall.
For code that is hostile on purpose rather than merely wrong, run the whole thing in a virtual machine.
"""

import argparse
import ast
import atexit
import base64
import builtins
import ctypes
import functools
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import queue
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
import types
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction

MEMORY = 4 << 30  # bytes of address space per process, as evalplus; numpy alone maps more than 1 GiB on many cores
PROCESSES = 64  # processes and threads of one program
FILES = 64 << 20  # bytes a program may write to one file, and to its scratch folder
OUTPUT = 16 << 20  # bytes a program may print or return
LONG = 1 << 17  # characters; a longer value is compared by its digest: HumanEval/15 returns 6.9 MB for one input
SECONDS = 2.0  # CPU seconds per test when nothing better is known; multiplied by slowness()
TOTAL = 20.0  # CPU seconds for all tests of one program, beyond what the reference solution needs


@dataclass
class Problem:
    """One task. `tests` (code) has a "kind", and optionally "atol", "time_limit" (CPU s per test), "reference" (code):

    call      entry, inputs [[arg, ...], ...], outputs [...] (or absent: the reference is run), example_inputs
    stdin     inputs [str], outputs [str], example_inputs
    assert    entry, test: code that defines check(candidate), or plain asserts on the program's functions
    unittest  test: code with unittest.TestCase classes, run in the program's own namespace
    """

    id: str
    question: str
    domain: str  # "math" | "code"
    answer: str | None = None
    tests: dict | None = None
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
    for start in reversed([m.end() for m in re.finditer(r"\\f?boxed\s*{", text)]):
        depth = 1
        for i in range(start, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if not depth:
                return text[start:i].strip() or None  # braces nest, so a regular expression will not do
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().split("\n")[0].strip() or None
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
    s = re.sub(r"_{(\d+)}$", r"_\1", re.sub(r"\s+", "", s))
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", s):
        s = s.replace(",", "")
    if re.fullmatch(r"[-+]?\d+(\.\d*)?", s) and len(s) < 1000:
        value = Fraction(s.rstrip("."))
        s = str(value.numerator) if value.denominator == 1 else s.lstrip("+")
    return s


def equivalent_many(pairs):
    """Is each prediction equal to its gold answer? pairs [(gold, pred)] -> [bool]. None is never equal to anything.

    String equality first, two integers are decided at once, and only the rest goes to math-verify, which needs
    milliseconds a pair and can hang on odd input: it runs in the sandbox of the code judge, under its time limit
    (its own guard is SIGALRM, which fails in threads, and is switched off).
    """
    verdicts, undecided = [False] * len(pairs), {}
    for i, (gold, pred) in enumerate(pairs):
        if gold is None or pred is None:
            continue
        a, b = normalise(gold), normalise(pred)
        verdicts[i] = a == b
        # integers, and numbers in a base: math-verify overlooks that 52_8 is not 52_9
        plain = any(re.fullmatch(form, a) and re.fullmatch(form, b) for form in (r"-?\d+", r"\w+_\d+"))
        if a != b and not plain and 0 < len(b) <= 1000:  # no answer is longer, and its parse would take the limit
            undecided.setdefault((gold, pred), []).append(i)
    todo = list(undecided)
    size = max(1, min(64, math.ceil(len(todo) / _workers())))  # in chunks: a fork costs as much as a few pairs
    for chunk, found in _parallel(_math_chunk, [todo[i : i + size] for i in range(0, len(todo), size)]):
        for pair, equal in zip(chunk, found):
            for i in undecided[pair]:
                verdicts[i] = equal
    return verdicts


def equivalent(gold, pred):
    return equivalent_many([(gold, pred)])[0]


def _math_chunk(pairs):
    """One request to the sandbox; a pair that hangs or kills the child counts as unequal, the rest goes on after it."""
    done = []
    while len(done) < len(pairs):
        reply = _ask({"kind": "math", "inputs": pairs[len(done) :], "limit": 5.0 * slowness(), "total": 300.0,
                      "preload": ["math_verify"]})
        if reply["end"].startswith("cannot"):
            raise RuntimeError(f"math answers need math-verify: pip install 'math-verify[antlr4_13_2]'; {reply['end']}")
        done += [json.loads(line)[:2] == ["ok", True] for line in reply["lines"]]
        done += [False] * (len(done) < len(pairs))
    return done


def _math_equal(gold, pred):
    """Runs in the sandbox. math-verify wants the gold answer first: the comparison is not symmetric."""
    import math_verify

    pred = re.sub(r"(?<![\\a-zA-Z])(pi|sqrt)(?![a-zA-Z])", r"\\\1", pred)  # "pi/2" is not p times i
    pred = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", pred)
    parsed = [math_verify.parse(f"\\boxed{{{s}}}", parsing_timeout=None) for s in (gold, pred)]
    return bool(math_verify.verify(*parsed, timeout_seconds=None))


# ---------------------------------------------------------------------------- code: the program in the text


def extract_code(text, problem):
    """The program in a solution text: the last fenced block, else the text as a completion of the prompt.

    A block or text that lacks the entry point goes behind the prompt, which holds its signature and imports.
    """
    blocks = re.findall(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", text, re.S)
    code = blocks[-1] if blocks else text
    prompt, name = problem.meta.get("prompt"), re.escape((problem.tests or {}).get("entry") or "")
    if not prompt or not name:
        return code
    if not re.search(rf"^\s*(?:async\s+)?(?:def|class)\s+{name}\b|^{name}\s*=", code, re.M):
        return prompt + code
    return problem.meta.get("helpers", "") + code  # HumanEval/38: the prompt defines what the body may call


# ---------------------------------------------------------------------------- values that cross the pipe


def encode(value):
    """A Python value -> what JSON can carry. Lists and scalars stay; others become {"t": type, "v": ...}.

    Used in both directions instead of pickle: whoever unpickles what a hostile program wrote runs its code.
    (1, {2}) -> {"t": "tuple", "v": [1, {"t": "set", "v": [2]}]}. An object of any other type becomes the text of its
    repr: two of them can be told apart, but none can pretend to equal a plain value.
    """
    if value is None or value is True or value is False or type(value) is str:
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 53 else {"t": "int", "v": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(v) for v in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {"t": kind.__name__, "v": [encode(v) for v in value]}
    if isinstance(value, dict):
        return {"t": "dict", "v": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, complex):
        return {"t": "complex", "v": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"t": "bytes", "v": bytes(value).hex()}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist())
    return {"t": "object", "v": re.sub(r" at 0x[0-9a-f]+", "", f"{type(value).__name__} {value!r}")[:1000]}


def decode(value):
    """The inverse of `encode`; objects and digests come back as (kind, text). ValueError on anything malformed."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    kind, v = value["t"], value["v"]
    if kind in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(decode, v))
    if kind == "dict":
        return {decode(k): decode(x) for k, x in v}
    simple = {"int": lambda: int(v, 16), "complex": lambda: complex(*v), "bytes": lambda: bytes.fromhex(v),
              "object": lambda: (kind, v), "digest": lambda: (kind, v)}
    if kind not in simple:
        raise ValueError(f"unknown type {kind!r}")
    return simple[kind]()


def digest(value):
    """A hash that equal values share: sets and dicts sorted, floats to 6 digits, 2.0 as 2."""
    sha, many = hashlib.sha256(), isinstance(value, (list, tuple))
    for item in [type(value).__name__, *value] if many else [value]:  # piecewise: MBPP/255 returns 128 million strings
        sha.update(repr(_order(item)).encode("utf-8", "surrogatepass"))
    return sha.hexdigest()


def _order(value):
    if isinstance(value, int) and abs(value) >= 1 << 53:
        return hex(value)  # HumanEval/83 returns a million digits, and decimal takes quadratic time
    if isinstance(value, float):
        return _order(int(value)) if value.is_integer() else f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        plain = set(map(type, value)) <= {str, bool, type(None)}
        return [type(value).__name__, *(value if plain else map(_order, value))]
    if isinstance(value, (set, frozenset)):
        return ["set", sorted(repr(_order(v)) for v in value)]
    if isinstance(value, dict):
        return ["dict", sorted((repr(_order(k)), repr(_order(v))) for k, v in value.items())]
    return value


def json_form(value):
    """APPS: its expected outputs are JSON, which has no tuples."""
    return [json_form(v) for v in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------------------- the worker: python tasks.py --zygote

LIBC = ctypes.CDLL(None, use_errno=True)
NAMESPACES = 0x20000 | 0x8000000 | 0x20000000 | 0x40000000  # CLONE_NEWNS, NEWIPC, NEWPID, NEWNET
NEWUSER = 0x10000000


def zygote(scratch):
    """A worker's whole life: isolate, say hello, then one JSON request a line in, one JSON reply a line out."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    sys.path.pop(0)  # the folder of this file: a program has no business importing from it
    isolation = _isolate(scratch)
    os.chdir(scratch)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    random.seed(0)  # every program starts from the same random state, so verdicts repeat
    for name in "bisect collections copy datetime decimal heapq itertools operator statistics string typing".split():
        __import__(name)  # once here rather than in every program
    replies.write(json.dumps(isolation).encode() + b"\n")
    replies.flush()
    for line in requests:
        replies.write(json.dumps(_serve(json.loads(line), scratch, isolation)).encode() + b"\n")
        replies.flush()
    os._exit(0)  # the caller closed the pipe; taking the interpreter apart would only cost time


def _isolate(scratch):
    """Enter the namespaces that the kernel grants. -> got: pid, net, mount, reaper, uid (or False), processes."""
    got = dict.fromkeys(("pid", "net", "mount", "reaper", "uid"), False)
    uid, gid, unique = os.getuid(), os.getgid(), 30000 + os.getpid() % 30000
    if hasattr(LIBC, "unshare") and not LIBC.unshare(NAMESPACES | (NEWUSER if uid else 0)):
        if uid:
            for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as f:
                    f.write(line)
        pid = os.fork()
        if pid:  # the launcher only waits; the worker sees its closed pipe, or dies with it
            os._exit(os.waitpid(pid, 0)[1] != 0)
        got.update(pid=True, net=True, mount=_mounts(scratch))
    if hasattr(LIBC, "prctl"):
        if got["pid"]:  # PR_SET_PDEATHSIG: dies with the launcher. Without one the parent is a *thread* of the caller
            LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)
        LIBC.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE 0: a child of the same user id cannot trace it
        got["reaper"] = not LIBC.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to us
    # The kernel counts processes per user id (and user namespace): a user's own others must not use up the allowance.
    got["processes"] = PROCESSES
    if uid == 0:
        try:
            os.chown(scratch, unique, unique)
            got["uid"] = unique
        except OSError:
            pass  # root of a container that maps one user only: rights are dropped all the same, in _lower
    elif not got["pid"] and os.path.isdir("/proc/self"):
        for p in filter(str.isdigit, os.listdir("/proc")):
            try:
                got["processes"] += len(os.listdir(f"/proc/{p}/task")) if os.stat(f"/proc/{p}").st_uid == uid else 0
            except OSError:
                pass  # ended while we counted
    return got


def _mounts(scratch):
    """Everything read-only, a small memory disk on the scratch folder. True if it worked."""

    def mount(source, target, kind, flags, options=""):
        if LIBC.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()):
            raise OSError(ctypes.get_errno(), f"mount {target}")

    def readonly(path, on, recursive):  # mount_setattr with MOUNT_ATTR_RDONLY, Linux 5.12
        attributes = (ctypes.c_uint64 * 4)(on, not on, 0, 0)
        if LIBC.syscall(442, -100, path.encode(), 0x8000 * recursive, attributes, 32):
            raise OSError(ctypes.get_errno(), "mount_setattr")

    try:
        mount("none", "/", "", 0x44000)  # MS_REC | MS_PRIVATE: nothing we do here shows outside
        mount("tmpfs", scratch, "tmpfs", 6, f"size={FILES},nr_inodes=4096,mode=700")  # MS_NOSUID | MS_NODEV
        for prefix in {sys.base_prefix, sys.prefix} if os.getuid() == 0 else ():
            parts = prefix.split("/")
            parents = ["/".join(parts[:n]) for n in range(2, len(parts))]
            closed = next((p for p in parents if not os.stat(p).st_mode & 1), None)
            if closed:  # Python lies in a folder that only root may enter: hide all but Python there
                stage = os.path.join(scratch, "python")
                os.mkdir(stage)
                mount(prefix, stage, "", 0x5000)  # MS_BIND | MS_REC
                mount("tmpfs", closed, "tmpfs", 6, "mode=755")
                os.makedirs(prefix)
                mount(stage, prefix, "", 0x2000)  # MS_MOVE
                os.rmdir(stage)
        LIBC.mount(b"proc", b"/proc", b"proc", ctypes.c_ulong(14), None)  # our own processes; not in containers
        readonly("/", True, True)
        readonly(scratch, False, False)
        return True
    except OSError:
        return False  # reported to the caller in the worker's first line


def _serve(request, scratch, isolation):
    """Run one program. -> {"lines": [JSON str], "end": "done" or why it ended, "left": it left processes behind}."""
    for name in request.get("preload", ()):
        try:
            __import__(name)  # once per worker: later forks have it already
        except ImportError as error:
            if request["kind"] == "math":
                return {"lines": [], "end": f"cannot import: {error}", "left": False}
    kind, lines, pipes = request["kind"], [], ()
    if kind == "stdin":
        for text in request["inputs"]:
            with tempfile.TemporaryFile(dir=scratch) as stdin:  # a real file: fast readers ask fstat for its size
                stdin.write(text.encode("utf-8", "surrogatepass"))
                stdin.seek(0)
                start = time.monotonic()
                out, end, left = _run([(_child_stdin, [stdin.fileno()])], request, isolation)
            lines.append(json.dumps([end, out.decode("utf-8", "replace"), time.monotonic() - start]))
            if end != "done" or left:
                break
    else:
        children = [(_child_unittest if kind == "unittest" else _child_call, [])]
        if kind == "assert":
            (calls, ask), (results, tell) = os.pipe(), os.pipe()
            pipes = (calls, ask, results, tell)
            children = [(_child_tester, [ask, results]), (_child_program, [calls, tell])]
        out, end, left = _run(children, request, isolation, pipes)
        lines = out.decode("utf-8", "replace").splitlines()
    for name in os.listdir(scratch):
        path = os.path.join(scratch, name)
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
    return {"lines": lines, "end": end, "left": left}


def _run(children, request, isolation, pipes=()):
    """Fork the children, read what the first of them writes, kill what is left. -> (bytes, end, left something)."""
    read, write = os.pipe()
    pids = [_fork(f, fds, None if n else write, request, isolation) for n, (f, fds) in enumerate(children)]
    for fd in (write, *pipes):
        os.close(fd)
    data, end, codes, closed, nap = bytearray(), None, {}, False, 1e-4
    # CPU time is what the limits count. The wall clock ends programs that sleep: silent for long, and not because a
    # busy machine left them less than a hundredth of a core. It also ends fork bombs, which make the machine busy.
    patience, final = 3 * request["limit"] + 1, time.monotonic() + 20 * request["total"] + 10
    since, used = time.monotonic(), 0.0
    while end is None and len(codes) < len(pids):
        if not closed and select.select([read], [], [], 0.02)[0]:
            chunk = os.read(read, 1 << 20)
            data += chunk
            closed = not chunk
            if b"\n" in chunk and request["kind"] != "stdin":  # one more test is through
                since, used = time.monotonic(), _cpu(pids)
            end = "output limit" if len(data) > OUTPUT else end
            if chunk and time.monotonic() < min(since + patience, final):
                continue
        for pid in [p for p in pids if p not in codes]:  # a child may close its pipe and live, or leave it to a daemon
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(code)
        if closed and len(codes) < len(pids):
            time.sleep(nap)
            nap = min(2 * nap, 0.02)
        now = time.monotonic()
        if end is None and (now > final or now > since + patience):
            idle = _cpu(pids) - used < 0.01 * (now - since)
            end = "timeout" if now > final or idle or _forked(pids) else None
    while not closed and end is None and select.select([read], [], [], 0)[0]:  # what was written just before the end
        chunk = os.read(read, 1 << 20)
        data += chunk
        closed = not chunk or len(data) > OUTPUT
    os.close(read)
    left = _alive()
    _kill_all(isolation, pids)
    worst = min(codes.values(), default=0)  # a signal is negative
    if end is None and worst < 0:
        end = "timeout" if -worst in (signal.SIGPROF, signal.SIGXCPU) else f"crash: signal {-worst}"
    elif end is None and any(codes.values()):
        end = "memory" if 77 in codes.values() else f"exit code {max(codes.values())}"
    return bytes(data), end or "done", left


def _cpu(pids):
    """CPU seconds that these children have used so far; 0 where the system does not say (macOS)."""
    total = 0.0
    for pid in pids:
        try:
            total += time.clock_gettime((~pid << 3) | 2)  # Linux: the number of a process's own CPU clock
        except OSError:
            pass  # it has ended
    return total


def _forked(pids):
    """Have these children live children of their own? False where the system does not say."""
    for pid in pids:
        try:
            with open(f"/proc/{pid}/task/{pid}/children") as f:
                if f.read().strip():
                    return True
        except OSError:
            pass  # it has ended, or there is no such file here
    return False


def _alive():
    """Reap the dead; is any child (or orphan that came to us) still running?"""
    while True:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                return True
        except ChildProcessError:
            return False


def _kill_all(isolation, pids):
    """Kill and reap everything that the children started."""
    while _alive():
        if isolation["pid"]:
            os.kill(-1, signal.SIGKILL)  # we are process 1: this is everybody, at one stroke, fork bombs too
        elif isolation["uid"]:  # the user id is this program's alone: kill as that user
            if not os.fork():
                os.setuid(isolation["uid"])
                os.kill(-1, signal.SIGKILL)
                os._exit(0)
        else:
            targets = set(pids)
            if isolation["reaper"]:  # orphans become our children, so round after round all of them
                with open(f"/proc/self/task/{os.getpid()}/children") as f:
                    targets |= set(map(int, f.read().split()))
            for kill, pid in [(kill, pid) for kill in (os.killpg, os.kill) for pid in targets]:
                try:
                    kill(pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass  # gone already
        time.sleep(1e-4)


def _fork(function, fds, out, request, isolation):
    """Fork a child with lowered rights that runs function(request, out, *fds) and never returns. -> its pid."""
    parent, pid = os.getpid(), os.fork()
    if pid:
        return pid
    code = 1
    try:
        low = 3
        for fd in sorted(fd for fd in (*fds, out) if fd is not None):  # the worker's own pipes are not for the program
            os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, 256)
        os.dup2(1, 2)  # nowhere
        os.environ.clear()
        os.setsid()
        _lower(request, isolation)
        if os.getppid() == parent:  # else the worker died before its death could be a signal
            code = function(request, out, *fds) or 0
    except MemoryError:
        code = 77
    finally:
        os._exit(code)


def _lower(request, isolation):
    """Drop every right and set the limits of this process."""
    if isolation["uid"]:
        os.setgroups([])
        os.setgid(isolation["uid"])
        os.setuid(isolation["uid"])
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG, which a change of user id clears
        LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: set-user-id programs give nothing
        LIBC.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # none, in a user namespace too
    limits = {"CPU": math.ceil(request["total"]), "AS": MEMORY, "FSIZE": FILES, "NOFILE": 128, "CORE": 0,
              "STACK": 64 << 20, "NPROC": isolation["processes"]}
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value + (name == "CPU")))  # soft: SIGXCPU
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise  # macOS refuses some, which the docstring says; elsewhere a missing limit is an error
    if not (isolation["pid"] and isolation["net"] and isolation["mount"]):
        _guard(isolation["uid"])


def _guard(own_user):
    """Where the kernel gives no namespaces: refuse what harms the user, from inside the program's own process.

    A net for accidents such as os.kill(-1, 9), not a wall: C code gets around it. At least a hook cannot be removed.
    """
    scratch, writing = os.path.realpath("."), os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    changes = {"os." + n for n in "chmod chown link mkdir remove rename rmdir symlink truncate utime".split()}
    refused = ("socket.",) if own_user else ("socket.", "os.kill", "os.fork", "os.exec", "os.posix_spawn", "os.system",
                                             "os.spawn", "subprocess.", "ctypes.dlopen", "shutil.rmtree")

    def hook(event, args):
        if event.startswith(refused):
            raise PermissionError(f"{event} in a program that is judged")
        if event in changes or (event == "open" and isinstance(args[2], int) and args[2] & writing):
            for path in args[: 2 if event in ("os.rename", "os.link") else 1]:
                inside = isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(scratch)
                if not inside and path != os.devnull:
                    raise PermissionError(f"{event} outside the scratch folder")

    sys.addaudithook(hook)


# ---------------------------------------------------------------------------- in the child: the program runs


def _emit(fd, *line):
    data = json.dumps(line).encode() + b"\n"
    while data:
        data = data[os.write(fd, data) :]


def _load(request):
    """Execute the program as a fresh __main__; returns its namespace."""
    signal.setitimer(signal.ITIMER_PROF, request["limit"])  # CPU time, so a busy machine does not fail a program
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(request["code"], "<program>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _entry(namespace, name):
    return namespace[name] if name in namespace else getattr(namespace["Solution"](), name)  # LeetCode's form


def _timed(function, args, kwargs, request, short=False):
    """Call it under the time limit. -> ("ok", encoded value, CPU s) or ("exc", the type's name, CPU s)."""
    signal.setitimer(signal.ITIMER_PROF, request["limit"])  # its signal kills, so there is nothing to catch
    start = time.process_time()
    try:
        value = function(*args, **kwargs)
        many = isinstance(value, (list, tuple)) and len(value) > LONG // 4
        coded = None if many and short else encode(value)
        if short and (many or len(json.dumps(coded)) > LONG):
            coded = {"t": "digest", "v": digest(json_form(value) if request["json"] else value)}
        return "ok", coded, time.process_time() - start
    except BaseException as error:  # SystemExit too: a program that leaves has not answered
        return "exc", type(error).__name__, time.process_time() - start


def _child_call(request, out):
    """Kinds "call" and "math": one line of result per list of arguments."""
    try:
        function = _math_equal if request["kind"] == "math" else _entry(_load(request), request["entry"])
    except BaseException as error:
        return _emit(out, "exc", type(error).__name__, 0)
    for args in request["inputs"]:
        _emit(out, *_timed(function, decode(args), {}, request, short=request["kind"] == "call"))


def _child_stdin(request, out, stdin):
    os.dup2(stdin, 0)
    os.dup2(out, 1)
    os.closerange(3, 256)
    sys.stdin, sys.stdout, sys.argv = open(0, closefd=False), open(1, "w", closefd=False), ["main.py"]
    sys.__stdin__, sys.__stdout__ = sys.stdin, sys.stdout
    code = 0
    try:
        _load(request)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except MemoryError:
        code = 77
    except BaseException:
        code = 1
    threading._shutdown()  # programs that start a thread for its bigger stack and do not join it
    atexit._run_exitfuncs()  # fast writers print here
    sys.stdout.flush()
    return code & 0xFF


def _child_program(request, _, calls, results):
    """The program's side of `assert` tests: answers [name, args, kwargs] lines until there are no more."""
    try:
        namespace, failed = _load(request), None
    except BaseException as error:
        failed = "exc", type(error).__name__, 0
    for line in os.fdopen(calls):
        name, args, kwargs = json.loads(line)
        if not failed and name not in namespace and "Solution" not in namespace:
            failed = "exc", "NameError", 0
        _emit(results, *(failed or _timed(_entry(namespace, name), decode(args), dict(decode(kwargs)), request)))


def _child_tester(request, out, calls, results):
    """The tests' side: the program's functions are stubs, and what they return is plain data."""
    results = os.fdopen(results)
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(4, 0, 0, 0, 0)  # the program has the same user id: it must not trace this process

    def stub(name):
        def call(*args, **kwargs):
            _emit(calls, name, encode(list(args)), encode(list(kwargs.items())))
            line = results.readline()
            if not line:
                os._exit(0)  # the program is dead; no verdict is written
            status, value, _ = json.loads(line)
            if status == "ok":
                return decode(value)
            known = getattr(builtins, value, None)
            raise known() if isinstance(known, type) and issubclass(known, Exception) else RuntimeError(value)

        return call

    tree, space = ast.parse(request["test"]), {"__name__": "tests"}
    exec(compile(request["setup"], "<setup>", "exec", dont_inherit=True), space)  # the prompt's own helper functions
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in space and not hasattr(builtins, node.id):
            module = node.id in sys.stdlib_module_names  # tests of MBPP use what the solution happens to import
            space[node.id] = __import__(node.id) if module else stub(node.id)
    space[request["entry"]] = stub(request["entry"])
    try:
        exec(compile(tree, "<tests>", "exec"), space)
        if "def check(" in request["test"]:
            space["check"](space[request["entry"]])
        _emit(out, "ok", request["token"], 0)
    except BaseException as error:
        _emit(out, "exc", type(error).__name__, 0)


def _child_unittest(request, out):
    """The tests run in the program's namespace; a change to what judges them is a failure of its own."""
    import unittest
    import unittest.mock

    watched = (builtins, json, os, unittest, unittest.TestCase, unittest.TestSuite, unittest.TestLoader)

    before = [dict(vars(x)) for x in watched]

    def tampered():  # new names are fine: modules load parts of themselves late
        return any(vars(x).get(k) is not v for x, names in zip(watched, before) for k, v in names.items())

    def plain(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            value = function(*args, **kwargs)
            if any("__eq__" in vars(c) for c in type(value).__mro__ if c.__module__ == "__main__"):
                raise TypeError("a result that redefines ==")
            return value

        return call

    try:
        space = _load(request)
        if isinstance(space.get(request["entry"]), types.FunctionType):
            space[request["entry"]] = plain(space[request["entry"]])
        exec(compile(request["test"], "<tests>", "exec", dont_inherit=True), space)
        signal.setitimer(signal.ITIMER_PROF, request["total"])
        suite, result = unittest.TestSuite(), unittest.TestResult()
        if not tampered():
            suite = unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"])
            suite.run(result)
        failed = result.errors + result.failures
        if tampered():
            _emit(out, "exc", "Tampering", 0)
        elif failed or result.testsRun != suite.countTestCases():
            _emit(out, "exc", failed[0][1].strip().split("\n")[-1].split(":")[0] if failed else "AssertionError", 0)
        else:
            _emit(out, "ok", request["token"], 0)
    except BaseException as error:
        _emit(out, "exc", type(error).__name__, 0)


# ---------------------------------------------------------------------------- the caller's side of the workers

_pool = {"owner": None, "idle": None, "all": [], "scratch": None, "isolation": None}
_pool_lock = threading.Lock()


@functools.cache
def slowness():
    """How many times slower than a 2020 laptop this machine runs plain Python, at least 1. Scales all time limits."""
    best = 9.0
    for _ in range(3):
        start = time.process_time()
        sum(i * i for i in range(200_000))
        best = min(best, time.process_time() - start)
    return max(1.0, best / 0.015)


def _workers():
    """Cores for this process; torchrun's ranks share a machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _start_worker():
    """Start a zygote. Called under the lock. Warns once if this system does not isolate fully."""
    if _pool["owner"] != os.getpid():  # first use, or we are a fork of a process that has workers
        _pool.update(owner=os.getpid(), idle=queue.LifoQueue(), all=[], scratch=tempfile.mkdtemp(prefix="judge-"))
        os.chmod(_pool["scratch"], 0o711)
        atexit.register(close)
    scratch = tempfile.mkdtemp(dir=_pool["scratch"])
    # a fixed hash seed repeats the order of sets; nothing else of our environment; fd 2 is for faults of our own
    command = [sys.executable, "-s", os.path.abspath(__file__), "--zygote", scratch]
    worker = subprocess.Popen(command, cwd=scratch, env={"PYTHONHASHSEED": "0", "MPLCONFIGDIR": scratch},
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    _pool["all"].append(worker)
    hello = worker.stdout.readline()
    if not hello:
        raise RuntimeError("the judge's worker process did not start; its error is above")
    if _pool["isolation"] is None:
        _pool["isolation"] = json.loads(hello)
        names = {"pid": "a PID namespace", "net": "a network namespace", "mount": "a read-only file system",
                 "reaper": "a child subreaper"}
        missing = [name for key, name in names.items() if not _pool["isolation"][key]]
        if missing:
            warnings.warn(f"the code judge runs without {', '.join(missing)}: this system refuses. The docstring of "
                          "tasks.py says what that leaves open.", stacklevel=2)
    return worker


def _ask(request):
    """Send a request to an idle worker, start one if there is none. -> its reply; a dead worker is replaced later."""
    with _pool_lock:
        if _pool["owner"] == os.getpid() and not _pool["idle"].empty():
            worker = _pool["idle"].get()
        else:
            worker = _start_worker()
    longest = (20 * request["total"] + 60) * (len(request["inputs"]) if request["kind"] == "stdin" else 1)
    try:
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        worker.stdin.flush()
        line = worker.stdout.readline() if select.select([worker.stdout], [], [], longest)[0] else b""
    except OSError:  # the pipe is broken
        line = b""
    if not line:
        worker.kill()
        return {"lines": [], "end": "killed the judge", "left": False}
    _pool["idle"].put(worker)
    return json.loads(line)


def close():
    """Stop the worker processes; the next use starts new ones."""
    with _pool_lock:
        if _pool["owner"] != os.getpid():
            return
        for worker in _pool["all"]:
            worker.stdin.close()  # an idle worker ends by itself
        for worker in _pool["all"]:
            try:
                worker.wait(1)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            worker.stdout.close()
        shutil.rmtree(_pool["scratch"], ignore_errors=True)
        _pool["owner"] = None


def _parallel(function, jobs, workers=None, progress=False):
    """[(job, function(job))] in order, in as many threads as there are workers: they only wait for processes."""
    from tqdm import tqdm

    with ThreadPoolExecutor(max(1, min(workers or _workers(), len(jobs)))) as threads:
        return list(zip(jobs, tqdm(threads.map(function, jobs), total=len(jobs), disable=not progress, desc="judge")))


# ---------------------------------------------------------------------------- verdicts

PRELUDE = """from typing import *
from collections import *
from functools import *
from itertools import *
from math import *
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
"""  # what LeetCode's statements take for granted


def _run_tests(tests, code, inputs=None, longer=1):
    """Run a program on its tests, or on other inputs. -> (results [(status, value, CPU s)], end, left something)."""
    seconds = tests.get("seconds") or [0.0]  # the reference solution's own, test by test
    limit = longer * max(tests.get("time_limit") or SECONDS * slowness(), 4 * max(seconds))
    kind = tests["kind"] if inputs is None or tests["kind"] == "stdin" else "call"
    inputs = tests.get("inputs", []) if inputs is None else inputs
    token, text = os.urandom(16).hex(), code + tests.get("test", "")
    reply = _ask({"kind": kind, "code": tests.get("prelude", "") + code, "entry": tests.get("entry"), "limit": limit,
                  "total": max(limit, longer * TOTAL * slowness() + 4 * sum(seconds)), "json": tests.get("json"),
                  "inputs": inputs if kind == "stdin" else [encode(list(args)) for args in inputs], "token": token,
                  "test": tests.get("test"), "setup": tests.get("setup") or "",
                  "preload": [m for m in ("numpy", "pandas", "matplotlib") if m in text]})
    results = []
    for line in reply["lines"]:
        try:
            status, value, spent = json.loads(line)
            if kind == "stdin":  # there the status is how the process ended, and the value what it printed
                status = "ok" if status == "done" else status
            elif status == "ok":
                value = decode(value) if kind == "call" else value == token
            results.append((status, value, float(spent)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # the program wrote it, not we
            results.append(("exc", "malformed output", 0.0))
    return results, reply["end"], reply["left"]


def _expected(tests):
    """Run the reference solution: fills in tests["seconds"], its times, and where they lack (evalplus) "outputs"."""
    start = time.monotonic()
    results, end, _ = _run_tests(tests, tests["reference"], longer=10)
    fine = end == "done" and all(status == "ok" for status, _, _ in results)
    tests["seconds"] = [t for _, _, t in results] if tests["kind"] == "call" else [time.monotonic() - start]
    if not fine:
        tests["seconds"] = []
    if "outputs" not in tests and tests["kind"] == "call":
        tests["outputs"] = [v for _, v, _ in results]
        if not fine:
            tests["broken"] = "the reference solution fails: " + next((v for s, v, _ in results if s != "ok"), end)


def _judge_code(job):
    """(tests, code) -> Verdict. After a timeout the reference is timed too, and a slow one stretches the limits."""
    tests, code = job
    verdict = _verdict(tests, *_run_tests(tests, code))
    if verdict.why == "timeout" and tests.get("reference") and "seconds" not in tests:
        _expected(tests)
        if 4 * max(tests["seconds"], default=0) > (tests.get("time_limit") or SECONDS * slowness()):
            verdict = _verdict(tests, *_run_tests(tests, code))
    return verdict


def _verdict(tests, results, end, left):
    if "broken" in tests:
        return Verdict(False, None, tests["broken"])
    wanted = tests.get("outputs") or [True]
    for i, (status, value, _) in enumerate(results[: len(wanted)]):
        if status == "exc":
            return Verdict(False, None, "memory" if value == "MemoryError" else f"exception: {value}")
        if status != "ok":
            return Verdict(False, None, status)
        if not _right(tests, i, value, wanted[i]):
            return Verdict(False, None, "wrong answer")
    if len(results) < len(wanted):
        return Verdict(False, None, "exited early" if end == "done" else end)
    return Verdict(False, None, "left processes running") if left else Verdict(True, None, "ok")


def _right(tests, i, out, expected):
    """Is one output right? evalplus's special oracles are for tasks whose statement leaves more than one answer."""
    oracle, atol = tests.get("oracle"), tests.get("atol") or 1e-6
    if tests["kind"] in ("assert", "unittest"):
        return out is True
    if tests["kind"] == "stdin":
        return same_text(out, expected)
    try:
        if oracle == "root":  # HumanEval/32: any zero of the polynomial, not the reference's
            return abs(sum(c * math.pow(out, k) for k, c in enumerate(tests["inputs"][i][0]))) <= atol
        if oracle == "set":
            return set(out) == set(expected)
        if oracle == "truth":  # a match object, True, or whatever is not None
            return (out is not None and out is not False) == (expected is not None and expected is not False)
        if oracle == "pyramid":  # Mbpp/581: "height" may be the pyramid's own, where the reference takes the slant's
            edge, height = tests["inputs"][i]
            if abs(out - round(edge**2 + 2 * edge * math.sqrt((edge / 2) ** 2 + height**2))) <= tests["atol"]:
                return True
        if oracle == "digits":  # Mbpp/558: digit by digit of two numbers padded to one length
            a, b = map(str, tests["inputs"][i])
            width = max(len(a), len(b))
            if out == sum(abs(int(x) - int(y)) for x, y in zip(a.zfill(width), b.zfill(width))):
                return True
    except (TypeError, ValueError, OverflowError):
        return False if oracle in ("root", "set", "truth") else same(out, expected, atol)
    if oracle == "anything" or (oracle == "zero" and out == 0):
        return True
    if tests.get("json"):  # some rows of APPS wrap the result in a list
        out, expected = json_form(out), json_form(expected)
        if isinstance(expected, list) and len(expected) == 1 and same(out, expected[0], atol):
            return True
    return same(out, expected, atol)


def same(out, expected, atol=1e-6):
    """Equal, floats within atol + 1e-7 relative (evalplus's rule), also inside lists, tuples and dicts; nan is nan."""
    for a, b in ((out, expected), (expected, out)):
        if isinstance(a, tuple) and a[:1] == ("digest",) and a != b:
            return a[1] == digest(b)
    if isinstance(expected, float) and isinstance(out, (int, float)) and not isinstance(out, bool):
        both_nan = out != out and expected != expected
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

    def close(x, y):
        try:
            return x == y or ("." in y and abs(float(x) - float(y)) <= 1e-6 * max(1.0, abs(float(y))))
        except ValueError:
            return False

    a, b = out.split(), expected.split()
    return len(a) == len(b) and all(map(close, a, b))


def judge_many(items, workers=None, progress=False):
    """[(problem, solution text)] -> [Verdict]. Texts that hold the same program or answer are judged once."""
    keys, math_jobs, code_jobs, verdicts = [], {}, {}, {}
    for problem, text in items:
        found = extract_answer(text) if problem.domain == "math" else extract_code(text, problem)
        keys.append((problem.id, problem.answer, id(problem.tests), found))
        if problem.domain == "math":
            math_jobs[keys[-1]] = (problem.answer, found)
        elif problem.tests:
            code_jobs[keys[-1]] = (problem.tests, found)
        else:
            verdicts[keys[-1]] = Verdict(False, None, "no tests")
    for key, equal in zip(math_jobs, equivalent_many(list(math_jobs.values()))):
        gold, found = math_jobs[key]
        why = "ok" if equal else "no answer" if found is None else "no gold answer" if gold is None else "wrong answer"
        verdicts[key] = Verdict(equal, found, why)
    lacking = {id(t): t for t, _ in code_jobs.values() if t["kind"] == "call" and "outputs" not in t}
    _parallel(_expected, list(lacking.values()), workers)
    done = _parallel(_judge_code, list(code_jobs.values()), workers, progress)
    verdicts.update(zip(code_jobs, (verdict for _, verdict in done)))
    return [verdicts[key] for key in keys]


def vote_keys(items):
    """[(problem, solution text)] -> for each a string that solutions with the same answer share, None if no answer.

    Math: equivalent answers of one problem share the first one's normal form. Code has no answer string to count, so
    the key is a hash of what the program does on the problem's example *inputs*: its outputs or how it fails. The
    expected outputs are never looked at. Without example inputs the key is the program itself, without its layout.
    """
    keys, answers, jobs = [None] * len(items), {}, {}
    for i, (problem, text) in enumerate(items):
        if problem.domain == "code":
            code = extract_code(text, problem)
            jobs.setdefault((problem.id, id(problem.tests), code), (problem, code, []))[2].append(i)
        elif (found := extract_answer(text)) is not None:
            answers.setdefault((problem.id, problem.question), {}).setdefault(normalise(found), []).append(i)
    pairs = [(same_problem, a, b) for same_problem in answers.values()
             for n, b in enumerate(same_problem) for a in list(same_problem)[:n]]
    equal = equivalent_many([(a, b) for _, a, b in pairs])
    first = {}
    for (same_problem, a, b), yes in zip(pairs, equal):
        if yes:  # pairs come in order, so a's own key is settled already
            first.setdefault((id(same_problem), b), first.get((id(same_problem), a), a))
    for same_problem in answers.values():
        for answer, places in same_problem.items():
            for i in places:
                keys[i] = first.get((id(same_problem), answer), answer)
    for (_, _, places), key in _parallel(_behaviour, list(jobs.values())):
        for i in places:
            keys[i] = key
    return keys


def _behaviour(job):
    problem, code, _ = job
    tests = problem.tests or {}
    inputs = tests.get("example_inputs") or examples(problem.question, tests.get("entry"))
    if not inputs:
        try:
            return digest(ast.dump(ast.parse(code)))
        except (SyntaxError, ValueError, RecursionError):
            return "does not parse"
    results, end, _ = _run_tests(tests, code, inputs)
    return digest([[s, v.split() if tests["kind"] == "stdin" else v] for s, v, _ in results] + [end])


def examples(question, entry):
    """Arguments of the calls a question shows: ">>> f(1, 2)" or "assert f(1, 2) == 3" -> [[1, 2]]."""
    found = []
    for line in re.findall(rf"(?:>>>|assert)[^\n]*?\b({re.escape(entry)}\(.*)", question) if entry else ():
        for end in [m.end() for m in re.finditer(r"\)", line)]:
            try:
                found.append([ast.literal_eval(a) for a in ast.parse(line[:end], mode="eval").body.args])
                break
            except (SyntaxError, ValueError, AttributeError):
                continue  # a longer piece of the line may parse
    return found


# ---------------------------------------------------------------------------- loaders: one row of a data set
# Each takes a row and its number. What a row lacks is a KeyError, which load() turns into "FILE:LINE: no field ...".


def _math(row, n):
    """MATH-500, AIME, GSM8K, PRM800K in the schemas of the hub and of the original releases."""
    if isinstance(row.get("question"), dict):  # openai/prm800k: {"question": {"problem", "ground_truth_answer"}, ...}
        row = {**row, **row["question"]}
    text = [row[k] for k in ("problem", "question", "Problem", "instruction") if isinstance(row.get(k), str)]
    golds = ("answer", "ground_truth_answer", "extracted_groundtruth", "Answer", "solution")
    gold = next((str(row[k]) for k in golds if row.get(k) is not None), None)
    if not text or (gold is None and "next_response" not in row and "label" not in row):
        raise KeyError("answer" if text else "problem")
    meta = {k: row[k] for k in ("solution", "subject", "level", "url", "year") if row.get(k) is not None}
    if gold and ("####" in gold or "\\boxed" in gold):
        meta["solution"], gold = re.sub(r"<<.*?>>", "", gold), extract_answer(gold)  # GSM8K's calculator marks
    if "level" in meta:
        meta["level"] = int(re.sub(r"\D", "", str(meta["level"])) or 0)  # 2 in one copy of MATH-500, "Level 2"
    if gold and re.fullmatch(r"-?\d{1,3}(,\d{3})+|0\d+", gold):
        gold = normalise(gold)  # GSM8K's "1,234", AIME's "033"
    return Problem(str(row.get("unique_id") or row.get("id") or row.get("ID") or n), text[0], "math", gold, meta=meta)


def _first_error(row, n):
    """ProcessBench: steps and the index of the first wrong one, from 0; -1 = no error."""
    meta = {"steps": list(row["steps"]), "label": int(row["label"]), "generator": row.get("generator"),
            "final_answer_correct": bool(row["final_answer_correct"])}
    return Problem(str(row["id"]), row["problem"], "math", None, meta=meta)


# evalplus's special oracles: tasks whose statement leaves the order, or the kind of truth value, open
# (https://github.com/evalplus/evalplus, eval/_special_oracle.py)
ORACLES = {
    "find_zero": "root", "are_equivalent": "anything", "sum_div": "zero", "surface_Area": "pyramid",
    "digit_distance_nums": "digits",
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
    tests = {"entry": entry, "reference": reference, "atol": row.get("atol") or 0}
    if ORACLES.get(entry) and (human == (entry == "find_zero")):
        tests["oracle"] = ORACLES[entry]
    if "base_input" in row:
        form = _shown_arguments(row.get("assertion"), entry)
        inputs = [[_typed(v, form[min(i, len(form) - 1)]) if form else v for i, v in enumerate(args)]
                  for args in [*row["base_input"], *(row["plus_input"] or [])]]
        tests.update(kind="call", inputs=inputs, example_inputs=inputs[: len(row["base_input"])][:8])
    else:
        code = row.get("test") or "\n".join([*row.get("test_imports", ()), *row["test_list"]])
        table = _table(code)
        if table:
            tests.update(kind="call", example_inputs=table["inputs"][:3], **table)
        else:
            tests.update(kind="assert", test=code, setup=prompt if human else "")
    if human and not tests["atol"] and entry == "find_zero":
        tests["atol"] = 1e-4
    meta = {"prompt": prompt, "helpers": prompt[: re.search(rf"^def {entry}\b", prompt, re.M).start()] if human else ""}
    name = str(row["task_id"])
    return Problem(name if "/" in name else f"Mbpp/{name}", prompt, "code", tests=tests, meta=meta)


def _table(code):
    """evalplus's self-contained tests hold lists `inputs`, mostly `results`, all literals: {"inputs", "outputs"}."""
    found = {}
    for node in ast.walk(ast.parse(code)):
        name = node.targets[0].id if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else None
        if name in ("inputs", "results"):
            try:
                found["inputs" if name == "inputs" else "outputs"] = ast.literal_eval(node.value)
            except ValueError:
                pass  # results that are not literals: the reference solution says
    return found if "inputs" in found else None


def _shown_arguments(assertion, entry):
    """The arguments of the first `entry(...)` call in MBPP+'s assertions; their types are what JSON has lost."""
    for node in ast.walk(ast.parse(assertion or "")):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == entry:
            try:
                return [ast.literal_eval(a) for a in node.args]
            except ValueError:
                break
    return []


def _depths(form, depth=0, found=None):
    """Container types of an example by depth: ((1, [2]),) -> [tuple, tuple, list]. Tuples win where both occur."""
    found = [] if found is None else found
    if isinstance(form, (list, tuple, set, dict)):
        found += [None] * (depth + 1 - len(found))
        found[depth] = tuple if tuple in (found[depth], type(form)) else type(form)
        for item in form.values() if isinstance(form, dict) else form:
            _depths(item, depth + 1, found)
    return found


def _typed(value, form, kinds=None, depth=0):
    """Give a JSON value the types of an example: [[1, 2], [3]] like [(0, 0)] -> [(1, 2), (3,)]; "2j" like 0 -> 2j."""
    kinds = _depths(form) if kinds is None else kinds
    if isinstance(value, str) and isinstance(form, (int, complex)) and re.fullmatch(r"[-+.\dej()]+", value):
        return complex(value)
    if isinstance(value, dict):
        return {k: _typed(v, form, kinds, depth + 1) for k, v in value.items()}
    if not isinstance(value, list):
        return value
    kind = kinds[depth] if depth < len(kinds) else kinds[-1] if len(kinds) > 1 else list
    return (kind if kind in (tuple, set) else list)(_typed(v, None, kinds, depth + 1) for v in value)


def _bigcodebench(row, n):
    tests = {"kind": "unittest", "entry": row["entry_point"], "test": row["test"], "time_limit": 20.0,
             "reference": row["complete_prompt"] + row["canonical_solution"]}
    meta = {"prompt": row["complete_prompt"], "helpers": row["code_prompt"].split(f"def {row['entry_point']}")[0],
            "instruct": row.get("instruct_prompt"), "libs": ast.literal_eval(row.get("libs") or "[]")}
    return Problem(row["task_id"], row["complete_prompt"], "code", tests=tests, meta=meta)


def _contest(row, n):
    """APPS and TACO (JSON strings inside JSON), and the derived form of CodeContests (plain objects)."""
    question = row["problem"] if "problem" in row else row["question"]
    if not isinstance(question, str):
        raise TypeError(f"the question is {question!r}")
    cases = row["tests"] if "tests" in row else json.loads(row["input_output"] or '{"inputs": [], "outputs": []}')
    solutions = row.get("solutions") or []
    solutions = json.loads(solutions) if isinstance(solutions, str) else solutions
    starter = row.get("starter_code") or ""
    tests = _io_tests(cases["inputs"], cases["outputs"], cases.get("fn_name"), question)
    tests["reference"] = solutions[0] if solutions else None
    meta = {k: row[k] for k in ("difficulty", "url", "source", "name") if row.get(k)} | {"solutions": solutions}
    name = str(row.get("problem_id", row.get("id", n)))
    return Problem(name, f"{question}\n\n{starter}".rstrip(), "code", tests=tests, meta=meta)


def _io_tests(inputs, outputs, entry, question):
    """The shared end of the contest loaders: stdin tests, or calls if a function is named."""
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs but {len(outputs)} outputs")
    tests = {"inputs": inputs, "outputs": outputs, "time_limit": 4.0 * slowness()}
    if entry:
        return {**tests, "kind": "call", "entry": entry, "example_inputs": inputs[:2], "json": True, "prelude": PRELUDE}
    inputs, outputs = (["\n".join(v) if isinstance(v, list) else v for v in side] for side in (inputs, outputs))
    asked = " ".join(question.split())
    shown = [v for v in inputs if v.strip() and " ".join(v.split()) in asked]  # only what the statement shows
    return {**tests, "kind": "stdin", "inputs": inputs, "outputs": outputs, "example_inputs": shown[:4] or inputs[:1]}


def _codecontests(row, n):
    """deepmind/code_contests. Python only: language 3 of its solutions is Python 3 (1 is Python 2)."""
    if "description" not in row:
        return _contest(row, n)
    sets = [row[k] for k in ("public_tests", "private_tests", "generated_tests") if row.get(k)]
    inputs, outputs = ([v for s in sets for v in s[side]] for side in ("input", "output"))
    tests = _io_tests(inputs, outputs, None, row["description"])
    tests["example_inputs"] = list(row["public_tests"]["input"]) or inputs[:1]
    limit = row.get("time_limit") or {}  # made for C++, so doubled
    tests["time_limit"] = max(4.0, 2 * (limit.get("seconds") or 0) + (limit.get("nanos") or 0) / 5e8) * slowness()
    solutions = [s for s, language in zip(row["solutions"]["solution"], row["solutions"]["language"]) if language == 3]
    tests["reference"] = solutions[0] if solutions else None
    return Problem(row["name"], row["description"], "code", tests=tests, meta={"solutions": solutions})


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
    tests = _io_tests(inputs, outputs, entry, "")
    tests["example_inputs"] = tests["inputs"][: len(shown)]
    meta = {"date": str(row["contest_date"]), "difficulty": row.get("difficulty"), "platform": row.get("platform")}
    question = f"{row['question_content']}\n\n{row.get('starter_code') or ''}".rstrip()
    return Problem(row["question_id"], question, "code", tests=tests, meta=meta)


def _own(row, n):
    """This project's own form: {"id", "question", "answer"} or {"id", "question", "tests": {...}}."""
    tests, answer = row.get("tests"), row.get("answer")
    if tests and tests.get("kind") not in ("call", "stdin", "assert", "unittest"):
        raise ValueError(f"tests of kind {tests.get('kind')!r}")
    answer = None if answer is None else str(answer)
    return Problem(str(row["id"]), row["question"], "code" if tests else "math", answer, tests, row.get("meta") or {})


# name -> (row function, hub id, default split, data files if the hub's own loading would need a script, which
# datasets >= 4 refuses to run)
TASKS = {
    "tiny-math": (_own, None, "test", None),
    "tiny-code": (_own, None, "test", None),
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
    "apps": (_contest, "codeparrot/apps", "train", "{split}.jsonl"),
    "taco": (_contest, "BAAI/TACO", "train", "ALL/{split}-*.parquet"),
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
    first, _, last = split.partition(":") if task == "livecodebench" and split and ":" in split else ("", "", "")
    split = default if first or last else split or default
    if data:
        rows = _file_rows(data)
    elif hub:
        rows = _hub_rows(task, hub, split, files)
    else:
        from tiny import world

        made = world.problems(task.removeprefix("tiny-"), split=split, n=100 if limit is None else limit, seed=seed)
        rows = ((f"{task}:{n}", row) for n, row in enumerate(made, 1))
    problems, seen = [], set()
    for where, row in rows:
        if limit is not None and len(problems) >= limit:
            break
        try:
            own = "id" in row and "question" in row and ("answer" in row or "tests" in row)
            problem = (_own if own else make)(row, len(problems))
            if not problem.question.strip():
                raise ValueError("empty question")
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration, SyntaxError, zlib.error,
                pickle.UnpicklingError) as e:
            what = f"no field {e}" if isinstance(e, KeyError) else str(e) or "not a row of this task"
            raise ValueError(f"{where}: {what}") from None
        if (first or last) and not first <= problem.meta["date"][:10] < (last or "9"):
            continue
        if task == "prm800k" and problem.question in seen:
            continue  # it has many rows to a problem
        seen.add(problem.question)
        problems.append(problem)
    return problems


def _file_rows(path):
    """("FILE:LINE", row) of a JSON-lines file; of a JSON array, LINE is the row's number. .gz is unpacked."""
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        whole = file.read(1) == "["
        file.seek(0)
        for n, line in enumerate([file.read()] if whole else file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                line_number = getattr(error, "lineno", 1) if whole else n
                raise ValueError(f"{path}:{line_number}: not JSON: {error}") from None
            if whole:
                yield from ((f"{path}:{i}", row) for i, row in enumerate(row, 1))
            else:
                yield f"{path}:{n}", row


def _hub_rows(task, hub, split, files):
    import datasets

    try:
        if files:
            kind = "parquet" if files.endswith("parquet") else "json"
            path = f"hf://datasets/{hub}/{files.format(split=split)}"
            rows = datasets.load_dataset(kind, data_files=path, split="train")
        else:
            rows = datasets.load_dataset(*hub.split(":"), split=split)
    except Exception as error:  # the hub client raises many kinds; each of them means that there is no data
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ConnectionError(f"cannot load {task} from the hub ({hub}, split {split}): {why}. "
                              "Pass a local copy: --data FILE (.jsonl, .json or .gz)") from None
    return ((f"{hub}:{n}", row) for n, row in enumerate(rows, 1))


# ---------------------------------------------------------------------------- command line


def reference_rate(problems, workers=None, progress=False):
    """Judge the reference solutions. -> (passed, how many there are, {failing id: why}).

    Look at this before scoring a benchmark: what its own solutions fail says something about this machine (a missing
    library, a slow disk) or about the data (problems with several right answers), not about a model.
    """
    have = [p for p in problems if (p.tests or {}).get("reference") or p.answer is not None]
    shown = [f"\\boxed{{{p.answer}}}" if p.domain == "math" else f"```\n{p.tests['reference']}\n```" for p in have]
    verdicts = judge_many(list(zip(have, shown)), workers, progress)
    return sum(v.ok for v in verdicts), len(have), {p.id: v.why for p, v in zip(have, verdicts) if not v.ok}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="tiny-math", choices=TASKS)
    parser.add_argument("--data", help="local file (.jsonl, .json, .gz) in place of the hub")
    parser.add_argument("--split", help="split on the hub; for livecodebench a window of dates FROM:TO")
    parser.add_argument("--limit", type=int, help="the first so many problems only")
    parser.add_argument("--show", type=int, default=2, help="problems to print")
    parser.add_argument("--seed", type=int, default=0, help="of the tiny world's problems")
    args = parser.parse_args(argv)
    try:
        problems = load(args.task, args.data, args.split, args.limit, args.seed)
    except (ValueError, OSError) as error:
        parser.exit(2, f"tasks.py: {error}\n")
    for p in problems[: args.show]:
        print(f"[{p.id}] {p.question.strip()}\n  -> {p.answer if p.domain == 'math' else str(p.tests)[:300]}\n")
    start = time.monotonic()
    right, total, failing = reference_rate(problems, progress=True)
    seconds = time.monotonic() - start
    print(f"{len(problems)} problems; reference solutions right: {right} of {total} in {seconds:.1f} s")
    for name, why in failing.items():
        print(f"  {name}: {why}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--zygote"]:
        zygote(sys.argv[2])
    else:
        main()
