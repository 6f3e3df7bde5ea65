"""What only a GPU can show, checked and measured in minutes; ends with one Markdown table.

    python benchmarks/gpu.py                            # all stages; recipes/gpu_check.sh is this
    python benchmarks/gpu.py --only decode speed        # some of them
    python benchmarks/gpu.py --device cpu               # the same stages in tiny sizes

Nothing is downloaded: models are random or those of tiny/. Each stage is a process with a time
limit: a crash, an exhausted memory or a hang costs its own row only. A stage prints into
OUT/STAGE.log; the last line of a failed one is in its row.
"""
import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Checks first. All but the first two are functions of gpu_stages.py.
STAGES = ["machine", "tests", "training", "searches", "cache", "decode", "speed", "memory"]
LIMITS = {"cuda": (170, 570), "cpu": (600, 1800)}  # seconds at most, of a stage and of all


def machine(device, folder):
    import transformers  # takes seconds: not at the top
    hardware = f"no GPU: a dry run in tiny sizes on {os.cpu_count()} CPUs"
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        driver = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
        hardware = (f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} ({memory:.0f} "
                    f"GB), driver {driver.splitlines()[0]}, CUDA {torch.version.cuda}")
    commit = subprocess.getoutput(f"git -C '{ROOT}' rev-parse --short HEAD 2>&- || echo unknown")
    yield (f"{hardware}; torch {torch.__version__}, transformers {transformers.__version__}, "
           f"Python {sys.version.split()[0]}, commit {commit}")


def tests(device, folder):
    """The oracle tests: cached = plain, batched = alone, resumed = uninterrupted, samples and
    losses. On the CPU, where the suite runs them anyway, three of them."""
    files = ["policy", "prm_model", "search", "train"] if device == "cuda" else ["prm_model"]
    chosen = [] if device == "cuda" else ["-k", "growing_tree or a_prefix or same_scores"]
    running = [subprocess.Popen(  # a process a file: half a minute each
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *chosen,
         f"tests/test_{name}.py"], cwd=ROOT, env={**os.environ, "PRM_TEST_DEVICE": device},
        text=True, stdout=subprocess.PIPE) for name in files]
    outputs = [process.communicate()[0].strip() for process in running]
    ends = [output.rsplit("\n", 1)[-1] for output in outputs]
    print(*outputs, sep="\n")
    summary = "; ".join(map(": ".join, zip(files, ends)))
    if any(process.returncode for process in running):
        failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", "\n".join(outputs), re.M)
        raise RuntimeError(f"{summary}: {', '.join(failures)}")
    yield f"{summary}. Models on {device}, fp32 without TF32"


# ---------------------------------------------------------------- processes and the table

def table_rows(name, device, out, limit):
    """Run a stage in a process of its own -> its rows of the table: also those before it failed."""
    command = [sys.executable, __file__, "--stage", name, "--device", device, "--out", str(out)]
    shutil.rmtree(out / name, ignore_errors=True)
    file = out / f"{name}.log"
    started = time.perf_counter()
    with open(file, "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        end = f"exit status {process.wait(limit)}"
    except subprocess.TimeoutExpired:
        end = f"stopped after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):  # also what the stage has started: they are one session
            os.killpg(process.pid, signal.SIGKILL)
    lines = file.read_text(errors="replace").strip().splitlines()
    texts = [line.removeprefix("ROW ") for line in lines if line.startswith("ROW ")]
    if process.wait() or not texts:  # killed: -9. A stage without a row has failed, too
        texts.append(f"FAILED: {end}: {lines[-1][:300] if lines else 'it printed nothing'}")
    seconds = [f"{time.perf_counter() - started:.0f}", *[""] * (len(texts) - 1)]
    return [f"| {name} | {text.replace('|', '/')} | {s} |" for text, s in zip(texts, seconds)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    a = parser.add_argument
    a("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: tiny sizes (cuda)")
    a("--out", default="runs/gpu_check", help="folder of logs and table (runs/gpu_check)")
    a("--only", nargs="+", choices=STAGES, default=STAGES, help="these stages (all)")
    a("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    out = Path(args.out).resolve()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu runs the same stages in tiny sizes")
    if args.stage:  # a process of table_rows(): print each row, marked, as soon as it is known
        from benchmarks import gpu_stages  # takes seconds to import
        stage = globals().get(args.stage) or getattr(gpu_stages, args.stage)
        (out / args.stage).mkdir(parents=True, exist_ok=True)
        for text in stage(args.device, out / args.stage) or ():
            print(f"\nROW {text}", flush=True)  # a line of its own, also after a progress bar
        return 0

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by table_rows(), which ends the stage
    out.mkdir(parents=True, exist_ok=True)
    table = ["| stage | result | seconds |", "|---|---|---|"]
    print(*table, sep="\n", flush=True)
    limit, limit_of_all = LIMITS[args.device]
    started = time.perf_counter()
    for name in (name for name in STAGES if name in args.only):
        left = max(0, limit_of_all - (time.perf_counter() - started))
        rows = table_rows(name, args.device, out, min(limit, left))
        print(*rows, sep="\n", flush=True)
        table += rows
    failed = sum("| FAILED" in row for row in table)  # its other rows stay
    table.append(f"| all | {failed} failed | {time.perf_counter() - started:.0f} |")
    print(table[-1])
    (out / "table.md").write_text("\n".join(table) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
