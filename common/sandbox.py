"""One untrusted program in a process of its own: the command before it, its limits, its end.

The prefix is chosen once, by trying: bubblewrap (`bwrap`), else `unshare` and `setpriv` of
util-linux, else none and a warning. Both give a program processes, network, IPC and files of its
own: the system's libraries and Python, read-only, and a folder in memory. No other file of the host
can be seen, and no socket. All is gone with the program, and with the caller, also after kill -9.
"""
import contextlib
import functools
import itertools
import marshal
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

MEMORY = 4 << 30  # bytes of address space per process, as evalplus
PROCESSES = 64  # processes and threads of one program
FILES = 64 << 20  # bytes of the folder in memory; one file may fill half of it
OUTPUT = 64 << 20  # bytes of all that a program answers


# ------------------------------------------------------------------ the command before it

SYSTEM = "/usr /bin /sbin /lib /lib32 /lib64 /libx32 /etc/alternatives".split()
ETC = "ld.so.cache localtime passwd group hosts nsswitch.conf mime.types".split()
ROOT = "/sys"  # unshare: a folder of every Linux that holds no Python; ours is mounted over it
DROP = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
# the interpreter is isolated as by -I, but for a fixed hash seed, which repeats the order of sets
BOOT = [sys.executable, "-s", "-c", "import marshal, sys\n"
        "codes, request = marshal.load(sys.stdin.buffer)\nnames = {'__name__': 'inside'}\n"
        "for code in codes: exec(code, names)\nnames['main'](request)"]
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
               "PYTHONHASHSEED": "0", "PYTHONINTMAXSTRDIGITS": "0",
               "PYTHONDONTWRITEBYTECODE": "1", "MPLCONFIGDIR": "/tmp", "HOME": "/tmp",
               # CPU time is what counts
               "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def python_folders():
    """What an isolated Python reads: the system's libraries, its own, its packages."""
    ask = "import sys; print('\\n'.join([sys.prefix, sys.base_prefix, *sys.path]))"
    done = subprocess.run([sys.executable, "-s", "-c", ask], capture_output=True, text=True,
                          env=ENVIRONMENT, cwd="/")
    binary = Path(os.path.realpath(sys.executable)).parent.parent
    paths = [str(binary), *filter(os.path.isdir, done.stdout.split("\n"))]
    folders = [*filter(os.path.exists, SYSTEM)]
    for path in sorted({*paths, *map(os.path.realpath, paths)} - {"/", ""}):
        if not any(Path(path).is_relative_to(folder) for folder in folders):
            folders.append(path)
    return folders


def bubblewrap():
    command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--unshare-pid",
               "--unshare-net", "--unshare-ipc", "--unshare-uts",
               "--proc", "/proc", "--dev", "/dev", "--size", str(FILES),
               "--perms", "1777", "--tmpfs", "/tmp",
               "--perms", "1777", "--tmpfs", "/dev/shm"]
    if os.getuid():
        command += ["--unshare-user", "--cap-drop", "ALL"]
    else:  # these three are for setpriv, which gives them up
        for name in ("SETUID", "SETGID", "SETPCAP"):
            command += ["--cap-add", f"CAP_{name}"]
    for path in [*python_folders(), *(f"/etc/{name}" for name in ETC)]:
        for parent in reversed(Path(path).parents):  # bwrap itself would make them for root alone
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind-try", path, path]
    return [*command, "--chdir", "/tmp"]


def unshare():
    """The same with util-linux: a shell mounts a new root in memory, and starts Python in it."""
    links = [f for f in SYSTEM if os.path.islink(f)]  # /bin -> usr/bin
    folders = [f for f in python_folders() if f not in links]
    etc = " ".join(f"/etc/{name}" for name in ETC if os.path.lexists(f"/etc/{name}"))
    # nosuid and nodev may be locked on, where a user's namespace has to repeat them
    table = [f"{f} {ROOT}{f} none rbind,ro,nosuid,nodev" for f in folders]
    table += [f"/dev/{d} {ROOT}/dev/{d} none bind" for d in ("null", "zero", "urandom", "random")]
    table += [f"proc {ROOT}/proc proc nosuid,nodev,noexec"]
    script = "\n".join([
        f"mount -n -t tmpfs -o size={FILES},mode=755,nosuid judge {ROOT} && cd {ROOT} || exit 99",
        f"mkdir -p etc proc dev .{' .'.join(folders)} && mkdir -m 1777 tmp dev/shm || exit 98",
        ": > dev/null; : > dev/zero; : > dev/urandom; : > dev/random",
        f"cp -dR {etc} etc; cp -dR /dev/fd /dev/std* dev; cp -dR {' '.join(links)} .",
        "echo '" + "\n".join(table) + "' > etc/fstab; mount -n -a -T etc/fstab || exit 97",
        f'chroot {ROOT} "$@"',
    ])
    spaces = ["--mount", "--pid", "--fork", "--kill-child", "--ipc", "--net", "--uts"]
    user = ["--user", "--map-root-user"] if os.getuid() else []
    # setpriv: unshare dies with the caller's thread, and its children with it
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *user, *spaces, "sh", "-c", script, "sh"]


