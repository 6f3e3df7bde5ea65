"""What only a GPU can show, checked and measured in minutes; ends with one Markdown table.

    python benchmarks/gpu.py                            # all stages; recipes/gpu_check.sh is this
    python benchmarks/gpu.py --only decode speed        # some of them
    python benchmarks/gpu.py --device cpu               # the same stages in tiny sizes

Nothing is downloaded: models are random or those of tiny/. Each stage is a process of its own
with a time limit, so that a crash, an exhausted memory or a hang costs its own row only. What a
stage prints is in OUT/STAGE.log; the last line of a failed one is in its row.
"""
import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# What runs together is not timed; what is timed runs alone. All but the first two of these stages
# are functions of gpu_stages.py, which takes seconds to import.
GROUPS = [["machine"], ["tests", "training"], ["searches"], ["cache"], ["decode"], ["speed"],
          ["memory"]]
STAGES = [name for group in GROUPS for name in group]
# seconds at most, of a stage and of all; a CPU may be shared with others
LIMITS = {"cuda": (170, 570), "cpu": (600, 1800)}


def said(*command):
    """The first line that a command prints."""
    try:
        return subprocess.check_output(command, cwd=ROOT, text=True, timeout=20).splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def machine(device, folder):
    import transformers
    found = f"no GPU: a dry run in tiny sizes on {os.cpu_count()} CPUs"
    if device == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        gpus = " + ".join(f"{n} x {name}" for name, n in Counter(names).items())
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found = f"{gpus} ({memory:.0f} GB), driver {driver}, CUDA {torch.version.cuda}"
    yield (f"{found}; torch {torch.__version__}, transformers {transformers.__version__}, "
           f"Python {sys.version.split()[0]}, commit {said('git', 'rev-parse', '--short', 'HEAD')}")


def tests(device, folder):
    """The oracle tests: cached = plain, batched = alone, resumed = uninterrupted, samples and
    losses. A process a file. On the CPU, where the suite runs them anyway, three of them."""
    files = ["policy", "prm_model", "search", "train"] if device == "cuda" else ["prm_model"]
    some = [] if device == "cuda" else ["-k", "growing_tree or a_prefix or same_scores"]
    running = [subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=3", *some,
         f"tests/test_{name}.py"], cwd=ROOT, env={**os.environ, "PRM_TEST_DEVICE": device},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for name in files]
    counts = Counter()
    failures = []
    for process in running:
        text = process.communicate()[0].strip() or "no output"
        print(text)
        last = text.splitlines()[-1]
        found = re.findall(r"(\d+) (passed|failed|skipped|error)", last)
        counts.update({word: int(n) for n, word in found})
        failures += re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
        if process.returncode and not found:
            failures.append(last)
    counted = ", ".join(f"{n} {word}" for word, n in counts.items())
    if failures or not counts["passed"]:
        raise RuntimeError(f"{counted}: {', '.join(failures)}")
    yield f"{counted}: models on {device}, fp32 without TF32"


# ---------------------------------------------------------------- processes and the table

def run_stage(name, device, out):
    """In a process of its own: each row goes to OUT/NAME.jsonl as soon as it is known."""
    stage = globals().get(name)
    if stage is None:
        from benchmarks import gpu_stages
        stage = getattr(gpu_stages, name)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    for text in stage(device, folder):
        with open(out / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(text) + "\n")


def together(names, device, out, limit):
    """Run stages at the same time -> (name, seconds, exit status) as each ends; None: too long."""
    env = dict(os.environ)
    if "training" in names:  # train.py allows TF32: its fp32 losses would be compared in 10 bits
        env["NVIDIA_TF32_OVERRIDE"] = "0"
    running = {}
    started = time.perf_counter()
    try:
        for name in names:
            with open(out / f"{name}.log", "w") as log:
                running[name] = subprocess.Popen(
                    [sys.executable, __file__, "--stage", name, "--device", device,
                     "--out", str(out)], stdout=log, stderr=log, env=env, start_new_session=True)
        while running:
            time.sleep(0.1)
            spent = time.perf_counter() - started
            for name, process in list(running.items()):
                status = process.poll()
                if status is not None or spent > limit:
                    stop(running.pop(name))
                    yield name, spent, status
    finally:
        for process in running.values():
            stop(process)


def stop(process):
    """A stage, with all that it has started: they are one session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def rows_of(name, spent, status, out):
    """A stage's rows of the table: also what it found before it failed."""
    file = out / f"{name}.jsonl"
    texts = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    log = (out / f"{name}.log").read_text(errors="replace").strip().splitlines()
    if status is None:
        texts.append(f"FAILED: stopped after {spent:.0f} s")
    elif status or not texts:
        texts.append(f"FAILED: {log[-1][:300] if log else f'exit status {status}'}")
    seconds = [f"{spent:.0f}", *[""] * (len(texts) - 1)]
    return [f"| {name} | {text.replace('|', '/')} | {s} |" for text, s in zip(texts, seconds)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: tiny sizes (cuda)")
    a("--out", default="runs/gpu_check", help="folder of logs and table (runs/gpu_check)")
    a("--only", nargs="+", choices=STAGES, default=STAGES, help="these stages (all)")
    a("--stage", choices=[*STAGES, "ranks"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    out = Path(args.out).resolve()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu runs the same stages in tiny sizes")
    if args.stage:
        return run_stage(args.stage, args.device, out)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by together(), which ends the stages
    out.mkdir(parents=True, exist_ok=True)
    for name in STAGES:
        (out / f"{name}.jsonl").unlink(missing_ok=True)
        shutil.rmtree(out / name, ignore_errors=True)
    lines = ["| stage | result | seconds |", "|---|---|---|"]
    stage_limit, limit = LIMITS[args.device]
    started = time.perf_counter()
    for group in GROUPS:
        names = [name for name in group if name in args.only]
        left = max(0, limit - (time.perf_counter() - started))
        for name, spent, status in together(names, args.device, out, min(stage_limit, left)):
            new = rows_of(name, spent, status, out)
            print(*new, sep="\n", flush=True)
            lines += new
            (out / "table.md").write_text("\n".join(lines) + "\n")
    failed = sum("| FAILED" in line for line in lines)
    lines.append(f"| all | {failed} failed | {time.perf_counter() - started:.0f} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print(f"\n{out}/table.md:\n", *lines, sep="\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
