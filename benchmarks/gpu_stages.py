"""The stages of gpu.py that need the project: each is stage(device, folder) and yields the rows
that it finds; an exception is a failed row. folder is its own to write in."""
import gc
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import namedtuple
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen2Config

ROOT = Path(__file__).resolve().parents[1]
import search  # noqa: E402
import tasks  # noqa: E402
import train  # noqa: E402
from benchmarks import search_cache, similarity_cost  # noqa: E402
from policy import Node, Policy, child_key, load_pretrained  # noqa: E402
from prm_model import peak_memory  # noqa: E402
from similarity import Reference  # noqa: E402

# shapes: layers, width, heads, key-value heads, MLP's width. problems: of search. cached, steps:
# problems of the tree cache, and their depth. rows: samples decoded at once, n a prompt, of `new`
# tokens. tokens: of a training step, in rows of about `length`. response: tokens for similarity.
Size = namedtuple("Size", "shapes vocabulary problems cached steps rows n prompt new tokens length "
                          "response")
SIZES = {"cuda": Size({"0.5B": (24, 896, 14, 2, 4864), "1.5B": (28, 1536, 12, 2, 8960)}, 151936,
                      50, 10, 10, (64, 256), 16, 100, 128, 16384, 500, 1024),
         "cpu": Size({"0.5B": (2, 64, 4, 2, 128), "1.5B": (3, 64, 4, 2, 128)}, 512,
                     1, 1, 2, (4, 16), 2, 20, 16, 1024, 100, 64)}


def searches(device, folder):
    """Beam search as in the README: in fp32 with its numbers but for roundings, in bf16 near."""
    problems = SIZES[device].problems
    readme = (ROOT / "README.md").read_text()
    printed = map(float, re.findall(r"beam search 4x4 +(\d\.\d+)", readme)[:2])
    wanted = dict(zip(("math", "code"), printed))
    for dtype in ("float32", "bfloat16"):
        file = folder / f"{dtype}.json"
        for limit in sorted({1, problems}):  # the first call of each kernel loads it
            started = time.perf_counter()
            search.main(["--strategy", "beam", "--limit", str(limit), "--device", device,
                         "--dtype", dtype, "--json", str(file)])
            spent = time.perf_counter() - started
        summary = json.loads(file.read_text())
        told = []
        for domain, want in wanted.items():
            found = summary[domain]["picked"]
            seconds = summary[domain]["cost"]["seconds"]
            told.append(f"{domain} {found:.3f} (README {want:.3f}), {seconds:.3f} s a problem")
            # three standard errors and one problem, since they are few
            if abs(found - want) > 3 * (want * (1 - want) / problems) ** 0.5 + 1 / problems:
                raise RuntimeError(f"{dtype}: {told[-1]}")
        yield f"beam search, {dtype}, {problems} problems: {'; '.join(told)}; {spent:.0f} s"


# ---------------------------------------------------------------- train.py: resumed, DDP, FSDP

def train_flags(device, out, dtype, accumulate, *more):
    return ["--model", str(ROOT / "tiny" / "xs"), "--samples", "200", "--val-fraction", "0.1",
            "--epochs", "9", "--batch-size", "4", "--max-steps", "20", "--eval-every", "10",
            "--device", device, "--dtype", dtype, "--accumulate", str(accumulate),
            "--out", str(out), *more]


# name: flags, plain run to compare with, tolerance. FSDP's bf16 rounds norms and residuals, too,
# which autocast leaves in fp32; what is left in fp32 is the order of sums.
RANKED = {"DDP": (("bfloat16", 2), "plain", 0.01),
          "FSDP": (("bfloat16", 2, "--fsdp"), "plain", 0.1),
          "FSDP in fp32": (("float32", 2, "--fsdp"), "fp32", 1e-3)}


def ranks(device, folder):
    """What training() starts under torchrun: all of RANKED in one process group."""
    for name, (flags, _, _) in RANKED.items():
        train.main(train_flags(device, folder.parent / "training" / name, *flags))
    return ()


def read_log(out, *kinds):
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] in kinds]


def apart(one, two):
    """The largest difference between training or validation losses of two runs."""
    one, two = ([row["loss"] for row in read_log(out, "train", "eval")] for out in (one, two))
    if len(one) != len(two):
        raise RuntimeError(f"{len(one)} losses against {len(two)}")
    return max(abs(a - b) for a, b in zip(one, two))


def sigterm_at(step, log):
    """A real SIGTERM to this process, once the log has that step."""
    while not (log.exists() and f'"train", "step": {step},' in log.read_text()):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