class Sandbox(NamedTuple):
    prefix: list  # the command before the interpreter's
    namespaces: bool
    own_user: bool  # a user id for each program

    def command(self, uid):
        user = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if self.own_user else []
        return [*self.prefix, *([*DROP, *user] if self.prefix else []), *BOOT]


@functools.cache
def sandbox():
    """The best isolation that works here, found by trying. Warns once if it is not full."""
    root, failures = os.getuid() == 0, []
    for make in (bubblewrap, unshare, None, None):
        if make:
            place = Sandbox(make(), True, root)
        else:  # as root first with a user id of its own, which may not be able to read Python
            place = Sandbox(["setpriv", "--pdeathsig", "KILL"] * root, False, root)
            root = False
        try:
            lines, end, error = execute(place, {**REQUEST, "entry": "f", "inputs": [[]], "code":
                                                "import decimal, random\ndef f(): return 1"})
        except OSError as why:
            lines, end, error = [], "", str(why)
        if [line[2] for line in lines] == ["1"] and end == "end":
            break
        error = error.strip() or f"{end}, an old version?"
        failures.append(f"{make.__name__ if make else 'setpriv'}: {error.splitlines()[-1]}")
    else:
        raise RuntimeError("the judge cannot run Python: " + "; ".join(failures))
    if not place.namespaces:
        warnings.warn("the code judge runs without namespaces: programs see your files, and may "
                      f"not start processes. Install bubblewrap ({'; '.join(failures)[:600]})",
                      stacklevel=2)
    return place


# ------------------------------------------------------------------ one process

REQUEST = {"kind": "call", "limit": 20.0, "total": 20.0, "test": "", "prelude": "", "json": False,
           "rough": False, "token": ""}
LIVE, LOCK, USERS = set(), threading.Lock(), itertools.count(os.getpid() * 64)


@functools.cache
def compiled(name):
    return compile(Path(__file__).with_name(name).read_text(), f"<{name}>", "exec")


def execute(place, request):
    """Run a program. -> ([(status, CPU seconds, JSON text)], how it ended, stderr)."""
    uid = 30000 + next(USERS) % 30000
    folder = "/tmp" if place.namespaces else tempfile.mkdtemp(prefix="judge-")
    limits = {"CPU": math.ceil(request["total"]) + 1, "AS": MEMORY, "FSIZE": FILES // 2,
              "NOFILE": 128, "CORE": 0, "STACK": 64 << 20}
    if place.namespaces or place.own_user:  # else the user's other processes count, too
        limits["NPROC"] = PROCESSES
    request = {**request, "folder": folder, "limits": limits, "namespaces": place.namespaces,
               "own user": place.own_user}
    if not place.namespaces and place.own_user:
        with contextlib.suppress(PermissionError):  # the trial in sandbox() will fail
            os.chown(folder, uid, uid)
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(place.command(uid), stdin=subprocess.PIPE, cwd="/",
                                   stdout=subprocess.PIPE, stderr=errors, env=ENVIRONMENT,
                                   start_new_session=True, bufsize=0)
        LIVE.add(process)
        try:
            with contextlib.suppress(BrokenPipeError):  # the prefix has failed
                codes = [compiled("inside.py")]
                if request["test"]:
                    codes.append(compiled("inside_tests.py"))
                rest = memoryview(marshal.dumps((codes, request)))
                while rest:
                    rest = rest[process.stdin.write(rest):]
            process.stdin.close()
            data, end = watch(process, request)
        finally:
            left = stop(process, place, uid, folder)
            LIVE.discard(process)
        errors.seek(0)
        message = errors.read(10_000).decode("utf-8", "replace")
    lines = []
    # a line for each input and one for the end: what more there is, the program has made up
    for line in data.split(b"\n", len(request["inputs"]) + 1)[:len(request["inputs"]) + 1]:
        with contextlib.suppress(ValueError, OverflowError):  # the program may have written it
            status, seconds, text = line.split(b" ", 2)
            lines.append((status.decode(), min(float(seconds), 1e9), text.decode()))
    last = lines.pop()[0] if lines and lines[-1][0] in ("end", "left") else end
    return lines, "left" if left else last, message


