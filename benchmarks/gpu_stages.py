"""The stages of gpu.py that need the project: each is stage(device, folder) and yields rows of the
table; an exception is a failed row. folder is the stage's own to write in."""
import gc
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from unittest import mock

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import search
import similarity
import train
from benchmarks import search_cache, similarity_cost
from common import tasks
from common.checkpoint import read_log
from common.data import read_rows
from common.metrics import peak_memory
from common.models import load_pretrained  # noqa: E402
from common.policy import Policy
from common.run import TINY, write_rows

ROOT = TINY.parent
SIZES = {  # on cuda, on cpu
    # layers, width, heads, key-value heads, MLP's width: those of Qwen2.5
    "shapes": ({"0.5B": (24, 896, 14, 2, 4864), "1.5B": (28, 1536, 12, 2, 8960)},
               {"0.5B": (2, 64, 4, 2, 128), "1.5B": (3, 64, 4, 2, 128)}),
    "vocabulary": (151936, 512), "problems": (50, 1),  # of searches()
    "cached": (10, 1), "depth": (10, 2),  # problems of cache(), and steps of the random model
    "rows": ((64, 256), (4, 16)), "n": (16, 2),  # of decode(): solutions at once, n a prompt
    "prompt": (100, 20), "new": (128, 16),  # tokens of decode()'s prompts and solutions
    "step": (16384, 1024), "length": (500, 100),  # tokens of a step of speed(), and of a row
    "response": (1024, 64)}  # tokens of memory()'s response


def size_of(device):
    return SimpleNamespace(**{name: pair[device == "cpu"] for name, pair in SIZES.items()})


def launch(stage, device, folder, world):
    """Start a function of this file under torchrun: all ranks in one process group."""
    command = (f"-m torch.distributed.run --standalone --nproc_per_node={world} "
               f"benchmarks/gpu.py --stage {stage} --device {device} --out").split()
    return subprocess.Popen([sys.executable, *command, str(folder.parent)], cwd=ROOT)


def searches(device, folder):
    """Beam search as in the README: in fp32 with its numbers but for roundings, in bf16 near."""
    problems = size_of(device).problems
    printed = re.findall(r"beam search 4x4 +(\d\.\d+)", (ROOT / "README.md").read_text())
    for dtype in ("float32", "bfloat16"):
        flags = f"--strategy beam --device {device} --dtype {dtype} --limit".split()
        for limit in sorted({1, problems}):  # the first call of each kernel loads it
            file = folder / f"{dtype}-{limit}.jsonl"
            search.main([*flags, str(limit), "--out", str(file)])
        texts = []
        for domain, want in zip(("math", "code"), map(float, printed)):
            rows = [row for _, row in read_rows(file) if row["domain"] == domain]
            accuracy = statistics.fmean(row["samples"][row["picked"]]["correct"] for row in rows)
            seconds = statistics.fmean(row["cost"]["seconds"] for row in rows)
            texts.append(f"{domain} {accuracy:.3f} (README {want:.3f}), {seconds:.3f} s a problem")
            # three standard errors and one problem, since they are few
            margin = 3 * (want * (1 - want) / problems) ** 0.5 + 1 / problems
            assert abs(accuracy - want) <= margin, f"{dtype}: {texts[-1]}"
        yield f"beam search, {dtype}, {problems} problems: {'; '.join(texts)}"


# ---------------------------------------------------------------- train.py: resumed, DDP, FSDP

def train_flags(device, out, dtype, accumulate, *more):
    flags = ("--samples 200 --val-fraction 0.1 --epochs 9 --batch-size 4 --max-steps 20 "
             f"--eval-every 10 --device {device} --dtype {dtype} --accumulate {accumulate}")
    return ["--model", str(TINY / "xs"), "--out", str(out), *flags.split(), *more]


# name: flags, plain run, tolerance. FSDP's bf16 rounds norms and residuals, autocast's does not.
RANKED = {"DDP": (("bfloat16", 2), "plain", 0.01),
          "FSDP": (("bfloat16", 2, "--fsdp"), "plain", 0.1),
          "FSDP in fp32": (("float32", 2, "--fsdp"), "fp32", 1e-3)}


def training_ranks(device, folder):
    for name, (flags, _, _) in RANKED.items():
        train.main(train_flags(device, folder.parent / "training" / name, *flags))


def apart(one, two):
    """The largest difference between training or validation losses of two runs."""
    one, two = ([row["loss"] for row in read_log(out) if "loss" in row] for out in (one, two))
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


