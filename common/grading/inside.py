"""Inside of the sandbox: a spawner, and the child that it forks for each program.

sandbox.py starts `python -c THIS_FILE` behind bwrap or unshare, once for each of its
threads: to start Python in namespaces of its own costs 60 ms, to fork it costs 2. The spawner never
reads a request: it forks, and the child does. So its memory, which every child copies, holds the
standard library and this file, but no earlier program, no input and no expected output. When a
program has ended, all that it left is killed, and the spawner goes on only if its world is as it
was. Programs can neither trace the spawner (it is not dumpable) nor kill it (it is process 1).

What a child writes is the program's word: the caller trusts none of it.
"""
import atexit
import contextlib
import ctypes
import functools
import hashlib
import json
import marshal
import os
import re
import resource
import select
import signal
import sys
import threading
import time

LONG = 1 << 17  # characters of an answer; what is longer is compared by its digest
LIBC = ctypes.CDLL(None)
LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
SHARED = (".", "/dev/shm")  # the folders that a program can write to
# as a command: Python's own recursion fails in a thousand nested folders
REMOVE = ["sh", "-c", 'chmod -R u+rwx "$0"; rm -rf "$0"']


# ------------------------------------------------------------ values that cross the pipe

def encode(value):
    """A Python value -> what JSON can carry. Lists and scalars stay, others get a type's name.

    (1, {2}) -> {"t": "tuple", "v": [1, {"t": "set", "v": [2]}]}. Not pickle: whoever unpickles what
    a hostile program wrote runs its code. An object of any other type becomes its repr: two of them
    can be told apart, but none can pretend to equal a plain value.
    """
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        # HumanEval/83 returns a million digits, and decimal takes quadratic time
        return value if abs(value) < 1 << 53 else {"t": "int", "v": hex(value)}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, dict):
        return {"t": "dict", "v": [[encode(k), encode(v)] for k, v in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {"t": kind.__name__, "v": [encode(v) for v in value]}
    if isinstance(value, complex):
        return {"t": "complex", "v": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"t": "bytes", "v": value.hex()}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist())
    number = simplest(value) if type(value).__module__ in ("fractions", "decimal") else None
    if number is not None:
        return encode(number)
    text = re.sub(r" at 0x[0-9a-f]+", "", f"{type(value).__name__} {value!r}")
    return {"t": "object", "v": text[:1000]}


def simplest(value):
    """The int or float that equals a Fraction or a Decimal, as Python compares them, else None."""
    for kind in (int, float):
        with contextlib.suppress(ValueError, OverflowError):
            if value == kind(value):
                return kind(value)


def plain(code, digits=17):
    """A text that equal values share, to so many digits: 1, 1.0 and True are one key of a dict."""
    kind = type(code)
    if kind is float:
        return str(int(code)) if code.is_integer() else f"{code:.{digits}g}"
    if kind is int or kind is bool:
        return str(int(code))
    if kind is list:
        return "[" + ",".join([plain(v, digits) for v in code]) + "]"
    if kind is not dict:
        return json.dumps(code)
    items = code["v"] if isinstance(code["v"], list) else [code["v"]]
    texts = [plain(v, digits) for v in items]
    if "set" in code["t"] or code["t"] == "dict":
        texts.sort()
    return f"{code['t'].removeprefix('frozen')}({','.join(texts)})"


def answer(value):
    """The JSON text of a value; of a long one (HumanEval/130: 7 MB) a digest that equal ones share.
    """
    code = encode(value)
    text = json.dumps(code)
    # the plain text is as long for 2.0 as for 2
    if len(text) > LONG and len(normal := plain(code, digits=6)) > LONG:
        normal = hashlib.sha256(normal.encode("utf-8", "surrogatepass")).hexdigest()
        return json.dumps({"t": "digest", "v": normal})
    return text


def without_tuples(value):
    """As JSON writes it: the expected outputs of contests are JSON, which has no tuples."""
    return [without_tuples(v) for v in value] if isinstance(value, (list, tuple)) else value


# ------------------------------------------------------------ the spawner

def spawner(status, folder, mode):
    """A child for each request on stdin; after it a line [exit code, CPU s, left, again] in status.

    mode: "namespaces", "user" (programs have a user id of their own) or "guard" (neither).
    """
    os.chdir(folder)
    sys.path.remove("")  # which `python -c` puts there
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # else a program could interrupt process 1
    dumpable(False)
    names = contest_names()
    os.write(status, b"ready\n")
    world_before, again = world(), True
    requests = select.poll()
    requests.register(0, select.POLLIN)
    while again and requests.poll()[0][1] & select.POLLIN:
        pid = os.fork()
        if not pid:
            os.close(status)
            child(mode, names)
        ended = wait_for_child(pid)
        left = kill_all(pid, mode)
        if not ended:
            break
        again = world() == world_before
        os.write(status, json.dumps([*ended, left, again]).encode() + b"\n")
    if mode != "namespaces":
        os.execvp(REMOVE[0], [*REMOVE, folder])


def dumpable(yes):
    """Who is not dumpable can be neither traced nor looked into, by processes of the same user."""
    if sys.platform == "linux":
        PR_SET_DUMPABLE = 4
        LIBC.prctl(PR_SET_DUMPABLE, int(yes), 0, 0, 0)


def contest_names():
    """The names that contest graders lend to a program, as LiveCodeBench and APPS do."""
    modules = ("string re datetime collections heapq bisect copy math random statistics itertools "
               "functools operator io sys json typing").split()
    # the builtins after them: pow(a, b, mod) is not math's; and `copy` is the module
    lines = [f"from {name} import *" for name in [*modules, "builtins"]]
    lines += [f"import {name}" for name in [*modules, "sys", "time", "fractions"]]
    names = {}
    exec("\n".join(lines), names)
    return names


def world():
    """All that one program could leave behind for the next."""
    folders = [folder for folder in SHARED if os.path.isdir(folder)]
    files = [(os.stat(folder).st_mode, os.listdir(folder)) for folder in folders]
    shared = [f"/proc/sysvipc/{kind}" for kind in ("shm", "msg", "sem")]
    memory = [open(path).read() for path in shared if os.path.exists(path)]
    limits = [resource.getrlimit(number) for number in LIMITS]
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return files, memory, limits, cores, os.getpriority(os.PRIO_PROCESS, 0)


def wait_for_child(pid):
    """-> (exit code, CPU seconds), or None: the caller has gone, and nobody wants to know."""
    caller = select.poll()
    caller.register(0, 0)  # no event but that its other end is closed
    while not caller.poll(2):  # milliseconds
        ended, status, usage = os.wait4(-1, os.WNOHANG)  # orphans come to process 1
        if ended == pid:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    return None


def kill_all(pid, mode):
    """Kill and reap what a program has started. -> has it left anything running?"""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if mode == "guard":  # it could start nothing, and kill(-1) would end the user's processes
            os.killpg(pid, signal.SIGKILL)
            return False
        for pause in (0, 0.02, 0.1) if mode == "namespaces" else ():
            time.sleep(pause)  # what is on its way out may end by itself
            reap(os.WNOHANG)
            os.kill(-1, 0)  # is there anybody?
        os.kill(-1, signal.SIGKILL)
        reap(0)
        return mode == "namespaces"  # kill() does not say whether anybody else has our user id
    return False


def reap(flag):
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, flag)[0]:
            pass


