"""Problems and their judges, for math and for code (§3.1 of the paper: tasks and data).

    python tasks.py --task tiny-code --limit 20
    python tasks.py --task humaneval+ --data HumanEvalPlus.jsonl.gz     # the reference solutions must pass, or are named

    problems = load("math500", limit=10)
    verdicts = judge_many([(p, "... so the answer is \\\\boxed{7}.") for p in problems])

A judge says whether a *whole solution text* is right. Math: the final answer is taken out of the text and compared with
the gold one. Code: the program is taken out and run against the tests, in another process.

How untrusted code is run. A worker ("zygote") is a small clean Python process without torch. For each program it forks
a child, which drops its rights, sets its limits, runs the program and writes what came out, as JSON, into a pipe. Where
Linux allows it, the worker is process 1 of its own PID namespace, so that killing "everybody" after each program leaves
nothing behind, and lives in its own network (no route anywhere), IPC and mount namespaces (all is read-only but a small
scratch folder in memory). As root the program gets a user id of its own. Expected outputs never enter the child: they
are compared in the caller. Tests that come as `assert` code run in a second child, which holds a stub that sends the
arguments over a pipe; a program cannot reach the process that judges it.

What this does NOT protect from:
- reading: the program sees every file that its user id may read, data files with expected outputs among them;
- `unittest` tests (BigCodeBench) share their process with the program: they must, since they patch its modules. Changed
  builtins or assert methods are noticed, a program that looks for the success token in memory is not;
- kernel bugs, side channels, and using up to `MEMORY` in each of up to `PROCESSES` processes at once (no cgroup);
- where namespaces are refused (most containers, macOS) a warning names what is missing: files that the user may write
  can be written, the network is open, and on macOS a process that left its group survives.
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
LONG = 1 << 17  # characters; a longer value is compared by its digest: HumanEval/15 returns 6.9 MB for one input
OUTPUT = 16 << 20  # bytes a program may print or return
SECONDS = 2.0  # CPU seconds per test when nothing better is known; multiplied by `slowness()`
TOTAL = 20.0  # CPU seconds for all tests of one program beyond what the reference solution needs


@dataclass
class Problem:
    """One task. `tests` (code) has a "kind", and optionally "atol", "time_limit" (CPU s per test), "reference" (code):

    call      entry, inputs [[arg, ...], ...], outputs [...] (or absent: the reference is run), example_inputs
    stdin     inputs [str], outputs [str], example_inputs
    assert    entry, test: code that defines check(candidate), or plain asserts on the entry's name
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
        line = text.rsplit("####", 1)[1].strip().split("\n")[0].strip()
        return line or None
    said = re.split(r"(?i)\banswer\s*(?:is\b\s*:?|:)", text)
    if len(said) > 1:
        line = said[-1].strip(" \t\n*").split("\n")[0]
        line = re.split(r"\.(?:\s|$)", line)[0]  # a sentence ends at a full stop, 3.14 does not
        return line.strip(" \t*$.,;") or None
    return None


@functools.lru_cache(100_000)
def normalise(answer):
    """An answer as written -> a form in which the commonest equal spellings are equal strings.

    "$1{,}234$" -> "1234"; "033" -> "33"; "\\dfrac12" -> "\\frac{1}{2}"; "\\left( 3, 4 \\right)" -> "(3,4)"
    Only rewrites that cannot make unequal answers equal belong here; math-verify judges the rest.
    """
    s = answer.strip().rstrip(".").replace("{,}", ",")
    s = re.sub(r"\\(?:left|right|displaystyle|,|!|;|:| |quad)(?![a-zA-Z])", "", s)
    s = re.sub(r"\\[dt]frac", r"\\frac", s).replace("\\$", "").replace("$", "").replace("\\%", "%")
    s = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*{([^{}]*)}", r"\1", s)
    s = re.sub(r"\^\s*(?:\\circ|{\s*\\circ\s*})", "°", s)
    s = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", s)
    s = re.sub(r"\s+", "", s)
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", s):
        s = s.replace(",", "")
    if re.fullmatch(r"[-+]?\d+(\.\d*)?", s):
        value = Fraction(s.rstrip("."))
        s = str(value.numerator) if value.denominator == 1 else s.lstrip("+")
    return s


def equivalent_many(pairs):
    """Is each prediction equal to its gold answer? pairs [(gold, pred)] -> [bool]. None is never equal to anything.

    String equality first, two integers are decided at once, and only the rest goes to math-verify, which needs
    milliseconds a pair and can hang on odd input: it runs in the sandbox of the code judge, under its time limit
    (its own guard is SIGALRM, which fails in threads, and is switched off).
    """
    verdicts, open_pairs = [None] * len(pairs), {}
    for i, (gold, pred) in enumerate(pairs):
        if gold is None or pred is None:
            verdicts[i] = False
            continue
        a, b = normalise(gold), normalise(pred)
        if a == b or len(b) > 1000:  # nobody's answer is that long, and its parse would take the whole limit
            verdicts[i] = a == b
        elif re.fullmatch(r"-?\d+", a) and re.fullmatch(r"-?\d+", b):
            verdicts[i] = False
        else:
            open_pairs.setdefault((gold, pred), []).append(i)
    todo = list(open_pairs)
    size = max(1, min(64, math.ceil(len(todo) / _workers())))  # chunks: a fork costs a few pairs' worth of time
    for chunk, found in _parallel(_math_chunk, [todo[i:i + size] for i in range(0, len(todo), size)]):
        for pair, equal in zip(chunk, found):
            for i in open_pairs[pair]:
                verdicts[i] = equal
    return verdicts


def _math_chunk(pairs):
    """One request to the sandbox; a pair that hangs or kills the child counts as unequal, the rest goes on after it."""
    done = []
    while len(done) < len(pairs):
        reply = _ask({"kind": "math", "inputs": encode(pairs[len(done):]), "limit": 5.0 * slowness(), "total": 300.0,
                      "preload": ["math_verify"]})
        if reply["end"].startswith("cannot"):
            raise RuntimeError(f"math answers need math-verify: pip install 'math-verify[antlr4_13_2]' ({reply['end']})")
        lines = [json.loads(line) for line in reply["lines"]]
        done += [status == "ok" and value is True for status, value, _ in lines]
        if len(done) < len(pairs) and reply["end"] != "done":
            done.append(False)
    return done