def training(device, folder):
    """Losses of runs that should be the same: uninterrupted or resumed, on one GPU or on all."""
    world = torch.cuda.device_count() if device == "cuda" else 1
    launched = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={world}", str(ROOT / "benchmarks" / "gpu.py"), "--stage", "ranks",
         "--device", device, "--out", str(folder.parent)])
    for name, dtype in (("plain", "bfloat16"), ("again", "bfloat16"), ("fp32", "float32")):
        train.main(train_flags(device, folder / name, dtype, 2 * world))
    flags = train_flags(device, folder / "cut", "bfloat16", 2 * world)
    watch = threading.Thread(target=sigterm_at, args=(5, folder / "cut" / "log.jsonl"), daemon=True)
    watch.start()
    if train.main(flags) is not None or not list((folder / "cut").glob("checkpoint-*")):
        raise RuntimeError("SIGTERM did not stop train.py with a checkpoint")
    stopped = read_log(folder / "cut", "train")[-1]["step"]
    train.main([*flags, "--resume"])
    cut = apart(folder / "plain", folder / "cut")
    noise = apart(folder / "plain", folder / "again")  # of kernels that add in any order
    text = (f"train.py, bf16, 20 steps: SIGTERM after step {stopped} and --resume differ from "
            f"uninterrupted by {cut:.1e} in the loss, two uninterrupted runs by {noise:.1e}")
    if cut > 0.01:
        raise RuntimeError(text)
    yield text
    if launched.wait():
        raise RuntimeError("torchrun failed: its error is in training.log")
    found = {name: apart(folder / name, folder / base) for name, (_, base, _) in RANKED.items()}
    text = (f"{'nccl' if device == 'cuda' else 'gloo'} with {world} process(es): losses differ "
            "from plain by " + ", ".join(f"{x:.1e} ({name})" for name, x in found.items()))
    if any(found[name] > tolerance for name, (_, _, tolerance) in RANKED.items()):
        raise RuntimeError(text)
    yield text


# ---------------------------------------------------------------- speed and memory

def cache(device, folder):
    size = SIZES[device]
    problems = tasks.load("tiny-math", limit=size.cached)
    for name, compare in (("tiny models", search_cache.tiny),
                          ("4 layers x 256", partial(search_cache.wide, max_steps=size.steps))):
        found = compare(problems, device)
        tokens, seconds = (found[what][1] / found[what][0] for what in ("PRM tokens", "seconds"))
        yield (f"tree cache, {name}, fp32, {size.cached} problems: re-encoding takes {tokens:.1f} "
               f"times the PRM tokens and {seconds:.1f} times the {found['seconds'][0]:.1f} s; "
               f"same candidates {found['same']}, scores within {found['apart']:.0e}")


def config_of(name, size):
    layers, width, heads, kv_heads, mlp = size.shapes[name]
    return Qwen2Config(vocab_size=size.vocabulary, hidden_size=width, intermediate_size=mlp,
                       num_hidden_layers=layers, num_attention_heads=heads,
                       num_key_value_heads=kv_heads, max_position_embeddings=4096,
                       tie_word_embeddings=True, pad_token_id=0, bos_token_id=None,
                       eos_token_id=None, step_separator="\n")