# ------------------------------------------------------------ one program

def child(mode, names):
    """Read the request, set the limits, run the program, never return."""
    try:
        request = marshal.load(sys.stdin.buffer)
        names["random"].seed(0)  # verdicts repeat: fork() has given the child another state
        dumpable(True)  # else /dev/stdin cannot be opened
        os.setsid()
        results, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name, value in request["limits"].items():
            if name != "NPROC" or mode != "guard":  # there the user's other processes count, too
                with contextlib.suppress(ValueError, OSError):  # macOS refuses some
                    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
        if request["kind"] == "stdin":
            run_script(request, results, mode, names)
        else:
            run_calls(request, results, mode, names)
        if "multiprocessing" in sys.modules:
            atexit._run_exitfuncs()  # they end its pools
            if tracker := sys.modules.get("multiprocessing.resource_tracker"):
                tracker._resource_tracker._stop()  # it would end by itself, but later
        os._exit(0)  # threads have no say
    except MemoryError:
        os._exit(77)
    finally:
        os._exit(1)


def load(request, name, names):
    """Execute the program as a fresh module. -> its names."""
    space = sys.modules[name] = type(sys)(name)
    space = space.__dict__
    if request["contest"]:
        sys.setrecursionlimit(50_000)
        names.update(stdin=sys.stdin, stdout=sys.stdout, stderr=sys.stderr)
        space.update((k, v) for k, v in names.items() if not k.startswith("__"))
        if "np." in request["code"]:  # APPS lends it, where it is installed
            with contextlib.suppress(ImportError):
                space["np"] = names["np"] = __import__("numpy")
    exec(compile(request["code"], "<program>", "exec", dont_inherit=True), space)
    return space