def _math_equal(gold, pred):
    """Runs in the sandbox. math-verify wants the gold answer first: the comparison is not symmetric."""
    import math_verify
    parsed = [math_verify.parse(f"\\boxed{{{s}}}", parsing_timeout=None) for s in (gold, pred)]
    return bool(math_verify.verify(*parsed, timeout_seconds=None))


def equivalent(gold, pred):
    return equivalent_many([(gold, pred)])[0]


# ---------------------------------------------------------------------------- code: the program in the text

def extract_code(text, problem):
    """The program in a solution text: the last fenced block, else the text as a completion of the prompt.

    A block or text that lacks the entry point is put behind the prompt, which holds its signature and imports.
    """
    blocks = re.findall(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", text, re.S)
    code = blocks[-1] if blocks else text
    prompt, entry = problem.meta.get("prompt") or problem.meta.get("starter"), (problem.tests or {}).get("entry")
    if prompt and entry and not re.search(rf"^\s*(?:async\s+)?(?:def|class)\s+{re.escape(entry)}\b|^{re.escape(entry)}\s*=",
                                          code, re.M):
        return prompt + code
    if prompt and entry and problem.meta.get("helpers"):  # HumanEval/38: the prompt defines what the body may call
        return problem.meta["helpers"] + "\n" + code
    return code


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
    if isinstance(value, tuple):
        return {"t": "tuple", "v": [encode(v) for v in value]}
    if isinstance(value, (set, frozenset)):
        return {"t": type(value).__name__ if type(value) in (set, frozenset) else "set", "v": [encode(v) for v in value]}
    if isinstance(value, dict):
        return {"t": "dict", "v": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, complex):
        return {"t": "complex", "v": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"t": "bytes", "v": bytes(value).hex()}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist())
    return {"t": "object", "v": re.sub(r" at 0x[0-9a-f]+", "", f"{type(value).__name__} {value!r}")[:1000]}


def _order(value):
    """A value's form in which equal values have equal reprs: sets and dicts sorted, floats to 6 digits, 2.0 as 2."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(_order, value)]
    if isinstance(value, (set, frozenset)):
        return ["set", sorted(map(repr, map(_order, value)))]
    if isinstance(value, dict):
        return ["dict", sorted((repr(_order(k)), repr(_order(v))) for k, v in value.items())]
    return value


def decode(value):
    """The inverse of `encode`; an object comes back as ("object", text). Raises ValueError on anything malformed."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    kind, v = value["t"], value["v"]
    if kind == "dict":
        return {decode(k): decode(x) for k, x in v}
    if kind in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](
            frozenset(d) if isinstance(d, set) and kind != "tuple" else d for d in map(decode, v))
    if kind == "int":
        return int(v, 16)
    if kind == "complex":
        return complex(*v)
    if kind == "bytes":
        return bytes.fromhex(v)
    if kind in ("object", "digest"):
        return (kind, v)
    raise ValueError(f"unknown type {kind!r}")


# ---------------------------------------------------------------------------- the worker: python tasks.py --zygote

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE = {"mount": 0x20000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000, "net": 0x40000000}


