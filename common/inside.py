"""The program's side of the judge: all that runs inside of the sandbox before the program does.

common/sandbox.py starts a fresh interpreter for each program and sends this file's compiled text
and a request. What is not in that process cannot be found there: no expected output of a call or
stdin test enters. Answers leave on a pipe, one line each: "status seconds JSON".

Only builtin modules are imported on the way to the program: a start costs about 15 ms, and `json`
alone would add 8 ms. No part of this file may be trusted by the caller once the program has run.
"""
import os
import sys
import time
from _json import encode_basestring_ascii as quoted  # json's own; importing json costs 8 ms

LONG = 1 << 19  # characters of JSON; what is longer is compared by its digest


# ------------------------------------------------------------------ values that cross the pipe


def to_json(value, rough=False):
    """A Python value as JSON text. Lists and scalars stay; others become {"t": type, "v": ...}.

    (1, {2}) -> '{"t": "tuple", "v": [1, {"t": "set", "v": [2]}]}'. JSON instead of pickle: whoever
    unpickles what a hostile program wrote runs its code. An object of any other type becomes its
    repr: two of them can be told apart, but none can pretend to equal a plain value.
    rough: equal values have equal texts, for digests: sorted, floats to 6 digits, 2.0 as 2.
    """
    if type(value) is float and -1e15 < value < 1e15:  # first: HumanEval/130 returns millions
        if rough:
            return repr(int(value)) if value.is_integer() else f"{value:.6g}"
        return repr(value)
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return quoted(str.__str__(value))
    if isinstance(value, int):
        # HumanEval/83 returns a million digits, and decimal takes quadratic time
        return int.__repr__(value) if abs(value) < 1 << 53 else tagged("int", f'"{value:#x}"')
    if isinstance(value, float):
        if rough:
            return to_json(int(value)) if value.is_integer() else f"{value:.6g}"
        return float.__repr__(value).replace("inf", "Infinity").replace("nan", "NaN")
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [to_json(item, rough) for item in value]
        if isinstance(value, list):
            return "[" + ", ".join(items) + "]"
        if isinstance(value, tuple):
            return tagged("tuple", "[" + ", ".join(items) + "]")
        kind = "set" if isinstance(value, set) else "frozenset"
        return tagged(kind, "[" + ", ".join(sorted(items)) + "]")
    if isinstance(value, dict):
        pairs = [f"[{to_json(k, rough)}, {to_json(v, rough)}]" for k, v in value.items()]
        return tagged("dict", "[" + ", ".join(sorted(pairs) if rough else pairs) + "]")
    if isinstance(value, complex):
        return tagged("complex", to_json([value.real, value.imag], rough))
    if isinstance(value, (bytes, bytearray)):
        return tagged("bytes", f'"{value.hex()}"')
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return to_json(value.tolist(), rough)
    import re

    text = f"{type(value).__name__} {value!r}"
    return tagged("object", quoted(re.sub(r" at 0x[0-9a-f]+", "", text)[:1000]))


def tagged(kind, text):
    return f'{{"t": "{kind}", "v": {text}}}'


def digest(value):
    """A hash that equal values share. Item by item: MBPP/255 returns 128 million strings."""
    import hashlib

    kinds = (list, tuple, dict, type(value))  # a Counter is a dict
    kind = next(kind for kind in kinds if isinstance(value, kind))
    sha = hashlib.sha256(kind.__name__.encode())
    if not isinstance(value, (list, tuple)):
        value = [value]
    for start in range(0, len(value), 1000):
        texts = [to_json(item, rough=True) for item in value[start:start + 1000]]
        sha.update(",".join(texts).encode() + b",")
    return sha.hexdigest()