def run_script(request, results, mode, names):
    """stdin: the program is __main__. Its answer is what it prints, and its exit code."""
    # a file, not a pipe: fast readers ask for its size
    stdin = os.open("input", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.remove("input")
    with open(stdin, "wb", closefd=False) as file:
        file.write(request["inputs"][0].encode("utf-8", "surrogatepass"))
    os.lseek(stdin, 0, os.SEEK_SET)
    os.dup2(stdin, 0)
    os.dup2(results, 1)
    os.closerange(3, 64)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.argv = sys.stdin, sys.stdout, ["main.py"]
    code = 0
    try:
        guard(mode)
        load(request, "__main__", names)
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException as error:
        code = 77 if isinstance(error, MemoryError) else 1
    threading._shutdown()  # threads with a bigger stack that nobody joins
    atexit._run_exitfuncs()  # fast writers print there
    sys.stdout.flush()
    os._exit(code & 0xFF)


def run_calls(request, results, mode, names):
    """call, assert, unittest: the program is imported.

    For each list of arguments a line "status seconds JSON", or the exception's name for the JSON.
    """
    function = None
    # referee.py stands behind this file in what the spawner is started with
    referee = Referee(request) if request["kind"] != "call" else None  # noqa: F821
    sys.modules["__main__"] = type(sys)("__main__")  # not this file, whose names a program may set
    guard(mode)
    for args in request["inputs"]:
        start = time.process_time()
        try:
            if function is None:
                space = load(request, "solution", names)
                function = entry_point(request["entry"], space, names)
                if referee:
                    function = functools.partial(referee.run, function, space)
                start = time.process_time()
            value = function(*args)
            text = answer(without_tuples(value) if request["contest"] else value)
            status, seconds = "ok", time.process_time() - start
        except BaseException as error:  # SystemExit too: a program that leaves has not answered
            status, seconds = "exc", time.process_time() - start
            text = type(error).__name__
        line = f"{status} {seconds:.6f} {text}\n".encode()
        while line:
            line = line[os.write(results, line):]
        if function is None:
            break


def entry_point(name, space, lent):
    """LeetCode's `class Solution` first. A name that the graders lend is not the program's."""
    solution, function = space.get("Solution"), space.get(name)
    if solution and hasattr(solution, name):
        return getattr(solution(), name)
    if function is None or function is lent.get(name):
        raise KeyError(name)
    return function


def guard(mode):
    """Where there is no namespace: refuse what harms the user, inside the program's own process.

    A net for accidents such as os.kill(-1, 9) and shutil.rmtree, not a wall: C code gets around it.
    """
    if mode == "namespaces":
        return
    scratch = os.path.realpath(".")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    changes = "chmod chown link mkdir remove rename rmdir symlink truncate utime".split()
    changes = {"shutil.rmtree", *("os." + name for name in changes)}
    refused = ("socket.connect", "socket.bind", "socket.sendto")
    if mode == "guard":
        refused += ("os.kill", "os.fork", "os.exec", "os.posix_spawn", "os.system", "os.spawn",
                    "subprocess.", "ctypes.dlopen")

    def hook(event, args):
        paths = args[:2] if event in changes else ()
        if event == "open" and args[2] & writing:
            paths = args[:1]
        paths = [os.path.realpath(os.fsdecode(p)) for p in paths
                 if isinstance(p, (str, bytes, os.PathLike))]
        allowed = all(p.startswith((scratch, "/dev/shm/")) or p == os.devnull for p in paths)
        if event.startswith(refused) or not allowed:
            raise PermissionError(f"{event} in a program that is judged")

    sys.addaudithook(hook)