def random_model(kind, name, size, device):
    with torch.device(device):
        return kind.from_config(config_of(name, size), dtype=torch.bfloat16).eval()


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def forget(device):
    """What no longer has a name goes, and the peak starts again."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def ours(policy, prompts, n, new):
    policy.max_step_tokens = policy.max_solution_tokens = new
    roots = [Node("", ids=ids, key=child_key(0, i)) for i, ids in enumerate(prompts.tolist())]
    ends = policy.complete(roots, n)
    return sum(end.tokens() for group in ends for end in group)


@torch.inference_mode()
def theirs(policy, prompts, n, new):
    out = policy.lm.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                             top_k=0, max_new_tokens=new, num_return_sequences=n)
    return out[:, prompts.shape[1]:].numel()


def decode(device, folder):
    """Best-of-N as its users call it, n samples a prompt. No token ends a text before the limit:
    all have the same number of tokens."""
    size = SIZES[device]
    tokenizer = load_pretrained(AutoTokenizer, ROOT / "tiny" / "A")  # others' tokens are no text
    for name in size.shapes:
        lm = random_model(AutoModelForCausalLM, name, size, device)
        policy = Policy(lm, tokenizer, "\n", max_steps=1)
        policy.eos_ids, policy.eos = [-1], torch.tensor([-1], device=device)
        for rows in size.rows:
            prompts = torch.randint(10, 400, (rows // size.n, size.prompt), device=device)
            rates = []
            for sampler in (ours, theirs):
                sampler(policy, prompts, size.n, size.new // 4)  # loads kernels, takes memory
                synchronize(device)
                started = time.perf_counter()
                tokens = sampler(policy, prompts, size.n, size.new)
                synchronize(device)
                rates.append(tokens / (time.perf_counter() - started))
                if tokens != rows * size.new:
                    raise RuntimeError(f"{sampler.__name__} wrote {tokens} tokens")
            yield (f"decoding, {name}, bf16, {rows // size.n} prompts of {size.prompt} tokens x "
                   f"{size.n} samples of {size.new}: {rates[0]:,.0f} tokens/s, generate "
                   f"{rates[1]:,.0f}, ratio {rates[0] / rates[1]:.2f}")
        del lm, policy
        forget(device)


def write_rows(file, length):
    """Rows of about `length` tokens, up to a fifth more or less; a step is 19 and a line end."""
    rng = random.Random(0)
    with open(file, "w") as out:
        for i in range(160):
            count = round(length * rng.uniform(0.8, 1.2) / 20)
            steps = ["".join(rng.choices("QXZJ", k=19)) for _ in range(count)]
            labels = [rng.random() > 0.3 for _ in steps]
            out.write(json.dumps(dict(prompt=f"Q{i}?", completions=steps, labels=labels)) + "\n")


def train_speed(device, folder, model, out, *more):
    """train.py itself -> its figures of the last 6 of 12 steps. What it writes at each new best
    PRM, 4 bytes a parameter, is left out: minutes of disk that are no part of a step."""
    half = SIZES[device].tokens // 2
    out.mkdir()
    with mock.patch.multiple(train, save_prm=lambda *_: None, take_out=lambda *_: None):
        train.main(["--data", str(folder / "rows.jsonl"), "--model", str(model), "--out", str(out),
                    "--val-fraction", "0.1", "--epochs", "99", "--max-steps", "12",
                    "--patience", "0", "--batch-size", "64", "--batch-tokens", str(half),
                    "--accumulate", "2", "--dtype", "bfloat16", "--device", device, *more])
    start, *steps, end = read_log(out, "start", "train", "end")
    rate = statistics.median(row["tokens_per_second"] for row in steps[-6:])
    mfu = statistics.median(row["mfu"] or 0 for row in steps[-6:])
    return (f"{rate:,.0f} tokens/s, MFU {f'{mfu:.1%}' if mfu else 'unknown'}, peak memory "
            f"{end['peak_memory'] / 1e9:.1f} GB; {start['parameters'] / 1e9:.2f} G parameters, "
            f"rows of {start['length_quantiles'][1]:.0f} tokens, 2 micro-batches of {half} a step")


def speed(device, folder):
    size = SIZES[device]
    write_rows(folder / "rows.jsonl", size.length)
    for name, more in (("0.5B", []), ("1.5B", []), ("1.5B", ["--checkpointing"])):
        model = folder / f"model-{name}"
        if not model.exists():
            random_model(AutoModel, name, size, device).save_pretrained(model)
            load_pretrained(AutoTokenizer, ROOT / "tiny" / "A").save_pretrained(model)
        forget(device)
        try:
            found = train_speed(device, folder, model, folder / "-".join([name, *more]), *more)
        except torch.OutOfMemoryError:
            found = "out of memory"  # of a smaller GPU: no fault
        yield f"train.py, {' '.join([name, *more])}, bf16 over fp32 weights: {found}"
    for name in size.shapes:
        shutil.rmtree(folder / f"model-{name}")


def memory(device, folder):
    """similarity.py's peak, against what similarity_cost.py --memory counts without a GPU."""
    size = SIZES[device]
    reference = Reference(random_model(AutoModelForCausalLM, "0.5B", size, device))
    sums = torch.zeros(4, reference.P, device=device)
    kept = torch.zeros(reference.D, device=device)
    forget(device)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        reference.accumulate(list(range(size.response)), size.response // 3, sums[:1], kept)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    peak = peak_memory(torch.device(device))  # on a CPU that of the whole process
    counted = similarity_cost.count(config_of("0.5B", size), size.response)[0]
    yield (f"similarity.py, 0.5B, bf16, a response of {size.response} tokens: peak memory "
           f"{peak / 1e9:.2f} GB, counted {counted / 1e9:.2f} GB; {min(seconds):.3f} s a response")