def short_json(value, rough=False):
    """to_json(), or the digest of what is longer than LONG."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    # a list of so many items is too long before its text is made
    if not isinstance(value, (list, tuple)) or len(value) <= LONG // 4:
        text = to_json(value, rough)
        if len(text) <= LONG:
            return text
    return tagged("digest", f'"{digest(value)}"')


def without_tuples(value):
    """As JSON writes it: the expected outputs of contests are JSON, which has no tuples."""
    return [without_tuples(v) for v in value] if isinstance(value, (list, tuple)) else value


# ------------------------------------------------------------------ one program


def main(request):
    """Set the limits, run the program, never return."""
    results, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    sys.path.remove("")  # which `python -c` puts there
    if request["folder"]:
        os.chdir(request["folder"])
    set_limits(request["limits"])

    def write(status, seconds, text="null"):
        line = f"{status} {seconds:.6f} {text}\n".encode()
        while line:
            line = line[os.write(results, line):]

    try:
        (run_script if request["kind"] == "stdin" else run_calls)(request, write)
        write("left" if request["namespaces"] and orphans() else "end", 0)
    finally:
        os._exit(0)  # a daemon thread, or an exit function, has no say


def set_limits(limits):
    """setrlimit before the first line of the program: it can lower them, and never raise them."""
    import resource

    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
        except (ValueError, OSError):  # macOS refuses some; on Linux a lower one holds already
            pass


def orphans():
    """Has the program detached processes from itself, which process 1 adopts? A pool has not."""
    for patience in (0.1, 0):
        others, detached = False, False
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) not in (1, os.getpid()):
                try:
                    with open(f"/proc/{name}/stat") as file:
                        state, parent = file.read().rpartition(")")[2].split()[:2]
                except OSError:  # it has ended meanwhile
                    continue
                others = others or state != "Z"
                detached = detached or (parent == "1" and state != "Z")
        if detached or not others:
            return detached
        time.sleep(patience)  # a process on its way out may leave another behind
    return False


def guard(request):
    """Where there is no namespace: refuse what harms the user, inside the program's own process.

    A net for accidents such as os.kill(-1, 9) and shutil.rmtree, not a wall: C code gets around it.
    """
    if request["namespaces"]:
        return
    scratch = os.path.realpath(".")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    names = "chmod chown link mkdir remove rename rmdir symlink truncate utime"
    changes = {"os." + name for name in names.split()} | {"shutil.rmtree"}
    refused = ("socket.connect", "socket.bind", "socket.sendto")
    if not request["own user"]:
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


def load(request, name):
    """Execute the program as a fresh module. -> (its names, the prelude's names)."""
    module = sys.modules[name] = type(sys)(name)
    space = module.__dict__
    # apart: the program may begin with "from __future__", and a missing function must be missing
    exec(compile(request["prelude"], "<prelude>", "exec", dont_inherit=True), space)
    lent = dict(space)
    if "random" in request["code"]:
        import random

        random.seed(0)  # every program starts from the same random state, so verdicts repeat
    exec(compile(request["code"], "<program>", "exec", dont_inherit=True), space)
    return space, lent


def run_script(request, write):
    """stdin: the program is __main__, once for each input, in a fork that knows of no other."""
    for text in request["inputs"]:
        files = []
        for name, content in (("input", text.encode("utf-8", "surrogatepass")), ("output", b"")):
            # files, not pipes: fast readers ask for their size, and the driver need not pump
            files.append(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
            os.remove(name)
            with open(files[-1], "wb", closefd=False) as file:
                file.write(content)
            os.lseek(files[-1], 0, os.SEEK_SET)
        pid = os.fork()
        if not pid:
            script(request, *files)
        _, status, usage = os.wait4(pid, 0)
        seconds, code = usage.ru_utime + usage.ru_stime, os.waitstatus_to_exitcode(status)
        with open(files[1], "rb") as file:
            file.seek(0)
            text = file.read().decode("utf-8", "replace")
        os.close(files[0])
        if code:
            full = len(text) >= request["limits"]["FSIZE"]
            reason = "output_limit" if full else f"exit_code_{code}"
            write("memory" if code == 77 else reason, seconds)
            return
        write("ok", seconds, quoted(text))
        if request["namespaces"] and orphans():
            return  # main() reports them


def script(request, stdin, stdout):
    """Inside the fork: never returns."""
    code = 1
    try:
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.closerange(3, 64)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
        sys.__stdin__, sys.__stdout__, sys.argv = sys.stdin, sys.stdout, ["main.py"]
        guard(request)
        code = 0
        load(request, "__main__")
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException as error:
        code = 77 if isinstance(error, MemoryError) else 1
    finally:
        try:
            if "threading" in sys.modules:  # threads with a bigger stack that nobody joins
                sys.modules["threading"]._shutdown()
            if "atexit" in sys.modules:  # fast writers print there
                sys.modules["atexit"]._run_exitfuncs()
            sys.stdout.flush()
        finally:
            os._exit(code & 0xFF)


def run_calls(request, write):
    """call, assert, unittest: the program is imported. A line for each list of arguments."""
    function = None
    # common/inside_tests.py, which is sent along only with tests that share the process
    tests = globals()["Tests"](request) if request["test"] else None
    guard(request)
    for args in request["inputs"]:
        start = time.process_time()
        try:
            if function is None:
                space, lent = load(request, "solution")
                function = entry_point(request["entry"], space, lent)
                if tests:
                    function = tests.runner(function, space)
                start = time.process_time()
            value = function(*args)
            seconds = time.process_time() - start
            if request["json"]:
                value = without_tuples(value)
            write("ok", seconds, short_json(value, request["rough"]))
        except BaseException as error:  # SystemExit too: a program that leaves has not answered
            name = quoted(type(error).__name__)
            write("exc", time.process_time() - start, name)
        if function is None:
            break


def entry_point(name, space, lent):
    """LeetCode's `class Solution` first. A name that the prelude gives is not the program's."""
    for holder in ("Solution", name):
        value = space.get(holder)
        if value is None or value is lent.get(holder):
            continue
        if holder != "Solution" or holder == name:
            return value
        if hasattr(value, name):
            return getattr(value(), name)
    if name:
        raise KeyError(name)
