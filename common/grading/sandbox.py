"""Untrusted programs run here: the command before the interpreter, its limits, the end.

The prefix is chosen once, by trying: bubblewrap (`bwrap`), else `unshare` and `setpriv` of
util-linux, else none and a warning. Both give a program processes, network, IPC and files of its
own: the system's libraries and Python, read-only, and a folder in memory. No other file of the host
can be seen, and no socket. Behind it waits the spawner of inside.py, one for each thread.
"""
import contextlib
import functools
import itertools
import json
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

from common.grading.inside import REMOVE

MEMORY = 4 << 30  # bytes of address space per process, as evalplus
PROCESSES = 64  # processes and threads of one program
FILES = 64 << 20  # bytes of the folder in memory; one file may fill half of it
OUTPUT = 64 << 20  # bytes of all that a program answers

ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp",
               "MPLCONFIGDIR": "/tmp", "PYTHONDONTWRITEBYTECODE": "1",
               # a fixed hash seed repeats the order of sets
               "PYTHONHASHSEED": "0", "PYTHONINTMAXSTRDIGITS": "0",
               # CPU time is what counts
               "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


# ------------------------------------------------------------ the command before it

SYSTEM = "/usr /bin /sbin /lib /lib32 /lib64 /libx32 /etc/alternatives".split()
ETC = "ld.so.cache localtime passwd group hosts nsswitch.conf mime.types".split()
ROOT = "/sys"  # unshare: a folder of every Linux that holds no Python; ours is mounted over it
USERS = itertools.count(os.getpid() * 64)


def without_rights(uid):
    """As root each spawner gets a user id of its own, too."""
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    return drop + [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] * (os.getuid() == 0)


@functools.cache
def python_folders():
    """What an isolated Python reads: the system's libraries, its own, its packages; not the
    folders that a .pth file adds."""
    paths = [sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])]
    folders = [*filter(os.path.exists, SYSTEM)]
    for path in sorted({*paths, *map(os.path.realpath, paths)} - {"/"}):
        if not any(Path(path).is_relative_to(folder) for folder in folders):
            folders.append(path)
    return folders


def bubblewrap(uid):
    command = ["bwrap", "--as-pid-1", "--unshare-pid", "--unshare-net",
               "--unshare-ipc", "--unshare-uts", "--proc", "/proc", "--dev", "/dev"]
    for folder in ("/tmp", "/dev/shm"):
        command += ["--size", str(FILES), "--perms", "1777", "--tmpfs", folder]
    if os.getuid():
        command += ["--unshare-user", "--cap-drop", "ALL"]
    else:  # these three are for setpriv, which gives them up
        for name in ("SETUID", "SETGID", "SETPCAP"):
            command += ["--cap-add", f"CAP_{name}"]
    for path in [*python_folders(), *(f"/etc/{name}" for name in ETC)]:
        for parent in reversed(Path(path).parents):  # bwrap itself would make them for root alone
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind-try", path, path]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", *without_rights(uid)]


def unshare(uid):
    """The same with util-linux: a shell mounts a new root in memory, and starts Python in it."""
    links = [f for f in SYSTEM if os.path.islink(f)]  # /bin -> usr/bin
    folders = [f for f in python_folders() if f not in links]
    etc = " ".join(f"/etc/{name}" for name in ETC if os.path.lexists(f"/etc/{name}"))
    # /tmp comes first: Python itself may stand below the host's /tmp
    table = [f"judge {ROOT}{f} tmpfs size={FILES},mode=1777,nosuid" for f in ("/tmp", "/dev/shm")]
    # nosuid and nodev may be locked on, where a user's namespace has to repeat them
    table += [f"{f} {ROOT}{f} none rbind,ro,nosuid,nodev,X-mount.mkdir" for f in folders]
    table += [f"/dev/{d} {ROOT}/dev/{d} none bind" for d in ("null", "zero", "urandom", "random")]
    table += [f"proc {ROOT}/proc proc nosuid,nodev,noexec"]
    script = "\n".join([
        f"mount -n -t tmpfs -o mode=755,nosuid judge {ROOT} && cd {ROOT} || exit 99",
        f"mkdir -p etc proc tmp dev/shm .{' .'.join(folders)} || exit 98",
        ": > dev/null; : > dev/zero; : > dev/urandom; : > dev/random",
        f"cp -dR {etc} etc; cp -dR /dev/fd /dev/std* dev; cp -dR {' '.join(links)} .",
        "echo '" + "\n".join(table) + "' > etc/fstab; mount -n -a -T etc/fstab || exit 97",
        "ip link set lo up 2>/dev/null",  # bwrap does so, too: programs may talk to themselves
        f'mount -n -o remount,bind,ro,nosuid {ROOT}; exec chroot {ROOT} "$@"',
    ])
    spaces = ["--mount", "--pid", "--fork", "--ipc", "--net", "--uts"]
    user = ["--user", "--map-root-user"] if os.getuid() else []
    return ["unshare", *user, *spaces, "sh", "-c", script, "sh", *without_rights(uid)]