def watch(process, request):
    """Read what a process writes until it ends or has to. -> (bytes, why it had to end)."""
    # CPU time is what the limits count, so that a busy machine fails nobody. The wall clock ends
    # programs that sleep: ten times the CPU seconds that may pass until the next line, or in all,
    # and longer where more processes want to run than there are cores.
    patience = 10 * max(1.0, os.getloadavg()[0] / os.cpu_count())
    pipe, poller, data = process.stdout.fileno(), select.poll(), bytearray()
    poller.register(pipe, select.POLLIN)  # select() would refuse descriptors above 1,023
    start = line_start = now = time.monotonic()
    used = line_used = looked = 0.0
    ended = False
    while True:
        if poller.poll(0 if ended else 50):
            chunk = os.read(pipe, 1 << 20)
            if not chunk:
                break
            data += chunk
            if len(data) > OUTPUT:
                return data[:OUTPUT], "output limit"
            if b"\n" in chunk and request["kind"] in ("call", "stdin"):  # one more test is through
                line_start, line_used = time.monotonic(), used
        elif ended:
            break
        now = time.monotonic()
        if now - looked < 0.05:
            continue
        ended = process.poll() is not None  # what it has left may hold the pipe open
        looked, used = now, max(used, cpu_seconds(process.pid))
        if used - line_used > request["limit"] or used > request["total"]:
            return data, "timeout"
        waited, whole = now - line_start - 2, now - start - 2
        if waited > patience * request["limit"] or whole > patience * request["total"]:
            return data, "timeout"
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.wait(1.0)
        # a shell reports a signal as 128 + its number
        killed = {-signal.SIGXCPU: "timeout", 128 + signal.SIGXCPU: "timeout"}
        return data, killed.get(code, f"exit code {code}" if code else "exited early")
    return data, "exited early"


def cpu_seconds(pid):
    """CPU time of a process and all below it: signals and timers of a program cannot hide it."""
    total, todo = 0, [pid]
    for parent in todo:
        with contextlib.suppress(OSError, ValueError):  # it has ended meanwhile; no /proc on macOS
            for thread in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{thread}/children").read_text()
                todo += map(int, children.split())
            # user, system, and both of children that were waited for
            fields = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


def stop(process, place, uid, folder):
    """Kill all that a program has started, remove its folder. -> was a daemon left outside?"""
    left = False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # with namespaces the prefix takes all with it
    process.wait()
    if place.namespaces:
        # whoever has the pipe open is still dying
        with contextlib.suppress(OSError):
            while drain_once(process.stdout.fileno()):
                pass
    else:
        if place.own_user:
            left = any(owner(pid) == uid for pid in filter(str.isdigit, os.listdir("/proc")))
            kill = ["setpriv", f"--reuid={uid}", "--clear-groups", "sh", "-c", "kill -9 -1"]
            subprocess.run(kill, capture_output=True)
        # as commands: Python's own recursion fails in a thousand nested folders
        remove = 'chmod -R u+rwx "$1"; rm -rf "$1"'
        subprocess.run(["sh", "-c", remove, "sh", folder], capture_output=True)
    process.stdout.close()
    return left


def owner(pid):
    with contextlib.suppress(OSError):  # it has ended meanwhile
        return os.stat(f"/proc/{pid}").st_uid


def drain_once(pipe):
    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    return poller.poll(2000) and os.read(pipe, 1 << 20)


def close():
    """Kill the programs that run. Nothing else stays: each program has a process of its own."""
    for process in list(LIVE):
        with contextlib.suppress(ProcessLookupError):
            process.kill()