def sigterm_at(step, log):
    """A real SIGTERM to this process, once the log has that step."""
    while not (log.exists() and f'"train", "step": {step},' in log.read_text()):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


def training(device, folder):
    """Losses of runs that should be the same: uninterrupted or resumed, on one GPU or on all."""
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # fp32 losses would be compared in TF32's 10 bits
    world = torch.cuda.device_count() if device == "cuda" else 1
    launched = launch("training_ranks", device, folder, world)  # meanwhile, on the same GPU
    for name, dtype in (("plain", "bfloat16"), ("again", "bfloat16"), ("fp32", "float32")):
        train.main(train_flags(device, folder / name, dtype, 2 * world))
    cut = folder / "cut"
    flags = train_flags(device, cut, "bfloat16", 2 * world)
    threading.Thread(target=sigterm_at, args=(5, cut / "log.jsonl"), daemon=True).start()
    assert train.main(flags) is None and list(cut.glob("checkpoint-*")), "SIGTERM: no checkpoint"
    train.main([*flags, "--resume"])
    # two uninterrupted runs differ where kernels add in any order
    gap, noise = (apart(folder / "plain", folder / name) for name in ("cut", "again"))
    assert gap <= 0.01, f"losses after --resume differ by {gap}, of uninterrupted runs by {noise}"
    yield (f"train.py, bf16, 20 steps: SIGTERM at step 5 and --resume differ from uninterrupted by "
           f"{gap:.1e} in the loss, two uninterrupted runs by {noise:.1e}")
    assert launched.wait() == 0, "torchrun failed"
    gaps = {name: apart(folder / name, folder / base) for name, (_, base, _) in RANKED.items()}
    text = ", ".join(f"{gap:.1e} ({name})" for name, gap in gaps.items())
    assert all(gap <= RANKED[name][2] for name, gap in gaps.items()), text
    yield f"torchrun (GPUs: nccl), {world} process(es): losses differ from plain by {text}"


# ---------------------------------------------------------------- speed and memory

def cache(device, folder):
    size = size_of(device)
    problems = tasks.load("tiny-math", limit=size.cached)
    for name, costs in (("tiny models", search_cache.tiny(problems, device)),
                        ("4 layers x 256", search_cache.wide(problems, device, size.depth))):
        tokens, seconds = (costs[what][1] / costs[what][0] for what in ("PRM tokens", "seconds"))
        yield (f"tree cache, {name}, fp32, {size.cached} problems: re-encoding takes {tokens:.1f} "
               f"times the PRM tokens and {seconds:.1f} times the {costs['seconds'][0]:.1f} s; "
               f"same candidates {costs['same']}, scores within {costs['apart']:.0e}")


def random_model(kind, name, size, device):
    layers, width, heads, kv_heads, mlp = size.shapes[name]
    config = Qwen2Config(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=mlp, vocab_size=size.vocabulary,
        max_position_embeddings=4096, tie_word_embeddings=True, step_separator="\n",
        pad_token_id=0, bos_token_id=None, eos_token_id=None)
    with torch.device(device):  # drawn there: a CPU takes a minute for 1.5 G numbers
        model = kind.from_config(config, dtype=torch.bfloat16).eval()
    bad = [name for name, w in model.named_parameters() if not w.isfinite().all()]
    assert not bad, f"{len(bad)} tensors of weights are not finite: {bad[:2]}"
    return model