def zygote(scratch):
    """A worker's whole life: isolate, say hello, then one JSON request a line in, one JSON reply a line out."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    sys.path.pop(0)  # the folder of this file: a program has no business importing it
    isolation = _isolate(scratch)
    os.environ.clear()
    os.chdir(scratch)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    random.seed(0)  # every program starts from the same random state, so verdicts repeat
    import bisect, collections, copy, datetime, decimal, heapq, itertools, operator, statistics, string, typing  # noqa
    replies.write(json.dumps(isolation).encode() + b"\n")
    replies.flush()
    for line in requests:
        replies.write(json.dumps(_serve(json.loads(line), scratch, isolation)).encode() + b"\n")
        replies.flush()


def _isolate(scratch):
    """Enter the namespaces that the kernel grants; returns {"pid": bool, "net":, "mount":, "uid":, "reaper":}."""
    got = dict.fromkeys(("pid", "net", "mount", "uid", "reaper"), False)
    uid, gid = os.getuid(), os.getgid()
    wanted = CLONE["pid"] | CLONE["net"] | CLONE["mount"] | CLONE["ipc"]
    if hasattr(LIBC, "unshare") and not LIBC.unshare(wanted if uid == 0 else wanted | CLONE["user"]):
        if uid:
            for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as f:
                    f.write(line)
        pid = os.fork()
        if pid:  # the launcher only waits; closing its pipes or killing it ends the worker
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
        got.update(pid=True, net=True, mount=_mounts(scratch))
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: dies with its parent
        LIBC.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE 0: a child of the same user id cannot trace it
        got["reaper"] = not LIBC.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to us
    if uid == 0:
        got["uid"] = 30000 + os.getpid() % 30000 if not got["pid"] else 30000 + int(time.time() * 1000) % 30000
        os.chown(scratch, got["uid"], got["uid"])
    # the kernel counts processes per user id (and user namespace): a user's own others must not use up the allowance
    got["processes"] = PROCESSES
    if not got["pid"] and uid and os.path.isdir("/proc/self"):
        got["processes"] += sum(len(os.listdir(f"/proc/{p}/task")) for p in os.listdir("/proc")
                                if p.isdigit() and os.stat(f"/proc/{p}").st_uid == uid)
    return got


def _mounts(scratch):
    """Everything read-only, a small memory disk on the scratch folder. True if it worked."""
    def mount(source, target, kind, flags, options=""):
        if LIBC.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()):
            raise OSError(ctypes.get_errno(), f"mount {target}")

    try:
        mount("none", "/", "", 0x44000)  # MS_REC | MS_PRIVATE: nothing we do here shows outside
        mount("tmpfs", scratch, "tmpfs", 6, f"size={FILES},nr_inodes=4096,mode=700")  # MS_NOSUID | MS_NODEV
        if os.getuid() == 0:  # root's Python may lie under a folder that only root can enter: hide all but Python there
            for prefix in {sys.base_prefix, sys.prefix}:
                parents = [os.path.join("/", *prefix.split("/")[1:n]) for n in range(2, prefix.count("/") + 1)]
                closed = next((p for p in parents if not os.stat(p).st_mode & 1), None)
                if closed:
                    stage = os.path.join(scratch, "python")
                    os.mkdir(stage)
                    mount(prefix, stage, "", 0x5000)  # MS_BIND | MS_REC
                    mount("tmpfs", closed, "tmpfs", 6, "mode=755")
                    os.makedirs(prefix)
                    mount(stage, prefix, "", 0x2000)  # MS_MOVE
                    os.rmdir(stage)
        readonly = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # struct mount_attr: set MOUNT_ATTR_RDONLY
        if LIBC.syscall(442, -100, b"/", 0x8000, readonly, 32):  # mount_setattr(AT_FDCWD, "/", AT_RECURSIVE), Linux 5.12
            raise OSError(ctypes.get_errno(), "mount_setattr")
        readonly[0], readonly[1] = 0, 1
        return not LIBC.syscall(442, -100, scratch.encode(), 0, readonly, 32)
    except OSError:
        return False  # reported to the caller in the worker's first line


def _serve(request, scratch, isolation):
    """Run one program. Returns {"lines": [str], "end": "done" | why it ended, "left": left processes behind}."""
    for name in request.get("preload", ()):
        try:
            __import__(name)  # once per worker: later forks have it already
        except ImportError as error:
            if request["kind"] == "math":
                return {"lines": [], "end": f"cannot import: {error}", "left": False}
    kind, lines, end, left = request["kind"], [], "done", False
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
        if kind == "assert":
            a, b = os.pipe(), os.pipe()  # arguments to the program, results from it
            tasks = [(_child_tester, [a[1], b[0]]), (_child_program, [a[0], b[1]])]
        else:
            a, b, tasks = (), (), [(_child_unittest if kind == "unittest" else _child_call, [])]
        out, end, left = _run(tasks, request, isolation, a + b)
        lines = out.decode("utf-8", "replace").splitlines()
    for name in os.listdir(scratch):
        path = os.path.join(scratch, name)
        shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
    return {"lines": lines, "end": end, "left": left}


def _run(tasks, request, isolation, pipes=()):
    """Fork the tasks, read what the first of them writes, kill what is left. -> (bytes, end, left something running)."""
    read, write = os.pipe()
    pids = [_fork(f, fds, None if n else write, request, isolation) for n, (f, fds) in enumerate(tasks)]
    for fd in (write, *pipes):
        os.close(fd)
    data, end, codes, closed = bytearray(), None, {}, False
    # CPU time is what the limits count; the wall clock only ends programs that sleep, so it is generous
    patience, final = 6 * request["limit"] + 2, time.monotonic() + 6 * request["total"] + 5
    silent, nap = time.monotonic() + patience, 1e-4
    while end is None and len(codes) < len(pids):
        if not closed and select.select([read], [], [], 0.02)[0]:
            chunk = os.read(read, 1 << 20)
            data += chunk
            closed = not chunk
            if b"\n" in chunk and request["kind"] != "stdin":  # one more test is through
                silent = time.monotonic() + patience
            end = "output limit" if len(data) > OUTPUT else end
            if chunk:
                continue
        for pid in [p for p in pids if p not in codes]:  # a child may close its pipe and live, or leave it to a daemon
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(code)
        if closed and len(codes) < len(pids):
            time.sleep(nap)
            nap = min(2 * nap, 0.02)
        if time.monotonic() > min(silent, final):
            end = "timeout"
    while not closed and end is None and select.select([read], [], [], 0)[0]:  # what was written just before the end
        chunk = os.read(read, 1 << 20)
        data += chunk
        closed = not chunk or len(data) > OUTPUT
    os.close(read)
    left = _alive()
    _kill_all(isolation, pids)
    if end is None:
        worst = min(codes.values())  # a signal is negative
        end = ("timeout" if worst in (-signal.SIGPROF, -signal.SIGXCPU) else f"crash: signal {-worst}" if worst < 0 else
               "memory" if 77 in codes.values() else f"exit code {max(codes.values())}" if any(codes.values()) else "done")
    return bytes(data), end, left


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
            helper = os.fork()
            if not helper:
                os.setuid(isolation["uid"])
                os.kill(-1, signal.SIGKILL)
                os._exit(0)
        else:
            targets = pids
            if isolation["reaper"]:  # orphans become our children, so round after round all of them
                with open(f"/proc/self/task/{os.getpid()}/children") as f:
                    targets = {*pids, *map(int, f.read().split())}
            for pid in targets:
                for kill in (os.killpg, os.kill):
                    try:
                        kill(pid, signal.SIGKILL)
                    except (ProcessLookupError, PermissionError):
                        pass  # gone already
        time.sleep(1e-4)


def _fork(function, fds, out, request, isolation):
    """Fork a child with lowered rights that runs function(request, out, *fds) and never returns. -> its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        low = 3
        for fd in sorted([*fds] + [out] * (out is not None)):  # the worker's own pipes are not for the program
            os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, 256)
        os.setsid()
        _lower(request, isolation)
        code = function(request, out, *fds) or 0
    except MemoryError:
        code = 77
    finally:
        os._exit(code)


def _lower(request, isolation):
    if isolation["uid"]:
        os.setgroups([])
        os.setgid(isolation["uid"])
        os.setuid(isolation["uid"])
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG, which a change of user id clears
        LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: set-user-id programs give nothing
        LIBC.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # none, in a user namespace too
    seconds = math.ceil(request["total"])
    for name, value in (("CPU", seconds), ("AS", MEMORY), ("FSIZE", FILES), ("NOFILE", 128), ("CORE", 0),
                        ("STACK", 64 << 20), ("NPROC", isolation["processes"])):
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value + (name == "CPU")))  # soft: SIGXCPU
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise  # macOS refuses some, which the docstring says; elsewhere a missing limit is an error


# ---------------------------------------------------------------------------- in the child: the program runs

def _emit(fd, *line):
    data = json.dumps(line).encode() + b"\n"
    while data:
        data = data[os.write(fd, data):]