def nothing(uid):
    return []


@functools.cache
def sandbox():
    """The best isolation that works here, found by trying. -> (function of the prefix, mode)"""
    failures = []
    modes = {bubblewrap: "namespaces", unshare: "namespaces"}
    if os.getuid() == 0:
        modes[without_rights] = "user"  # which may not be able to read Python
    modes[nothing] = "guard"
    for prefix, mode in modes.items():
        try:
            IDLE.append(Spawner(prefix, mode))
            break
        except OSError as error:
            failures.append(f"{prefix.__name__}: {error}")
    else:
        raise RuntimeError("the judge cannot run Python: " + "; ".join(failures))
    if mode != "namespaces":
        more = " and may not start processes" if mode == "guard" else ""
        warnings.warn(f"the code judge runs without namespaces: programs see your files{more}. "
                      f"Install bubblewrap ({'; '.join(failures)[:600]})", stacklevel=2)
    return prefix, mode


# ------------------------------------------------------------ spawners

IDLE, LIVE, LOCK = [], set(), threading.Lock()  # they live on between calls
os.register_at_fork(after_in_child=lambda: (IDLE.clear(), LIVE.clear()))  # they are the parent's


class Spawner:
    """A process of inside.py behind the prefix. OSError if it does not start."""

    def __init__(self, prefix, mode):
        self.mode, self.folder = mode, "/tmp"
        # in mode "user" a kill(-1) meets all of one user id: ranks of a machine share none
        users = 30000 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        uid = 30000 + int(os.environ.get("LOCAL_RANK", 0)) * users + next(USERS) % users
        command = [*prefix(uid), sys.executable]
        if not shutil.which(command[0]):
            raise OSError(f"no {command[0]}")
        command[0] = shutil.which(command[0])  # its PATH is not ours
        if mode != "namespaces":
            self.folder = tempfile.mkdtemp(prefix="judge-")
        if mode == "user":
            with contextlib.suppress(PermissionError):  # then the trial will fail
                os.chown(self.folder, uid, uid)
        files = [Path(__file__).with_name(name) for name in ("inside.py", "referee.py")]
        source = "\n".join(file.read_text() for file in files)
        source += "\nspawner(int(sys.argv[1]), *sys.argv[2:])"
        status, write = os.pipe()
        with tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                [*command, "-s", "-c", source, str(write), self.folder, mode], cwd="/",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=ENVIRONMENT,
                start_new_session=True, bufsize=0, pass_fds=[write])
            os.close(write)
            self.status = os.fdopen(status, "rb", buffering=0)
            with contextlib.suppress(PermissionError):  # else /dev/stdout cannot be opened
                os.fchown(self.process.stdout.fileno(), uid, uid)
            LIVE.add(self)
            if self.status.readline() != b"ready\n":
                self.stop()
                errors.seek(0)
                lines = errors.read(10_000).decode("utf-8", "replace").splitlines()
                raise OSError(lines[-1] if lines else "it does not start")

    def run(self, request):
        """Run a program. -> (bytes that it wrote, what ended it, CPU seconds)"""
        cpu = math.ceil(request["total"]) + 1
        limits = {"CPU": cpu, "AS": MEMORY, "FSIZE": FILES // 2, "NOFILE": 128, "CORE": 0,
                  "STACK": 64 << 20, "NPROC": PROCESSES, "MSGQUEUE": 0}
        again = False
        try:
            rest = memoryview(marshal.dumps({**request, "limits": limits}))
            with contextlib.suppress(BrokenPipeError, ValueError):  # close() has closed it
                while rest:
                    rest = rest[self.process.stdin.write(rest):]
            data, why = self.watch(request)
            if why:
                return data, why, 0.0
            line = os.read(self.status.fileno(), 1000)
            if not line:
                return data, "killed the judge", 0.0
            code, seconds, left, again = json.loads(line)
            ends = {0: "", 77: "memory", -signal.SIGXCPU: "timeout"}
            why = "left processes running" if left else ends.get(code, f"exit code {code}")
            return data, why, seconds
        finally:
            if again:
                IDLE.append(self)
            else:
                self.stop()

    def watch(self, request):
        """Read what a program writes until it ends, or has to. -> (bytes, why it had to)"""
        # CPU time is what the limits count, so that a busy machine fails nobody. The wall clock
        # ends programs that sleep: after ten times as many seconds, or more where more processes
        # want to run than there are cores.
        patience = 10 * max(1.0, os.getloadavg()[0] / os.cpu_count())

        def deadline(seconds):
            return used + seconds, time.monotonic() + patience * seconds + 2

        used, looked = cpu_seconds(self.process.pid), time.monotonic()
        deadlines = {"line": deadline(request["limit"]), "all": deadline(request["total"])}
        output, status, data = self.process.stdout.fileno(), self.status.fileno(), bytearray()
        poller = select.poll()  # select() would refuse descriptors above 1,023
        poller.register(output, select.POLLIN)
        poller.register(status, select.POLLIN)
        while True:
            ready = dict(poller.poll(50))
            if output in ready:
                chunk = os.read(output, 1 << 20)
                data += chunk
                if len(data) > OUTPUT:
                    return data[:OUTPUT], "output limit"
                if not chunk:
                    poller.unregister(output)
                if b"\n" in chunk and request["kind"] == "call":  # one more test is through
                    deadlines["line"] = deadline(request["limit"])
            elif status in ready:  # all that could write has ended
                return data, None
            if time.monotonic() - looked > 0.05:
                used, looked = max(used, cpu_seconds(self.process.pid)), time.monotonic()
                if any(used > cpu or looked > wall for cpu, wall in deadlines.values()):
                    return data, "timeout"

    def stop(self):
        """The spawner kills its program and removes its folder when stdin is closed."""
        LIVE.discard(self)
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()
        self.status.close()
        if self.mode != "namespaces":
            subprocess.run([*REMOVE, self.folder], capture_output=True)


def cpu_seconds(pid):
    """CPU time of a process and all below it: signals and timers of a program cannot hide it."""
    total, todo = 0, [pid]
    for parent in todo:
        with contextlib.suppress(OSError, ValueError):  # it has ended meanwhile; no /proc on macOS
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children") as children:
                    todo += map(int, children.read().split())
            with open(f"/proc/{parent}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
            # user, system, and both of children that were waited for
            total += sum(map(int, fields[11:15]))
    return total / os.sysconf("SC_CLK_TCK")


def execute(request):
    """Run a program. -> (bytes that it wrote, what ended it: "" itself, CPU seconds)"""
    with LOCK:  # one trial, one warning
        prefix, mode = sandbox()
    try:
        spawner = IDLE.pop()
    except IndexError:
        spawner = Spawner(prefix, mode)
    return spawner.run(request)


def close():
    """Stop the spawners, and what they run; the next use starts new ones."""
    while IDLE:
        IDLE.pop().stop()
    for spawner in list(LIVE):  # the threads that wait for these do the rest
        spawner.process.stdin.close()