def decode(device, folder):
    """Best-of-N, n samples a prompt, by Policy.complete and by generate."""
    size = size_of(device)
    for name in size.shapes:
        lm = random_model(AutoModelForCausalLM, name, size, device)
        policy = Policy(lm, load_pretrained(AutoTokenizer, TINY / "A"), "\n", max_steps=1)
        for rows in size.rows:
            prompts = torch.randint(10, 400, (rows // size.n, size.prompt), device=device)
            ours, theirs = search_cache.decode_rates(policy, prompts, size.n, size.new)
            yield (f"decoding, {name}, bf16, {rows // size.n} prompts of {size.prompt} tokens x "
                   f"{size.n} samples of {size.new}: {ours:,.0f} tokens/s, generate {theirs:,.0f}, "
                   f"ratio {ours / theirs:.2f}")


# model, micro-batches a step, flags of train.py; without --checkpointing 1.5B needs small ones
RUNS = [("0.5B", 2), ("1.5B", 4), ("1.5B", 2, "--checkpointing")]
RUNS_OF_ALL_GPUS = [("0.5B", 2), ("1.5B", 2, "--checkpointing", "--fsdp")]


def train_speed(device, folder, world, name, accumulate, *more):
    """12 steps of train.py itself. Saving at each new best PRM, 4 bytes a parameter, is left out:
    minutes of disk that are no part of a step."""
    flags = ("--val-fraction 0.1 --epochs 99 --max-steps 12 --patience 0 --batch-size 64 "
             f"--batch-tokens {size_of(device).step // accumulate} --accumulate {accumulate} "
             f"--dtype bfloat16 --device {device}").split()
    with mock.patch.object(train, "save_prm"), suppress(torch.OutOfMemoryError):
        train.main(["--data", f"{folder}/rows.jsonl", "--model", f"{folder}/{name}",
                    "--out", str(folder / " ".join([name, *more, str(world)])), *flags, *more])
    gc.collect()
    if device == "cuda":  # for the next run: its own peak, all of the memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def speed_row(folder, world, name, accumulate, *more):
    log = read_log(folder / " ".join([name, *more, str(world)]))
    label = f"train.py on {world} process(es), {' '.join([name, *more])}, bf16 over fp32 weights: "
    if not log or log[-1]["kind"] != "end":
        return label + "out of memory"  # of a smaller GPU: no fault
    steps = [row for row in log if row["kind"] == "train"][-6:]
    rate, mfu = (statistics.median(row[key] or 0 for row in steps)  # no MFU: of unknown peak
                 for key in ("tokens_per_second", "mfu"))
    return (f"{label}{rate:,.0f} tokens/s, MFU {mfu:.1%}, peak memory "
            f"{log[-1]['peak_memory'] / 1e9:.1f} GB; rows of {log[0]['length_quantiles'][1]:.0f} "
            f"tokens, {accumulate} micro-batches each")


def speed_ranks(device, folder):
    for run in RUNS_OF_ALL_GPUS:
        train_speed(device, folder.parent / "speed", int(os.environ["WORLD_SIZE"]), *run)


def speed(device, folder):
    size = size_of(device)
    rows = []
    for i in range(160):  # of `length` tokens, a fifth more or less; a step is 19 and a line end
        count = round(size.length / 20 * (0.8 + i / 400))
        rows.append({"prompt": f"Q{i}?", "completions": ["QXZJ" * 4 + "QXZ"] * count,
                     "labels": [(i + t) % 3 > 0 for t in range(count)]})
    write_rows(folder / "rows.jsonl", rows)
    for name in size.shapes:
        random_model(AutoModel, name, size, device).save_pretrained(folder / name)
        load_pretrained(AutoTokenizer, TINY / "A").save_pretrained(folder / name)
    for run in RUNS:
        train_speed(device, folder, 1, *run)
        yield speed_row(folder, 1, *run)
    world = torch.cuda.device_count() if device == "cuda" else 2
    if world > 1:
        assert not launch("speed_ranks", device, folder, world).wait(), "torchrun failed"
        yield from (speed_row(folder, world, *run) for run in RUNS_OF_ALL_GPUS)


def memory(device, folder):
    """similarity.py's peak, against what similarity_cost.py --memory counts without a GPU."""
    size = size_of(device)
    lm = random_model(AutoModelForCausalLM, "0.5B", size, device)
    # Not from 0, the padding: its vector is zero in a new model, and stays zero in each layer if it
    # comes first. There RMSNorm multiplies gradients by 1 / sqrt(eps) = 1000, up to infinity.
    item = (list(range(1, size.response + 1)), size.response // 3)
    F = float(similarity.loss(lm, *item).detach())
    A = similarity.activation(lm, *item)
    bad = [name for (name, _), a in zip(lm.named_parameters(), A) if not a.isfinite().all()]
    assert not bad, f"F = {F}; A of {len(bad)} of {len(A)} tensors is not finite: {bad[:2]}"
    del A
    seconds = []
    for n in (1, 4):  # their difference is without the call's vectors and signs
        started = time.perf_counter()
        similarity.accumulate(lm, [item] * n, [{"Math"}] * n)
        torch.get_device_module(device).synchronize()
        seconds.append(time.perf_counter() - started)
    peak = peak_memory(torch.device(device)) / 1e9  # on a CPU that of the whole process
    counted = similarity_cost.count(lm.config, size.response)[0] / 1e9
    yield (f"similarity.py, 0.5B, bf16, a response of {size.response} tokens: F = {F:.2f}, peak "
           f"memory {peak:.2f} GB, counted {counted:.2f} GB; "
           f"{(seconds[1] - seconds[0]) / 3:.3f} s a response")