def _load(request):
    """Execute the program as a fresh __main__; returns its namespace."""
    signal.setitimer(signal.ITIMER_PROF, request["limit"])  # CPU time, so a busy machine does not fail a program
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(request["code"], "<program>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _entry(namespace, name):
    if name in namespace:
        return namespace[name]
    return getattr(namespace["Solution"](), name)  # LeetCode's form


def _timed(function, args, kwargs, limit, digest=False):
    """Call it under its time limit. -> ("ok", encoded value, CPU s) or ("exc", type's name, CPU s)."""
    signal.setitimer(signal.ITIMER_PROF, limit)  # its signal kills, so there is nothing to catch
    start = time.process_time()
    try:
        value = function(*args, **kwargs)
        coded = encode(value)
        if digest and len(json.dumps(coded)) > LONG:
            coded = {"t": "digest", "v": hashlib.sha256(repr(_order(value)).encode()).hexdigest()}
        return "ok", coded, time.process_time() - start
    except BaseException as error:  # SystemExit too: a program that leaves has not answered
        return "exc", type(error).__name__, time.process_time() - start


def _child_call(request, out):
    try:
        if request["kind"] == "math":
            function = _math_equal
        else:
            function = _entry(_load(request), request["entry"])
    except BaseException as error:
        return _emit(out, "exc", type(error).__name__, 0)
    for args in request["inputs"]:
        _emit(out, *_timed(function, decode(args), {}, request["limit"], digest=True))


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
    error = None
    try:
        namespace = _load(request)
    except BaseException as problem:
        error = "exc", type(problem).__name__, 0
    for line in os.fdopen(calls):
        name, args, kwargs = json.loads(line)
        _emit(results, *(error or _timed(lambda *a, **k: _entry(namespace, name)(*a, **k), decode(args),
                                         {k: decode(v) for k, v in kwargs.items()}, request["limit"])))


def _child_tester(request, out, calls, results):
    """The tests' side: the program's functions are stubs, what they return is plain data."""
    results = os.fdopen(results)
    if hasattr(LIBC, "prctl"):
        LIBC.prctl(4, 0, 0, 0, 0)  # the program has the same user id: it must not trace this process

    def stub(name):
        def call(*args, **kwargs):
            _emit(calls, name, encode(args), {k: encode(v) for k, v in kwargs.items()})
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
    exec(compile(request.get("setup") or "", "<setup>", "exec"), space)
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
    import unittest
    import unittest.mock

    def state():
        return [{k: id(v) for k, v in vars(x).items()} for x in (builtins, unittest, unittest.TestCase, unittest.TestResult,
                                                                 unittest.TestSuite, unittest.TestLoader, json, os)]
    before = state()
    try:
        space = _load(request)
        if state() != before:
            return _emit(out, "exc", "Tampering", 0)
        exec(compile(request["test"], "<tests>", "exec", dont_inherit=True), space)
        signal.setitimer(signal.ITIMER_PROF, request["total"])
        suite = unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"])
        result = suite.run(unittest.TestResult())
        failed = result.errors + result.failures
        if state() != before:
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
    """Start a zygote. Called under the lock. Warns once if this kernel does not isolate fully."""
    if _pool["owner"] != os.getpid():  # first use, or we are a fork of a process that has workers
        _pool.update(owner=os.getpid(), idle=queue.LifoQueue(), all=[], scratch=tempfile.mkdtemp(prefix="judge-"))
        os.chmod(_pool["scratch"], 0o711)
        atexit.register(close)
    scratch = tempfile.mkdtemp(dir=_pool["scratch"])
    # a fixed hash seed repeats the order of sets; no other environment, no user site, and fd 2 is for our own faults
    worker = subprocess.Popen([sys.executable, "-s", os.path.abspath(__file__), "--zygote", scratch], cwd=scratch,
                              env={"PYTHONHASHSEED": "0"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    _pool["all"].append(worker)
    hello = worker.stdout.readline()
    if not hello:
        raise RuntimeError("the judge's worker process did not start; its error is above")
    isolation = json.loads(hello)
    if _pool["isolation"] is None:
        _pool["isolation"] = isolation
        missing = [what for name, what in (("pid", "PID namespace"), ("net", "network namespace"), ("mount", "read-only file "
                   "system"), ("reaper", "child subreaper")) if not isolation[name]]
        if missing:
            warnings.warn(f"the code judge runs without: {', '.join(missing)} (refused by this system); see the docstring of "
                          "tasks.py for what that leaves open", stacklevel=2)
    return worker


def _ask(request):
    """Send a request to an idle worker, start one if there is none. -> its reply; a dead worker is replaced later."""
    with _pool_lock:
        try:
            worker = _pool["idle"].get_nowait() if _pool["owner"] == os.getpid() else _start_worker()
        except queue.Empty:
            worker = _start_worker()
    longest = (6 * request["total"] + 30) * (len(request["inputs"]) if request["kind"] == "stdin" else 1)
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
            worker.kill()
            worker.wait()
            worker.stdin.close()
            worker.stdout.close()
        shutil.rmtree(_pool["scratch"], ignore_errors=True)
        _pool["owner"] = None


def _parallel(function, jobs, workers=None, progress=False):
    """[(job, function(job))] in order, in as many threads as there are workers: they only wait for processes."""
    from tqdm import tqdm
    with ThreadPoolExecutor(min(workers or _workers(), len(jobs)) or 1) as threads:
        return list(zip(jobs, tqdm(threads.map(function, jobs), total=len(jobs), disable=not progress, desc="judge")))


# ---------------------------------------------------------------------------- verdicts

PRELUDE = "from typing import *\nfrom collections import *\nfrom itertools import *\nfrom functools import *\nfrom math " \
          "import *\nimport bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys\n"


def _run_tests(job, longer=1):
    """(problem, code, inputs or None for the tests' own) -> (results [(status, value, s)], end, left)."""
    problem, code, inputs = job
    tests = problem.tests
    limit = tests.get("time_limit") or SECONDS * slowness()
    seconds = tests.get("seconds") or []  # the reference solution's own, test by test
    limit = max(limit, 4 * max(seconds, default=0)) * longer
    kind = tests["kind"] if inputs is None or tests["kind"] == "stdin" else "call"
    inputs = tests.get("inputs", []) if inputs is None else inputs
    token = os.urandom(16).hex()
    text = code + tests.get("test", "")
    reply = _ask({"kind": kind, "code": tests.get("prelude", "") + code, "entry": tests.get("entry"), "limit": limit,
                  "inputs": inputs if kind == "stdin" else [encode(args) for args in inputs], "token": token,
                  "total": max(limit, TOTAL * slowness() * longer + 4 * sum(seconds)), "test": tests.get("test"),
                  "setup": tests.get("setup"), "preload": [m for m in ("numpy", "pandas", "matplotlib") if m in text]})
    results = []
    for line in reply["lines"]:
        try:
            status, value, spent = json.loads(line)
            if kind == "stdin":  # there the status is how the process ended, and the value what it printed
                status = "ok" if status == "done" else status
            elif kind in ("assert", "unittest"):
                value = value == token if status == "ok" else value
            elif status == "ok":
                value = decode(value)
            results.append((status, value, spent))
        except (ValueError, TypeError, KeyError, RecursionError):
            results.append(("exc", "malformed output", 0.0))
    return results, reply["end"], reply["left"]


def _expected(problem):
    """Run the reference solution: fills in tests["seconds"], its times, and where they lack (evalplus) "outputs"."""
    tests = problem.tests
    if "seconds" in tests or not tests.get("reference"):
        return
    start = time.monotonic()
    results, end, _ = _run_tests((problem, tests["reference"], None), longer=10)
    fine = end == "done" and all(status == "ok" for status, _, _ in results)
    if tests["kind"] in ("assert", "unittest"):
        tests["seconds"] = [time.monotonic() - start] * fine  # all its tests are one
    else:
        tests["seconds"] = [t for _, _, t in results] * fine
    if "outputs" not in tests and tests["kind"] == "call":
        tests["outputs"] = [v for _, v, _ in results]
        if not fine:
            tests["broken"] = "the reference solution fails: " + next((v for s, v, _ in results if s != "ok"), end)


def _judge_code(job):
    """(problem, code) -> Verdict. After a timeout the reference is timed too, and a slow one stretches the limits."""
    problem, code = job
    tests = problem.tests
    verdict = _verdict(tests, *_run_tests((problem, code, None)))
    if verdict.why == "timeout" and "seconds" not in tests:
        _expected(problem)
        if 4 * max(tests.get("seconds", ()), default=0) > (tests.get("time_limit") or SECONDS * slowness()):
            verdict = _verdict(tests, *_run_tests((problem, code, None)))
    return verdict


def _verdict(tests, results, end, left):
    if "broken" in tests:
        return Verdict(False, None, tests["broken"])
    wanted = tests.get("outputs", [True])
    for i, (status, value, _) in enumerate(results[:len(wanted)]):
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
    kind, oracle = tests["kind"], tests.get("oracle")
    if kind in ("assert", "unittest"):
        return out is True
    if kind == "stdin":
        return same_text(out, expected)
    try:
        if oracle == "root":  # HumanEval/32: any zero of the polynomial, not the reference's
            return abs(sum(c * math.pow(out, k) for k, c in enumerate(tests["inputs"][i][0]))) <= tests["atol"]
        if oracle == "set":
            return set(out) == set(expected)
        if oracle == "not none":
            return (out is True or out not in (None, False)) == (expected is True or expected not in (None, False))
        if oracle == "anything" or (oracle == "zero" and out == 0):
            return True
    except (TypeError, ValueError, OverflowError):
        return False
    if tests.get("json"):  # APPS: JSON has no tuples, and some rows wrap the result in a list
        out, expected = json_form(out), json_form(expected)
        if isinstance(expected, list) and len(expected) == 1 and same(out, expected[0], 1e-6):
            return True
    return same(out, expected, tests.get("atol") or 1e-6)


def json_form(value):
    return [json_form(v) for v in value] if isinstance(value, (list, tuple)) else value


def same(out, expected, atol=1e-6):
    """Equal, floats within atol + 1e-7 relative (evalplus's rule), also inside lists, tuples and dicts; nan is nan."""
    if isinstance(expected, float) and isinstance(out, (int, float)) and not isinstance(out, bool):
        return out == expected or abs(out - expected) <= atol + 1e-7 * abs(expected) or (out != out and expected != expected)
    if isinstance(expected, complex) and isinstance(out, complex):
        return same(out.real, expected.real, atol) and same(out.imag, expected.imag, atol)
    if isinstance(expected, (list, tuple)) and type(out) is type(expected):
        return len(out) == len(expected) and all(same(a, b, atol) for a, b in zip(out, expected))
    if isinstance(expected, dict) and isinstance(out, dict):
        return out.keys() == expected.keys() and all(same(out[k], v, atol) for k, v in expected.items())
    return out == expected


def same_text(out, expected):
    """stdin programs: equal line by line up to white space; numbers written with a point may differ by 1e-6.

    Problems that accept several answers have checkers that the data sets do not ship: such answers are judged wrong.
    """
    a, b = ([line.split() for line in text.strip().splitlines()] for text in (out, expected))
    if a == b:
        return True
    a, b = ([word for line in lines for word in line] for lines in (a, b))

    def close(x, y):
        try:
            return x == y or ("." in y and abs(float(x) - float(y)) <= 1e-6 * max(1.0, abs(float(y))))
        except ValueError:
            return False
    return len(a) == len(b) and all(map(close, a, b))


def judge_many(items, workers=None, progress=False):
    """[(problem, solution text)] -> [Verdict]. Texts that hold the same program or answer are judged once."""
    jobs, keys = {}, []
    for problem, text in items:
        found = extract_answer(text) if problem.domain == "math" else extract_code(text, problem)
        keys.append((problem.domain, problem.id, problem.answer, id(problem.tests), found))
        jobs[keys[-1]] = (problem, found)
    verdicts = {}
    maths = [(key, p, found) for key, (p, found) in jobs.items() if p.domain == "math"]
    for (key, p, found), equal in zip(maths, equivalent_many([(p.answer, found) for _, p, found in maths])):
        verdicts[key] = Verdict(equal, found, "ok" if equal else "no answer" if found is None else "wrong answer")
    codes = {key: job for key, job in jobs.items() if job[0].domain == "code"}
    lacking = {id(p.tests): p for p, _ in codes.values() if p.tests["kind"] == "call" and "outputs" not in p.tests}
    _parallel(_expected, list(lacking.values()), workers)
    verdicts.update(zip(codes, (v for _, v in _parallel(_judge_code, list(codes.values()), workers, progress))))
    return [verdicts[key] for key in keys]


def vote_keys(items):
    """[(problem, solution text)] -> for each a string that solutions with the same answer share, None if no answer.

    Math: equivalent answers of one problem share the first one's normal form. Code has no answer string to count, so the
    key is a hash of what the program does on the problem's example *inputs*: its outputs or the kind of its failure.
    The expected outputs are never looked at. Without example inputs the key is the program itself, without its layout.
    """
    keys, answers, jobs = [None] * len(items), {}, {}
    for i, (problem, text) in enumerate(items):
        if problem.domain == "math":
            found = extract_answer(text)
            if found is not None:
                keys[i] = normalise(found)
                answers.setdefault((problem.id, problem.answer), {})[keys[i]] = found
        else:
            jobs.setdefault((problem.id, id(problem.tests), extract_code(text, problem)), (problem, []))[1].append(i)
    pairs = [(group, a, b) for group, found in answers.items() for n, b in enumerate(found) for a in list(found)[:n]]
    equal = equivalent_many([(answers[g][a], answers[g][b]) for g, a, b in pairs])
    first = {}
    for (group, a, b), yes in zip(pairs, equal):
        if yes:  # pairs come in order, so a's own key is settled already
            first.setdefault((group, b), first.get((group, a), a))
    for i, (problem, _) in enumerate(items):
        if problem.domain == "math" and keys[i] is not None:
            keys[i] = first.get(((problem.id, problem.answer), keys[i]), keys[i])

    def behaviour(job):
        (_, _, code), (problem, _) = job
        inputs = problem.tests.get("example_inputs") or examples(problem)
        if not inputs:
            try:
                return hashlib.sha1(ast.dump(ast.parse(code)).encode()).hexdigest()
            except (SyntaxError, ValueError, RecursionError):
                return "does not parse"
        results, end, _ = _run_tests((problem, code, inputs))
        shown = [(s, v.split() if isinstance(v, str) and problem.tests["kind"] == "stdin" else _order(v)) for s, v, _ in results]
        return hashlib.sha1(repr((shown, end)).encode()).hexdigest()
    for (_, (_, places)), key in _parallel(behaviour, list(jobs.items())):
        for i in places:
            keys[i] = key
    return keys


def examples(problem):
    """Arguments of the calls shown in the question: ">>> f(1, 2)" or "assert f(1, 2) == 3" -> [[1, 2]]."""
    entry, found = problem.tests.get("entry"), []
    for line in re.findall(rf"(?:>>>|assert)\s*.*?({re.escape(entry)}\(.*)", problem.question) if entry else ():
        for end in [m.end() for m in re.finditer(r"\)", line)]:
            try:
                call = ast.parse(line[:end], mode="eval").body
                found.append([ast.literal_eval(a) for a in call.args])
                break
            except (SyntaxError, ValueError):
                continue  # a longer piece of the line may parse
    return found


# ---------------------------------------------------------------------------- loaders: one row of a data set -> Problem
# A row function takes the row and its number and returns a Problem, or None to skip it (not a Python problem, ...).

def _math(row, n):
    """MATH-500, AIME, GSM8K, PRM800K in the schemas of the hub and of the original releases."""
    label = row.get("label")
    if isinstance(row.get("question"), dict):  # openai/prm800k: {"question": {"problem", "ground_truth_answer"}, ...}
        row = {**row, **row["question"]}
    question = next(row[k] for k in ("problem", "question", "Problem", "instruction") if isinstance(row.get(k), str))
    answer = next((row[k] for k in ("answer", "ground_truth_answer", "extracted_groundtruth", "Answer") if row.get(k) is not None),
                  row.get("solution"))
    answer = None if answer is None else str(answer)
    meta = {k: row[k] for k in ("solution", "subject", "level", "url", "year") if row.get(k) is not None}
    if answer is not None and ("####" in answer or "\\boxed" in answer):
        meta["solution"], answer = re.sub(r"<<.*?>>", "", answer), extract_answer(answer)
    if "level" in meta:
        meta["level"] = int(re.sub(r"\D", "", str(meta["level"])) or 0)  # 2 in one copy of MATH-500, "Level 2" in another
    if answer and re.fullmatch(r"\d{1,3}(,\d{3})+|0\d+", answer):
        answer = answer.replace(",", "").lstrip("0") or "0"  # "1,234" and AIME's "033"
    if answer is None and label is None and "next_response" not in row:
        raise KeyError("answer")
    return Problem(str(row.get("unique_id") or row.get("id") or row.get("ID") or n), question, "math", answer, meta=meta)


def _first_error(row, n):
    """ProcessBench: steps and the index of the first wrong one, from 0; -1 = no error."""
    return Problem(str(row["id"]), row["problem"], "math", None, meta={
        "steps": list(row["steps"]), "label": int(row["label"]), "final_answer_correct": bool(row["final_answer_correct"]),
        "generator": row.get("generator")})


SET_ORACLE = ["similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum", "intersection_array", "find_dissimilar", "Diff"]
NOT_NONE_ORACLE = ["check_str", "text_match_three", "text_starta_endb"]


def _evalplus(row, n):
    """HumanEval(+) and MBPP(+): evalplus's release files (inputs without outputs), the hub's and the originals (asserts).

    The special oracles are evalplus's (https://github.com/evalplus/evalplus, evalplus/eval): tasks whose statement
    leaves the order, or the truthy value, open.
    """
    entry, prompt = row.get("entry_point"), row["prompt"]
    mbpp = "canonical_solution" not in row or str(row["task_id"]).startswith("Mbpp")
    reference = row["code"] if "code" in row else row["canonical_solution"] if mbpp else prompt + row["canonical_solution"]
    if entry is None:  # MBPP names no entry point: it is the function that the first test calls
        names = {f.name for f in ast.parse(reference).body if isinstance(f, (ast.FunctionDef, ast.ClassDef))}
        calls = ast.walk(ast.parse("\n".join(row["test_list"])))
        entry = next(c.func.id for c in calls if isinstance(c, ast.Call) and isinstance(c.func, ast.Name) and c.func.id in names)
        prompt = f'"""\n{prompt}\n{row["test_list"][0]}\n"""\n'
    tests = {"entry": entry, "reference": reference, "atol": row.get("atol") or 0}
    if "base_input" in row:
        form = _assertion_args(row.get("assertion"), entry)
        inputs = [[_typed(v, form[min(i, len(form) - 1)] if form else v) for i, v in enumerate(args)]
                  for args in [*row["base_input"], *(row["plus_input"] or [])]]
        tests.update(kind="call", inputs=inputs, example_inputs=inputs[:len(row["base_input"])][:8])
    else:
        code = row.get("test") or "\n".join([*row.get("test_imports", ()), *row["test_list"]])
        found = _table(code)
        if found:
            tests.update(kind="call", example_inputs=found["inputs"][:3], **found)
        else:
            tests.update(kind="assert", test=code, setup="" if mbpp else prompt)
    tests["oracle"] = ({"find_zero": "root"} if not mbpp else {**dict.fromkeys(SET_ORACLE, "set"), **dict.fromkeys(
        NOT_NONE_ORACLE, "not none"), "are_equivalent": "anything", "sum_div": "zero"}).get(entry)
    meta = {"prompt": prompt, "source": "mbpp" if mbpp else "humaneval"}
    if not mbpp:
        meta["helpers"] = prompt[:re.search(rf"^def {entry}\b", prompt, re.M).start()]
    name = str(row["task_id"])
    return Problem(name if "/" in name else f"Mbpp/{name}", prompt, "code", tests=tests, meta=meta)


def _table(code):
    """evalplus's self-contained tests hold literal lists `inputs`, mostly `results`: {"inputs", "outputs"}, or None."""
    found = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in ("inputs", "results"):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue  # then the reference solution says
    names = {"inputs": "inputs", "results": "outputs"}
    return {names[k]: v for k, v in found.items()} if "inputs" in found else None


def _assertion_args(assertion, entry):
    """The arguments of the first `entry(...)` call in MBPP+'s assertions; their types are what JSON has lost."""
    for node in ast.walk(ast.parse(assertion or "")):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == entry:
            try:
                return [ast.literal_eval(a) for a in node.args]
            except ValueError:
                return []
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
    """Give a JSON value the types of an example: _typed([[1, 2], [3]], [(0, 0)]) -> [(1, 2), (3,)]; "2j" for 0 -> 2j."""
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
    reference = row["complete_prompt"] + row["canonical_solution"]
    return Problem(row["task_id"], row["complete_prompt"], "code", meta={
        "prompt": row["complete_prompt"], "helpers": row["code_prompt"].split("def task_func")[0],
        "instruct": row.get("instruct_prompt"), "libs": ast.literal_eval(row["libs"]) if row.get("libs") else []},
        tests={"kind": "unittest", "entry": row["entry_point"], "test": row["test"], "reference": reference, "time_limit": 20.0})


def _contest(row, n):
    """APPS and TACO (JSON strings), the derived form of CodeContests (dicts)."""
    question = row.get("question", row.get("problem"))
    if not isinstance(question, str):
        raise TypeError(f"the question is {question!r}")
    cases = row.get("input_output", row.get("tests"))
    cases = json.loads(cases) if isinstance(cases, str) and cases else cases or {}
    solutions = row.get("solutions") or []
    solutions = json.loads(solutions) if isinstance(solutions, str) else solutions
    starter = row.get("starter_code") or ""
    tests = _io_tests(cases["inputs"], cases["outputs"], cases.get("fn_name"), question)
    tests["reference"] = solutions[0] if solutions else None
    meta = {k: row[k] for k in ("difficulty", "url", "source", "name") if row.get(k)}
    return Problem(str(row.get("problem_id", row.get("id", n))), question + (f"\n\n{starter}" if starter.strip() else ""), "code",
                   tests=tests, meta={**meta, "starter_code": starter, "solutions": solutions})


def _io_tests(inputs, outputs, entry, question):
    """The shared end of the contest loaders: stdin tests, or calls if a function is named."""
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs but {len(outputs)} outputs")
    if entry:
        return {"kind": "call", "entry": entry, "inputs": inputs, "outputs": outputs, "example_inputs": inputs[:2],
                "json": True, "prelude": PRELUDE, "time_limit": 4.0 * slowness()}
    inputs, outputs = (["\n".join(v) if isinstance(v, list) else v for v in side] for side in (inputs, outputs))
    asked = " ".join(question.split())
    shown = [v for v in inputs if v.strip() and " ".join(v.split()) in asked]  # only what the statement shows
    return {"kind": "stdin", "inputs": inputs, "outputs": outputs, "example_inputs": shown[:4] or inputs[:1],
            "time_limit": 4.0 * slowness()}


def _codecontests(row, n):
    """deepmind/code_contests. Languages: 1 is Python 2, 3 is Python 3; problems are kept, only solutions are filtered."""
    if "description" not in row:
        return _contest(row, n)
    sets = [row[k] for k in ("public_tests", "private_tests", "generated_tests") if row.get(k)]
    inputs, outputs = ([v for s in sets for v in s[side]] for side in ("input", "output"))
    tests = _io_tests(inputs, outputs, None, row["description"])
    tests["example_inputs"] = list(row["public_tests"]["input"]) or inputs[:1]
    limit = row.get("time_limit") or {}
    seconds = limit.get("seconds", 0) + limit.get("nanos", 0) / 1e9 if isinstance(limit, dict) else 0
    tests["time_limit"] = max(4.0, 2 * seconds) * slowness()  # the statement's limit is meant for C++
    solutions = [s for s, lang in zip(row["solutions"]["solution"], row["solutions"]["language"]) if lang == 3]
    tests["reference"] = solutions[0] if solutions else None
    return Problem(row["name"], row["description"], "code", tests=tests, meta={"solutions": solutions})


class _PlainUnpickler(pickle.Unpickler):
    """LiveCodeBench pickles a JSON string. Unpickling can call anything that find_class finds, so it finds nothing."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"{module}.{name} in the private tests")


def _livecodebench(row, n):
    private = row["private_test_cases"]
    if not private.lstrip().startswith("["):
        private = _PlainUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(private)))).load()
    public, private = json.loads(row["public_test_cases"]), json.loads(private)
    meta = row.get("metadata") or {}
    entry = (json.loads(meta) if isinstance(meta, str) else meta).get("func_name")
    cases = public + private
    if cases[0]["testtype"] == "functional":
        inputs = [[json.loads(line) for line in c["input"].strip().split("\n")] for c in cases]
        tests = _io_tests(inputs, [json.loads(c["output"]) for c in cases], entry, "")
    else:
        tests = _io_tests([c["input"] for c in cases], [c["output"] for c in cases], None, "")
    tests["example_inputs"] = tests["inputs"][:len(public)]
    starter = row.get("starter_code") or ""
    return Problem(row["question_id"], row["question_content"] + (f"\n\n{starter}" if starter else ""), "code", tests=tests, meta={
        "date": str(row["contest_date"]), "difficulty": row.get("difficulty"), "platform": row.get("platform"),
        "starter_code": starter})


def _own(row, n):
    """This project's own form: {"id", "question", "answer"} or {"id", "question", "tests": {...}}."""
    domain = "code" if row.get("tests") else "math"
    if domain == "code" and row["tests"].get("kind") not in ("call", "stdin", "assert", "unittest"):
        raise ValueError(f"tests of kind {row['tests'].get('kind')!r}")
    answer = None if row.get("answer") is None else str(row["answer"])
    return Problem(str(row["id"]), row["question"], domain, answer, row.get("tests"), row.get("meta") or {})


# name -> (row function, hub id, default split, data files for the plain json/parquet reader or None). datasets >= 4 runs
# no loading scripts, so sets that still have one are read by their files.
TASKS = {
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
    "tiny-math": (None, None, "test", None),
    "tiny-code": (None, None, "test", None),
}


def load(task, data=None, split=None, limit=None, seed=0):
    """A task's problems, in file order. data: a local .json, .jsonl or .gz file in place of the hub.

    split: the hub's split; for livecodebench a window of contest dates "2024-08-01:2025-02-01" (end excluded).
    seed: only for the tiny world, which makes its problems. Raises ValueError "FILE:LINE: what is wrong".
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    make, hub, default, files = TASKS[task]
    window = split.split(":") if task == "livecodebench" and split and ":" in split else None
    if make is None and data is None:
        from tiny import world
        rows = world.problems(task.removeprefix("tiny-"), split=split or default, n=100 if limit is None else limit, seed=seed)
        return [Problem(r["id"], r["question"], r["domain"], r.get("answer"), r.get("tests"), r.get("meta") or {}) for r in rows]
    rows = _file_rows(data) if data else _hub_rows(task, hub, default if window else split or default, files)
    problems, seen = [], set()
    for where, row in rows:
        if limit is not None and len(problems) >= limit:
            break
        try:
            if not isinstance(row, dict):
                raise TypeError(f"a row is an object, this is {type(row).__name__}")
            own = "id" in row and "question" in row and ("tests" in row or "answer" in row) and "input_output" not in row
            problem = (_own if own or make is None else make)(row, len(problems))
            if not problem.question.strip():
                raise ValueError("empty question")
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration, SyntaxError, pickle.UnpicklingError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error) or f"not a row of {task}"
            raise ValueError(f"{where}: {what}") from None
        if window and not window[0] <= problem.meta["date"][:10] < (window[1] or "9"):
            continue
        if task == "prm800k":  # many rows to a problem
            if problem.question in seen:
                continue
            seen.add(problem.question)
        problems.append(problem)
    return problems


def _file_rows(path):
    """("FILE:LINE", row) of a JSON-lines file; of a JSON array, LINE is the row's number. .gz is unpacked."""
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        head = file.read(1)
        file.seek(0)
        if head == "[":
            try:
                rows = json.load(file)
            except ValueError as error:
                raise ValueError(f"{path}:{getattr(error, 'lineno', 1)}: not JSON: {error}") from None
            yield from ((f"{path}:{n}", row) for n, row in enumerate(rows, 1))
            return
        for n, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{n}: not JSON: {error}") from None
                yield f"{path}:{n}", row


def _hub_rows(task, hub, split, files):
    import datasets
    try:
        if files:
            path = f"hf://datasets/{hub}/{files.format(split=split)}"
            rows = datasets.load_dataset(files.rsplit(".", 1)[1].replace("jsonl", "json"), data_files=path, split="train")
        else:
            rows = datasets.load_dataset(*hub.split(":"), split=split)
    except Exception as error:  # the hub client raises many kinds; each of them means that there is no data
        raise ConnectionError(f"cannot load {task} from the hub ({hub}, split {split}): {str(error).splitlines()[0][:200]}. "
                              f"Pass a local copy: --data FILE (.jsonl, .json or .gz)") from None
    return ((f"{hub}:{n}", row) for n, row in enumerate(rows, 1))


# ---------------------------------------------------------------------------- command line

def reference_rate(problems, workers=None):
    """Judge the reference solutions. -> (how many pass, how many there are, {failing id: why}). A benchmark whose own
    solutions fail here measures this machine (a missing library, a slow disk), so look at this first."""
    have = [(p, p.tests["reference"]) for p in problems if p.domain == "code" and p.tests.get("reference")]
    _parallel(_expected, [p for p, _ in have if "outputs" not in p.tests], workers)
    verdicts = [v for _, v in _parallel(_judge_code, have, workers, progress=True)]
    have += [(p, None) for p in problems if p.domain == "math" and p.answer is not None]
    verdicts += judge_many([(p, f"\\boxed{{{p.answer}}}") for p, code in have if code is None])
    return sum(v.ok for v in verdicts), len(have), {p.id: v.why for (p, _), v in zip(have, verdicts) if not v.ok}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="tiny-math", choices=TASKS)
    parser.add_argument("--data", help="local file (.jsonl, .json, .gz) in place of the hub")
    parser.add_argument("--split", help="split on the hub; for livecodebench a window of dates FROM:TO")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--show", type=int, default=2, help="problems to print")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        problems = load(args.task, args.data, args.split, args.limit, args.seed)
    except (ValueError, OSError) as error:
        parser.exit(2, f"tasks.py: {error}\n")
    for p in problems[:args.show]:
        print(f"[{p.id}] {p.question.strip()}\n  -> {p.answer if p.domain == 'math' else str(p.tests)[:300]}\n")
    start = time.monotonic()
    right, total, failing = reference_rate(problems)
    print(f"{len(problems)} problems; reference solutions right: {right} of {total} in {time.monotonic() - start:.1f} s")
    for name, why in failing.items():
        print(f"  {name}: {why}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--zygote"]:
        zygote(sys.argv[2])
    else:
        main()
